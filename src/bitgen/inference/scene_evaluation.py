"""How well a model describes drawn scenes and chooses robots for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from bitgen.dataset.robots import RobotTask
from bitgen.dataset.scenes import judge_caption
from bitgen.inference.predictor import BitGen


@dataclass(frozen=True)
class CaptionScores:
    """Shares (0 to 1) of captions in which what is named is true of the scene."""

    num_captions: int
    object: float
    colour: float
    place: float
    all: float
    """Object, colour and place in the same caption."""


def score_captions(captions: Sequence[str], scenes: Sequence[Mapping[str, Any]]) -> CaptionScores:
    """Judge one caption a scene; `scenes` are entries of `scenes_*.json`, in the same order."""
    judgements = [
        judge_caption(caption, scene) for caption, scene in zip(captions, scenes, strict=True)
    ]
    count = len(judgements)
    return CaptionScores(
        num_captions=count,
        object=sum(judgement.object for judgement in judgements) / count,
        colour=sum(judgement.colour for judgement in judgements) / count,
        place=sum(judgement.place for judgement in judgements) / count,
        all=sum(judgement.all for judgement in judgements) / count,
    )


def score_robots(model: BitGen, tasks: Sequence[RobotTask]) -> float:
    """Share of tasks for which exactly the right robots are chosen."""
    ranked = model.select_robots_batch(
        [task.task for task in tasks], [task.image for task in tasks]
    )
    exact = [
        {choice.name for choice in choices if choice.chosen} == set(task.robots)
        for choices, task in zip(ranked, tasks, strict=True)
    ]
    return sum(exact) / len(exact)


def with_shuffled_pictures(tasks: Sequence[RobotTask], seed: int = 0) -> list[RobotTask]:
    """The same tasks, each with the picture of another: what a model falls to without looking.

    Tasks without a picture stay as they are. The same seed gives the same order.
    """
    pictures: list[Path] = [task.image for task in tasks if task.image is not None]
    order = list(range(len(pictures)))
    Random(seed).shuffle(order)
    # A cycle through a random order: with two pictures or more, no task keeps its own.
    successor = dict(zip(order, order[1:] + order[:1], strict=True))
    shuffled = iter(pictures[successor[index]] for index in range(len(pictures)))
    return [
        task if task.image is None else RobotTask(task.task, task.robots, next(shuffled))
        for task in tasks
    ]
