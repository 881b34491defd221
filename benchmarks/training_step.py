"""What one training step takes, and what allocator, ternary weights and precision make of it.

    python benchmarks/training_step.py --model_sizes nano tiny --batch_size 64

Trains on drawn scenes with robot tasks, as `bitgen demo` does, and takes the time from the end of
one step to the end of the next: loading the batch, forward, backward, update and metrics. Each case
differs from the first, the default, in one thing:

    default            ternary weights, the precision that `auto` chooses, freed memory kept
    memory given back  without `bitgen.training.allocator.keep_freed_memory`
    full precision     `--quantization none`
    fp32, or bf16      the precision that `auto` does not choose

Every case runs in a process of its own, because the allocator is set for a whole process. A round
runs each case once, in turn; a process gives the median of its steps, after some that do not
count, and the table the median of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from common import interleave, make_parser, run, show_result

from bitgen.config import DEVICES, MODEL_SIZES, BitGenConfig, TrainingConfig
from bitgen.console import console
from bitgen.dataset.scenes import write_scenes
from bitgen.errors import BitGenError
from bitgen.model.device import resolve_device
from bitgen.training.amp import resolve_precision
from bitgen.training.events import StepReport, TrainerCallback
from bitgen.training.setup import DataSources, prepare_training

MOST_SECONDS = 600
"""For one process."""


@dataclass(frozen=True)
class Case:
    """How a process trains."""

    quantization: str
    precision: str
    keep_freed_memory: bool


def main() -> int:
    arguments = read_arguments()
    if arguments.case is not None:
        console.json({"seconds": time_steps(arguments, Case(**json.loads(arguments.case)))})
        return 0
    cases = make_cases(arguments.device)
    with tempfile.TemporaryDirectory(prefix="bitgen-step-") as temporary:
        folder = Path(temporary)
        # Enough for a few batches; the time of a step does not depend on it.
        write_scenes(
            folder / "scenes",
            num_train=2 * arguments.batch_size,
            num_val=1,
            image_size=max(BitGenConfig.preset(s).image_size for s in arguments.model_sizes),
        )
        seconds = interleave(
            {
                (size, name): partial(time_in_process, arguments, folder, size, case)
                for size in arguments.model_sizes
                for name, case in cases.items()
            },
            arguments.rounds,
        )
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    steps = [
        {
            "model_size": size,
            "case": name,
            **asdict(cases[name]),
            "seconds": medians[size, name],
            "samples_per_second": arguments.batch_size / medians[size, name],
            "ratio": medians[size, name] / medians[size, "default"],
            "rounds": seconds[size, name],
        }
        for size, name in seconds
    ]
    rows = [
        (
            step["model_size"],
            step["case"],
            step["quantization"],
            step["precision"],
            f"{1000 * step['seconds']:.0f}",
            f"{step['samples_per_second']:.1f}",
            f"{step['ratio']:.2f}",
        )
        for step in steps
    ]
    figures = {
        "batch_size": arguments.batch_size,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "device": str(resolve_device(arguments.device)),
        "cases": steps,
    }
    columns = ("model", "case", "weights", "precision", "ms a step", "samples/s", "to default")
    return show_result("training_step", figures, columns, rows)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model_sizes", nargs="+", choices=MODEL_SIZES, default=["nano", "tiny"])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="Timed, in each process.")
    parser.add_argument("--warm_up", type=int, default=3, help="Steps before, not timed.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    # How this file calls itself:
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_cases(device: str) -> dict[str, Case]:
    """The default, and what differs from it in one thing."""
    chosen = resolve_precision("auto", resolve_device(device))
    precision, other = ("fp32", "bf16") if chosen == torch.float32 else ("bf16", "fp32")
    return {
        "default": Case("ternary", precision, keep_freed_memory=True),
        "memory given back": Case("ternary", precision, keep_freed_memory=False),
        "full precision": Case("none", precision, keep_freed_memory=True),
        other: Case("ternary", other, keep_freed_memory=True),
    }


def time_in_process(
    arguments: argparse.Namespace, folder: Path, model_size: str, case: Case
) -> float:
    """Seconds a step of a case, measured by this file in a process of its own."""
    command = [
        *(sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(asdict(case))),
        *("--folder", str(folder), "--model_sizes", model_size, "--device", arguments.device),
        *("--batch_size", str(arguments.batch_size), "--steps", str(arguments.steps)),
        *("--warm_up", str(arguments.warm_up)),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=MOST_SECONDS
    )
    if done.returncode:
        raise BitGenError(f"{case} of {model_size} failed: {done.stderr.strip()}")
    seconds: float = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return seconds


class StepClock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.ends.append(time.perf_counter())


def time_steps(arguments: argparse.Namespace, case: Case) -> float:
    """Median seconds of the steps after the warm-up, in this process."""
    # The first of the times is the end of the last step that is not timed.
    num_steps = max(1, arguments.warm_up) + arguments.steps
    scenes, clock = arguments.folder / "scenes", StepClock()
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder))
        if not case.keep_freed_memory:
            keep_freed_memory = "bitgen.training.trainer.keep_freed_memory"
            stack.enter_context(mock.patch(keep_freed_memory, return_value=False))
        prepare_training(
            DataSources([scenes], robot_data=[scenes / "robots_train.json"]),
            Path(output) / "run",
            model_size=arguments.model_sizes[0],
            model_changes={"quantization": case.quantization},
            training=TrainingConfig(
                num_epochs=num_steps,
                max_steps=num_steps,
                batch_size=arguments.batch_size,
                warmup_steps=1,
                precision=case.precision,
                device=arguments.device,
                eval_every=num_steps,
                save_every=num_steps,
            ),
            cache_dir=arguments.folder / "cache",
            callbacks=[clock],
        ).train()
    ends = clock.ends[-arguments.steps - 1 :]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends))


if __name__ == "__main__":
    run(main)
