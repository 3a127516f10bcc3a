"""A call of the schedule where every process has some rows of each parameter.

What spans all parameters is a few words: counts and |g|^2 of the gradient, s_i.q, y_i.r, |H0 q|^2
and |p|^2; at a pair update F_j.s, s.B0 s and the products of the new pair.  Every process sums over
its own rows.  Between the passes, the sums of all are added up in float64, and what depends on them
is decided in every process from the same words.  That is one collective per step without pairs
(two with ``normalize``, the second one of a number for every parameter), three with them (two where
p is not capped), and two more at a pair update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..interrupts import Hold
from ..state.arena import held
from ..state.layout import Counter, Flag
from ..step import Call
from .sharding import Shards


@dataclass(kw_only=True)
class ShardedCall(Call):
    """One call of the schedule, on the rows that this process has.

    Args:
        shards: how the parameters are divided.
    """

    shards: Shards

    def run(self, hold: Hold, finish: Callable[[], None]) -> None:
        def finish_everywhere() -> None:
            self.shards.spread(self.owners)
            finish()

        super().run(hold, finish_everywhere)

    def _moving_moments(self) -> Tensor:
        a = self.a
        standing = reference.standing_moments(self.params, self.grads, a.s_ring, held(a.momentum))
        return a.moments - self.shards.total(standing)

    def _move(self, hold: Hold, moments: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self._move_in_passes(hold, moments, self.due and self.hooks.monitor is not None)

    def _measure(self, moments: Tensor) -> None:
        """u = S q: the part of S m is known everywhere, and that of S g is added up unclipped."""
        a, own, (maximize, limit) = self.a, self.settings, self._gradient_options()
        self.op.direction_pass1(
            self.params, self.grads, a.s_ring, a.counters, self.grad_scale, own.found_inf,
            maximize, inf, own.betas[0], torch.zeros_like(moments), a.projections,
        )  # fmt: skip
        self.shards.total(a.projections)
        of_m, _ = reference.old_and_new(a.counters, own.betas[0])
        of_g = a.projections[: len(moments)]
        of_g.mul_(reference.clip_factor(a.projections, limit)).add_(of_m * moments)

    def _project_by_run(self) -> None:
        super()._project_by_run()
        self.shards.total(self.a.projections[: Flag.NONFINITE])

    def _moments_anew(self) -> Tensor:
        return self.shards.total(super()._moments_anew())

    def _mean_squares(self) -> Tensor:
        return self.shards.total(super()._mean_squares())

    def _descend(self, moments: Tensor) -> None:
        if self.has_pairs:
            self.shards.total(self.a.images)
        if self._cap() < inf:
            self._descend_capped(moments)
        else:
            super()._descend(moments)

    def _descend_capped(self, moments: Tensor) -> None:
        """p, then its norm over all processes, then pass 3 along it as if there were no pairs."""
        a, beta = self.a, self.settings.betas[0]
        p, here = held(a.direction), reference.presence(self.params, self.grads)
        c = reference.forward_coefficients(a.gram, a.counters, a.projections, a.images)
        p.add_(c.to(p.dtype) @ a.s_ring.to(p.dtype))
        if isinstance(here, Tensor):
            p.copy_(torch.where(here, p, 0.0))
        square = self.shards.total(torch.linalg.vector_norm(p, dtype=torch.float64).square())
        p.mul_(reference.cap_factor(square.sqrt(), a.images, self._cap()))
        accepted = reference.step_is_accepted(a.projections, a.counters)
        reference.count_moments(moments, a.projections, a.counters, beta, accepted)
        others, counted = slice(Counter.GRADIENTS, None), a.counters.clone()
        counted[: Counter.GRADIENTS] = 0
        self.op.direction_pass3(
            self.params, self.grads, a.s_ring[:0], a.gram[:1, :0],
            a.projections[Flag.NONFINITE :], a.images[-1:], p, beta, inf, *self.settings.rates,
            max(len(a.fisher), 1), a.iterate_sum, moments[:0], counted,
        )  # fmt: skip
        a.counters[others] = counted[others]

    # ------------------------------------------------------------------ at a pair update

    def _look_from(self, saved: Tensor) -> None:
        super()._look_from(saved)
        self.shards.spread(self.owners)

    def _restore(self, saved: Tensor) -> None:
        super()._restore(saved)
        self.shards.spread(self.owners)

    def _monitored_loss(self) -> Tensor:
        """The mean over all processes, so that they decide alike."""
        return self.shards.mean(super()._monitored_loss().clone())  # which may be the user's

    def _weigh(self, explicit: bool, image: Tensor | None) -> None:
        a = self.a
        s = self._displacement()
        rows = [row.to(s.dtype) @ s for row in a.fisher]
        rows.append(s.new_zeros(()) if image is None else s @ image)
        words = self.shards.total(torch.stack(rows).double())
        s_b0_s = None if image is None else words[-1]
        reference.weigh(words[:-1], s_b0_s, a.counters, explicit, self.common["damping"], a.weights)

    def _make_pair(self, image: Tensor | None) -> None:
        """A pair of which any process has a part that is not finite, is none."""
        a, s = self.a, self._displacement()
        super()._make_pair(image)
        finite = s.isfinite().all() & a.weights.isfinite().all()
        if image is not None:
            finite = finite & image.isfinite().all()
        a.column.copy_(torch.where(finite, a.column, torch.nan))
        self.shards.total(a.column)

    def _displacement(self) -> Tensor:
        a = self.a
        return reference.displacement(held(a.iterate_sum), held(a.anchor), a.counters)


def call_of(shards: Shards | None, *args: Any) -> Call:
    """A call of the schedule by one process, or by one of several."""
    return Call(*args) if shards is None else ShardedCall(*args, shards=shards)
