"""Validate a data set, and say what is wrong with which file."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bitgen.dataset.coco import (
    BROKEN_ENTRY,
    DUPLICATE_FILE,
    DUPLICATE_ID,
    IMAGE_WITHOUT_CAPTION,
    CaptionFile,
    Collection,
    ImageFinder,
    find_collections,
    is_inside,
    read_caption_file,
)
from bitgen.dataset.images import IMAGE_SUFFIXES, available_cpus, load_image
from bitgen.errors import DatasetError, ImageError

# Kinds of problems, besides those of `bitgen.dataset.coco`.
NOT_CAPTIONS = "not captions"
MISSING_IMAGE = "missing image"
DAMAGED_IMAGE = "damaged image"
DUPLICATE_CONTENT = "duplicate content"

# Decoding reads a JPEG to its end whatever the size asked for; a small one is the fastest.
_CHECK_SIZE = 32


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file. `kind` is a constant of this module or of `coco`."""

    file: Path
    kind: str
    detail: str


@dataclass(frozen=True)
class DatasetReport:
    """What a data set holds, and what is wrong with it."""

    caption_files: int
    images: int
    """Images that the caption files list."""
    images_on_disk: int
    """Files found for them, each counted once."""
    captions: int
    problems: tuple[Problem, ...]

    @property
    def is_sound(self) -> bool:
        return not self.problems


def check_dataset(
    directory: Path, on_progress: Callable[[int, int], None] | None = None
) -> DatasetReport:
    """Read every caption file of a folder and decode every picture.

    Finds caption files that are broken or of another kind; empty captions; captions without image;
    images without caption, listed or only on disk; missing and damaged images; ids and files listed
    twice; pictures with the same content under two names. `on_progress(done, total)` counts the
    pictures. Raises DatasetError if the folder is missing or holds no caption file at all.
    """
    problems: list[Problem] = []
    caption_files: dict[Path, CaptionFile] = {}
    paths_of: dict[str, list[Path]] = {}  # collection -> pictures found
    folders: set[Path] = set()
    num_files = 0
    for collection in find_collections(directory):
        num_files += len(collection.files)
        read = _read_collection(collection, problems)
        finder = ImageFinder(directory, collection.name)
        paths_of[collection.name] = _find_images(read, finder, problems)
        caption_files.update(read)
        for caption_file in read.values():
            for folder in {image.folder for image in caption_file.images}:
                # Other pictures in the data set's own folder, the last, may be anyone's.
                folders.update(finder.folders(folder)[:-1])
    found = sorted({path for paths in paths_of.values() for path in paths})
    if len(caption_files) == num_files:  # else there is no telling which pictures lack a caption
        problems.extend(_unlisted(folders, set(found)))
    problems.extend(_check_images(found, paths_of.values(), on_progress))
    images = [image for caption_file in caption_files.values() for image in caption_file.images]
    return DatasetReport(
        caption_files=num_files,
        images=len(images),
        images_on_disk=len(found),
        captions=sum(len(image.captions) for image in images),
        problems=tuple(problems),
    )


def _read_collection(collection: Collection, problems: list[Problem]) -> dict[Path, CaptionFile]:
    read: dict[Path, CaptionFile] = {}
    first_file: dict[int, Path] = {}
    for file in collection.files:
        try:
            read[file] = read_caption_file(file)
        except DatasetError as error:
            problems.append(Problem(file, NOT_CAPTIONS, error.message))
            continue
        problems.extend(Problem(file, f.kind, f.detail) for f in read[file].findings)
        for image in read[file].images:
            other = first_file.setdefault(image.image_id, file)
            if other != file:
                detail = f"image id {image.image_id} ({image.file_name}) is also in {other.name}"
                problems.append(Problem(file, DUPLICATE_ID, detail))
    return read


def _find_images(
    read: dict[Path, CaptionFile], finder: ImageFinder, problems: list[Problem]
) -> list[Path]:
    """Paths of the listed pictures, each once."""
    listed_in: dict[Path, Path] = {}
    for file, caption_file in read.items():
        missing = []
        for image in caption_file.images:
            path = finder.find(image)
            if not is_inside(image.file_name):
                detail = f"file_name {image.file_name!r} leads out of the data set: not followed"
                problems.append(Problem(file, BROKEN_ENTRY, detail))
            elif path is None:
                missing.append(image)
            elif path in listed_in:
                detail = f"{image.file_name} is also listed in {listed_in[path].name}"
                problems.append(Problem(file, DUPLICATE_FILE, detail))
            else:
                listed_in[path] = file
        if missing and len(missing) == len(caption_file.images):
            folders = sorted({image.folder for image in missing})
            places = ", ".join(str(p) for folder in folders for p in finder.folders(folder))
            detail = f"none of the {len(missing):,} images is on disk; looked in {places}"
            problems.append(Problem(file, MISSING_IMAGE, detail))
        else:
            for image in missing:
                path = finder.folders(image.folder)[0] / image.file_name
                detail = f"listed in {file.name} with id {image.image_id}"
                problems.append(Problem(path, MISSING_IMAGE, detail))
    return list(listed_in)


def _unlisted(folders: Iterable[Path], listed: set[Path]) -> list[Problem]:
    return [
        Problem(path, IMAGE_WITHOUT_CAPTION, "no caption file lists it")
        for folder in sorted(folders)
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES and path not in listed
    ]


def _check_images(
    paths: list[Path],
    collections: Iterable[list[Path]],
    on_progress: Callable[[int, int], None] | None,
) -> list[Problem]:
    """Decode every picture; compare the content of those of equal length."""
    lengths = {path: _length(path) for path in paths}
    same_length: defaultdict[int, list[Path]] = defaultdict(list)
    for path, length in lengths.items():
        same_length[length].append(path)

    def check(path: Path) -> tuple[str | None, bytes | None]:
        try:
            load_image(path, _CHECK_SIZE, "crop")
        except ImageError as error:
            return error.message.removeprefix(f"{path}: "), None
        return None, _digest(path) if len(same_length[lengths[path]]) > 1 else None

    problems: list[Problem] = []
    digests: dict[Path, bytes] = {}
    executor = ThreadPoolExecutor(available_cpus(), "check")
    try:
        for done, (path, (reason, digest)) in enumerate(
            zip(paths, executor.map(check, paths), strict=True), start=1
        ):
            if reason is not None:
                problems.append(Problem(path, DAMAGED_IMAGE, reason))
            elif digest is not None:
                digests[path] = digest
            if on_progress is not None:
                on_progress(done, len(paths))
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    # Within one collection only: those of 2014 and 2017 are the same photographs.
    same: dict[Path, Path] = {}
    for collection in collections:
        first_with: dict[bytes, Path] = {}
        for path in sorted(p for p in collection if p in digests):
            first = first_with.setdefault(digests[path], path)
            if first != path:
                same.setdefault(path, first)
    problems.extend(
        Problem(path, DUPLICATE_CONTENT, f"the same picture as {first}")
        for path, first in sorted(same.items())
    )
    return problems


def _length(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link that leads nowhere: decoding it says so
        return -1


def _digest(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
