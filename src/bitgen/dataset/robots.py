"""The robot catalog, and tasks labelled with the robots that suit them.

Two forms of tasks are read, both JSON lists:

    {"task": "Bring back the red ball.", "robots": ["Humanoid"], "image": "train2017/1.png"}
    {"instruction": ..., "input": "Task: Bring back ...", "output": "Humanoid, Drone"}

`image` is optional. In the second form the robots may also stand in `original_single_robot_output`,
as a text or a list.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitgen.errors import DatasetError

_TASK_PREFIX = "task:"


@dataclass(frozen=True)
class Robot:
    """One robot of the catalog, described in short phrases."""

    name: str
    capabilities: tuple[str, ...]
    limitations: tuple[str, ...]
    environments: tuple[str, ...]

    def text(self) -> str:
        """The description that the robot selector reads."""
        return (
            f"{self.name}. capabilities: {', '.join(self.capabilities)}."
            f" limitations: {', '.join(self.limitations)}."
            f" environments: {', '.join(self.environments)}."
        )


@dataclass(frozen=True)
class RobotTask:
    """A job in words, the robots that suit it (names of the catalog) and the picture, if any."""

    task: str
    robots: tuple[str, ...]
    image: Path | None = None


def load_catalog(path: Path | None = None) -> list[Robot]:
    """Read a robot catalog; without a path the one that ships with BitGen.

    Raises DatasetError if the file is missing or is not a catalog.
    """
    if path is None:
        return catalog_from_json(_shipped_catalog(), source="the catalog that ships with BitGen")
    return catalog_from_json(_read_text(Path(path)), source=str(path))


def catalog_to_json(catalog: Sequence[Robot]) -> str:
    """JSON text of a catalog, which `catalog_from_json` reads back."""
    return json.dumps([asdict(robot) for robot in catalog], indent=2, ensure_ascii=False) + "\n"


def catalog_from_json(text: str, source: str = "the catalog") -> list[Robot]:
    """Read a catalog from JSON text; `source` names it in messages.

    Raises DatasetError unless it is a list of at least one robot with unlike names.
    """
    entries = _parse_list(text, source)
    catalog = [_robot(entry, number, source) for number, entry in enumerate(entries, start=1)]
    if not catalog:
        raise DatasetError(f"{source} names no robot.", remedy="List at least one robot.")
    seen: set[str] = set()
    for robot in catalog:
        key = robot.name.casefold()
        if key in seen:
            raise DatasetError(f"{source} names the robot {robot.name!r} twice.")
        seen.add(key)
    return catalog


def load_tasks(path: Path, catalog: Sequence[Robot]) -> list[RobotTask]:
    """Read robot tasks in either form (see the head of this module).

    Names of robots are matched to the catalog whatever their case and stored in its order. Tasks
    that say the same (whatever the case) of the same picture are merged; the first one's robots
    stand. `image` is taken relative to the folder of the file; whether it exists is not checked.

    Raises DatasetError for a file that is not such a list, or that names a robot that is not in the
    catalog.
    """
    path = Path(path)
    entries = _parse_list(_read_text(path), str(path))
    tasks: dict[tuple[str, Path | None], RobotTask] = {}
    for number, entry in enumerate(entries, start=1):
        task = _task(entry, f"{path}, entry {number}", path.parent, catalog)
        tasks.setdefault((_key(task.task), task.image), task)
    if not tasks:
        raise DatasetError(f"{path} holds no task.", remedy="Give a file with at least one task.")
    return list(tasks.values())


def split_tasks(
    tasks: Sequence[RobotTask], val_share: float = 0.1
) -> tuple[list[RobotTask], list[RobotTask]]:
    """Divide tasks into (train, val) by a hash of their text and picture.

    A task falls on the same side whatever stands beside it, so adding tasks moves none. Of two or
    more tasks each side gets at least one (if `val_share` > 0).
    """
    ordered = sorted(range(len(tasks)), key=lambda index: _hash_share(tasks[index]))
    in_val = {index for index in ordered if _hash_share(tasks[index]) < val_share}
    if len(tasks) >= 2 and 0 < val_share < 1:
        in_val = in_val or {ordered[0]}
        if len(in_val) == len(tasks):
            in_val.remove(ordered[-1])
    train = [task for index, task in enumerate(tasks) if index not in in_val]
    return train, [task for index, task in enumerate(tasks) if index in in_val]


def _shipped_catalog() -> str:
    shipped = importlib.resources.files("bitgen") / "data" / "robots" / "catalog.json"
    if shipped.is_file():
        return shipped.read_text(encoding="utf-8")
    # A checkout keeps it beside src/, where people look for data.
    return _read_text(Path(__file__).resolve().parents[3] / "data" / "robots" / "catalog.json")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DatasetError(f"There is no file {path}.", remedy="Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as text: {error}") from error


def _parse_list(text: str, source: str) -> list[Any]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{source} is not JSON: {error}.") from error
    if not isinstance(entries, list):
        raise DatasetError(f"{source} must hold a JSON list, not {type(entries).__name__}.")
    return entries


def _robot(entry: Any, number: int, source: str) -> Robot:
    where = f"{source}, robot {number}"
    if not isinstance(entry, Mapping):
        raise DatasetError(f"{where} must be an object with a name, got {entry!r}.")
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise DatasetError(f"{where} has no name.", remedy='Give it one: {"name": "Drone", ...}.')
    phrases = {}
    for key in ("capabilities", "limitations", "environments"):
        value = entry.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise DatasetError(f"{where} ({name}): {key} must be a list of texts, got {value!r}.")
        phrases[key] = tuple(value)
    return Robot(name=name.strip(), **phrases)


def _task(entry: Any, where: str, folder: Path, catalog: Sequence[Robot]) -> RobotTask:
    if not isinstance(entry, Mapping):
        raise DatasetError(f"{where} must be an object, got {entry!r}.")
    if "task" in entry:
        text, robots = entry["task"], entry.get("robots")
    else:
        text = entry.get("input")
        robots = entry.get("output", entry.get("original_single_robot_output"))
    if not isinstance(text, str) or not _strip_prefix(text):
        raise DatasetError(
            f"{where} has no task.",
            remedy='Each entry needs "task" and "robots", or "input" and "output".',
        )
    image = entry.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        raise DatasetError(f"{where}: image must be a path, got {image!r}.")
    return RobotTask(
        task=_strip_prefix(text),
        robots=_match_names(robots, where, catalog),
        image=None if image is None else folder / image,
    )


def _strip_prefix(text: str) -> str:
    text = text.strip()
    if text.casefold().startswith(_TASK_PREFIX):
        text = text[len(_TASK_PREFIX) :].strip()
    return text


def _match_names(robots: Any, where: str, catalog: Sequence[Robot]) -> tuple[str, ...]:
    if isinstance(robots, str):
        robots = robots.split(",")
    if not isinstance(robots, list) or not all(isinstance(name, str) for name in robots):
        raise DatasetError(f"{where}: robots must be a list of names, got {robots!r}.")
    by_name = {robot.name.casefold(): robot.name for robot in catalog}
    chosen = set()
    for name in _non_empty(robots):
        if name.casefold() not in by_name:
            raise DatasetError(
                f"{where} names the robot {name!r}, which is not in the catalog.",
                remedy=f"The catalog's robots: {', '.join(by_name.values())}.",
            )
        chosen.add(by_name[name.casefold()])
    if not chosen:
        raise DatasetError(f"{where} names no robot.")
    return tuple(robot.name for robot in catalog if robot.name in chosen)


def _non_empty(names: Iterable[str]) -> list[str]:
    return [name.strip() for name in names if name.strip()]


def _key(text: str) -> str:
    return " ".join(text.casefold().split())


def _hash_share(task: RobotTask) -> float:
    # The picture's own folders differ from machine to machine; its name and parent do not.
    picture = "" if task.image is None else "/".join(task.image.parts[-2:])
    digest = hashlib.sha256(f"{_key(task.task)}\n{picture}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
