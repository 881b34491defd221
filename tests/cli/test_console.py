"""What people see: streams, tables, progress that survives a pipe and a narrow terminal."""

from __future__ import annotations

import io
import json
import math
import re

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


@pytest.mark.parametrize("columns", [20, 70, 120])
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
    assert ("loss 1.234" in terminal.getvalue()) == (columns >= console_module.WIDTH_FOR_DETAILS)


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
