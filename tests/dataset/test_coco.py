"""Every layout of COCO is found, splits never share a picture, bad caption files are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitgen.dataset import coco
from bitgen.dataset.coco import (
    BROKEN_ENTRY,
    CAPTION_WITHOUT_IMAGE,
    DUPLICATE_FILE,
    DUPLICATE_ID,
    EMPTY_CAPTION,
    IMAGE_WITHOUT_CAPTION,
    CaptionedImage,
    is_inside,
    load_coco,
    read_caption_file,
)
from bitgen.errors import DatasetError


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def captions_of(ids: Sequence[int], name: Callable[[int], str] = "{:012d}.jpg".format) -> Any:
    """A caption file that gives each id two captions."""
    return {
        "info": {},
        "images": [{"id": i, "file_name": name(i)} for i in ids],
        "annotations": [
            {"id": 10 * i + k, "image_id": i, "caption": f"Caption {k} of {i}."}
            for i in ids
            for k in range(2)
        ],
    }


def touch(
    folder: Path, ids: Sequence[int], name: Callable[[int], str] = "{:012d}.jpg".format
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in ids:
        (folder / name(i)).touch()


def write_set(
    directory: Path, split: str, ids: Sequence[int], year: int = 2017, folder: str | None = None
) -> None:
    write_json(directory / f"annotations/captions_{split}{year}.json", captions_of(ids))
    touch(directory / (folder or f"{split}{year}"), ids)


def ids_of(images: Sequence[CaptionedImage]) -> list[int]:
    return [image.image_id for image in images]


# Layouts


@pytest.mark.parametrize("year", [2014, 2017])
@pytest.mark.parametrize(
    "folder", ["{split}{year}", "images/{split}{year}", "images/{split}", "images", "."]
)
def test_every_layout(tmp_path: Path, year: int, folder: str) -> None:
    splits = {"train": [3, 1, 2], "val": [5, 4]}
    for split, ids in splits.items():
        write_set(tmp_path, split, ids, year, folder.format(split=split, year=year))
    for split, ids in splits.items():
        images = load_coco([tmp_path], split)  # type: ignore[arg-type]
        assert ids_of(images) == ids
        assert images[0].captions == (f"Caption 0 of {ids[0]}.", f"Caption 1 of {ids[0]}.")
        assert all(image.path.is_file() for image in images)


def test_captions_beside_the_pictures(tmp_path: Path) -> None:
    for split, ids in {"train": [1, 2], "val": [3]}.items():
        write_json(tmp_path / f"captions_{split}2017.json", captions_of(ids))
        touch(tmp_path / f"{split}2017", ids)
    assert ids_of(load_coco([tmp_path], "val")) == [3]


def test_file_names_with_a_folder(tmp_path: Path) -> None:
    for split, ids in {"train": [1, 2], "val": [3]}.items():
        name = f"{split}2017/{{}}.jpg".format
        write_json(tmp_path / f"annotations/captions_{split}2017.json", captions_of(ids, name))
        touch(tmp_path / f"{split}2017", ids, "{}.jpg".format)
    assert load_coco([tmp_path], "train")[0].path == tmp_path / "train2017/1.jpg"


def karpathy(rows: Sequence[tuple[int, str, str]]) -> Any:
    """`dataset_coco.json` from (id, Karpathy's split, folder)."""
    return {
        "dataset": "coco",
        "images": [
            {
                "filepath": folder,
                "filename": f"COCO_{folder}_{i:012d}.jpg",
                "cocoid": i,
                "imgid": position,
                "split": split,
                "sentences": [{"raw": f"Caption of {i}. ", "tokens": []}],
            }
            for position, (i, split, folder) in enumerate(rows)
        ],
    }


KARPATHY_ROWS = [
    (1, "train", "train2014"),
    (2, "restval", "val2014"),
    (3, "val", "val2014"),
    (4, "test", "val2014"),
]


@pytest.mark.parametrize("place", [".", "annotations"])
@pytest.mark.parametrize("pictures", ["2014", "images", "2017"])
def test_karpathy_split(tmp_path: Path, place: str, pictures: str) -> None:
    write_json(tmp_path / place / "dataset_coco.json", karpathy(KARPATHY_ROWS))
    for i, _, folder in KARPATHY_ROWS:
        if pictures == "2017":  # the same photographs, named and divided otherwise
            touch(tmp_path / "train2017", [i])
        else:
            name = f"COCO_{folder}_{{:012d}}.jpg".format
            touch(tmp_path / ("images" if pictures == "images" else folder), [i], name)
    assert ids_of(load_coco([tmp_path], "train")) == [1, 2]
    assert ids_of(load_coco([tmp_path], "val")) == [3]
    test = load_coco([tmp_path], "test")
    assert ids_of(test) == [4]
    assert test[0].captions == ("Caption of 4.",)


def test_one_collection_is_read(tmp_path: Path) -> None:
    """2014 and 2017 divide the same photographs in other ways: joined, val would be trained on."""
    write_set(tmp_path, "train", [1, 2], 2017)
    write_set(tmp_path, "val", [3], 2017)
    write_set(tmp_path, "train", [3, 1], 2014)
    write_set(tmp_path, "val", [2], 2014)
    assert ids_of(load_coco([tmp_path], "train")) == [1, 2]
    write_json(tmp_path / "dataset_coco.json", karpathy(KARPATHY_ROWS))
    touch(tmp_path / "train2014", [1, 2, 3, 4], "COCO_train2014_{:012d}.jpg".format)
    touch(tmp_path / "val2014", [1, 2, 3, 4], "COCO_val2014_{:012d}.jpg".format)
    assert ids_of(load_coco([tmp_path], "val")) == [3]


def test_a_collection_without_pictures_gives_way(tmp_path: Path) -> None:
    write_json(tmp_path / "annotations/captions_train2017.json", captions_of([7]))
    write_json(tmp_path / "annotations/captions_val2017.json", captions_of([8]))
    write_set(tmp_path, "train", [1, 2], 2014)
    write_set(tmp_path, "val", [3], 2014)
    assert ids_of(load_coco([tmp_path], "train")) == [1, 2]
    assert ids_of(load_coco([tmp_path], "val")) == [3]


def test_folders_are_joined_and_repeats_ignored(tmp_path: Path) -> None:
    write_set(tmp_path / "a", "train", [1, 2])
    write_set(tmp_path / "a", "val", [3])
    write_set(tmp_path / "b", "train", [1, 5])
    write_set(tmp_path / "b", "val", [6])
    directories = [tmp_path / "a", tmp_path / "b", tmp_path / "b" / ".." / "a"]
    images = load_coco(directories, "train")
    assert ids_of(images) == [1, 2, 1, 5]  # the two of id 1 are two pictures
    assert len({image.path for image in images}) == 4


# One split only


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_split_is_divided_by_image(tmp_path: Path, split: str) -> None:
    ids = list(range(1000))
    write_set(tmp_path, split, ids)
    train, val = load_coco([tmp_path], "train"), load_coco([tmp_path], "val")
    assert sorted(ids_of(train) + ids_of(val)) == ids
    assert 25 <= len(val) <= 80
    assert all(len(image.captions) == 2 for image in train + val)
    # Whatever else the folder holds, an image stays on its side.
    write_set(tmp_path, split, ids[::2])
    assert ids_of(load_coco([tmp_path], "val")) == [i for i in ids_of(val) if i % 2 == 0]


def test_division_is_the_same_everywhere(tmp_path: Path) -> None:
    write_set(tmp_path, "train", range(100))
    assert ids_of(load_coco([tmp_path], "val")) == [2, 12, 13, 44, 51, 56, 94]


def test_pictures_of_only_one_split(tmp_path: Path) -> None:
    """COCO's annotations come in one archive, and many take only the pictures of val."""
    write_json(tmp_path / "annotations/captions_train2017.json", captions_of(range(500, 600)))
    write_set(tmp_path, "val", range(100))
    train, val = load_coco([tmp_path], "train"), load_coco([tmp_path], "val")
    assert len(train) > 80
    assert len(val) > 0
    assert sorted(ids_of(train) + ids_of(val)) == list(range(100))


@given(ids=st.sets(st.integers(0, 10**6), min_size=2, max_size=30))
def test_both_sides_get_an_image(ids: set[int]) -> None:
    images = [CaptionedImage(Path(f"{i}.jpg"), i, ("a",)) for i in sorted(ids)]
    train, val = coco._divide(images)
    assert train
    assert val
    assert sorted(ids_of(train) + ids_of(val)) == sorted(ids)


def test_a_single_image_is_trained_on(tmp_path: Path) -> None:
    write_set(tmp_path, "train", [9])
    assert ids_of(load_coco([tmp_path], "train")) == [9]
    assert load_coco([tmp_path], "val") == []


# What is left out


def test_entries_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    content = captions_of([1, 2, 3, 4])
    content["annotations"] += [
        {"id": 900, "image_id": 1, "caption": "  two\n lines \t here "},
        {"id": 901, "image_id": 1, "caption": " \n"},
        {"id": 902, "image_id": 77, "caption": "Of no image."},
        {"id": 903, "image_id": 1},
        {"id": 904, "image_id": [1], "caption": "x"},
        "words",
    ]
    content["annotations"] = [
        a for a in content["annotations"] if a == "words" or a["image_id"] != 4
    ]
    content["images"] += [
        {"id": 1, "file_name": "again.jpg"},
        {"id": 5, "file_name": "000000000002.jpg"},
        {"id": 6},
        None,
    ]
    content["annotations"].append({"image_id": 5, "caption": "Same file."})
    path = write_json(tmp_path / "annotations/captions_train2017.json", content)
    write_set(tmp_path, "val", [50])
    touch(tmp_path / "train2017", [1, 2, 4])  # 3 is missing

    images = load_coco([tmp_path], "train")
    assert ids_of(images) == [1, 2]
    assert images[0].captions[2:] == ("two lines here",)
    assert images[1].captions == ("Caption 0 of 2.", "Caption 1 of 2.", "Same file.")
    kinds = [finding.kind for finding in read_caption_file(path).findings]
    assert sorted(kinds) == sorted(
        [BROKEN_ENTRY] * 5
        + [
            CAPTION_WITHOUT_IMAGE,
            DUPLICATE_FILE,
            DUPLICATE_ID,
            EMPTY_CAPTION,
            IMAGE_WITHOUT_CAPTION,
        ]
    )


def test_ids_may_be_text(tmp_path: Path) -> None:
    content = {
        "images": [{"id": "000042", "file_name": "a.jpg"}, {"id": "kitchen", "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": "000042", "caption": "A."},
            {"image_id": "kitchen", "caption": "B."},
        ],
    }
    path = write_json(tmp_path / "captions_train2017.json", content)
    first, second = read_caption_file(path).images
    assert first.image_id == 42
    assert second.image_id == read_caption_file(path).images[1].image_id > 0
    assert second.captions == ("B.",)


@pytest.mark.parametrize(
    "name",
    ["../secret.jpg", "/secret.jpg", "a/../../secret.jpg", "..\\secret.jpg", "C:\\secret.jpg", ""],
)
def test_names_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    assert not is_inside(name)
    data = tmp_path / "data"
    content = captions_of([1, 2])
    content["images"][0]["file_name"] = name
    write_json(data / "annotations/captions_train2017.json", content)
    touch(data / "train2017", [2])
    touch(tmp_path, [1], lambda i: "secret.jpg")
    assert ids_of(load_coco([data], "train")) == [2]


def test_karpathy_folder_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    content = karpathy([(1, "train", "..")])
    content["images"][0]["filename"] = "secret.jpg"
    write_json(tmp_path / "data/dataset_coco.json", content)
    (tmp_path / "secret.jpg").touch()
    with pytest.raises(DatasetError, match="not one with a caption is on disk"):
        load_coco([tmp_path / "data"], "train")


# Bad input


def test_no_folder_is_given() -> None:
    with pytest.raises(DatasetError, match="No data set is given"):
        load_coco([], "train")


def test_missing_empty_and_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letters.txt").touch()
    write_json(tmp_path / "boxes/annotations/instances_val2017.json", {})
    for name, words in {
        "nowhere": "does not exist",
        "file": "is a file",
        "empty": "is empty",
        "other": "holds no captions",
        "boxes": "instances_val2017.json",
    }.items():
        with pytest.raises(DatasetError, match=words) as caught:
            load_coco([tmp_path / name], "train")
        assert str(tmp_path / name) in caught.value.message
        assert "data/README.md" in str(caught.value)
        assert caught.value.exit_code == 2


def test_no_picture_on_disk_names_the_folders(tmp_path: Path) -> None:
    write_json(tmp_path / "annotations/captions_train2017.json", captions_of([1, 2]))
    write_json(tmp_path / "annotations/captions_val2017.json", captions_of([3]))
    touch(tmp_path / "train2017", [99])
    with pytest.raises(DatasetError, match="3 images") as caught:
        load_coco([tmp_path], "train")
    for folder in ("train2017", "val2017", "images/train2017", "images/train", "images"):
        assert f"{tmp_path / folder}" in caught.value.message


INSTANCE = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [0, 0, 1, 1], "segmentation": []}
IMAGE = {"id": 1, "file_name": "1.jpg"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (json.dumps(captions_of([1])).encode()[:-40], "is not JSON, or was cut off"),
        (b"\xff\xfe\x00 binary", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "a JSON list"),
        (b"{}", "an empty object"),
        (b'"words"', "a JSON str"),
        (b'{"images": [], "annotations": []}', "lists no images"),
        (json.dumps({"images": [IMAGE], "annotations": []}).encode(), "without annotations"),
        (json.dumps({"images": [IMAGE], "annotations": [INSTANCE]}).encode(), "instances"),
        (
            json.dumps(
                {"images": [IMAGE], "annotations": [{**INSTANCE, "keypoints": []}]}
            ).encode(),
            "keypoints",
        ),
        (
            json.dumps({"images": [IMAGE], "annotations": [{"segments_info": []}]}).encode(),
            "panoptic",
        ),
        (json.dumps(karpathy(KARPATHY_ROWS)).encode(), "dataset_coco.json"),
        (b'{"model": 1, "weights": 2}', "the fields model, weights"),
        (b'{"images": 3, "annotations": 4}', "the fields annotations, images"),
        (
            b'{"images": [{"id": 1, "file_name": "a"}],'
            b' "annotations": [{"image_id": 1, "caption": " "}]}',
            "no caption for any",
        ),
    ],
)
def test_bad_caption_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "annotations" / "captions_train2017.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=words) as caught:
        load_coco([tmp_path], "train")
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (captions_of([1]), "not a Karpathy split"),
        ({"images": []}, "lists no images"),
        ({"images": {}}, "not a caption file"),
        ({"images": [{"sentences": []}]}, "no caption for any"),
    ],
)
def test_bad_karpathy_files(tmp_path: Path, content: Any, words: str) -> None:
    write_json(tmp_path / "dataset_coco.json", content)
    with pytest.raises(DatasetError, match=words):
        load_coco([tmp_path], "train")


def test_bad_karpathy_entries_are_found(tmp_path: Path) -> None:
    content = karpathy(KARPATHY_ROWS)
    content["images"] += [
        {**content["images"][0]},
        {**content["images"][0], "cocoid": 9, "split": "holdout"},
        {**content["images"][0], "cocoid": 10, "filename": None},
        {**content["images"][0], "cocoid": 11, "filename": "b.jpg", "sentences": ["words", {}]},
    ]
    findings = read_caption_file(write_json(tmp_path / "dataset_coco.json", content)).findings
    assert [finding.kind for finding in findings] == [
        DUPLICATE_ID,
        BROKEN_ENTRY,
        BROKEN_ENTRY,
        EMPTY_CAPTION,
        EMPTY_CAPTION,
        IMAGE_WITHOUT_CAPTION,
    ]


def test_no_test_split(tmp_path: Path) -> None:
    write_set(tmp_path, "train", [1, 2])
    with pytest.raises(DatasetError, match="no test split"):
        load_coco([tmp_path], "test")
    write_json(tmp_path / "b/dataset_coco.json", karpathy(KARPATHY_ROWS[3:]))
    touch(tmp_path / "b/val2014", [4], "COCO_val2014_{:012d}.jpg".format)
    assert ids_of(load_coco([tmp_path / "b"], "test")) == [4]
    with pytest.raises(DatasetError, match="only a test split"):
        load_coco([tmp_path / "b"], "train")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads anything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write_json(tmp_path / "annotations/captions_train2017.json", captions_of([1]))
    path.chmod(0)
    with pytest.raises(DatasetError, match="cannot be read"):
        load_coco([tmp_path], "train")


# Real data


def test_real_coco(coco_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = load_coco([coco_dir], "train"), load_coco([coco_dir], "val")
    assert (len(train), len(val)) == (6409, 499)
    assert sum(len(image.captions) for image in train) == 32_066
    assert sum(len(image.captions) for image in val) == 2_495
    assert not {image.path for image in train} & {image.path for image in val}
    assert capsys.readouterr().out == ""  # pycocotools would print
    nine = next(image for image in train if image.image_id == 9)
    assert "Closeup of bins of food that include broccoli and bread." in nine.captions
    assert nine.path.is_file()
