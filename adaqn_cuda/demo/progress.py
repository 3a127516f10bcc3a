"""Progress on the screen: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from .. import AdaQN
from .train import Run

#: Seconds between two looks at the optimizer's counts, which wait for the device, and two lines.
LOOK_EVERY, LINE_EVERY = 2.0, 15.0


class Progress:
    """Give :meth:`update` to :class:`Run` as ``on_step``."""

    def __init__(self, label: str, steps: int, done: int = 0) -> None:
        self.label, self.steps = label, steps
        self.looked = self.printed = 0.0
        self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                print("no progress bar: tqdm is missing; pip install tqdm", file=sys.stderr)
            else:
                self.bar = tqdm(total=steps, initial=done, desc=label, unit="step")

    def update(self, run: Run) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(1)
            if now - self.looked > LOOK_EVERY:
                self.looked = now
                self.bar.set_postfix_str(self._status(run))
        elif now - self.printed > LINE_EVERY:
            self.printed = now
            rate = run.step / max(run.seconds, 1e-9)
            line = f"{self.label}: step {run.step}/{self.steps}, {rate:.1f} steps/s, "
            print(line + self._status(run), file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    @staticmethod
    def _status(run: Run) -> str:
        share = run.optimizer_seconds / max(run.seconds, 1e-9)
        parts = [f"loss {run.train_loss:.3f}", f"optimizer {share:.0%}"]
        if isinstance(run.optimizer, AdaQN):
            stats = run.optimizer.stats()
            counts = "/".join(str(stats[name]) for name in ("stored", "skipped", "resets"))
            parts.append(f"stored/skipped/resets {counts}")
        return ", ".join(parts)
