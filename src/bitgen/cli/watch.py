"""`bitgen infer --watch`: answers for pictures as they arrive in a folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.console import console
from bitgen.training.interrupts import DeferredSignals

if TYPE_CHECKING:
    from bitgen.inference.answers import Answer
    from bitgen.inference.watch import FolderWatch

_LONGEST_SLEEP = 0.25


def answer_arriving(
    watch: FolderWatch,
    answers: Callable[[Sequence[Path]], Generator[Answer, None, None]],
    show: Callable[[Answer], None],
    include_existing: bool,
) -> None:
    """Answer for each picture that arrives, until Ctrl-C or SIGTERM; then say how many there were.

    The picture that is worked on is finished first; a second Ctrl-C ends at once.

    Args:
        watch: the folder.
        answers: asks the model about pictures.
        show: prints an answer.
        include_existing: whether `watch` gives out what was there at the start.

    Raises:
        InputError: the model cannot do what is asked of it.
    """
    answers(()).close()  # what it refuses is refused now, not when the first picture arrives
    num_answered = num_bad = 0
    was_lost = False
    with DeferredSignals() as signals:
        _say_what_is_watched(watch, include_existing)
        while not signals.received:
            pictures = watch.ready()
            _tell_if_lost(watch, was_lost)
            was_lost = watch.error is not None
            if not pictures:
                _sleep(watch.wait_seconds, signals)
                continue
            with contextlib.closing(answers(pictures)) as answered:
                for answer in answered:
                    if answer.error is None:
                        show(answer)
                        num_answered += 1
                    elif not watch.try_again(Path(str(answer.picture))):
                        show(answer)
                        num_bad += 1
                    if signals.received:
                        break
    words = f"{num_answered:,} {'picture' if num_answered == 1 else 'pictures'} answered"
    console.note(f"Stopped: {words}, {num_bad:,} could not be read.")


def _say_what_is_watched(watch: FolderWatch, include_existing: bool) -> None:
    """Before the first picture: that it works, what it does with what is there, how it ends."""
    console.note(f"Watching {watch.folder} for new pictures; Ctrl-C ends.")
    if watch.num_existing and not include_existing:
        there = (
            "1 is there already and"
            if watch.num_existing == 1
            else (f"{watch.num_existing:,} are there already and")
        )
        console.note(f"  {there} left out; --include_existing takes such too.")


def _tell_if_lost(watch: FolderWatch, was_lost: bool) -> None:
    if watch.error is not None and not was_lost:
        console.warning(
            f"The folder {watch.folder} cannot be read ({watch.error.strerror}); it is waited for."
        )
    elif watch.error is None and was_lost:
        console.note(f"The folder {watch.folder} is back.")


def _sleep(seconds: float, signals: DeferredSignals) -> None:
    """In pieces: a signal that is handled does not end a sleep."""
    end = time.monotonic() + seconds
    while not signals.received and (remaining := end - time.monotonic()) > 0:
        time.sleep(min(remaining, _LONGEST_SLEEP))
