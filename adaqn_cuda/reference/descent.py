"""How parameters descend along a direction, and the whole step where there are no pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..state.layout import state_dtype
from .acceptance import count_step, measure_gradient, step_is_accepted
from .averages import averages_of_each, blend, clip_factor, diagonal_root, runs_of
from .flat import flatten, gradient_vector, presence, write_back


def diagonal_step(
    params: list[Tensor],
    grads: list[Tensor | None],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    maximize: bool,
    max_grad_norm: float,
    betas: list[float],
    keeps: list[float],
    adds: list[float],
    epsilons: list[float],
    correct_bias: bool,
    group_sizes: list[int],
    lr: list[float],
    weight_decay: list[float],
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
    momentum: Tensor | None,
    accumulator: Tensor | None,
    projections: Tensor,
    counters: Tensor,
) -> None:
    """A whole step without pairs: w = (1 - lr weight_decay) w - lr D q, in one pass after another.

    D = 1 without an accumulator.  Of ``projections`` there are only the flags.
    """
    g = gradient_vector(params, grads, state_dtype(params), grad_scale, maximize)
    measure_gradient(g, found_inf, projections)
    accepted, here = step_is_accepted(projections, counters), presence(params, grads)
    g = g * clip_factor(projections, max_grad_norm)
    runs = runs_of(params, averages_of_each(group_sizes, betas, keeps, adds, epsilons))
    p = blend(g, momentum, counters, runs, accepted, here)
    if accumulator is not None:
        p = p / diagonal_root(g, accumulator, counters, runs, correct_bias, accepted, here)
    rates = (group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor)
    descend(params, flatten(params, p.dtype), p, accepted & here, *rates)
    count_step(counters, projections, accepted, fisher_size=1)


def descend(
    params: list[Tensor],
    w: Tensor,
    p: Tensor,
    moves: Tensor,
    group_sizes: list[int],
    lr: list[float],
    weight_decay: list[float],
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
) -> None:
    """w = (1 - lr weight_decay) w - lr p, group by group, for elements of which ``moves`` is true.

    ``w`` are the parameters.
    """
    rates = by_group(lr, lr_tensor)
    decays = by_group(weight_decay, weight_decay_tensor)
    numels = group_numels(params, group_sizes)
    stepped = [
        (1 - rate * decay) * w_k - rate * p_k
        for w_k, p_k, rate, decay in zip(
            w.split(numels), p.split(numels), rates, decays, strict=True
        )
    ]
    write_back(params, torch.where(moves, torch.cat(stepped), w))


def by_group(values: list[float], tensor: Tensor | None) -> Sequence[Any]:
    """A number for each group; the tensor, where given, takes precedence."""
    return values if tensor is None else tensor.unbind()


def group_numels(params: list[Tensor], group_sizes: list[int]) -> list[int]:
    """Scalars in each run of ``group_sizes[k]`` parameters."""
    numels = iter([p.numel() for p in params])
    return [sum(islice(numels, size)) for size in group_sizes]
