"""`bitgen train --dry_run`: what a training would take, as tables or as one JSON object."""

from __future__ import annotations

import dataclasses

from bitgen.console import console, duration, file_size
from bitgen.training.estimate import FeatureEstimate, MemoryEstimate, TrainingEstimate

_PARTS_OF_MEMORY = {
    "process": "interpreter, libraries, captions",
    "weights": "weights (float32)",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "activations": "activations, at the worst moment of an update",
    "allocator": "holes between them",
    "data": "batches",
    "checkpoint": "copies for a checkpoint",
    "total": "peak",
}


def show_estimate(estimate: TrainingEstimate, json: bool) -> None:
    """Tables of sizes, memory and time, or the same as one JSON object; a warning if it is tight.

    The exit code is 0 either way: to be told that it does not fit is a result.
    """
    if json:
        console.json(dataclasses.asdict(estimate))
    else:
        _show_sizes(estimate)
        console.result("")
        _show_memory(estimate.memory)
        console.result("")
        _show_time(estimate)
    memory, free = estimate.memory, estimate.free_bytes
    if estimate.fits is False and free is not None:
        console.warning(
            f"This does not fit: a training takes {file_size(memory.total - memory.process)} more"
            f" than this process has, and {file_size(free)} is free on {memory.device}. Take a"
            " smaller --batch_size (and a larger --grad_accumulation), --model_size or"
            " --image_size."
        )
    features = estimate.features
    if features is not None and features.bytes > features.free_bytes:
        console.warning(
            f"The features of the frozen image encoder take {file_size(features.bytes)}, and"
            f" {file_size(features.free_bytes)} is free: give a --cache_dir on another disk, or"
            " --cached_views 0."
        )


def _show_sizes(estimate: TrainingEstimate) -> None:
    parts = estimate.parts
    rows = [
        (
            part.name,
            f"{part.ternary_parameters:,}",
            f"{part.float_parameters:,}",
            file_size(part.exported_bytes),
        )
        for part in parts
    ]
    total = (
        "all",
        f"{sum(part.ternary_parameters for part in parts):,}",
        f"{sum(part.float_parameters for part in parts):,}",
        file_size(estimate.exported_bytes),
    )
    columns = ("part of the model", "ternary parameters", "float parameters", "exported")
    console.table(columns, [*rows, total])


def _show_memory(memory: MemoryEstimate) -> None:
    values = dataclasses.asdict(memory)
    rows = [
        (words, file_size(values[name])) for name, words in _PARTS_OF_MEMORY.items() if values[name]
    ]
    console.table((f"memory in training ({memory.device})", "size"), rows)


def _feature_rows(features: FeatureEstimate) -> list[tuple[str, str]]:
    time = "not measured" if features.seconds is None else duration(features.seconds)
    return [
        (
            "features on disk",
            f"{file_size(features.bytes)}, of {features.rows:,} pictures;"
            f" {file_size(features.free_bytes)} free",
        ),
        ("computing them, once", time),
    ]


def _show_time(estimate: TrainingEstimate) -> None:
    batch, free = estimate.batch, estimate.free_bytes
    rows = [
        ("model", f"{estimate.model_size}, {estimate.quantization}, {estimate.precision}"),
        (
            "largest batch",
            f"{batch.rows:,} rows of {estimate.image_tokens} image tokens and"
            f" {batch.text_length} text tokens",
        ),
        ("free memory", "not known" if free is None else file_size(free)),
        ("fits", {True: "yes", False: "no", None: "not known"}[estimate.fits]),
        ("samples of an epoch", f"{estimate.train_samples:,}"),
        ("updates", f"{estimate.updates_per_epoch:,} an epoch, {estimate.total_updates:,} in all"),
    ]
    if estimate.word_pretraining_updates:
        words = f"the first {estimate.word_pretraining_updates:,} updates"
        rows.append(("word pretraining", f"{words}, of the image encoder alone"))
    seconds, epoch, total = (
        estimate.seconds_per_update,
        estimate.seconds_per_epoch,
        estimate.seconds_in_total,
    )
    if seconds is None or epoch is None or total is None:
        rows.append(("time", f"not measured: {estimate.why_not_timed}"))
    else:
        rows.append(("an update", f"{seconds:.2f} s, without loading and validation"))
        if estimate.seconds_per_word_update is not None:
            rows.append(("one of words", f"{estimate.seconds_per_word_update:.2f} s"))
        rows += [
            ("an epoch", duration(epoch)),
            ("the training", duration(total)),
        ]
    if estimate.features is not None:
        rows += _feature_rows(estimate.features)
    console.table(("", ""), rows)
    console.result("Nothing was written.")
