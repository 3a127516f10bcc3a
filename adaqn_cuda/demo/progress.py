"""Progress on the screen: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

#: Seconds between two looks at the optimizer's counts, which wait for the device, and two lines.
LOOK_EVERY, LINE_EVERY = 2.0, 15.0


class Advancing(Protocol):
    """A run: what it has done so far, in which time, and what else is worth seeing."""

    step: int
    seconds: float

    def status(self) -> str: ...


class Progress:
    """What has been done of how many steps; :meth:`watcher` makes the ``on_step`` of a run.

    Nothing is seen of it unless it is ``shown``.
    """

    def __init__(
        self, label: str, steps: int, done: int = 0, unit: str = "step", shown: bool = True
    ) -> None:
        self.label, self.steps, self.unit, self.shown = label, steps, unit, shown
        self.looked = self.printed = 0.0
        self.bar: Any = None
        if shown and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                print("no progress bar: tqdm is missing; pip install tqdm", file=sys.stderr)
            else:
                self.bar = tqdm(total=steps, initial=done, desc=label, unit=unit)

    def update(self, run: Advancing) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(1)
            if now - self.looked > LOOK_EVERY:
                self.looked = now
                self.bar.set_postfix_str(run.status())
        elif self.shown and now - self.printed > LINE_EVERY:
            self.printed = now
            rate = run.step / max(run.seconds, 1e-9)
            line = f"{self.label}: {self.unit} {run.step}/{self.steps}, {rate:.1f} {self.unit}s/s, "
            print(line + run.status(), file=sys.stderr)

    def watcher(self, check: Callable[[], None]) -> Callable[[Advancing], None]:
        """Shows a step and then calls ``check``, which may end the run."""

        def show_and_check(run: Advancing) -> None:
            self.update(run)
            check()

        return show_and_check

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
