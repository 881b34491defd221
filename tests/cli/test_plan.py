"""`bitgen train --plan_data` and `bitgen infer --plan`, from the file to the table."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitgen.cli.app import main
from bitgen.dataset.robots import load_catalog

NAMES = {robot.name for robot in load_catalog()}


@pytest.fixture(scope="module")
def planner(
    tmp_path_factory: pytest.TempPathFactory, scenes: Path, small_training: list[str]
) -> Path:
    """A run that was trained on a few plans, for four steps."""
    folder = tmp_path_factory.mktemp("planner")
    plans = [
        {
            "task": f"Bring back ball number {number}.",
            "plan": [
                {"subtask": "Look for the ball", "robot": "drone", "order": 5},
                {"subtask": "Carry it home", "robot": "Humanoid", "order": 9},
            ],
        }
        for number in range(12)
    ]
    (folder / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    arguments = ["train", "--coco_data", scenes, "--robot_data", scenes / "robots_train.json"]
    arguments += ["--plan_data", folder / "plans.json", "--output_dir", folder / "run"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), *small_training])
    assert ended.value.code == 0
    return folder / "run"


def test_a_plan_as_table_and_as_json_without_and_with_pictures(
    run: Callable[..., Any], planner: Path, scenes: Path, tmp_path: Path
) -> None:
    asked = ("--task", "Bring back the red ball.", "--plan", "--max_subtasks", "2")
    table = run("infer", "--model", planner, *asked)
    assert table.code == 0
    head = next(line for line in table.stdout.splitlines() if "subtask" in line)
    assert head.split() == ["order", "subtask", "robot"]
    answer = run("infer", "--model", planner, *asked, "--json").json()
    assert answer["image"] is None and {robot["name"] for robot in answer["robots"]} == NAMES
    assert 1 <= len(answer["plan"]) <= 2
    for subtask in answer["plan"]:
        assert set(subtask) == {"order", "subtask", "robot"} and subtask["robot"] in NAMES
        assert subtask["subtask"] and subtask["order"] in (1, 2)

    artifact = tmp_path / "planner.safetensors"
    assert run("export", "--model", planner, "--output", artifact).code == 0
    exported = run("infer", "--model", artifact, *asked, "--json").json()
    assert exported["plan"] == answer["plan"]
    pictures = sorted((scenes / "val2017").iterdir())[:2]
    lines = run("infer", *pictures, "--model", artifact, *asked, "--json").json_lines()
    # These plans were trained on without pictures: the task alone makes them.
    assert [line["plan"] for line in lines] == [answer["plan"]] * 2
    assert all(line["caption"] is not None for line in lines)
    by_selector = run("infer", "--model", artifact, *asked, "--plan_robots", "selector", "--json")
    assert {subtask["robot"] for subtask in by_selector.json()["plan"]} <= NAMES


def test_a_conversation_plans_what_infer_plans(
    run: Callable[..., Any], planner: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = "Bring back the red ball."
    asked = run("infer", "--model", planner, "--task", task, "--plan", "--json").json()
    lines = (f"/plan {task}", task, "/plan", f"/image {sorted((scenes / 'val2017').iterdir())[0]}")

    def chat(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join((*lines, "/plan"))))
        return run("chat", "--model", planner, *arguments)

    plan, _, again, _, with_picture = chat("--json").json_lines()
    assert plan["plan"] == again["plan"] == with_picture["plan"] == asked["plan"]
    assert (plan["image"], with_picture["image"]) == (None, lines[-1].removeprefix("/image "))
    assert sum("subtask" in line for line in chat().stdout.splitlines()) >= 3


def test_plans_are_recorded_and_judged(run: Callable[..., Any], planner: Path) -> None:
    data = run("info", planner, "--json").json()["data"]
    assert data["train_plans"] + data["val_plans"] == 12 and data["val_plans"] >= 1
    metrics = (planner / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    judged = [line for line in map(json.loads, metrics) if line["kind"] == "validation"]
    assert judged and all(line["plan_loss"] > 0 and line["loss"] > 0 for line in judged)


def test_what_cannot_be_planned_is_said(
    run: Callable[..., Any], planner: Path, scenes: Path
) -> None:
    failed = run("infer", "--model", planner, "--plan")
    assert failed.code == 2
    (picture, *_) = sorted((scenes / "val2017").iterdir())
    failed = run("infer", picture, "--model", planner, "--plan")
    assert failed.code == 2 and "--plan splits a task" in failed.stderr
    failed = run("infer", "--model", planner, "--task", "go", "--plan", "--plan_robots", "chance")
    assert failed.code == 2 and "robots_by" in failed.stderr
    config = planner / "config.json"
    content = config.read_text(encoding="utf-8")
    try:
        config.write_text(content.replace('"train_plans"', '"other"'), encoding="utf-8")
        failed = run("infer", picture, "--model", planner, "--task", "go", "--plan")
    finally:
        config.write_text(content, encoding="utf-8")
    assert failed.code == 2 and "not trained on plans" in failed.stderr
    assert "--plan_data" in failed.stderr
