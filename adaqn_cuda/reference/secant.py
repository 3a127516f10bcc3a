"""L-BFGS with step control on a deterministic loss: pairs of successive iterates, and their search.

The loss and its gradient are those of all data, so a pair is what two successive iterates give,
s = t p and y = g' - g, and a step counts only if the loss falls.  With H0 = gamma K, where K is the
identity or another initial matrix, the direction is p = -H g with H the inverse Hessian of the
pairs on top of H0.

Self-scaled pairs (Oren & Luenberger 1974; Al-Baali 1998) let go of what the matrix knew before:
with tau = min(1, y.s / s.B s), where s.B s = -t s.g is known as s = -t H g,

    H' = (1/tau) (I - rho s y^T) H (I - rho y s^T) + rho s s^T,   rho = 1 / s.y.

Only the recursion on m numbers sees it: with sigma the product of all 1/tau, and sigma_i that of
pair i and older ones,  R a = S^T q,  r = sigma H0 (q - Y a),  z = Y^T r,
R^T c = diag(R) a sigma / sigma_i - z,  p = r + S c,  q = -g.

Every function acts as ``words[Word.TURN]`` says, so that a search can go on without the host.

===============  ===========  =========================================================
argument         shape        meaning
===============  ===========  =========================================================
``trial``        (d,)         g at the trial
``gradient``     (d,)         g at the iterate
``direction``    (d,)         p
``origin``       (d,)         the iterate w
``residual``     (d,)         q - Y a, then K of it
``scales``       (m+1,)       by slot 1/tau
``words``        (21,)        see :class:`layout.Word`
===============  ===========  =========================================================

The others are those of the package.  ``projections`` hold u_i = s_i.q, and their flags let
:func:`kronecker_accumulate` take in the gradients of iterates alone.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from ..state.layout import Counter, Flag, Stop, Turn, Word
from .flat import finite_or_zero, flatten, gradient_vector, write_back
from .recursion import age_order, backward_coefficients, curvature_triangle, free_slot

#: Bounds of what a refused step is multiplied with; where the loss is not finite, the lower one.
SHORTEST, LONGEST = 0.1, 0.5
#: Without pairs, what the last step is multiplied with to be tried next.
GROWTH = 2.0


def secant_measure(
    params: list[Tensor],
    grads: list[Tensor | None],
    loss: Tensor,
    maximize: bool,
    direction: Tensor,
    trial: Tensor,
    words: Tensor,
) -> None:
    """The loss and the gradient of the trial: what is to be minimized, and what decides."""
    g = gradient_vector(params, grads, trial.dtype, None, maximize)
    trial.copy_(g)
    value = loss.detach().reshape(()).to(words)
    words[Word.TRIAL_LOSS] = -value if maximize else value
    words[Word.TRIAL_SLOPE] = product(g, direction)
    words[Word.TRIAL_MAX] = largest(g)
    words[Word.TRIAL_SUM] = g.double().abs().sum()
    words[Word.TRIAL_NONFINITE] = (~g.isfinite()).sum()


def product(x: Tensor, y: Tensor) -> Tensor:
    """x.y, summed in float64."""
    return (x.double() * y.double()).sum()


def largest(x: Tensor) -> Tensor:
    """max |x|, infinite unless all of x is finite."""
    size = x.abs().max() if len(x) else x.new_zeros(())
    return torch.where(size.isfinite(), size, torch.inf)


def secant_decide(
    decrease: float,
    noise: float,
    tolerance_grad: float,
    tolerance_change: float,
    max_trials: int,
    max_iter: int,
    counters: Tensor,
    words: Tensor,
) -> None:
    """Armijo's rule: accept the trial, or shorten the step, or forget the pairs, or stop.

    A trial is accepted if f(w + t p) <= f(w) + ``decrease`` t g.p or, where both losses are equal
    up to ``noise`` |f(w)|, by what the slopes say of the same (Hager & Zhang 2005, eq. 4.1).
    Otherwise t becomes the minimum of the parabola through f(w), g.p and f(w + t p), within
    [0.1, 0.5] t.  After ``max_trials``, or if p does not descend, the pairs are forgotten; if there
    are none, or that has not helped, the search stops.
    """
    step, loss, slope, trial = (
        words[w] for w in (Word.STEP, Word.LOSS, Word.SLOPE, Word.TRIAL_LOSS)
    )
    active = words[Word.STATUS] == Stop.NOT
    finite = (words[Word.TRIAL_NONFINITE] == 0) & trial.isfinite()
    fresh = step == 0
    enough = (trial <= loss + decrease * step * slope) | (
        ((trial - loss).abs() <= noise * loss.abs())
        & (words[Word.TRIAL_SLOPE].abs() <= (2 * decrease - 1) * slope)
    )
    descends = fresh | (slope < 0)
    accept = active & finite & (fresh | (enough & descends))
    refuse = active & ~accept & ~fresh
    failed = refuse & ((words[Word.TRIALS] + 1 >= max_trials) | ~descends)
    forget = failed & (counters[Counter.PAIRS] > 0) & (words[Word.FORGOTTEN] == 0)

    change, moved = (trial - loss).abs(), step * words[Word.DIRECTION_MAX]
    made = accept & ~fresh
    iterations = words[Word.ITERATIONS] + made
    reasons = (
        (active & fresh & ~finite, Stop.NONFINITE),
        (accept & (words[Word.TRIAL_MAX] <= tolerance_grad), Stop.GRADIENT),
        (made & (moved <= tolerance_change), Stop.STEP),
        (made & (change < tolerance_change), Stop.LOSS),
        (accept & (iterations >= max_iter), Stop.ITERATIONS),
        (failed & ~forget, Stop.SEARCH),
    )
    status = words[Word.STATUS].clone()
    for applies, reason in reasons:
        status = torch.where(applies & (status == Stop.NOT), float(reason), status)

    shorter = step * shortening(step, loss, slope, trial, finite)
    words[Word.TURN] = torch.where(accept, Turn.ACCEPT, torch.where(forget, Turn.FORGET, 0))
    words[Word.STATUS] = status
    words[Word.ITERATIONS] = iterations
    words[Word.TRIALS] = torch.where(refuse & ~forget, words[Word.TRIALS] + 1, 0.0)
    words[Word.FORGOTTEN] = torch.where(made, 0.0, words[Word.FORGOTTEN] + forget.double())
    words[Word.TAKEN] = torch.where(made, step, torch.where(failed, 0.0, words[Word.TAKEN]))
    words[Word.MADE] += made.double()
    words[Word.JUDGED] += active.double()
    shorter = torch.where(status == Stop.NOT, shorter, 0.0)
    words[Word.STEP] = torch.where(accept, step, torch.where(refuse, shorter, 0.0))
    words[Word.LOSS] = torch.where(accept, trial, loss)
    words[Word.GRADIENT_SUM] = torch.where(accept, words[Word.TRIAL_SUM], words[Word.GRADIENT_SUM])


def shortening(step: Tensor, loss: Tensor, slope: Tensor, trial: Tensor, finite: Tensor) -> Tensor:
    """What a refused step is multiplied with: where the parabola has its minimum."""
    factor = -slope * step / (2 * (trial - loss - slope * step))
    factor = torch.where(finite & factor.isfinite(), factor, SHORTEST)
    return factor.clamp(SHORTEST, LONGEST)


def secant_keep(params: list[Tensor], words: Tensor, origin: Tensor) -> None:
    """The trial becomes the iterate, if it was accepted."""
    accepted = words[Word.TURN] == Turn.ACCEPT
    origin.copy_(torch.where(accepted, flatten(params, origin.dtype), origin))


def secant_pair(
    trial: Tensor,
    direction: Tensor,
    absolute: float,
    relative: float,
    self_scaled: bool,
    gradient: Tensor,
    s_ring: Tensor,
    y_ring: Tensor,
    gram: Tensor,
    scales: Tensor,
    projections: Tensor,
    counters: Tensor,
    words: Tensor,
) -> None:
    """The accepted trial's pair, if its curvature exceeds both bounds, and s_i.q of all pairs.

    s.y > ``absolute`` and s.y > ``relative`` |s| |y|.  All products are of the vectors as stored.
    """
    s, y, _ = put_candidate(trial, direction, gradient, s_ring, y_ring, counters, words)
    column, u = (s_ring.to(x.dtype) @ x for x in (y, -gradient))
    sums = candidate_sums(s, y, gradient)
    judge_candidate(
        column.double(), u.double(), sums, absolute, relative, self_scaled, gram, scales,
        projections, counters, words,
    )  # fmt: skip


def put_candidate(
    trial: Tensor,
    direction: Tensor,
    gradient: Tensor,
    s_ring: Tensor,
    y_ring: Tensor,
    counters: Tensor,
    words: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the accepted trial's s and y where there is room, and its gradient in its place.

    Returns:
        s and y as stored, and whether they are finite; unless they are, both are zero.
    """
    accepted, free = words[Word.TURN] == Turn.ACCEPT, free_slot(counters, len(s_ring))
    s = (words[Word.STEP].to(direction.dtype) * direction).to(s_ring.dtype)
    y = (trial - gradient).to(y_ring.dtype)
    finite = s.isfinite().all() & y.isfinite().all()
    s, y = torch.where(finite, s, 0.0), torch.where(finite, y, 0.0)
    for ring, row in ((s_ring, s), (y_ring, y)):
        ring.index_copy_(0, free, torch.where(accepted, row, ring.index_select(0, free)))
    gradient.copy_(torch.where(accepted, trial, gradient))
    return s.to(trial.dtype), y.to(trial.dtype), finite


class Sum(IntEnum):
    """Words of :func:`candidate_sums`; g is the next gradient, and q = -g."""

    S_Y = 0
    Y_Y = 1
    S_S = 2
    S_Q = 3
    NONZERO = 4
    """Number of elements of g that are not zero."""
    G_G = 5


def candidate_sums(s: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """What a candidate is judged by, beside its products with the pairs."""
    g = gradient
    return torch.stack([
        product(s, y), product(y, y), product(s, s), -product(s, g), (g != 0).sum().double(),
        product(g, g),
    ])  # fmt: skip


def judge_candidate(
    column: Tensor,
    u: Tensor,
    sums: Tensor,
    absolute: float,
    relative: float,
    self_scaled: bool,
    gram: Tensor,
    scales: Tensor,
    projections: Tensor,
    counters: Tensor,
    words: Tensor,
) -> None:
    """Store the candidate if its curvature exceeds both bounds.

    Args:
        column: s_i.y by slot.
        u: s_i.q by slot.
        sums: see :func:`candidate_sums`.
    """
    slots = gram.shape[1]
    accepted, forget = words[Word.TURN] == Turn.ACCEPT, words[Word.TURN] == Turn.FORGET
    free = free_slot(counters, slots)
    s_y, y_y = sums[Sum.S_Y], sums[Sum.Y_Y]
    column = torch.cat([column.index_copy(0, free, s_y[None]), y_y[None]])
    bound = relative * (sums[Sum.S_S] * y_y).sqrt()
    store = accepted & (s_y > absolute) & (s_y > bound) & column.isfinite().all()

    kept = gram.index_select(1, free)[:, 0]
    gram.index_copy_(1, free, torch.where(store, column, kept)[:, None])
    s_b_s = -words[Word.STEP].square() * words[Word.SLOPE]
    growth = (s_b_s / s_y).clamp(min=1.0) if self_scaled else torch.ones_like(s_y)
    growth = torch.where(growth.isfinite(), growth, 1.0)
    scales.index_copy_(0, free, torch.where(store, growth, scales.index_select(0, free)[0])[None])
    words[Word.GAMMA] = torch.where(forget, 1.0, torch.where(store, s_y / y_y, words[Word.GAMMA]))
    words[Word.CURVATURE] = torch.where(accepted, s_y, words[Word.CURVATURE])
    words[Word.SQUARE] = torch.where(accepted, y_y, words[Word.SQUARE])

    u = finite_or_zero(u.index_copy(0, free, sums[Sum.S_Q][None]))
    count_pair(counters, slots, accepted, store, forget)
    order, valid = age_order(counters, slots)
    holds = torch.zeros_like(valid).index_copy_(0, order, valid)
    u = torch.where(holds, u, 0.0)
    projections[:slots] = torch.where(accepted | forget, u, projections[:slots])
    flags = (
        (Flag.NONFINITE, words[Word.TRIAL_NONFINITE]),
        (Flag.NONZERO, sums[Sum.NONZERO]),
        (Flag.SQUARE, sums[Sum.G_G]),
    )
    for flag, value in flags:
        projections[flag] = torch.where(accepted, value, projections[flag])
    projections[Flag.NONFINITE] += (~accepted).double()


def count_pair(
    counters: Tensor, slots: int, accepted: Tensor, store: Tensor, forget: Tensor
) -> None:
    full = counters[Counter.PAIRS] == slots - 1
    kept = (~forget).long()
    counters[Counter.OLDEST_PAIR] = (
        (counters[Counter.OLDEST_PAIR] + (store & full).long()) % slots * kept
    )
    counters[Counter.PAIRS] = (counters[Counter.PAIRS] + (store & ~full).long()) * kept
    counters[Counter.STORED] += store.long()
    counters[Counter.SKIPPED] += (accepted & ~store).long()
    counters[Counter.RESETS] += forget.long()
    counters[Counter.ACCEPTED] += accepted.long()


def secant_residual(
    gradient: Tensor,
    y_ring: Tensor,
    gram: Tensor,
    counters: Tensor,
    projections: Tensor,
    words: Tensor,
    identity: bool,
    residual: Tensor,
    images: Tensor,
) -> None:
    """r = q - Y a with R a = S^T q, and z_i = y_i.r.

    With ``identity``, ``images`` are left to :func:`direction_images`, as K is applied in between.
    """
    goes_on = words[Word.TURN] != Turn.REFUSE
    a = backward_coefficients(gram, counters, projections)
    y = y_ring.to(gradient.dtype)
    r = -gradient - a.to(y.dtype) @ y
    residual.copy_(torch.where(goes_on, r, residual))
    if not identity:
        images[:-1] = torch.where(goes_on, finite_or_zero((y @ r).double()), images[:-1])


def secant_combine(
    gradient: Tensor,
    s_ring: Tensor,
    gram: Tensor,
    scales: Tensor,
    counters: Tensor,
    projections: Tensor,
    images: Tensor,
    residual: Tensor,
    lr: float,
    first: float,
    direction: Tensor,
    words: Tensor,
) -> None:
    """p = sigma gamma r + S c with r = K (q - Y a), and the first step along it.

    That is ``lr``.  While there are no pairs it is twice the last step taken, or, where there is
    none, ``lr first``, or lr min(1, 1 / sum |g|) if ``first`` is zero.
    """
    goes_on = words[Word.TURN] != Turn.REFUSE
    factor, c = scaled_coefficients(gram, scales, counters, projections, images, words)
    p = factor.to(residual.dtype) * residual + c.to(residual.dtype) @ s_ring.to(residual.dtype)
    p = torch.where(goes_on, p, direction)
    direction.copy_(p)
    words[Word.SLOPE] = product(gradient, p)
    words[Word.DIRECTION_MAX] = largest(p)
    short = words.new_full((), first)
    if first == 0:
        short = (1 / words[Word.GRADIENT_SUM]).clamp(max=1.0)
    taken = words[Word.TAKEN]
    alone = torch.where(taken > 0, GROWTH * taken, lr * short)
    start = torch.where(counters[Counter.PAIRS] == 0, alone, lr)
    start = torch.where(words[Word.STATUS] == Stop.NOT, start, 0.0)
    words[Word.STEP] = torch.where(goes_on, start, words[Word.STEP])


def scaled_coefficients(
    gram: Tensor,
    scales: Tensor,
    counters: Tensor,
    projections: Tensor,
    images: Tensor,
    words: Tensor,
) -> tuple[Tensor, Tensor]:
    """sigma gamma, and c by slot, zero where no pair is."""
    slots = gram.shape[1]
    order, valid = age_order(counters, slots)
    triangle = curvature_triangle(gram, order, valid)
    growth = torch.where(valid, scales[order], 1.0)
    newer = torch.cat([growth[1:], growth.new_ones(1)]).flip(0).cumprod(0).flip(0)
    factor = growth.prod() * words[Word.GAMMA]
    a = backward_coefficients(gram, counters, projections)[order]
    right = torch.where(valid, triangle.diagonal() * newer * a - factor * images[order], 0.0)
    c = torch.linalg.solve_triangular(triangle.mT, right[:, None], upper=False)
    return factor, torch.zeros_like(a).index_copy_(0, order, c[:, 0])


def secant_move(
    params: list[Tensor],
    origin: Tensor,
    direction: Tensor,
    step: float | None,
    limit: float,
    words: Tensor,
) -> None:
    """w = origin + t p, or the origin itself unless g.p <= ``limit``; t is ``step``, if given."""
    if step is not None:
        words[Word.STEP] = step
    moves = (words[Word.SLOPE] <= limit) & (words[Word.STEP] != 0)
    trial = origin + words[Word.STEP].to(origin.dtype) * direction
    write_back(params, torch.where(moves, trial, origin))
