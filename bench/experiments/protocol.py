"""What is to be run, given what has been: the same rules for every method.

lr is tuned on the first seed over a grid of five points, which grows outwards by one point while
its best is at an edge, at most twice each way.  The best lr is run on the other seeds.  Contenders
are also run over shorter horizons, for each of which lr is tuned anew among three points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .ledger import Ledger, Record
from .methods import RATIO, Method, rounded
from .tasks import TUNING_SEED, Task
from .training import Run

#: Times that a grid may grow, each way; shares of the steps that contenders are also run over.
EXTENSIONS, SHORT_HORIZONS = 2, (0.2, 0.5, 0.65, 0.75)


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

    def grid(self) -> list[float]:
        """The lr values to begin with."""
        return self.method.grid(self.task)

    def run(self, lr: float, seed: int, horizon: float = 1.0) -> Run:
        return Run(self.task, self.method, lr, seed, horizon)

    def find(self, ledger: Ledger, run: Run) -> Record | None:
        return ledger.find(run.definition(self.text))

    def loss(self, ledger: Ledger, run: Run) -> float | None:
        return ledger.loss(run.definition(self.text))

    def tuning(self, ledger: Ledger) -> dict[float, float]:
        """Final loss at each lr of the grid, as far as it has been run and grown."""
        start = self.grid()
        known = {lr: self.loss(ledger, self.run(lr, TUNING_SEED)) for lr in start}
        losses = {lr: loss for lr, loss in known.items() if loss is not None}
        while set(start) <= losses.keys():
            further = self.further(losses)
            loss = further and self.loss(ledger, self.run(further, TUNING_SEED))
            if loss is None:
                break
            losses[further] = loss
        return dict(sorted(losses.items()))

    def tuning_runs(self, ledger: Ledger) -> list[Run]:
        """The runs behind :meth:`tuning`."""
        return [self.run(lr, TUNING_SEED) for lr in self.tuning(ledger)]

    def further(self, losses: dict[float, float]) -> float | None:
        """The lr by which the grid must grow, if it is tuned at all."""
        return extension(self.grid(), losses) if self.method.lr is None else None

    def missing(self, ledger: Ledger) -> list[Run]:
        """Runs that are known to be needed and have not been made."""
        start, losses = self.grid(), self.tuning(ledger)
        if not set(start) <= losses.keys():
            return [self.run(lr, TUNING_SEED) for lr in start if lr not in losses]
        further = self.further(losses)
        if further is not None:
            return [self.run(further, TUNING_SEED)]
        best = best_rate(losses)
        if self.method.trial or not math.isfinite(losses[best]):
            return []
        return [run for run in self.tests(ledger, best) if self.find(ledger, run) is None]

    def tests(self, ledger: Ledger, best: float) -> list[Run]:
        """Runs on seeds that lr was not tuned on, over all horizons; some are tuned first."""
        runs = [self.run(best, seed) for seed in self.task.seeds]
        for horizon in SHORT_HORIZONS if self.method.contender else ():
            runs += self._shorter(ledger, best, horizon)
        return runs

    def _shorter(self, ledger: Ledger, best: float, horizon: float) -> list[Run]:
        """Runs over one shorter horizon: three around ``best``, then the best of them elsewhere."""
        losses = self.tuning_shorter(ledger, best, horizon)
        if None in losses.values():
            return [self.run(lr, TUNING_SEED, horizon) for lr in losses]
        return [self.run(best_rate(losses), seed, horizon) for seed in self.task.seeds]

    def tuning_shorter(
        self, ledger: Ledger, best: float, horizon: float
    ) -> dict[float, float | None]:
        """Final loss over a shorter horizon at the three lr around ``best``; None if not run."""
        around = [rounded(best * RATIO**step) for step in (-1, 0, 1)]
        return {lr: self.loss(ledger, self.run(lr, TUNING_SEED, horizon)) for lr in around}

    def most_runs(self) -> int:
        """How many runs there are in all, if the grid need not grow."""
        horizons = len(SHORT_HORIZONS) if self.method.contender else 0
        tests = 0 if self.method.trial else len(self.task.seeds) * (1 + horizons) + 3 * horizons
        return len(self.grid()) + tests

    def finished(self, ledger: Ledger) -> bool:
        return not self.missing(ledger)


class Plain(Study):
    """The same, where a given lr needs no run on the tuning seed."""

    def grid(self) -> list[float]:
        return super().grid() if self.method.lr is None else []

    def missing(self, ledger: Ledger) -> list[Run]:
        if self.method.lr is None:
            return super().missing(ledger)
        runs = self.tests(ledger, self.method.lr)
        return [run for run in runs if self.find(ledger, run) is None]

    def best(self, ledger: Ledger) -> float:
        """The lr of the runs that count."""
        return best_rate(self.tuning(ledger)) if self.method.lr is None else self.method.lr


def in_order(studies: Iterable[Study]) -> list[Study]:
    """Baselines before settings of AdaQN, cheap tasks before dear ones."""
    return sorted(studies, key=lambda study: (study.method.ours, study.task.seconds))
