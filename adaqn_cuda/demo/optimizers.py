"""Optimizers by name, with the step lengths that suit the demo's models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .. import PAPER, AdaQN, rnn_blocks

#: Default lr of each optimizer.
DEFAULT_LR = {
    "adaqn": 0.01,
    "adam": 0.005,
    "nadam": 0.005,
    "rmsprop": 0.003,
    "adagrad": 0.05,
    "sgd": 1.0,
    "lbfgs": 1.0,
}
#: Lower ones for the IRNN, whose state overflows at the first steps of the others if it is wide.
IRNN_LR = {"adagrad": 0.02}
NAMES = tuple(DEFAULT_LR)

#: What ``--preset`` selects for adaqn.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "pairs": {"history_size": 10},
    "paper": PAPER,
}


def default_lr(name: str, model: str) -> float:
    """Peak lr of the optimizer ``name`` on a model of that kind."""
    lower = IRNN_LR if model == "irnn" else {}
    return lower.get(name, DEFAULT_LR[name])


def make_optimizer(name: str, model: nn.Module, lr: float, adaqn: dict[str, Any]) -> Optimizer:
    """The optimizer called ``name``; ``adaqn`` holds options for that one only."""
    params = model.parameters()
    makers: dict[str, Callable[[], Optimizer]] = {
        "adaqn": lambda: AdaQN(params, blocks=rnn_blocks(model), **{**adaqn, "lr": lr}),
        "adam": lambda: torch.optim.Adam(params, lr=lr),
        "nadam": lambda: torch.optim.NAdam(params, lr=lr),
        "rmsprop": lambda: torch.optim.RMSprop(params, lr=lr),
        "adagrad": lambda: torch.optim.Adagrad(params, lr=lr),
        "sgd": lambda: torch.optim.SGD(params, lr=lr, momentum=0.9),
        # history from other batches gives steps that only a line search on this one can trust
        "lbfgs": lambda: torch.optim.LBFGS(
            params, lr=lr, max_iter=4, history_size=10, line_search_fn="strong_wolfe"
        ),
    }
    return makers[name]()
