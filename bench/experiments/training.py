"""One run: a method solves a problem within its budget of gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .methods import Method
from .problem import Problem
from .tasks import Task

#: Share of the steps over which lr grows, and growth of the loss that ends a run.
WARM_UP, DIVERGED = 0.05, 3.0
#: Training losses whose mean is kept, for information.
RECENT = 50


@dataclass(frozen=True)
class Run:
    """A method at one lr on the problem of one seed, over a share of the task's steps."""

    task: Task
    method: Method
    lr: float
    seed: int
    horizon: float = 1.0

    @property
    def steps(self) -> int:
        return max(1, round(self.horizon * self.task.steps))

    def definition(self, text: dict[str, str] | None) -> dict[str, Any]:
        """All that the result depends on, as JSON; ``text`` identifies the data."""
        return {
            "task": self.task.definition(), "text": text, "method": self.method.definition(),
            "lr": self.lr, "seed": self.seed, "horizon": self.horizon,
        }  # fmt: skip


def schedule(step: int, steps: int, shape: str) -> float:
    """Factor on lr in step ``step`` of ``steps``, counted from 0.

    ``"linear"`` grows over the first 5 % and falls to zero at the end; ``"constant"`` is 1.
    """
    if shape == "constant":
        return 1.0
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return max(0.0, (steps - step) / (steps - warm))


class Training:
    """A problem and its optimizer, one step at a time; ``done`` counts gradients.

    Args:
        problem: what to solve.
        run: with what, at which lr, for how many steps.
    """

    def __init__(self, problem: Problem, run: Run) -> None:
        self.problem, self.run, self.done = problem, run, 0
        self.optimizer = run.method.make(problem, run.lr, run.method.options)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.shape = "linear" if run.task.stochastic else run.method.schedule

    def step(self) -> float:
        """Take a step; the loss before it."""
        factor = schedule(self.done, self.run.steps, self.shape)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        if self.run.method.closure:
            return float(self.optimizer.step(self._gradient))
        loss, repeats = self._gradient(), self.problem.repeats
        self._decay_weights()
        self.optimizer.step()
        if not self.run.task.stochastic:  # elsewhere the budget is data, and a batch is read once
            self.done += self.problem.repeats - repeats
        return float(loss)

    @torch.no_grad()
    def _decay_weights(self) -> None:
        """w = (1 - lr weight_decay) w, alike for every method; makes AdamW of Adam."""
        decay = self.run.task.weight_decay
        for group in self.optimizer.param_groups if decay else ():
            for p in group["params"]:
                p.mul_(1 - group["lr"] * decay)

    @torch.enable_grad()
    def _gradient(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.problem.loss()
        loss.backward()
        if self.run.task.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.problem.model.parameters(), self.run.task.clip)
        self.done += 1
        return loss.detach()


def execute(run: Run, path: str | None) -> dict[str, Any]:
    """The result of ``run``: its loss (``None`` if it diverged), curve, evaluations, seconds."""
    training = Training(run.task.build(run.seed, path), run)
    began = time.perf_counter()
    curve, losses = _train(training)
    final, diverged = curve[-1][1], training.done < run.steps
    recent = losses[-RECENT:]
    stats = training.optimizer.stats() if run.method.ours else None
    return {
        "loss": None if diverged or not math.isfinite(final) else final,
        "diverged_at": training.done if diverged else None,
        "evaluations": training.done,
        "repeats": training.problem.repeats,
        "training_loss": sum(recent) / len(recent),
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 2),
        "state_bytes": state_bytes(training.optimizer.state),
        "stats": stats,
    }


def state_bytes(state: Any) -> int:
    """Memory behind all tensors in ``state``, whatever contains them; shared memory counts once."""
    found: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping | list | tuple):
            for item in value.values() if isinstance(value, Mapping) else value:
                look(item)

    look(state)
    return sum(found.values())


def _train(training: Training) -> tuple[list[list[float]], list[float]]:
    """Train to the end, or until it has diverged.

    Returns the curve, as (gradients so far, metric), and the training losses.
    """
    steps, problem = training.run.steps, training.problem
    between = steps / max(1, round(training.run.task.evaluations * training.run.horizon))
    curve, losses, bad = [[0, problem.metric()]], [], 0
    while training.done < steps:
        losses.append(training.step())
        bad = 0 if losses[-1] <= DIVERGED * losses[0] else bad + 1
        if bad >= training.run.task.patience or not math.isfinite(losses[-1]):
            training.done = min(training.done, steps - 1)
            break
        if training.done >= min(steps, len(curve) * between):
            curve.append([training.done, problem.metric()])
    return curve, losses
