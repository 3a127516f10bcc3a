"""Flat vectors: every parameter of the optimizer, one after the other.

However many parameters there are, a device gets a few operations: one for each of their dtypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flatten(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenate ``tensors`` into one vector of ``dtype``."""
    kinds = {t.dtype for t in tensors}
    if len(kinds) == 1:
        return torch.cat([t.reshape(-1) for t in tensors]).to(dtype)
    pieces = {}
    for kind in kinds:
        own = [t.reshape(-1) for t in tensors if t.dtype == kind]
        pieces[kind] = iter(torch.cat(own).to(dtype).split([len(t) for t in own]))
    return torch.cat([next(pieces[t.dtype]) for t in tensors])


def write_back(params: list[Tensor], flat: Tensor) -> None:
    """Copy the flat vector into the parameters, rounding to their dtypes."""
    pieces = flat.split([p.numel() for p in params])
    torch._foreach_copy_(
        params, [piece.view(p.shape) for p, piece in zip(params, pieces, strict=True)]
    )


def gradient_vector(
    params: list[Tensor],
    grads: list[Tensor | None],
    dtype: torch.dtype,
    grad_scale: Tensor | None,
    maximize: bool,
) -> Tensor:
    """The gradient to descend: flat, in the state's dtype, unscaled, negated to maximize."""
    standing = [p.numel() for p, g in zip(params, grads, strict=True) if g is None]
    zeros = params[0].new_zeros(max(standing, default=0))
    pieces = [zeros[: p.numel()] if g is None else g for p, g in zip(params, grads, strict=True)]
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
    largest = max(p.numel() for p in params)
    moves = {there: params[0].new_full((largest,), there, dtype=torch.bool) for there in (0, 1)}
    pairs = zip(params, grads, strict=True)
    return torch.cat([moves[g is not None][: p.numel()] for p, g in pairs])
