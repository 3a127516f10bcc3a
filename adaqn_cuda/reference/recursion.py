"""The ring of pairs, and the two-loop recursion on ``m = history_size`` numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state.layout import Counter


def age_order(counters: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Ring slots from the oldest pair to the newest, and which of them hold a pair."""
    age = torch.arange(slots, device=counters.device)
    return (counters[Counter.OLDEST_PAIR] + age) % max(slots, 1), age < counters[Counter.PAIRS]


def newest_slot(counters: Tensor, slots: int) -> Tensor:
    """Index, of shape (1,), of the row that holds the newest pair."""
    newest = counters[Counter.OLDEST_PAIR] + counters[Counter.PAIRS] - 1
    return (newest % slots).reshape(1)


def free_slot(counters: Tensor, slots: int) -> Tensor:
    """Index, of shape (1,), of the row that holds no pair."""
    return ((counters[Counter.OLDEST_PAIR] + counters[Counter.PAIRS]) % slots).reshape(1)


def curvature_triangle(gram: Tensor, order: Tensor, valid: Tensor) -> Tensor:
    """Upper triangle ``R[i, j] = s_i.y_j`` (j >= i) in age order; the identity where no pair is."""
    sy = gram[order][:, order].triu()
    both = valid[:, None] & valid[None, :]
    return torch.where(both, sy, torch.eye(len(order), dtype=gram.dtype, device=gram.device))


def backward_coefficients(gram: Tensor, counters: Tensor, projections: Tensor) -> Tensor:
    """First loop of the two-loop recursion on m numbers: ``a`` by slot, zero where no pair is.

    With rho_i = 1 / (s_i.y_i), newest to oldest:  a_i = rho_i (u_i - sum_{j>i} a_j s_i.y_j),
    that is R a = u.
    """
    slots = gram.shape[1]
    order, valid = age_order(counters, slots)
    u = torch.where(valid, projections[:slots][order], 0.0)
    a = torch.linalg.solve_triangular(
        curvature_triangle(gram, order, valid), u[:, None], upper=True
    )
    return torch.zeros_like(u).index_copy_(0, order, a[:, 0])


def forward_coefficients(
    gram: Tensor, counters: Tensor, projections: Tensor, images: Tensor
) -> Tensor:
    """Second loop of the two-loop recursion on m numbers: ``c`` by slot, zero where no pair is.

    Oldest to newest:  b_i = rho_i (z_i + sum_{j<i} c_j s_j.y_i) and c_i = a_i - b_i,
    that is R^T c = diag(R) a - z.
    """
    slots = gram.shape[1]
    order, valid = age_order(counters, slots)
    triangle = curvature_triangle(gram, order, valid)
    a = backward_coefficients(gram, counters, projections)[order]
    right = torch.where(valid, triangle.diagonal() * a - images[order], 0.0)
    c = torch.linalg.solve_triangular(triangle.mT, right[:, None], upper=False)
    return torch.zeros_like(a).index_copy_(0, order, c[:, 0])


def scalar_initial_matrix(gram: Tensor, counters: Tensor) -> Tensor:
    """gamma = s.y / y.y of the newest pair (Barzilai-Borwein); 1 while there is none."""
    slots = gram.shape[1]
    if slots == 0:
        return gram.new_ones(())
    pairs = counters[Counter.PAIRS]
    newest = newest_slot(counters, slots)
    column = gram.index_select(1, newest)[:, 0]
    gamma = column.index_select(0, newest)[0] / column[slots]
    return torch.where(pairs > 0, gamma, 1.0)
