"""The Kronecker-factored initial matrix: a diagonal in the eigenbases of gradient covariances.

This is close to SOAP (Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024),
where the credit belongs: Adam's second moment, kept in the slowly rotating eigenbases of Shampoo's
two factors.  Here the result is the initial matrix H0 of a quasi-Newton method, so curvature pairs
may sit on top of it; and of Shampoo's factors the diagonal blocks are kept.

The two sides of a matrix ``G`` of the gradient are cut into pieces
(:mod:`adaqn_cuda.state.plan`).  With ``G_i`` the rows of piece i, ``G_j`` the columns of piece j,
and ``G_ij`` the tile where they meet::

    L_i = .95 L_i + .05 G_i G_i^T         R_j = .95 R_j + .05 G_j^T G_j
    Q_i, Q_j: eigenbases of L_i and R_j, followed by subspace iterations
    r_ij = Q_i^T G_ij Q_j                 v = decay v + (1 - decay) r*r
    H0 X: Q_i [(Q_i^T X_ij Q_j) / sqrt(correction (v_ij + floor max v_ij) + eps)] Q_j^T

A side without factors takes the identity for its Q; without any this is the diagonal of RMSprop.
A vector is a matrix of one column, whose L is its whole covariance; as that is dear for what it
serves, long ones have none.

Where an entry of r should be zero, rounding leaves about 1e-7 |G|, and v would be the square of
that: what the gradient says nothing about would move as fast as the rest.  So v has a floor,
relative to the tile's largest v.  With a floor of c^2, a change of the gradient by 1e-7 of its size
changes the step by about 1e-7 / c.  See :func:`floor_under`.

After the first calls every factor takes in every second gradient only, which saves products and
changes little, and every ``interval``-th call refreshes its basis; factors take turns, so that all
calls cost alike.  H0 is symmetric positive definite for every orthogonal Q and every v >= 0.  It
does not depend on the signs of the columns of Q, nor on their order as long as v follows it.

===============  ===========  =========================================================
argument         shape        meaning
===============  ===========  =========================================================
``table``        (n, 9)       the matrices, see :class:`adaqn_cuda.state.plan.Column`; on the CPU
``factors``      (f,)         L and R, one square after the other
``bases``        (f,)         their eigenbases Q
``accumulator``  (d,)         ``v``: each tile's lies where the tile does
``square``       (1,)         the average of |g|^2, as v averages; float64
===============  ===========  =========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import Any

import torch
from torch import Tensor

from ..state.layout import Counter, Flag
from ..state.plan import Column, factors_in, pieces
from .acceptance import count_step, measure_gradient, step_is_accepted
from .averages import (
    Averages,
    averages_of_each,
    bias_correction,
    blend,
    clip_factor,
    divide_gradient,
    runs_of,
    surplus,
)
from .descent import descend
from .flat import flatten, gradient_vector, presence

#: Decay of the running averages L and R, per gradient that they take in.
FACTOR_DECAY = 0.95
#: Calls in which every factor takes in the gradient; later each does in every second one.
FIRST_CALLS = 10
#: Subspace iterations that find the eigenbases at the start.
FIRST_ITERATIONS = 10
#: Multiple of the mean eigenvalue that is added to L and R before their eigenbases are sought.
DAMPING = 1e-3
#: Roots of the floor under v: the part that stays, in units of the state's rounding error, and that
#: of the first step.
NOISE_FLOOR, FIRST_FLOOR = 1e3, 3e-3
#: Entries of factors that are refreshed at a time; bounds the float64 scratch memory.
CHUNK = 2**24


def takes_in(call: int, factor: int) -> bool:
    """Whether a factor takes in the gradient of a call, both counted as in :class:`Strip`."""
    return call <= FIRST_CALLS or (call + factor) % 2 == 0


def turns(interval: int) -> int:
    """Calls after which every factor and basis has had its turn, from the first ones on."""
    return lcm(2, interval)


def iterations(call: int, factor: int, interval: int) -> int:
    """Subspace iterations of a factor's basis in a call.

    The bases are sought with the first gradient.  Where that is dropped or zero, they set out from
    the identity, one iteration at a time.
    """
    return FIRST_ITERATIONS if call == 1 else int((call + factor) % interval == 0)


def floor_under(counters: Tensor, pending: int, dtype: torch.dtype) -> Tensor:
    """The floor under v, as a share of the largest v.

    A part stays: a thousand times the rounding error, squared.  At first there is more, as a few
    squares say little about an average.  That part falls as 1 / t^4: a problem solved to high
    precision in float64 ends up with v that differ by many orders of magnitude.
    """
    t = (counters[Counter.ACCEPTED] + pending).clamp(min=1).double()
    noise = NOISE_FLOOR * torch.finfo(dtype).eps
    return noise**2 + FIRST_FLOOR**2 / t**4


# --------------------------------------------------------------------------- the table, read


@dataclass(frozen=True)
class Strip:
    """Pieces of one length of one side of equal matrices, and their factors.

    Args:
        start: first row, or column, of the first piece.
        count: pieces of each matrix.
        side: their length.
        places: where the square of each begins in the flat buffers, matrix after matrix.
        numbers: number of each among all factors, in the order of their places.
    """

    start: int
    count: int
    side: int
    places: tuple[int, ...]
    numbers: tuple[int, ...]

    def of(self, x: Tensor) -> Tensor:
        """Rows of x, (n, a, b), piece by piece: (n count, side, b)."""
        rows = x[:, self.start : self.start + self.count * self.side]
        return rows.reshape(-1, self.side, x.shape[2])

    def squares(self, flat: Tensor, which: Sequence[int] | None = None) -> Tensor:
        """Factors or bases in ``flat``, (n count, side, side), or some of them."""
        return torch.stack([self._square(flat, i) for i in self._some(which)])

    def put(self, flat: Tensor, squares: Tensor, which: Sequence[int]) -> None:
        """Undo :meth:`squares`."""
        targets = [self._square(flat, i) for i in self._some(which)]
        torch._foreach_copy_(targets, list(squares))

    def _some(self, which: Sequence[int] | None) -> Sequence[int]:
        return range(len(self.places)) if which is None else which

    def _square(self, flat: Tensor, index: int) -> Tensor:
        place = self.places[index]
        return flat[place : place + self.side**2].view(self.side, self.side)


@dataclass(frozen=True)
class Side:
    """A side of equal matrices.

    Args:
        cuts: start, count and length of its longer pieces and of its shorter ones, if there are.
        strips: the same pieces with their factors; none without factors.
    """

    cuts: tuple[tuple[int, int, int], ...]
    strips: tuple[Strip, ...]

    def product(self, x: Tensor, bases: Tensor, transposed: bool) -> Tensor:
        """Q x, or Q^T x, with the block-diagonal Q of this side."""
        if not self.strips:
            return x
        parts = []
        for strip in self.strips:
            q = strip.squares(bases)
            part = (q.mT if transposed else q).bmm(strip.of(x))
            parts.append(part.view(len(x), -1, x.shape[2]))
        return torch.cat(parts, 1)


@dataclass(frozen=True)
class Bucket:
    """Matrices of equal shape, cut and averages.

    Args:
        params: indices of their parameters.
        own: how their gradients are averaged.
        starts: where they begin in the flat vectors.
        shape: rows and columns.
        left: their rows.
        right: their columns.
    """

    params: tuple[int, ...]
    own: Averages
    starts: tuple[int, ...]
    shape: tuple[int, int]
    left: Side
    right: Side

    def parts(self, flat: Tensor) -> list[Tensor]:
        """The matrices in a flat vector."""
        size = self.shape[0] * self.shape[1]
        return [flat[start : start + size].view(self.shape) for start in self.starts]

    def gather(self, flat: Tensor) -> Tensor:
        """The same, stacked: (n, a, b)."""
        return torch.stack(self.parts(flat))

    def rotate(self, x: Tensor, bases: Tensor) -> Tensor:
        """Q_L^T x Q_R."""
        return self.right.product(self.left.product(x, bases, True).mT, bases, True).mT

    def rotate_back(self, x: Tensor, bases: Tensor) -> Tensor:
        """Q_L x Q_R^T."""
        return self.left.product(self.right.product(x.mT, bases, False).mT, bases, False)

    def tiles(self, x: Tensor) -> Iterator[Tensor]:
        """Views of x, (n, a, b), that together cover it: (n, pieces, side, pieces, side)."""
        for row, rows, height in self.left.cuts:
            for column, columns, width in self.right.cuts:
                part = x[:, row : row + rows * height, column : column + columns * width]
                yield part.unflatten(2, (columns, width)).unflatten(1, (rows, height))

    @property
    def factored(self) -> bool:
        return bool(self.left.strips or self.right.strips)


def buckets_of(
    table: Tensor, each: Sequence[Averages], present: Sequence[bool] | None = None
) -> tuple[Bucket, ...]:
    """Equal matrices together, with averages by parameter; of those that are ``present``."""
    rows = tuple(map(tuple, table.tolist()))
    some = None if present is None or all(present) else tuple(present)
    return _buckets(rows, tuple(each), some)


@lru_cache(maxsize=64)
def _buckets(
    rows: tuple[tuple[int, ...], ...],
    each: tuple[Averages, ...],
    present: tuple[bool, ...] | None,
) -> tuple[Bucket, ...]:
    groups: dict[Any, list[tuple[tuple[int, ...], list[int]]]] = {}
    for row in rows:
        own = list(range(row[Column.TURN], row[Column.TURN] + factors_in(row)))
        if present is None or present[row[Column.PARAM]]:
            factored = (row[Column.LEFT] >= 0, row[Column.RIGHT] >= 0)
            key = (each[row[Column.PARAM]], *row[Column.ROWS : Column.LEFT], *factored)
            groups.setdefault(key, []).append((row, own))
    return tuple(_bucket(averages, members) for (averages, *_), members in groups.items())


def _bucket(averages: Averages, members: list[tuple[tuple[int, ...], list[int]]]) -> Bucket:
    rows = [row for row, _ in members]
    first = rows[0]
    on_the_left = first[Column.ROW_PIECES] if first[Column.LEFT] >= 0 else 0
    return Bucket(
        tuple(row[Column.PARAM] for row in rows),
        averages,
        tuple(row[Column.START] for row in rows),
        (first[Column.ROWS], first[Column.COLUMNS]),
        _side(
            first[Column.ROWS], first[Column.ROW_PIECES], [row[Column.LEFT] for row in rows],
            [numbers[:on_the_left] for _, numbers in members],
        ),
        _side(
            first[Column.COLUMNS], first[Column.COLUMN_PIECES],
            [row[Column.RIGHT] for row in rows], [numbers[on_the_left:] for _, numbers in members],
        ),
    )  # fmt: skip


def _side(length: int, count: int, places: list[int], numbers: list[list[int]]) -> Side:
    sizes = pieces(length, count)
    cuts, strips, first = [], [], 0
    while first < count:
        many, side = sizes.count(sizes[first]), sizes[first]
        start = sum(sizes[:first])
        cuts.append((start, many, side))
        before = sum(size**2 for size in sizes[:first])
        if places[0] >= 0:
            squares = [p + before + k * side**2 for p in places for k in range(many)]
            own = [n for chosen in numbers for n in chosen[first : first + many]]
            strips.append(Strip(start, many, side, tuple(squares), tuple(own)))
        first += many
    return Side(tuple(cuts), tuple(strips))


# --------------------------------------------------------------------------- eigenbases


def orthonormal(z: Tensor) -> tuple[Tensor, Tensor]:
    """The Q of QR decompositions with a positive diagonal of R, and where they succeeded.

    Cholesky-QR: |Q^T Q - I| is at most about 1e-16 times the square of the condition number of z.

    Args:
        z: (n, a, a), in float64.

    Returns:
        Q: (n, a, a), arbitrary values where it failed.
        ok: (n, 1, 1).
    """
    root, info = torch.linalg.cholesky_ex(z.mT.bmm(z))
    q = torch.linalg.solve_triangular(root, z.mT, upper=False).mT
    ok = (info == 0)[:, None, None] & q.isfinite().all(-1, True).all(-2, True)
    return q, ok


def subspace_iteration(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the columns of Q by Rayleigh quotients, from the largest on; then Q = orth(A Q).

    The positive diagonal of R keeps the signs of columns that move little.  A factor whose QR fails
    keeps its (sorted) basis.

    Args:
        matrix: A, (n, a, a), symmetric.
        basis: Q, (n, a, a), orthogonal.

    Returns:
        The new Q, and the old places of its columns, (n, a).
    """
    image = matrix.bmm(basis)
    order = (basis * image).sum(-2).argsort(dim=-1, descending=True, stable=True)
    columns = order[:, None, :].expand_as(basis)
    turned, ok = orthonormal(image.gather(2, columns))
    return torch.where(ok, turned, basis.gather(2, columns)), order


def refreshed(factor: Tensor, basis: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Bases after some subspace iterations, and the old places of their columns.

    The condition number of the damped, normalised matrix is at most 1 + a / DAMPING, so that
    Cholesky-QR in float64 succeeds for every finite factor, of rank 1 too, and whatever the basis.
    The deviation from orthogonality is at most 1e-4 at a = 600 and grows like a^2, but is next to
    none once the columns are close to eigenvectors.
    Where the factor is zero, 0/0 makes it fail, which keeps the basis.

    Args:
        factor: L or R, (n, a, a).
        basis: Q, (n, a, a).
    """
    matrix = factor.double()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    matrix = matrix / diagonal.mean(-1)[:, None, None]
    matrix.diagonal(dim1=-2, dim2=-1).add_(DAMPING)
    order = torch.arange(factor.shape[-1], device=factor.device).expand(len(factor), -1)
    turned = basis.double()
    for _ in range(steps):
        turned, step = subspace_iteration(matrix, turned)
        order = order.gather(-1, step)
    return turned.to(basis.dtype), order


# --------------------------------------------------------------------------- a gradient comes in


def kronecker_accumulate(
    params: list[Tensor],
    grads: list[Tensor | None],
    table: Tensor,
    projections: Tensor,
    counters: Tensor,
    grad_scale: Tensor | None,
    maximize: bool,
    max_grad_norm: float,
    group_sizes: list[int],
    keeps: list[float],
    adds: list[float],
    square_keep: float,
    call: int,
    interval: int,
    accumulator: Tensor,
    factors: Tensor,
    bases: Tensor,
    square: Tensor,
) -> None:
    """g enters the factors, the bases follow, then g enters v; after pass 1.

    The average of |g|^2, which is one for all, decays by ``square_keep``.  Of parameters without a
    gradient, every number keeps every bit; of all, if the step is dropped.
    """
    zeros = [0.0] * len(group_sizes)
    each = averages_of_each(group_sizes, zeros, keeps, adds, zeros)
    accepted = step_is_accepted(projections, counters)
    clip = clip_factor(projections, max_grad_norm)
    g = gradient_vector(params, grads, accumulator.dtype, grad_scale, maximize) * clip
    for bucket in buckets_of(table, each, [g is not None for g in grads]):
        x, v = bucket.gather(g), bucket.gather(accumulator)
        sides = ((bucket.left, x, v), (bucket.right, x.mT, v.mT))
        for side, rows, v_rows in sides:
            for strip in side.strips:
                _take_in(strip, rows, factors, accepted, call)
                _refresh(strip, v_rows, factors, bases, accepted, call, interval)
        r = bucket.rotate(x, bases)
        new = bucket.own.keep * v + bucket.own.add * r * r
        for old, entered in zip(bucket.parts(accumulator), new, strict=True):
            old.copy_(torch.where(accepted, entered, old))
    norm = projections[Flag.SQUARE].sqrt().clamp(max=max_grad_norm)
    mean = square_keep * square + (1 - square_keep) * norm * norm
    square.copy_(torch.where(accepted, mean, square))


def _take_in(strip: Strip, x: Tensor, factors: Tensor, accepted: Tensor, call: int) -> None:
    """L = .95 L + .05 G G^T, for the factors whose turn it is."""
    due = [i for i, number in enumerate(strip.numbers) if takes_in(call, number)]
    if not due:
        return
    rows = strip.of(x)
    g = torch.stack([rows[i] for i in due])
    old = strip.squares(factors, due)
    new = torch.baddbmm(old, g, g.mT, beta=FACTOR_DECAY, alpha=1 - FACTOR_DECAY)
    strip.put(factors, torch.where(accepted, new, old), due)


def _refresh(
    strip: Strip,
    v: Tensor,
    factors: Tensor,
    bases: Tensor,
    accepted: Tensor,
    call: int,
    interval: int,
) -> None:
    """The bases, turned towards the eigenvectors, and rows of v, in place, in their order."""
    steps = [iterations(call, number, interval) for number in strip.numbers]
    due = [i for i, count in enumerate(steps) if count]
    still = torch.arange(strip.side, device=bases.device)
    orders = [still] * len(steps)
    chunk = max(CHUNK // strip.side**2, 1)
    for first in range(0, len(due), chunk):
        some = due[first : first + chunk]
        old = strip.squares(bases, some)
        new, order = refreshed(strip.squares(factors, some), old, steps[some[0]])
        strip.put(bases, torch.where(accepted, new, old), some)
        for i, places in zip(some, order, strict=True):
            orders[i] = places
    if due:
        rows = strip.of(v)
        taken = rows.gather(1, torch.stack(orders)[:, :, None].expand_as(rows))
        v[:, strip.start : strip.start + strip.count * strip.side] = taken.view(
            len(v), -1, v.shape[2]
        )


# --------------------------------------------------------------------------- H0 and its inverse


def kronecker_apply(
    table: Tensor,
    counters: Tensor,
    accumulator: Tensor,
    bases: Tensor,
    group_sizes: list[int],
    keeps: list[float],
    epsilons: list[float],
    correct_bias: bool,
    pending: int,
    inverse: bool,
    x: Tensor,
) -> None:
    """x = H0 x, or its inverse's product, in place.

    ``pending`` is 1 before an accepted step is counted, and 0 after.
    """
    zeros = [0.0] * len(group_sizes)
    each = averages_of_each(group_sizes, zeros, keeps, zeros, epsilons)
    floor = floor_under(counters, pending, x.dtype).to(x.dtype)
    scaled: Callable[[Tensor, Tensor], Tensor] = torch.mul if inverse else torch.div
    for bucket in buckets_of(table, each):
        correction = bias_correction(counters, bucket.own.keep, correct_bias, pending).to(x.dtype)
        v = bucket.gather(accumulator)
        if bucket.factored:
            for tile in bucket.tiles(v):
                tile.add_(floor * tile.amax((2, 4), keepdim=True))
        root = torch.sqrt(correction * v + bucket.own.eps)
        r = scaled(bucket.rotate(bucket.gather(x), bases), root)
        torch._foreach_copy_(bucket.parts(x), list(bucket.rotate_back(r, bases)))


# --------------------------------------------------------------------------- the step


def kronecker_step(
    params: list[Tensor],
    grads: list[Tensor | None],
    table: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    maximize: bool,
    max_grad_norm: float,
    betas: list[float],
    keeps: list[float],
    adds: list[float],
    epsilons: list[float],
    correct_bias: bool,
    square_keep: float,
    call: int,
    interval: int,
    group_sizes: list[int],
    lr: list[float],
    weight_decay: list[float],
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
    momentum: Tensor | None,
    accumulator: Tensor,
    factors: Tensor,
    bases: Tensor,
    square: Tensor,
    projections: Tensor,
    counters: Tensor,
) -> None:
    """A whole step without pairs: w = (1 - lr weight_decay) w - lr H0 q.

    A gradient that is an outlier is divided by what makes it one, before all else.  Of
    ``projections`` there are only the flags.
    """
    dtype = accumulator.dtype
    measure_gradient(
        gradient_vector(params, grads, dtype, grad_scale, maximize), found_inf, projections
    )
    grad_scale = shorten_outlier(
        square, square_keep, correct_bias, 0.0, max_grad_norm, grad_scale,
        projections.new_empty(0), projections, counters,
    )  # fmt: skip
    kronecker_accumulate(
        params, grads, table, projections, counters, grad_scale, maximize, max_grad_norm,
        group_sizes, keeps, adds, square_keep, call, interval, accumulator, factors, bases, square,
    )  # fmt: skip
    accepted, here = step_is_accepted(projections, counters), presence(params, grads)
    g = gradient_vector(params, grads, dtype, grad_scale, maximize)
    g = g * clip_factor(projections, max_grad_norm)
    runs = runs_of(params, averages_of_each(group_sizes, betas, keeps, adds, epsilons))
    p = blend(g, momentum, counters, runs, accepted, here)
    kronecker_apply(
        table, counters, accumulator, bases, group_sizes, keeps, epsilons, correct_bias, 1, False, p
    )
    rates = (group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor)
    descend(params, flatten(params, dtype), p, accepted & here, *rates)
    count_step(counters, projections, accepted, fisher_size=1)


def shorten_outlier(
    square: Tensor,
    keep: float,
    correct_bias: bool,
    beta: float,
    max_grad_norm: float,
    grad_scale: Tensor | None,
    moments: Tensor,
    projections: Tensor,
    counters: Tensor,
) -> Tensor:
    """Go on after pass 1 as if the gradients had been given divided by what makes them an outlier.

    Returns:
        What the gradients as given are to be divided by.
    """
    mean_square = bias_correction(counters, keep, correct_bias, pending=0) * square[0]
    excess = surplus(projections, mean_square)
    divide_gradient(projections, moments, counters, beta, max_grad_norm, excess)
    excess = excess.float()
    return excess if grad_scale is None else excess * grad_scale
