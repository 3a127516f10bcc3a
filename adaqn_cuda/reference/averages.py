"""Averages of gradients: clipping, momentum with look-ahead, outliers, and the diagonal v."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..state.layout import Counter, Flag


class Averages(NamedTuple):
    """How gradients are averaged: m = beta m + (1 - beta) g;  v = keep v + add g^2.

    1 / D = sqrt(correction v + eps).
    """

    beta: float
    keep: float
    add: float
    eps: float


def averages_of_each(group_sizes: Sequence[int], *numbers: Sequence[float]) -> list[Averages]:
    """Per parameter, those of its group, of which ``numbers`` holds the fields."""
    groups = map(Averages, *numbers)
    return list(chain.from_iterable(map(repeat, groups, group_sizes)))


class Run(NamedTuple):
    """Successive elements of the flat vectors whose averages are the same."""

    size: int
    own: Averages


def runs_of(params: list[Tensor], each: list[Averages]) -> list[Run]:
    """The runs that make up the flat vectors; one, where all ``each`` are the same."""
    sized = groupby(zip(params, each, strict=True), lambda pair: pair[1])
    return [Run(sum(p.numel() for p, _ in pairs), own) for own, pairs in sized]


def by_run(runs: list[Run], *vectors: Any) -> Iterator[tuple[Any, ...]]:
    """Each run's averages, and its parts of the vectors; what is no vector is the same for all."""
    sizes = [run.size for run in runs]
    parts = (
        x.split(sizes) if isinstance(x, Tensor) and x.dim() else repeat(x, len(runs))
        for x in vectors
    )
    return zip((run.own for run in runs), *parts, strict=True)


def joined(pieces: list[Tensor]) -> Tensor:
    """One vector of what each run has come to."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def clip_factor(projections: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, max_grad_norm / |g|), as torch.nn.utils.clip_grad_norm_ has it."""
    norm = projections[Flag.SQUARE].sqrt()
    return torch.where(norm > max_grad_norm, max_grad_norm / norm, 1.0)


def look_ahead(counters: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Weights of the new momentum and of g in q, before an accepted step is counted.

    q = beta m_t / (1 - beta^(t+1)) + (1 - beta) g / (1 - beta^t) at the t-th accepted step: the
    bias-corrected momentum as it will be one step later, if the same gradient comes again
    (Nesterov's look-ahead; Dozat, "Incorporating Nesterov Momentum into Adam", 2016).
    """
    t = (counters[Counter.ACCEPTED] + 1).double()
    return beta / (1 - beta ** (t + 1)), (1 - beta) / (1 - beta**t)


def old_and_new(counters: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Weights of the old momentum and of g in the same q:  m_t = beta m_(t-1) + (1 - beta) g."""
    ahead, now = look_ahead(counters, beta)
    return ahead * beta, ahead * (1 - beta) + now


def look_ahead_from_new(
    g: Tensor, momentum: Tensor | None, counters: Tensor, runs: list[Run], here: Tensor | bool
) -> Tensor:
    """q of :func:`look_ahead`, where ``momentum`` has g in it already; zero if not ``here``."""
    return _weighed(look_ahead, g, momentum, counters, runs, here)


def look_ahead_from_old(
    g: Tensor, momentum: Tensor | None, counters: Tensor, runs: list[Run], here: Tensor | bool
) -> Tensor:
    """The same, where ``momentum`` does not have g in it yet."""
    return _weighed(old_and_new, g, momentum, counters, runs, here)


def _weighed(
    weights: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    g: Tensor,
    momentum: Tensor | None,
    counters: Tensor,
    runs: list[Run],
    here: Tensor | bool,
) -> Tensor:
    """The momentum and g, with each run's ``weights``; g alone without momentum."""
    if momentum is None:
        return g
    parts = []
    for own, g_k, m in by_run(runs, g, momentum):
        of_m, of_g = weights(counters, own.beta)
        parts.append(of_m * m + of_g * g_k)
    return where_here(here, joined(parts))


def where_here(here: Tensor | bool, q: Tensor) -> Tensor:
    """``q``, but zero for elements that are not ``here``."""
    return torch.where(here, q, 0.0) if isinstance(here, Tensor) else q


def blend(
    g: Tensor,
    momentum: Tensor | None,
    counters: Tensor,
    runs: list[Run],
    accepted: Tensor,
    here: Tensor | bool,
) -> Tensor:
    """q of :func:`look_ahead`, with the new momentum, which is kept if the step is accepted.

    Elements that are not ``here`` keep their momentum, and have no q.
    """
    q = look_ahead_from_old(g, momentum, counters, runs, here)
    if momentum is not None:
        for own, g_k, m, here_k in by_run(runs, g, momentum, here):
            m.copy_(torch.where(accepted & here_k, own.beta * m + (1 - own.beta) * g_k, m))
    return q


#: Multiple of the root of the average |g|^2 beyond which a gradient is an outlier.
OUTLIER = 1e3


def surplus(projections: Tensor, mean_square: Tensor) -> Tensor:
    """max(1, |g| / (OUTLIER sqrt(mean_square))); 1 while there is no average.

    In an eigenbasis one large entry enters v everywhere, and would hold up all of a block for as
    long as v remembers it.
    """
    norm, limit = projections[Flag.SQUARE].sqrt(), OUTLIER * mean_square.sqrt()
    outlier = (limit > 0) & (norm > limit) & norm.isfinite()  # else it is clipped to zero
    most = 2.0**126  # float32 holds it, and the average follows
    return torch.where(outlier, (norm / limit).clamp(max=most), 1.0)


def divide_gradient(
    projections: Tensor,
    moments: Tensor,
    counters: Tensor,
    beta: float,
    max_grad_norm: float,
    divisor: Tensor,
) -> None:
    """Make of the outcome of pass 1 what it is for the gradient divided by ``divisor``."""
    slots = len(moments)
    clip = clip_factor(projections, max_grad_norm)
    projections[Flag.SQUARE] /= divisor * divisor
    factor = clip_factor(projections, max_grad_norm) / (divisor * clip)
    of_m, _ = old_and_new(counters, beta)
    of_momentum = of_m * moments
    divided = of_momentum + factor * (projections[:slots] - of_momentum)
    projections[:slots] = torch.where(divisor > 1, divided, projections[:slots])


def bias_correction(counters: Tensor, keep: float, enabled: bool, pending: int = 1) -> Tensor:
    """1 / (1 - keep^t), by which an average v that began at zero is too small; 1 for a sum.

    ``pending`` is 1 before an accepted step is counted, and 0 after.
    """
    t = (counters[Counter.ACCEPTED] + pending).double()
    if not enabled or keep == 1:
        return torch.ones_like(t)
    return 1 / (1 - keep ** t.clamp(min=1))


def diagonal_root(
    g: Tensor,
    accumulator: Tensor,
    counters: Tensor,
    runs: list[Run],
    correct_bias: bool,
    accepted: Tensor,
    here: Tensor | bool,
) -> Tensor:
    """1 / D = sqrt(correction v + eps) with v = keep v + add g^2, kept if the step is accepted.

    Elements that are not ``here`` keep their v.
    """
    roots = []
    for own, g_k, old, here_k in by_run(runs, g, accumulator, here):
        v = own.keep * old + own.add * g_k * g_k
        v = torch.where(here_k, v, old) if isinstance(here_k, Tensor) else v
        old.copy_(torch.where(accepted, v, old))
        roots.append(torch.sqrt(bias_correction(counters, own.keep, correct_bias) * v + own.eps))
    return joined(roots)


def settled_root(
    accumulator: Tensor, counters: Tensor, runs: list[Run], correct_bias: bool
) -> Tensor:
    """1 / D with v as it is, once the step has been counted."""
    return joined(
        [
            torch.sqrt(bias_correction(counters, own.keep, correct_bias, pending=0) * v + own.eps)
            for own, v in by_run(runs, accumulator)
        ]
    )
