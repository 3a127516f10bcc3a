"""Distributed Shampoo: roots of two factors give the direction, Adam gives its length.

Shi et al., "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo
Optimizer for Training Neural Networks At-Scale", 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .matrices import PerMatrix, averaged, gram


class Shampoo(PerMatrix):
    """For a matrix with gradient G, all averages corrected for their bias::

        m = beta1 m + (1 - beta1) G         v = beta2 v + (1 - beta2) G*G
        L = beta2 L + (1 - beta2) G G^T     R = beta2 R + (1 - beta2) G^T G
        a = m / (sqrt(v) + graft_eps)       p = L^(-1/4) m R^(-1/4)
        w = w - lr |a| / |p| p

    A vector has one factor, the whole of its covariance, and the exponent -1/2.  Roots are taken
    every ``interval`` steps; before the first of them the direction is a.  Sides longer than
    ``max_side`` are cut, and every tile counts as a matrix.

    Args:
        params, lr: as for every optimizer.
        betas: decay of m, and of v, L and R.
        eps: added to the eigenvalues of L and R.
        graft_eps: added to the root of v.
        interval: steps between two updates of the roots.
        max_side: longest side of a tile.
        blocks: see :class:`PerMatrix`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        graft_eps: float = 1e-8,
        interval: int = 10,
        max_side: int = 1024,
        blocks: Mapping[Tensor, int] | None = None,
    ) -> None:
        options = dict(
            lr=lr, betas=betas, eps=eps, graft_eps=graft_eps, interval=interval, max_side=max_side
        )
        super().__init__(params, options, blocks)

    def cut(self, x: Tensor, count: int, group: dict[str, Any]) -> list[Tensor]:
        tiles = super().cut(x, count, group)
        for axis in range(tiles[0].ndim):
            tiles = [part for tile in tiles for part in tile.split(group["max_side"], axis)]
        return tiles

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        (beta1, beta2), steps = group["betas"], state["step"]
        m = averaged(state, "m", g, beta1, steps)
        v = averaged(state, "v", g.square(), beta2, steps)
        factors = [averaged(state, a, gram(g, a), beta2, steps) for a in range(g.ndim)]
        if steps % group["interval"] == 0:
            exponent = -1 / (2 * g.ndim)
            state["roots"] = [power(factor, exponent, group["eps"]) for factor in factors]
        adam = m / (v.sqrt() + group["graft_eps"])
        if "roots" not in state:
            return adam
        p = state["roots"][0] @ m
        p = p @ state["roots"][1] if g.ndim == 2 else p
        return p * (adam.norm() / p.norm().clamp(min=torch.finfo(p.dtype).tiny))


def power(matrix: Tensor, exponent: float, eps: float) -> Tensor:
    """(A + eps I)^exponent of a symmetric matrix whose negative eigenvalues are rounding errors."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values - values[0].clamp(max=0) + eps
    return vectors * values.pow(exponent) @ vectors.T
