"""Signals: the training ends its update and saves, its loading processes leave that to it."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


def outlive_signals(worker: int) -> None:
    """Make a loading process leave the signals of its process group to the training one.

    A second SIGTERM ends it, so that it can never keep the program from exiting.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_at_next_signal)


def _end_at_next_signal(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


class DeferredSignals:
    """Remembers SIGINT and SIGTERM until the loop can act on them; a second one acts at once."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> DeferredSignals:
        # Python delivers signals to the main thread only; elsewhere the caller stays in charge.
        if threading.current_thread() is threading.main_thread():
            for number in self._SIGNALS:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
