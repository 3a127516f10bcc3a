"""What is to be run, given what has been: the same rules for every method.

lr is tuned on the first seed over a grid of five points, which grows outwards by one point while
its best is at an edge, at most twice each way.  The best lr is run on the other seeds, and for
contenders over shorter horizons too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .ledger import Ledger, Record
from .methods import RATIO, Method, rounded
from .tasks import TEST_SEEDS, TUNING_SEED, Task
from .training import Run

#: Times that a grid may grow, each way; shares of the steps that contenders are also run over.
EXTENSIONS, SHORT_HORIZONS = 2, (0.2, 0.5, 0.75)


def extension(start: list[float], losses: dict[float, float]) -> float | None:
    """The lr by which the grid must grow, if its best is at an edge that may still move.

    Args:
        start: the grid to begin with.
        losses: final loss at each lr run so far; ``start`` and extensions of it.
    """
    low, high, best = min(losses), max(losses), best_rate(losses)
    if best == low and sum(lr < min(start) for lr in losses) < EXTENSIONS:
        return rounded(low / RATIO)
    if best == high and sum(lr > max(start) for lr in losses) < EXTENSIONS:
        return rounded(high * RATIO)
    return None


def best_rate(losses: dict[float, float]) -> float:
    """The lr of the lowest loss, the lowest one if all have diverged."""
    return min(sorted(losses), key=lambda lr: losses[lr])


@dataclass(frozen=True)
class Study:
    """One method on one task, with the identity of the task's text."""

    task: Task
    method: Method
    text: dict[str, str] | None

    def run(self, lr: float, seed: int, horizon: float = 1.0) -> Run:
        return Run(self.task, self.method, lr, seed, horizon)

    def find(self, ledger: Ledger, run: Run) -> Record | None:
        return ledger.find(run.definition(self.text))

    def loss(self, ledger: Ledger, run: Run) -> float | None:
        return ledger.loss(run.definition(self.text))

    def tuning(self, ledger: Ledger) -> dict[float, float]:
        """Final loss at each lr of the grid, as far as it has been run and grown."""
        start = self.method.grid(self.task)
        known = {lr: self.loss(ledger, self.run(lr, TUNING_SEED)) for lr in start}
        losses = {lr: loss for lr, loss in known.items() if loss is not None}
        while set(start) <= losses.keys():
            further = extension(start, losses)
            loss = further and self.loss(ledger, self.run(further, TUNING_SEED))
            if loss is None:
                break
            losses[further] = loss
        return dict(sorted(losses.items()))

    def missing(self, ledger: Ledger) -> list[Run]:
        """Runs that are known to be needed and have not been made."""
        start, losses = self.method.grid(self.task), self.tuning(ledger)
        if not set(start) <= losses.keys():
            return [self.run(lr, TUNING_SEED) for lr in start if lr not in losses]
        further = extension(start, losses)
        if further is not None:
            return [self.run(further, TUNING_SEED)]
        best = best_rate(losses)
        if not math.isfinite(losses[best]):
            return []
        return [run for run in self.tests(best) if self.find(ledger, run) is None]

    def tests(self, lr: float) -> list[Run]:
        """Runs of the tuned ``lr``, on seeds it was not tuned on."""
        shorter = SHORT_HORIZONS if self.method.contender else ()
        return [self.run(lr, seed, share) for share in (1.0, *shorter) for seed in TEST_SEEDS]

    def finished(self, ledger: Ledger) -> bool:
        return not self.missing(ledger)


def in_order(studies: Iterable[Study]) -> list[Study]:
    """Baselines before settings of AdaQN, cheap tasks before dear ones."""
    return sorted(studies, key=lambda study: (study.method.ours, study.task.seconds))
