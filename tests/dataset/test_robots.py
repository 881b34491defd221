from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitgen import shipped
from bitgen.dataset.robots import (
    Robot,
    RobotTask,
    catalog_from_json,
    catalog_to_json,
    load_catalog,
    load_tasks,
    split_tasks,
    without_tasks,
)
from bitgen.errors import DatasetError

NAMES = ["Drone", "Underwater Robot", "Humanoid", "Robot with Wheels", "Robot with Legs"]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_catalog_that_ships() -> None:
    catalog = load_catalog()
    assert [robot.name for robot in catalog] == NAMES
    for robot in catalog:
        assert robot.capabilities and robot.limitations and robot.environments
        text = robot.text()
        assert text.startswith(robot.name)
        for phrase in (*robot.capabilities, *robot.limitations, *robot.environments):
            assert phrase in text


def test_catalog_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "robots"
    folder.mkdir(parents=True)
    catalog = load_catalog()[:2]
    (folder / "catalog.json").write_text(catalog_to_json(catalog), encoding="utf-8")
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path)
    assert load_catalog() == catalog


def test_tasks_that_ship_name_every_robot() -> None:
    path = Path(__file__).resolve().parents[2] / "data" / "robots" / "tasks.json"
    tasks = load_tasks(path, load_catalog())
    assert len(tasks) == len(json.loads(path.read_text(encoding="utf-8")))
    assert {name for task in tasks for name in task.robots} == set(NAMES)


def test_catalog_round_trip(tmp_path: Path) -> None:
    catalog = load_catalog()
    assert catalog_from_json(catalog_to_json(catalog)) == catalog
    path = tmp_path / "mine.json"
    path.write_text(catalog_to_json(catalog[3:]), encoding="utf-8")
    assert load_catalog(path) == catalog[3:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "list"),
        ("[]", "no robot"),
        ("[3]", "robot 1"),
        ('[{"name": " "}]', "no name"),
        ('[{"name": "Drone", "capabilities": "flies"}]', "capabilities"),
    ],
)
def test_broken_catalog(text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        catalog_from_json(text)


def test_catalog_with_a_name_twice() -> None:
    entry = {"name": "Drone", "capabilities": [], "limitations": [], "environments": []}
    with pytest.raises(DatasetError, match="twice"):
        catalog_from_json(json.dumps([entry, {**entry, "name": "drone"}]))


def test_own_form(tmp_path: Path) -> None:
    path = write(
        tmp_path / "tasks.json",
        [
            {"task": " Fetch the ball. ", "robots": ["humanoid", "DRONE"], "image": "a/1.png"},
            {"task": "fetch  THE ball.", "robots": ["Drone"], "image": "a/1.png"},
            {"task": "Fetch the ball.", "robots": ["Underwater Robot"], "image": "a/2.png"},
            {"task": "Fetch the ball.", "robots": ["Drone"]},
        ],
    )
    assert load_tasks(path, load_catalog()) == [
        RobotTask("Fetch the ball.", ("Drone", "Humanoid"), tmp_path / "a" / "1.png"),
        RobotTask("Fetch the ball.", ("Underwater Robot",), tmp_path / "a" / "2.png"),
        RobotTask("Fetch the ball.", ("Drone",), None),
    ]


def test_the_same_task_of_several_files_is_merged_and_half_of_the_voices_count(
    tmp_path: Path,
) -> None:
    votes = [["Drone"], ["Drone", "Humanoid"], ["drone", "Humanoid"], ["Underwater Robot"]]
    paths = [
        write(tmp_path / f"{number}.json", [{"task": text, "robots": robots}])
        for number, (text, robots) in enumerate(
            zip(["Look up.", "look up", "Task: LOOK  UP.", "Look up. "], votes, strict=True)
        )
    ]
    catalog = load_catalog()
    assert load_tasks(paths, catalog) == [RobotTask("Look up.", ("Drone", "Humanoid"))]
    apart = [[["Drone"], ["Humanoid"], ["Robot with Legs"]][n % 3] for n in range(3)]
    for path, robots in zip(paths[:3], apart, strict=True):
        write(path, [{"task": "Look up.", "robots": robots}])
    every = ("Drone", "Humanoid", "Robot with Legs")
    assert load_tasks(paths[:3], catalog) == [RobotTask("Look up.", every)]
    held_out = [RobotTask("LOOK up", ("Drone",))]
    assert without_tasks([*held_out, RobotTask("Go.", ("Drone",))], held_out)[0].task == "Go."


def test_instruction_form(tmp_path: Path) -> None:
    path = write(
        tmp_path / "tasks.json",
        [
            {"instruction": "x", "input": "Task: Dive.", "output": "Underwater Robot, Drone"},
            {"instruction": "x", "input": "task:Fly.", "original_single_robot_output": ["Drone"]},
            {"instruction": "x", "input": "Walk.", "original_single_robot_output": "Humanoid"},
        ],
    )
    assert load_tasks(path, load_catalog()) == [
        RobotTask("Dive.", ("Drone", "Underwater Robot")),
        RobotTask("Fly.", ("Drone",)),
        RobotTask("Walk.", ("Humanoid",)),
    ]


def test_real_tasks(robots_dir: Path) -> None:
    single = load_tasks(robots_dir / "single_robot_selection.json", load_catalog())
    multi = load_tasks(robots_dir / "multi_robot_selection_dataset.json", load_catalog())
    # 201 and 200 entries, of which four repeat a task; one stands in the first file alone.
    assert (len(single), len(multi)) == (197, 196)
    paths = [robots_dir / "multi_robot_selection_dataset.json"]
    both = load_tasks([robots_dir / "single_robot_selection.json", *paths], load_catalog())
    assert both == single
    assert single[0] == RobotTask("Inspect a high-rise building’s exterior for damage.", ("Drone",))
    assert not any(task.task.lower().startswith("task") for task in [*single, *multi])
    labels = {task.task: task.robots for task in single}
    shared = [task for task in multi if task.task in labels]
    assert len(shared) >= 190
    assert all(labels[task.task] == task.robots for task in shared)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("fetch", "must be an object"),
        ({"robots": ["Drone"]}, "no task"),
        ({"task": "Task: ", "robots": ["Drone"]}, "no task"),
        ({"task": "Fetch."}, "list of names"),
        ({"task": "Fetch.", "robots": []}, "names no robot"),
        ({"task": "Fetch.", "robots": ["Drone"], "image": 3}, "image"),
        ({"task": "Fetch.", "robots": ["Submarine"]}, "'Submarine'.*not in the catalog"),
    ],
)
def test_broken_tasks(tmp_path: Path, entry: Any, message: str) -> None:
    path = write(tmp_path / "tasks.json", [{"task": "Fly.", "robots": ["Drone"]}, entry])
    with pytest.raises(DatasetError, match=message) as caught:
        load_tasks(path, load_catalog())
    assert "entry 2" in caught.value.message


def test_unknown_robot_tells_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "tasks.json", [{"task": "Fetch.", "robots": ["Submarine"]}])
    with pytest.raises(DatasetError) as caught:
        load_tasks(path, load_catalog())
    assert caught.value.remedy is not None
    assert all(name in caught.value.remedy for name in NAMES)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1", "\udcff"])
def test_files_that_hold_no_tasks(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tasks.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DatasetError, match=r"tasks\.json"):
        load_tasks(path, load_catalog())
    with pytest.raises(DatasetError, match="no file"):
        load_tasks(tmp_path / "absent.json", load_catalog())


def test_split_is_stable_and_whole() -> None:
    tasks = [RobotTask(f"Task number {number}.", ("Drone",)) for number in range(400)]
    train, val = split_tasks(tasks)
    assert sorted([*train, *val], key=tasks.index) == tasks
    assert 20 <= len(val) <= 60
    later_train, later_val = split_tasks([RobotTask("A new one.", ("Drone",)), *tasks[::-1]])
    assert set(train) <= set(later_train) and set(val) <= set(later_val)


def test_split_gives_each_side_one() -> None:
    for number in range(20):
        tasks = [RobotTask(f"Task {number} {letter}", ("Drone",)) for letter in "ab"]
        train, val = split_tasks(tasks)
        assert len(train) == len(val) == 1
    assert split_tasks(tasks[:1], val_share=0.0) == (tasks[:1], [])


def test_split_does_not_depend_on_where_the_pictures_lie() -> None:
    sides = []
    for folder in (Path("/here/scenes"), Path("/there")):
        tasks = [
            RobotTask("Fetch.", ("Drone",), folder / "train2017" / f"{number}.png")
            for number in range(100)
        ]
        sides.append([task.image.name for task in split_tasks(tasks)[1] if task.image])
    assert sides[0] == sides[1] and sides[0]


def test_varied_texts_keep_some_phrases_of_each_list_and_at_times_the_name() -> None:
    robot = load_catalog()[0]
    random = np.random.default_rng(0)
    texts = {robot.varied_text(random, 0.5) for _ in range(200)}
    assert len(texts) > 50
    known = {*robot.capabilities, *robot.limitations, *robot.environments}
    for text in texts:
        lists = dict(part.rstrip(".").split(": ") for part in re.split(r"(?<=\.) ", text)[-3:])
        assert list(lists) == ["capabilities", "limitations", "environments"]
        for phrases in lists.values():
            assert set(phrases.split(", ")) <= known
    assert 0.5 < sum(text.startswith("Drone.") for text in texts) / len(texts) < 0.9
    bare = Robot("Crane", (), (), ())
    assert {bare.varied_text(random, 0.5) for _ in range(20)} == {"Crane."} == {bare.text()}
