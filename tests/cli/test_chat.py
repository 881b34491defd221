"""`bitgen chat`: lines from a pipe in this process, and a person at a terminal in another."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bitgen.cli.app import main
from bitgen.cli.chat import COMMANDS
from bitgen.cli.models import DEFAULT_CONSENSUS
from bitgen.cli.prompt import completed
from bitgen.dataset.robots import Robot, catalog_to_json, load_catalog
from bitgen.inference.predictor import BitGen

TASK = "Bring back the red ball."
PATIENCE = 240

Chat = Callable[..., Any]


@pytest.fixture
def chat(
    run, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs `bitgen chat` in an empty folder with lines from a pipe."""
    monkeypatch.setenv("BITGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def chat(*lines: str, arguments: tuple[object, ...] = (), model: Path = exported) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        return run("chat", *arguments, "--model", model, "--max_tokens", 5)

    return chat


@pytest.fixture(scope="session")
def pictures(scenes: Path) -> list[Path]:
    return sorted((scenes / "val2017").iterdir())


def test_each_line_of_a_pipe_is_one_object(
    chat: Chat, exported: Path, pictures: list[Path]
) -> None:
    lines = [f"/image {pictures[0]}", "a red ...", TASK, "/task", "", f"/image {pictures[1]}"]
    finished = chat(
        *lines, "/caption", "/robots", "/history", "/reset", TASK, arguments=("--json",)
    )
    assert (finished.code, finished.stderr) == (2, "")  # of "/task" without words
    answers = finished.json_lines()
    assert [answer["input"] for answer in answers] == [
        lines[0], "a red ...", TASK, "/task", lines[5], "/caption", "/robots", "/history",
        "/reset", TASK,
    ]  # fmt: skip
    first, beginning, ranked, wrong, second, again, robots, history, _, alone = answers

    model = BitGen.load(exported)
    shown = [
        model.caption(picture, max_tokens=5, consensus=DEFAULT_CONSENSUS)[0]
        for picture in pictures[:2]
    ]
    assert (first["image"], first["caption"]) == (str(pictures[0]), shown[0].text)
    assert first["tokens"] == shown[0].tokens
    assert first["log_probability"] == pytest.approx(shown[0].log_probability)
    assert "robots" not in first
    assert (
        beginning["caption"]
        == model.caption(pictures[0], "a red", consensus=DEFAULT_CONSENSUS, max_tokens=5)[0].text
    )
    assert ranked["image"] == str(pictures[0])
    assert ranked["caption"] is None
    names = [robot.name for robot in model.select_robots(TASK, pictures[0])]
    assert [robot["name"] for robot in ranked["robots"]] == names
    assert wrong["error"] == "The task is empty."
    assert (second["image"], second["caption"]) == (str(pictures[1]), shown[1].text)
    assert again["caption"] == shown[1].text
    assert [robot["name"] for robot in robots["catalog"]] == [r.name for r in load_catalog()]
    assert history["history"] == [*lines[:4], lines[5], "/caption", "/robots", "/history"]
    assert alone["image"] is None
    assert [robot["name"] for robot in alone["robots"]] == [
        robot.name for robot in model.select_robots(TASK)
    ]


def test_a_person_reads_plain_lines(chat: Chat, exported: Path, pictures: list[Path]) -> None:
    finished = chat("...", TASK, "/image", "/quit", "never", arguments=(pictures[0],))
    assert finished.code == 0
    (caption,) = BitGen.load(exported).caption(
        pictures[0], max_tokens=5, consensus=DEFAULT_CONSENSUS
    )
    picture, shown, again, *ranked, still_open = finished.stdout.splitlines()
    assert (picture, shown, again) == (str(pictures[0]), f"  {caption.text}", f"  {caption.text}")
    assert still_open == str(pictures[0])
    assert len(ranked) == len(load_catalog())
    assert all(re.search(r"\d\.\d%  ", line) for line in ranked)
    assert finished.stderr == ""


def test_what_cannot_be_answered_does_not_end_the_loop(chat: Chat, pictures: list[Path]) -> None:
    Path("bad.jpg").write_text("no picture")
    Path("bad.json").write_text("no catalog")
    finished = chat(
        *("/image missing.jpg", "bad.jpg", "a caption...", "/robots bad.json", "/unknown", "/task"),
        *("~nobody/else and a task", f"/image {pictures[0]}", "/image", "\0"),
    )
    assert finished.code == 2
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 6
    for error, words in zip(
        errors,
        ["missing.jpg", "bad.jpg", "No picture is open", "bad.json", "/unknown", "The task is"],
        strict=True,
    ):
        assert words in error
    assert finished.stdout.splitlines().count(str(pictures[0])) == 2


def test_other_robots_and_back(chat: Chat) -> None:
    crane = Robot("Crane", ("lifts",), ("stands still",), ("harbours",))
    Path("my robots.json").write_text(catalog_to_json([crane]))
    finished = chat(
        *(TASK, "/robots 'my robots.json'", TASK, "/robots", "/reset", TASK), arguments=("--json",)
    )
    first, taken, ranked, listed, _, back = finished.json_lines()
    assert [robot["name"] for robot in ranked["robots"]] == ["Crane"]
    assert [robot["name"] for robot in taken["catalog"]] == ["Crane"]
    assert taken["catalog"] == listed["catalog"]
    assert back == first
    (only,) = chat(TASK, arguments=("--robots", "my robots.json", "--json")).json_lines()
    assert only["robots"] == ranked["robots"]
    assert "can: lifts" in chat("/robots my robots.json", "/robots").stdout


def test_a_ranking_is_explained(chat: Chat, exported: Path, pictures: list[Path]) -> None:
    """With words, or the last job's; by the open picture, as `infer --explain` does."""
    lines = ["/explain", TASK, "/explain", f"/image {pictures[0]}", "/explain", f"/explain {TASK}"]
    finished = chat(*lines, "/reset", "/explain", arguments=("--json",))
    assert finished.code == 2
    none, ranked, alone, _, seen, again, _, none_left = finished.json_lines()
    for answer in (none, none_left):
        assert answer["error"] == "There is no job to explain." and "/explain" in answer["remedy"]
    model = BitGen.load(exported)
    for answer, image in ((alone, None), (seen, pictures[0])):
        choices = model.explain_robots(model.select_robots(TASK, image), TASK, image)
        assert [robot["name"] for robot in answer["robots"]] == [c.name for c in choices]
        for robot, choice in zip(answer["robots"], choices, strict=True):
            assert [r["part"] for r in robot["why"]] == [r.part for r in choice.why or ()]
    assert all("why" not in robot for robot in ranked["robots"])
    assert again["robots"] == seen["robots"]
    assert "task: " in chat(f"/explain {TASK}").stdout


def test_a_model_without_plans_says_so(chat: Chat) -> None:
    finished = chat("/plan", f"/plan {TASK}")
    assert finished.code == 2
    assert "There is no job to plan." in finished.stderr
    assert "not trained on plans" in finished.stderr


def test_the_path_of_a_picture_opens_it_as_a_terminal_writes_it(
    chat: Chat, pictures: list[Path]
) -> None:
    for name in ("two words.png", "it's.png"):
        with Image.open(pictures[0]) as image:
            image.save(name)
    lines = ["two words.png", "'two words.png'", r"two\ words.png", f"{Path.cwd()}/it's.png"]
    finished = chat(*lines, arguments=("--json",))
    assert finished.code == 0
    assert [Path(answer["image"]).name for answer in finished.json_lines()] == [
        *["two words.png"] * 3, "it's.png",
    ]  # fmt: skip


def test_help_names_every_command(chat: Chat) -> None:
    shown = chat("/help").stdout
    assert all(command.usage in shown for command in COMMANDS)
    (answer,) = chat("/help", "exit", "/help", arguments=("--json",)).json_lines()
    assert set(answer["commands"]) == {command.usage for command in COMMANDS}


def test_what_ends_it_before_it_begins(chat: Chat) -> None:
    for arguments, words in (
        (("missing.jpg",), "missing.jpg"),
        (("--robots", "missing.json"), "missing.json"),
        (("--beam_size", 0), "beam_size"),
        (("--length_penalty", "inf"), "length_penalty"),
        (("--consensus", 1), "consensus"),
        (("--backend", "other"), "other"),
    ):
        finished = chat(TASK, arguments=arguments)
        assert finished.code == 2
        assert words in finished.stderr
        assert finished.stdout == ""


def test_without_standard_input(
    run, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    finished = run("chat", "--model", exported)
    assert finished.code == 2
    assert "standard input" in finished.stderr


def test_a_model_that_writes_no_captions_ranks_robots(
    chat: Chat, make_run: Callable[..., Path], pictures: list[Path]
) -> None:
    model = make_run(attention_mode="bidirectional")
    finished = chat(
        f"/image {pictures[0]}", "a ...", TASK, model=model, arguments=("--json", "--device", "cpu")
    )
    opened, caption, ranked = finished.json_lines()
    assert (opened["image"], opened["caption"]) == (str(pictures[0]), None)
    assert "bidirectional" in caption["error"]
    assert ranked["robots"]


def test_a_model_without_robots_says_what_its_ranking_is_worth(
    chat: Chat, make_run: Callable[..., Path]
) -> None:
    finished = chat(TASK, TASK, model=make_run(robot_names=()))
    assert finished.stderr.count("means nothing") == 1


def test_lines_that_are_no_text_do_not_end_the_loop(exported: Path, tmp_path: Path) -> None:
    """Bytes that are not UTF-8, a byte order mark, line ends of Windows."""
    done = subprocess.run(
        [sys.executable, "-m", "bitgen", "chat", "--json", "--model", str(exported)],
        input=b"\xef\xbb\xbf/history\r\nfetch \xff\xfe it\r\n/history",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "BITGEN_CACHE": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    first, task, last = map(json.loads, done.stdout.decode("utf-8").splitlines())
    assert first["history"] == ["/history"]
    assert task["robots"]
    assert last["history"][-1] == "/history"
    assert not (tmp_path / "chat_history").exists()


def test_completion_of_commands_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two words.jpg").touch()
    Path("two").mkdir()
    Path("[odd]").touch()
    names = [command.name for command in COMMANDS]
    assert completed("/r", names) == ["/reset ", "/robots "]
    assert completed("bring", names) == []
    assert completed("bring tw", names) == []
    assert completed("/image tw", names) == [f"/image two{os.sep}", "/image two words.jpg"]
    assert completed("/image [o", names) == ["/image [odd]"]


# At a terminal ----------------------------------------------------------------------------------


# Ctrl-C reaches a process only from a terminal that is its own, and one that does not ignore it, as
# programs do that a shell starts in the background, and theirs with them.
_AT_A_TERMINAL = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from bitgen.cli.app import main
main(sys.argv[1:])
"""


class Terminal:
    """`bitgen chat` on a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments: object, environment: dict[str, str]) -> None:
        self._screen, inner = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _AT_A_TERMINAL, "chat", *map(str, arguments)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", **environment},
            start_new_session=True,
        )
        os.close(inner)
        self.text = ""
        self._seen = 0

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> str:
        """Wait until what has come since the last call holds the pattern, and return it."""
        until = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self.text, self._seen)) is None:
            if time.monotonic() > until:
                raise TimeoutError(f"no {pattern!r} in {self.text[self._seen :]!r}")
            if select.select([self._screen], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self._screen, 4096).decode("utf-8", "replace")
                except OSError:  # Linux's end of a terminal
                    assert re.compile(pattern).search(self.text, self._seen), self.text
        shown, self._seen = self.text[self._seen : found.end()], found.end()
        return shown

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def interrupt_until(self, pattern: str) -> str:
        """Press Ctrl-C, as a person would again where nothing comes, and wait for the pattern.

        One that comes while CPython's readline does not wait for keys is seen at the next key only.
        """
        for _ in range(PATIENCE // 10):
            self.type("\x03")
            with contextlib.suppress(TimeoutError):
                return self.wait_for(pattern, seconds=10)
        raise TimeoutError(f"no {pattern!r} after Ctrl-C")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


@pytest.fixture
def terminal(exported: Path, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    pytest.importorskip("readline")
    pytest.importorskip("termios")
    opened: list[Terminal] = []

    def open_terminal(*arguments: object, **environment: str) -> Terminal:
        opened.append(
            Terminal(
                *(*arguments, "--model", exported, "--max_tokens", 4),
                environment={"BITGEN_CACHE": str(tmp_path / "cache"), **environment},
            )
        )
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_a_person_at_a_terminal(
    terminal: Callable[..., Terminal], tmp_path: Path, pictures: list[Path]
) -> None:
    """Completion, Ctrl-C on a line, errors, history over sessions, Ctrl-D.

    Keys are typed at the prompt: readline takes them only from there on.
    """
    opened = f"{re.escape(pictures[0].name)}> $"
    screen = terminal()
    screen.wait_for("> $")
    screen.type("/im\t")
    screen.wait_for("/image ")
    screen.type(f"{pictures[0]}\n")
    screen.wait_for(opened)
    screen.type("half a line")
    screen.wait_for("half a line")
    assert "Ctrl-D or /quit ends." in screen.interrupt_until(opened)
    screen.type("/image missing.jpg\n")
    screen.wait_for("error: .*missing.jpg")
    screen.wait_for(opened)
    screen.type(f"{TASK}\n")
    screen.wait_for("%  Drone")
    screen.wait_for(opened)
    screen.type("\x04")
    assert screen.process.wait(timeout=PATIENCE) == 0
    history = tmp_path / "cache" / "chat_history"
    assert history.read_text().splitlines()[-2:] == ["/image missing.jpg", TASK]
    assert history.stat().st_mode & 0o077 == 0

    again = terminal(pictures[1])
    again.wait_for(f"{re.escape(pictures[1].name)}> $")
    again.type("\x1b[A\n")
    assert TASK in again.wait_for("%  Drone")
    again.wait_for("> $")
    again.type("/quit\n")
    assert again.process.wait(timeout=PATIENCE) == 0


def test_a_history_that_cannot_be_kept_costs_nothing_else(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    screen = terminal(BITGEN_CACHE=str(tmp_path / "file"))
    screen.wait_for("> $")
    screen.type("/history\n")
    screen.wait_for("1  /history")
    screen.wait_for("> $")
    screen.type("\x04")
    assert screen.process.wait(timeout=PATIENCE) == 0


def test_ctrl_c_ends_an_answer_and_not_the_loop(
    monkeypatch: pytest.MonkeyPatch, exported: Path, tmp_path: Path, capfd
) -> None:
    """The model is interrupted once, at a terminal: the next line is answered."""
    import bitgen.cli.chat as module

    class Typed:
        is_terminal = True

        def __init__(self, *arguments: object) -> None:
            self.lines = ["first", "second", None]

        def read(self, prompt: str) -> str | None:
            return self.lines.pop(0)

    def interrupted(self: BitGen, task: str) -> list[Any]:
        if task == "first":
            raise KeyboardInterrupt
        return ranked(self, task)

    ranked = BitGen.select_robots
    monkeypatch.setattr(module, "LineReader", Typed)
    monkeypatch.setattr(BitGen, "select_robots", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--model", str(exported)])
    assert ended.value.code == 0
    captured = capfd.readouterr()
    assert "Interrupted." in captured.err
    assert "%  Drone" in captured.out
