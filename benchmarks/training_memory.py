"""Peak memory of a training: as `bitgen train --dry_run` predicts it, and as it is.

    python benchmarks/training_memory.py --model_sizes nano tiny small base

Each case is predicted by a process of `bitgen train --dry_run --json`, and measured by a process
that makes three updates with the trainer itself, on drawn scenes with robot tasks: the most that it
has ever had resident (`ru_maxrss`), start, validation and checkpoint included. One case of each
size has ternary weights and the precision that `auto` chooses; `tiny` is also taken in both
precisions, ternary and not. What does not fit in free memory is not measured, and said so.

A prediction that is more than 15% off is a failure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import STEM_FIELDS, add_stem_options, make_parser, run, show_result, stem_of

from bitgen.config import MODEL_SIZES, BitGenConfig, TrainingConfig
from bitgen.console import console, file_size
from bitgen.dataset.scenes import write_scenes
from bitgen.errors import BitGenError
from bitgen.model.device import resolve_device
from bitgen.training.amp import resolve_precision
from bitgen.training.estimate import peak_resident_bytes
from bitgen.training.setup import DataSources, prepare_training

MOST_ERROR = 0.15
"""Of the measured peak."""
MOST_SECONDS = 900
"""For one process."""
BATCH_SIZES = {"nano": 64, "tiny": 32, "small": 8, "base": 4, "large": 1}
"""For which a few updates on two cores take less than two minutes."""
UPDATES = 3


@dataclass(frozen=True)
class Case:
    """How a process trains, on a CPU."""

    model_size: str
    batch_size: int
    quantization: str
    precision: str
    patch_size: int | None
    stem_residual_convolutions: int | None

    def config(self) -> BitGenConfig:
        """The architecture."""
        return BitGenConfig.preset(
            self.model_size,
            quantization=self.quantization,
            patch_size=self.patch_size,
            stem_residual_convolutions=self.stem_residual_convolutions,
        )


def main() -> int:
    arguments = read_arguments()
    if arguments.case is not None:
        train(Case(**json.loads(arguments.case)), arguments.folder)
        console.json({"bytes": peak_resident_bytes()})
        return 0
    results, failures = [], []
    cases = make_cases(arguments.model_sizes, stem_of(arguments))
    with console.progress("Measuring") as bar:
        for done, case in enumerate(cases):
            bar.update(done, len(cases), f"{case.model_size} {case.precision}")
            with tempfile.TemporaryDirectory(prefix="bitgen-memory-") as folder:
                result = compare(case, Path(folder))
            results.append(result)
            if result["ratio"] is not None and abs(result["ratio"] - 1) > MOST_ERROR:
                failures.append(f"{case}: predicted {result['ratio']:.2f} of what was measured.")
    rows = [
        (
            result["model_size"],
            result["batch_size"],
            result["quantization"],
            result["precision"],
            file_size(result["predicted"]),
            "does not fit" if result["measured"] is None else file_size(result["measured"]),
            "" if result["ratio"] is None else f"{result['ratio']:.2f}",
        )
        for result in results
    ]
    columns = ("model", "batch", "weights", "precision", "predicted", "measured", "ratio")
    return show_result("training_memory", {"cases": results}, columns, rows, failures)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model_sizes", nargs="+", choices=MODEL_SIZES, default=list(MODEL_SIZES))
    add_stem_options(parser)
    # How this file calls itself:
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_cases(model_sizes: list[str], stem: Mapping[str, int | None]) -> list[Case]:
    """One of each size, and of tiny one of each precision, ternary and not."""
    chosen = str(resolve_precision("auto", resolve_device("cpu")))
    auto = "bf16" if chosen == "torch.bfloat16" else "fp32"
    cases = []
    for size in model_sizes:
        every = [(weights, p) for weights in ("ternary", "none") for p in ("bf16", "fp32")]
        kinds = every if size == "tiny" else [("ternary", auto)]
        cases += [Case(size, BATCH_SIZES[size], *kind, **stem) for kind in kinds]
    return cases


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """The figures of a case, predicted and measured by processes of their own."""
    write_scenes(
        folder / "scenes",
        num_train=2 * case.batch_size,
        num_val=4,
        image_size=case.config().image_size,
    )
    options = {**asdict(case), "max_steps": UPDATES, "weights_every": 2, "device": "cpu"}
    estimate = last_json(
        *("-m", "bitgen", "train", "--dry_run", "--json", "--coco_data", folder / "scenes"),
        *("--robot_data", folder / "scenes" / "robots_train.json"),
        *(
            word
            for name, value in options.items()
            if value is not None
            for word in (f"--{name}", value)
        ),
    )
    predicted, measured = estimate["memory"]["total"], None
    if estimate["fits"]:
        this_file = Path(__file__).resolve()
        case_json = json.dumps(asdict(case))
        measured = last_json(this_file, "--case", case_json, "--folder", folder)["bytes"]
    return {
        **asdict(case),
        "predicted": predicted,
        "measured": measured,
        "ratio": None if measured is None else predicted / measured,
        "parts": estimate["memory"],
        "seconds_per_update": estimate["seconds_per_update"],
    }


def last_json(*arguments: object) -> dict[str, Any]:
    """What Python, called with these arguments, prints last. Raises BitGenError if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=MOST_SECONDS,
    )
    if done.returncode:
        raise BitGenError(f"{arguments} failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(case: Case, folder: Path) -> None:
    """Three updates, one of which counts the ternary weights, in this process."""
    scenes = folder / "scenes"
    prepare_training(
        DataSources([scenes], robot_data=[scenes / "robots_train.json"]),
        folder / "run",
        model_size=case.model_size,
        model_changes={name: getattr(case, name) for name in ("quantization", *STEM_FIELDS)},
        training=TrainingConfig.for_model(
            case.config(),
            max_steps=UPDATES,
            batch_size=case.batch_size,
            warmup_steps=1,
            weights_every=2,
            precision=case.precision,
            device="cpu",
        ),
        cache_dir=folder / "cache",
    ).train()


if __name__ == "__main__":
    run(main)
