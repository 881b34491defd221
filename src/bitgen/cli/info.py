"""`bitgen info`: what a model holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from bitgen.cli.models import model_or_newest_run
from bitgen.console import console, file_size


def info(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Run folder, checkpoint folder or exported file. Default: the newest run.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
) -> None:
    """Show parameters by part, bits a weight, bytes, layers, dtype, and what it was trained on."""
    source = model_or_newest_run(model)

    from bitgen.inference.inspect import describe

    found = describe(source)
    if json:
        console.json({**dataclasses.asdict(found), "path": str(found.path)})
        return
    total = (found.ternary_parameters, found.float_parameters, found.parameters)
    console.table(
        ("part", "ternary", "float", "parameters", "packed"),
        [
            *(
                (
                    part.name,
                    f"{part.ternary_parameters:,}",
                    f"{part.float_parameters:,}",
                    f"{part.parameters:,}",
                    file_size(part.bytes),
                )
                for part in found.parts
            ),
            ("all", *(f"{count:,}" for count in total), file_size(found.bytes_packed)),
        ],
    )
    rows: list[tuple[str, str]] = [
        ("model", f"{found.model_size}, {found.quantization} weights ({found.kind})"),
        (
            "decoder",
            f"{found.decoder_layers} layers, width {found.hidden_size},"
            f" up to {found.max_positions} positions",
        ),
        (
            "image encoder",
            found.image_encoder
            + ("" if found.encoder_layers is None else f", {found.encoder_layers} layers")
            + f", {found.image_size} px, {found.image_tokens} tokens a picture",
        ),
        ("vocabulary", f"{found.vocabulary:,} tokens"),
        ("dtypes", ", ".join(f"{count:,} {dtype}" for dtype, count in found.dtypes.items())),
        ("bits a weight", f"{found.bits_per_weight:.2f} over all"),
        ("on disk", file_size(found.bytes_on_disk)),
        ("robots", ", ".join(found.robots) or "none"),
    ]
    if found.bits_per_ternary_weight is not None:
        rows[5] = (
            "bits a weight",
            f"{found.bits_per_ternary_weight:.2f} ternary, {found.bits_per_weight:.2f} over all",
        )
    if found.step is not None:
        rows.append(("trained", f"{found.step:,} steps in run {found.run}"))
    if found.tokens and found.images:
        rows.append(("seen", f"{found.tokens:,} text tokens, {found.images:,} pictures"))
    if found.best_validation_loss is not None:
        rows.append(("best validation loss", f"{found.best_validation_loss:.3f}"))
    rows += [
        (name.replace("_", " "), _words(value))
        for name, value in found.data.items()
        if value not in (None, [], 0)
    ]
    console.table(("", ""), rows)


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
