"""One run: a method has so many evaluations of loss and gradient, and the best point counts."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..deterministic import FullBatch
from ..training import Run, schedule, state_bytes
from .methods import METHODS
from .tasks import MARKS, TASKS

#: Calls of ``step()`` in a row without a lower loss after which a line search counts as stuck, and
#: growth of the loss over its first value, with patience, that ends a method without one.
STUCK, DIVERGED, PATIENCE = 3, 1e3, 100


class Spent(Exception):
    """The budget is spent."""


class Meter:
    """Evaluates loss and gradient, and keeps the best point so far.

    Args:
        problem: what is solved.
        budget: evaluations that may be made.
    """

    def __init__(self, problem: FullBatch, budget: int) -> None:
        self.problem, self.budget, self.done = problem, budget, 0
        self.params = list(problem.model.parameters())
        self.first = self.last = math.nan
        self.best, self.point = math.inf, parameters_to_vector(self.params).detach()
        self.curve: list[list[float]] = []
        self.began = time.process_time(), time.perf_counter()

    @torch.enable_grad()
    def __call__(self) -> Tensor:
        if self.done >= self.budget:
            raise Spent
        for p in self.params:
            p.grad = None
        loss = self.problem.loss()
        loss.backward()
        self._note(float(loss.detach()))
        return loss.detach()

    def _note(self, loss: float) -> None:
        self.done += 1
        self.last = loss
        if self.done == 1:
            self.first = loss
        if loss < self.best:
            self.best, self.point = loss, parameters_to_vector(self.params).detach().clone()
        marks, before = (n * MARKS // self.budget for n in (self.done, self.done - 1))
        if self.done == 1 or marks > before:
            self.curve.append([self.done, self.problem.above(self.best), *self.seconds()])

    def seconds(self) -> tuple[float, float]:
        """Seconds of the processor, and of the clock on the wall, since the start."""
        processor, wall = self.began
        return time.process_time() - processor, time.perf_counter() - wall

    def go_to_best(self) -> None:
        with torch.no_grad():
            vector_to_parameters(self.point, self.params)


def work(task: str, steps: int, method: str, settings: tuple[Any, ...], path: None) -> Any:
    """What a worker does."""
    return execute(Run(replace(TASKS[task], steps=steps), METHODS[method], *settings))


def execute(run: Run) -> dict[str, Any]:
    """The result of ``run``: loss above the optimum, error, and the curve to it.

    The loss is ``None`` if it never fell.  A point of the curve is evaluations, loss, and the
    seconds of the processor and of the clock.
    """
    problem = run.task.build(run.seed)
    options = dict(run.method.options)
    if options.pop("needs_budget", False):
        options["budget"] = run.steps
    optimizer = run.method.make(problem, run.lr, options)
    meter = Meter(problem, run.steps)
    drive = search if run.method.closure else descend
    try:
        stuck = drive(optimizer, meter, run)
    except Spent:
        stuck = False
    processor, wall = meter.seconds()
    meter.go_to_best()
    return {
        "loss": problem.above(meter.best) if meter.best < meter.first else None,
        "error": problem.error(),
        "stopped_at": meter.done if stuck else None,
        "evaluations": meter.done,
        "curve": meter.curve,
        "processor_seconds": round(processor, 3),
        "seconds": round(wall, 3),
        "state_bytes": state_bytes(optimizer.state),
        "stats": optimizer.stats() if run.method.ours else None,
    }


def search(optimizer: Any, meter: Meter, run: Run) -> bool:
    """Let a method with a line search go on until it is stuck, which is what it returns."""
    idle = 0
    while idle < STUCK:
        before = meter.best
        optimizer.step(meter)
        idle = 0 if meter.best < before else idle + 1
    return True


def descend(optimizer: Any, meter: Meter, run: Run) -> bool:
    """Take steps of a given length until the loss has grown beyond hope; whether it has."""
    rates: list[float] = [group["lr"] for group in optimizer.param_groups]
    bad = 0
    while bad < PATIENCE:
        factor = schedule(meter.done, run.steps, run.method.schedule)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        meter()
        if not math.isfinite(meter.last):
            return True
        bad = bad + 1 if meter.last > DIVERGED * meter.first else 0
        optimizer.step()
    return True
