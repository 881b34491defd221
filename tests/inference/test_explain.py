"""Reasons: weights that the model itself gives when it is asked without a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitgen.dataset.robots import Robot
from bitgen.inference.answers import RobotChoice
from bitgen.inference.explain import GRID, MOST_REASONS, explain
from bitgen.inference.predictor import BitGen

MakeRun = Callable[..., Path]


def log_odds(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


def test_a_scorer_that_adds_up_words_and_one_corner_is_found_out() -> None:
    words = {"roof": 2.0, "dive": -3.0, "the": 0.0, "flies": 1.5, "swims": 0.5}

    def value(text: str) -> float:
        return sum(words.get(word, 0.0) for word in text.split())

    texts = {"Drone": "Drone flies the", "Diver": "Diver swims"}

    def odds(task: str, pixels: np.ndarray | None, text: str) -> float:
        corner = 0.0 if pixels is None else float(pixels[0, 0, 0] == 255)
        return value(task) + value(text) + corner

    def score_tasks(tasks: Sequence[str], pixels: Sequence[np.ndarray | None]) -> np.ndarray:
        rows = [
            [odds(task, picture, text) for text in texts.values()]
            for task, picture in zip(tasks, pixels, strict=True)
        ]
        return np.array(rows)

    pixels = np.zeros((3, 12, 12), np.uint8)
    pixels[:, 0, 0] = 255
    task = "the roof dive"

    def score_texts(names: Sequence[str], given: Sequence[str]) -> np.ndarray:
        return np.array([odds(task, pixels, text) for text in given])

    choices = [RobotChoice("Diver", 0.6), RobotChoice("Drone", 0.4, chosen=True)]
    found = explain(
        choices, list(texts), list(texts.values()), task, pixels, score_tasks, score_texts
    )
    assert [(c.name, c.probability, c.chosen) for c in found] == [
        ("Diver", 0.6, False),
        ("Drone", 0.4, True),
    ]
    for choice, own in zip(found, ("swims", "flies"), strict=True):
        assert choice.why is not None
        parts = {part: [r for r in choice.why if r.part == part] for part in texts | words}
        task_reasons = [r for r in choice.why if r.part == "task"]
        assert [r.word for r in task_reasons] == ["dive", "roof", "the"]
        assert [r.weight for r in task_reasons] == pytest.approx([-3.0, 2.0, 0.0], abs=1e-6)
        first_of_robot = next(r for r in choice.why if r.part == "robot")
        assert (first_of_robot.word, round(first_of_robot.weight, 6)) == (own, words[own])
        pieces = [r for r in choice.why if r.part == "picture"]
        assert len(pieces) == MOST_REASONS
        assert pieces[0].box == pytest.approx((0, 0, 1 / GRID, 1 / GRID))
        assert [r.weight for r in pieces] == pytest.approx([1, 0, 0, 0, 0], abs=1e-6)
        assert not any(parts.values())  # no other part than these three


@pytest.mark.parametrize("with_picture", [False, True])
def test_weights_are_differences_of_the_models_own_answers(
    make_run: MakeRun, tmp_path: Path, with_picture: bool
) -> None:
    model = BitGen.load(make_run(), device="cpu", backend="torch")
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    image = path if with_picture else None
    catalog = [Robot("Crane", ("lifts loads",), (), ("harbours",)), Robot("Cat", (), (), ())]
    task = "lift the red box"
    choices = model.select_robots(task, image, catalog)
    explained = model.explain_robots(choices, task, image, catalog, batch_size=3)
    whole = {choice.name: log_odds(choice.probability) for choice in choices}
    for choice in explained:
        assert choice.why is not None
        assert {r.part for r in choice.why} == {"task", "robot", *(["picture"] * with_picture)}
        for reason in choice.why:
            if reason.part == "task":
                left = " ".join(word for word in task.split() if word != reason.word)
                asked = model.select_robots(left, image, catalog)
                (without,) = [c.probability for c in asked if c.name == choice.name]
                expected = whole[choice.name] - log_odds(without)
                assert reason.weight == pytest.approx(expected, abs=1e-3)


def test_both_backends_give_the_same_reasons(make_run: MakeRun) -> None:
    from bitgen.kernels import library

    if not library.is_usable():
        pytest.skip(f"needs the C++ library: {library.describe().reason}")
    run_dir, task = make_run(), "bring the red ball"
    found = []
    for backend in ("torch", "native"):
        model = BitGen.load(run_dir, device="cpu", backend=backend)
        assert model.backend == backend
        choices = model.explain_robots(model.select_robots(task), task)
        found.append({(c.name, r.word): r.weight for c in choices for r in c.why or ()})
    assert found[1] == pytest.approx(found[0], abs=2e-3)
