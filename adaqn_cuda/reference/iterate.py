"""The averaged iterate, at which a pair update looks at the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state.layout import Counter
from .acceptance import step_is_accepted
from .flat import flatten, write_back


def average(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``; ``total`` where ``count`` is zero."""
    return total / count.clamp(min=1).to(total.dtype)


def iterate_swap(
    params: list[Tensor],
    iterate_sum: Tensor,
    projections: Tensor,
    counters: Tensor,
    saved: Tensor,
) -> None:
    """Set the parameters aside in ``saved`` and put the averaged iterate w_n in their place.

    Called between pass 1 and pass 2 of a pair update's step, so that a monitor that raises finds
    nothing changed: w_n counts the current iterate if its step is going to be accepted.  Without
    any iterate the parameters stay.
    """
    accepted = step_is_accepted(projections, counters)
    w = flatten(params, saved.dtype)
    saved.copy_(w)
    count = counters[Counter.ITERATES] + accepted.long()
    w_n = average(torch.where(accepted, iterate_sum + w, iterate_sum), count)
    write_back(params, torch.where(count > 0, w_n, w))


def iterate_restore(params: list[Tensor], saved: Tensor) -> None:
    """Undo :func:`iterate_swap`, to the bit."""
    write_back(params, saved)
