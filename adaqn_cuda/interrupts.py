"""Ctrl-C waits until what must be done as a whole is done."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any


class Hold:
    """SIGINT held back, or, where Python would not deliver it anyway, nothing."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self._pending: list[tuple[Any, ...]] = []

    def begin(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, lambda *arguments: self._pending.append(arguments))

    def end(self) -> None:
        """Hand what came in between to whoever would have had it."""
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._pending:
                self._handler(*self._pending.pop())

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """For a function of the user's, which may take long."""
        self.end()
        try:
            yield
        finally:
            self.begin()


@contextmanager
def uninterrupted() -> Iterator[Hold]:
    """Hold SIGINT back until the end.

    Python runs handlers of signals in the main thread only, so others are never interrupted.
    """
    handler = signal.getsignal(signal.SIGINT)
    mine = callable(handler) and current_thread() is main_thread()
    hold = Hold(handler if mine else None)
    hold.begin()
    try:
        yield hold
    finally:
        hold.end()
