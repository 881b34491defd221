"""Lines of a prompt loop: typed by a person, with history and completion, or read from a pipe."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgen.errors import InputError

if TYPE_CHECKING:
    from types import ModuleType

_HISTORY_LINES = 1000


class LineReader:
    """Reads line after line.

    On a terminal a line can be edited, the arrow keys bring back earlier ones, also those of
    earlier sessions, and Tab completes commands and paths, where Python has `readline` (on Windows
    it has not, and the console itself edits). A pipe is read as it is, without a prompt.

    Attributes:
        is_terminal: whether a person types.
    """

    def __init__(self, history_file: Path, commands: Sequence[str]) -> None:
        """`commands` are the words that Tab completes at a line's beginning.

        Raises:
            InputError: standard input is closed.
        """
        if sys.stdin is None:
            raise InputError("There is no standard input to read from.")
        self.is_terminal = sys.stdin.isatty()
        self._history_file = history_file
        self._readline: ModuleType | None = None
        if self.is_terminal and sys.stdout.isatty():
            self._readline = _set_up_readline(history_file, commands)
        if not self.is_terminal and isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # one bad byte does not end the loop

    def read(self, prompt: str) -> str | None:
        """The next line without its end, or None where there is none (Ctrl-D).

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        if self.is_terminal and sys.stdout.isatty():
            try:
                line = input(prompt)
            except EOFError:
                return None
            self._save_history()
            return line
        if self.is_terminal:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        return line.rstrip("\r\n").lstrip("\N{ZERO WIDTH NO-BREAK SPACE}") if line else None

    def _save_history(self) -> None:
        """After each line, so that a window that is closed loses none. A place that cannot be
        written to costs the history, not the session."""
        if self._readline is None:
            return
        unfinished = self._history_file.with_name(f".{self._history_file.name}-{os.getpid()}")
        with contextlib.suppress(OSError):
            self._history_file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._readline.write_history_file(unfinished)
                unfinished.chmod(0o600)
                os.replace(unfinished, self._history_file)
            finally:
                unfinished.unlink(missing_ok=True)


def _set_up_readline(history_file: Path, commands: Sequence[str]) -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    module: Any = readline
    with contextlib.suppress(OSError):
        module.read_history_file(history_file)
    module.set_history_length(_HISTORY_LINES)
    is_libedit = "libedit" in (module.__doc__ or "")
    module.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    module.set_completer_delims("")
    completions: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            completions[:] = completed(text, commands)
        return completions[state] if state < len(completions) else None

    module.set_completer(complete)
    return readline


def completed(line: str, commands: Sequence[str]) -> list[str]:
    """The lines that `line` may become: a command, or a command with a path."""
    command, space, path = line.partition(" ")
    if not space:
        return [f"{name} " for name in sorted(commands) if name.startswith(line)]
    if command not in commands:
        return []
    start = os.path.expanduser(path) if path.startswith("~") else path
    return [
        f"{command} {name}{os.sep if os.path.isdir(name) else ''}"
        for name in sorted(glob.glob(f"{glob.escape(start)}*"))
    ]
