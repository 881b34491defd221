"""`bitgen infer --watch` as a process of its own, with pictures that arrive while it runs."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from PIL import Image

from bitgen.cli.models import DEFAULT_CONSENSUS
from bitgen.inference.predictor import BitGen

TASK = "Bring back the red ball."
PATIENCE = 60.0

posix_only = pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
pytestmark = posix_only


class Watching:
    """A running `bitgen infer --watch`; lines are read as they come."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "bitgen", "infer", "--watch", str(folder)),
                *map(str, arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._out = self._lines_of(self.process.stdout)
        self._err = self._lines_of(self.process.stderr)

    @staticmethod
    def _lines_of(stream: IO[str] | None) -> queue.Queue[str]:
        assert stream is not None
        lines: queue.Queue[str] = queue.Queue()

        def read() -> None:
            for line in stream:
                lines.put(line.rstrip("\n"))

        threading.Thread(target=read, daemon=True).start()
        return lines

    def answer(self) -> dict[str, Any]:
        """The next line of stdout, as JSON."""
        answer: dict[str, Any] = json.loads(self._out.get(timeout=PATIENCE))
        return answer

    def says(self, words: str) -> str:
        """Wait for a line of stderr that holds the words, and return it."""
        while words not in (line := self._err.get(timeout=PATIENCE)):
            pass
        return line

    def is_silent(self, seconds: float) -> bool:
        try:
            self._out.get(timeout=seconds)
        except queue.Empty:
            return True
        return False

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=PATIENCE)


@pytest.fixture
def watch(exported: Path, tmp_path: Path) -> Iterator[Callable[..., Watching]]:
    """Starts `infer --watch` on the folder `inbox` and waits until it watches."""
    (tmp_path / "inbox").mkdir()
    started: list[Watching] = []

    def start(*arguments: object) -> Watching:
        watching = Watching(tmp_path / "inbox", "--model", exported, "--max_tokens", 5, *arguments)
        started.append(watching)
        watching.says("Watching")
        return watching

    yield start
    for watching in started:
        watching.process.kill()
        watching.process.wait()
        for stream in (watching.process.stdout, watching.process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def pictures(scenes: Path) -> list[Path]:
    return sorted((scenes / "val2017").iterdir())


def test_pictures_are_answered_as_they_arrive(
    watch: Callable[..., Watching], exported: Path, tmp_path: Path, pictures: list[Path]
) -> None:
    """Copied, renamed, written slowly, replaced: each once, with what `BitGen` says of it."""
    inbox = tmp_path / "inbox"
    shutil.copy(pictures[0], inbox / "old.png")
    watching = watch("--json", "--task", TASK)
    assert "1 is there already" in watching.says("--include_existing")

    def expect(name: str, source: Path) -> None:
        answer = watching.answer()
        assert answer["image"] == str(inbox / name)
        caption = model.caption(source, max_tokens=5, consensus=DEFAULT_CONSENSUS)[0]
        assert (answer["caption"], answer["tokens"]) == (caption.text, caption.tokens)
        robots = model.select_robots(TASK, source)
        assert [robot["name"] for robot in answer["robots"]] == [robot.name for robot in robots]

    model = BitGen.load(exported)
    shutil.copy(pictures[1], inbox / "copied.png")
    expect("copied.png", pictures[1])
    shutil.copy(pictures[2], tmp_path / "elsewhere.png")
    (tmp_path / "elsewhere.png").rename(inbox / "renamed.png")
    expect("renamed.png", pictures[2])

    # Pieces that come more often than a file settles: no half picture is read.
    large = tmp_path / "large.png"
    with Image.open(pictures[3]) as image:
        image.resize((300, 300)).save(large)
    content = large.read_bytes()
    with (inbox / "slow.png").open("wb") as file:
        for start in range(0, len(content), len(content) // 4):
            file.write(content[start : start + len(content) // 4])
            file.flush()
            time.sleep(0.3)
    expect("slow.png", large)

    shutil.copy(pictures[4], tmp_path / "next.png")
    (tmp_path / "next.png").replace(inbox / "copied.png")
    expect("copied.png", pictures[4])
    assert watching.is_silent(1.0)
    assert watching.stop() == 0
    assert watching.says("Stopped") == "Stopped: 4 pictures answered, 0 could not be read."


def test_what_cannot_be_read_is_told_and_the_watch_goes_on(
    watch: Callable[..., Watching], tmp_path: Path, pictures: list[Path]
) -> None:
    inbox = tmp_path / "inbox"
    shutil.copy(pictures[0], inbox / "old.png")
    watching = watch("--json", "--include_existing")
    assert watching.answer()["image"] == str(inbox / "old.png")
    (inbox / "bad.jpg").write_text("no picture")
    (inbox / "half.png").write_bytes(pictures[1].read_bytes()[:-40])
    shutil.copy(pictures[2], inbox / "good.png")
    assert watching.answer()["image"] == str(inbox / "good.png")
    # A writer that had paused goes on before the second try: no error is told.
    (inbox / "half.png").write_bytes(pictures[1].read_bytes())
    assert watching.answer()["image"] == str(inbox / "half.png")
    assert "bad.jpg" in watching.says("error")
    assert watching.stop(signal.SIGTERM) == 0
    assert watching.says("Stopped") == "Stopped: 3 pictures answered, 1 could not be read."


def test_a_folder_that_goes_and_comes_back(
    watch: Callable[..., Watching], tmp_path: Path, pictures: list[Path]
) -> None:
    watching = watch()
    (tmp_path / "inbox").rmdir()
    watching.says("cannot be read")
    (tmp_path / "inbox").mkdir()
    watching.says("is back")
    shutil.copy(pictures[0], tmp_path / "inbox" / "a.png")
    assert watching._out.get(timeout=PATIENCE) == str(tmp_path / "inbox" / "a.png")
    assert watching.stop() == 0


@pytest.mark.slow
def test_heat_maps_are_drawn_as_pictures_arrive(
    watch: Callable[..., Watching], tmp_path: Path, pictures: list[Path]
) -> None:
    """Also into the watched folder itself, whose subfolders are not watched."""
    inbox = tmp_path / "inbox"
    watching = watch("--json", "--heatmap", inbox)
    for number in (1, 2):
        shutil.copy(pictures[number], inbox / "latest.png")
        assert watching.answer()["image"] == str(inbox / "latest.png")
    assert watching.is_silent(1.5)
    assert watching.stop() == 0
    assert list((inbox / "latest").glob("*.png"))
    assert list((inbox / "latest_2").glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--watch", "missing"], "no folder missing"),
        (["photo.png", "--watch", "."], "pictures are named too"),
        (["photo.png", "--include_existing"], "goes with --watch"),
        (["--watch", ".", "--max_tokens", "100000"], "max_tokens"),
    ],
)
def test_what_cannot_be_watched(
    run, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments, words
) -> None:
    monkeypatch.chdir(tmp_path)
    finished = run("infer", *arguments, "--model", exported)
    assert finished.code == 2
    assert words in finished.stderr
    assert finished.stdout == ""
