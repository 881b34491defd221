"""What the benchmarks share: the machine in words, pictures, and how a result is shown.

Every benchmark prints a table for people and, as its last line, one JSON object with the same
figures, the machine and what failed. The exit code is 0, 1 if a check failed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from bitgen import __version__
from bitgen.cli.infer import find_images
from bitgen.cli.system import cpu_name
from bitgen.console import console
from bitgen.dataset.images import available_cpus
from bitgen.errors import BitGenError, InputError

STEM_FIELDS = ("patch_size", "stem_residual_convolutions")
_Case = TypeVar("_Case")


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, torch and its threads: JSON values."""
    machine: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": available_cpus(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "bitgen": __version__,
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def make_parser(documentation: str | None) -> argparse.ArgumentParser:
    """A parser described by the first line of a benchmark's `__doc__`."""
    return argparse.ArgumentParser(description=(documentation or "").partition("\n")[0])


def add_stem_options(parser: argparse.ArgumentParser) -> None:
    """Options for the stem of the vit encoder, on which time and memory of a size depend."""
    for name in STEM_FIELDS:
        parser.add_argument(f"--{name}", type=int, help="Default: the size's own.")


def stem_of(arguments: argparse.Namespace) -> dict[str, int | None]:
    """What `add_stem_options` was given, as changes of a preset; None is the size's own."""
    return {name: getattr(arguments, name) for name in STEM_FIELDS}


def interleave(
    cases: Mapping[_Case, Callable[[], float]], rounds: int, warm_up: int = 0
) -> dict[_Case, list[float]]:
    """Measure every case once a round, in turn, so that a drift of the machine meets them all.

    Args:
        cases: each measures once and returns the figure.
        rounds: how often; one figure a round is returned.
        warm_up: rounds before, whose figures are thrown away.
    """
    figures: dict[_Case, list[float]] = {name: [] for name in cases}
    done, total = 0, (rounds + warm_up) * len(cases)
    with console.progress("Measuring") as bar:
        for number in range(rounds + warm_up):
            for name, measure in cases.items():
                figure = measure()
                if number >= warm_up:
                    figures[name].append(figure)
                done += 1
                bar.update(done, total)
    return figures


def seconds_of(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def first_images(directory: Path, count: int) -> list[Path]:
    """The first `count` pictures of a folder by name. Raises InputError if it has fewer."""
    images = find_images([str(directory)])
    if len(images) < count:
        raise InputError(
            f"{directory} holds {len(images)} pictures; {count} were asked for.",
            remedy="Give another folder, or a smaller --num_images.",
        )
    return images[:count]


def show_result(
    benchmark: str,
    figures: Mapping[str, Any],
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    failures: Sequence[str] = (),
) -> int:
    """Print table, machine, failures and the JSON line; returns the exit code.

    Args:
        benchmark: its name.
        figures: what was measured, as JSON values.
        columns: heads of the table.
        rows: the table.
        failures: what was not as it must be, one sentence each.
    """
    machine = describe_machine()
    console.table(columns, rows)
    console.result("")
    console.result(", ".join(f"{name} {value}" for name, value in machine.items()))
    for failure in failures:
        console.result(f"FAILED: {failure}")
    console.json(
        {
            "benchmark": benchmark,
            **figures,
            "passed": not failures,
            "failures": list(failures),
            "machine": machine,
        }
    )
    return 1 if failures else 0


def run(main: Callable[[], int]) -> NoReturn:
    """Run a benchmark and exit with its code; bad input becomes one message."""
    try:
        code = main()
    except BitGenError as error:
        console.error(error.message, error.remedy)
        code = error.exit_code
    sys.exit(code)
