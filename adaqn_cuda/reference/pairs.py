"""The pair update: displacement s, curvature image y, and the decision about both."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ..state.layout import Counter, Loss
from .acceptance import step_is_accepted
from .averages import Run, settled_root
from .flat import flatten, write_back
from .iterate import average
from .recursion import free_slot, newest_slot, scalar_initial_matrix


def displacement(iterate_sum: Tensor, anchor: Tensor, counters: Tensor) -> Tensor:
    """s = w_n - w_o."""
    return average(iterate_sum, counters[Counter.ITERATES]) - anchor


def initial_product(
    iterate_sum: Tensor,
    anchor: Tensor,
    gram: Tensor,
    counters: Tensor,
    runs: list[Run],
    correct_bias: bool,
    accumulator: Tensor | None,
    image: Tensor,
) -> None:
    """image = B0 s, with B0 the inverse of the step's D."""
    s = displacement(iterate_sum, anchor, counters)
    if accumulator is None:
        image.copy_(s / scalar_initial_matrix(gram, counters))
    else:
        image.copy_(s * settled_root(accumulator, counters, runs, correct_bias))


def curvature_pass_a(
    fisher: Tensor,
    iterate_sum: Tensor,
    anchor: Tensor,
    counters: Tensor,
    explicit: bool,
    damping: float,
    image: Tensor | None,
    weights: Tensor,
) -> None:
    """Weights of F_j and, last, of B0 s in the candidate y.

    y is the accumulated Fisher product (1/|F|) sum_j F_j (F_j.s), or with ``explicit`` F_0 itself.
    Powell's damping, where ``image`` is given: if s.y < damping s.B0 s, then y becomes
    theta y + (1 - theta) B0 s, so that s.y = damping s.B0 s.
    """
    s = displacement(iterate_sum, anchor, counters)
    products = (fisher.to(s.dtype) @ s).double()
    s_b0_s = None if image is None else s @ image
    weigh(products, s_b0_s, counters, explicit, damping, weights)


def weigh(
    products: Tensor,
    s_b0_s: Tensor | None,
    counters: Tensor,
    explicit: bool,
    damping: float,
    weights: Tensor,
) -> None:
    """The weights of pass A, from the products F_j.s and s.B0 s."""
    size = counters[Counter.GRADIENTS]
    occupied = torch.arange(len(products), device=products.device) < size
    c = torch.where(occupied, products, 0.0)
    s_y = c[0] if explicit else average((c * c).sum(), size)
    theta = s_y.new_ones(()) if s_b0_s is None else damping_factor(s_y, s_b0_s, damping)
    weights[:-1] = theta * (occupied if explicit else average(c, size))
    weights[-1] = 1 - theta


def damping_factor(s_y: Tensor, s_b0_s: Tensor, damping: float) -> Tensor:
    """theta of Powell's damping (Nocedal & Wright, Procedure 18.2)."""
    low = s_y < damping * s_b0_s
    return torch.where(low, (1 - damping) * s_b0_s / (s_b0_s - s_y), 1.0)


def curvature_pass_b(
    fisher: Tensor,
    iterate_sum: Tensor,
    anchor: Tensor,
    counters: Tensor,
    projections: Tensor,
    weights: Tensor,
    image: Tensor | None,
    momentum: Tensor | None,
    s_ring: Tensor,
    y_ring: Tensor,
    column: Tensor,
) -> None:
    """y, from the weights of pass A; s and y go to the free slot, their products to ``column``.

    ``column[i] = s_i.y`` by slot, the free slot's own s.y among them; then y.y and s.m.  All
    products are of the vectors as stored, rounded to the rings' dtype.  A step that was dropped
    leaves the slot as it is.
    """
    slots = s_ring.shape[0]
    s = displacement(iterate_sum, anchor, counters)
    y = weights[:-1].to(s.dtype) @ fisher.to(s.dtype)
    if image is not None:
        y = y + weights[-1].to(s.dtype) * image
    s, y = s.to(s_ring.dtype), y.to(y_ring.dtype)
    finite = s.isfinite().all() & y.isfinite().all()
    s, y = torch.where(finite, s, 0.0), torch.where(finite, y, 0.0)
    free, accepted = free_slot(counters, slots), step_is_accepted(projections, counters)
    for ring, row in ((s_ring, s), (y_ring, y)):
        ring.index_copy_(0, free, torch.where(accepted, row, ring.index_select(0, free)))
    s, y = s.to(iterate_sum.dtype), y.to(iterate_sum.dtype)
    column[:slots] = s_ring.to(y.dtype) @ y
    column[slots] = y @ y
    column[slots + 1] = 0.0 if momentum is None else s @ momentum


def curvature_commit(
    params: list[Tensor],
    column: Tensor,
    projections: Tensor,
    monitored_loss: Tensor | None,
    min_curvature: float,
    max_increase: float,
    max_growth: float,
    gram: Tensor,
    moments: Tensor,
    losses: Tensor,
    anchor: Tensor,
    iterate_sum: Tensor,
    momentum: Tensor | None,
    counters: Tensor,
) -> None:
    """Reset, store or skip (section 3 of the paper), and start the next sum of iterates.

    * the step was dropped, or no iterate was summed: nothing happens;
    * no anchor yet: w_o = w_n, f_o = f_n;
    * f_n > max_increase f_o, or f_n not finite: drop all pairs, gradients and momentum, w = w_o;
    * s.y / y.y > min_curvature: the pair in the free slot counts, w_o = w_n, f_o = f_n;
    * otherwise the pair is forgotten and w_o stays.

    What is kept of y.y is at least s.y / (max_growth gamma), with the gamma of the newest pair so
    far, so that :func:`scalar_initial_matrix` grows by at most that factor from pair to pair.
    Where that is bounded at all, a pair that is forgotten lowers gamma to its own, if that is less.
    """
    slots = gram.shape[1]
    free = free_slot(counters, slots)
    active = step_is_accepted(projections, counters) & (counters[Counter.ITERATES] > 0)
    anchored = counters[Counter.ANCHORED] > 0
    w_n = average(iterate_sum, counters[Counter.ITERATES])
    if monitored_loss is None:
        f_n, worse = losses.new_full((), torch.nan), torch.zeros_like(active)
    else:
        f_n = monitored_loss
        worse = (f_n > max_increase * losses[Loss.ANCHOR]) | ~f_n.isfinite()
    ratio = column.index_select(0, free)[0] / column[slots]
    reset = active & anchored & worse
    store = active & anchored & ~worse & (ratio > min_curvature) & ratio.isfinite()
    skip = active & anchored & ~worse & ~store
    moved = store | (active & ~anchored)

    w = flatten(params, anchor.dtype)
    write_back(params, torch.where(reset, anchor, w))
    anchor.copy_(torch.where(moved, w_n, anchor))
    iterate_sum.copy_(torch.where(active, 0.0, iterate_sum))
    if momentum is not None:
        momentum.copy_(torch.where(reset, 0.0, momentum))
    products, s_m = column[:-1].clone(), column[-1:]
    products[-1] = kept_square(column, free, gram, max_growth, counters)
    if max_growth < inf:
        squeeze(gram, column, free, counters, skip)
    kept = gram.index_select(1, free)[:, 0]
    gram.index_copy_(1, free, torch.where(store, products, kept)[:, None])
    moments.index_copy_(0, free, torch.where(store, s_m, moments.index_select(0, free)))
    losses[Loss.ANCHOR] = torch.where(moved, f_n, losses[Loss.ANCHOR])
    if monitored_loss is not None:
        losses[Loss.MONITORED] = torch.where(active, f_n, losses[Loss.MONITORED])
    count_pair_update(counters, slots, active, reset, store, skip)


def kept_square(
    column: Tensor, free: Tensor, gram: Tensor, max_growth: float, counters: Tensor
) -> Tensor:
    """y.y, or the least that keeps s.y / y.y within ``max_growth`` times the newest pair's."""
    square = column[-2]
    least = column.index_select(0, free)[0] / (max_growth * scalar_initial_matrix(gram, counters))
    return torch.where((counters[Counter.PAIRS] > 0) & (square < least), least, square)


def squeeze(gram: Tensor, column: Tensor, free: Tensor, counters: Tensor, skip: Tensor) -> None:
    """Raise the newest y.y, where ``skip``, until gamma is at most s.y / y.y of ``column``."""
    slots, pairs = gram.shape[1], counters[Counter.PAIRS]
    newest = newest_slot(counters, slots)
    ratio = column.index_select(0, free)[0] / column[slots]
    own = gram.index_select(1, newest)[:, 0]
    least = own.index_select(0, newest)[0] / ratio
    applies = skip & (pairs > 0) & (ratio > 0) & least.isfinite() & (own[slots] < least)
    gram[slots].index_copy_(0, newest, torch.where(applies, least, own[slots])[None])


def count_pair_update(
    counters: Tensor, slots: int, active: Tensor, reset: Tensor, store: Tensor, skip: Tensor
) -> None:
    full = counters[Counter.PAIRS] == slots - 1
    counters[Counter.OLDEST_PAIR] = (counters[Counter.OLDEST_PAIR] + (store & full).long()) % slots
    counters[Counter.PAIRS] = (counters[Counter.PAIRS] + (store & ~full).long()) * (~reset).long()
    counters[Counter.GRADIENTS] *= (~reset).long()
    counters[Counter.NEXT_GRADIENT] *= (~reset).long()
    counters[Counter.ITERATES] *= (~active).long()
    counters[Counter.ANCHORED] |= active.long()
    counters[Counter.STORED] += store.long()
    counters[Counter.SKIPPED] += skip.long()
    counters[Counter.RESETS] += reset.long()
