"""What a gradient is like, whether its step is accepted, and what is counted then."""

from __future__ import annotations

from torch import Tensor

from ..state.layout import Counter, Flag


def measure_gradient(g: Tensor, found_inf: Tensor | None, projections: Tensor) -> None:
    """Write the words of :class:`layout.Flag`."""
    projections[Flag.NONFINITE] = (~g.isfinite()).sum()
    projections[Flag.NONZERO] = (g != 0).sum()
    projections[Flag.SQUARE] = g.double().square().sum()
    if found_inf is not None:
        projections[Flag.NONFINITE] += found_inf.reshape(())


def gradient_is_finite(projections: Tensor) -> Tensor:
    return projections[Flag.NONFINITE] == 0


def step_is_accepted(projections: Tensor, counters: Tensor) -> Tensor:
    """Whether this step may change anything that lasts.

    A non-finite gradient is dropped.  So is an all-zero gradient before any other: it carries no
    curvature, and ``torch.distributed.checkpoint`` feeds one to materialise the state.
    """
    untouched = (counters[Counter.GRADIENTS] == 0) & (counters[Counter.ANCHORED] == 0)
    blank = untouched & (projections[Flag.NONZERO] == 0)
    return gradient_is_finite(projections) & ~blank


def count_step(counters: Tensor, projections: Tensor, accepted: Tensor, fisher_size: int) -> None:
    one = accepted.long()
    counters[Counter.GRADIENTS] = (counters[Counter.GRADIENTS] + one).clamp(max=fisher_size)
    counters[Counter.NEXT_GRADIENT] = (counters[Counter.NEXT_GRADIENT] + one) % fisher_size
    counters[Counter.ITERATES] += one
    counters[Counter.ACCEPTED] += one
    counters[Counter.STEPS_SKIPPED] += (~gradient_is_finite(projections)).long()
