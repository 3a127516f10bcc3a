"""L-BFGS where every process has some rows of each parameter.

What spans all parameters is a few words: slope, norms and count of the gradient at every trial;
products of a new pair and of the gradient with all pairs, y_i.r, and y.K y and the slope of a new
direction.  Every process sums over its own rows, in float64, and decides from what all of them have
come to; so all take the same steps.  The loss is the mean of what the closures return.

That is two collectives per evaluation, and three for a new direction, or four where K is a matrix;
the loss takes one for every dimension of the mesh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..search import Search
from ..state.layout import Flag, Turn, Word
from ..wolfe import NOISE
from .sharding import Shards


@dataclass(kw_only=True)
class ShardedSearch(Search):
    """One call of :meth:`LBFGS.step`, on the rows that this process has.

    Args:
        shards: how the parameters are divided.
    """

    shards: Shards

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shards.spread(self.owners)  # after an error they may be whole in no process

    def _own(self, tensor: Tensor) -> Tensor:
        return self.shards.own(tensor)

    def _measure(self, gradient: Tensor) -> None:
        super()._measure(gradient)
        self.noise = NOISE * torch.finfo(self.h.dtype).eps  # whatever the loss is here
        words = self.h.words
        self.shards.mean(words[Word.TRIAL_LOSS])
        of_each = self.shards.of_each(words[Word.TRIAL_SLOPE : Word.LOSS])
        words[Word.TRIAL_SLOPE : Word.LOSS] = of_each.sum(0)
        words[Word.TRIAL_MAX] = of_each[:, Word.TRIAL_MAX - Word.TRIAL_SLOPE].amax()

    def _move(self, step: float | None) -> None:
        super()._move(step)
        self.shards.spread(self.owners)

    def give_up(self) -> None:
        """Without sending the rows: the others may not have failed."""
        if self.moved:
            super()._move(0.0)

    # ------------------------------------------------------------------ the next direction

    def _pair(self, trial: Tensor, absolute: float, relative: float) -> None:
        """A pair of which any process has a part that is not finite, is none."""
        h = self.h
        s, y, finite = reference.put_candidate(
            trial, h.direction, h.gradient, h.s_ring, h.y_ring, h.counters, h.words
        )
        sums = reference.candidate_sums(s, y, h.gradient)
        curvature = sums[reference.Sum.S_Y]
        curvature.copy_(torch.where(finite, curvature, torch.nan))
        column, u = self._products(h.s_ring, y), self._products(h.s_ring, -h.gradient)
        column, u, sums = self._totals(column, u, sums)
        reference.judge_candidate(
            column, u, sums, absolute, relative, self.options["self_scaled"], h.gram, h.scales,
            h.projections, h.counters, h.words,
        )  # fmt: skip

    def _products(self, ring: Tensor, x: Tensor) -> Tensor:
        """x with the rows of a ring that hold pairs, zero for the others."""
        flags = x.new_zeros(len(ring) + len(Flag), dtype=torch.float64)
        flags[Flag.NONZERO] = 1.0
        found = torch.zeros_like(self.h.images)
        if self.h.history_size:
            self.op.direction_images(x, ring, self.h.counters, flags, found)
        return found[:-1]

    def _totals(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The sums of words over all shards."""
        total = self.shards.total(torch.cat(parts))
        return tuple(torch.split(total, [len(part) for part in parts]))

    def _product(self, x: Tensor, y: Tensor) -> Tensor:
        return self.shards.total(super()._product(x, y))

    def _reduce(self) -> None:
        h = self.h
        self._residual(True)
        if h.table is not None:
            self._apply(h.residual)
        if h.history_size:
            h.images[:-1] = self.shards.total(self._products(h.y_ring, h.residual))

    def _combine(self) -> None:
        """Slope and largest element of p over all shards; as before if the trial was refused."""
        words = self.h.words
        of_p = words[Word.SLOPE : Word.GAMMA]
        before = of_p.clone()
        super()._combine()
        of_each = self.shards.of_each(of_p)
        after = torch.stack([of_each[:, 0].sum(), before[1], of_each[:, 2].amax()])
        of_p.copy_(torch.where(words[Word.TURN] == Turn.REFUSE, before, after))


def search_of(shards: Shards | None, *args: Any) -> Search:
    """A search by one process, or by one of several."""
    return Search(*args) if shards is None else ShardedSearch(*args, shards=shards)
