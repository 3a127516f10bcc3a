"""What a step of each optimizer costs on a model of the user's: :class:`Config` in, rows out."""

from __future__ import annotations

import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import lcm, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import AdaQN, capture, rnn_blocks
from .data import DataError
from .models import KINDS, RecurrentLM

#: Step length: small enough that parameters stay where they are, however long it takes.
LR = 1e-9
#: Symbols of the recurrent models.
VOCABULARY = 128
#: Steps of a round, at least.
SHORTEST = 10
#: Steps of each optimizer before the clock starts: the first allocate, and differ from the others.
WARM_UP = 12

#: Parameters, and the row blocks of some.
Maker = Callable[[list[nn.Parameter], dict[nn.Parameter, Any]], Optimizer]


def _ours(**options: Any) -> Maker:
    return lambda params, blocks: AdaQN(params, lr=LR, blocks=blocks, **options)


def _torch(kind: Any, **options: Any) -> Maker:
    return lambda params, _: kind(params, lr=LR, **options)


#: Optimizers by name; of those that torch has in several forms, the fastest one there is.
MAKERS: dict[str, Maker] = {
    "adaqn": _ours(),
    "adaqn-pairs": _ours(history_size=10),
    "adaqn-rmsprop": _ours(init="rmsprop"),
    "adam": _torch(torch.optim.Adam, fused=True),
    "adamw": _torch(torch.optim.AdamW, fused=True),
    "adagrad": _torch(torch.optim.Adagrad),
    "nadam": _torch(torch.optim.NAdam),
    "rmsprop": _torch(torch.optim.RMSprop),
    "sgd": _torch(torch.optim.SGD, momentum=0.9, fused=True),
}
DEFAULT = ("adaqn", "adaqn-pairs", "adam", "nadam", "rmsprop")


@dataclass(frozen=True)
class Config:
    """Everything that determines a measurement.

    Args:
        model: kind of a recurrent model of the demo, or ``module:function``, of which the function
            returns a module.
        sizes: shapes of parameters, instead of a model.
        optimizers: names in :data:`MAKERS`.
        against: the one that the others are compared with.
        rounds: times that each optimizer is measured, in turn.
        hidden: width of a recurrent model.
        dtype: of the parameters.
        device: a device of torch.
    """

    model: str = "lstm"
    sizes: tuple[tuple[int, ...], ...] = ()
    optimizers: tuple[str, ...] = DEFAULT
    against: str = "adam"
    rounds: int = 15
    hidden: int = 256
    dtype: str = "float32"
    device: str = "cpu"


@dataclass
class Row:
    """One optimizer, in microseconds per step.

    Args:
        name: of the optimizer.
        rounds: mean of the steps of each round.
        steps: steps of a round: a whole period of what an optimizer does in turns.
        worst: median over the rounds of the longest step, each of which the clock waits for.
        state: bytes of state per parameter.
    """

    name: str
    steps: int
    state: float
    rounds: list[float] = field(default_factory=list)
    longest: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile of the rounds."""
        if len(self.rounds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    @property
    def worst(self) -> float:
        return statistics.median(self.longest)

    def ratio_to(self, other: Row) -> float:
        """Median over the rounds of the ratio within a round, which noise touches alike."""
        return statistics.median(
            own / its for own, its in zip(self.rounds, other.rounds, strict=False)
        )

    def record(self) -> dict[str, Any]:
        low, high = self.spread
        return {
            **asdict(self), "median": self.median, "quartiles": [low, high], "worst": self.worst
        }  # fmt: skip


class Bench:
    """A measurement, round by round.

    Args:
        config: what to measure.
        on_step: called after each optimizer's turn with the measurement, for progress bars.

    Raises:
        DataError: there is no such model, or no room for it.
    """

    def __init__(self, config: Config, on_step: Callable[[Bench], None] | None = None) -> None:
        self.config, self.on_step = config, on_step
        self.device = torch.device(config.device)
        self.shapes, self.blocks = _parameters_of(config)
        self.step, self.seconds = 0, 0.0
        self.rows: list[Row] = []
        self._turns: list[tuple[Row, Optimizer]] = []
        for name in config.optimizers:
            self._add(name)

    @property
    def numel(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def total(self) -> int:
        """Turns in all rounds."""
        return self.config.rounds * len(self.config.optimizers)

    def _add(self, name: str) -> None:
        generator = torch.Generator(device=self.device).manual_seed(0)
        dtype = getattr(torch, self.config.dtype)
        try:
            params = [self._draw(shape, dtype, generator) for shape in self.shapes]
            optimizer = MAKERS[name](params, {params[i]: n for i, n in self.blocks.items()})
            for _ in range(WARM_UP):
                optimizer.step()
        except (RuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"--optimizers {name}: {reason}") from error
        tensors = [t for state in optimizer.state.values() for t in state.values()]
        storages = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes()
            for t in tensors
            if isinstance(t, Tensor)
        }
        row = Row(name, _period(optimizer), sum(storages.values()) / max(self.numel, 1))
        self.rows.append(row)
        self._turns.append((row, optimizer))

    def _draw(
        self, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator
    ) -> nn.Parameter:
        def normal() -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(dtype)

        p = nn.Parameter(normal())
        p.grad = normal()
        return p

    def run(self) -> list[Row]:
        """All rounds; in each, every optimizer has its turn."""
        for _ in range(self.config.rounds):
            for row, optimizer in self._turns:
                self._measure(row, optimizer)
                self.step += 1
                if self.on_step is not None:
                    self.on_step(self)
        return self.rows

    def measured(self) -> list[Row]:
        """The rows of which there is anything."""
        return [row for row in self.rows if row.rounds]

    def _measure(self, row: Row, optimizer: Optimizer) -> None:
        began = time.perf_counter()
        gc.disable()  # as timeit does
        try:
            row.rounds.append(self._time(optimizer, row.steps) / row.steps)
            row.longest.append(max(self._time(optimizer, 1) for _ in range(row.steps)))
        finally:
            gc.enable()
        self.seconds += time.perf_counter() - began

    def _time(self, optimizer: Optimizer, steps: int) -> float:
        """Microseconds of so many steps, the device's share included."""
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        self._wait()
        return 1e6 * (time.perf_counter() - began)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def record(self) -> dict[str, Any]:
        """All of it, for a file."""
        rows = [row.record() for row in self.measured()]
        threads = torch.get_num_threads()
        return {
            "config": asdict(self.config), "parameters": self.numel, "tensors": len(self.shapes),
            "threads": threads, "rows": rows,
        }  # fmt: skip

    def status(self) -> str:
        """For progress bars."""
        return ", ".join(f"{row.name} {row.median:.0f} us" for row in self.measured())


def _period(optimizer: Optimizer) -> int:
    """A multiple of the steps after which what an optimizer does in turns comes again."""
    if not isinstance(optimizer, AdaQN):
        return SHORTEST
    return lcm(SHORTEST, capture.period(optimizer.defaults, factored=True))


def _parameters_of(config: Config) -> tuple[list[tuple[int, ...]], dict[int, Any]]:
    """Shapes of the parameters, and the row blocks of some, by index."""
    if config.sizes:
        return list(config.sizes), {}
    with torch.device("meta"):
        if config.model in KINDS:
            model: Any = RecurrentLM(config.model, VOCABULARY, config.hidden, 1)
        else:
            model = _model_of(config.model)
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise DataError(f"--model {config.model}: it has no parameters to train; name another")
    known = rnn_blocks(model)
    blocks = {i: known[p] for i, p in enumerate(params) if p in known}
    return [tuple(p.shape) for p in params], blocks


def _model_of(name: str) -> nn.Module:
    """What ``module:function`` returns."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise DataError(
            f"--model {name}: expected one of {', '.join(KINDS)}, or MODULE:FUNCTION, as in "
            "torchvision.models:resnet50"
        )
    sys.path.insert(0, "")  # modules in the current folder, as for python itself
    try:
        model = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever a stranger's code raises
        raise DataError(f"--model {name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise DataError(f"--model {name}: expected it to return a module, got {model!r}")
    return model
