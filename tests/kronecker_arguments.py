"""Arguments for the operations of the Kronecker matrix, with guards around every buffer."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from kernel_problems import F64, Case, Problem, bits
from torch import Tensor

from adaqn_cuda.state.plan import Cut, Plan


@dataclass(frozen=True)
class Blocks(Case):
    """What a problem looks like; ``numels`` follow from ``shapes``.

    Args:
        shapes: of the parameters.
        heights: rows of the matrices of some parameters, by index.
        block_size: longest piece of a side.
        longest_vector: that has a factor.
        call, interval: see :mod:`adaqn_cuda.reference.kronecker`.
        pending: 1 before a step is counted, 0 after.
        inverse: whether H0^-1 is applied.
        mean_square: the average of |g|^2.
    """

    shapes: tuple[tuple[int, ...], ...] = ((12, 10),)
    heights: tuple[tuple[int, tuple[int, ...]], ...] = ()
    block_size: int | None = 64
    longest_vector: int = 20
    call: int = 20
    interval: int = 3
    pending: int = 1
    inverse: bool = False
    mean_square: float = 100.0
    history_size: int = 0
    pairs: int = 0
    oldest: int = 0
    fisher_size: int = 0
    gradients: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "numels", tuple(map(prod, self.shapes)))

    def plan(self) -> Plan:
        heights = dict(self.heights)
        cuts = [
            Cut(heights.get(i, shape[:1] or (1,)), self.block_size)
            for i, shape in enumerate(self.shapes)
        ]
        return Plan([torch.Size(shape) for shape in self.shapes], cuts, self.longest_vector)


class BlocksProblem(Problem):
    """The arguments of the three operations by their schema's names, on ``device``."""

    def __init__(self, case: Blocks, device: str = "cpu") -> None:
        super().__init__(case, device)
        plan = self.plan = case.plan()
        factors, bases = self.draw(plan.factors), self.draw(plan.factors)
        for place, side in plan.squares():
            square = slice(place, place + side**2)
            factor, basis = self.factor_and_basis(side)
            factors[square], bases[square] = factor.reshape(-1), basis.reshape(-1)
        self.values.update(
            {name: getattr(case, name) for name in ("call", "interval", "pending", "inverse")},
            table=plan.table,
            factors=self.guarded(factors, self.vector),
            bases=self.guarded(bases, self.vector),
            square=self.guarded(torch.full((1,), case.mean_square), F64),
            x=self.guarded(self.draw(self.total()), self.vector),
        )

    def factor_and_basis(self, side: int) -> tuple[Tensor, Tensor]:
        """A factor whose eigenvalues are far apart, and an orthogonal matrix whose columns are near
        its eigenvectors, out of order."""
        basis = torch.linalg.qr(self.draw(side, side))[0]
        values = torch.logspace(0.5, -0.5, side, dtype=F64, device=self.device)
        near = torch.linalg.qr(basis + 0.1 / side * self.draw(side, side))[0]
        return (basis * values) @ basis.mT, near[:, self.draw(side).argsort()]

    def squares(self, name: str) -> list[Tensor]:
        """All factors, or all bases."""
        flat = self[name]
        return [
            flat[place : place + side**2].view(side, side) for place, side in self.plan.squares()
        ]

    def set_factors(self, factor) -> None:
        """Every factor is what ``factor(side)`` gives, and every basis the identity."""
        for own, basis in zip(self.squares("factors"), self.squares("bases"), strict=True):
            own.copy_(factor(len(own)))
            basis.copy_(torch.eye(len(own)))

    def persistent(self) -> list[Tensor]:
        return [*super().persistent(), *(bits(self[x]) for x in ("factors", "bases", "square"))]

    def at_rest(self) -> list[Tensor]:
        spans = [self.plan.spans[i] for i in self.case.standing()]
        own = [bits(self[name][span]) for name in ("factors", "bases") for span in spans]
        return [*super().at_rest(), *own]
