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


#: The smallest root mean square of p that steps are normalized by: with an H0 that adapts to the
#: gradient, and with the scalar one.
LEAST_ADAPTED, LEAST = 1e-3, 1e-30


def mean_squares(params: list[Tensor], counts: list[int], p: Tensor) -> Tensor:
    """Per parameter, the sum of squares of its part of p over its number of elements, in float64.

    Args:
        counts: elements of each in all processes together, of which ``params`` are what is here.
    """
    norms = torch._foreach_norm(p.split([w.numel() for w in params]), 2, torch.float64)
    torch._foreach_div_(norms, [max(count, 1) ** 0.5 for count in counts])
    return torch.stack(norms).square()


def normalized_rates(
    rates: tuple[Any, ...], mean_squares: Tensor, adaptive: bool
) -> tuple[Any, ...]:
    """Rates of the parameters, each a group of its own, that divide p by its root mean square.

    lr over that, and weight_decay times it, so that decay stays what it is.  Where a gradient
    vanishes, ``v`` decays more slowly than the momentum and p goes to zero, as it should: so p
    counts as no shorter than :data:`LEAST_ADAPTED`.

    Args:
        rates: sizes of the groups, and their rates as :func:`descend` takes them.
        mean_squares: of p, by parameter.
        adaptive: whether H0 follows the gradient's size.
    """
    sizes, lr, decay, lr_tensor, decay_tensor = rates
    rms = mean_squares.sqrt().clamp(min=LEAST_ADAPTED if adaptive else LEAST).split(sizes)
    steps = [rate / part for rate, part in zip(by_group(lr, lr_tensor), rms, strict=True)]
    decays = [rate * part for rate, part in zip(by_group(decay, decay_tensor), rms, strict=True)]
    unused = [0.0] * len(mean_squares)
    return [1] * len(mean_squares), unused, unused, torch.cat(steps), torch.cat(decays)


def by_group(values: list[float], tensor: Tensor | None) -> Sequence[Any]:
    """A number for each group; the tensor, where given, takes precedence."""
    return values if tensor is None else tensor.unbind()


def group_numels(params: list[Tensor], group_sizes: list[int]) -> list[int]:
    """Scalars in each run of ``group_sizes[k]`` parameters."""
    numels = iter([p.numel() for p in params])
    return [sum(islice(numels, size)) for size in group_sizes]
