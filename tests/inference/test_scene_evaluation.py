"""Scores on drawn scenes, with answers that are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bitgen.dataset.robots import RobotTask
from bitgen.inference.predictor import RobotChoice
from bitgen.inference.scene_evaluation import (
    score_captions,
    score_robots,
    with_shuffled_pictures,
)


def scene(place: str, object_name: str, colour: str) -> dict:
    item = {"object": object_name, "colour": colour, "size": "large", "position": [0.5, 0.5]}
    return {"file_name": "a.png", "place": place, "objects": [item], "relations": []}


def test_shares_of_captions() -> None:
    scenes = [scene("water", "ball", "red")] * 4
    captions = [
        "A red ball under water.",
        "A blue ball under water.",
        "A red key under water.",
        "A red ball on a shelf.",
    ]
    scores = score_captions(captions, scenes)
    assert scores.num_captions == 4
    assert scores.all == 0.25
    assert scores.object == 0.75
    assert scores.place == 0.75
    assert scores.colour < 1


def test_captions_and_scenes_of_different_number() -> None:
    with pytest.raises(ValueError):
        score_captions(["A red ball under water."], [])


class Oracle:
    """Chooses the robot that the picture's name says, and another below one half."""

    def select_robots_batch(
        self, tasks: Sequence[str], images: Sequence[Path | None]
    ) -> list[list[RobotChoice]]:
        return [
            [
                RobotChoice("none" if image is None else image.stem, 0.5, chosen=True),
                RobotChoice("Drone", 0.49),
            ]
            for image in images
        ]


def make_tasks(count: int) -> list[RobotTask]:
    return [RobotTask("go", (f"robot {i}",), Path(f"robot {i}.png")) for i in range(count)]


def test_exact_match_with_right_and_shuffled_pictures() -> None:
    tasks = [*make_tasks(5), RobotTask("swim", ("none",)), RobotTask("fly", ("none", "Drone"))]
    assert score_robots(Oracle(), tasks) == pytest.approx(6 / 7)  # type: ignore[arg-type]
    shuffled = with_shuffled_pictures(tasks)
    assert score_robots(Oracle(), shuffled) == pytest.approx(1 / 7)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_shuffled_pictures_are_all_of_another_task(count: int) -> None:
    tasks = make_tasks(count)
    shuffled = with_shuffled_pictures(tasks, seed=3)
    assert [(t.task, t.robots) for t in shuffled] == [(t.task, t.robots) for t in tasks]
    assert sorted(t.image for t in shuffled) == sorted(t.image for t in tasks)
    if count > 1:
        assert all(a.image != b.image for a, b in zip(shuffled, tasks, strict=True))
    assert with_shuffled_pictures(tasks, seed=3) == shuffled
