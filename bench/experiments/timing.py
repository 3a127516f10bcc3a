"""Seconds of a training step on a quiet machine: gradient and optimizer together."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from .ledger import Ledger
from .methods import Method
from .protocol import Study, best_rate
from .tasks import TUNING_SEED, Task, Texts
from .training import Run, Training

#: Rounds, and gradients that a round takes the mean over: a whole number of pair updates.
ROUNDS, GRADIENTS = 7, 20
#: Steps before the first round: enough to warm up, and a share of the run for settings of AdaQN,
#: whose step grows dearer while the memory of pairs fills.
WARM_UP, FILL = 5, 0.25


@dataclass
class Clock:
    """One method in training, and the milliseconds per gradient of each round so far."""

    method: Method
    training: Training
    rounds: list[float]

    def advance(self, gradients: int) -> float:
        """Train over so many gradients; milliseconds of one."""
        before, began = self.training.done, time.perf_counter()
        while self.training.done < before + gradients:
            self.training.step()
        return 1000 * (time.perf_counter() - began) / (self.training.done - before)


def definition(task: Task, method: Method) -> dict[str, Any]:
    """What a timing belongs to."""
    return {"task": task.definition(), "method": method.definition()}


def measure(task: Task, methods: list[Method], ledger: Ledger, texts: Texts) -> None:
    """Time ``methods`` on ``task`` in rounds that take turns, and write the results down."""
    clocks = [start(task, m, ledger, texts) for m in methods if m.timed]
    for clock in tqdm(clocks, f"{task.name}: warming up", leave=False):
        clock.advance(max(WARM_UP, round(FILL * task.steps * clock.method.ours)))
    for _ in tqdm(range(ROUNDS), f"{task.name}: rounds", leave=False):
        for clock in clocks:
            clock.rounds.append(clock.advance(GRADIENTS))
    for clock in clocks:
        low, median, high = statistics.quantiles(clock.rounds, n=4)
        ledger.add(
            {
                "kind": "time",
                "definition": definition(task, clock.method),
                "ms": median,
                "iqr": high - low,
                "rounds": clock.rounds,
                "threads": torch.get_num_threads(),
            }
        )
        tqdm.write(f"{task.name:13} {clock.method.name:17} {median:8.3f} ms  IQR {high - low:.3f}")


def start(task: Task, method: Method, ledger: Ledger, texts: Texts) -> Clock:
    """A training at the tuned lr (the lowest of the grid if there is none), too long to end."""
    losses = Study(task, method, texts.identity(task)).tuning(ledger)
    lr = best_rate(losses) if losses else min(method.grid(task))
    run = Run(task, method, lr, TUNING_SEED, horizon=10.0)
    return Clock(method, Training(task.build(TUNING_SEED, texts.path(task)), run), [])
