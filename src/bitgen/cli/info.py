"""`bitgen info`: what a model holds, and what this machine runs it with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitgen.cli.models import MODEL_DEFAULT, model_to_ask
from bitgen.console import console, duration, file_size
from bitgen.errors import InputError
from bitgen.shipped import MODEL_CARD, shipped_file, shipped_model

if TYPE_CHECKING:
    from bitgen.inference.inspect import ModelDescription, PartDescription


def info(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]",
            help=f"Run folder, checkpoint folder or exported file. {MODEL_DEFAULT}",
        ),
    ] = None,
    system: Annotated[
        bool,
        typer.Option("--system", help="Show this machine instead: what multiplies, and why."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
) -> None:
    """Show parameters by part, bits a weight, bytes, layers, dtype, and what it was trained on."""
    if system:
        _show_system(model, json)
        return
    source = model_to_ask(model)

    from bitgen.cli.training_run import figure_rows
    from bitgen.inference.inspect import describe
    from bitgen.training.checkpoint import METRICS_FILE
    from bitgen.training.figures import read_figures

    found = describe(source)
    metrics, figures = source / METRICS_FILE, None
    if metrics.is_file():
        figures = read_figures(metrics)
    if json:
        console.json(
            {
                **dataclasses.asdict(found),
                "path": str(found.path),
                "figures": None if figures is None else dataclasses.asdict(figures),
            }
        )
        return
    kinds = ("ternary", "int8", "float") if found.int8_parameters else ("ternary", "float")

    def row(name: str, counted: PartDescription | ModelDescription, size: int) -> tuple[str, ...]:
        counts = (*(getattr(counted, f"{kind}_parameters") for kind in kinds), counted.parameters)
        return (name, *(f"{count:,}" for count in counts), file_size(size))

    console.table(
        ("part", *kinds, "parameters", "packed"),
        [
            *(row(part.name, part, part.bytes) for part in found.parts),
            row("all", found, found.bytes_packed),
        ],
    )
    rows: list[tuple[str, str]] = [
        ("model", f"{found.model_size}, {found.quantization} weights ({found.kind})"),
        (
            "decoder",
            f"{found.decoder_layers} layers, width {found.hidden_size},"
            + (
                f" {found.experts_per_token} of {found.num_experts} experts a token,"
                if found.num_experts > 1
                else ""
            )
            + f" up to {found.max_positions} positions"
            + (
                ""
                if found.predict_tokens == 1
                else f", predicts {found.predict_tokens} tokens at a time"
            ),
        ),
        (
            "image encoder",
            found.image_encoder
            + ("" if found.encoder_layers is None else f", {found.encoder_layers} layers")
            + f", {found.image_size} px, {found.image_tokens} tokens a picture",
        ),
        ("vocabulary", f"{found.vocabulary:,} tokens"),
        ("packing", _packing_words(found)),
        ("dtypes", ", ".join(f"{count:,} {dtype}" for dtype, count in found.dtypes.items())),
        ("bits a weight", _bits_words(found)),
        ("on disk", file_size(found.bytes_on_disk)),
        ("robots", ", ".join(found.robots) or "none"),
    ]
    if source == shipped_model():
        rows.append(("model card", str(shipped_file(MODEL_CARD))))
    if found.step is not None:
        rows.append(("trained", f"{found.step:,} steps in run {found.run}"))
    if found.tokens and found.images:
        rows.append(("seen", f"{found.tokens:,} text tokens, {found.images:,} pictures"))
    if found.training_seconds:
        rows.append(("time in updates", duration(found.training_seconds)))
    if found.training:
        rows.append(("schedule", _schedule_words(found.training)))
    if figures is not None:
        rows += figure_rows(figures)
    elif found.best_validation_loss is not None:
        rows.append(("best validation loss", f"{found.best_validation_loss:.3f}"))
    rows += [
        (name.replace("_", " "), _words(value))
        for name, value in found.data.items()
        if value not in (None, [], 0)
    ]
    console.table(("", ""), rows)


def _show_system(model: Path | None, json: bool) -> None:
    from bitgen.cli.system import describe_system, system_rows

    if model is not None:
        raise InputError(f"--system is about this machine, not about a model; got {model}.")
    if json:
        console.json(describe_system())
    else:
        console.table(("", ""), system_rows())


def _packing_words(found: ModelDescription) -> str:
    ternary = "" if found.packing is None else f"ternary weights at {found.packing} bits, "
    scales = ", one scale a row" if found.embedding == "int8" else ""
    convolutions = ", convolutions in int8" if found.convolutions == "int8" else ""
    return f"{ternary}embedding and lm head in {found.embedding}{scales}{convolutions}"


def _bits_words(found: ModelDescription) -> str:
    ternary = found.bits_per_ternary_weight
    return ("" if ternary is None else f"{ternary:.2f} ternary, ") + (
        f"{found.bits_per_weight:.2f} over all"
    )


def _schedule_words(training: Mapping[str, Any]) -> str:
    """Learning rate and batch, of what a run records of its training; older ones record less."""
    kind = training.get("schedule", "cosine")
    parts = [f"{kind}, learning rate {training['learning_rate']:g}"]
    if training.get("warmup_steps"):
        parts.append(f"warm-up of {training['warmup_steps']:,} updates")
    if training.get("word_pretraining_steps"):
        parts.append(f"{training['word_pretraining_steps']:,} updates on image words first")
    batch = f"batches of {training['batch_size']:,}"
    if training.get("grad_accumulation", 1) > 1:
        batch += f" x {training['grad_accumulation']:,}"
    return ", ".join([*parts, batch])


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
