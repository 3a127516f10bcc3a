"""Every operation of adaQN in plain PyTorch: the ground truth for native kernels, and the fallback.

The algorithm is that of Keskar & Berahas, "adaQN: An Adaptive Quasi-Newton Algorithm for Training
RNNs", ECML PKDD 2016.  One step is three passes over the d-vectors, separated by recursions on
``m = history_size`` numbers; a pair update adds two passes and a commit.

Beyond the paper, each of these is off at the value in brackets: clipping of the gradient
(``max_grad_norm = inf``), momentum with Nesterov's look-ahead (``beta = 0``), bias correction of
the average of squared gradients (``False``), damped pairs (``image = None``), a cap on the
direction (``max_direction = inf``), and another initial matrix than a diagonal
(``identity = False``).

Symbols (the flat vectors hold every parameter of the optimizer, one after the other):

===============  ===========  =========================================================
argument         shape        meaning
===============  ===========  =========================================================
``params``       list         parameters ``w``, in any floating dtype
``grads``        list         their gradients ``g``; where ``None``, the parameter stands still
``accumulator``  (d,)         ``v``, the diagonal; ``None`` for the scalar initial matrix
``momentum``     (d,)         ``m``, the average of gradients; ``None`` without momentum
``iterate_sum``  (d,)         sum of the iterates since the last pair update; ``None``
                              without pairs
``anchor``       (d,)         ``w_o``, the averaged iterate at which the last pair ended
``direction``    (d,)         scratch: ``r = H0 q``, or the parameters set aside
``image``        (d,)         ``B0 s``, the candidate's image under the inverse of ``H0``
``s_ring``       (m+1, d)     pair differences ``s``; the row after the newest is free
``y_ring``       (m+1, d)     curvature images ``y``
``fisher``       (n, d)       recent gradients ``F``, or one row: ``y`` as given
``gram``         (m+2, m+1)   by slot: ``gram[i, j] = s_i.y_j``, ``gram[m+1, j] = y_j.y_j``
``moments``      (m+1,)       by slot ``s_i.m``
``projections``  (m+4,)       by slot ``u_i = s_i.q``, then the words of :class:`layout.Flag`
``images``       (m+2,)       by slot ``z_i = y_i.r``, then ``|H0 q|^2`` for the cap
===============  ===========  =========================================================

With ``history_size = 0`` the rings have no rows, and the buffers by slot only their last words.

No function reads a device value on the host; decisions are taken with ``torch.where``.  All rows of
the rings hold finite values at all times, so a zero coefficient switches a free row off.

With P the projection onto the parameters that have a gradient, a step is ``p = P H P q``: positive
definite where anything moves.  The others keep w, m and v, to the bit, and their part of F is zero;
a reset, which drops all momentum, leaves their w.
"""

from __future__ import annotations

from itertools import islice
from math import inf

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


def finite_or_zero(products: Tensor) -> Tensor:
    """Products of vectors, 0 where they have overflowed: a step without those pairs' share."""
    return torch.where(products.isfinite(), products, 0.0)


def presence(params: list[Tensor], grads: list[Tensor | None]) -> Tensor | bool:
    """Which elements of the flat vectors belong to parameters with a gradient; ``True``: all."""
    if all(g is not None for g in grads):
        return True
    pairs = zip(params, grads, strict=True)
    return torch.cat([p.new_full((p.numel(),), g is not None, dtype=torch.bool) for p, g in pairs])


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


# --------------------------------------------------------------------------- averages of gradients


def clip_factor(projections: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, max_grad_norm / |g|), as torch.nn.utils.clip_grad_norm_ has it."""
    norm = projections[Flag.SQUARE].sqrt()
    return torch.where(norm > max_grad_norm, max_grad_norm / norm, 1.0)


def gradient_factor(
    projections: Tensor, grad_scale: Tensor | None, maximize: bool, max_grad_norm: float
) -> Tensor:
    """What turns a gradient as given into the clipped one to descend."""
    factor = clip_factor(projections, max_grad_norm)
    if grad_scale is not None:
        factor = factor / grad_scale.reshape(())
    return -factor if maximize else factor


def look_ahead(counters: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Weights of the new momentum and of g in q, before an accepted step is counted.

    q = beta m_t / (1 - beta^(t+1)) + (1 - beta) g / (1 - beta^t) at the t-th accepted step: the
    bias-corrected momentum as it will be one step later, if the same gradient comes again
    (Nesterov's look-ahead; Dozat, "Incorporating Nesterov Momentum into Adam", 2016).
    """
    t = (counters[Counter.ACCEPTED] + 1).double()
    return beta / (1 - beta ** (t + 1)), (1 - beta) / (1 - beta**t)


def old_and_new(counters: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Weights of the old momentum and of g in the same q:  m_t = beta m_(t-1) + (1 - beta) g."""
    ahead, now = look_ahead(counters, beta)
    return ahead * beta, ahead * (1 - beta) + now


def look_ahead_from_new(
    g: Tensor, momentum: Tensor | None, counters: Tensor, beta: float, here: Tensor | bool
) -> Tensor:
    """q of :func:`look_ahead`, where ``momentum`` has g in it already; zero if not ``here``."""
    if momentum is None:
        return g
    ahead, now = look_ahead(counters, beta)
    q = ahead * momentum + now * g
    return q if here is True else torch.where(here, q, 0.0)


#: Multiple of the root of the average |g|^2 beyond which a gradient is an outlier.
OUTLIER = 1e3


def surplus(projections: Tensor, mean_square: Tensor) -> Tensor:
    """max(1, |g| / (OUTLIER sqrt(mean_square))); 1 while there is no average.

    In an eigenbasis one large entry enters v everywhere, and would hold up all of a block for as
    long as v remembers it.
    """
    norm, limit = projections[Flag.SQUARE].sqrt(), OUTLIER * mean_square.sqrt()
    outlier = (limit > 0) & (norm > limit) & norm.isfinite()  # else it is clipped to zero
    most = 2.0**126  # float32 holds it, and the average follows
    return torch.where(outlier, (norm / limit).clamp(max=most), 1.0)


def divide_gradient(
    projections: Tensor,
    moments: Tensor,
    counters: Tensor,
    beta: float,
    max_grad_norm: float,
    divisor: Tensor,
) -> None:
    """Make of the outcome of pass 1 what it is for the gradient divided by ``divisor``."""
    slots = len(moments)
    clip = clip_factor(projections, max_grad_norm)
    projections[Flag.SQUARE] /= divisor * divisor
    factor = clip_factor(projections, max_grad_norm) / (divisor * clip)
    of_m, _ = old_and_new(counters, beta)
    of_momentum = of_m * moments
    divided = of_momentum + factor * (projections[:slots] - of_momentum)
    projections[:slots] = torch.where(divisor > 1, divided, projections[:slots])


def bias_correction(counters: Tensor, keep: float, enabled: bool, pending: int = 1) -> Tensor:
    """1 / (1 - keep^t), by which an average v that began at zero is too small; 1 for a sum.

    ``pending`` is 1 before an accepted step is counted, and 0 after.
    """
    t = (counters[Counter.ACCEPTED] + pending).double()
    if not enabled or keep == 1:
        return torch.ones_like(t)
    return 1 / (1 - keep ** t.clamp(min=1))


# --------------------------------------------------------------------------- m-number recursions


def age_order(counters: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Ring slots from the oldest pair to the newest, and which of them hold a pair."""
    age = torch.arange(slots, device=counters.device)
    return (counters[Counter.OLDEST_PAIR] + age) % max(slots, 1), age < counters[Counter.PAIRS]


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


def newest_slot(counters: Tensor, slots: int) -> Tensor:
    """Index, of shape (1,), of the row that holds the newest pair."""
    newest = counters[Counter.OLDEST_PAIR] + counters[Counter.PAIRS] - 1
    return (newest % slots).reshape(1)


def scalar_initial_matrix(gram: Tensor, counters: Tensor) -> Tensor:
    """gamma = s.y / y.y of the newest pair (Barzilai-Borwein); 1 while there is none."""
    slots = gram.shape[1]
    pairs = counters[Counter.PAIRS]
    newest = newest_slot(counters, slots)
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
    max_grad_norm: float,
    beta: float,
    keep: float,
    add: float,
    eps: float,
    correct_bias: bool,
    max_direction: float,
    group_sizes: list[int],
    lr: list[float],
    weight_decay: list[float],
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
    momentum: Tensor | None,
    accumulator: Tensor | None,
    fisher: Tensor,
    iterate_sum: Tensor | None,
    direction: Tensor,
    moments: Tensor,
    projections: Tensor,
    images: Tensor,
    counters: Tensor,
) -> None:
    """The three passes one after the other: a whole step on one device."""
    direction_pass1(
        params, grads, s_ring, counters, grad_scale, found_inf, maximize, max_grad_norm, beta,
        moments, projections,
    )  # fmt: skip
    direction_pass2(
        params, grads, y_ring, gram, counters, projections, grad_scale, maximize, max_grad_norm,
        beta, keep, add, eps, correct_bias, False, momentum, accumulator, fisher, direction, images,
    )  # fmt: skip
    rates = (group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor)
    direction_pass3(
        params, grads, s_ring, gram, projections, images, direction, beta, max_direction, *rates,
        max(len(fisher), 1), iterate_sum, moments, counters,
    )  # fmt: skip


def direction_pass1(
    params: list[Tensor],
    grads: list[Tensor | None],
    s_ring: Tensor,
    counters: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    maximize: bool,
    max_grad_norm: float,
    beta: float,
    moments: Tensor,
    projections: Tensor,
) -> None:
    """u_i = s_i.q for every slot; count what is not finite and what is not zero in g; |g|^2.

    The vectors S and g are all that is read: s_i.q comes from s_i.g and s_i.m, which is kept;
    where parameters stand still, ``moments`` are what :func:`moving_moments` leaves of them.
    """
    g = gradient_vector(params, grads, state_dtype(params), grad_scale, maximize)
    measure_gradient(g, found_inf, projections)
    slots = s_ring.shape[0]
    of_m, of_g = old_and_new(counters, beta)
    s_g = (s_ring.to(g.dtype) @ g) * clip_factor(projections, max_grad_norm)
    projections[:slots] = of_m * moments + of_g * finite_or_zero(s_g)


def moving_moments(
    params: list[Tensor],
    grads: list[Tensor | None],
    s_ring: Tensor,
    momentum: Tensor,
    moments: Tensor,
) -> Tensor:
    """s_i.m over the parameters that have a gradient, of s_i.m over all of them."""
    still = [
        s.to(m.dtype) @ m
        for g, s, m in zip(
            grads, *(x.split([p.numel() for p in params], -1) for x in (s_ring, momentum)),
            strict=True,
        )
        if g is None
    ]  # fmt: skip
    return moments - torch.stack(still).sum(0).double()


def measure_gradient(g: Tensor, found_inf: Tensor | None, projections: Tensor) -> None:
    """Write the words of :class:`layout.Flag`."""
    projections[Flag.NONFINITE] = (~g.isfinite()).sum()
    projections[Flag.NONZERO] = (g != 0).sum()
    projections[Flag.SQUARE] = g.double().square().sum()
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
    max_grad_norm: float,
    beta: float,
    keep: float,
    add: float,
    eps: float,
    correct_bias: bool,
    identity: bool,
    momentum: Tensor | None,
    accumulator: Tensor | None,
    fisher: Tensor,
    direction: Tensor,
    images: Tensor,
) -> None:
    """r = D (q - sum_i a_i y_i);  z_i = y_i.r;  g enters v, m and the ring F.

    D = 1 / sqrt(v + eps), with the new v, or gamma where there is no accumulator.  With
    ``identity``, D = 1 and ``images`` are left to :func:`direction_images`: another initial matrix
    is applied in between.
    """
    accepted, here = step_is_accepted(projections, counters), presence(params, grads)
    g = gradient_vector(params, grads, direction.dtype, grad_scale, maximize)
    g = g * clip_factor(projections, max_grad_norm)
    y = y_ring.to(g.dtype)
    a = backward_coefficients(gram, counters, projections)
    q = blend(g, momentum, counters, beta, accepted, here)
    r = q - a.to(g.dtype) @ y
    if accumulator is not None:
        correction = bias_correction(counters, keep, correct_bias)
        root = diagonal_root(g, accumulator, keep, add, eps, correction, accepted, here)
        q, r = q / root, r / root
    elif not identity:
        gamma = scalar_initial_matrix(gram, counters)
        q, r = gamma * q, gamma * r
    direction.copy_(r)
    if not identity:
        images[:-1] = finite_or_zero(y @ r)
        images[-1] = q.double().square().sum()
    if len(fisher):
        slot = counters[Counter.NEXT_GRADIENT].reshape(1)
        row = torch.where(accepted, g.to(fisher.dtype), fisher.index_select(0, slot)[0])
        fisher.index_copy_(0, slot, row[None])


def blend(
    g: Tensor,
    momentum: Tensor | None,
    counters: Tensor,
    beta: float,
    accepted: Tensor,
    here: Tensor | bool,
) -> Tensor:
    """q of :func:`look_ahead`, with the new momentum, which is kept if the step is accepted.

    Elements that are not ``here`` keep their momentum, and have no q.
    """
    if momentum is None:
        return g
    of_m, of_g = old_and_new(counters, beta)
    q = of_m * momentum + of_g * g
    momentum.copy_(torch.where(accepted & here, beta * momentum + (1 - beta) * g, momentum))
    return q if here is True else torch.where(here, q, 0.0)


def diagonal_root(
    g: Tensor,
    accumulator: Tensor,
    keep: float,
    add: float,
    eps: float,
    correction: Tensor,
    accepted: Tensor,
    here: Tensor | bool,
) -> Tensor:
    """1 / D = sqrt(correction v + eps) with v = keep v + add g^2, kept if the step is accepted.

    Elements that are not ``here`` keep their v.
    """
    v = keep * accumulator + add * g * g
    v = v if here is True else torch.where(here, v, accumulator)
    accumulator.copy_(torch.where(accepted, v, accumulator))
    return torch.sqrt(correction * v + eps)


def direction_images(
    direction: Tensor, y_ring: Tensor, counters: Tensor, projections: Tensor, images: Tensor
) -> None:
    """z_i = y_i.r for every slot: the end of pass 2 where the initial matrix is no diagonal."""
    images[:-1] = finite_or_zero(y_ring.to(direction.dtype) @ direction)


def direction_pass3(
    params: list[Tensor],
    grads: list[Tensor | None],
    s_ring: Tensor,
    gram: Tensor,
    projections: Tensor,
    images: Tensor,
    direction: Tensor,
    beta: float,
    max_direction: float,
    group_sizes: list[int],
    lr: list[float],
    weight_decay: list[float],
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
    fisher_size: int,
    iterate_sum: Tensor | None,
    moments: Tensor,
    counters: Tensor,
) -> None:
    """w_sum += w;  w = (1 - lr weight_decay) w - lr p;  the counters move on.

    p = r + sum_i c_i s_i, scaled down where |p| > max_direction |H0 q|, to equality.  The next
    ``group_sizes[k]`` parameters take ``lr[k]`` and ``weight_decay[k]``; the tensors, where given,
    hold one value per group and take precedence.  Of the gradients it matters which are there.
    """
    accepted, here = step_is_accepted(projections, counters), presence(params, grads)
    c = forward_coefficients(gram, counters, projections, images)
    p = direction + c.to(direction.dtype) @ s_ring.to(direction.dtype)
    p = p if here is True else torch.where(here, p, 0.0)
    if max_direction < inf:
        p = p * cap_factor(p, images, max_direction)
    w = flatten(params, direction.dtype)
    if iterate_sum is not None:
        iterate_sum.copy_(torch.where(accepted, iterate_sum + w, iterate_sum))
    rates = (group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor)
    descend(params, w, p, accepted & here, *rates)
    count_moments(moments, projections, counters, beta, accepted)
    count_step(counters, projections, accepted, fisher_size)


def cap_factor(p: Tensor, images: Tensor, max_direction: float) -> Tensor:
    """min(1, max_direction |H0 q| / |p|)."""
    size = torch.linalg.vector_norm(p, dtype=torch.float64)
    limit = max_direction * images[-1].sqrt()
    return torch.where(size > limit, limit / size, 1.0)


def descend(
    params: list[Tensor],
    w: Tensor,
    p: Tensor,
    moves: Tensor,
    group_sizes: list[int],
    lr: list[float],
    weight_decay: list[float],
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
) -> None:
    """w = (1 - lr weight_decay) w - lr p, group by group, for elements of which ``moves`` is true.

    ``w`` are the parameters.
    """
    rates = lr if lr_tensor is None else lr_tensor.unbind()
    decays = weight_decay if weight_decay_tensor is None else weight_decay_tensor.unbind()
    numels = group_numels(params, group_sizes)
    stepped = [
        (1 - rate * decay) * w_k - rate * p_k
        for w_k, p_k, rate, decay in zip(
            w.split(numels), p.split(numels), rates, decays, strict=True
        )
    ]
    write_back(params, torch.where(moves, torch.cat(stepped), w))


def group_numels(params: list[Tensor], group_sizes: list[int]) -> list[int]:
    """Scalars in each run of ``group_sizes[k]`` parameters."""
    numels = iter([p.numel() for p in params])
    return [sum(islice(numels, size)) for size in group_sizes]


def count_moments(
    moments: Tensor, projections: Tensor, counters: Tensor, beta: float, accepted: Tensor
) -> None:
    """s_i.m moves as m does, with s_i.g taken out of u_i = s_i.q; before the step is counted."""
    of_m, of_g = old_and_new(counters, beta)
    s_g = (projections[: len(moments)] - of_m * moments) / of_g
    moments.copy_(torch.where(accepted, beta * moments + (1 - beta) * s_g, moments))


def count_step(counters: Tensor, projections: Tensor, accepted: Tensor, fisher_size: int) -> None:
    one = accepted.long()
    counters[Counter.GRADIENTS] = (counters[Counter.GRADIENTS] + one).clamp(max=fisher_size)
    counters[Counter.NEXT_GRADIENT] = (counters[Counter.NEXT_GRADIENT] + one) % fisher_size
    counters[Counter.ITERATES] += one
    counters[Counter.ACCEPTED] += one
    counters[Counter.STEPS_SKIPPED] += (~gradient_is_finite(projections)).long()


def diagonal_step(
    params: list[Tensor],
    grads: list[Tensor | None],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    maximize: bool,
    max_grad_norm: float,
    beta: float,
    keep: float,
    add: float,
    eps: float,
    correct_bias: bool,
    group_sizes: list[int],
    lr: list[float],
    weight_decay: list[float],
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
    momentum: Tensor | None,
    accumulator: Tensor | None,
    projections: Tensor,
    counters: Tensor,
) -> None:
    """A whole step without pairs: w = (1 - lr weight_decay) w - lr D q, in one pass after another.

    D = 1 without an accumulator.  Of ``projections`` there are only the flags.
    """
    g = gradient_vector(params, grads, state_dtype(params), grad_scale, maximize)
    measure_gradient(g, found_inf, projections)
    accepted, here = step_is_accepted(projections, counters), presence(params, grads)
    g = g * clip_factor(projections, max_grad_norm)
    p = blend(g, momentum, counters, beta, accepted, here)
    if accumulator is not None:
        correction = bias_correction(counters, keep, correct_bias)
        p = p / diagonal_root(g, accumulator, keep, add, eps, correction, accepted, here)
    rates = (group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor)
    descend(params, flatten(params, p.dtype), p, accepted & here, *rates)
    count_step(counters, projections, accepted, fisher_size=1)


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


def displacement(iterate_sum: Tensor, anchor: Tensor, counters: Tensor) -> Tensor:
    """s = w_n - w_o."""
    return average(iterate_sum, counters[Counter.ITERATES]) - anchor


def initial_product(
    iterate_sum: Tensor,
    anchor: Tensor,
    gram: Tensor,
    counters: Tensor,
    keep: float,
    eps: float,
    correct_bias: bool,
    accumulator: Tensor | None,
    image: Tensor,
) -> None:
    """image = B0 s, with B0 the inverse of the step's D."""
    s = displacement(iterate_sum, anchor, counters)
    if accumulator is None:
        image.copy_(s / scalar_initial_matrix(gram, counters))
    else:
        correction = bias_correction(counters, keep, correct_bias, pending=0)
        image.copy_(s * torch.sqrt(correction * accumulator + eps))


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
    size = counters[Counter.GRADIENTS]
    occupied = torch.arange(len(fisher), device=fisher.device) < size
    c = torch.where(occupied, (fisher.to(s.dtype) @ s).double(), 0.0)
    s_y = c[0] if explicit else average((c * c).sum(), size)
    theta = s_y.new_ones(()) if image is None else damping_factor(s_y, s @ image, damping)
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


def free_slot(counters: Tensor, slots: int) -> Tensor:
    """Index, of shape (1,), of the row that holds no pair."""
    return ((counters[Counter.OLDEST_PAIR] + counters[Counter.PAIRS]) % slots).reshape(1)


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
