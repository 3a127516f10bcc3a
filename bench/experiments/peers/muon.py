"""Muon: the momentum of a matrix, its singular values made about equal.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the scale is that of
Liu et al., "Muon is Scalable for LLM Training", 2025.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .matrices import PerMatrix

#: Coefficients of the quintic iteration, and the size that its result has for one step of AdamW's.
COEFFICIENTS, SCALE = (3.4445, -4.775, 2.0315), 0.2


class Muon(PerMatrix):
    """For a matrix with gradient G, a x b::

        m = momentum m + (1 - momentum) G       q = momentum m + (1 - momentum) G
        w = w - lr SCALE sqrt(max(a, b)) orthogonalized(q)

    What :class:`torch.optim.Muon` does, but in the dtype of the parameters: products in bfloat16,
    which it takes, are tens of times slower where a CPU only emulates them.

    Args:
        params, lr: as for every optimizer; matrices only.
        momentum: decay of m.
        iterations: of :func:`orthogonalized`.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.95, iterations: int = 5
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, iterations=iterations), None)

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        m = state.setdefault("m", torch.zeros_like(g)).lerp_(g, 1 - group["momentum"])
        q = orthogonalized(g.lerp(m, group["momentum"]), group["iterations"])
        return SCALE * math.sqrt(max(g.shape)) * q


def orthogonalized(x: Tensor, iterations: int) -> Tensor:
    """A matrix with the singular vectors of ``x``, and singular values of about 0.7 to 1.2."""
    wide = x.T if x.shape[0] > x.shape[1] else x
    y = wide / wide.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        square = y @ y.T
        y = a * y + (b * square + c * square @ square) @ y
    return y.T if wide is not x else y
