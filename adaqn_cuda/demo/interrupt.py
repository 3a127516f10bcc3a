"""Ctrl-C between two steps, where a run is whole and can be saved."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread


class Interrupted(KeyboardInterrupt):
    """Ctrl-C that was held back to a moment between two steps."""


@contextmanager
def held_interrupts(agreed: Callable[[bool], bool] = bool) -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the yielded function is called, which then raises Interrupted.

    A second Ctrl-C does not wait.  Where SIGINT is ignored or somebody else's, it stays so.

    Args:
        agreed: makes one decision of those of several processes, which call the yielded function
            after the same steps, whether or not their Ctrl-C is held.
    """
    pending = False

    def note(number: int, frame: object) -> None:
        nonlocal pending
        if pending:
            raise KeyboardInterrupt
        pending = True

    def check() -> None:
        if agreed(pending):
            raise Interrupted

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or current_thread() is not main_thread():
        yield check
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
