"""Ctrl-C waits until what must be done as a whole is done."""

from __future__ import annotations

# What the module `signal` wraps: its enums would take longer than a small step does.
from _signal import getsignal, signal  # type: ignore[import-not-found]
from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIGINT
from threading import current_thread, main_thread
from typing import Any


class Hold:
    """SIGINT held back, or, where Python would not deliver it anyway, nothing."""

    def __init__(self) -> None:
        self._handler: Any = None
        self._pending: list[tuple[Any, ...]] = []

    def begin(self) -> None:
        """Python runs handlers in the main thread only, so other threads are never interrupted."""
        handler = getsignal(SIGINT)
        if callable(handler) and current_thread() is main_thread():
            self._handler = handler
            signal(SIGINT, lambda *arguments: self._pending.append(arguments))

    def end(self) -> None:
        """Hand what came in between to whoever would have had it."""
        handler, self._handler = self._handler, None
        if handler is not None:
            signal(SIGINT, handler)
            if self._pending:
                handler(*self._pending.pop())

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
    """Hold SIGINT back until the end."""
    hold = Hold()
    hold.begin()
    try:
        yield hold
    finally:
        hold.end()
