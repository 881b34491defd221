"""What validation finds for the robot selector: temperature, weight of the words, threshold."""

from __future__ import annotations

import numpy as np
import pytest

from bitgen.dataset.robots import chosen_robots
from bitgen.training.robot_calibration import (
    ROBOT_THRESHOLDS,
    best_robot_threshold,
    calibrate_robots,
    count_exact_matches,
    cross_entropy,
)


def drawn(seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Log odds, and labels drawn by them."""
    generator = np.random.default_rng(seed)
    log_odds = generator.normal(size=size) * 2
    return log_odds, generator.random(size) < 1 / (1 + np.exp(-log_odds))


def test_exact_match_at_each_threshold_is_that_of_the_robots_that_are_chosen() -> None:
    log_odds, suits = drawn(0, (40, 4))
    probabilities = 1 / (1 + np.exp(-log_odds))
    for threshold, found in zip(
        ROBOT_THRESHOLDS, count_exact_matches(probabilities, suits), strict=True
    ):
        rows = zip(probabilities.tolist(), suits.tolist(), strict=True)
        assert found == sum(chosen_robots(row, threshold) == right for row, right in rows)


def test_another_threshold_than_one_half_needs_neighbours_and_evidence() -> None:
    count = len(ROBOT_THRESHOLDS)
    assert best_robot_threshold([3.0] * count, 9) == (0.5, 3.0)
    lonely_and_plateau = [0.0] * count
    lonely_and_plateau[0] = 40.0  # its neighbour beyond the edge counts as itself
    lonely_and_plateau[13:16] = [30.0, 30.0, 30.0]
    assert best_robot_threshold(lonely_and_plateau, 100) == (ROBOT_THRESHOLDS[14], 30.0)
    little_better = [30.0] * 12 + [33.0] * 7  # the standard error is 4.6 of 100, 14.5 of 1,000
    assert best_robot_threshold(little_better, 100) == (0.5, 30.0)
    much_better = [300.0] * 12 + [330.0] * 7
    assert best_robot_threshold(much_better, 1000) == (0.7, 330.0)


def test_the_temperature_is_the_one_that_had_scaled_the_logits() -> None:
    honest, suits = drawn(0, (4000, 3))
    found = calibrate_robots(honest * 4, None, suits)
    assert (found.temperature, found.word_weight, found.threshold) == (4.0, 0.0, 0.5)
    chosen = [chosen_robots(row, 0.5) for row in (1 / (1 + np.exp(-honest))).tolist()]
    assert found.exact_match == np.mean((np.array(chosen) == suits).all(axis=1))


def test_words_weigh_as_much_as_they_know() -> None:
    log_odds, suits = drawn(1, (3000, 3))
    noise = np.random.default_rng(2).normal(size=log_odds.shape)
    assert calibrate_robots(noise, log_odds, suits).word_weight == 0.75
    assert calibrate_robots(log_odds, noise, suits).word_weight == 0.0
    both = calibrate_robots(log_odds + noise, log_odds - noise, suits)
    assert both.word_weight == 0.5


def test_cross_entropy_is_that_of_the_probabilities() -> None:
    log_odds, suits = drawn(3, (20, 2))
    probabilities = 1 / (1 + np.exp(-log_odds))
    right = np.where(suits, probabilities, 1 - probabilities)
    assert cross_entropy(log_odds, suits) == pytest.approx(-np.log(right).mean())
