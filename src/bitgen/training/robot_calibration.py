"""What validation finds for the robot selector: temperature, weight of the words, threshold.

Shapes: N tasks, R robots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitgen.dataset.robots import chosen_robots
from bitgen.dataset.task_words import pooled_log_odds

ROBOT_TEMPERATURES = tuple(round(2 ** (step / 4), 3) for step in range(-4, 17))
"""What robots' logits may be divided by, 1/2 to 16: validation takes the best."""
ROBOT_WORD_WEIGHTS = (0.0, 0.25, 0.5, 0.75)
"""Shares that the words may have in the log odds: validation takes the best. Never all: picture and
robots' texts are to have a say."""
ROBOT_THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Probabilities from which a robot may be chosen, 0.05 to 0.95: validation takes the best."""


@dataclass(frozen=True)
class RobotCalibration:
    """What is stored with a model, and what it reaches on the tasks that found it."""

    temperature: float
    word_weight: float
    threshold: float
    exact_match: float
    """Share of the tasks whose robots are all judged right, 0 to 1."""


def calibrate_robots(
    logits_NR: npt.NDArray[np.float64],
    words_NR: npt.NDArray[np.float64] | None,
    suits_NR: npt.NDArray[np.bool_],
) -> RobotCalibration:
    """Find what gives these tasks the likeliest labels, one number after the other.

    First the temperature of the selector by itself (temperature scaling, arXiv 1706.04599, section
    4.2: one number, so few labels find it), since robots that were not trained on have no words;
    then the weight of the words beside it; then the threshold.

    Args:
        logits_NR: of the robot selector.
        words_NR: log odds by the words alone; None where there are none.
        suits_NR: the right robots.
    """
    temperature = min(
        ROBOT_TEMPERATURES, key=lambda value: cross_entropy(logits_NR / value, suits_NR)
    )
    weight = 0.0
    if words_NR is not None:
        words = words_NR
        weight = min(
            ROBOT_WORD_WEIGHTS,
            key=lambda value: cross_entropy(
                pooled_log_odds(logits_NR, words, temperature, value), suits_NR
            ),
        )
    log_odds_NR = pooled_log_odds(
        logits_NR, np.zeros_like(logits_NR) if words_NR is None else words_NR, temperature, weight
    )
    probabilities_NR = np.exp(-np.logaddexp(0.0, -log_odds_NR))
    matches_T = count_exact_matches(probabilities_NR, suits_NR)
    threshold, matches = best_robot_threshold(matches_T, len(suits_NR))
    return RobotCalibration(temperature, weight, threshold, matches / len(suits_NR))


def cross_entropy(log_odds_NR: npt.NDArray[np.float64], suits_NR: npt.NDArray[np.bool_]) -> float:
    """Binary cross-entropy, in nats a label."""
    return float(np.logaddexp(0.0, np.where(suits_NR, -log_odds_NR, log_odds_NR)).mean())


def count_exact_matches(
    probabilities_NR: npt.NDArray[np.float64], suits_NR: npt.NDArray[np.bool_]
) -> list[int]:
    """Tasks whose robots are all judged right, at each of the `ROBOT_THRESHOLDS`."""
    rows, right = probabilities_NR.tolist(), suits_NR.tolist()
    return [
        sum(chosen_robots(row, threshold) == suits for row, suits in zip(rows, right, strict=True))
        for threshold in ROBOT_THRESHOLDS
    ]


def best_robot_threshold(matches_T: Sequence[float], num_tasks: float) -> tuple[float, float]:
    """The one of `ROBOT_THRESHOLDS` to choose robots by, and how many exact matches it has.

    It is one half, unless another one matches more by two standard errors of the matches: few tasks
    say little, and one half is where probabilities are calibrated. A threshold is judged together
    with its two neighbours, and of those that are as good the one next to one half is taken.
    """
    padded = [matches_T[0], *matches_T, matches_T[-1]]
    smooth_T = [sum(padded[index : index + 3]) / 3 for index in range(len(matches_T))]
    half = ROBOT_THRESHOLDS.index(0.5)
    best = max(
        range(len(matches_T)),
        key=lambda index: (smooth_T[index], -abs(ROBOT_THRESHOLDS[index] - 0.5)),
    )
    share = matches_T[half] / num_tasks
    if smooth_T[best] - smooth_T[half] <= 2 * math.sqrt(num_tasks * share * (1 - share)):
        best = half
    return ROBOT_THRESHOLDS[best], matches_T[best]
