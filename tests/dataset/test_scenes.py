from __future__ import annotations

import errno
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bitgen.dataset import scenes
from bitgen.dataset.robots import load_catalog, load_tasks
from bitgen.dataset.scene_drawing import PLACES
from bitgen.dataset.scene_objects import COLOURS, OBJECTS, SIZES
from bitgen.dataset.scenes import (
    PLACE_PHRASES,
    ROBOTS_FOR,
    TASK_WORDINGS,
    is_held_out,
    judge_caption,
    make_scene,
    write_scenes,
)
from bitgen.errors import DatasetError, DiskFullError, OutputExistsError

SIDE = 48
NUM_TRAIN, NUM_VAL = 420, 90


@pytest.fixture(scope="module")
def scenes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(directory, NUM_TRAIN, NUM_VAL, seed=5, image_size=SIDE)
    return directory


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def captions_by_scene(directory: Path, split: str) -> list[tuple[dict[str, Any], list[str]]]:
    truth = {scene["file_name"]: scene for scene in read(directory / f"scenes_{split}.json")}
    data = read(directory / "annotations" / f"captions_{split}2017.json")
    captions: dict[int, list[str]] = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    return [(truth[image["file_name"]], captions[image["id"]]) for image in data["images"]]


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_pycocotools_reads_what_is_written(
    scenes_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pycocotools.coco import COCO

    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        coco = COCO(str(scenes_dir / "annotations" / f"captions_{split}2017.json"))
        assert len(coco.getImgIds()) == count
        for image in coco.loadImgs(coco.getImgIds()):
            assert len(coco.getAnnIds(imgIds=image["id"])) == 5
            with Image.open(scenes_dir / f"{split}2017" / image["file_name"]) as picture:
                assert (picture.mode, picture.size) == ("RGB", (SIDE, SIDE))
                assert picture.size == (image["width"], image["height"])
    capsys.readouterr()
    ids = [
        {image["id"] for image in read(path)["images"]}
        for path in (scenes_dir / "annotations").iterdir()
    ]
    assert ids[0].isdisjoint(ids[1])


def test_same_seed_gives_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_scenes(tmp_path / name, 12, 6, seed=seed, image_size=SIDE)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    first, other = content(tmp_path / "a"), content(tmp_path / "c")
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_first_scenes_do_not_depend_on_how_many_follow(tmp_path: Path) -> None:
    write_scenes(tmp_path / "few", 8, 3, image_size=SIDE)
    write_scenes(tmp_path / "many", 20, 9, image_size=SIDE)
    few, many = content(tmp_path / "few"), content(tmp_path / "many")
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 11
    assert all(few[name] == many[name] for name in pictures)
    for split, count in (("train", 8), ("val", 3)):
        name = f"scenes_{split}.json"
        assert read(tmp_path / "few" / name) == read(tmp_path / "many" / name)[:count]
        name = f"annotations/captions_{split}2017.json"
        texts = [read(tmp_path / folder / name)["annotations"] for folder in ("few", "many")]
        assert texts[0] == texts[1][: 5 * count]
        tasks = [read(tmp_path / folder / f"robots_{split}.json") for folder in ("few", "many")]
        assert tasks[0] == tasks[1][: len(tasks[0])]


def test_validation_shows_combinations_that_training_never_shows(scenes_dir: Path) -> None:
    combinations = {
        split: [
            [(item["object"], item["colour"], scene["place"]) for item in scene["objects"]]
            for scene in read(scenes_dir / f"scenes_{split}.json")
        ]
        for split in ("train", "val")
    }
    in_train = set(itertools.chain.from_iterable(combinations["train"]))
    assert not any(is_held_out(*combination) for combination in in_train)
    main_in_val = [scene[0] for scene in combinations["val"]]
    assert all(is_held_out(*combination) for combination in main_in_val)
    assert in_train.isdisjoint(main_in_val)
    every = set(itertools.product(OBJECTS, COLOURS, PLACES))
    held_out = {combination for combination in every if is_held_out(*combination)}
    assert 0.15 <= len(held_out) / len(every) <= 0.2
    assert in_train == every - held_out and set(main_in_val) == held_out
    for first, second in itertools.combinations(range(3), 2):
        seen = {(combination[first], combination[second]) for combination in in_train}
        assert seen == {(combination[first], combination[second]) for combination in every}


def test_captions_differ_and_all_are_true(scenes_dir: Path) -> None:
    signs = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    relations_checked = 0
    for split in ("train", "val"):
        for scene, captions in captions_by_scene(scenes_dir, split):
            assert len(set(captions)) == 5
            for caption in captions:
                judgement = judge_caption(caption, scene)
                assert judgement.all and judgement.main, (caption, scene)
                words = caption.lower()
                sizes = {item["size"] for item in scene["objects"]}
                if "small" in words or "little" in words:
                    assert "small" in sizes, caption
                if "large" in words or "big " in words:
                    assert "large" in sizes, caption
                for relation, (axis, sign) in signs.items():
                    if relation in words:
                        main, other = (item["position"][axis] for item in scene["objects"])
                        assert (main - other) * sign > 0.2, (caption, scene)
                        relations_checked += 1
                if "next to" in words or "beside" in words:
                    (x, y), (x2, y2) = (item["position"] for item in scene["objects"])
                    assert abs(x - x2) < 0.6 and abs(y - y2) < 0.25, (caption, scene)
    assert relations_checked > 30


def test_scenes_vary(scenes_dir: Path) -> None:
    truth = read(scenes_dir / "scenes_train.json")
    two = sum(len(scene["objects"]) == 2 for scene in truth) / len(truth)
    assert 0.04 < two < 0.1
    assert {item["size"] for scene in truth for item in scene["objects"]} == set(SIZES)
    texts = [text for _, captions in captions_by_scene(scenes_dir, "train") for text in captions]
    assert len(set(texts)) > 0.8 * len(texts)
    for phrases in PLACE_PHRASES.values():
        assert all(any(phrase in text.lower() for text in texts) for phrase in phrases)
    for scene in truth:
        if len(scene["objects"]) == 2:
            first, second = scene["objects"]
            assert first["object"] != second["object"] and first["colour"] != second["colour"]


@pytest.mark.parametrize("place", PLACES)
def test_objects_are_drawn_whole_in_their_colour(place: str) -> None:
    seen = 0
    for index in range(400):
        scene, picture = make_scene(2, "train", index, 96)
        if scene.place != place:
            continue
        pixels = np.asarray(picture).astype(int)
        for item in scene.objects:
            left, top, right, bottom = item.box
            assert left >= 0 and top >= 0 and right <= 1 and bottom <= 1
            box = pixels[int(top * 96) : int(bottom * 96), int(left * 96) : int(right * 96)]
            # Nearest of the eight colours, of the pixels that are near one at all: shades,
            # outline, and water in front move a colour, but not to another one.
            distance = np.stack([abs(box - colour).sum(-1) for colour in COLOURS.values()])
            nearest = distance.argmin(0)[distance.min(0) < 110]
            counts = np.bincount(nearest, minlength=len(COLOURS))
            own = counts[list(COLOURS).index(item.colour)]
            assert own > 0.08 * box.shape[0] * box.shape[1], (index, item)
            seen += 1
    assert seen > 50


def test_robots_follow_from_wording_and_picture_together(scenes_dir: Path) -> None:
    catalog = load_catalog()
    tasks = load_tasks(scenes_dir / "robots_train.json", catalog)
    place_of = {
        scene["file_name"]: scene["place"] for scene in read(scenes_dir / "scenes_train.json")
    }
    assert len(tasks) >= 0.2 * NUM_TRAIN
    held_out = load_tasks(scenes_dir / "robots_val.json", catalog)
    assert len({task.image for task in held_out}) == len(read(scenes_dir / "scenes_val.json"))
    opening = {
        wording.split("{it}")[0].lower(): kind
        for kind, wordings in TASK_WORDINGS.items()
        for wording in wordings
    }
    place_words = set(scenes._PLACE_WORDS)
    for task in tasks:
        assert task.image is not None and task.image.is_file()
        assert place_words.isdisjoint(task.task.lower().rstrip(".").split())
        start = max((text for text in opening if task.task.lower().startswith(text)), key=len)
        expected = ROBOTS_FOR[opening[start]][place_of[task.image.name]]
        assert set(task.robots) == set(expected), task


def test_neither_wording_nor_place_decides_alone() -> None:
    names = {robot.name for robot in load_catalog()}
    for by_place in ROBOTS_FOR.values():
        assert set(by_place) == set(PLACES)
        assert len(set(by_place.values())) >= 4
        assert names.issuperset(itertools.chain.from_iterable(by_place.values()))
    for place in ("floor", "stairs", "rubble", "shelves"):
        assert len({by_place[place] for by_place in ROBOTS_FOR.values()}) >= 2
    assert names == {
        name for by_place in ROBOTS_FOR.values() for robots in by_place.values() for name in robots
    }


SCENE = {
    "place": "water",
    "objects": [
        {"object": "ball", "colour": "red", "size": "large", "position": [0.2, 0.5]},
        {"object": "box", "colour": "blue", "size": "small", "position": [0.7, 0.5]},
    ],
}


@pytest.mark.parametrize(
    ("caption", "object_right", "colour_right", "place_right", "main_named"),
    [
        ("A red ball under water.", True, True, True, True),
        ("A red ball and a blue box in the water", True, True, True, True),
        ("The ball in the water is red.", True, True, True, True),
        ("A blue box in the water.", True, True, True, False),
        ("A blue ball in the water.", True, False, True, False),
        ("A red ball and a red box in the water.", True, False, True, True),
        ("A red cone in the water.", False, False, True, False),
        ("A red ball next to a blue cone in the water.", False, False, True, True),
        ("A ball in the water.", True, False, True, False),
        ("A red and blue ball in the water.", True, False, True, False),
        ("A red ball on the stairs.", True, True, False, True),
        ("A red ball on the stairs in the water.", True, True, False, True),
        ("A red ball.", True, True, False, True),
        ("In the water.", False, False, True, False),
        ("", False, False, False, False),
    ],
)
def test_judge_is_strict(
    caption: str, object_right: bool, colour_right: bool, place_right: bool, main_named: bool
) -> None:
    judgement = judge_caption(caption, SCENE)
    assert (judgement.object, judgement.colour, judgement.place, judgement.main) == (
        object_right,
        colour_right,
        place_right,
        main_named,
    )
    assert judgement.all == (object_right and colour_right and place_right)


@pytest.mark.parametrize("place", PLACES)
def test_every_phrase_names_its_own_place_only(place: str) -> None:
    for phrase in PLACE_PHRASES[place]:
        caption = f"A red ball {phrase}."
        named = [other for other in PLACES if judge_caption(caption, {**SCENE, "place": other}).all]
        assert named == [place]


def test_summary_and_progress(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    summary = write_scenes(
        tmp_path / "deep" / "scenes",
        4,
        2,
        image_size=SIDE,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, 6) for done in range(1, 7)]
    assert (summary.num_train, summary.num_val, summary.num_captions) == (4, 2, 30)
    assert summary.num_unseen_combinations >= 2
    for split, count in (("train", summary.num_train_tasks), ("val", summary.num_val_tasks)):
        assert len(read(summary.directory / f"robots_{split}.json")) == count


def test_existing_output_is_refused_or_replaced(tmp_path: Path) -> None:
    target = tmp_path / "scenes"
    target.mkdir()
    write_scenes(target, 2, 1, image_size=SIDE)  # an empty folder is taken
    before = content(target)
    with pytest.raises(OutputExistsError, match="not empty"):
        write_scenes(target, 3, 1, seed=1, image_size=SIDE)
    assert content(target) == before
    write_scenes(target, 3, 1, seed=1, image_size=SIDE, overwrite=True)
    assert len(read(target / "scenes_train.json")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_overwrite_spares_what_is_no_scenes(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="other than scenes"):
        write_scenes(tmp_path, 2, 1, image_size=SIDE, overwrite=True)
    with pytest.raises(OutputExistsError, match="is a file"):
        write_scenes(tmp_path / "thesis.txt", 2, 1, image_size=SIDE, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize(("error_type", "code"), [(DiskFullError, errno.ENOSPC), (DatasetError, 5)])
def test_a_failing_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_type: type[Exception], code: int
) -> None:
    write_scenes(tmp_path / "scenes", 2, 1, image_size=SIDE)
    before = content(tmp_path)
    written = 0
    save = Image.Image.save

    def failing_save(self: Image.Image, *args: Any, **options: Any) -> None:
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(code, "no luck")
        save(self, *args, **options)

    monkeypatch.setattr(Image.Image, "save", failing_save)
    with pytest.raises(error_type):
        write_scenes(tmp_path / "scenes", 4, 1, seed=1, image_size=SIDE, overwrite=True)
    assert content(tmp_path) == before


def test_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", 4, 1, image_size=SIDE, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("num_train", "num_val", "side"), [(0, 1, 96), (1, 0, 96), (1, 1, 8)])
def test_sizes_that_make_no_data_set(
    tmp_path: Path, num_train: int, num_val: int, side: int
) -> None:
    with pytest.raises(DatasetError):
        write_scenes(tmp_path / "scenes", num_train, num_val, image_size=side)
    assert list(tmp_path.iterdir()) == []
