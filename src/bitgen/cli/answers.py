"""How an answer is printed: for a person, or as one JSON object a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgen.console import console

if TYPE_CHECKING:
    from bitgen.dataset.plans import Subtask
    from bitgen.inference.answers import Reason
    from bitgen.inference.predictor import Caption, RobotChoice

_MOST_SHOWN = 3
_OF_PART = {"task": "task", "robot": "its text", "picture": "picture"}


def show_answer(
    image: Path | None,
    caption: Caption | None,
    robots: Sequence[RobotChoice] | None,
    json: bool,
    plan: Sequence[Subtask] | None = None,
) -> None:
    """Print what was said of one picture, or of a task without one."""
    if json:
        console.json(answer_record(image, caption, robots, plan))
        return
    if image is not None:
        console.result(str(image))
    if caption is not None:
        console.result(f"  {caption.text}")
    for robot in robots or ():
        mark = "*" if robot.chosen else " "
        console.result(f"{mark} {robot.probability:6.1%}  {robot.name}")
        for part in dict.fromkeys(reason.part for reason in robot.why or ()):
            reasons = [reason for reason in robot.why or () if reason.part == part]
            words = ", ".join(_reason_words(reason) for reason in reasons[:_MOST_SHOWN])
            console.result(f"             {_OF_PART[part]}: {words}")
    if plan is not None:
        if robots is not None:
            console.result("")
        console.table(("order", "subtask", "robot"), [(s.order, s.subtask, s.robot) for s in plan])


def answer_record(
    image: Path | None,
    caption: Caption | None,
    robots: Sequence[RobotChoice] | None,
    plan: Sequence[Subtask] | None = None,
) -> dict[str, Any]:
    """The JSON object of an answer; `robots` is in it where a task was given, and `plan` where one
    was asked for."""
    record: dict[str, Any] = {
        "image": None if image is None else str(image),
        "caption": None if caption is None else caption.text,
        "tokens": None if caption is None else caption.tokens,
        "log_probability": None if caption is None else caption.log_probability,
    }
    if caption is not None and caption.speculation is not None:
        record["speculation"] = dataclasses.asdict(caption.speculation)
    if robots is not None:
        record["robots"] = [
            {
                "name": robot.name,
                "probability": robot.probability,
                "chosen": robot.chosen,
                **({} if robot.why is None else {"why": [_reason_record(r) for r in robot.why]}),
            }
            for robot in robots
        ]
    if plan is not None:
        record["plan"] = [dataclasses.asdict(subtask) for subtask in plan]
    return record


def _reason_words(reason: Reason) -> str:
    return f"{reason.word or _place(reason.box)} {reason.weight:+.2f}"


def _place(box: tuple[float, float, float, float] | None) -> str:
    """The middle of a piece of the picture, in per cent from the left and from the top."""
    assert box is not None
    left, top, right, bottom = box
    return f"{(left + right) / 2:.0%} right, {(top + bottom) / 2:.0%} down"


def _reason_record(reason: Reason) -> dict[str, Any]:
    record = dataclasses.asdict(reason)
    return {name: value for name, value in record.items() if value is not None}
