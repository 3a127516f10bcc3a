"""PSGD-Kron: a Kronecker-factored whitening of the gradient, found by steps of its own.

Li, "Preconditioned Stochastic Gradient Descent", 2015; Pooladzandi and Li, "Curvature-Informed SGD
via General Purpose Lie-Group Preconditioners", 2024.  Options and safeguards are those that are
common for deep networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from .matrices import PerMatrix, averaged

#: Largest root mean square of a direction.
LONGEST = 1.1
#: Share of the updates of the factors after which their sizes are made equal.
BALANCED = 0.01
#: Updates of the factors per step: 1 at first, then falling at this rate to the least.
FIRST_STEPS, FALL, LEAST = 500, 1e-3, 0.03


class PSGDKron(PerMatrix):
    """For a matrix with gradient G, and factors Q_L and Q_R that are upper triangular::

        m = momentum m + (1 - momentum) G, corrected for its bias
        A = Q_L m Q_R^T        B = Q_L^-T V Q_R^-1 with a Gaussian V
        Q_L = Q_L - factor_lr / |A A^T + B B^T| triu(A A^T - B B^T) Q_L
        Q_R = Q_R - factor_lr / |A^T A + B^T B| triu(A^T A - B^T B) Q_R
        w = w - lr Q_L^T Q_L m Q_R^T Q_R

    which is a descent on E[m P m + V P^-1 V] over P = Q^T Q.  The factor of a vector, or of a side
    longer than ``max_side``, is diagonal.

    Args:
        params, lr: as for every optimizer.
        momentum: decay of m.
        factor_lr: length of the steps of the factors, relative to their size.
        max_side: longest side with a triangular factor.
        blocks: see :class:`PerMatrix`.
        seed: of V.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-4,
        momentum: float = 0.9,
        factor_lr: float = 0.1,
        max_side: int = 8192,
        blocks: Mapping[Tensor, int] | None = None,
        seed: int = 0,
    ) -> None:
        options = dict(lr=lr, momentum=momentum, factor_lr=factor_lr, max_side=max_side)
        super().__init__(params, options, blocks)
        self.generator = torch.Generator().manual_seed(seed)

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if state["step"] == 1:
            state.update(factors=identities(g, group["max_side"]), due=0.0, updates=0)
        factors = state["factors"]
        m = averaged(state, "m", g, group["momentum"], state["step"])
        state["due"] += updates_per_step(state["step"])
        if state["due"] >= 1:
            state["due"] -= 1
            state["updates"] += 1
            noise = torch.randn(g.shape, generator=self.generator, dtype=g.dtype)
            fit(factors, m, noise.to(g.device), group["factor_lr"])
            if state["updates"] % round(1 / BALANCED) == 0:
                balance(factors)
        for axis, q in enumerate(factors):
            m = times(transposed(q), times(q, m, axis), axis)
        return m * (LONGEST / m.square().mean().sqrt()).clamp(max=1)


def updates_per_step(step: int) -> float:
    return min(1.0, max(LEAST, math.exp(-FALL * (step - FIRST_STEPS))))


def identities(g: Tensor, max_side: int) -> list[Tensor]:
    """The factors at the start, one for each axis of ``g``; diagonal ones are vectors."""
    whole = [g.ndim == 2 and side <= max_side for side in g.shape]
    ones = [g.new_ones(side) for side in g.shape]
    return [one.diag() if full else one for one, full in zip(ones, whole, strict=True)]


def fit(factors: list[Tensor], m: Tensor, noise: Tensor, rate: float) -> None:
    """A step of the factors towards the whitening of ``m``."""
    a, b = m, noise
    for axis, q in enumerate(factors):
        a, b = times(q, a, axis), divided(q, b, axis)
    for axis, q in enumerate(factors):
        aa, bb = second_moment(a, axis, q), second_moment(b, axis, q)
        if q.ndim == 1:
            q.sub_(rate / (aa + bb).max() * (aa - bb) * q)
        else:
            q.sub_(rate / norm_bound(aa + bb) * (aa - bb).triu() @ q)


def second_moment(x: Tensor, axis: int, q: Tensor) -> Tensor:
    """x x^T or x^T x, or its diagonal where ``q`` is diagonal."""
    if q.ndim == 1:
        return x.square() if x.ndim == 1 else x.square().sum(1 - axis)
    return x @ x.T if axis == 0 else x.T @ x


def norm_bound(matrix: Tensor) -> Tensor:
    """A close bound from below on the largest eigenvalue: |A x| of the longest column, scaled."""
    column = matrix[:, matrix.square().sum(0).argmax()]
    return (matrix @ (column / column.norm())).norm()


def balance(factors: list[Tensor]) -> None:
    """Make the largest entries of all factors equal, which leaves their product as it is."""
    sizes = torch.stack([q.abs().max() for q in factors])
    mean = sizes.log().mean().exp()
    for q, size in zip(factors, sizes, strict=True):
        q.mul_(mean / size)


# ---------------------------------------------------------------------- products along an axis


def transposed(q: Tensor) -> Tensor:
    return q if q.ndim == 1 else q.T


def spread(q: Tensor, x: Tensor, axis: int) -> Tensor:
    """A diagonal factor in the shape that broadcasts along ``axis`` of ``x``."""
    return q[:, None] if x.ndim == 2 and axis == 0 else q


def times(q: Tensor, x: Tensor, axis: int) -> Tensor:
    """Q x along axis 0, x Q^T along axis 1."""
    if q.ndim == 1:
        return spread(q, x, axis) * x
    return q @ x if axis == 0 else x @ q.T


def divided(q: Tensor, x: Tensor, axis: int) -> Tensor:
    """Q^-T x along axis 0, x Q^-1 along axis 1."""
    if q.ndim == 1:
        return x / spread(q, x, axis)
    if axis == 0:
        return solve_triangular(q.T, x, upper=False)
    return solve_triangular(q, x, upper=True, left=False)
