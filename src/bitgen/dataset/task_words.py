"""Which robots suit by the words of a task alone: a linear model of parts of words. No torch.

    task -> parts of words -> TF-IDF D -> linear -> softmax over sets of robots -> log odds R

A few hundred tasks teach a linear model of words more than a network. It knows the sets of robots
that its tasks named (a label powerset: Tsoumakas and Vlahavas, ECML 2007), so it learns which
robots go together. It says nothing of pictures, nor of robots that it has not seen; what it says
and what the robot selector says are pooled (`pooled_log_odds`). For a robot that it has not seen,
what task and robot's text have in common counts instead (`new_robot_log_odds`).

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


NEW_ROBOT_WEIGHTS = (18.0, 10.0, 0.1, -0.9, -2.9)
"""Of `new_robot_features`, the last for the constant 1: fitted by benchmarks/new_robots.py."""
_LIMITATIONS = re.compile(r"limitations:[^.]*\.?")
_BETWEEN_PHRASES = re.compile(r"[.,:]")


class TaskParts:
    """A task's parts of words, to be compared with those of robots' texts."""

    def __init__(self, task: str, idf_D: Floats) -> None:
        """`idf_D`: of the tasks that a model was trained on, so that what is rare there counts."""
        self._idf_D = idf_D.astype(np.float64)
        self._weights = self._weigh(task)

    def likeness(self, text: str) -> float:
        """Cosine of the two in TF-IDF, 0 to 1."""
        return sum(
            weight * self._weights[found]
            for found, weight in self._weigh(text).items()
            if found in self._weights
        )

    def _weigh(self, text: str) -> dict[int, float]:
        bins, weights = tfidf(word_parts(text, len(self._idf_D)), self._idf_D)
        return dict(zip(bins.tolist(), weights.tolist(), strict=True))


def new_robot_features(
    parts: TaskParts, text: str, selector: float, trained: float
) -> tuple[float, float, float, float, float]:
    """What tells whether a robot that was not trained on suits a task; the last is 1.

    Args:
        parts: of the task.
        text: the robot's, in the form of `Robot.text`. Its limitations do not speak for it.
        selector: what the robot selector says of the text, in log odds.
        trained: the highest log odds of the catalog's robots that were trained on: where one of
            them surely suits, another is seldom wanted. 0 where there is none.

    Returns:
        Likeness of task and text, that of the text's most similar phrase, `selector`, `trained`, 1.
    """
    said = _LIMITATIONS.sub("", text)
    phrases = _BETWEEN_PHRASES.split(said)
    return parts.likeness(said), max(map(parts.likeness, phrases)), selector, trained, 1.0


def new_robot_log_odds(parts: TaskParts, text: str, selector: float, trained: float) -> float:
    """Log odds that a robot that was not trained on suits a task; see `new_robot_features`."""
    features = new_robot_features(parts, text, selector, trained)
    return sum(w * f for w, f in zip(NEW_ROBOT_WEIGHTS, features, strict=True))
