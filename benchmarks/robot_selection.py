"""How well robots are chosen that were trained on, and one that was not, on real tasks.

    python benchmarks/robot_selection.py --robot_data ../shared/robots/single_robot_selection.json \
        --coco_data ../shared/coco --coco_data ../shared/flickr8k

Five-fold cross-validation, the same folds for all: the tower of size nano trained by
`bitgen.training.trainer` on tasks alone (no picture), against the commonest set of robots and two
linear models of scikit-learn on TF-IDF of words and pairs of words. Then each robot is left out of
the training, with the tasks that name no other one, and added by its text alone.

`--coco_data` gives the captions for the tower's start: causal language modelling of the text alone,
`--pretraining_steps` updates of 64 captions. The tokenizer is learnt from these captions and the
robots' texts; no task of the data, and no robot's label, is seen before the folds are made.
`--further_tasks FILE` joins the tasks of another file to the training part of every fold, for the
linear models as for ours. None of them is tested on; one that stands in the data too is left out.
Needs scikit-learn (`pip install 'bitgen[eval]'`). `--quick` is for a look at whether it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.coco import load_coco
from bitgen.dataset.collate import pad_rows
from bitgen.dataset.images import ImageCache
from bitgen.dataset.robots import (
    Robot,
    RobotTask,
    catalog_from_json,
    chosen_robots,
    load_catalog,
    load_tasks,
    split_tasks,
    without_tasks,
)
from bitgen.dataset.samples import TrainingSet
from bitgen.dataset.task_words import TASK_WORD_BINS, robot_sets
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.inference.predictor import BitGen
from bitgen.model.bitgen import BitGenModel
from bitgen.model.masks import AttentionMask
from bitgen.training.losses import caption_loss
from bitgen.training.optimizer import make_optimizer, set_rates
from bitgen.training.schedule import learning_rate_at
from bitgen.training.trainer import Trainer

SIZE, FOLDS = "nano", 5
PRETRAINING_BATCH, PRETRAINING_RATE, LONGEST_CAPTION = 64, 2e-3, 30


class Scores(NamedTuple):
    """Shares, 0 to 1."""

    exact_match: float
    macro_f1: float


def catalog_of_data(path: Path) -> list[Robot] | None:
    """The robots as the instruction of the data's own form describes them; None without one.

    A line that is a name and a colon begins a robot; the lists behind it are divided by commas.
    """
    instruction = json.loads(path.read_text(encoding="utf-8"))[0].get("instruction")
    if not instruction:
        return None
    robots: list[dict[str, Any]] = []
    for line in instruction.splitlines()[1:]:
        key, _, rest = line.partition(":")
        if not rest.strip():
            robots.append({"name": key})
        elif robots:
            robots[-1][key] = [phrase.strip() for phrase in rest.split(",") if phrase.strip()]
    return catalog_from_json(json.dumps(robots), source=f"the instruction in {path}")


def label_matrix(tasks: Sequence[RobotTask], catalog: Sequence[Robot]) -> np.ndarray:
    """bool `[N, R]`: which robots suit."""
    return np.array([[robot.name in task.robots for robot in catalog] for task in tasks])


def judge(chosen_NR: np.ndarray, suits_NR: np.ndarray) -> Scores:
    """Exact match and macro F1 (a robot that is neither chosen nor suits counts 0)."""
    both = (chosen_NR & suits_NR).sum(axis=0)
    either = chosen_NR.sum(axis=0) + suits_NR.sum(axis=0)
    f1_R = 2 * both / np.maximum(either, 1)
    return Scores(float((chosen_NR == suits_NR).all(axis=1).mean()), float(f1_R.mean()))


def average_precision(scores_N: np.ndarray, suits_N: np.ndarray) -> float:
    """Mean of the precisions at each task that the robot suits, by falling score."""
    ranked = suits_N[np.argsort(-scores_N, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return float(precision[ranked].mean())


def folds_of(count: int, seed: int) -> np.ndarray:
    """Which of the folds each task is tested in."""
    fold_N = np.empty(count, dtype=int)
    fold_N[np.random.default_rng(seed).permutation(count)] = np.arange(count) % FOLDS
    return fold_N


# Ours -------------------------------------------------------------------------------------------


def pretrain_tower(
    captions: Sequence[str], tokenizer: Tokenizer, config: BitGenConfig, steps: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The decoder after next-token training on captions without pictures."""
    ids = [row[:LONGEST_CAPTION] for row in tokenizer.encode_batch(captions)]
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    decoder = BitGenModel(config).text_decoder.train()
    optimizer = make_optimizer(decoder, PRETRAINING_RATE, 0.05)
    began = time.perf_counter()
    for step in range(steps):
        rate = learning_rate_at(
            step, peak=PRETRAINING_RATE, minimum=PRETRAINING_RATE / 50,
            warmup_steps=min(100, steps // 10), total_steps=steps,
        )  # fmt: skip
        set_rates(optimizer, rate, 0.05)
        drawn = random.integers(len(ids), size=PRETRAINING_BATCH)
        rows = [[tokenizer.bos_id, *ids[index], tokenizer.eos_id] for index in drawn]
        input_ids_BL, valid_BL = pad_rows(rows, tokenizer.pad_id)
        states_BLC, _, _ = decoder(
            decoder.embed_tokens(input_ids_BL),
            AttentionMask.causal() & AttentionMask.padding(valid_BL),
            torch.arange(input_ids_BL.shape[1])[None],
        )
        labels_BL = input_ids_BL.masked_fill(~valid_BL, -100)
        total, count = caption_loss(decoder.lm_head(states_BLC), labels_BL)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            spent = time.perf_counter() - began
            print(f"  captions: step {step}, loss {total / count:.3f}, {spent:.0f} s", flush=True)
    return {name: tensor.contiguous() for name, tensor in decoder.state_dict().items()}


class Ours:
    """Trains a selector by the trainer of `bitgen train`, on tasks alone."""

    def __init__(self, tokenizer: Tokenizer, num_epochs: int, folder: Path) -> None:
        self._tokenizer, self._num_epochs, self._folder = tokenizer, num_epochs, folder
        self._count = 0

    def train(
        self,
        tasks: Sequence[RobotTask],
        catalog: Sequence[Robot],
        seed: int,
        tower: dict[str, torch.Tensor] | None,
        quantization: str,
    ) -> BitGen:
        """A model trained on nine tenths of the tasks; the rest finds the threshold."""
        self._count += 1
        train_tasks, val_tasks = split_tasks(tasks)
        names = tuple(robot.name for robot in catalog)
        config = BitGenConfig.preset(
            SIZE,
            quantization=quantization,
            vocab_size=4096,
            robot_names=names,
            robot_sets=robot_sets(train_tasks, names),
            task_word_bins=TASK_WORD_BINS,
        )
        steps = self._num_epochs * math.ceil(len(train_tasks) / 16)
        training = TrainingConfig(
            num_epochs=self._num_epochs, batch_size=16, learning_rate=1e-3, schedule="cosine",
            warmup_steps=steps // 10, min_learning_rate=2e-5, image_word_weight=0.0, seed=seed,
            eval_every=steps, save_every=10 * steps, weights_every=0, device="cpu",
            precision="fp32",
        )  # fmt: skip
        torch.manual_seed(seed)
        model = BitGenModel(config)
        if tower is not None:
            model.text_decoder.load_state_dict(tower)
        cache = ImageCache(self._folder, config.image_size, config.image_resize)
        train_set, val_set = (
            TrainingSet(
                images=[], tasks=part, cache=cache, tokenizer=self._tokenizer, config=config,
                training=training, robot_names=config.robot_names, training_mode=mode,
            )
            for part, mode in ((train_tasks, True), (val_tasks, False))
        )  # fmt: skip
        trainer = Trainer(
            model, train_set, val_set, self._tokenizer, catalog, training,
            self._folder / f"run{self._count}", {},
        )  # fmt: skip
        summary = trainer.train()
        assert summary.validation is not None
        found = summary.validation
        info = {
            "robot_threshold": found.robot_threshold,
            "robot_temperature": found.robot_temperature,
            "robot_word_weight": found.robot_word_weight,
        }
        return BitGen(model, self._tokenizer, catalog, "cpu", info)


def probabilities(
    model: BitGen, tasks: Sequence[RobotTask], catalog: Sequence[Robot]
) -> np.ndarray:
    """float `[N, R]` in the order of the catalog."""
    order = {robot.name: index for index, robot in enumerate(catalog)}
    found_NR = np.zeros((len(tasks), len(catalog)))
    ranked = model.select_robots_batch([task.task for task in tasks], catalog=catalog)
    for row, choices in zip(found_NR, ranked, strict=True):
        for choice in choices:
            row[order[choice.name]] = choice.probability
    return found_NR


def chosen_at(probabilities_NR: np.ndarray, threshold: float) -> np.ndarray:
    """bool `[N, R]`, by the rule of `bitgen infer`."""
    return np.array([chosen_robots(row, threshold) for row in probabilities_NR.tolist()])


# The others -------------------------------------------------------------------------------------


def linear_model(classifier: Any) -> Callable[[list[str], np.ndarray, list[str]], np.ndarray]:
    """A function from training tasks, their labels and test tasks to the robots chosen."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.multiclass import OneVsRestClassifier

    def choose(train: list[str], suits_NR: np.ndarray, test: list[str]) -> np.ndarray:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2))
        fitted = OneVsRestClassifier(classifier).fit(
            vectorizer.fit_transform(train), suits_NR.astype(int)
        )
        found: np.ndarray = fitted.predict(vectorizer.transform(test)).astype(bool)
        return found

    return choose


def commonest_set(train: list[str], suits_NR: np.ndarray, test: list[str]) -> np.ndarray:
    """The set of robots that most training tasks have, for every task."""
    (commonest, _), *_ = Counter(map(tuple, suits_NR.tolist())).most_common(1)
    return np.array([commonest] * len(test))


def tfidf_similarity(tasks: Sequence[RobotTask], robot: Robot) -> np.ndarray:
    """Cosine of each task and the robot's text in TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [task.task for task in tasks]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2)).fit([*texts, robot.text()])
    cosine = vectorizer.transform(texts) @ vectorizer.transform([robot.text()]).T
    found: np.ndarray = cosine.toarray()[:, 0]
    return found


# The whole --------------------------------------------------------------------------------------


def cross_validate(
    name: str,
    seeds: Sequence[int],
    tasks: Sequence[RobotTask],
    catalog: Sequence[Robot],
    choose: Callable[[list[RobotTask], list[RobotTask], int], np.ndarray],
) -> dict[str, Any]:
    """Scores of each fold of each seed; `choose` takes training and test tasks and the seed."""
    suits_NR = label_matrix(tasks, catalog)
    pooled, by_fold = [], []
    for seed in seeds:
        fold_N = folds_of(len(tasks), seed)
        chosen_NR = np.zeros_like(suits_NR)
        for fold in range(FOLDS):
            train = [task for task, f in zip(tasks, fold_N, strict=True) if f != fold]
            test = [task for task, f in zip(tasks, fold_N, strict=True) if f == fold]
            chosen_NR[fold_N == fold] = choose(train, test, seed)
            by_fold.append(judge(chosen_NR[fold_N == fold], suits_NR[fold_N == fold]).exact_match)
        pooled.append(judge(chosen_NR, suits_NR))
    exact = [scores.exact_match for scores in pooled]
    f1 = [scores.macro_f1 for scores in pooled]
    result = {
        "name": name,
        "exact_match": float(np.mean(exact)),
        "exact_match_seeds": exact,
        "exact_match_folds": by_fold,
        "macro_f1": float(np.mean(f1)),
        "macro_f1_seeds": f1,
    }
    folds = " ".join(f"{value:.2f}" for value in by_fold[:FOLDS])
    print(
        f"{name:44} {np.mean(exact):.3f} +- {np.std(exact):.3f}  {np.mean(f1):.3f}"
        f"  first seed's folds {folds}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--robot_data", type=Path, action="append", required=True)
    parser.add_argument("--coco_data", type=Path, action="append", default=[])
    parser.add_argument(
        "--further_tasks", type=Path, action="append", default=[], help="to train on, never to test"
    )
    parser.add_argument("--tower", type=Path, help="folder of a pretraining, made if absent")
    parser.add_argument("--pretraining_steps", type=int, default=1200)
    parser.add_argument("--num_epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs, no twin")
    parser.add_argument(
        "--only_ours", action="store_true", help="the catalog that ships alone, and no twin"
    )
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.num_epochs, options.pretraining_steps = 1, 2, 20
    torch.set_num_threads(1)
    shipped = load_catalog()
    tasks = load_tasks(options.robot_data, shipped)
    further: list[RobotTask] = []
    if options.further_tasks:
        further = without_tasks(load_tasks(options.further_tasks, shipped), tasks)
    of_data = None if options.only_ours else catalog_of_data(options.robot_data[0])
    catalogs = {"ours": shipped, **({"the data's": of_data} if of_data else {})}
    own_first = of_data or shipped
    suits_NR = label_matrix(tasks, shipped)
    print(f"{len(tasks)} tasks, {len(further)} further ones; shares of the robots:", end=" ")
    print(*(f"{r.name} {s:.2f}" for r, s in zip(shipped, suits_NR.mean(axis=0), strict=True)))

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.tower or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        texts = [task.task for task in further]
        texts += [robot.text() for robot in [*shipped, *(of_data or [])]]
        tokenizer, towers = _towers(folder, options, texts)
        ours = Ours(tokenizer, options.num_epochs, Path(temporary))
        print(f"\n{FOLDS}-fold cross-validation{'':18} exact match     macro F1")
        results = _compare(ours, towers, tasks, further, own_first, catalogs, options)
        left_out = _leave_one_out(ours, towers.get("ternary"), tasks, further, catalogs, options)
    line = {
        "benchmark": "robot_selection",
        "tasks": len(tasks),
        "further_tasks": len(further),
        "seeds": options.seeds,
        "num_epochs": options.num_epochs,
        "pretraining_steps": options.pretraining_steps if towers else 0,
        "threads": 1,
        "torch": torch.__version__,
        "cross_validation": results,
        "leave_one_robot_out": left_out,
    }
    print(json.dumps(line))


def _towers(
    folder: Path, options: argparse.Namespace, texts: Sequence[str]
) -> tuple[Tokenizer, dict[str, dict[str, torch.Tensor]]]:
    """The tokenizer, of captions and texts, and a pretrained tower for each quantization."""
    captions: list[str] = []
    if options.coco_data:
        images = load_coco(options.coco_data, "train")
        captions = [caption for image in images for caption in image.captions]
    tokenizer_file = folder / "tokenizer.json"
    if tokenizer_file.is_file():
        tokenizer = Tokenizer.load(tokenizer_file)
    else:
        tokenizer = Tokenizer.train([*captions, *texts], 4096)
        tokenizer_file.write_text(tokenizer.to_json(), encoding="utf-8")
    towers = {}
    for quantization in ("ternary", "none"):
        file = folder / f"{quantization}.safetensors"
        if not file.is_file():
            if not captions or (options.quick and quantization == "none"):
                continue
            print(f"Pretraining on {len(captions):,} captions, quantization {quantization}")
            config = BitGenConfig.preset(SIZE, quantization=quantization, vocab_size=4096)
            save_file(pretrain_tower(captions, tokenizer, config, options.pretraining_steps), file)
        towers[quantization] = load_file(file)
    return tokenizer, towers


def _compare(
    ours: Ours,
    towers: dict[str, dict[str, torch.Tensor]],
    tasks: Sequence[RobotTask],
    further: Sequence[RobotTask],
    catalog: Sequence[Robot],
    catalogs: dict[str, list[Robot]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    seeds = range(options.seeds)
    balanced = LogisticRegression(C=10, class_weight="balanced", max_iter=1000)
    others = {
        "commonest set": commonest_set,
        "TF-IDF, logistic regression": linear_model(LogisticRegression(C=10, max_iter=1000)),
        "TF-IDF, logistic regression, class weights": linear_model(balanced),
        "TF-IDF, linear SVM": linear_model(LinearSVC()),
    }
    results = []
    for name, choose in others.items():

        def by_words(
            train: list[RobotTask],
            test: list[RobotTask],
            seed: int,
            choose: Callable[[list[str], np.ndarray, list[str]], np.ndarray] = choose,
            further: Sequence[RobotTask] = () if choose is commonest_set else further,
        ) -> np.ndarray:
            known = [*train, *further]
            return choose(
                [task.task for task in known],
                label_matrix(known, catalog),
                [task.task for task in test],
            )

        results.append(cross_validate(name, seeds, tasks, catalog, by_words))
    variants: list[tuple[str, list[Robot], str, bool]] = [
        (f"ours, ternary, catalog {name}", robots, "ternary", True)
        for name, robots in catalogs.items()
    ]
    if not (options.quick or options.only_ours):
        variants.append(("ours, ternary, without captions", list(catalog), "ternary", False))
        variants.append(("ours, full precision", list(catalog), "none", True))
    for name, robots, quantization, starts_from_captions in variants:
        at_half: list[np.ndarray] = []
        tower = towers.get(quantization) if starts_from_captions else None
        if starts_from_captions and tower is None and towers:
            continue

        def by_model(
            train: list[RobotTask],
            test: list[RobotTask],
            seed: int,
            robots: list[Robot] = robots,
            quantization: str = quantization,
            tower: dict[str, torch.Tensor] | None = tower,
            at_half: list[np.ndarray] = at_half,
        ) -> np.ndarray:
            model = ours.train([*train, *further], robots, seed, tower, quantization)
            found_NR = probabilities(model, test, robots)
            at_half.append(chosen_at(found_NR, 0.5))
            column = [[robot.name for robot in robots].index(robot.name) for robot in catalog]
            at_half[-1] = at_half[-1][:, column]
            return chosen_at(found_NR, model.robot_threshold)[:, column]

        result = cross_validate(name, seeds, tasks, catalog, by_model)
        suits_NR, halves = label_matrix(tasks, catalog), iter(at_half)
        scores = []
        for seed in seeds:
            fold_N, chosen_NR = folds_of(len(tasks), seed), np.zeros_like(suits_NR)
            for fold in range(FOLDS):
                chosen_NR[fold_N == fold] = next(halves)
            scores.append(judge(chosen_NR, suits_NR))
        result["exact_match_at_half"] = float(np.mean([s.exact_match for s in scores]))
        result["macro_f1_at_half"] = float(np.mean([s.macro_f1 for s in scores]))
        print(
            f"{'  at threshold 0.5':44} {result['exact_match_at_half']:.3f}"
            f"{'':11}{result['macro_f1_at_half']:.3f}",
            flush=True,
        )
        results.append(result)
    return results


def _leave_one_out(
    ours: Ours,
    tower: dict[str, torch.Tensor] | None,
    tasks: Sequence[RobotTask],
    further: Sequence[RobotTask],
    catalogs: dict[str, list[Robot]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    print("\nLeave one robot out: average precision")
    print(f"{'robot':18} {'catalog':11} {'ours':>14} {'TF-IDF':>7} {'chance':>7}")
    results = []
    for catalog_name, catalog in catalogs.items():
        for robot in catalog:
            seen = [other for other in catalog if other.name != robot.name]
            known = [
                RobotTask(task.task, tuple(name for name in task.robots if name != robot.name))
                for task in [*tasks, *further]
                if set(task.robots) != {robot.name}
            ]
            suits_N = np.array([robot.name in task.robots for task in tasks])
            found = []
            for seed in range(options.seeds):
                model = ours.train(known, seen, seed, tower, "ternary")
                scores_N = probabilities(model, tasks, catalog)[:, catalog.index(robot)]
                found.append(average_precision(scores_N, suits_N))
            result = {
                "robot": robot.name,
                "catalog": catalog_name,
                "average_precision": float(np.mean(found)),
                "average_precision_seeds": found,
                "tfidf": average_precision(tfidf_similarity(tasks, robot), suits_N),
                "chance": float(suits_N.mean()),
            }
            print(
                f"{robot.name:18} {catalog_name:11} {np.mean(found):.3f} +- {np.std(found):.3f}"
                f" {result['tfidf']:7.3f} {result['chance']:7.3f}",
                flush=True,
            )
            results.append(result)
    return results


if __name__ == "__main__":
    main()
