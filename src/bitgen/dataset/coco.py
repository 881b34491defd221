"""Captions and where their pictures lie: COCO as it is published, and the Karpathy split.

A folder may hold several collections of the same photographs (the Karpathy split, 2017, 2014).
One of them is read: the first, in this order, with a picture on disk. Reading two would bring the
pictures of one's validation into the other's training.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pycocotools.coco import COCO

from bitgen.dataset.tokenizer import tidy_sentence
from bitgen.errors import DatasetError

Split = Literal["train", "val", "test"]

YEARS = (2017, 2014)
KARPATHY_FILE = "dataset_coco.json"
ANNOTATIONS_FOLDER = "annotations"

VAL_SHARE = 0.05
"""Share of the images that becomes the validation set where a folder has only one split."""

# Kinds of what can be wrong with one entry of a caption file.
DUPLICATE_ID = "duplicate id"
DUPLICATE_FILE = "duplicate file"
EMPTY_CAPTION = "empty caption"
CAPTION_WITHOUT_IMAGE = "caption without image"
IMAGE_WITHOUT_CAPTION = "image without caption"
BROKEN_ENTRY = "broken entry"

_KARPATHY_SPLITS: dict[str, Split] = {
    "train": "train",
    "restval": "train",  # the part of val2014 that Karpathy and Fei-Fei train on
    "val": "val",
    "test": "test",
}


@dataclass(frozen=True)
class CaptionedImage:
    """A picture that is on disk, and all that people wrote about it."""

    path: Path
    image_id: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class ListedImage:
    """A picture as a caption file lists it, on disk or not."""

    file_name: str
    image_id: int
    captions: tuple[str, ...]
    split: Split
    folder: str
    """Folder that COCO publishes the picture in, such as "train2017"."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with one entry of a caption file. `kind` is one of this module's."""

    kind: str
    detail: str


@dataclass(frozen=True)
class CaptionFile:
    """What one caption file lists, each image once, and what is wrong with its entries."""

    images: tuple[ListedImage, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Collection:
    """Caption files that belong together. `name` is "2017", "2014" or "Karpathy"."""

    name: str
    files: tuple[Path, ...]


def load_coco(
    directories: Sequence[Path], split: Split, needs_pictures: bool = True
) -> list[CaptionedImage]:
    """Read every captioned picture of one split from one or more folders, joined.

    Layouts: `annotations/captions_{train,val}{2014,2017}.json`, or the Karpathy split
    `dataset_coco.json` (its "restval" is trained on; only it has a "test" split), either in the
    folder itself or in `annotations/`; pictures in `{split}{year}/`, `images/{split}{year}/`,
    `images/{split}/`, `images/` or the folder itself.

    Pictures that are listed but not on disk, and those without a caption, are left out
    (`check_dataset` names them); unless `needs_pictures` is False, which keeps the former, with the
    path where they would be, and divides no split that is there. Where a folder has pictures of
    only one of train and val, they are
    divided by a hash of the image id: 5% are validated on, and at least one each if there are two.

    Raises DatasetError for a folder that is missing, empty or without captions, for a caption file
    that is broken, empty or of another kind, and where not one of the listed pictures is on disk.
    """
    if not directories:
        raise DatasetError(
            "No data set is given.", remedy="Name a folder in COCO layout: --coco_data DIR."
        )
    images: dict[Path, CaptionedImage] = {}
    for directory in {Path(d).resolve(): Path(d) for d in directories}.values():
        for image in _load_directory(directory, split, needs_pictures):
            images.setdefault(image.path, image)
    return list(images.values())


def find_collections(directory: Path) -> list[Collection]:
    """Find the caption files of a folder. Raises DatasetError if it has none."""
    if not directory.exists():
        raise DatasetError(f"{directory} does not exist.", remedy=_DATA_REMEDY)
    if not directory.is_dir():
        raise DatasetError(
            f"{directory} is a file; a folder in COCO layout is expected.", remedy=_DATA_REMEDY
        )
    names = {"Karpathy": [KARPATHY_FILE]}
    for year in YEARS:
        names[str(year)] = [f"captions_{split}{year}.json" for split in ("train", "val")]
    collections = []
    for name, file_names in names.items():
        found = [_first_file(directory, file_name) for file_name in file_names]
        files = tuple(file for file in found if file is not None)
        if files:
            collections.append(Collection(name, files))
    if not collections:
        raise DatasetError(_nothing_found(directory), remedy=_DATA_REMEDY)
    return collections


def read_caption_file(path: Path) -> CaptionFile:
    """Read `captions_{split}{year}.json` or `dataset_coco.json`.

    Captions are stripped, and runs of white space in them become one space. Images with one file
    name are merged. Raises DatasetError if the file is broken, empty, or of another kind.
    """
    content = _read_json(path)
    if path.name == KARPATHY_FILE:
        return _read_karpathy(path, content)
    stem = path.stem.removeprefix("captions_")
    split: Split = "val" if stem.startswith("val") else "train"
    return _read_captions(path, content, split, folder=stem)


class ImageFinder:
    """Finds listed pictures under a folder, in all the places where people put them.

    Each folder is listed once: asking the disk for each of 118,000 pictures takes much longer.
    """

    def __init__(self, directory: Path, collection: str) -> None:
        self._directory = directory
        self._is_karpathy = collection == "Karpathy"
        self._folders: dict[str, list[Path]] = {}
        self._names: dict[Path, frozenset[str]] = {}

    def find(self, image: ListedImage) -> Path | None:
        """Path of the picture, or None if it is not on disk (or leads out of the folder)."""
        if not is_inside(image.file_name) or (image.folder and not is_inside(image.folder)):
            return None
        for folder in self.folders(image.folder):
            if "/" not in image.file_name:
                if image.file_name in self._list(folder):
                    return folder / image.file_name
            elif (folder / image.file_name).is_file():
                return folder / image.file_name
        if self._is_karpathy:
            # The split names the files of 2014; those of 2017 are the same under another name.
            name = f"{image.image_id:012d}.jpg"
            for folder_name in ("train2017", "val2017"):
                for folder in self.folders(folder_name):
                    if name in self._list(folder):
                        return folder / name
        return None

    def folders(self, folder: str) -> list[Path]:
        """Folders in which pictures of, say, "train2017" are looked for, in order."""
        if folder not in self._folders:
            images = self._directory / "images"
            self._folders[folder] = [
                self._directory / folder,
                images / folder,
                images / folder.rstrip("0123456789"),
                images,
                self._directory,
            ]
        return self._folders[folder]

    def _list(self, folder: Path) -> frozenset[str]:
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except OSError:  # not there, or not a folder
                self._names[folder] = frozenset()
        return self._names[folder]


def is_inside(name: str) -> bool:
    """Whether a relative name, as a file of unknown origin gives it, stays within its folder."""
    parts = name.replace("\\", "/").split("/")
    return bool(name) and ".." not in parts and parts[0] != "" and ":" not in parts[0]


_DATA_REMEDY = (
    "data/README.md shows the layouts that are read;"
    " `bitgen data download coco --output DIR` fetches COCO."
)


def _load_directory(directory: Path, split: Split, needs_pictures: bool) -> list[CaptionedImage]:
    num_listed = 0
    looked_in: list[Path] = []
    collections = find_collections(directory)
    if not needs_pictures:
        collections = [_with_pictures(directory, collections) or collections[0]]
    for collection in collections:
        finder = ImageFinder(directory, collection.name)
        by_split: dict[str, list[CaptionedImage]] = {"train": [], "val": [], "test": []}
        for file in collection.files:
            listed = read_caption_file(file).images
            num_listed += len(listed)
            for image in listed:
                path = finder.find(image) if image.captions else None
                if path is None and image.captions and not needs_pictures:
                    path = finder.folders(image.folder)[0] / Path(image.file_name).name
                if path is not None:
                    found = CaptionedImage(path, image.image_id, image.captions)
                    by_split[image.split].append(found)
            for folder in sorted({image.folder for image in listed}):
                looked_in.extend(finder.folders(folder))
        if by_split[split] and not needs_pictures:
            return by_split[split]
        if any(by_split.values()):
            return _choose_split(directory, collection, by_split, split)
    folders = ", ".join(str(folder) for folder in dict.fromkeys(looked_in))
    raise DatasetError(
        f"{directory} lists {num_listed:,} images, but not one with a caption is on disk. Looked"
        f" in: {folders}.",
        remedy=_DATA_REMEDY,
    )


def _with_pictures(directory: Path, collections: Sequence[Collection]) -> Collection | None:
    """The first collection with a captioned picture on disk, the one that is trained on."""
    for collection in collections:
        finder = ImageFinder(directory, collection.name)
        listed = (image for file in collection.files for image in read_caption_file(file).images)
        if any(image.captions and finder.find(image) for image in listed):
            return collection
    return None


def _choose_split(
    directory: Path, collection: Collection, by_split: dict[str, list[CaptionedImage]], split: Split
) -> list[CaptionedImage]:
    if split == "test" or (by_split["train"] and by_split["val"]):
        if not by_split[split]:
            raise DatasetError(
                f"{directory} has no {split} split ({collection.name} captions).",
                remedy=f"Only {KARPATHY_FILE} has one, and its pictures must be on disk.",
            )
        return by_split[split]
    train, val = _divide(by_split["train"] or by_split["val"])
    if not train:
        raise DatasetError(
            f"{directory} has only a test split, and no images to train or validate on.",
            remedy=_DATA_REMEDY,
        )
    return train if split == "train" else val


def _divide(
    images: Iterable[CaptionedImage],
) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Divide into train and val by image id, in the given order."""
    images = list(images)
    shares = {image.image_id: _share_of(image.image_id) for image in images}
    if len(shares) < 2:
        return images, []
    limit = max(VAL_SHARE, min(shares.values()))  # the smallest is validated on,
    limit = min(limit, sorted(shares.values())[-2])  # and the largest is trained on
    return (
        [image for image in images if shares[image.image_id] > limit],
        [image for image in images if shares[image.image_id] <= limit],
    )


def _share_of(image_id: int) -> float:
    """A number in [0, 1), evenly spread over the ids and the same on every machine."""
    digest = hashlib.blake2b(str(image_id).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _first_file(directory: Path, name: str) -> Path | None:
    for path in (directory / ANNOTATIONS_FOLDER / name, directory / name):
        if path.is_file():
            return path
    return None


def _nothing_found(directory: Path) -> str:
    if not any(directory.iterdir()):
        return f"{directory} is empty."
    wanted = (
        f"{ANNOTATIONS_FOLDER}/captions_{{train,val}}{{2014,2017}}.json, or {KARPATHY_FILE}, is"
        " expected"
    )
    others = sorted((directory / ANNOTATIONS_FOLDER).glob("*.json"))
    if others:
        names = ", ".join(other.name for other in others[:5])
        return f"{directory} holds no captions: {wanted}; {ANNOTATIONS_FOLDER}/ has {names}."
    return f"{directory} holds no captions: {wanted}."


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DatasetError saying where the file is broken."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}).") from error
    remedy = "Copy or download the file again."
    if not text.strip():
        raise DatasetError(f"{path} is empty; captions in JSON are expected.", remedy=remedy)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"{path} is not JSON, or was cut off ({str(error).rstrip('.')}).", remedy=remedy
        ) from error
    if not isinstance(content, dict):
        raise _not_captions(path, f"a JSON {type(content).__name__}")
    return content


def _not_captions(path: Path, received: str) -> DatasetError:
    return DatasetError(
        f"{path} is not a caption file: it holds {received}.",
        remedy='A caption file has "images" (id, file_name) and "annotations" (image_id, caption).',
    )


def _read_captions(path: Path, content: dict[str, Any], split: Split, folder: str) -> CaptionFile:
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise _not_captions(path, _describe(content))
    if not images:
        raise DatasetError(f"{path} is empty: it lists no images.")
    if not any(isinstance(a, dict) and isinstance(a.get("caption"), str) for a in annotations):
        raise _not_captions(path, _describe(content))

    findings: list[Finding] = []
    whole_images: dict[int | str, dict[str, Any]] = {}
    for position, image in enumerate(images):
        if not _is_whole(image, ("id", "file_name")) or not isinstance(image["file_name"], str):
            findings.append(Finding(BROKEN_ENTRY, f"image {position} has no id or no file_name"))
        elif image["id"] in whole_images:
            detail = f"image id {image['id']} is listed again, as {image['file_name']}"
            findings.append(Finding(DUPLICATE_ID, detail))
        else:
            whole_images[image["id"]] = image
    whole_annotations: list[dict[str, Any]] = []
    for position, annotation in enumerate(annotations):
        if not _is_whole(annotation, ("image_id", "caption")):
            detail = f"annotation {position} has no image_id or no caption"
            findings.append(Finding(BROKEN_ENTRY, detail))
        elif annotation["image_id"] not in whole_images:
            detail = f"image id {annotation['image_id']} is not listed: {annotation['caption']!r}"
            findings.append(Finding(CAPTION_WITHOUT_IMAGE, detail))
        else:
            annotation.setdefault("id", -1 - position)
            whole_annotations.append(annotation)

    coco = COCO()
    coco.dataset = {"images": list(whole_images.values()), "annotations": whole_annotations}
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress with print
        coco.createIndex()
    listed = (
        ListedImage(
            file_name=image["file_name"],
            image_id=_to_int(image_id),
            captions=tuple(
                _clean((a["caption"] for a in coco.imgToAnns.get(image_id, ())), image_id, findings)
            ),
            split=split,
            folder=folder,
        )
        for image_id, image in coco.imgs.items()
    )
    return _merge_files(path, listed, findings)


def _read_karpathy(path: Path, content: dict[str, Any]) -> CaptionFile:
    images = content.get("images")
    if not isinstance(images, list):
        raise _not_captions(path, _describe(content))
    if not images:
        raise DatasetError(f"{path} is empty: it lists no images.")
    if not any(isinstance(image, dict) and "sentences" in image for image in images):
        raise DatasetError(
            f"{path} is not a Karpathy split: it holds {_describe(content)}.",
            remedy='Its "images" have filepath, filename, split and sentences (raw).',
        )
    findings: list[Finding] = []
    listed: dict[int, ListedImage] = {}
    for position, image in enumerate(images):
        if not (
            _is_whole(image, ("filename", "split", "sentences"))
            and isinstance(image["filename"], str)
            and isinstance(image["sentences"], list)
            and image["split"] in _KARPATHY_SPLITS
        ):
            detail = f"image {position} lacks filename, split (train, restval, val, test) or raw"
            findings.append(Finding(BROKEN_ENTRY, detail))
            continue
        image_id = _to_int(image.get("cocoid", image.get("imgid", position)))
        if image_id in listed:
            detail = f"image id {image_id} is listed again, as {image['filename']}"
            findings.append(Finding(DUPLICATE_ID, detail))
            continue
        raw = [s.get("raw") if isinstance(s, dict) else None for s in image["sentences"]]
        listed[image_id] = ListedImage(
            file_name=image["filename"],
            image_id=image_id,
            captions=tuple(_clean(raw, image_id, findings)),
            split=_KARPATHY_SPLITS[image["split"]],
            folder=str(image.get("filepath", "")),
        )
    return _merge_files(path, listed.values(), findings)


def _merge_files(path: Path, images: Iterable[ListedImage], findings: list[Finding]) -> CaptionFile:
    """Make each file one entry, and note what has no caption."""
    merged: dict[tuple[str, str], ListedImage] = {}
    for image in images:
        key = image.folder, image.file_name
        first = merged.get(key)
        if first is None:
            merged[key] = image
            continue
        detail = f"{image.file_name} is listed with id {first.image_id} and id {image.image_id}"
        findings.append(Finding(DUPLICATE_FILE, detail))
        merged[key] = ListedImage(
            first.file_name,
            first.image_id,
            (*first.captions, *image.captions),
            first.split,
            first.folder,
        )
    if not any(image.captions for image in merged.values()):
        raise DatasetError(
            f"{path} has no caption for any of its {len(merged):,} images.",
            remedy="Run `bitgen data check` on the folder to see what is wrong with each.",
        )
    for image in merged.values():
        if not image.captions:
            detail = f"{image.file_name} (id {image.image_id})"
            findings.append(Finding(IMAGE_WITHOUT_CAPTION, detail))
    return CaptionFile(tuple(merged.values()), tuple(findings))


def _clean(
    captions: Iterable[object], image_id: int | str, findings: list[Finding]
) -> Iterator[str]:
    for caption in captions:
        text = tidy_sentence(caption) if isinstance(caption, str) else ""
        if text:
            yield text
        else:
            findings.append(Finding(EMPTY_CAPTION, f"image id {image_id}"))


def _is_whole(entry: object, fields: tuple[str, ...]) -> bool:
    """Whether an entry has its fields, and an id that can be looked up."""
    if not isinstance(entry, dict) or any(field not in entry for field in fields):
        return False
    return all(isinstance(entry.get(field, 0), int | str) for field in ("id", "image_id"))


def _to_int(image_id: object) -> int:
    """Image id as an integer: data sets in COCO's format also use text."""
    if isinstance(image_id, int):
        return image_id
    text = str(image_id)
    if text.isascii() and text.isdigit():
        return int(text)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _describe(content: dict[str, Any]) -> str:
    """Say in words what a JSON file of another kind is."""
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    fields = set(first) if isinstance(first, dict) else set()
    if "segments_info" in fields:
        return "panoptic segments, not captions"
    if "keypoints" in fields:
        return "keypoints of persons, not captions"
    if fields & {"bbox", "segmentation", "category_id"}:
        return "instances (boxes and outlines of objects), not captions"
    images = content.get("images")
    if isinstance(images, list) and images and isinstance(images[0], dict):
        if "sentences" in images[0]:
            return f"a Karpathy split, which is read from {KARPATHY_FILE}"
        if not annotations:
            return "images without annotations"
    return (
        f"the fields {', '.join(sorted(map(str, content))[:6])}" if content else "an empty object"
    )
