"""The robot catalog, and tasks labelled with the robots that suit them.

Two forms of tasks are read, both JSON lists:

    {"task": "Bring back the red ball.", "robots": ["Humanoid"], "image": "train2017/1.png"}
    {"instruction": ..., "input": "Task: Bring back ...", "output": "Humanoid, Drone"}

`image` is optional. In the second form the robots may also stand in `original_single_robot_output`,
as a text or a list.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from bitgen.errors import DatasetError
from bitgen.shipped import shipped_file

if TYPE_CHECKING:
    import numpy as np

_TASK_PREFIX = "task:"
_NAME_DROPOUT = 0.3
_PHRASES = ("capabilities", "limitations", "environments")


@dataclass(frozen=True)
class Robot:
    """One robot of the catalog, described in short phrases."""

    name: str
    capabilities: tuple[str, ...]
    limitations: tuple[str, ...]
    environments: tuple[str, ...]

    def text(self) -> str:
        """The description that the robot selector reads."""
        return self._text(self.name, [getattr(self, key) for key in _PHRASES])

    def varied_text(self, random: np.random.Generator, phrase_dropout: float) -> str:
        """The text with phrases left out, the others shuffled, and now and then without the name.

        For training: what is learnt then lies in the phrases, which other robots share, rather
        than in one whole text. At least one phrase of each list stays.
        """
        lists = []
        for key in _PHRASES:
            phrases = [getattr(self, key)[i] for i in random.permutation(len(getattr(self, key)))]
            left = random.random(len(phrases)) >= phrase_dropout
            stays = [phrase for phrase, is_left in zip(phrases, left, strict=True) if is_left]
            lists.append(stays or phrases[:1])
        is_named = random.random() >= _NAME_DROPOUT or not any(lists)
        return self._text(self.name if is_named else "", lists)

    @staticmethod
    def _text(name: str, lists: Sequence[Sequence[str]]) -> str:
        parts = [f"{name}."] if name else []
        for key, phrases in zip(_PHRASES, lists, strict=True):
            if phrases:
                parts.append(f"{key}: {', '.join(phrases)}.")
        return " ".join(parts)


@dataclass(frozen=True)
class RobotTask:
    """A job in words, the robots that suit it (names of the catalog) and the picture, if any."""

    task: str
    robots: tuple[str, ...]
    image: Path | None = None


class _Task(Protocol):
    @property
    def task(self) -> str: ...

    @property
    def image(self) -> Path | None: ...


_AnyTask = TypeVar("_AnyTask", bound=_Task)


def load_catalog(path: Path | None = None) -> list[Robot]:
    """Read a robot catalog; without a path the one that ships with BitGen.

    Raises DatasetError if the file is missing or is not a catalog.
    """
    if path is None:
        return catalog_from_json(
            read_text(shipped_file("robots/catalog.json")),
            source="the catalog that ships with BitGen",
        )
    return catalog_from_json(read_text(Path(path)), source=str(path))


def catalog_to_json(catalog: Sequence[Robot]) -> str:
    """JSON text of a catalog, which `catalog_from_json` reads back."""
    return json.dumps([asdict(robot) for robot in catalog], indent=2, ensure_ascii=False) + "\n"


def catalog_from_json(text: str, source: str = "the catalog") -> list[Robot]:
    """Read a catalog from JSON text; `source` names it in messages.

    Raises DatasetError unless it is a list of at least one robot with unlike names.
    """
    entries = parse_list(text, source)
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


def load_tasks(paths: Path | Sequence[Path], catalog: Sequence[Robot]) -> list[RobotTask]:
    """Read robot tasks in either form (see the head of this module), from one or several files.

    Names of robots are matched to the catalog whatever their case and stored in its order. The
    prefix "Task:" and needless white space go. Tasks of all files are then merged by
    `merge_tasks`. `image` is taken relative to the folder of its file; whether it exists is not
    checked.

    Raises DatasetError for a file that is not such a list, or that names a robot that is not in the
    catalog.
    """
    tasks = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(path)
        entries = parse_list(read_text(path), str(path))
        if not entries:
            raise DatasetError(
                f"{path} holds no task.", remedy="Give a file with at least one task."
            )
        for number, entry in enumerate(entries, start=1):
            tasks.append(_task(entry, f"{path}, entry {number}", path.parent, catalog))
    return merge_tasks(tasks, catalog)


def merge_tasks(tasks: Sequence[RobotTask], catalog: Sequence[Robot]) -> list[RobotTask]:
    """Each task once, where it stood first.

    Tasks are the same that say the same of the same picture, whatever their case, white space and
    last full stop. Where they name different robots, those stand that at least half of them name,
    and all of them if there is none such.
    """
    same: dict[tuple[str, Path | None], list[RobotTask]] = {}
    for task in tasks:
        same.setdefault((text_key(task.task), task.image), []).append(task)
    merged = []
    for group in same.values():
        count = Counter(name for task in group for name in task.robots)
        agreed = {name for name, number in count.items() if 2 * number >= len(group)} or set(count)
        names = tuple(robot.name for robot in catalog if robot.name in agreed)
        merged.append(replace(group[0], robots=names))
    return merged


def without_tasks(tasks: Sequence[RobotTask], held_out: Sequence[RobotTask]) -> list[RobotTask]:
    """The tasks that are not among `held_out`, by the rule of `merge_tasks`."""
    known = {(text_key(task.task), task.image) for task in held_out}
    return [task for task in tasks if (text_key(task.task), task.image) not in known]


def chosen_robots(probabilities: Sequence[float], threshold: float) -> list[bool]:
    """Which robots are sent: those of at least `threshold`, or else the likeliest alone."""
    chosen = [probability >= threshold for probability in probabilities]
    if probabilities and not any(chosen):
        chosen[max(range(len(chosen)), key=lambda index: probabilities[index])] = True
    return chosen


def split_tasks(
    tasks: Sequence[RobotTask], val_share: float = 0.1
) -> tuple[list[RobotTask], list[RobotTask]]:
    """Divide tasks into (train, val) by a hash of their text and picture; see `split_by_text`."""
    return split_by_text(tasks, val_share)


def split_by_text(
    tasks: Sequence[_AnyTask], val_share: float
) -> tuple[list[_AnyTask], list[_AnyTask]]:
    """Divide tasks of any kind into (train, val) by a hash of their text and picture.

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


def read_text(path: Path) -> str:
    """The file's text. Raises DatasetError if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DatasetError(f"There is no file {path}.", remedy="Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as text: {error}") from error


def parse_list(text: str, source: str) -> list[Any]:
    """The JSON list that a text holds. Raises DatasetError, which names `source`, if it is none."""
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
    for key in _PHRASES:
        value = entry.get(key, [])
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
    if not isinstance(text, str) or not clean_task(text):
        raise DatasetError(
            f"{where} has no task.",
            remedy='Each entry needs "task" and "robots", or "input" and "output".',
        )
    image = entry.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        raise DatasetError(f"{where}: image must be a path, got {image!r}.")
    return RobotTask(
        task=clean_task(text),
        robots=_match_names(robots, where, catalog),
        image=None if image is None else folder / image,
    )


def clean_task(text: str) -> str:
    """The words of a task, without the "Task:" that may stand before them."""
    text = text.strip()
    if text.casefold().startswith(_TASK_PREFIX):
        text = text[len(_TASK_PREFIX) :].strip()
    return text


def _match_names(robots: Any, where: str, catalog: Sequence[Robot]) -> tuple[str, ...]:
    if isinstance(robots, str):
        robots = robots.split(",")
    if not isinstance(robots, list) or not all(isinstance(name, str) for name in robots):
        raise DatasetError(f"{where}: robots must be a list of names, got {robots!r}.")
    chosen = {match_name(name, where, catalog) for name in _non_empty(robots)}
    if not chosen:
        raise DatasetError(f"{where} names no robot.")
    return tuple(robot.name for robot in catalog if robot.name in chosen)


def match_name(name: str, where: str, catalog: Sequence[Robot]) -> str:
    """The catalog's own name of a robot, found whatever the case.

    Raises DatasetError, which begins with `where`, for a robot that is not in the catalog.
    """
    by_name = {robot.name.casefold(): robot.name for robot in catalog}
    known = by_name.get(name.strip().casefold())
    if known is None:
        raise DatasetError(
            f"{where} names the robot {name.strip()!r}, which is not in the catalog.",
            remedy=f"The catalog's robots: {', '.join(by_name.values())}.",
        )
    return known


def _non_empty(names: Iterable[str]) -> list[str]:
    return [name.strip() for name in names if name.strip()]


def text_key(text: str) -> str:
    """What is the same of texts that differ in case, space and the last full stop alone."""
    return " ".join(text.casefold().split()).rstrip(".")


def _hash_share(task: _Task) -> float:
    # The picture's own folders differ from machine to machine; its name and parent do not.
    picture = "" if task.image is None else "/".join(task.image.parts[-2:])
    digest = hashlib.sha256(f"{text_key(task.task)}\n{picture}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
