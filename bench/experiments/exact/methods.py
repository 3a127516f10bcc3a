"""The methods of the second record: with a line search, and, at a tuned lr, without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaqn_cuda.lbfgs import DETERMINISTIC, LBFGS

from ..methods import Method, adaqn, plain
from ..peers import SOAP, Dense
from ..problem import Problem

#: More iterations, or evaluations, than any budget allows.
ENDLESS = 10**9
_WOLFE = dict(line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0)


def endless(optimizer: Callable[..., Any]) -> Callable[[Problem, float, dict[str, Any]], Any]:
    """Builds an L-BFGS that goes on until the closure ends it."""

    def make(problem: Problem, lr: float, options: dict[str, Any]) -> Any:
        limits = {"max_iter": ENDLESS, "max_eval": ENDLESS}
        return optimizer(problem.model.parameters(), lr=lr, **limits, **options)

    return make


class Relay:
    """Adam for a share of the evaluations, then L-BFGS.

    Args:
        problem: what to solve.
        lr: of Adam, falling linearly to zero.
        options: ``share`` and ``budget``; the rest is for L-BFGS.
    """

    def __init__(self, problem: Problem, lr: float, options: dict[str, Any]) -> None:
        options = dict(options)
        self.lr, self.begun = lr, False
        self.first_steps = max(1, round(options.pop("share") * options.pop("budget")))
        self.first = torch.optim.Adam(problem.model.parameters(), lr=lr)
        self.second = endless(torch.optim.LBFGS)(problem, 1.0, options)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.second.param_groups

    @property
    def state(self) -> dict[Any, Any]:
        return self.second.state

    def zero_grad(self) -> None:
        self.second.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        if not self.begun:
            self.begun = True
            for step in range(self.first_steps):
                closure()
                self.first.param_groups[0]["lr"] = self.lr * (1 - step / self.first_steps)
                self.first.step()
        return self.second.step(closure)


def searched(name: str, make: Any, options: dict[str, Any], **flags: Any) -> Method:
    """A method that finds the length of its steps; lr is what it tries first, 1 unless given."""
    flags = {"lr": 1.0, **flags}
    return Method(name, make, options, {}, schedule="constant", closure=True, **flags)


def tuned(name: str, make: Any, options: dict[str, Any], centre: float, **flags: Any) -> Method:
    """A method that needs its lr tuned, from three points on."""
    centres = {"deterministic": centre, "classification": 10 * centre}
    return Method(name, make, options, centres, **{"points": 3, **flags})


_OTHERS = [
    searched("lbfgs-10", endless(torch.optim.LBFGS), {"history_size": 10, **_WOLFE}),
    searched("lbfgs-100", endless(torch.optim.LBFGS), {"history_size": 100, **_WOLFE}),
    tuned(
        "adam, lbfgs-100", Relay,
        {"history_size": 100, **_WOLFE, "share": 0.25, "needs_budget": True}, 0.01,
        closure=True, schedule="constant",
    ),
    searched("bfgs, dense", plain(Dense), {"formula": "bfgs"}),
    searched("ss-bfgs, dense", plain(Dense), {"formula": "ss-bfgs"}),
    searched("ss-broyden, dense", plain(Dense), {"formula": "ss-broyden"}),
    tuned("adam", plain(torch.optim.Adam), {}, 0.01),
    tuned("soap", plain(SOAP), {"betas": [0.95, 0.95], "interval": 10}, 0.01),
]  # fmt: skip


_PRESET = {name: value for name, value in DETERMINISTIC.items() if name != "lr"}


def _ours(name: str, options: dict[str, Any], **flags: Any) -> Method:
    flags = {"lr": DETERMINISTIC["lr"], "ours": True, **flags}
    return searched(name, endless(LBFGS), {**_PRESET, **options}, **flags)


_SCALAR = {"init": "scalar"}
_PLAIN = {"self_scaled": False}
_SEARCH = {"line_search_fn": "strong_wolfe"}

#: The preset first; then one thing changed at a time.
_OURS = [
    _ours("k-ss", {}),
    _ours("k-ss, 500 pairs", {"history_size": 500}),
    _ours("k-ss, 100 pairs", {"history_size": 100}),
    _ours("k-ss, wolfe", _SEARCH),
    _ours("k-ss, wolfe, 100 pairs", {**_SEARCH, "history_size": 100}),
    _ours("k, wolfe", {**_SEARCH, **_PLAIN}),
    _ours("k, wolfe, 100 pairs", {**_SEARCH, **_PLAIN, "history_size": 100}),
    _ours("scalar-ss, wolfe", {**_SEARCH, **_SCALAR}),
    _ours("scalar, wolfe, 100 pairs", {**_SEARCH, **_SCALAR, **_PLAIN, "history_size": 100}),
    Method(
        "k alone", endless(LBFGS), {**_PRESET, "history_size": 0, "first_step": 1.0},
        {"deterministic": 0.02}, ours=True, points=3, schedule="constant", closure=True,
    ),
    tuned("adaqn", adaqn, {}, 0.01, ours=True),
    tuned("adaqn, slow", adaqn, {"momentum": 0.95, "decay": 0.95}, 0.01, ours=True),
]  # fmt: skip

METHODS: dict[str, Method] = {method.name: method for method in (*_OTHERS, *_OURS)}
#: What is also run over the long budget, by those who ask for the main ones.
MAIN = (
    "lbfgs-100", "adam, lbfgs-100", "ss-bfgs, dense", "ss-broyden, dense", "soap", "k-ss",
    "k-ss, wolfe", "adaqn, slow",
)  # fmt: skip
