"""Why a robot was ranked where it was: what its score loses when a part of the input is left out.

    the task without one word     --.
    the robot's text without one  --+-> the same model -> log odds before - log odds without
    the picture without one piece --'

Occlusion (arXiv 1311.2901, section 4.2; of words: arXiv 1612.08220) asks the model itself, so each
weight is exact: by so much the robot's log odds fall if this part alone is missing. It needs no
gradient, so it holds on both backends. Weights of single parts do not add up to the score: of two
words that say the same, neither is missed while the other is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TypeVar

import numpy as np

from bitgen.inference.answers import Reason, RobotChoice

GRID = 6
"""A picture is taken apart into so many pieces a side."""
MOST_REASONS = 5
"""Reasons that are kept of each part: task, robot, picture."""

_Item = TypeVar("_Item")
_PARTS = ("task", "robot", "picture")

TaskScorer = Callable[[Sequence[str], "Sequence[np.ndarray | None]"], np.ndarray]
"""Log odds `[B, R]` of tasks in words, each with its pixels uint8 `[3, S, S]` or None."""
TextScorer = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""Log odds `[N]` for the task and picture in question, of robots by name and text."""


def explain(
    choices: Sequence[RobotChoice],
    names: Sequence[str],
    texts: Sequence[str],
    task: str,
    pixels_3SS: np.ndarray | None,
    score_tasks: TaskScorer,
    score_texts: TextScorer,
) -> list[RobotChoice]:
    """The choices, each with its reasons: those that weigh most first, for or against.

    Args:
        choices: in any order.
        names: of the catalog's robots, in the order of the scores.
        texts: of the same robots.
        task: what is to be done, in words.
        pixels_3SS: the square that the model saw, uint8; None without a picture.
        score_tasks: asks the model for other tasks or pictures.
        score_texts: asks it for other texts of a robot.
    """
    whole_R = score_tasks([task], [pixels_3SS])[0]
    reasons: dict[str, list[Reason]] = {name: [] for name in names}

    words = task.split()
    without = [" ".join(left) for left in _each_left_out(words)]
    losses_WR = whole_R - score_tasks(without, [pixels_3SS] * len(without))
    for word, losses_R in zip(words, losses_WR.tolist(), strict=True):
        for name, loss in zip(names, losses_R, strict=True):
            reasons[name].append(Reason("task", loss, word))

    variants = [
        (name, word, " ".join(left))
        for name, text in zip(names, texts, strict=True)
        for word, left in zip(text.split(), _each_left_out(text.split()), strict=True)
    ]
    of_robot = dict(zip(names, whole_R.tolist(), strict=True))
    scores_N = score_texts([name for name, _, _ in variants], [t for *_, t in variants])
    for (name, word, _), score in zip(variants, scores_N.tolist(), strict=True):
        reasons[name].append(Reason("robot", of_robot[name] - score, word))

    if pixels_3SS is not None:
        boxes = _boxes()
        hidden = [_without_box(pixels_3SS, box) for box in boxes]
        losses_KR = whole_R - score_tasks([task] * len(boxes), hidden)
        for box, losses_R in zip(boxes, losses_KR.tolist(), strict=True):
            for name, loss in zip(names, losses_R, strict=True):
                reasons[name].append(Reason("picture", loss, box=box))
    return [replace(choice, why=_weightiest(reasons[choice.name])) for choice in choices]


def _each_left_out(items: Sequence[_Item]) -> list[list[_Item]]:
    return [[*items[:index], *items[index + 1 :]] for index in range(len(items))]


def _boxes() -> list[tuple[float, float, float, float]]:
    edges = [index / GRID for index in range(GRID + 1)]
    return [
        (left, top, right, bottom)
        for top, bottom in zip(edges[:-1], edges[1:], strict=True)
        for left, right in zip(edges[:-1], edges[1:], strict=True)
    ]


def _without_box(pixels_3SS: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """The picture with one piece in the picture's own mean colour."""
    left, top, right, bottom = (round(edge * pixels_3SS.shape[-1]) for edge in box)
    hidden = pixels_3SS.copy()
    hidden[:, top:bottom, left:right] = pixels_3SS.mean(axis=(1, 2)).round()[:, None, None]
    return hidden


def _weightiest(reasons: Sequence[Reason]) -> tuple[Reason, ...]:
    """Of each part those that weigh most, and of these the weightiest first."""
    in_parts = sorted(reasons, key=lambda reason: (_PARTS.index(reason.part), -abs(reason.weight)))
    return tuple(
        reason
        for _, of_part in groupby(in_parts, key=lambda reason: reason.part)
        for reason in list(of_part)[:MOST_REASONS]
    )
