"""Averages of gradients: clipping, momentum with look-ahead, outliers, and the diagonal v."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Counter, Flag


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
    g: Tensor, momentum: Tensor | None, counters: Tensor, beta: float, here: Tensor | bool
) -> Tensor:
    """q of :func:`look_ahead`, where ``momentum`` has g in it already; zero if not ``here``."""
    if momentum is None:
        return g
    ahead, now = look_ahead(counters, beta)
    q = ahead * momentum + now * g
    return torch.where(here, q, 0.0) if isinstance(here, Tensor) else q


def blend(
    g: Tensor,
    momentum: Tensor | None,
    counters: Tensor,
    beta: float,
    accepted: Tensor,
    here: Tensor | bool,
) -> Tensor:
    """q of :func:`look_ahead`, with the new momentum, which is kept if the step is accepted.

    Elements that are not ``here`` keep their momentum, and have no q.
    """
    if momentum is None:
        return g
    of_m, of_g = old_and_new(counters, beta)
    q = of_m * momentum + of_g * g
    momentum.copy_(torch.where(accepted & here, beta * momentum + (1 - beta) * g, momentum))
    return torch.where(here, q, 0.0) if isinstance(here, Tensor) else q


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
    keep: float,
    add: float,
    eps: float,
    correction: Tensor,
    accepted: Tensor,
    here: Tensor | bool,
) -> Tensor:
    """1 / D = sqrt(correction v + eps) with v = keep v + add g^2, kept if the step is accepted.

    Elements that are not ``here`` keep their v.
    """
    v = keep * accumulator + add * g * g
    v = torch.where(here, v, accumulator) if isinstance(here, Tensor) else v
    accumulator.copy_(torch.where(accepted, v, accumulator))
    return torch.sqrt(correction * v + eps)
