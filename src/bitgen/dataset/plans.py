"""Plans: tasks split into ordered subtasks, each with the robot that does it.

Two forms are read, both JSON lists:

    {"task": "Clear the fallen tree.", "image": "train2017/1.png",
     "plan": [{"subtask": "Look for a way around it", "robot": "Drone", "order": 1}]}
    {"input": "Task: Clear the fallen tree.",
     "subtasks": [{"subtask": "...", "assigned_robot": "Drone", "execution_order": 1}]}

`image` is optional. Subtasks of the same order are done at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitgen.dataset.robots import (
    Robot,
    clean_task,
    match_name,
    parse_list,
    read_text,
    split_by_text,
    text_key,
)
from bitgen.errors import DatasetError

# What a JSON text could hold only with an escape, which plans do without; and what no one reads.
_CONTROLS = map(chr, (*range(32), 127))
_WITHOUT_ESCAPES = str.maketrans({**dict.fromkeys(_CONTROLS, " "), '"': "'", "\\": "/"})


@dataclass(frozen=True)
class Subtask:
    """One step of a plan."""

    order: int
    """When it is done, from 1; steps of the same order are done at the same time."""
    subtask: str
    """What is done, in words."""
    robot: str
    """Who does it: a name of the catalog."""


@dataclass(frozen=True)
class TaskPlan:
    """A job in words, how it is done (by order, at least one step), and the picture, if any."""

    task: str
    subtasks: tuple[Subtask, ...]
    image: Path | None = None


def clean_subtask(text: str) -> str:
    """The words on one line, with ' for double quotes and / for backslashes."""
    return " ".join(text.encode("utf-8", "replace").decode().translate(_WITHOUT_ESCAPES).split())


def load_plans(paths: Sequence[Path], catalog: Sequence[Robot]) -> list[TaskPlan]:
    """Read the plans of one or several files, in either form (see the head of this module).

    Names of robots are matched to the catalog whatever their case. Subtasks are sorted by their
    order, which is renumbered from 1 without gaps; what was equal stays equal. Of plans for tasks
    that say the same (whatever the case) of the same picture the first one stands. `image` is taken
    relative to the folder of its file; whether it exists is not checked.

    Raises DatasetError for a file that is not such a list, or that names a robot that is not in the
    catalog.
    """
    plans: dict[tuple[str, Path | None], TaskPlan] = {}
    for path in map(Path, paths):
        entries = parse_list(read_text(path), str(path))
        if not entries:
            raise DatasetError(
                f"{path} holds no plan.", remedy="Give a file with at least one plan."
            )
        for number, entry in enumerate(entries, start=1):
            plan = _plan(entry, f"{path}, entry {number}", path.parent, catalog)
            plans.setdefault((text_key(plan.task), plan.image), plan)
    return list(plans.values())


def split_plans(
    plans: Sequence[TaskPlan], val_share: float = 0.1
) -> tuple[list[TaskPlan], list[TaskPlan]]:
    """Divide plans into (train, val) by a hash of task and picture, as robot tasks are divided.

    A task that has both a plan and robots falls on the same side as either.
    """
    return split_by_text(plans, val_share)


def _plan(entry: Any, where: str, folder: Path, catalog: Sequence[Robot]) -> TaskPlan:
    if not isinstance(entry, Mapping):
        raise DatasetError(f"{where} must be an object, got {entry!r}.")
    own_form = "task" in entry
    text, steps = (entry.get(k) for k in (("task", "plan") if own_form else ("input", "subtasks")))
    if not isinstance(text, str) or not clean_task(text):
        raise DatasetError(
            f"{where} has no task.",
            remedy='Each entry needs "task" and "plan", or "input" and "subtasks".',
        )
    if not isinstance(steps, list) or not steps:
        raise DatasetError(
            f"{where}: {'plan' if own_form else 'subtasks'} must be a list of at least one subtask,"
            f" got {steps!r}."
        )
    image = entry.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        raise DatasetError(f"{where}: image must be a path, got {image!r}.")
    names = ("robot", "order") if own_form else ("assigned_robot", "execution_order")
    subtasks = [
        _subtask(step, f"{where}, subtask {number}", names, catalog)
        for number, step in enumerate(steps, start=1)
    ]
    ranks = {order: rank for rank, order in enumerate(sorted({s.order for s in subtasks}), start=1)}
    ordered = sorted(subtasks, key=lambda subtask: subtask.order)
    return TaskPlan(
        task=clean_task(text),
        subtasks=tuple(Subtask(ranks[s.order], s.subtask, s.robot) for s in ordered),
        image=None if image is None else folder / image,
    )


def _subtask(step: Any, where: str, names: tuple[str, str], catalog: Sequence[Robot]) -> Subtask:
    if not isinstance(step, Mapping):
        raise DatasetError(f"{where} must be an object, got {step!r}.")
    text, robot, order = step.get("subtask"), step.get(names[0]), step.get(names[1])
    if not isinstance(text, str) or not clean_subtask(text):
        raise DatasetError(f"{where} has no words.", remedy='Say what is done in "subtask".')
    if not isinstance(robot, str) or not robot.strip():
        raise DatasetError(f"{where} names no robot.", remedy=f'Name one in "{names[0]}".')
    if not isinstance(order, int) or isinstance(order, bool):
        raise DatasetError(f"{where}: {names[1]} must be a whole number, got {order!r}.")
    return Subtask(order, clean_subtask(text), match_name(robot, where, catalog))
