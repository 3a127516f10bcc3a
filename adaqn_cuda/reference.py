"""Every operation of adaQN in plain PyTorch: the ground truth for native kernels, and the fallback.

The algorithm is that of Keskar & Berahas, "adaQN: An Adaptive Quasi-Newton Algorithm for Training
RNNs", ECML PKDD 2016.  One step is three passes over the d-vectors, separated by recursions on
``m = history_size`` numbers; a pair update adds two passes and a commit.

Symbols (the flat vectors hold every parameter of the optimizer, one after the other):

===============  ===========  =========================================================
argument         shape        meaning
===============  ===========  =========================================================
``params``       list         parameters ``w``, in any floating dtype
``grads``        list         their gradients ``g``; ``None`` counts as zero
``accumulator``  (d,)         ``v``, the diagonal; ``None`` for the scalar initial matrix
``iterate_sum``  (d,)         sum of the iterates since the last pair update
``anchor``       (d,)         ``w_o``, the averaged iterate at which the last pair ended
``direction``    (d,)         scratch: ``r = H0 q``, or the parameters set aside
``s_ring``       (m+1, d)     pair differences ``s``; the row after the newest is free
``y_ring``       (m+1, d)     curvature images ``y``
``fisher``       (n, d)       recent gradients ``F``
``gram``         (m+2, m+1)   by slot: ``gram[i, j] = s_i.y_j``, ``gram[m+1, j] = y_j.y_j``
``projections``  (m+3,)       by slot ``u_i = s_i.g``, then the words of :class:`layout.Flag`
``images``       (m+1,)       by slot ``z_i = y_i.r``
===============  ===========  =========================================================

No function reads a device value on the host; decisions are taken with ``torch.where``.  All rows of
the rings hold finite values at all times, so a zero coefficient switches a free row off.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from .layout import Counter, Flag, Loss, state_dtype

# --------------------------------------------------------------------------- flat vectors


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


# --------------------------------------------------------------------------- decisions


def gradient_is_finite(projections: Tensor) -> Tensor:
    return projections[Flag.NONFINITE] == 0


def step_is_accepted(projections: Tensor, counters: Tensor) -> Tensor:
    """Whether this step may change anything that lasts.

    A non-finite gradient is dropped.  So is an all-zero gradient before any other: it carries no
    curvature, and ``torch.distributed.checkpoint`` feeds one to materialise the state.
    """
    untouched = (counters[Counter.GRADIENTS] == 0) & (counters[Counter.ANCHORED] == 0)
    blank = untouched & (projections[Flag.NONZERO] == 0)
    return gradient_is_finite(projections) & ~blank


# --------------------------------------------------------------------------- m-number recursions


def age_order(counters: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Ring slots from the oldest pair to the newest, and which of them hold a pair."""
    age = torch.arange(slots, device=counters.device)
    return (counters[Counter.OLDEST_PAIR] + age) % slots, age < counters[Counter.PAIRS]


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
    pairs = counters[Counter.PAIRS]
    newest = ((counters[Counter.OLDEST_PAIR] + pairs - 1) % slots).reshape(1)
    column = gram.index_select(1, newest)[:, 0]
    gamma = column.index_select(0, newest)[0] / column[slots]
    return torch.where(pairs > 0, gamma, 1.0)


# --------------------------------------------------------------------------- the step


def direction_step(
    params: list[Tensor],
    grads: list[Tensor | None],
    s_ring: Tensor,
    y_ring: Tensor,
    gram: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    maximize: bool,
    keep: float,
    add: float,
    eps: float,
    group_sizes: list[int],
    lr: list[float],
    weight_decay: list[float],
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
    accumulator: Tensor | None,
    fisher: Tensor,
    iterate_sum: Tensor,
    direction: Tensor,
    projections: Tensor,
    images: Tensor,
    counters: Tensor,
) -> None:
    """The three passes one after the other: a whole step on one device."""
    scaling = (grad_scale, found_inf, maximize)
    direction_pass1(params, grads, s_ring, counters, *scaling, projections)
    diagonal = (keep, add, eps, accumulator)
    direction_pass2(
        params, grads, y_ring, gram, counters, projections, grad_scale, maximize, *diagonal,
        fisher, direction, images,
    )  # fmt: skip
    rates = (group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor)
    direction_pass3(
        params, s_ring, gram, projections, images, direction, *rates, len(fisher), iterate_sum,
        counters,
    )  # fmt: skip


def direction_pass1(
    params: list[Tensor],
    grads: list[Tensor | None],
    s_ring: Tensor,
    counters: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    maximize: bool,
    projections: Tensor,
) -> None:
    """u_i = s_i.g for every slot; count what is not finite and what is not zero in g."""
    g = gradient_vector(params, grads, state_dtype(params), grad_scale, maximize)
    slots = s_ring.shape[0]
    projections[:slots] = s_ring.to(g.dtype) @ g
    projections[Flag.NONFINITE] = (~g.isfinite()).sum()
    projections[Flag.NONZERO] = (g != 0).sum()
    if found_inf is not None:
        projections[Flag.NONFINITE] += found_inf.reshape(())


def direction_pass2(
    params: list[Tensor],
    grads: list[Tensor | None],
    y_ring: Tensor,
    gram: Tensor,
    counters: Tensor,
    projections: Tensor,
    grad_scale: Tensor | None,
    maximize: bool,
    keep: float,
    add: float,
    eps: float,
    accumulator: Tensor | None,
    fisher: Tensor,
    direction: Tensor,
    images: Tensor,
) -> None:
    """q = g - sum_i a_i y_i;  v = keep v + add g^2;  r = D q;  z_i = y_i.r;  g enters the ring F.

    D = 1 / sqrt(v + eps), with the new v, or gamma where there is no accumulator.
    """
    accepted = step_is_accepted(projections, counters)
    g = gradient_vector(params, grads, direction.dtype, grad_scale, maximize)
    y = y_ring.to(g.dtype)
    a = backward_coefficients(gram, counters, projections)
    q = g - a.to(g.dtype) @ y
    if accumulator is None:
        r = scalar_initial_matrix(gram, counters) * q
    else:
        v = keep * accumulator + add * g * g
        r = q / torch.sqrt(v + eps)
        accumulator.copy_(torch.where(accepted, v, accumulator))
    direction.copy_(r)
    images.copy_(y @ r)
    slot = counters[Counter.NEXT_GRADIENT].reshape(1)
    row = torch.where(accepted, g.to(fisher.dtype), fisher.index_select(0, slot)[0])
    fisher.index_copy_(0, slot, row[None])


def direction_pass3(
    params: list[Tensor],
    s_ring: Tensor,
    gram: Tensor,
    projections: Tensor,
    images: Tensor,
    direction: Tensor,
    group_sizes: list[int],
    lr: list[float],
    weight_decay: list[float],
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
    fisher_size: int,
    iterate_sum: Tensor,
    counters: Tensor,
) -> None:
    """w_sum += w;  w = (1 - lr weight_decay) w - lr (r + sum_i c_i s_i);  the counters move on.

    The next ``group_sizes[k]`` parameters take ``lr[k]`` and ``weight_decay[k]``; the tensors,
    where given, hold one value per group and take precedence.
    """
    accepted = step_is_accepted(projections, counters)
    c = forward_coefficients(gram, counters, projections, images)
    p = direction + c.to(direction.dtype) @ s_ring.to(direction.dtype)
    w = flatten(params, direction.dtype)
    rates = lr if lr_tensor is None else lr_tensor.unbind()
    decays = weight_decay if weight_decay_tensor is None else weight_decay_tensor.unbind()
    numels = group_numels(params, group_sizes)
    stepped = [
        (1 - rate * decay) * w_k - rate * p_k
        for w_k, p_k, rate, decay in zip(
            w.split(numels), p.split(numels), rates, decays, strict=True
        )
    ]
    iterate_sum.copy_(torch.where(accepted, iterate_sum + w, iterate_sum))
    write_back(params, torch.where(accepted, torch.cat(stepped), w))
    count_step(counters, projections, accepted, fisher_size)


def group_numels(params: list[Tensor], group_sizes: list[int]) -> list[int]:
    """Scalars in each run of ``group_sizes[k]`` parameters."""
    numels = iter([p.numel() for p in params])
    return [sum(islice(numels, size)) for size in group_sizes]


def count_step(counters: Tensor, projections: Tensor, accepted: Tensor, fisher_size: int) -> None:
    one = accepted.long()
    counters[Counter.GRADIENTS] = (counters[Counter.GRADIENTS] + one).clamp(max=fisher_size)
    counters[Counter.NEXT_GRADIENT] = (counters[Counter.NEXT_GRADIENT] + one) % fisher_size
    counters[Counter.ITERATES] += one
    counters[Counter.STEPS_SKIPPED] += (~gradient_is_finite(projections)).long()


# --------------------------------------------------------------------------- the averaged iterate


def average(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``; ``total`` where ``count`` is zero."""
    return total / count.clamp(min=1).to(total.dtype)


def iterate_swap(
    params: list[Tensor],
    iterate_sum: Tensor,
    projections: Tensor,
    counters: Tensor,
    saved: Tensor,
) -> None:
    """Set the parameters aside in ``saved`` and put the averaged iterate w_n in their place.

    Called between pass 1 and pass 2 of a pair update's step, so that a monitor that raises finds
    nothing changed: w_n counts the current iterate if its step is going to be accepted.  Without
    any iterate the parameters stay.
    """
    accepted = step_is_accepted(projections, counters)
    w = flatten(params, saved.dtype)
    saved.copy_(w)
    count = counters[Counter.ITERATES] + accepted.long()
    w_n = average(torch.where(accepted, iterate_sum + w, iterate_sum), count)
    write_back(params, torch.where(count > 0, w_n, w))


def iterate_restore(params: list[Tensor], saved: Tensor) -> None:
    """Undo :func:`iterate_swap`, to the bit."""
    write_back(params, saved)


# --------------------------------------------------------------------------- the pair update


def curvature_pass_a(
    fisher: Tensor, iterate_sum: Tensor, anchor: Tensor, counters: Tensor, weights: Tensor
) -> None:
    """c_j = F_j.s / |F| for the gradients in the ring, zero for the rest;  s = w_n - w_o."""
    s = average(iterate_sum, counters[Counter.ITERATES]) - anchor
    c = (fisher.to(s.dtype) @ s).double()
    size = counters[Counter.GRADIENTS]
    occupied = torch.arange(len(fisher), device=fisher.device) < size
    weights.copy_(torch.where(occupied, average(c, size), 0.0))


def curvature_pass_b(
    fisher: Tensor,
    iterate_sum: Tensor,
    anchor: Tensor,
    counters: Tensor,
    weights: Tensor,
    s_ring: Tensor,
    y_ring: Tensor,
    column: Tensor,
) -> None:
    """y = (1/|F|) sum_j F_j (F_j.s); s and y go to the free slot, their products to ``column``.

    ``column[i] = s_i.y`` by slot, the free slot's own s.y among them, and ``column[m+1] = y.y``;
    all products are of the vectors as stored, rounded to the rings' dtype.
    """
    slots = s_ring.shape[0]
    s = average(iterate_sum, counters[Counter.ITERATES]) - anchor
    y = weights.to(s.dtype) @ fisher.to(s.dtype)
    s, y = s.to(s_ring.dtype), y.to(y_ring.dtype)
    finite = s.isfinite().all() & y.isfinite().all()
    free = free_slot(counters, slots)
    s_ring.index_copy_(0, free, torch.where(finite, s, 0.0)[None])
    y_ring.index_copy_(0, free, torch.where(finite, y, 0.0)[None])
    y = y.to(iterate_sum.dtype)
    column[:slots] = s_ring.to(y.dtype) @ y
    column[slots] = y @ y


def free_slot(counters: Tensor, slots: int) -> Tensor:
    """Index, of shape (1,), of the row that holds no pair."""
    return ((counters[Counter.OLDEST_PAIR] + counters[Counter.PAIRS]) % slots).reshape(1)


def curvature_commit(
    params: list[Tensor],
    column: Tensor,
    monitored_loss: Tensor | None,
    min_curvature: float,
    max_increase: float,
    gram: Tensor,
    losses: Tensor,
    anchor: Tensor,
    iterate_sum: Tensor,
    counters: Tensor,
) -> None:
    """Reset, store or skip (section 3 of the paper), and start the next sum of iterates.

    * no iterate was summed: nothing happens;
    * no anchor yet: w_o = w_n, f_o = f_n;
    * f_n > max_increase f_o, or f_n not finite: drop all pairs and gradients, w = w_o;
    * s.y / y.y > min_curvature: the pair in the free slot counts, w_o = w_n, f_o = f_n;
    * otherwise the pair is forgotten and w_o stays.
    """
    slots = gram.shape[1]
    free = free_slot(counters, slots)
    active = counters[Counter.ITERATES] > 0
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
    iterate_sum.zero_()
    gram.index_copy_(1, free, torch.where(store, column, gram.index_select(1, free)[:, 0])[:, None])
    losses[Loss.ANCHOR] = torch.where(moved, f_n, losses[Loss.ANCHOR])
    if monitored_loss is not None:
        losses[Loss.MONITORED] = torch.where(active, f_n, losses[Loss.MONITORED])
    count_pair_update(counters, slots, active, reset, store, skip)


def count_pair_update(
    counters: Tensor, slots: int, active: Tensor, reset: Tensor, store: Tensor, skip: Tensor
) -> None:
    full = counters[Counter.PAIRS] == slots - 1
    counters[Counter.OLDEST_PAIR] = (counters[Counter.OLDEST_PAIR] + (store & full).long()) % slots
    counters[Counter.PAIRS] = (counters[Counter.PAIRS] + (store & ~full).long()) * (~reset).long()
    counters[Counter.GRADIENTS] *= (~reset).long()
    counters[Counter.NEXT_GRADIENT] *= (~reset).long()
    counters[Counter.ITERATES] = 0
    counters[Counter.ANCHORED] |= active.long()
    counters[Counter.STORED] += store.long()
    counters[Counter.SKIPPED] += skip.long()
    counters[Counter.RESETS] += reset.long()
