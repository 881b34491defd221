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
    pack: Annotated[
        str,
        typer.Option(
            "--pack",
            metavar="2|1.6",
            help="Bits a ternary weight takes in the file. 2 is run as it lies in the file; 1.6 is"
            " a fifth smaller and unpacked at each start. Both answer the same.",
        ),
    ] = "2",
    embedding: Annotated[
        str,
        typer.Option(
            "--embedding",
            metavar="float32|int8",
            help="The embedding and lm head in the file. int8 is a quarter of the bytes; captions"
            " may then differ a little from the run's.",
        ),
    ] = "float32",
    convolutions: Annotated[
        str,
        typer.Option(
            "--convolutions",
            metavar="float32|int8",
            help="The image encoder's convolutions in the file. int8 is a quarter of the bytes,"
            " unpacked at each start; captions may then differ a little from the run's.",
        ),
    ] = "float32",
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
    """Write a run as one packed file that `bitgen infer` takes."""
    if format != "safetensors":
        raise InputError(f"There is no export format {format!r}.", remedy="Use: safetensors.")
    from bitgen.cli.models import model_or_newest_run

    source = model_or_newest_run(model)
    from bitgen.export.safetensors import export_safetensors

    report = export_safetensors(
        source,
        output,
        overwrite=overwrite,
        drop_future_heads=drop_future_heads,
        packing=pack,
        embedding=embedding,
        convolutions=convolutions,
    )
    if json:
        console.json({"model": str(source), "output": str(output), **dataclasses.asdict(report)})
        return
    rows = [("weights in float", report.float_bytes)]
    if report.int8_weights:
        rows.insert(0, (f"{report.int8_weights:,} int8 weights", report.int8_bytes))
    if report.packing is not None:
        words = f"{report.ternary_weights:,} ternary weights, {report.packing} bits each"
        rows.insert(0, (words, report.ternary_bytes))
    rows += [("config, tokenizer, robots", report.metadata_bytes), ("whole file", report.bytes)]
    console.table(("part of the file", "size"), [(part, file_size(size)) for part, size in rows])
    console.result(f"Wrote {output}. Use it with: bitgen infer IMAGE --model {output}")
