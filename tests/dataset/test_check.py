"""Each thing that can be wrong with a data set is found, and blamed on the right file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bitgen.dataset.check import (
    DAMAGED_IMAGE,
    DUPLICATE_CONTENT,
    MISSING_IMAGE,
    NOT_CAPTIONS,
    check_dataset,
)
from bitgen.dataset.coco import (
    BROKEN_ENTRY,
    CAPTION_WITHOUT_IMAGE,
    DUPLICATE_FILE,
    DUPLICATE_ID,
    EMPTY_CAPTION,
    IMAGE_WITHOUT_CAPTION,
)
from bitgen.errors import DatasetError

TRAIN, VAL = range(1, 7), range(7, 10)


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A sound data set: six pictures to train on, three to validate on."""
    for split, ids in (("train", TRAIN), ("val", VAL)):
        content = {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in ids],
            "annotations": [{"id": i, "image_id": i, "caption": f"Picture {i}."} for i in ids],
        }
        path = tmp_path / f"annotations/captions_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        for i in ids:
            write_picture(tmp_path / f"{split}2017/{i}.png", i)
    return tmp_path


def edit(data: Path, change: Callable[[dict[str, Any]], None], split: str = "train") -> Path:
    path = data / f"annotations/captions_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def found(data: Path) -> list[tuple[str, str]]:
    """File, relative to the data set, and kind of each problem."""
    problems = check_dataset(data).problems
    return [(p.file.relative_to(data).as_posix(), p.kind) for p in problems]


def test_a_sound_data_set(data: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = check_dataset(data, lambda done, total: seen.append((done, total)))
    assert report.is_sound
    assert (report.caption_files, report.images, report.images_on_disk) == (2, 9, 9)
    assert report.captions == 9
    assert seen == [(done, 9) for done in range(1, 10)]


def test_missing_image(data: Path) -> None:
    (data / "train2017/3.png").unlink()
    report = check_dataset(data)
    assert found(data) == [("train2017/3.png", MISSING_IMAGE)]
    assert "captions_train2017.json" in report.problems[0].detail
    assert (report.images, report.images_on_disk) == (9, 8)
    assert not report.is_sound


def test_all_images_missing_is_one_problem(data: Path) -> None:
    shutil.rmtree(data / "train2017")
    (problem,) = check_dataset(data).problems
    assert (problem.file.name, problem.kind) == ("captions_train2017.json", MISSING_IMAGE)
    assert "none of the 6 images" in problem.detail
    assert str(data / "images/train2017") in problem.detail


def test_problems_of_entries(data: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["caption"] = "  "  # image 1 is left without any, too
        content["annotations"] += [
            {"id": 50, "image_id": 77, "caption": "Of nothing."},
            {"id": 51, "caption": "Of nothing either."},
        ]
        content["images"] += [
            {"id": 2, "file_name": "other.png"},
            {"id": 8, "file_name": "3.png"},
        ]

    file = edit(data, change).relative_to(data).as_posix()
    problems = found(data)
    assert {name for name, _ in problems} == {file}
    assert sorted(kind for _, kind in problems) == sorted(
        [
            EMPTY_CAPTION,
            IMAGE_WITHOUT_CAPTION,
            CAPTION_WITHOUT_IMAGE,
            BROKEN_ENTRY,
            DUPLICATE_ID,
            DUPLICATE_FILE,
        ]
    )


def test_an_image_in_both_splits(data: Path) -> None:
    def add_to_val(content: dict[str, Any]) -> None:
        content["images"].append({"id": 4, "file_name": "../train2017/4.png"})
        content["images"].append({"id": 5, "file_name": "train2017/5.png"})
        content["annotations"] += [
            {"id": 60 + i, "image_id": i, "caption": "Again."} for i in (4, 5)
        ]

    edit(data, add_to_val, "val")
    val_file = "annotations/captions_val2017.json"
    assert sorted(found(data)) == sorted(
        [
            (val_file, DUPLICATE_ID),
            (val_file, DUPLICATE_ID),
            (val_file, DUPLICATE_FILE),
            (val_file, BROKEN_ENTRY),  # a name that leads out of its folder is not followed
        ]
    )


def test_damaged_images(data: Path) -> None:
    whole = (data / "train2017/1.png").read_bytes()
    (data / "train2017/1.png").write_bytes(whole[: len(whole) // 2])
    (data / "train2017/2.png").write_bytes(b"")
    (data / "train2017/3.png").write_text("words")
    Image.new("RGB", (1, 9)).save(data / "val2017/7.png")
    problems = check_dataset(data).problems
    assert [p.kind for p in problems] == [DAMAGED_IMAGE] * 4
    reasons = {p.file.name: p.detail for p in problems}
    assert "cannot be decoded" in reasons["1.png"]
    assert reasons["2.png"] == "the file is empty."
    assert "not a picture" in reasons["3.png"]
    assert "1 x 9 pixels" in reasons["7.png"]


def test_a_link_that_leads_nowhere(data: Path) -> None:
    (data / "train2017/1.png").unlink()
    (data / "train2017/1.png").symlink_to(data / "nowhere.png")
    assert found(data) == [("train2017/1.png", DAMAGED_IMAGE)]


def test_same_content_under_two_names(data: Path) -> None:
    shutil.copy(data / "train2017/1.png", data / "train2017/5.png")
    shutil.copy(data / "train2017/1.png", data / "val2017/9.png")
    problems = check_dataset(data).problems
    assert [(p.file.name, p.kind) for p in problems] == [
        ("5.png", DUPLICATE_CONTENT),
        ("9.png", DUPLICATE_CONTENT),
    ]
    assert str(data / "train2017/1.png") in problems[1].detail


def test_same_length_is_not_same_content(data: Path) -> None:
    for i, colour in ((1, "red"), (2, "blue")):
        Image.new("RGB", (20, 20), colour).save(data / f"train2017/{i}.png", "BMP")
    lengths = {(data / f"train2017/{i}.png").stat().st_size for i in (1, 2)}
    assert len(lengths) == 1
    assert check_dataset(data).is_sound


def test_pictures_that_no_file_lists(data: Path) -> None:
    write_picture(data / "train2017/99.png", 99)
    write_picture(data / "images/98.PNG", 98)
    write_picture(data / "logo.png", 97)  # in the data set's own folder: anyone's
    (data / "train2017/notes.txt").touch()
    assert found(data) == [
        ("images/98.PNG", IMAGE_WITHOUT_CAPTION),
        ("train2017/99.png", IMAGE_WITHOUT_CAPTION),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ('{"images": [', "not JSON"),
        ('{"images": [{}], "annotations": [{"bbox": []}]}', "instances"),
        ("[1]", "a JSON list"),
    ],
)
def test_a_json_that_is_not_captions(data: Path, content: str, words: str) -> None:
    (data / "annotations/captions_val2017.json").write_text(content)
    (problem,) = check_dataset(data).problems  # and no flood of pictures without a caption
    assert (problem.file.name, problem.kind) == ("captions_val2017.json", NOT_CAPTIONS)
    assert words in problem.detail


def test_2014_and_2017_together_are_not_duplicates(data: Path) -> None:
    for split, ids in (("train", TRAIN), ("val", VAL)):
        path = data / f"annotations/captions_{split}2017.json"
        shutil.copy(path, data / f"annotations/captions_{split}2014.json")
        (data / f"{split}2014").mkdir()
        for i in ids:
            shutil.copy(data / f"{split}2017/{i}.png", data / f"{split}2014/{i}.png")
    report = check_dataset(data)
    assert report.is_sound
    assert (report.caption_files, report.images_on_disk) == (4, 18)


def test_folders_without_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is empty"):
        check_dataset(tmp_path)
    with pytest.raises(DatasetError, match="does not exist"):
        check_dataset(tmp_path / "nowhere")


@pytest.mark.slow
def test_real_coco_is_sound(coco_dir: Path) -> None:
    report = check_dataset(coco_dir)
    assert report.problems == ()
    assert (report.images, report.images_on_disk, report.captions) == (6908, 6908, 34_561)
