"""`bitgen data scenes|check|download`."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bitgen.cli.failures import EXIT_BAD_INPUT
from bitgen.console import console
from bitgen.errors import InputError

MAX_PROBLEMS_SHOWN = 50


def scenes(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write; new or empty.")
    ],
    num_train: Annotated[int, typer.Option("--num_train", help="Pictures to train on.")] = 1000,
    num_val: Annotated[int, typer.Option("--num_val", help="Pictures held out.")] = 200,
    image_size: Annotated[
        int, typer.Option("--image_size", help="Side of the pictures, in pixels.")
    ] = 128,
    seed: Annotated[int, typer.Option("--seed", help="The same seed draws the same set.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the scenes that are in DIR.")
    ] = False,
) -> None:
    """Draw a COCO-layout data set of simple scenes, with captions and robot tasks."""
    from bitgen.dataset.scenes import write_scenes

    with console.progress("Drawing", "pictures") as bar:
        summary = write_scenes(
            directory, num_train, num_val, seed, image_size, bar.update, overwrite=overwrite
        )
    console.result(
        f"{directory} holds {summary.num_train:,} scenes to train on and {summary.num_val:,} held"
        f" out, {summary.num_captions:,} captions,"
        f" {summary.num_train_tasks + summary.num_val_tasks:,} robot tasks. Train with:\n"
        f"bitgen train --coco_data {directory} --robot_data {directory / 'robots_train.json'}"
        " --model_size nano"
    )


def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The data set's folder.")],
    json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.")
    ] = False,
) -> None:
    """Validate a data set and say what is wrong, file by file. Exit code 2 if anything is."""
    from bitgen.dataset.check import check_dataset

    with console.progress("Checking", "files") as bar:
        report = check_dataset(directory, on_progress=bar.update)
    counts = {
        field.name: getattr(report, field.name)
        for field in dataclasses.fields(report)
        if field.name != "problems"
    }
    if json:
        problems = [
            {"file": str(problem.file), "kind": problem.kind, "detail": problem.detail}
            for problem in report.problems
        ]
        console.json({"directory": str(directory), **counts, "problems": problems})
    else:
        console.table(("", ""), [(name.replace("_", " "), count) for name, count in counts.items()])
        for problem in report.problems[:MAX_PROBLEMS_SHOWN]:
            console.result(f"{problem.file}: {problem.kind}: {problem.detail}")
        if len(report.problems) > MAX_PROBLEMS_SHOWN:
            hidden = len(report.problems) - MAX_PROBLEMS_SHOWN
            console.result(f"... and {hidden} more; --json lists all.")
        console.result(
            f"{len(report.problems)} problems found." if report.problems else "No problems found."
        )
    if report.problems:
        raise typer.Exit(EXIT_BAD_INPUT)


def download(
    name: Annotated[str, typer.Argument(metavar="coco", help="Which data set: coco.")],
    output: Annotated[Path, typer.Option("--output", help="Folder to write, such as data/coco.")],
    year: Annotated[
        int, typer.Option("--year", help="2017 (19 GB of images) or 2014 (19 GB).")
    ] = 2017,
    base_url: Annotated[
        str | None, typer.Option("--base_url", help="Another server with the same files.")
    ] = None,
) -> None:
    """Fetch the official COCO archives, resuming what is there, and unpack them."""
    if name != "coco":
        raise InputError(f"There is no data set {name!r} to download.", remedy="Use: coco.")
    if year not in (2014, 2017):
        raise InputError(f"--year must be 2014 or 2017, got {year}.")
    from bitgen.dataset.download import download_coco

    fetch = download_coco if base_url is None else partial(download_coco, base_url=base_url)
    with console.progress("Downloading", "bytes") as bar:
        fetch(output, year, on_progress=bar.update)
    console.result(f"COCO {year} is in {output}. Train with: bitgen train --coco_data {output}")
