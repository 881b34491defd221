"""`bitgen export`: a run becomes one deployable file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from bitgen.console import console, file_size
from bitgen.errors import InputError


def export(
    output: Annotated[Path, typer.Option("--output", help="File to write, NAME.safetensors.")],
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Run or checkpoint folder; the newest run by default."),
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="Format of the file.", metavar="safetensors")
    ] = "safetensors",
    drop_future_heads: Annotated[
        bool,
        typer.Option(
            "--drop_future_heads",
            help="Leave out what predicts tokens beyond the next: a smaller file with the same"
            " captions, written one token a call.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file if it exists.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.")
    ] = False,
) -> None:
    """Write a run as one packed file (2 bits a ternary weight) that `bitgen infer` takes."""
    if format != "safetensors":
        raise InputError(f"There is no export format {format!r}.", remedy="Use: safetensors.")
    from bitgen.cli.models import model_or_newest_run

    source = model_or_newest_run(model)
    from bitgen.export.safetensors import export_safetensors

    report = export_safetensors(
        source, output, overwrite=overwrite, drop_future_heads=drop_future_heads
    )
    if json:
        console.json({"model": str(source), "output": str(output), **dataclasses.asdict(report)})
        return
    console.table(
        ("part of the file", "size"),
        [
            (
                f"{report.ternary_weights:,} ternary weights, packed",
                file_size(report.ternary_bytes),
            ),
            ("weights in float", file_size(report.float_bytes)),
            ("config, tokenizer, robots", file_size(report.metadata_bytes)),
            ("whole file", file_size(report.bytes)),
        ],
    )
    console.result(f"Wrote {output}. Use it with: bitgen infer IMAGE --model {output}")
