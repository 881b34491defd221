"""`curves.png`: how a training went, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bitgen.training.checkpoint import name_full_disk
from bitgen.training.figures import read_metrics

_Points: TypeAlias = list[tuple[float, float]]
_Metrics: TypeAlias = Sequence[dict[str, Any]]

_TRAIN_COLOUR = "#4c78a8"
_VALIDATION_COLOUR = "#d1495b"
_SHARE_COLOUR = "#2a9d55"
_OWN_PANELS = ("true_loss", "robot_loss", "image_word_loss")  # or no panel, being another's double
_MOST_POINTS = 400  # a line holds no more of its own width in pixels


def draw_curves(metrics_path: Path, output_png: Path) -> None:
    """Draw what a run holds of losses, robot selection, gradients, rates, speed and flips.

    Args:
        metrics_path: one JSON object a line, as the trainer writes them, or wrote them once.
        output_png: written at once; an older picture is replaced.

    Raises:
        ImportError: matplotlib is not installed.
        DiskFullError: no room for the picture.
    """
    # By its own canvas, not by pyplot: a program that plots on a screen is not disturbed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = read_metrics(metrics_path)
    panels = [panel for panel in _PANELS if panel.has_something(metrics)] or [_PANELS[0]]
    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.75 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes, panel in zip(grid, panels):  # noqa: B905
        axes.set(title=panel.title, ylabel=panel.unit, xlabel="updates")
        axes.grid(alpha=0.25)
        axes.spines["top"].set_visible(False)
        axes.margins(x=0.02)
        panel.draw(axes, metrics)
        if not axes.get_lines():
            axes.text(0.5, 0.5, "none in this run", ha="center", transform=axes.transAxes)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()

    temporary = output_png.with_name(f".{output_png.name}.tmp-{os.getpid()}")
    try:
        with name_full_disk(output_png):
            figure.savefig(temporary, dpi=110, format="png")
            temporary.replace(output_png)
    finally:
        temporary.unlink(missing_ok=True)


# Panels -----------------------------------------------------------------------------------------


def _draw_loss(axes: Any, metrics: _Metrics) -> None:
    _line(axes, _points(metrics, "train", "loss"), "training", _TRAIN_COLOUR, smooth=True)
    _line(axes, _points(metrics, "validation", "loss"), "validation", _VALIDATION_COLOUR)
    plans = _points(metrics, "validation", "plan_loss")
    if plans:
        _line(axes, plans, "validation, plans", _SHARE_COLOUR)
    _legend(axes)


def _draw_cider(axes: Any, metrics: _Metrics) -> None:
    reward = _points(metrics, "train", "reward")
    _line(axes, reward, "of drawn captions, training", _TRAIN_COLOUR, smooth=True)
    points = _points(metrics, "validation", "cider")
    _line(axes, points, "of greedy captions, validation", _VALIDATION_COLOUR)
    _legend(axes)


def _draw_robots(axes: Any, metrics: _Metrics) -> None:
    _line(axes, _points(metrics, "train", "robot_loss"), "training", _TRAIN_COLOUR, smooth=True)
    _line(axes, _points(metrics, "validation", "robot_loss"), "validation", _VALIDATION_COLOUR)
    matches = _points(metrics, "validation", "robot_exact_match")
    if not matches:
        _legend(axes)
        return
    share = axes.twinx()
    _line(share, _percent(matches), "exact match", _SHARE_COLOUR, style="--")
    share.set_ylim(0, 103)
    share.set_ylabel("exact match, % of validation tasks")
    # Between the losses below and the share above.
    _legend(axes, [*axes.get_lines(), *share.get_lines()], "center right")


def _draw_image_words(axes: Any, metrics: _Metrics) -> None:
    points = _points(metrics, "train", "image_word_loss")
    _line(axes, points, "training", _TRAIN_COLOUR, smooth=True)


def _draw_other_losses(axes: Any, metrics: _Metrics) -> None:
    names = _other_losses(metrics)
    for index, name in enumerate(names):
        words = name.removesuffix("_loss").replace("_", " ")
        _line(axes, _points(metrics, "train", name), words, f"C{index}", smooth=True)
    _legend(axes)


def _draw_gradients(axes: Any, metrics: _Metrics) -> None:
    points = [(x, y) for x, y in _points(metrics, "train", "grad_norm") if y > 0]
    if points:
        axes.set_yscale("log")
    _line(axes, points, "gradient norm", _TRAIN_COLOUR, smooth=True)
    skipped = [line["step"] for line in metrics if line["kind"] == "train" and line.get("skipped")]
    if skipped:
        place = axes.get_xaxis_transform()
        low = [0.02] * len(skipped)
        label = f"{len(skipped):,} updates skipped"
        axes.plot(skipped, low, "|", color=_VALIDATION_COLOUR, label=label, transform=place)
        _legend(axes)


def _draw_rate(axes: Any, metrics: _Metrics) -> None:
    _line(axes, _points(metrics, "train", "learning_rate"), "learning rate", _TRAIN_COLOUR)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_speed(axes: Any, metrics: _Metrics) -> None:
    _line(axes, _points(metrics, "train", "tokens_per_second"), "speed", _TRAIN_COLOUR)
    _start_at_zero(axes)


def _draw_padding(axes: Any, metrics: _Metrics) -> None:
    points = _percent(_points(metrics, "train", "padding_share"))
    _line(axes, points, "padding", _TRAIN_COLOUR, smooth=True)
    _start_at_zero(axes)


def _draw_flips(axes: Any, metrics: _Metrics) -> None:
    flips = _percent(_points(metrics, "weights", "flip_share"))
    _line(axes, flips, "flips an update", _TRAIN_COLOUR)
    _start_at_zero(axes)
    zeros = [
        (line["step"], line["total_shares"][1])
        for line in metrics
        if line["kind"] == "weights" and line.get("total_shares")
    ]
    if zeros:
        share = axes.twinx()
        _line(share, _percent(zeros), "weights that are 0", _SHARE_COLOUR, style="--")
        share.set_ylabel("zeros, % of ternary weights")
        low, high = share.get_ylim()
        share.set_ylim(min(low, (low + high - 1) / 2), max(high, (low + high + 1) / 2))
        _legend(axes, [*axes.get_lines(), *share.get_lines()])


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    draw: Callable[[Any, _Metrics], None]
    names: tuple[str, ...]  # in a run without any of these it is left out

    def has_something(self, metrics: _Metrics) -> bool:
        if self.draw is _draw_other_losses:
            return bool(_other_losses(metrics))
        return any(line.get(name) is not None for line in metrics for name in self.names)


_PANELS = (
    _Panel("Caption loss", "nats per token", _draw_loss, ("loss", "plan_loss")),
    _Panel("CIDEr-D", "CIDEr-D", _draw_cider, ("reward", "cider")),
    _Panel(
        "Robot selection", "loss, nats per robot", _draw_robots, ("robot_loss", "robot_exact_match")
    ),
    _Panel("Words foretold from the image", "nats", _draw_image_words, ("image_word_loss",)),
    _Panel("Other losses", "nats", _draw_other_losses, ()),
    _Panel("Gradient norm, before clipping", "norm", _draw_gradients, ("grad_norm",)),
    _Panel("Learning rate", "learning rate", _draw_rate, ("learning_rate",)),
    _Panel("Speed", "caption tokens per second", _draw_speed, ("tokens_per_second",)),
    _Panel("Padding", "% of text positions", _draw_padding, ("padding_share",)),
    _Panel(
        "Ternary weights: flips an update", "% of ternary weights", _draw_flips, ("flip_share",)
    ),
)


# Helpers ----------------------------------------------------------------------------------------


def _other_losses(metrics: _Metrics) -> list[str]:
    """Names of losses that only some models or trainings have, in the order of the file."""
    return list(
        dict.fromkeys(
            name
            for line in metrics
            if line["kind"] == "train"
            for name, value in line.items()
            if name.endswith("_loss") and name not in _OWN_PANELS and value is not None
        )
    )


def _percent(points: _Points) -> _Points:
    return [(x, 100 * y) for x, y in points]


def _points(metrics: _Metrics, kind: str, name: str) -> _Points:
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


def _start_at_zero(axes: Any) -> None:
    _, top = axes.get_ylim()
    axes.set_ylim(0, 1.05 * top)


def _legend(axes: Any, lines: Sequence[Any] | None = None, place: str = "best") -> None:
    """Name the lines, those of `axes` unless others are given, that have a name to show."""
    handles = axes.get_lines() if lines is None else lines
    shown = [handle for handle in handles if not handle.get_label().startswith("_")]
    if shown:
        axes.legend(handles=shown, frameon=False, loc=place)
