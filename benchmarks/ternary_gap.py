"""What ternary weights cost: the same trainings with them and without, on real captions.

    python benchmarks/ternary_gap.py --coco_data data/coco --output runs/gap
    python benchmarks/ternary_gap.py --variants default learning_rate=2e-3,weight_decay=0.1

Trains one architecture with ternary weights and in full precision (`--quantization none`): the same
seeds, pictures in the same order and number of steps. Each training gives two figures of the
validation set: loss per token, of one caption a picture, as `bitgen train` reports it after the
last step; and CIDEr of greedy captions, as pycocoevalcap computes it (1.0 is what papers often call
100), with all captions of a picture as references. The gap is ternary / full - 1 for the loss, and
ternary - full for CIDEr, taken seed by seed. A variant changes fields of TrainingConfig for both
kinds of weights; where there are several, the best of either kind are compared as well.

Every training runs in a process of its own with `--threads` threads. Those found in `--output` with
the same options are not made again, so a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import make_parser, run, show_result

from bitgen.config import DEVICES, MODEL_SIZES, TrainingConfig
from bitgen.console import console
from bitgen.dataset.coco import CaptionedImage, load_coco
from bitgen.errors import BitGenError, ConfigError, InputError
from bitgen.inference.predictor import BitGen
from bitgen.training.events import TrainerCallback, TrainingStart
from bitgen.training.setup import DataSources, prepare_training

DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "coco"
DEFAULT_VARIANT = "default"
WEIGHTS = {"ternary": "ternary", "full": "none"}
"""What a kind of weights is called here, and as `--quantization`."""
RESULT_FILE = "result.json"

Tokenize = Callable[[Sequence[Sequence[str]]], list[list[str]]]


@dataclass(frozen=True)
class Case:
    """One training."""

    variant: str
    weights: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.weights}-{self.seed}"


def main() -> int:
    arguments = read_arguments()
    if arguments.case is not None:
        train_case(arguments, Case(**json.loads(arguments.case)))
        return 0
    tokenization, tokenize = choose_tokenization()
    images = load_coco([arguments.coco_data], "val")
    if arguments.num_shown > len(images):
        raise InputError(f"--num_shown must be at most {len(images)}: these pictures are there.")
    cases = [
        Case(variant, weights, seed)
        for seed in arguments.seeds
        for variant in arguments.variants
        for weights in WEIGHTS
    ]
    with tempfile.TemporaryDirectory(prefix="bitgen-gap-") as temporary:
        results = train_all(arguments, (arguments.output or Path(temporary)).resolve(), cases)
    # All at once: each call of the tokenizer starts java.
    candidates = [[text] for result in results.values() for text in result["captions"]]
    words = tokenize([*candidates, *(image.captions for image in images)])
    references = words[len(candidates) :]
    for number, result in enumerate(results.values()):
        start = number * len(images)
        result["cider"] = cider(references, words[start : start + len(images)])
    show_captions(images, {case: results[case]["captions"] for case in cases[:2]}, arguments)
    return report(arguments, tokenization, results)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--coco_data", type=Path, default=DEFAULT_DATA, metavar="DIR")
    parser.add_argument("--model_size", choices=MODEL_SIZES, default="nano")
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[DEFAULT_VARIANT],
        metavar="FIELD=VALUE,..",
        help="Fields of TrainingConfig that differ from the default; or the word `default`. Without"
        " another number, a tenth of the steps warms up.",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="Trainings at a time.")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of a training.")
    parser.add_argument("--num_shown", type=int, default=0, help="Pictures whose captions to show.")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="Keep runs here, and use those that are here."
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)  # how this file calls itself
    arguments = parser.parse_args()
    for name in ("variants", "seeds"):  # the same twice is one training
        setattr(arguments, name, list(dict.fromkeys(getattr(arguments, name))))
    for variant in arguments.variants:
        training_config(arguments, Case(variant, "full", arguments.seeds[0]))
    return arguments


# Trainings --------------------------------------------------------------------------------------


def training_config(arguments: argparse.Namespace, case: Case) -> TrainingConfig:
    """How a case is trained. Raises ConfigError for a variant that TrainingConfig does not know."""
    steps: int = arguments.max_steps
    changes: dict[str, Any] = {}
    if case.variant != DEFAULT_VARIANT:
        for part in case.variant.split(","):
            name, equals, value = part.partition("=")
            if not equals:
                raise ConfigError(
                    f"{part!r} in --variants is not FIELD=VALUE.",
                    remedy="For example: learning_rate=2e-3,weight_decay=0.1",
                )
            try:
                changes[name] = json.loads(value)
            except ValueError:  # a word
                changes[name] = value
    return TrainingConfig.from_dict(
        {
            "num_epochs": steps,  # max_steps is what ends it
            "max_steps": steps,
            "batch_size": arguments.batch_size,
            "warmup_steps": max(1, steps // 10),
            "device": arguments.device,
            "seed": case.seed,
            "eval_every": steps,
            "save_every": steps,
            **changes,
        }
    )


def options_of(arguments: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Everything that a result depends on, as JSON values."""
    return {
        "coco_data": str(arguments.coco_data.resolve()),
        "model_size": arguments.model_size,
        "quantization": WEIGHTS[case.weights],
        "threads": arguments.threads,
        "training": training_config(arguments, case).to_dict(),
    }


def train_all(
    arguments: argparse.Namespace, folder: Path, cases: Sequence[Case]
) -> dict[Case, dict[str, Any]]:
    """What each case gave: those in `folder` with the same options as they are, the rest anew."""
    results = {case: found_result(arguments, folder, case) for case in cases}
    missing = [case for case, result in results.items() if result is None]
    with console.progress("Training", "runs") as bar, ThreadPoolExecutor(arguments.jobs) as pool:
        started = {pool.submit(train_in_process, arguments, folder, case): case for case in missing}
        try:
            for done, future in enumerate(as_completed(started), start=1):
                case = started[future]
                results[case] = future.result()
                console.note(f"{case.name}: validation loss {results[case]['loss']:.4f}")
                bar.update(done, len(missing))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those that run are finished
            raise
    return {case: result for case, result in results.items() if result is not None}


def found_result(arguments: argparse.Namespace, folder: Path, case: Case) -> dict[str, Any] | None:
    """The result of an earlier training with the same options, if there is one."""
    path = folder / case.name / RESULT_FILE
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if result["options"] == options_of(arguments, case) else None


def train_in_process(arguments: argparse.Namespace, folder: Path, case: Case) -> dict[str, Any]:
    """Train a case by this file in a process of its own; returns its result."""
    command = [
        *(sys.executable, str(Path(__file__).resolve())),
        *("--case", json.dumps(dataclasses.asdict(case)), "--output", str(folder)),
        *("--coco_data", str(arguments.coco_data), "--model_size", arguments.model_size),
        *("--max_steps", str(arguments.max_steps), "--batch_size", str(arguments.batch_size)),
        *("--device", arguments.device, "--threads", str(arguments.threads)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    result = found_result(arguments, folder, case)
    if done.returncode or result is None:
        raise BitGenError(f"The training of {case.name} failed: {done.stderr.strip()}")
    return result


class Listener(TrainerCallback):
    """Notes the arithmetic of a training."""

    precision = ""

    def on_start(self, start: TrainingStart) -> None:
        self.precision = start.precision


def train_case(arguments: argparse.Namespace, case: Case) -> None:
    """Train a case in this process, caption the validation pictures and write the result file."""
    folder, listener = arguments.output / case.name, Listener()
    summary = prepare_training(
        DataSources([arguments.coco_data]),
        folder / "run",
        model_size=arguments.model_size,
        model_changes={"quantization": WEIGHTS[case.weights]},
        training=training_config(arguments, case),
        cache_dir=arguments.output / "cache",
        overwrite=True,
        callbacks=[listener],
    ).train()
    if summary.validation is None or summary.validation.loss is None:
        raise InputError(f"{arguments.coco_data} holds no captions to validate on.")
    pictures = [image.path for image in load_coco([arguments.coco_data], "val")]
    captions = BitGen.load(folder / "run", device=arguments.device).caption(pictures)
    result = {
        "options": options_of(arguments, case),
        "loss": summary.validation.loss,
        "training_loss": summary.loss,
        "captions": [caption.text for caption in captions],
        "precision": listener.precision,
        "skipped": summary.skipped_steps,
        "seconds": summary.seconds,
    }
    temporary = folder / f"{RESULT_FILE}.tmp"
    temporary.write_text(json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(folder / RESULT_FILE)


# CIDEr ------------------------------------------------------------------------------------------


def choose_tokenization() -> tuple[str, Tokenize]:
    """The tokenization of COCO's own evaluation; where java is missing, a plain one.

    Returns its name, and a function from captions of pictures to their words, joined by spaces.

    Raises:
        InputError: pycocoevalcap is not installed.
    """
    try:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        raise InputError(
            "CIDEr is computed by pycocoevalcap, which is not installed.",
            remedy='Install it: pip install "bitgen[eval]".',
        ) from error
    if shutil.which("java") is None:
        console.warning("Without java captions are split plainly: CIDEr differs a little.")
        return "plain (lower case, punctuation removed)", plain_words

    def penn_treebank_words(captions: Sequence[Sequence[str]]) -> list[list[str]]:
        numbered = {
            number: [{"caption": " ".join(text.split())} for text in texts]
            for number, texts in enumerate(captions)
        }
        return list(PTBTokenizer().tokenize(numbered).values())

    return "Penn Treebank (pycocoevalcap)", penn_treebank_words


def plain_words(captions: Sequence[Sequence[str]]) -> list[list[str]]:
    """Captions in lower case, with nothing but letters, digits and spaces between words."""
    return [[" ".join(re.findall(r"\w+", text.lower())) for text in texts] for texts in captions]


def cider(references: Sequence[list[str]], candidates: Sequence[list[str]]) -> float:
    """CIDEr-D of one caption a picture against its references, all tokenized."""
    from pycocoevalcap.cider.cider import Cider

    score, _ = Cider().compute_score(dict(enumerate(references)), dict(enumerate(candidates)))
    return float(score)


# Report -----------------------------------------------------------------------------------------


def show_captions(
    images: Sequence[CaptionedImage],
    captions: dict[Case, list[str]],
    arguments: argparse.Namespace,
) -> None:
    """Some pictures from all over the validation set: a reference, and what the runs say."""
    for number in range(arguments.num_shown):
        index = number * len(images) // arguments.num_shown
        console.note(f"{images[index].path.name}: {' '.join(images[index].captions[0].split())}")
        for case, texts in captions.items():
            console.note(f"  {case.weights + ':':9}{texts[index]}")


def report(
    arguments: argparse.Namespace, tokenization: str, results: dict[Case, dict[str, Any]]
) -> int:
    runs = [
        {
            **dataclasses.asdict(case),
            **{
                name: result[name]
                for name in ("loss", "cider", "training_loss", "precision", "skipped", "seconds")
            },
        }
        for case, result in results.items()
    ]
    gaps = [compare(results, arguments.seeds, name, name) for name in arguments.variants]
    best = [
        min(gaps, key=lambda gap: gap[f"{weights}_loss"]["mean"])["ternary"] for weights in WEIGHTS
    ]
    if best[0] != best[1]:
        gaps.append(compare(results, arguments.seeds, *best))
    rows = [
        (
            gap["ternary"]
            if gap["ternary"] == gap["full"]
            else f"{gap['ternary']} / {gap['full']}",
            *(spread(gap[f"{kind}_loss"], ".3f") for kind in WEIGHTS),
            spread(gap["loss_gap"], "+.2%"),
            *(spread(gap[f"{kind}_cider"], ".3f") for kind in WEIGHTS),
            spread(gap["cider_gap"], "+.3f"),
        )
        for gap in gaps
    ]
    figures = {
        "model_size": arguments.model_size,
        "max_steps": arguments.max_steps,
        "batch_size": arguments.batch_size,
        "seeds": arguments.seeds,
        "threads_of_a_training": arguments.threads,
        "tokenization": tokenization,
        "runs": runs,
        "gaps": gaps,
    }
    columns = (
        *("variant", "ternary loss", "full loss", "gap"),
        *("ternary CIDEr", "full CIDEr", "difference"),
    )
    return show_result("ternary_gap", figures, columns, rows)


def compare(
    results: dict[Case, dict[str, Any]], seeds: Sequence[int], ternary: str, full: str
) -> dict[str, Any]:
    """A variant of ternary weights beside one of full precision: mean and spread over the seeds."""
    pairs = [
        (results[Case(ternary, "ternary", seed)], results[Case(full, "full", seed)])
        for seed in seeds
    ]
    return {
        "ternary": ternary,
        "full": full,
        "ternary_loss": summarize([t["loss"] for t, _ in pairs]),
        "full_loss": summarize([f["loss"] for _, f in pairs]),
        "loss_gap": summarize([t["loss"] / f["loss"] - 1 for t, f in pairs]),
        "ternary_cider": summarize([t["cider"] for t, _ in pairs]),
        "full_cider": summarize([f["cider"] for _, f in pairs]),
        "cider_gap": summarize([t["cider"] - f["cider"] for t, f in pairs]),
    }


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (None of a single value) and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "deviation": deviation, "of_seeds": list(values)}


def spread(summary: dict[str, Any], form: str) -> str:
    """`mean ± standard deviation`, for a table."""
    mean, deviation = summary["mean"], summary["deviation"]
    if deviation is None:
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {deviation:{form.lstrip('+')}}"


if __name__ == "__main__":
    run(main)
