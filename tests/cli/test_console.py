"""What people see: streams, tables, progress that survives a pipe and a narrow terminal."""

from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from bitgen import console as console_module
from bitgen.console import Console, ProgressBar, duration, file_size


class Terminal(io.StringIO):
    """A text stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_results_and_remarks_go_to_their_streams(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.result("[red]a result[/red]")
    console.note("a note [1]")
    console.warning("take care")
    console.error("it failed", "do this")
    captured = capsys.readouterr()
    assert captured.out == "[red]a result[/red]\n"
    assert captured.err == "a note [1]\nwarning: take care\nerror: it failed\n  do this\n"


def test_quiet_keeps_results_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.quiet = True
    console.note("a note")
    with console.progress("Working") as bar:
        bar.update(1, 2)
    console.warning("take care")
    captured = capsys.readouterr()
    assert captured.err == "warning: take care\n"


def test_json_is_one_line_that_any_parser_takes(capsys: pytest.CaptureFixture[str]) -> None:
    Console().json({"text": "é\n", "values": (math.inf, math.nan, 1.5), "none": None})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"text": "é\n", "values": [None, None, 1.5], "none": None}


def test_tables_without_a_terminal_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    path = "runs/" + "long/" * 60
    Console().table(("name", "count"), [("a [b]", "1,234"), (path, "5")])
    lines = capsys.readouterr().out.splitlines()
    assert any(path in line for line in lines)
    assert any("a [b]" in line for line in lines)
    assert all(line == line.rstrip() for line in lines)
    assert lines[-1].endswith("    5")


def test_progress_into_a_pipe_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    bar = ProgressBar("Working", "steps")
    for done in range(0, 101):
        bar.update(done, 100, "loss 1.0")
        now[0] += 1.0
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 100 // console_module.SECONDS_BETWEEN_LINES + 1
    assert lines[0] == "Working 15/100 steps  loss 1.0  1 min 25 s left"
    assert lines[-1] == "Working 100/100 steps  loss 1.0"


@pytest.mark.parametrize("columns", [30, 70, 120])
def test_progress_on_a_terminal_fits_its_width(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    bar = ProgressBar("Training", "steps")
    bar.update(3, 10, "loss 1.234  500 tokens/s", 61.0)
    bar.close()
    lines = re.sub(r"\x1b\[[?\d;]*\w", "", terminal.getvalue()).splitlines()
    assert any("3/10" in line for line in lines)
    assert any("1 min" in line for line in lines)
    assert all(len(line) <= columns for line in lines)
    assert ("loss 1.234" in terminal.getvalue()) == (columns >= 70)


def test_notes_while_a_bar_is_drawn_and_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    console = Console()
    with console.progress("Working") as bar:
        bar.update(1, 2)
        console.note("in between")
    console.note("afterwards")
    assert "in between" in terminal.getvalue()
    assert terminal.getvalue().rstrip().endswith("afterwards")


def test_words_for_time_and_size() -> None:
    assert [duration(s) for s in (0.4, 59.4, 185)] == ["0 s", "59 s", "3 min 05 s"]
    assert duration(7800) == "2 h 10 min"
    assert [file_size(n) for n in (512, 1400, 3_200_000)] == ["512 bytes", "1.4 kB", "3.2 MB"]
    assert file_size(7_100_000_000) == "7.1 GB"


TRAINING = """
import time
from bitgen.console import ProgressBar, console

bar = ProgressBar("Training", "steps")
for step in range(1, 9):
    details = f"loss {9 - step:.3f}  robots 0.345  image words 6.123  12,345 tokens/s  234 images/s"
    bar.update(12_340 + step, 100_000, details, 11_700.0 / step)
    if step == 4:
        console.note("Step 12,344: validation loss 3.123")
    time.sleep(0.1)
bar.close()
console.note("afterwards")
"""


class Screen:
    """What a person sees of an output on a terminal of so many columns."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines = [""]
        self.row = self.column = 0
        self.times_wrapped = 0

    def feed(self, output: str) -> Screen:
        for code, character in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|(.)", output, re.DOTALL):
            if code:
                self._control(code)
            elif character == "\r":
                self.column = 0
            elif character == "\n":
                self._next_row()
            else:
                if self.column == self.columns:  # a full row is left when more comes
                    self.times_wrapped += 1
                    self.column = 0
                    self._next_row()
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1
        return self

    def _control(self, code: str) -> None:
        if code[-1] == "A":
            self.row -= int(code[:-1] or 1)
            assert self.row >= 0
        elif code[-1] == "K":
            self.lines[self.row] = "" if code == "2K" else self.lines[self.row][: self.column]
        else:
            assert code[-1] in "mhl", code  # colours; the cursor is hidden and shown

    def _next_row(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")


def output_on_a_terminal(columns: int, kind: str = "xterm-256color") -> str:
    """What `TRAINING` writes to a real pseudo-terminal."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {n: v for n, v in os.environ.items() if n not in ("COLUMNS", "LINES", "NO_COLOR")}
    source = Path(console_module.__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=its,
        env={**environment, "TERM": kind, "PYTHONPATH": str(source), "PYTHONIOENCODING": "utf-8"},
    )
    os.close(its)
    output = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        output += part
    os.close(ours)
    assert process.wait(timeout=30) == 0
    return output.decode()


@pytest.mark.parametrize(
    ("columns", "bar"),
    [
        (40, "12,348/100,000 steps  24 min 22 s left"),
        (60, "12,348/100,000 steps  loss 1.000  24 min 22 s left"),
        (80, "Training  12,348/100,000 steps  loss 1.000  robots 0.345  24 min 22 s left"),
        (
            120,
            "Training  12,348/100,000 steps  loss 1.000  robots 0.345  image words 6.123"
            "  12,345 tokens/s  24 min 22 s left",
        ),
    ],
)
def test_a_training_on_terminals_of_many_widths_leaves_one_line(columns: int, bar: str) -> None:
    screen = Screen(columns).feed(output_on_a_terminal(columns))
    assert screen.times_wrapped == 0
    assert screen.lines == ["Step 12,344: validation loss 3.123", bar, "afterwards", ""]


def test_a_terminal_that_cannot_go_back_gets_lines() -> None:
    output = output_on_a_terminal(80, kind="dumb")
    assert "\x1b" not in output
    lines = output.splitlines()
    assert [line.split()[0] for line in lines] == ["Step", "Training", "afterwards"]


def test_the_bar_is_drawn_where_there_is_room_and_grows() -> None:
    bar = ProgressBar("Reading", "files")
    lengths = []
    for done in (0, 50, 100):
        bar._state = (done, 100, "")
        line = bar._line(79, ascii_only=True).plain
        assert len(line) <= 79
        lengths.append((line.count("#"), line.count("-")))
    assert lengths == [(0, 40), (20, 20), (40, 0)]
    assert "#" not in bar._line(24, ascii_only=True).plain
    assert bar._line(5, ascii_only=True).plain == "100/1"
