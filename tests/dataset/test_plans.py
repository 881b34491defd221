"""Plans that are read from files, cleaned and divided."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bitgen.dataset.plans import Subtask, TaskPlan, clean_subtask, load_plans, split_plans
from bitgen.dataset.robots import RobotTask, load_catalog, split_tasks
from bitgen.errors import DatasetError
from bitgen.shipped import shipped_file

CATALOG = load_catalog()


def write(path: Path, entries: Any) -> Path:
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def step(**changes: Any) -> dict[str, Any]:
    return {"subtask": "Fly there", "robot": "Drone", "order": 1, **changes}


def test_own_form_is_cleaned_and_ordered_from_one_keeping_ties(tmp_path: Path) -> None:
    steps = [
        step(subtask=' Say "hello"\n\\ wave', robot="humanoid", order=7),
        step(subtask="Look", robot=" DRONE ", order=-2),
        step(subtask="Carry", robot="Robot With wheels", order=7),
        step(subtask="Go home", order=9),
    ]
    path = write(
        tmp_path / "plans.json", [{"task": "Task:  Meet them.", "plan": steps, "image": "a/1.png"}]
    )
    assert load_plans([path], CATALOG) == [
        TaskPlan(
            "Meet them.",
            (
                Subtask(1, "Look", "Drone"),
                Subtask(2, "Say 'hello' / wave", "Humanoid"),
                Subtask(2, "Carry", "Robot with Wheels"),
                Subtask(3, "Go home", "Drone"),
            ),
            tmp_path / "a" / "1.png",
        )
    ]


def test_several_files_in_both_forms_are_joined_and_the_first_of_a_task_stands(
    tmp_path: Path,
) -> None:
    theirs = {
        "instruction": "...",
        "input": "Task: Find the dog.",
        "subtasks": [{"subtask": "Search", "assigned_robot": "Drone", "execution_order": 3}],
    }
    first = write(tmp_path / "first.json", [theirs])
    second = write(
        tmp_path / "second.json",
        [
            {"task": "find  the DOG.", "plan": [step(subtask="Wait")]},
            {"task": "Find the dog.", "plan": [step()], "image": "dog.png"},
        ],
    )
    plans = load_plans([first, second], CATALOG)
    assert [(plan.task, plan.subtasks[0].subtask, plan.image) for plan in plans] == [
        ("Find the dog.", "Search", None),
        ("Find the dog.", "Fly there", tmp_path / "dog.png"),
    ]
    assert plans[0].subtasks[0].order == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "must be an object"),
        ({"plan": [step()]}, "no task"),
        ({"task": "Task:  ", "plan": [step()]}, "no task"),
        ({"task": "Fly."}, "plan must be a list"),
        ({"input": "Fly.", "subtasks": []}, "subtasks must be a list of at least one"),
        ({"task": "Fly.", "plan": [step()], "image": 1}, "image must be a path"),
        ({"task": "Fly.", "plan": ["up"]}, "subtask 1 must be an object"),
        ({"task": "Fly.", "plan": [step(), step(subtask="\n")]}, "subtask 2 has no words"),
        ({"task": "Fly.", "plan": [step(robot=None)]}, "subtask 1 names no robot"),
        ({"task": "Fly.", "plan": [step(robot="Submarine")]}, "'Submarine'.*not in the catalog"),
        ({"task": "Fly.", "plan": [step(order="1")]}, "order must be a whole number"),
        ({"task": "Fly.", "plan": [step(order=True)]}, "order must be a whole number"),
    ],
)
def test_broken_plans_are_named(tmp_path: Path, entry: Any, message: str) -> None:
    path = write(tmp_path / "plans.json", [{"task": "Go.", "plan": [step()]}, entry])
    with pytest.raises(DatasetError, match=message) as caught:
        load_plans([path], CATALOG)
    assert f"{path}, entry 2" in caught.value.message


def test_a_file_without_plans(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no plan"):
        load_plans([write(tmp_path / "plans.json", [])], CATALOG)
    with pytest.raises(DatasetError, match="no file"):
        load_plans([tmp_path / "none.json"], CATALOG)


def test_cleaned_words_need_no_escape_in_json() -> None:
    text = 'a\x00b\x7fc "quoted" \\ d\u2028e \ud800'
    cleaned = clean_subtask(text)
    assert cleaned == "a b c 'quoted' / d e ?"
    assert json.dumps(cleaned, ensure_ascii=False) == f'"{cleaned}"'


def test_plans_are_divided_as_their_tasks_are() -> None:
    names = [f"Task number {number}." for number in range(200)]
    plans = [TaskPlan(name, (Subtask(1, "Go", "Drone"),)) for name in names]
    train, val = split_plans(plans)
    assert [plan.task for plan in val] == [
        task.task for task in split_tasks([RobotTask(name, ("Drone",)) for name in names])[1]
    ]
    assert train and val and len(train) + len(val) == 200


def test_the_real_plans_are_read(robots_dir: Path) -> None:
    plans = load_plans([robots_dir / "multi_robot_selection_dataset.json"], CATALOG)
    assert len(plans) == 196  # of 200, four are there twice
    assert {len(plan.subtasks) for plan in plans} == {4}
    for plan in plans:
        orders = [subtask.order for subtask in plan.subtasks]
        assert orders == sorted(orders) and set(orders) == set(range(1, max(orders) + 1))


def test_the_plans_that_ship_are_sound() -> None:
    plans = load_plans([shipped_file("robots/plans.json")], CATALOG)
    assert len(plans) > 1000
    counts = Counter(subtask.robot for plan in plans for subtask in plan.subtasks)
    assert set(counts) == {robot.name for robot in CATALOG} and min(counts.values()) >= 30
    for plan in plans:
        assert 2 <= len(plan.subtasks) <= 5
        assert all(subtask.subtask[0].isupper() for subtask in plan.subtasks)
        assert not any(subtask.subtask.endswith(".") for subtask in plan.subtasks)
