"""The linear model of tasks' words: its parts of words, sets of robots, and what it says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bitgen.config import BitGenConfig
from bitgen.dataset.robots import Robot, RobotTask
from bitgen.dataset.task_words import (
    NEW_ROBOT_WEIGHTS,
    TASK_WORD_BINS,
    TaskParts,
    TaskWords,
    inverse_document_frequencies,
    new_robot_features,
    new_robot_log_odds,
    pooled_log_odds,
    robot_sets,
    set_numbers,
    tfidf,
    word_parts,
)

NAMES = ("Drone", "Diver", "Walker")


def tasks_of(*sets: tuple[str, ...]) -> list[RobotTask]:
    return [RobotTask(f"Task {number}", robots) for number, robots in enumerate(sets)]


def random_words(seed: int, sets: tuple[int, ...] = (1, 2, 5)) -> TaskWords:
    generator = np.random.default_rng(seed)
    return TaskWords(
        weights_ZD=generator.normal(size=(len(sets), TASK_WORD_BINS)),
        bias_Z=generator.normal(size=len(sets)),
        idf_D=1 + generator.random(TASK_WORD_BINS),
        sets=sets,
        num_robots=len(NAMES),
    )


def test_sets_are_those_of_the_tasks_and_each_task_finds_its_own() -> None:
    tasks = tasks_of(("Drone",), ("Diver", "Drone"), ("Walker",), ("Drone",), ())
    sets = robot_sets(tasks, NAMES)
    assert sets == (0b001, 0b011, 0b100)
    assert set_numbers(tasks, NAMES, sets) == [0, 1, 2, 0, None]


def test_of_many_sets_the_commonest_stay() -> None:
    names = [f"Robot {number}" for number in range(80)]
    tasks = tasks_of(*((name,) for name in names), *[("Robot 79",), ("Robot 78",)] * 2)
    sets = robot_sets(tasks, names)
    assert len(sets) == 64
    assert {1 << 79, 1 << 78} <= set(sets) and 1 << 77 not in sets


def test_words_of_one_stem_share_parts_and_case_does_not_count() -> None:
    swim, swimmer, walk = (
        set(word_parts(text, TASK_WORD_BINS)) for text in ("swim", "swimmer", "walk")
    )
    assert len(swim & swimmer) >= 5 and not swim & walk
    assert word_parts("Swim, swim!", 4096) == pytest.approx(
        {found: 1 + math.log(2) for found in word_parts("swim", 4096)}
    )
    assert word_parts("?!", 4096) == {} and len(word_parts("a", 4096)) == 1


def test_tfidf_has_length_one_and_weighs_rare_parts_more() -> None:
    parts = [word_parts(text, 4096) for text in ("dive deep", "dive far", "fly far")]
    idf_D = inverse_document_frequencies(parts, 4096)
    bins, weights = tfidf(parts[0], idf_D)
    assert (weights**2).sum() == pytest.approx(1)
    by_bin = dict(zip(bins.tolist(), weights.tolist(), strict=True))
    rare, common = set(word_parts("deep", 4096)), set(word_parts("dive", 4096))
    assert min(by_bin[found] for found in rare) > max(by_bin[found] for found in common)
    assert len(tfidf({}, idf_D)[0]) == 0


def test_log_odds_are_those_of_the_sets_probabilities() -> None:
    words = random_words(0)
    tasks = ["Dive to the wreck.", "Walk over the rubble.", ""]
    found_NR = words.log_odds(tasks)
    for found_R, task in zip(found_NR, tasks, strict=True):
        bins, values = tfidf(
            word_parts(task, TASK_WORD_BINS), np.asarray(words.idf_D, dtype=np.float64)
        )
        logits = words.weights_ZD[:, bins] @ values + words.bias_Z
        shares = np.exp(logits) / np.exp(logits).sum()
        expected = [shares[0] + shares[2], shares[1], shares[2]]  # sets 001, 010 and 101
        np.testing.assert_allclose(1 / (1 + np.exp(-found_R)), expected, rtol=1e-6)


def test_a_robot_of_every_set_or_of_none_is_sure_but_not_infinitely() -> None:
    found = random_words(1, sets=(1, 3)).log_odds(["Go."])[0]
    assert found[0] == -found[2] == 12 and abs(found[1]) < 12


def test_tensors_of_a_model_are_read_back() -> None:
    words = random_words(2)
    config = BitGenConfig.preset(
        "nano", robot_names=NAMES, robot_sets=(1, 2, 5), task_word_bins=TASK_WORD_BINS
    )
    tensors = words.tensors()
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float16)}
    found = TaskWords.of_model(config, tensors)
    assert found is not None
    np.testing.assert_allclose(found.log_odds(["Dive."]), words.log_odds(["Dive."]), atol=0.02)
    assert TaskWords.of_model(BitGenConfig.preset("nano"), {}) is None


def test_pooled_log_odds_are_a_weighted_mean_with_the_selector_at_its_temperature() -> None:
    assert pooled_log_odds(6.0, 1.0, 3.0, 0.0) == 2.0
    assert pooled_log_odds(6.0, 1.0, 3.0, 1.0) == 1.0
    assert pooled_log_odds(6.0, 1.0, 3.0, 0.25) == 1.75


def test_likeness_is_the_cosine_of_both_texts_in_tfidf() -> None:
    idf_D = 1 + np.random.default_rng(0).random(512)

    def vector(text: str) -> np.ndarray:
        vector_D = np.zeros(512)
        for found, count in word_parts(text, 512).items():
            vector_D[found] = count * idf_D[found]
        return vector_D / np.linalg.norm(vector_D)

    task = "Milk the cows, then clean the barn."
    parts = TaskParts(task, idf_D)
    for text in ("Milker. capabilities: milks cows.", "cows cows barn", task, "xylophone"):
        assert parts.likeness(text) == pytest.approx(vector(task) @ vector(text))
    assert parts.likeness(task) == pytest.approx(1)
    assert parts.likeness("") == TaskParts("", idf_D).likeness(task) == 0


def test_a_new_robot_is_judged_by_what_it_can_do_and_by_those_that_were_trained_on() -> None:
    idf_D = np.ones(TASK_WORD_BINS)
    milker = Robot("Milker", ("milks cows", "cleans udders"), ("fears water",), ("barns",))
    parts = TaskParts("Milk the cow.", idf_D)
    features = new_robot_features(parts, milker.text(), selector=0.5, trained=-1.5)
    # Its limitations do not count, and of its phrases the most similar one does.
    harmless = replace(milker, limitations=("milks cows badly", "milk")).text()
    assert new_robot_features(parts, harmless, 0.5, -1.5) == features
    assert features[1] == parts.likeness("milks cows") > features[0] > 0
    assert features[2:] == (0.5, -1.5, 1.0)
    log_odds = new_robot_log_odds(parts, milker.text(), 0.5, -1.5)
    assert log_odds == pytest.approx(np.dot(NEW_ROBOT_WEIGHTS, features))
    # Another task, or a robot that surely suits, speaks against it.
    assert new_robot_log_odds(TaskParts("Swim.", idf_D), milker.text(), 0.5, -1.5) < log_odds
    assert new_robot_log_odds(parts, milker.text(), 0.5, 6.0) < log_odds
    assert new_robot_features(parts, "", 0.0, 0.0)[:2] == (0.0, 0.0)
