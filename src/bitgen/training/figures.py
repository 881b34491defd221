"""What a run's `metrics.jsonl` says of the whole training, from its first update on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunFigures:
    """Figures of a training, resumed or not. None where the run does not hold them."""

    padding_share: float | None
    """Of all text positions, 0 to 1: mean over the updates."""
    skipped_steps: int
    last_skipped_step: int | None
    last_skipped: str | None
    """Why the last skipped update was skipped."""
    best_validation: Mapping[str, Any] | None
    """`step`, `loss`, `plan_loss`, `robot_loss`, `robot_exact_match`, `robot_threshold`,
    `robot_temperature`, `robot_word_weight` and `cider` of the best validation."""
    ternary_step: int | None
    """The update after which the ternary weights were counted last."""
    ternary_shares: tuple[float, float, float] | None
    """Share of -1, 0 and +1 in all layers together, at `ternary_step`."""
    flips: int | None
    """Ternary weights that this one update brought to another value."""
    flip_share: float | None
    """The same as a share of all ternary weights, 0 to 1."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; one that a kill has cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "kind" in line and "step" in line:
            lines.append(line)
    return lines


def read_figures(path: Path) -> RunFigures:
    """The figures of a `metrics.jsonl`, of this BitGen or of an earlier one."""
    metrics = read_metrics(path)
    updates = [line for line in metrics if line["kind"] == "train"]
    paddings = [line["padding_share"] for line in updates if line.get("padding_share") is not None]
    skipped = [line for line in updates if line.get("skipped")]
    why = skipped[-1]["skipped"] if skipped else None
    best = [line for line in metrics if line["kind"] == "validation" and line.get("is_best")]
    names = (
        "step", "loss", "plan_loss", "robot_loss", "robot_exact_match", "robot_threshold",
        "robot_temperature", "robot_word_weight", "cider",
    )  # fmt: skip
    weights = [line for line in metrics if line["kind"] == "weights"]
    last = weights[-1] if weights else {}
    return RunFigures(
        padding_share=sum(paddings) / len(paddings) if paddings else None,
        skipped_steps=len(skipped),
        last_skipped_step=skipped[-1]["step"] if skipped else None,
        last_skipped=why if isinstance(why, str) else None,  # it was only true or false once
        best_validation={name: best[-1].get(name) for name in names} if best else None,
        ternary_step=last.get("step"),
        ternary_shares=tuple(last["total_shares"]) if last.get("total_shares") else None,
        flips=last.get("flips"),
        flip_share=last.get("flip_share"),
    )
