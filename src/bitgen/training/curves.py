"""`curves.png`: how a training went, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitgen.training.checkpoint import name_full_disk

_Points = list[tuple[float, float]]

_TRAIN_COLOUR = "#4c78a8"
_VALIDATION_COLOUR = "#d1495b"
_MOST_POINTS = 400  # a line holds no more of its own width in pixels


def draw_curves(metrics_path: Path, output_png: Path) -> None:
    """Draw losses, robot selection, learning rate and speed over the steps.

    Args:
        metrics_path: one JSON object a line, as the trainer writes them.
        output_png: written at once; an older picture is replaced.

    Raises:
        ImportError: matplotlib is not installed.
        DiskFullError: no room for the picture.
    """
    # By its own canvas, not by pyplot: a program that plots on a screen is not disturbed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = _read(metrics_path)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, robots), (rate, speed) = figure.subplots(2, 2)

    _line(loss, _points(metrics, "train", "loss"), "training", _TRAIN_COLOUR, smooth=True)
    _line(loss, _points(metrics, "validation", "loss"), "validation", _VALIDATION_COLOUR)
    loss.set(title="Caption loss", ylabel="nats per token")

    _line(robots, _points(metrics, "train", "robot_loss"), "training", _TRAIN_COLOUR, smooth=True)
    _line(robots, _points(metrics, "validation", "robot_loss"), "validation", _VALIDATION_COLOUR)
    robots.set(title="Robot selection", ylabel="loss, nats per robot")
    matches = _points(metrics, "validation", "robot_exact_match")
    if matches:
        share = robots.twinx()
        _line(share, [(x, 100 * y) for x, y in matches], "exact match", "#2a9d55", style="--")
        share.set_ylim(0, 103)
        share.set_ylabel("exact match, % of validation tasks")
        handles = [*robots.get_lines(), *share.get_lines()]
        shown = [handle for handle in handles if not handle.get_label().startswith("_")]
        _legend(robots, shown, "center right")  # between the losses below and the share above

    _line(rate, _points(metrics, "train", "learning_rate"), "learning rate", _TRAIN_COLOUR)
    rate.set(title="Learning rate", ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))

    _line(speed, _points(metrics, "train", "tokens_per_second"), "speed", _TRAIN_COLOUR)
    speed.set(title="Speed", ylabel="caption tokens per second")
    speed.set_ylim(bottom=0)

    for axes in (loss, robots, rate, speed):
        axes.set_xlabel("updates")
        axes.grid(alpha=0.25)
        axes.spines["top"].set_visible(False)
        axes.margins(x=0.02)
        if not axes.get_lines():
            axes.text(0.5, 0.5, "none in this run", ha="center", transform=axes.transAxes)
    for axes in (loss, robots):
        if axes.get_legend() is None and axes.get_lines():
            _legend(axes, [h for h in axes.get_lines() if not h.get_label().startswith("_")])

    temporary = output_png.with_name(f".{output_png.name}.tmp-{os.getpid()}")
    try:
        with name_full_disk(output_png):
            figure.savefig(temporary, dpi=110, format="png")
            temporary.replace(output_png)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _points(metrics: Sequence[dict[str, Any]], kind: str, name: str) -> _Points:
    return [
        (line["step"], line[name])
        for line in metrics
        if line["kind"] == kind and line.get(name) is not None
    ]


def _line(
    axes: Any, points: _Points, label: str, colour: str, smooth: bool = False, style: str = "-"
) -> None:
    """Draw points as one line: few of them marked, many of them thinned out and averaged."""
    if not points:
        return
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [
        tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups
    ]
    x, y = zip(*means, strict=True)
    marker = "o" if len(means) <= 30 else None
    if not smooth or len(means) < 20:
        axes.plot(x, y, style, color=colour, label=label, marker=marker, markersize=4)
        return
    # Single batches scatter: they stay as a shadow behind their running mean.
    axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8, label="_batches")
    axes.plot(x, _running_mean(y, len(y) // 40), color=colour, label=label)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and its neighbours, `width` on either side and fewer at the ends."""
    means = []
    for index in range(len(values)):
        reach = min(width, index, len(values) - 1 - index)
        near = values[index - reach : index + reach + 1]
        means.append(sum(near) / len(near))
    return means


def _legend(axes: Any, handles: Sequence[Any], place: str = "best") -> None:
    axes.legend(handles=handles, frameon=False, loc=place)
