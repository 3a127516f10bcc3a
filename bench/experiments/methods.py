"""The methods: how each optimizer is made, where its lr is looked for, and where it runs.

To add a setting of AdaQN, add a line to ``_OURS``; to add another optimizer, one to ``_BASELINES``
or ``_PEERS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from adaqn_cuda import PAPER, AdaQN, rnn_blocks

from .peers import SOAP, Muon, PSGDKron, Shampoo
from .problem import Problem
from .scaled import RULES, Rescaled
from .tasks import Task

#: Points of an lr grid, and the ratio of two neighbours.
POINTS, RATIO = 5, 2.5
NEVER = 10**9

#: lr that suits a task, over the one that suits the LSTM.
TASK_FACTOR = {
    "tanh": 0.4, "irnn": 0.25, "transformer": 0.4, "transformer-256": 0.25, "transformer-512": 0.25,
    "tanh-512": 0.6, "lstm-512": 1.5,
}  # fmt: skip

Make = Callable[[Problem, float, dict[str, Any]], Optimizer]


@dataclass(frozen=True)
class Method:
    """An optimizer with everything set but lr.

    Args:
        name: unique.
        make: builds the optimizer from a problem, lr and ``options``.
        options: keyword arguments of the optimizer; JSON.
        centres: middle of the lr grid, by task, or for all ``"language"`` models (for the LSTM;
            :data:`TASK_FACTOR` has the others) or ``"deterministic"`` problems.
        ours: whether it is a setting of AdaQN.
        contender: whether it is also run over shorter horizons.
        lr: given where it is not to be tuned.
        trial: whether it is only looked at on the tuning seed.
        points: of the lr grid to begin with.
        schedule: of lr on deterministic problems: ``"linear"`` or ``"constant"``.
        runs_on: says on which tasks it makes sense.
        closure: whether its step evaluates the loss itself.
    """

    name: str
    make: Make
    options: dict[str, Any]
    centres: dict[str, float]
    ours: bool = False
    contender: bool = False
    lr: float | None = None
    trial: bool = False
    points: int = POINTS
    schedule: str = "linear"
    runs_on: Callable[[Task], bool] = field(default=lambda task: True)
    closure: bool = False

    def grid(self, task: Task) -> list[float]:
        """The lr values to begin with."""
        if self.lr is not None:
            return [self.lr]
        family = "language" if task.stochastic else "deterministic"
        shifted = task.name not in self.centres and not self.trial  # trials share one grid
        factor = TASK_FACTOR.get(task.name, 1.0) if shifted else 1.0
        centre = factor * self.centres.get(task.name, self.centres.get(family, 0.01))
        return [rounded(centre * RATIO ** (i - self.points // 2)) for i in range(self.points)]

    @property
    def block_size(self) -> int | None:
        """The point that it is on the curve over block sizes, if it is on that."""
        return self.options.get("block_size")

    @property
    def timed(self) -> bool:
        """Whether its step is worth timing."""
        return not self.trial or self.block_size is not None

    def definition(self) -> dict[str, Any]:
        """All that a result depends on, as JSON."""
        return {"name": self.name, "schedule": self.schedule, **self.options}


def rounded(lr: float) -> float:
    """Three digits are enough for people to read, and make equal what should be equal."""
    return float(f"{lr:.3g}")


# ---------------------------------------------------------------------- options of the problem


def _blocks(problem: Problem) -> dict[str, Any]:
    return {"blocks": rnn_blocks(problem.model)}


def _closure(problem: Problem) -> dict[str, Any]:
    return {"curvature_closure": problem.again}


#: Options that only the problem can give, by the name that stands under ``"from_problem"``.
EXTRAS: dict[str, Callable[[Problem], dict[str, Any]]] = {"blocks": _blocks, "closure": _closure}


def completed(options: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """``options`` with those of :data:`EXTRAS` that ``from_problem`` names, in its place."""
    options = dict(options)
    for name in options.pop("from_problem", ()):
        options.update(EXTRAS[name](problem))
    return options


# ---------------------------------------------------------------------- other optimizers


def plain(optimizer: type[Optimizer]) -> Make:
    """Builds ``optimizer`` over all parameters."""

    def make(problem: Problem, lr: float, options: dict[str, Any]) -> Optimizer:
        return optimizer(problem.model.parameters(), lr=lr, **completed(options, problem))

    return make


class Together:
    """Several optimizers that act as one."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        return {p: entry for optimizer in self.optimizers for p, entry in optimizer.state.items()}

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def muon(problem: Problem, lr: float, options: dict[str, Any]) -> Together:
    """Muon for the matrices inside; Adam, at the same lr, for the rest.

    The rest is what Muon's authors leave out: vectors, embeddings and the output layer of a
    language model.  Muon's update is scaled to the size of Adam's, so that one lr suits both.
    """
    inside, outside = [], []
    for name, p in problem.model.named_parameters():
        apart = p.ndim != 2 or name.split(".")[0] in ("embedding", "position", "output")
        (outside if apart else inside).append(p)
    first = Muon(inside, lr=lr, **options)
    return Together(first, torch.optim.Adam(outside, lr=lr)) if outside else first


def has_matrices(task: Task) -> bool:
    return task.name != "least-squares"


def is_deterministic(task: Task) -> bool:
    return not task.stochastic


def has_an_embedding(task: Task) -> bool:
    return task.stochastic and (task.options["level"] == "word" or "width" in task.options)


def has_steps_of_a_length(task: Task) -> bool:
    """Towards an exact optimum, steps must shorten by themselves."""
    return task.stochastic or task.name == "pinn"


_ADAM_RATES = {"language": 0.01, "least-squares": 0.6, "regression": 0.6, "pinn": 0.0125}

_BASELINES = [
    Method("adam", plain(torch.optim.Adam), {}, _ADAM_RATES),
    Method(
        "nadam", plain(torch.optim.NAdam), {},
        {"language": 0.01, "least-squares": 0.25, "regression": 0.25, "pinn": 0.005},
    ),
    Method(
        "rmsprop", plain(torch.optim.RMSprop), {},
        {"language": 0.005, "least-squares": 0.1, "regression": 0.1, "pinn": 0.002},
    ),
    Method(
        "adagrad", plain(torch.optim.Adagrad), {},
        {"language": 0.1, "least-squares": 3.0, "regression": 3.0, "pinn": 0.02},
    ),
    Method(
        "sgd", plain(torch.optim.SGD), {"momentum": 0.9},
        {"language": 1.0, "least-squares": 1.0, "regression": 0.03, "pinn": 0.005},
    ),
    Method(
        "lbfgs", plain(torch.optim.LBFGS),
        dict(line_search_fn="strong_wolfe", history_size=20, max_iter=20, tolerance_grad=0.0,
             tolerance_change=0.0),
        {"deterministic": 0.6}, schedule="constant", runs_on=is_deterministic, closure=True,
    ),
]  # fmt: skip

#: Longest side with a factor: above all of the models' own, below a vocabulary of words, which has
#: none in the papers either.
_LONGEST = {"max_side": 2048}
#: What AdaQN's default has: short memories, fresh bases, a factor for every gate.
_OUR_SETTINGS = {"betas": [0.8, 0.98], "interval": 5, "from_problem": ["blocks"]}
_SOAP_RATES = {"language": 0.01, "least-squares": 0.6, "regression": 0.6, "pinn": 0.0125}
_SHAMPOO_RATES = {"language": 0.01, "least-squares": 0.24, "regression": 0.24, "pinn": 0.0125}

_PEERS = [
    Method(
        "muon", muon, {"momentum": 0.95, "iterations": 5},
        {"language": 0.01, "regression": 0.25, "pinn": 0.01}, runs_on=has_matrices,
    ),
    Method("soap", plain(SOAP), {"betas": [0.95, 0.95], "interval": 10, **_LONGEST}, _SOAP_RATES),
    Method("soap, our settings", plain(SOAP), {**_OUR_SETTINGS, **_LONGEST}, _SOAP_RATES),
    Method(
        "psgd-kron", plain(PSGDKron), {"momentum": 0.9, "factor_lr": 0.1, **_LONGEST},
        {"language": 0.02, "least-squares": 0.25, "regression": 0.1, "pinn": 0.01},
    ),
    Method(
        "shampoo", plain(Shampoo), {"betas": [0.9, 0.999], "interval": 10, "max_side": 1024},
        _SHAMPOO_RATES,
    ),
    Method(
        "shampoo, our settings", plain(Shampoo), {**_OUR_SETTINGS, "max_side": 1024}, _SHAMPOO_RATES
    ),
]  # fmt: skip

#: Names of the methods of AdaQN's kind.
PEERS = tuple(method.name for method in _PEERS)

# ---------------------------------------------------------------------- settings of AdaQN


def adaqn(problem: Problem, lr: float, options: dict[str, Any]) -> AdaQN:
    """AdaQN with ``options``.

    Two of them are not its own: ``preset="PAPER"`` stands for the authors' setting, and
    ``embedding`` is the initial matrix of the embedding alone.
    """
    options = completed(options, problem)
    settings = dict(PAPER) if options.pop("preset", None) == "PAPER" else {}
    apart = options.pop("embedding", None)
    settings.update(options, lr=lr)
    params = list(problem.model.parameters())
    if apart is None:
        return AdaQN(params, **settings)
    embedding = problem.model.embedding.weight
    others = [p for p in params if p is not embedding]
    return AdaQN([{"params": others}, {"params": [embedding], "init": apart}], **settings)


def rescaled(problem: Problem, lr: float, options: dict[str, Any]) -> Rescaled:
    """AdaQN with steps of another length; ``options`` names the ``rule``, too."""
    options = dict(options)
    rule = options.pop("rule")
    return Rescaled(adaqn(problem, lr, options), rule)


def _ours(
    name: str,
    options: dict[str, Any],
    centres: dict[str, float],
    contender: bool = False,
    **flags: Any,
) -> Method:
    return Method(name, adaqn, options, centres, ours=True, contender=contender, **flags)


_SMOOTH = dict(bias_correction=True, eps=1e-16)
_PAIRS = dict(history_size=10, fisher_size=16, damping=0.2, max_direction=1.0)
_NO_PAIRS = dict(history_size=0)
_KRONECKER = dict(
    init="kronecker", momentum=0.8, decay=0.98, factor_interval=5, from_problem=["blocks"],
    **_SMOOTH,
)  # fmt: skip
_DIAGONAL = dict(init="rmsprop", momentum=0.9, decay=0.99, **_SMOOTH)
_PAPER_RATES = {"language": 0.02, "least-squares": 0.03, "regression": 0.03, "pinn": 0.005}
_RATES = {"language": 0.01, "least-squares": 0.6, "regression": 0.6, "pinn": 0.005}
_QUASI_NEWTON = dict(
    init="scalar", curvature="gradients", update_interval=1, history_size=100, min_curvature=0.0,
    max_grad_norm=0.1, momentum=0.0, damping=0.0, max_direction=math.inf,
)  # fmt: skip

_OURS = [
    _ours("kronecker", {**_KRONECKER, **_NO_PAIRS}, _RATES, contender=True),
    _ours("untuned", {"from_problem": ["blocks"]}, {}, lr=0.01),
    _ours(
        "normalized", {**_KRONECKER, **_NO_PAIRS, "normalize": True},
        {"language": 0.0125, "pinn": 0.001}, runs_on=has_steps_of_a_length,
    ),
    _ours(
        "diagonal embedding", {**_KRONECKER, **_NO_PAIRS, "embedding": "rmsprop"}, _RATES,
        runs_on=has_an_embedding,
    ),
    _ours("kronecker+pairs", {**_KRONECKER, **_PAIRS}, _RATES),
    _ours("diagonal", {**_DIAGONAL, **_NO_PAIRS}, _RATES),
    _ours("diagonal+pairs", {**_DIAGONAL, **_PAIRS}, _RATES),
    _ours("paper", {"preset": "PAPER"}, _PAPER_RATES),
    _ours("paper, pairs off", {"preset": "PAPER", "update_interval": NEVER}, _PAPER_RATES),
    _ours(
        "quasi-newton", _QUASI_NEWTON, {"deterministic": 0.4}, schedule="constant",
        runs_on=is_deterministic,
    ),
]  # fmt: skip


def is_tried(task: Task) -> bool:
    """The tasks on which steps of another length are tried."""
    return task.name in (
        "pinn", "tanh", "gru", "lstm", "transformer", "transformer-256", "transformer-512",
        "tanh-512", "lstm-512",
    )  # fmt: skip


_RULE_RATES = {
    "unit": {"language": 0.005, "pinn": 0.001},
    "relative": {"language": 0.1, "pinn": 0.02},
    "trust": {"language": 0.05, "pinn": 0.01},
    "distance": {"language": 1.0, "pinn": 1.0},
}
_TRIALS = [
    Method(
        f"{rule} steps", rescaled, {**_KRONECKER, **_NO_PAIRS, "rule": rule}, _RULE_RATES[rule],
        ours=True, trial=True, runs_on=is_tried,
    )
    for rule in RULES
]  # fmt: skip

#: Sides are cut into even blocks of at most so much; the last one is longer than any side.
WHOLE = 2**16
BLOCK_SIZES = (32, 64, 128, 256, WHOLE)


def block_label(size: int) -> str:
    return "whole" if size == WHOLE else str(size)


def has_a_block_curve(task: Task) -> bool:
    return task.name in (
        "tanh", "gru", "lstm", "transformer", "transformer-256", "transformer-512"
    )  # fmt: skip


_BLOCK_RATES = {"language": 0.01, **{task: 0.01 * x for task, x in TASK_FACTOR.items()}}
_BLOCK_CURVE = [
    _ours(
        f"block-{block_label(size)}",
        {**_KRONECKER, **_NO_PAIRS, "block_size": size}, _BLOCK_RATES, trial=True, points=3,
        runs_on=has_a_block_curve,
    )
    for size in BLOCK_SIZES
]  # fmt: skip

METHODS: dict[str, Method] = {
    method.name: method for method in (*_BASELINES, *_PEERS, *_OURS, *_TRIALS, *_BLOCK_CURVE)
}
