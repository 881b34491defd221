"""Which pictures of a folder are given out, and when."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from bitgen.errors import InputError
from bitgen.inference.watch import POLL_SECONDS, RETRY_SECONDS, SETTLE_SECONDS, FolderWatch


class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Folder:
    """A watched folder and its clock."""

    def __init__(self, path: Path, include_existing: bool = False) -> None:
        self.path = path
        self.clock = Clock()
        self.watch = FolderWatch(path, include_existing, self.clock)

    def after(self, seconds: float) -> list[str]:
        """Look once at once and once after so many seconds: what is given out in all."""
        now = self.watch.ready()
        self.clock.seconds += seconds
        return [picture.name for picture in (*now, *self.watch.ready())]

    def write(self, name: str, content: bytes = b"content", moment: float | None = None) -> Path:
        file = self.path / name
        file.write_bytes(content)
        if moment is not None:
            os.utime(file, (moment, moment))
        return file


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "inbox").mkdir()
    return Folder(tmp_path / "inbox")


def test_new_pictures_are_given_out_once_and_oldest_first(folder: Folder) -> None:
    folder.write("b.jpg", moment=10)
    folder.write("c.JPEG", moment=30)
    folder.write("a.png", moment=20)
    assert folder.after(SETTLE_SECONDS / 2) == []
    assert folder.after(SETTLE_SECONDS / 2) == ["b.jpg", "a.png", "c.JPEG"]
    assert folder.after(SETTLE_SECONDS) == []
    assert folder.watch.ready() == []


def test_what_is_there_at_the_start_is_left_out_or_taken(folder: Folder) -> None:
    folder.write("old.jpg")
    assert Folder(folder.path).after(SETTLE_SECONDS) == []
    assert Folder(folder.path).watch.num_existing == 1
    assert Folder(folder.path, include_existing=True).after(SETTLE_SECONDS) == ["old.jpg"]
    # What was left out counts once it is written again.
    watched = Folder(folder.path)
    folder.write("old.jpg", b"new content")
    assert watched.after(SETTLE_SECONDS) == ["old.jpg"]


def test_a_file_that_grows_is_waited_for(folder: Folder) -> None:
    for length in range(1, 6):
        folder.write("slow.jpg", b"x" * length)
        assert folder.after(SETTLE_SECONDS * 0.9) == []
    assert folder.after(SETTLE_SECONDS * 0.2) == ["slow.jpg"]


def test_a_file_of_its_full_size_that_is_still_written_to_is_waited_for(folder: Folder) -> None:
    for moment in (10, 11, 12):
        folder.write("mapped.bmp", b"x" * 9, moment=moment)
        assert folder.after(SETTLE_SECONDS * 0.9) == []
    assert folder.after(SETTLE_SECONDS) == ["mapped.bmp"]


def test_an_empty_file_is_no_picture_yet(folder: Folder) -> None:
    folder.write("later.jpg", b"")
    assert folder.after(60) == []
    folder.write("later.jpg")
    assert folder.after(SETTLE_SECONDS) == ["later.jpg"]


def test_renamed_and_replaced_files_count(folder: Folder, tmp_path: Path) -> None:
    folder.write("upload.jpg.part", moment=10)
    assert folder.after(SETTLE_SECONDS) == []
    (folder.path / "upload.jpg.part").rename(folder.path / "upload.jpg")
    assert folder.after(SETTLE_SECONDS) == ["upload.jpg"]
    other = tmp_path / "other.jpg"
    other.write_bytes(b"another picture")
    other.replace(folder.path / "upload.jpg")
    assert folder.after(SETTLE_SECONDS) == ["upload.jpg"]
    assert folder.after(SETTLE_SECONDS) == []


def test_hidden_files_folders_and_other_files_are_left_out(folder: Folder) -> None:
    folder.write(".photo.jpg.a8Xd2")
    folder.write(".photo.jpg")
    folder.write("notes.txt")
    (folder.path / "folder.jpg").mkdir()
    (folder.path / "nowhere.jpg").symlink_to(folder.path / "missing.jpg")
    assert folder.after(60) == []


def test_what_cannot_be_read_is_tried_again_once_or_when_it_changes(folder: Folder) -> None:
    bad = folder.write("bad.jpg")
    assert folder.after(SETTLE_SECONDS) == ["bad.jpg"]
    assert folder.watch.try_again(bad)
    assert folder.after(RETRY_SECONDS * 0.9) == []
    assert folder.after(RETRY_SECONDS * 0.2) == ["bad.jpg"]
    assert not folder.watch.try_again(bad)
    assert folder.after(60) == []
    folder.write("bad.jpg", b"the rest of it")
    assert folder.after(SETTLE_SECONDS) == ["bad.jpg"]
    assert folder.watch.try_again(bad)
    bad.unlink()
    assert folder.after(60) == []
    assert folder.watch.try_again(bad)


def test_a_folder_that_is_gone_for_a_while(folder: Folder, tmp_path: Path) -> None:
    folder.write("a.jpg")
    assert folder.after(SETTLE_SECONDS) == ["a.jpg"]
    away = tmp_path / "away"
    folder.path.rename(away)
    assert folder.after(SETTLE_SECONDS) == []
    assert isinstance(folder.watch.error, FileNotFoundError)
    shutil.copy(away / "a.jpg", away / "b.jpg")
    away.rename(folder.path)
    assert folder.after(SETTLE_SECONDS) == ["b.jpg"]
    assert folder.watch.error is None


def test_only_a_folder_can_be_watched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for name in ("missing", "file"):
        with pytest.raises(InputError, match="no folder"):
            FolderWatch(tmp_path / name)


def test_a_folder_that_takes_long_to_look_at_is_looked_at_less_often(folder: Folder) -> None:
    assert folder.watch.wait_seconds == POLL_SECONDS
    folder.watch._seconds = 0.1
    assert folder.watch.wait_seconds == pytest.approx(1.0)
    folder.watch._seconds = 60.0
    assert folder.watch.wait_seconds < 5
