"""Physics-informed networks, callable from Python: :class:`Config` in, :class:`Result` out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..lbfgs import DETERMINISTIC, LBFGS
from .data import DataError
from .equations import EQUATIONS, Collocation, Network

#: Records of a run in its curve, at most.
RECORDS = 200
#: torch's settings: as many pairs as people give it, and no end before the evaluations are spent.
TORCH = dict(
    history_size=100, line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0
)
METHODS = {"adaqn_cuda": (LBFGS, DETERMINISTIC), "torch": (torch.optim.LBFGS, TORCH)}
NAMES = {"adaqn_cuda": "adaqn_cuda.LBFGS", "torch": "torch.optim.LBFGS"}


class Spent(Exception):
    """All evaluations have been made, be it in the middle of a line search."""


@dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    problem: str = "helmholtz"
    optimizer: str = "adaqn_cuda"
    evaluations: int = 1000
    points: int = 1000
    seed: int = 0
    device: str = "cpu"


@dataclass
class Result:
    """What a run leaves behind.

    Args:
        config: what was run.
        parameters: scalars in the network.
        curve: records over the run: evaluation, seconds, lowest loss so far.
        loss: the lowest one.
        relative_error: against the exact solution, where the loss was lowest.
        evaluations: of loss and gradient.
        seconds: wall time.
        optimizer_share: part of it not spent in evaluations.
        stats: the optimizer's own, for this package's.
    """

    config: dict[str, Any]
    parameters: int
    curve: list[dict[str, float]] = field(default_factory=list)
    loss: float = math.inf
    relative_error: float = math.nan
    evaluations: int = 0
    seconds: float = 0.0
    optimizer_share: float = 0.0
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The optimizer's, as it is imported."""
        return NAMES[self.config["optimizer"]]

    def record(self) -> dict[str, Any]:
        """All of it, for a file."""
        return asdict(self)


class Fit:
    """A network on its way to the solution of an equation.

    Points and initial parameters depend on the seed only, not on the optimizer.

    Args:
        config: what to run.
        on_step: called after every evaluation with the run, for progress bars; what it raises ends
            the run.
    """

    def __init__(self, config: Config, on_step: Callable[[Fit], None] | None = None) -> None:
        self.config, self.on_step = config, on_step
        self.task, self.network = self._make_task()
        make, options = METHODS[config.optimizer]
        count = {"max_iter": config.evaluations, "max_eval": config.evaluations}
        self.optimizer = make(self.network.parameters(), **options, **count)
        self.every = math.ceil(config.evaluations / RECORDS)
        self.step, self.began, self.seconds, self.evaluating = 0, 0.0, 0.0, 0.0
        self.best = self._copy()
        self.result = Result(asdict(config), sum(p.numel() for p in self.best))

    def _make_task(self) -> tuple[Collocation, Network]:
        config, device = self.config, torch.device(self.config.device)
        generator = torch.Generator().manual_seed(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = Network()
        try:
            task = Collocation(EQUATIONS[config.problem], config.points, generator, device)
            return task, network.to(device)
        except TypeError as error:
            raise DataError(f"--device {config.device}: no float64 there; try cpu") from error

    def _copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.network.parameters()]

    def run(self) -> Result:
        """Spend all evaluations, or end where the optimizer finds no lower loss."""
        self.began, before = time.perf_counter(), math.inf
        try:
            self.optimizer.step(self._closure)
            while self.result.loss < before:
                before = self.result.loss
                self.optimizer.step(self._closure)
        except Spent:
            pass
        return self.finish()

    def _closure(self) -> Tensor:
        if self.step == self.config.evaluations:
            raise Spent
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.task.loss(self.network)
        loss.backward()
        value = loss.item()  # waits for the device
        self.evaluating += time.perf_counter() - start
        self.step += 1
        self.seconds = time.perf_counter() - self.began
        self._note(value)
        if self.on_step is not None:
            self.on_step(self)
        return loss.detach()

    def _note(self, loss: float) -> None:
        """Keep the parameters with the lowest loss: a line search ends anywhere when it is cut."""
        if loss < self.result.loss:
            self.result.loss, self.best = loss, self._copy()
        if self.step % self.every == 0 or self.step == 1:
            self._record()

    def _record(self) -> None:
        self.result.curve.append(
            {"evaluation": self.step, "seconds": self.seconds, "loss": self.result.loss}
        )

    def status(self) -> str:
        """For progress bars."""
        share = 1 - self.evaluating / max(self.seconds, 1e-9)
        return f"loss {self.result.loss:.2e}, optimizer {share:.0%}"

    @torch.no_grad()
    def finish(self) -> Result:
        """The result as of this evaluation, be it the last one or not; the network is the best."""
        for p, best in zip(self.network.parameters(), self.best, strict=True):
            p.copy_(best)
        result = self.result
        if not result.curve or result.curve[-1]["evaluation"] != self.step:
            self._record()
        result.evaluations, result.seconds = self.step, self.seconds
        result.optimizer_share = 1 - self.evaluating / max(self.seconds, 1e-9)
        result.relative_error = self.task.relative_error(self.network)
        if isinstance(self.optimizer, LBFGS):
            result.stats = self.optimizer.stats()
        return result
