"""SOAP: Adam in the eigenbases of Shampoo's factors.

Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024, algorithm 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .matrices import PerMatrix, averaged, gram


class SOAP(PerMatrix):
    """For a matrix with gradient G::

        r = Q_L^T G Q_R
        m = beta1 m + (1 - beta1) G         v = beta2 v + (1 - beta2) r*r
        w = w - lr Q_L [(Q_L^T m Q_R) / (sqrt(v) + eps)] Q_R^T
        L = beta2 L + (1 - beta2) G G^T     R = beta2 R + (1 - beta2) G^T G
        every ``interval`` steps: Q = the Q of a QR decomposition of L Q, and of R Q

    The first gradient only begins L and R and the bases.  Vectors, and sides longer than
    ``max_side``, have no basis; with neither basis this is Adam.

    Args:
        params, lr: as for every optimizer.
        betas: decay of m, and of v, L and R.
        eps: added to the root of v.
        interval: steps between two updates of the bases.
        max_side: longest side with a basis.
        blocks: see :class:`PerMatrix`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        interval: int = 10,
        max_side: int = 10_000,
        blocks: Mapping[Tensor, int] | None = None,
    ) -> None:
        options = dict(lr=lr, betas=betas, eps=eps, interval=interval, max_side=max_side)
        super().__init__(params, options, blocks)

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        (beta1, beta2), steps = group["betas"], state["step"] - 1
        if steps == 0:
            begin(state, g, beta2, group["max_side"])
            return torch.zeros_like(g)
        bases = state["bases"]
        m = averaged(state, "m", g, beta1, steps)
        v = averaged(state, "v", rotated(g, bases).square(), beta2, steps)
        direction = rotated_back(rotated(m, bases) / (v.sqrt() + group["eps"]), bases)
        for axis, factor in state["factors"].items():
            factor.lerp_(gram(g, axis), 1 - beta2)
        if steps % group["interval"] == 0:
            refresh(state)
        return direction


def begin(state: dict[str, Any], g: Tensor, decay: float, max_side: int) -> None:
    """L, R and their eigenbases, by axis, from a first gradient."""
    axes = [axis for axis, side in enumerate(g.shape) if g.ndim == 2 and 1 < side <= max_side]
    state["factors"] = {axis: (1 - decay) * gram(g, axis) for axis in axes}
    state["bases"] = {
        axis: torch.linalg.eigh(factor).eigenvectors.flip(-1)
        for axis, factor in state["factors"].items()
    }


def refresh(state: dict[str, Any]) -> None:
    """An orthogonal iteration of every basis, from the largest Rayleigh quotient on; v follows."""
    for axis, factor in state["factors"].items():
        basis = state["bases"][axis]
        order = (basis * (factor @ basis)).sum(0).argsort(descending=True)
        state["bases"][axis] = torch.linalg.qr(factor @ basis[:, order]).Q
        state["v"] = state["v"].index_select(axis, order)


def rotated(x: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """Q_L^T x Q_R."""
    x = bases[0].T @ x if 0 in bases else x
    return x @ bases[1] if 1 in bases else x


def rotated_back(x: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """Q_L x Q_R^T."""
    x = bases[0] @ x if 0 in bases else x
    return x @ bases[1].T if 1 in bases else x
