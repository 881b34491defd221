"""Drawn scenes: a small COCO-layout data set with captions and robot tasks, made from a seed.

A scene is one place (sky, water, floor, ...) with one or two coloured objects in it. A sixth of the
combinations (object, colour, place) is held out: no training picture shows one, and the main object
of every validation picture is one. A model that only learns pictures by rote fails on them.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bitgen.dataset.scene_drawing import PLACES, Scene, SceneObject, draw_scene
from bitgen.dataset.scene_objects import COLOURS, OBJECTS, SIZES
from bitgen.errors import DatasetError, DiskFullError, OutputExistsError
from bitgen.files import DISK_FULL

PLACE_PHRASES: Mapping[str, tuple[str, ...]] = {
    "sky": ("in the sky", "up in the sky", "high in the sky", "in the air"),
    "water": ("in the water", "under water", "under the water"),
    "floor": ("on the floor", "on a flat floor", "on the flat floor"),
    "stairs": ("on the stairs", "on the steps", "on a staircase"),
    "rubble": ("on the rubble", "on a pile of rubble", "on a heap of stones"),
    "shelves": ("on the shelves", "on a shelf", "on the shelf"),
}
_PLACE_WORDS: Mapping[str, str] = {
    "sky": "sky",
    "air": "sky",
    "water": "water",
    "underwater": "water",
    "floor": "floor",
    "stairs": "stairs",
    "staircase": "stairs",
    "steps": "stairs",
    "rubble": "rubble",
    "stones": "rubble",
    "shelf": "shelves",
    "shelves": "shelves",
}
_SIZE_WORDS: Mapping[str, tuple[str, ...]] = {
    "small": ("small", "little"),
    "medium": (),
    "large": ("large", "big"),
}
_RELATION_WORDS: Mapping[str, tuple[str, ...]] = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below",),
    "next to": ("next to", "beside"),
}
_ONE_OBJECT_TEMPLATES = (
    "{x} {p}.",
    "there is {x} {p}.",
    "{p} there is {x}.",
    "a picture of {x} {p}.",
    "{the} is {p}.",
    "{x} can be seen {p}.",
    "the {noun} {p} is {colour}.",
)
_TWO_OBJECT_TEMPLATES = (
    "{x} {r} {y} {p}.",
    "there is {x} {r} {y} {p}.",
    "{p} there is {x} {r} {y}.",
    "{x} and {y} {p}.",
    "{x} {p}, {r} {y}.",
    "{p}, {the} is {r} {y}.",
)

TASK_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "fetch": (
        "bring back {it}",
        "fetch {it}",
        "go and get {it}",
        "pick up {it} and bring it here",
    ),
    "photograph": (
        "take a photograph of {it}",
        "look closely at {it}",
        "film {it} from all sides",
        "check with a camera whether {it} is damaged",
    ),
    "haul": (
        "haul away {it}, which is heavy",
        "drag the heavy load that is tied to {it} away",
        "carry {it} and twenty kilograms of gear",
        "move {it}, which is very heavy",
    ),
    "repair": (
        "repair {it} with a screwdriver",
        "wipe {it} clean with a cloth",
        "tie a label to {it}",
        "wrap {it} in paper",
    ),
}
"""Wordings of each kind of task; `{it}` is the object. None tells the place."""

_DRONE, _UNDERWATER, _HUMANOID = "Drone", "Underwater Robot", "Humanoid"
_WHEELS, _LEGS = "Robot with Wheels", "Robot with Legs"
ROBOTS_FOR: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "fetch": {
        "sky": (_DRONE,),
        "water": (_UNDERWATER,),
        "floor": (_HUMANOID, _WHEELS),
        "stairs": (_HUMANOID, _LEGS),
        "rubble": (_LEGS,),
        "shelves": (_HUMANOID,),
    },
    "photograph": {
        "sky": (_DRONE,),
        "water": (_UNDERWATER,),
        "floor": (_DRONE, _WHEELS),
        "stairs": (_DRONE, _LEGS),
        "rubble": (_DRONE, _LEGS),
        "shelves": (_DRONE, _HUMANOID),
    },
    "haul": {
        "sky": (_DRONE,),
        "water": (_UNDERWATER,),
        "floor": (_WHEELS,),
        "stairs": (_LEGS,),
        "rubble": (_LEGS,),
        "shelves": (_HUMANOID,),
    },
    "repair": {
        "sky": (_DRONE,),
        "water": (_UNDERWATER,),
        "floor": (_HUMANOID,),
        "stairs": (_HUMANOID,),
        "rubble": (_HUMANOID, _LEGS),
        "shelves": (_HUMANOID,),
    },
}
"""Robots that suit a kind of task at a place: neither the wording nor the place decides alone."""

_SHARE_OF_TWO_OBJECTS = 0.07
_SHARE_OF_TWO_TASKS = 0.3
_SHARE_WITH_TASKS = {"train": 0.2, "val": 1.0}  # of the scenes; tasks are learnt soonest
_SHARE_OF_SIZE_WORDS = 0.35
_CAPTIONS_PER_SCENE = 5
_FIRST_VAL_ID = 10_000_001
_MARKER = "scenes_train.json"
# Not every system knows quotas.


def is_held_out(object_name: str, colour: str, place: str) -> bool:
    """Whether the combination is kept for validation (80 of 480, the same for every seed).

    A Latin pattern: of each pair (object, colour), (colour, place), (object, place) at most a
    quarter of its combinations is held out, so training shows every pair.
    """
    indices = (OBJECTS.index(object_name), list(COLOURS).index(colour), PLACES.index(place))
    return sum(indices) % len(PLACES) == 0


@dataclass(frozen=True)
class SceneSummary:
    """What `write_scenes` wrote. A combination is an object in a colour at a place; unseen ones
    stand in validation pictures only."""

    directory: Path
    num_train: int
    num_val: int
    num_captions: int
    num_train_tasks: int
    num_val_tasks: int
    num_train_combinations: int
    num_unseen_combinations: int


@dataclass(frozen=True)
class CaptionJudgement:
    """Whether what a caption says of objects, their colours and the place is all true.

    `main` tells whether the scene's main object is named with its colour; `all` does not ask that.
    """

    object: bool
    colour: bool
    place: bool
    main: bool

    @property
    def all(self) -> bool:
        """Object, colour and place are all right."""
        return self.object and self.colour and self.place


# ------------------------------------------------------------------------------------------------
# The data set
# ------------------------------------------------------------------------------------------------


def write_scenes(
    directory: Path,
    num_train: int,
    num_val: int,
    seed: int = 0,
    image_size: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> SceneSummary:
    """Write a data set of drawn scenes in COCO's layout, with robot tasks and ground truth.

    The same seed and size give the same bytes; the first scenes do not depend on how many follow.
    `image_size` is the side of the square pictures in pixels. `on_progress(done, total)` counts
    pictures. The folder appears whole or not at all.

    Raises DatasetError for sizes that make no data set, OutputExistsError if `directory` holds
    something (with `overwrite`: something other than scenes), DiskFullError if the disk is full.
    """
    directory = Path(directory)
    if num_train < 1 or num_val < 1:
        raise DatasetError(
            f"A data set of scenes needs at least one picture in each split, got {num_train} for"
            f" training and {num_val} for validation."
        )
    if not 32 <= image_size <= 1024:
        raise DatasetError(f"Scenes are drawn with 32 to 1024 pixels a side, got {image_size}.")
    _refuse_foreign_output(directory, overwrite)
    temporary: Path | None = None
    try:
        directory.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.absolute().parent)
        )
        temporary.chmod(0o755)
        train = _SplitWriter(temporary, "train", seed, image_size)
        val = _SplitWriter(temporary, "val", seed, image_size)
        done = 0
        for writer, count in ((train, num_train), (val, num_val)):
            for index in range(count):
                writer.add(index)
                done += 1
                if on_progress is not None:
                    on_progress(done, num_train + num_val)
            writer.close()
        _move_into_place(temporary, directory)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DiskFullError(
                f"The disk is full: the scenes could not be written to {directory}.",
                remedy="Make room, choose another folder, or ask for fewer scenes.",
            ) from error
        raise DatasetError(f"The scenes cannot be written to {directory}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return SceneSummary(
        directory=directory,
        num_train=num_train,
        num_val=num_val,
        num_captions=len(train.captions) + len(val.captions),
        num_train_tasks=len(train.tasks),
        num_val_tasks=len(val.tasks),
        num_train_combinations=len(train.combinations),
        num_unseen_combinations=len(val.combinations - train.combinations),
    )


def judge_caption(caption: str, scene: Mapping[str, Any]) -> CaptionJudgement:
    """Judge a caption strictly against the ground truth of its scene (an entry of scenes_*.json).

    Right means: at least one object, colour and place are named; every object named stands in the
    scene; every colour belongs to an object ("red ball", "the ball ... is red") and stands there as
    this pair; and no other place is named.
    """
    pairs = {(item["colour"], item["object"]) for item in scene["objects"]}
    present = {item["object"] for item in scene["objects"]}
    words = re.findall(r"[a-z]+", caption.lower())
    named = [word for word in words if word in OBJECTS]
    named_pairs: set[tuple[str, str]] = set()
    stray_colour = False
    last_object: str | None = None
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        if word in OBJECTS:
            last_object = word
        elif word in COLOURS:
            if following in OBJECTS:
                named_pairs.add((word, following))
            elif index and words[index - 1] == "is" and last_object is not None:
                named_pairs.add((word, last_object))
            else:
                stray_colour = True
    places = {_PLACE_WORDS[word] for word in words if word in _PLACE_WORDS}
    return CaptionJudgement(
        object=bool(named) and present.issuperset(named),
        colour=bool(named_pairs) and named_pairs <= pairs and not stray_colour,
        place=places == {scene["place"]},
        main=(scene["objects"][0]["colour"], scene["objects"][0]["object"]) in named_pairs,
    )


class _SplitWriter:
    """Pictures and JSON files of one split."""

    def __init__(self, directory: Path, split: str, seed: int, image_size: int) -> None:
        self.directory, self.split, self.seed, self.image_size = directory, split, seed, image_size
        self.images: list[dict[str, Any]] = []
        self.captions: list[dict[str, Any]] = []
        self.tasks: list[dict[str, Any]] = []
        self.scenes: list[dict[str, Any]] = []
        self.combinations: set[tuple[str, str, str]] = set()
        self.folder = directory / f"{split}2017"
        self.folder.mkdir(parents=True)
        (directory / "annotations").mkdir(exist_ok=True)

    def add(self, index: int) -> None:
        scene, picture = make_scene(self.seed, self.split, index, self.image_size)
        image_id = index + (1 if self.split == "train" else _FIRST_VAL_ID)
        file_name = f"{image_id:012d}.png"
        picture.save(self.folder / file_name, compress_level=3)
        self.images.append(
            {
                "id": image_id,
                "file_name": file_name,
                "width": self.image_size,
                "height": self.image_size,
            }
        )
        rng = _random(self.seed, self.split, index, "words")
        for text in _captions(scene, rng):
            caption_id = len(self.captions) + 1
            self.captions.append({"id": caption_id, "image_id": image_id, "caption": text})
        has_tasks = rng.random() < _SHARE_WITH_TASKS[self.split]
        for text, robots in _tasks(scene, rng) if has_tasks else []:
            image = f"{self.folder.name}/{file_name}"
            self.tasks.append({"task": text, "robots": list(robots), "image": image})
        self.scenes.append(scene.to_dict(file_name))
        self.combinations.update((item.object, item.colour, scene.place) for item in scene.objects)

    def close(self) -> None:
        captions = {
            "info": {"description": "BitGen drawn scenes", "seed": self.seed},
            "licenses": [],
            "images": self.images,
            "annotations": self.captions,
        }
        self._write(f"annotations/captions_{self.split}2017.json", captions)
        self._write(f"robots_{self.split}.json", self.tasks)
        self._write(f"scenes_{self.split}.json", self.scenes)

    def _write(self, name: str, content: Any) -> None:
        (self.directory / name).write_text(json.dumps(content) + "\n", encoding="utf-8")


def _refuse_foreign_output(directory: Path, overwrite: bool) -> None:
    if directory.is_dir():
        if not any(directory.iterdir()):
            return
        if not overwrite:
            raise OutputExistsError(
                f"{directory} exists and is not empty.",
                remedy="Choose another folder, or give --overwrite to replace the scenes in it.",
            )
        if not (directory / _MARKER).is_file():
            raise OutputExistsError(
                f"{directory} holds something other than scenes ({_MARKER} is missing), which is"
                " not overwritten.",
                remedy="Choose another folder.",
            )
    elif directory.exists():
        raise OutputExistsError(f"{directory} is a file.", remedy="Choose another folder.")


def _move_into_place(temporary: Path, directory: Path) -> None:
    """Rename `temporary` to `directory`; what stood there is gone only once that succeeded."""
    if not directory.exists():
        os.replace(temporary, directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=temporary.parent))
    os.replace(directory, old)
    try:
        os.replace(temporary, directory)
    except OSError:
        os.replace(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _random(seed: int, split: str, index: int, purpose: str) -> random.Random:
    # A text seeds Python's generator by SHA-512: the same numbers on every machine and version.
    return random.Random(f"bitgen scenes {seed} {split} {index} {purpose}")


def _combination(seed: int, split: str, index: int) -> tuple[str, str, str]:
    """(object, colour, place) of the main object: each round goes once through all of the split."""
    combinations = [
        (name, colour, place)
        for name in OBJECTS
        for colour in COLOURS
        for place in PLACES
        if is_held_out(name, colour, place) == (split == "val")
    ]
    round_number, position = divmod(index, len(combinations))
    _random(seed, split, round_number, "round").shuffle(combinations)
    return combinations[position]


def make_scene(seed: int, split: str, index: int, side: int) -> tuple[Scene, Image.Image]:
    """Scene number `index` of a split ("train" or "val") and its RGB picture of side x side."""
    object_name, colour, place = _combination(seed, split, index)
    rng = _random(seed, split, index, "scene")
    wanted = [(object_name, colour, rng.choice(tuple(SIZES)))]
    if rng.random() < _SHARE_OF_TWO_OBJECTS:
        # The main object is the larger one, so that a viewer knows which one is meant.
        wanted = [(object_name, colour, rng.choice(("medium", "large")))]
        others = [
            (other, other_colour)
            for other in OBJECTS
            for other_colour in COLOURS
            if other != object_name
            and other_colour != colour
            and (split == "val" or not is_held_out(other, other_colour, place))
        ]
        wanted.append((*rng.choice(others), "small"))
    return draw_scene(place, wanted, rng, side)


# ------------------------------------------------------------------------------------------------
# Words
# ------------------------------------------------------------------------------------------------


def _captions(scene: Scene, rng: random.Random) -> list[str]:
    relations = scene.relations()
    captions: list[str] = []
    while len(captions) < _CAPTIONS_PER_SCENE:
        main = scene.objects[0]
        template = rng.choice(_ONE_OBJECT_TEMPLATES)
        values = {
            "x": _with_article(main, rng),
            "the": f"the {main.colour} {main.object}",
            "noun": main.object,
            "colour": main.colour,
            "p": rng.choice(PLACE_PHRASES[scene.place]),
        }
        if relations and rng.random() < 0.7:
            template = rng.choice(_TWO_OBJECT_TEMPLATES)
            values["y"] = _with_article(scene.objects[1], rng)
            values["r"] = rng.choice(_RELATION_WORDS[rng.choice(relations)])
        caption = template.format(**values)
        caption = caption[0].upper() + caption[1:]
        if caption not in captions:
            captions.append(caption)
    return captions


def _with_article(item: SceneObject, rng: random.Random) -> str:
    words = [item.colour, item.object]
    sizes = _SIZE_WORDS[item.size]
    if sizes and rng.random() < _SHARE_OF_SIZE_WORDS:
        words.insert(0, rng.choice(sizes))
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _tasks(scene: Scene, rng: random.Random) -> list[tuple[str, tuple[str, ...]]]:
    count = 2 if rng.random() < _SHARE_OF_TWO_TASKS else 1
    tasks = []
    for kind in rng.sample(tuple(TASK_WORDINGS), count):
        item = rng.choice(scene.objects)
        text = rng.choice(TASK_WORDINGS[kind]).format(it=f"the {item.colour} {item.object}")
        tasks.append((text[0].upper() + text[1:] + ".", ROBOTS_FOR[kind][scene.place]))
    return tasks
