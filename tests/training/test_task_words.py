"""Fitting the linear model of tasks' words, against scikit-learn on the same features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitgen.dataset.robots import RobotTask, load_catalog, load_tasks
from bitgen.dataset.task_words import (
    TASK_WORD_BINS,
    robot_sets,
    set_numbers,
    tfidf,
    word_parts,
)
from bitgen.training.task_words import fit_task_words

NAMES = tuple(robot.name for robot in load_catalog())


def test_what_is_fitted_tells_the_tasks_apart_and_generalises_to_other_forms() -> None:
    tasks = [
        RobotTask("Dive to the wreck", ("Underwater Robot",)),
        RobotTask("Swim around the hull", ("Underwater Robot",)),
        RobotTask("Fly over the field", ("Drone",)),
        RobotTask("Photograph the roof from above", ("Drone",)),
    ]
    sets = robot_sets(tasks, NAMES)
    words = fit_task_words(tasks, NAMES, sets, TASK_WORD_BINS)
    new = words.log_odds(["He is diving and swimming", "Flying above the roofs"])
    drone, underwater = NAMES.index("Drone"), NAMES.index("Underwater Robot")
    assert new[0, underwater] > 0 > new[0, drone]
    assert new[1, drone] > 0 > new[1, underwater]
    unseen = [i for i, name in enumerate(NAMES) if name not in ("Drone", "Underwater Robot")]
    assert (new[:, unseen] == -12).all()


def test_tasks_of_other_sets_are_left_out() -> None:
    tasks = [RobotTask("Dive", ("Underwater Robot",)), RobotTask("Fly", ("Drone",))]
    extra = RobotTask("Fly and dive", ("Drone", "Underwater Robot"))
    sets = robot_sets(tasks, NAMES)
    with_extra, without = (fit_task_words(t, NAMES, sets, 512) for t in ([*tasks, extra], tasks))
    np.testing.assert_allclose(with_extra.weights_ZD, without.weights_ZD)


def test_it_is_the_logistic_regression_of_scikit_learn(robots_dir: Path) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    tasks = load_tasks(robots_dir / "single_robot_selection.json", load_catalog())[:80]
    sets = robot_sets(tasks, NAMES)
    words = fit_task_words(tasks, NAMES, sets, TASK_WORD_BINS)
    features = np.zeros((len(tasks), TASK_WORD_BINS))
    for row, task in zip(features, tasks, strict=True):
        bins, weights = tfidf(word_parts(task.task, TASK_WORD_BINS), np.asarray(words.idf_D))
        row[bins] = weights
    numbers = [number for number in set_numbers(tasks, NAMES, sets) if number is not None]
    theirs = linear_model.LogisticRegression(C=30, max_iter=5000, tol=1e-8).fit(features, numbers)
    found = features @ np.asarray(words.weights_ZD).T + words.bias_Z
    expected = theirs.decision_function(features)
    centred = [logits - logits.mean(axis=1, keepdims=True) for logits in (found, expected)]
    np.testing.assert_allclose(centred[0], centred[1], atol=0.02)
