"""Flat vectors: every parameter of the optimizer, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def flatten(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenate ``tensors`` into one vector of ``dtype``."""
    return torch.cat([t.reshape(-1).to(dtype) for t in tensors])


def write_back(params: list[Tensor], flat: Tensor) -> None:
    """Copy the flat vector into the parameters, rounding to their dtypes."""
    pieces = flat.split([p.numel() for p in params])
    for p, piece in zip(params, pieces, strict=True):
        p.copy_(piece.view(p.shape))


def gradient_vector(
    params: list[Tensor],
    grads: list[Tensor | None],
    dtype: torch.dtype,
    grad_scale: Tensor | None,
    maximize: bool,
) -> Tensor:
    """The gradient to descend: flat, in the state's dtype, unscaled, negated to maximize."""
    pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    g = flatten(pieces, dtype)
    if grad_scale is not None:
        g = g / grad_scale
    return -g if maximize else g


def finite_or_zero(products: Tensor) -> Tensor:
    """Products of vectors, 0 where they have overflowed: a step without those pairs' share."""
    return torch.where(products.isfinite(), products, 0.0)


def presence(params: list[Tensor], grads: list[Tensor | None]) -> Tensor | bool:
    """Which elements of the flat vectors belong to parameters with a gradient; ``True``: all."""
    if all(g is not None for g in grads):
        return True
    pairs = zip(params, grads, strict=True)
    return torch.cat([p.new_full((p.numel(),), g is not None, dtype=torch.bool) for p, g in pairs])
