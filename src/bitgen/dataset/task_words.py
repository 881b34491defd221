"""Which robots suit by the words of a task alone: a linear model of parts of words. No torch.

    task -> parts of words -> TF-IDF D -> linear -> softmax over sets of robots -> log odds R

A few hundred tasks teach a linear model of words more than a network. It knows the sets of robots
that its tasks named (a label powerset: Tsoumakas and Vlahavas, ECML 2007), so it learns which
robots go together. It says nothing of pictures, nor of robots that it has not seen; what it says
and what the robot selector says are pooled (`pooled_log_odds`).

Parts are those of 3 to 5 characters of each word with a space on either side, so that "swim",
"swimming" and "swimmer" share most. They are hashed into D bins, so that no list of them is kept.

Shapes: N tasks, R robots, Z sets of robots, D bins.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bitgen.config import BitGenConfig
from bitgen.dataset.robots import RobotTask

_WORD = re.compile(r"\w+")
_PARTS = (3, 4, 5)  # characters
_MOST_SETS = 64
TASK_WORD_BINS = 8192
"""Of the models that are trained now; a model says how many it has."""
_MOST_LOG_ODDS = 12.0  # where every set, or none, has a robot

TASK_WORD_TENSORS = (
    "robot_selector.word_weights", "robot_selector.word_bias", "robot_selector.word_idf",
)  # fmt: skip
"""What a model's weights call those of a `TaskWords`, float16."""

Floats = npt.NDArray[np.floating[Any]]


def robot_sets(tasks: Sequence[RobotTask], names: Sequence[str]) -> tuple[int, ...]:
    """The sets of robots that tasks name, rising; bit r of a set stands for `names[r]`.

    Of more than 64 the commonest stay.
    """
    counts = Counter(_set_of(task, names) for task in tasks)
    counts.pop(0, None)
    commonest = sorted(counts, key=lambda found: (-counts[found], found))[:_MOST_SETS]
    return tuple(sorted(commonest))


def set_numbers(
    tasks: Sequence[RobotTask], names: Sequence[str], sets: Sequence[int]
) -> list[int | None]:
    """Which of `sets` each task names; None for another one."""
    number_of = {found: number for number, found in enumerate(sets)}
    return [number_of.get(_set_of(task, names)) for task in tasks]


def _set_of(task: RobotTask, names: Sequence[str]) -> int:
    return sum(1 << index for index, name in enumerate(names) if name in task.robots)


def word_parts(task: str, num_bins: int) -> dict[int, float]:
    """The bins that a task's parts of words fall into, each with 1 + ln of how often it comes."""
    counts: Counter[int] = Counter()
    for word in _WORD.findall(task.casefold()):
        padded = f" {word} "
        for size in _PARTS:
            for start in range(max(1, len(padded) - size + 1)):
                part = padded[start : start + size]
                counts[zlib.crc32(part.encode()) % num_bins] += 1
                if size >= len(padded):
                    break
            if size >= len(padded):
                break  # a short word comes once, as a whole
    return {found: 1.0 + float(np.log(count)) for found, count in counts.items()}


def inverse_document_frequencies(parts: Sequence[Mapping[int, float]], num_bins: int) -> Floats:
    """float64 `[D]`: ln((1 + N) / (1 + n)) + 1 for a bin that n of N tasks have."""
    counts = np.zeros(num_bins)
    for found in parts:
        counts[list(found)] += 1
    return np.log((1 + len(parts)) / (1 + counts)) + 1


def tfidf(parts: Mapping[int, float], idf_D: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    """The bins of one task and their weights, whose squares add up to 1 (if there are any)."""
    bins = np.fromiter(parts, dtype=np.int64, count=len(parts))
    weights = np.fromiter(parts.values(), dtype=np.float64, count=len(parts)) * idf_D[bins]
    length = np.sqrt((weights**2).sum())
    return bins, weights / length if length else weights


@dataclass(frozen=True)
class TaskWords:
    """The linear model, as it was fitted to the tasks of a training.

    Attributes:
        weights_ZD: of each bin for each set of robots.
        bias_Z: of each set.
        idf_D: inverse document frequencies.
        sets: bit r of a set stands for robot r.
        num_robots: R.
    """

    weights_ZD: Floats
    bias_Z: Floats
    idf_D: Floats
    sets: tuple[int, ...]
    num_robots: int

    @classmethod
    def of_model(
        cls, config: BitGenConfig, tensors: Mapping[str, npt.NDArray[Any]]
    ) -> TaskWords | None:
        """The one among a model's tensors; None in a model that was not trained on tasks."""
        if not config.robot_sets:
            return None
        weights, bias, idf = (tensors[name] for name in TASK_WORD_TENSORS)
        return cls(weights, bias, idf, config.robot_sets, len(config.robot_names))

    def tensors(self) -> dict[str, npt.NDArray[np.float16]]:
        """Those of a model that `of_model` reads."""
        arrays = (self.weights_ZD, self.bias_Z, self.idf_D)
        return {
            name: np.ascontiguousarray(array, np.float16)
            for name, array in zip(TASK_WORD_TENSORS, arrays, strict=True)
        }

    def log_odds(self, tasks: Sequence[str]) -> npt.NDArray[np.float64]:
        """float64 `[N, R]`: log odds that each robot is in the set that suits each task."""
        robots_R = np.arange(self.num_robots)
        has_ZR = np.array([[found >> int(r) & 1 for r in robots_R] for found in self.sets], bool)
        logits_NZ = np.empty((len(tasks), len(self.sets)))
        for row, task in zip(logits_NZ, tasks, strict=True):
            bins, weights = tfidf(word_parts(task, len(self.idf_D)), self.idf_D.astype(np.float64))
            row[:] = self.weights_ZD[:, bins].astype(np.float64) @ weights + self.bias_Z
        with_NZR = np.where(has_ZR, logits_NZ[:, :, None], -np.inf)
        without_NZR = np.where(has_ZR, -np.inf, logits_NZ[:, :, None])
        log_odds_NR = np.logaddexp.reduce(with_NZR, axis=1) - np.logaddexp.reduce(
            without_NZR, axis=1
        )
        clipped: npt.NDArray[np.float64] = np.clip(log_odds_NR, -_MOST_LOG_ODDS, _MOST_LOG_ODDS)
        return clipped


FloatOrFloats = TypeVar("FloatOrFloats", float, npt.NDArray[np.float64])


def pooled_log_odds(
    selector: FloatOrFloats, words: FloatOrFloats, temperature: float, word_weight: float
) -> FloatOrFloats:
    """What the robot selector and the words say together, as log odds of the same shape.

    The selector's logits are divided by their temperature, which makes them log odds; the mean of
    both, `word_weight` of it the words', is the logarithmic opinion pool (Genest and Zidek, 1986).
    """
    return (1 - word_weight) * (selector / temperature) + word_weight * words
