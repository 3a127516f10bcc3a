"""Optimizers that between them switch on every option, for what must hold of all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaqn_cuda import AdaQN
from adaqn_cuda.options import CHECKS

#: Options that change where a step runs or nothing, not what it does.
NO_CHANGE = ("fused", "foreach", "capturable", "differentiable")
PAIRS = dict(history_size=4, update_interval=3)

EVERY_OPTION: dict[str, dict[str, Any]] = {
    "the default": {},
    "every rate": dict(lr=0.02, weight_decay=0.1, maximize=True),
    "rmsprop": dict(init="rmsprop", decay=0.9, eps=1e-8, bias_correction=False),
    "factors": dict(block_size=16, max_vector_dim=8, factor_interval=3, max_grad_norm=2.0),
    "normalized": dict(normalize=True, block_size=16, weight_decay=0.1),
    "normalized, diagonal": dict(normalize=True, init="rmsprop"),
    "factors with pairs": dict(**PAIRS, block_size=16, factor_interval=2, max_direction=2.0),
    "pairs": dict(
        **PAIRS, init="rmsprop", fisher_size=6, min_curvature=1e-6, max_increase=1.1,
        damping=0.1, momentum=0.5, max_direction=1.5, curvature="fisher",
    ),
    "pairs in bfloat16": dict(
        **PAIRS, init="adagrad", history_dtype=torch.bfloat16, fisher_dtype=torch.bfloat16
    ),
    "scalar": dict(**PAIRS, init="scalar"),
    "gradients": dict(**PAIRS, curvature="gradients"),
    "difference": dict(**PAIRS, init="rmsprop", curvature="difference"),
    "product": dict(**PAIRS, init="rmsprop"),
}  # fmt: skip

assert set(CHECKS) - set(NO_CHANGE) <= {name for o in EVERY_OPTION.values() for name in o}


def bowl(params: list[Tensor]) -> Tensor:
    """A loss of which the curvature differs between parameters."""
    return sum(((1 + k) * p.square()).sum() for k, p in enumerate(params)) / 2


def doubled(s: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    return {p: 2 * part for p, part in s.items()}


def make_every(name: str, params: list[Tensor], **more: Any) -> AdaQN:
    """The optimizer of that name on ``params``."""
    hooks: dict[str, Callable | str] = {}
    if name == "difference":
        hooks["curvature_closure"] = partial(bowl, params)
    if name == "product":
        hooks["curvature"] = doubled
    return AdaQN(params, **{**EVERY_OPTION[name], **hooks, **more})
