"""Plans on held-out tasks: do they parse, and who gets which robot?

    python benchmarks/plans.py --robot_plans ../shared/robots/multi_robot_selection_dataset.json

Cross-validation over tasks. In each fold a model learns the plans of the other tasks, and their
robots (for its selector), and nothing else. On the held-out tasks

- it writes plans: which parse, name robots of the catalog alone, and begin at order 1 and never go
  back; F1 of the set of robots against the true plan's (mean over tasks), and by how many subtasks
  it is off; and how many words a subtask shares with the nearest true one (Jaccard index);
- it is given the true plan up to a subtask's words, and says the robot: by its decoder, by its
  selector (asked with the words as a task), and by both (product). Beside it the commonest robot,
  and TF-IDF of 1- and 2-grams with logistic regression on the words.

With `--model` no model is trained: that one is judged, on the tenth of the plans that a training
with `--plan_data` holds out.

    python benchmarks/plans.py --robot_plans data/robots/plans.json --model shipped
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import make_parser, run, show_result

from bitgen.config import MODEL_SIZES, BitGenConfig, TrainingConfig
from bitgen.console import console
from bitgen.dataset.images import ImageCache
from bitgen.dataset.plan_grammar import PlanFormat, PlanGrammar, PlanLimits
from bitgen.dataset.plans import TaskPlan, load_plans, split_plans
from bitgen.dataset.robots import Robot, RobotTask, load_catalog
from bitgen.dataset.samples import TrainingSet
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.inference.backend import RobotTexts
from bitgen.inference.planning import PlanOptions, name_log_probabilities, write_plan
from bitgen.inference.predictor import BitGen
from bitgen.inference.torch_backend import TorchBackend
from bitgen.model.bitgen import BitGenModel
from bitgen.training.trainer import Trainer

WRITTEN = (
    "parses", "catalog_only", "order_valid", "robots_f1", "commonest_f1", "subtasks_off",
    "words_shared",
)  # fmt: skip
CHOOSERS = ("decoder", "selector", "both", "commonest", "tfidf_lr")
WORDS = {
    "decoder": "the decoder",
    "selector": "the robot selector, trained on tasks",
    "both": "both, multiplied",
    "commonest": "always the commonest robot",
    "tfidf_lr": "TF-IDF with logistic regression",
}


def main() -> int:
    arguments = read_arguments()
    catalog = load_catalog()
    plans = load_plans([arguments.robot_plans], catalog)
    torch.set_num_threads(arguments.threads)
    written: list[dict[str, float]] = []
    right: dict[str, list[bool]] = {name: [] for name in CHOOSERS}
    folds = divide(plans, arguments)
    for fold, (train, held_out) in enumerate(folds, start=1):
        if arguments.model:
            model = BitGen.load(arguments.model, device="cpu", backend="torch")
            backend, tokenizer = TorchBackend(model.model), model.tokenizer
        else:
            backend, tokenizer = train_model(train, catalog, arguments)
        plan_format = PlanFormat(tokenizer)
        grammar = PlanGrammar(plan_format, [robot.name for robot in catalog], PlanLimits())
        commonest = commonest_robot(train)
        for plan in held_out:
            written.append(judge_plan(plan, backend, tokenizer, grammar, commonest))
        for name, hits in judge_robots(train, held_out, backend, tokenizer, catalog).items():
            right[name] += hits
        console.note(f"Fold {fold} of {len(folds)}: {words_of(right, written)}")
    shares = {name: float(np.mean(hits)) for name, hits in right.items() if hits}
    means = {name: float(np.mean([row[name] for row in written])) for name in written[0]}
    rows = [
        ("plans that parse", f"{means['parses']:.1%}"),
        ("plans with robots of the catalog alone", f"{means['catalog_only']:.1%}"),
        ("plans in a valid order", f"{means['order_valid']:.1%}"),
        ("F1 of the set of robots", f"{means['robots_f1']:.3f}"),
        ("the same, of the commonest robot alone", f"{means['commonest_f1']:.3f}"),
        ("subtasks too many or too few", f"{means['subtasks_off']:.2f}"),
        ("words shared with the nearest true subtask", f"{means['words_shared']:.3f}"),
        *((f"robot of a true subtask: {WORDS[name]}", f"{shares[name]:.1%}") for name in shares),
    ]
    figures = {
        "tasks": len(written),
        "subtasks": len(right["decoder"]),
        **(
            {"model": arguments.model}
            if arguments.model
            else {
                "folds": arguments.folds,
                "measured_folds": len(folds),
                "model_size": arguments.model_size,
                "steps": arguments.steps,
                "seed": arguments.seed,
            }
        ),
        "written": means,
        "robot_agreement": shares,
    }
    failures = [
        f"{name} holds for {means[name]:.1%} of the plans, and must for all."
        for name in ("parses", "catalog_only", "order_valid")
        if means[name] < 1
    ]
    return show_result("plans", figures, ("", "held out"), rows, failures)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--robot_plans", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", metavar="RUN_OR_FILE", help="judge this one; train none")
    parser.add_argument("--model_size", choices=MODEL_SIZES, default="nano")
    parser.add_argument("--steps", type=int, default=300, help="updates of each model")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--measured_folds", type=int, default=0, help="the first so many; 0: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def divide(
    plans: Sequence[TaskPlan], arguments: argparse.Namespace
) -> list[tuple[list[TaskPlan], list[TaskPlan]]]:
    """What is learnt and what is held out, in each measured fold."""
    if arguments.model:
        return [split_plans(plans)]
    order = np.random.default_rng(arguments.seed).permutation(len(plans))
    folds = []
    for fold in range(min(arguments.measured_folds or arguments.folds, arguments.folds)):
        held_out = [plans[i] for i in order[fold :: arguments.folds]]
        folds.append(([plan for plan in plans if plan not in held_out], held_out))
    return folds


def train_model(
    plans: Sequence[TaskPlan], catalog: Sequence[Robot], arguments: argparse.Namespace
) -> tuple[TorchBackend, Tokenizer]:
    names = tuple(robot.name for robot in catalog)
    texts = [plan.task for plan in plans] + [s.subtask for plan in plans for s in plan.subtasks]
    config = BitGenConfig.preset(arguments.model_size, dropout=0.1, robot_names=names)
    tokenizer = Tokenizer.train(texts + [robot.text() for robot in catalog], config.vocab_size)
    training = TrainingConfig(
        batch_size=32, num_epochs=10_000, max_steps=arguments.steps, warmup_steps=30,
        learning_rate=2e-3, image_word_weight=0.0, seed=arguments.seed, device="cpu",
        precision="fp32", weights_every=0, eval_every=arguments.steps, save_every=arguments.steps,
    )  # fmt: skip
    tasks = [
        RobotTask(p.task, tuple(n for n in names if n in {s.robot for s in p.subtasks}))
        for p in plans
    ]
    torch.manual_seed(arguments.seed)
    model = BitGenModel(config)
    with tempfile.TemporaryDirectory() as folder:
        cache = ImageCache(Path(folder), config.image_size, config.image_resize)
        samples = TrainingSet(
            [], tasks, cache, tokenizer, config, training, names, training_mode=True, plans=plans
        )
        Trainer(
            model, samples, None, tokenizer, catalog, training, Path(folder) / "run", {}
        ).train()
    return TorchBackend(model), tokenizer


def judge_plan(
    plan: TaskPlan,
    backend: TorchBackend,
    tokenizer: Tokenizer,
    grammar: PlanGrammar,
    commonest: str,
) -> dict[str, float]:
    """The figures of the plan that the model writes for a task."""
    prompt = tokenizer.encode_plan_task(plan.task)
    reader = backend.read_text(prompt, None, grammar.limits.max_tokens)
    tokens = write_plan(reader, grammar, PlanOptions()).tokens
    true_robots = {subtask.robot for subtask in plan.subtasks}
    try:
        rows = json.loads(tokenizer.decode(tokens))
        orders = [order for order, _, _ in rows]
        shared = [
            max(jaccard(words, true.subtask) for true in plan.subtasks) for _, words, _ in rows
        ]
        robots = {name.strip() for _, _, name in rows}
    except (ValueError, TypeError):
        return dict.fromkeys(WRITTEN, 0.0)
    steps = {after - before for before, after in zip(orders, orders[1:], strict=False)}
    values = (
        1.0,
        float(robots <= set(grammar.robots)),
        float(orders[:1] == [1] and steps <= {0, 1}),
        f1(robots, true_robots),
        f1({commonest}, true_robots),
        float(abs(len(rows) - len(plan.subtasks))),
        float(np.mean(shared)),
    )
    return dict(zip(WRITTEN, values, strict=True))


def commonest_robot(plans: Sequence[TaskPlan]) -> str:
    return Counter(s.robot for plan in plans for s in plan.subtasks).most_common(1)[0][0]


def jaccard(text: str, other: str) -> float:
    words, others = (set(re.findall(r"\w+", t.lower())) for t in (text, other))
    return len(words & others) / max(1, len(words | others))


def f1(found: set[str], true: set[str]) -> float:
    return 2 * len(found & true) / (len(found) + len(true))


def judge_robots(
    train: Sequence[TaskPlan],
    held_out: Sequence[TaskPlan],
    backend: TorchBackend,
    tokenizer: Tokenizer,
    catalog: Sequence[Robot],
) -> dict[str, list[bool]]:
    """Of every true subtask of the held-out plans: whether each chooser gives it its robot."""
    names = [robot.name for robot in catalog]
    plan_format = PlanFormat(tokenizer)
    spelled = [plan_format.robot_name(name) for name in names]
    texts = RobotTexts(
        tuple(names), tuple(tuple(tokenizer.encode_robot(r.text())) for r in catalog)
    )
    commonest = commonest_robot(train)
    found: dict[str, list[str]] = {name: [] for name in CHOOSERS}
    truth: list[str] = []
    for plan in held_out:
        reader = backend.read_text(tokenizer.encode_plan_task(plan.task), None, 400)
        start = reader.length
        for number, subtask in enumerate(plan.subtasks):
            # The text up to the robot of this subtask: cut before its name and the two brackets.
            ids, _ = plan_format.encode(plan.subtasks[: number + 1], 400)
            before = ids[: -len(spelled[names.index(subtask.robot)]) - 2]
            by_decoder_R = name_log_probabilities(reader, before, spelled)
            reader.rewind(start)
            words = [tokenizer.encode_task(subtask.subtask)]
            by_selector_R = -np.logaddexp(0.0, -backend.robot_logits(words, [None], texts)[0])
            for name, scores_R in (
                ("decoder", by_decoder_R),
                ("selector", by_selector_R),
                ("both", by_decoder_R + by_selector_R),
            ):
                found[name].append(names[int(scores_R.argmax())])
            found["commonest"].append(commonest)
            truth.append(subtask.robot)
    found["tfidf_lr"] = by_tfidf(train, held_out)
    return {
        name: [robot == true for robot, true in zip(robots, truth, strict=True)]
        for name, robots in found.items()
        if robots
    }


def by_tfidf(train: Sequence[TaskPlan], held_out: Sequence[TaskPlan]) -> list[str]:
    """Robots by scikit-learn; none where it is not installed."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        console.warning("scikit-learn is not installed: without TF-IDF.")
        return []
    known = [subtask for plan in train for subtask in plan.subtasks]
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=2000),
    )
    classifier.fit([s.subtask for s in known], [s.robot for s in known])
    asked = [subtask.subtask for plan in held_out for subtask in plan.subtasks]
    predicted: list[str] = classifier.predict(asked).tolist()
    return predicted


def words_of(right: dict[str, list[bool]], written: Sequence[dict[str, float]]) -> str:
    shares = ", ".join(f"{name} {np.mean(hits):.1%}" for name, hits in right.items() if hits)
    return f"robots {shares}; F1 {np.mean([row['robots_f1'] for row in written]):.3f}"


if __name__ == "__main__":
    run(main)
