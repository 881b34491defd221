"""Robots that were never trained on, added by their texts alone: are they chosen where they fit?

    python benchmarks/new_robots.py --model shipped
    python benchmarks/new_robots.py --model shipped --fit

benchmarks/new_robots.json has 40 robots in two halves, with ten tasks each, written by hands that
saw neither the catalog nor the code. Each robot is added to the model's catalog. It should be
chosen for its own tasks, and not for those of the other robots of its half, which suit nobody in
the catalog, nor for tasks that were held out of data/robots/tasks.json. Nothing is trained.

- average precision: the tasks ranked by the robot's probability, mean over robots. Beside it the
  cosine of task and text in TF-IDF of words and pairs of words, and chance.
- where it fits, elsewhere, known tasks: share of its tasks, of other new robots' and of the
  held-out ones for which it is chosen (a probability of one half).
- first: share of its tasks for which no robot of the model's own catalog is likelier.

Needs scikit-learn. `--fit` fits `NEW_ROBOT_WEIGHTS` of bitgen.dataset.task_words to either half,
judges them on the other one, and prints those of both halves together: the ones in the code. As if
one task in six were for the new robot, two in six for nobody, and three for the others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from common import make_parser, run, show_result
from robot_selection import average_precision, tfidf_similarity

from bitgen.dataset.robots import Robot, RobotTask, load_catalog, load_tasks, split_tasks
from bitgen.dataset.task_words import NEW_ROBOT_WEIGHTS, TaskParts, new_robot_features
from bitgen.inference.predictor import BitGen
from bitgen.shipped import shipped_file

HALVES = (1, 2)
SHARES = {"own": 1 / 6, "other": 2 / 6, "known": 3 / 6}
"""Of the tasks that a new robot meets."""


@dataclass(frozen=True)
class Half:
    """One half of the robots, with their tasks and the held-out ones behind them."""

    robots: list[Robot]
    tasks: list[RobotTask]
    kind_NR: np.ndarray
    """`own`, `other` or `known`, of N tasks for R robots."""
    features_NRF: np.ndarray
    """Of `new_robot_features`."""


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="shipped", metavar="RUN_OR_FILE")
    parser.add_argument("--fit", action="store_true", help="fit the weights anew; changes nothing")
    arguments = parser.parse_args()
    bitgen = BitGen.load(arguments.model, device="cpu")
    halves = [read_half(bitgen, number) for number in HALVES]
    rows, figures = [], []
    for number, half in zip(HALVES, halves, strict=True):
        scored = {"as it is": np.array(NEW_ROBOT_WEIGHTS)}
        if arguments.fit:
            (other,) = (one for one in halves if one is not half)
            scored["fitted to the other half"] = fitted_weights([other])
        for name, weights in scored.items():
            found = judge(half, half.features_NRF @ weights)
            figures.append({"half": number, "weights": name, **found})
            rows.append((f"half {number}, {name}", *(f"{value:.3f}" for value in found.values())))
    result = {"model": arguments.model, "robots": sum(len(h.robots) for h in halves)}
    if arguments.fit:
        both = fitted_weights(halves).round(2).tolist()
        result["weights_of_both"] = both
        rows.append((f"weights of both: {both}",))
    columns = ("", *(name.replace("_", " ") for name in list(figures[0])[2:]))
    width = len(columns)
    rows = [(*row, *[""] * (width - len(row))) for row in rows]
    return show_result("new_robots", {**result, "figures": figures}, columns, rows, [])


def read_half(bitgen: BitGen, number: int) -> Half:
    """Robots and tasks of a half, and what the model has to say of each pair."""
    entries = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    entries = [entry for entry in entries if entry["half"] == number]
    robots = [
        Robot(
            entry["name"],
            *(tuple(entry[key]) for key in ("capabilities", "limitations", "environments")),
        )
        for entry in entries
    ]
    known = split_tasks(load_tasks(shipped_file("robots/tasks.json"), load_catalog()))[1]
    own = [(task, index) for index, entry in enumerate(entries) for task in entry["tasks"]]
    tasks = [*(RobotTask(task, (robots[index].name,)) for task, index in own), *known]
    kind_NR = np.full((len(tasks), len(robots)), "known")
    kind_NR[: len(own)] = "other"
    kind_NR[range(len(own)), [index for _, index in own]] = "own"
    features: list[tuple[float, ...]] = []

    def record(parts: TaskParts, text: str, selector: float, trained: float) -> float:
        features.append(new_robot_features(parts, text, selector, trained))
        return 0.0

    with mock.patch("bitgen.inference.predictor.new_robot_log_odds", record):
        bitgen.select_robots_batch(
            [task.task for task in tasks], catalog=[*bitgen.catalog, *robots]
        )
    return Half(robots, tasks, kind_NR, np.array(features).reshape(*kind_NR.shape, -1))


def fitted_weights(halves: list[Half]) -> np.ndarray:
    """Logistic regression over pairs of task and robot; the last weight is the constant's."""
    from sklearn.linear_model import LogisticRegression

    kinds = np.concatenate([half.kind_NR.ravel() for half in halves])
    features = np.concatenate([h.features_NRF.reshape(-1, h.features_NRF.shape[2]) for h in halves])
    weights = np.zeros(len(kinds))
    for kind, share in SHARES.items():
        weights[kinds == kind] = len(kinds) * share / (kinds == kind).sum()
    fitted = LogisticRegression(C=1e3, max_iter=1000).fit(
        features[:, :-1], kinds == "own", sample_weight=weights
    )
    return np.array([*fitted.coef_[0], *fitted.intercept_])


def judge(half: Half, log_odds_NR: np.ndarray) -> dict[str, float]:
    """The figures of the head of this module."""
    own_NR = half.kind_NR == "own"
    trained_NR = half.features_NRF[:, :, 3]
    by_tfidf = [tfidf_similarity(half.tasks, robot) for robot in half.robots]
    chosen_NR = log_odds_NR >= 0
    return {
        "average_precision": mean_precision(log_odds_NR, own_NR),
        "by_tfidf": mean_precision(np.stack(by_tfidf, axis=1), own_NR),
        "chance": float(own_NR.mean()),
        "where_it_fits": float(chosen_NR[own_NR].mean()),
        "elsewhere": float(chosen_NR[half.kind_NR == "other"].mean()),
        "known_tasks": float(chosen_NR[half.kind_NR == "known"].mean()),
        "first": float((log_odds_NR > trained_NR)[own_NR].mean()),
    }


def mean_precision(scores_NR: np.ndarray, suits_NR: np.ndarray) -> float:
    """Average precision, mean over robots."""
    pairs = zip(scores_NR.T, suits_NR.T, strict=True)
    return float(np.mean([average_precision(scores, suits) for scores, suits in pairs]))


if __name__ == "__main__":
    run(main)
