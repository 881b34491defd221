"""The one place that writes to the terminal: people on stderr and stdout, JSON on stdout only.

Results that a person or a program asked for go to stdout; notes, warnings, errors and progress go
to stderr, so that a pipe carries nothing but the result. `rich` is imported when something is
drawn, which keeps the start of every command fast.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import ConsoleOptions
    from rich.live import Live
    from rich.text import Text

# A progress line without a terminal: one every so many seconds, and one at the end.
SECONDS_BETWEEN_LINES = 15.0
REDRAWS_A_SECOND = 8
# Width of the bar, where the words leave so much room.
SMALLEST_BAR, LARGEST_BAR = 8, 40


class Console:
    """What the commands print with. `quiet` keeps results, warnings and errors only."""

    def __init__(self) -> None:
        self.quiet = False
        self.debug = False

    def note(self, message: str) -> None:
        """A remark for a person, on stderr; silent when quiet."""
        if not self.quiet:
            self._print(sys.stderr, message)

    def warning(self, message: str) -> None:
        """Something that a person should look at, on stderr."""
        self._print(sys.stderr, message, label="warning", style="yellow")

    def error(self, message: str, remedy: str | None = None) -> None:
        """What went wrong and what to do about it, on stderr; a traceback only in debug mode."""
        if self.debug and sys.exc_info()[0] is not None:
            traceback.print_exc(file=sys.stderr)
        self._print(sys.stderr, message, label="error", style="bold red")
        if remedy:
            self._print(sys.stderr, f"  {remedy}")

    def result(self, text: str) -> None:
        """A result for a person, on stdout, exactly as it is."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def json(self, value: Any) -> None:
        """One JSON value on one line of stdout. Not finite numbers become null."""
        sys.stdout.write(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None
    ) -> None:
        """A table on stdout. Columns whose cells are all numbers are set to the right."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        for index, column in enumerate(columns):
            numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
            drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            drawn.add_row(*(Text(str(cell)) for cell in row))
        if not any(columns):
            drawn.show_header = False
        self._draw(drawn)

    def panel(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Names and what they mean, in a frame, on stdout."""
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, style="bold cyan")
        for name, meaning in rows:
            grid.add_row(Text(name), Text(meaning))
        self._draw(Panel(grid, title=title, title_align="left", border_style="dim"), framed=True)

    def _draw(self, drawable: Any, framed: bool = False) -> None:
        console = _rich_console(sys.stdout, width=None if framed else 1000)
        with console.capture() as captured:
            console.print(drawable)
        # rich fills each line with spaces, which a copied text or a log need not carry.
        for line in captured.get().splitlines():
            self.result(line.rstrip())

    @contextmanager
    def progress(self, description: str, unit: str = "") -> Iterator[ProgressBar]:
        """A bar for one activity, on stderr: `with console.progress("Reading") as bar: ...`."""
        with closing(ProgressBar(description, unit, enabled=not self.quiet)) as bar:
            yield bar

    def _print(self, stream: Any, message: str, label: str = "", style: str = "") -> None:
        from rich.text import Text

        text = Text.assemble((f"{label}: ", style), message) if label else Text(message)
        console = _live_console if stream is sys.stderr and _live_console else None
        (console or _rich_console(stream)).print(text, soft_wrap=True)


class ProgressBar:
    """Done of total, with details and the time that remains.

    On a terminal it is one line that is redrawn: as much of it as the terminal is wide. Into a pipe
    or a file, and on a terminal that cannot go back, it is a line every `SECONDS_BETWEEN_LINES`.
    """

    def __init__(self, description: str, unit: str = "", enabled: bool = True) -> None:
        self._description = description
        self._unit = unit
        self._enabled = enabled
        self._live: Live | None = None
        self._started = time.monotonic()
        self._first_done: int | None = None
        self._last_line = self._started
        self._last_printed = -1
        self._state = (0, 0, "")
        self._seconds_remaining: float | None = None

    def update(
        self, done: int, total: int, details: str = "", seconds_remaining: float | None = None
    ) -> None:
        """Show that `done` of `total` are finished; `details` stands beside the numbers.

        Details are parted by two spaces; a narrow terminal leaves out the last ones.
        The time that remains is taken from the mean speed so far, unless it is given.
        """
        went_back = done < self._state[0]
        self._state = (done, total, details)
        self._seconds_remaining = seconds_remaining
        if self._first_done is None or went_back:
            # Its speed counts from where an activity starts: in the middle where it is resumed,
            # anew where one part (a file of several) follows another.
            self._first_done = done
            self._started = time.monotonic()
        if not self._enabled:
            return
        if _is_redrawable(sys.stderr):
            self._draw()
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def close(self) -> None:
        """End the bar; a pipe gets the last state as a line."""
        if self._live is not None:
            global _live_console
            self._live.stop()
            self._live = _live_console = None
        elif self._enabled and self._first_done is not None and not _is_redrawable(sys.stderr):
            self._print_line()

    def remaining_seconds(self) -> float | None:
        """Time to the end; None before anything is done."""
        if self._seconds_remaining is not None:
            return self._seconds_remaining
        done, total, _ = self._state
        advanced = done - (self._first_done or 0)
        if advanced <= 0:
            return None
        return (total - done) * (time.monotonic() - self._started) / advanced

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[Text]:
        """The line, as rich asks for it at each redrawing."""
        # The last column stays empty: some terminals begin a new line once it is written.
        yield self._line(options.max_width - 1, ascii_only=options.ascii_only)

    def _draw(self) -> None:
        if self._live is not None:
            return
        global _live_console
        from rich.live import Live

        _live_console = _rich_console(sys.stderr)
        # What a program reads stays on stdout: rich would send it where the bar is.
        self._live = Live(
            self,
            console=_live_console,
            refresh_per_second=REDRAWS_A_SECOND,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start(refresh=True)

    def _line(self, width: int, ascii_only: bool) -> Text:
        """What fits of: description, bar, numbers, details, time that remains."""
        from rich.text import Text

        done, total, details = self._state
        parts = [self._description, self._numbers(), *details.split("  "), self._remaining_words()]
        last = len(parts) - 1
        # The numbers are worth most, then the time that remains, the first detail, and the rest.
        kept = [1]
        for index in (last, 2, 0, *range(3, last)):
            chosen = [*kept, index]
            if parts[index] and len("  ".join(parts[i] for i in chosen)) <= width:
                kept = chosen
        texts = [Text(parts[index]) for index in sorted(kept)]
        free = width - sum(len(text) for text in texts) - 2 * len(texts)
        if len(kept) == sum(map(bool, parts)) and free >= SMALLEST_BAR:
            share = done / total if total else 0.0
            texts.insert(1, _bar(share, min(free, LARGEST_BAR), ascii_only))
        line = Text("  ").join(texts)
        line.no_wrap, line.overflow = True, "crop"
        line.truncate(width)
        return line

    def _print_line(self) -> None:
        done, _, details = self._state
        if done == self._last_printed:
            return
        self._last_printed = done
        self._last_line = time.monotonic()
        parts = [f"{self._description} {self._numbers()}", details, self._remaining_words()]
        sys.stderr.write("  ".join(part for part in parts if part) + "\n")
        sys.stderr.flush()

    def _numbers(self) -> str:
        done, total, _ = self._state
        if self._unit == "bytes":
            return f"{file_size(done)} of {file_size(total)}" if total else file_size(done)
        return f"{done:,}/{total:,} {self._unit}".rstrip()

    def _remaining_words(self) -> str:
        done, total, _ = self._state
        seconds = self.remaining_seconds()
        if done >= total or seconds is None:
            return ""
        return f"{duration(seconds)} left"


console = Console()
_live_console: RichConsole | None = None


def duration(seconds: float) -> str:
    """ "42 s", "3 min 05 s" or "2 h 10 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def file_size(num_bytes: int) -> str:
    """ "512 bytes", "1.4 kB", "3.2 MB": decimal units, as file managers show them."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{int(size)} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def _rich_console(stream: Any, width: int | None = 1000) -> RichConsole:
    """`width` holds without a terminal: wide, since a path that is cut in two cannot be copied."""
    from rich.console import Console as RichConsole

    width = None if stream.isatty() else width
    return RichConsole(file=stream, width=width, highlight=False, markup=False, emoji=False)


def _bar(share: float, width: int, ascii_only: bool) -> Text:
    from rich.text import Text

    full, empty = ("#", "-") if ascii_only else ("\N{BOX DRAWINGS HEAVY HORIZONTAL}",) * 2
    filled = round(min(max(share, 0.0), 1.0) * width)
    return Text.assemble((full * filled, "green"), (empty * (width - filled), "bright_black"))


def _is_redrawable(stream: Any) -> bool:
    """Whether a line on it can be replaced by another."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def _is_number(cell: object) -> bool:
    text = str(cell).replace(",", "").rstrip("%").strip()
    try:
        float(text)
    except ValueError:
        return False
    return True


def _finite(value: Any) -> Any:
    """The value with what JSON cannot hold (inf, nan) replaced by None."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
