"""The Kronecker-factored initial matrix: a diagonal in the eigenbases of gradient covariances.

This is close to SOAP (Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024),
where the credit belongs: Adam's second moment, kept in the slowly rotating eigenbases of Shampoo's
two factors.  Here the result is the initial matrix H0 of a quasi-Newton method, so curvature pairs
may sit on top of it.

For a matrix block ``G`` (a x b) of the gradient, with both sides factored::

    L = .95 L + .05 G G^T                 R = .95 R + .05 G^T G
    Q_L, Q_R: eigenbases of L and R, followed by subspace iterations
    r = Q_L^T G Q_R                       v = decay v + (1 - decay) r*r
    H0 x = Q_L [(Q_L^T X Q_R) / sqrt(correction (v + floor max v) + eps)] Q_R^T

A side of length 1, or longer than ``max_factor_dim``, takes the identity for its Q; without any
factored side this is the diagonal of RMSprop.  A vector is a matrix of one column, whose L is its
whole covariance; as that is dear for what it serves, vectors have a limit of their own.

Where an entry of r should be zero, rounding leaves about 1e-7 |G|, and v would be the square of
that: what the gradient says nothing about would move as fast as the rest.  So in
every block with a factored side v has a floor, relative to the block's largest v.  With a floor of
c^2, a change of the gradient by 1e-7 of its size changes the step by about 1e-7 / c.  See
:func:`floor_under`.

After the first calls L and R take in every second gradient only, which saves products and changes
little.  H0 is symmetric positive definite for every orthogonal Q and every v >= 0.  It does not
depend on the signs of the columns of Q, nor on their order as long as v follows it.

No function reads a device value on the host; decisions are taken with ``torch.where``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

#: Decay of the running averages L and R, per gradient that they take in.
FACTOR_DECAY = 0.95
#: Calls of which L and R take in every gradient; later they take in every second one.
FIRST_CALLS = 10
#: Subspace iterations that find the eigenbases at the start.
FIRST_ITERATIONS = 10
#: Multiple of the mean eigenvalue that is added to L and R before their eigenbases are sought.
DAMPING = 1e-3
#: Roots of the floor under v: the part that stays, in units of the state's rounding error, and that
#: of the first step.
NOISE_FLOOR, FIRST_FLOOR = 1e3, 3e-3
#: Entries of the factors that are refreshed at a time; bounds the float64 scratch memory.
CHUNK = 2**24


def schedule(calls: int, interval: int) -> tuple[bool, int]:
    """Whether L and R take in the gradient of a call, and the subspace iterations that follow.

    The bases are sought with the first gradient.  Where that is dropped or zero, they set out from
    the identity, one iteration at a time.

    Args:
        calls: number of the call, from 1 on.
        interval: calls between two updates of the bases.
    """
    taken = calls <= FIRST_CALLS or calls % 2 == 0
    return taken, FIRST_ITERATIONS if calls == 1 else int(calls % interval == 0)


def floor_under(accepted: Tensor, dtype: torch.dtype) -> Tensor:
    """The floor under v, as a share of the largest v.

    A part stays: a thousand times the rounding error, squared.  At first there is more, as a few
    squares say little about an average.  That part falls as 1 / t^4: a problem solved to high
    precision in float64 ends up with v that differ by many orders of magnitude.

    Args:
        accepted: 0-d; steps before this one.
        dtype: of the state.
    """
    noise = NOISE_FLOOR * torch.finfo(dtype).eps
    return noise**2 + FIRST_FLOOR**2 / (accepted + 1).double() ** 4


# --------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Bucket:
    """Equal blocks of some parameters, stacked.

    Args:
        members: indices of the parameters, in order.
        shape: (n, a, b): blocks, rows and columns of a block.
        left: which of the factors of side a are L of these blocks; ``None`` without L.
        right: which of the factors of side b are R of these blocks; ``None`` without R.
    """

    members: tuple[int, ...]
    shape: tuple[int, int, int]
    left: slice | None
    right: slice | None

    @property
    def factored(self) -> bool:
        """Whether any side has a factor."""
        return self.left is not None or self.right is not None

    def sides(self, stacks: dict[int, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The left and right part, (n, a, ...) and (n, b, ...), of stacks by side length."""
        _, a, b = self.shape
        left = None if self.left is None else stacks[a][self.left]
        right = None if self.right is None else stacks[b][self.right]
        return left, right


class Plan:
    """What goes where: parameters into buckets, factors into one stack per side length.

    Args:
        params: tensors; only their shapes matter.
        blocks: number of row blocks of each.
        max_factor_dim: sides longer than this are not factored.
        max_vector_dim: nor are vectors longer than this.

    Attributes:
        shapes: shape of every parameter.
        counts: number of row blocks of every parameter.
        buckets: all buckets; together they hold every parameter once.
        factors: side length -> number of factors of that side.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        blocks: Sequence[int],
        max_factor_dim: int,
        max_vector_dim: int,
    ) -> None:
        self.shapes = [p.shape for p in params]
        self.counts = list(blocks)
        self.longest, self.longest_vector = max_factor_dim, min(max_vector_dim, max_factor_dim)
        self.buckets: list[Bucket] = []
        self.factors: dict[int, int] = {}
        groups: dict[tuple[int, int] | None, list[int]] = {}
        for index in range(len(self.shapes)):
            groups.setdefault(self._matrix(index), []).append(index)
        for matrix, members in groups.items():
            self._add_bucket(matrix, members)

    def _matrix(self, index: int) -> tuple[int, int] | None:
        """Rows and columns of one block; ``None`` if no side of it is factored."""
        shape = self.shapes[index]
        if len(shape) == 0 or shape.numel() == 0:
            return None
        sides = shape[0] // self.counts[index], prod(shape[1:])
        longest = self.longest if len(shape) > 1 else self.longest_vector
        return sides if any(1 < side <= longest for side in sides) else None

    def _add_bucket(self, matrix: tuple[int, int] | None, members: list[int]) -> None:
        if matrix is None:
            size = sum(self.shapes[i].numel() for i in members)
            self.buckets.append(Bucket(tuple(members), (1, size, 1), None, None))
            return
        n = sum(self.counts[i] for i in members)
        left, right = (
            self._reserve(side, n) if 1 < side <= self.longest else None for side in matrix
        )
        self.buckets.append(Bucket(tuple(members), (n, *matrix), left, right))

    def _reserve(self, side: int, n: int) -> slice:
        """Places for ``n`` more factors of ``side``."""
        start = self.factors.get(side, 0)
        self.factors[side] = start + n
        return slice(start, start + n)

    def buffers(self) -> list[tuple[int, ...]]:
        """Shapes of the buffers: the accumulator, then factors and bases by side length."""
        stacks = [(n, side, side) for side, n in self.factors.items()]
        return [(sum(s.numel() for s in self.shapes),), *(s for s in stacks for _ in range(2))]


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

    The positive diagonal of R keeps the signs of columns that move little.  A block whose QR fails
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


def refreshed(factor: Tensor, basis: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
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
    for _ in range(iterations):
        turned, step = subspace_iteration(matrix, turned)
        order = order.gather(-1, step)
    return turned.to(basis.dtype), order


def permuted(v: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """v, (n, a, b), with rows and columns taken from places (n, a) and (n, b)."""
    if rows is not None:
        v = v.gather(1, rows[:, :, None].expand_as(v))
    if columns is not None:
        v = v.gather(2, columns[:, None, :].expand_as(v))
    return v


def sandwich(left: Tensor | None, x: Tensor, right: Tensor | None) -> Tensor:
    """left @ x @ right, in batches; ``None`` is the identity."""
    if left is not None:
        x = left.bmm(x)
    return x if right is None else x.bmm(right)


def transposed(side: Tensor | None) -> Tensor | None:
    return None if side is None else side.mT


# --------------------------------------------------------------------------- the matrix


class Kronecker:
    """The initial matrix H0 over ``params``, one after the other in flat vectors of d entries.

    Tensors count as matrices (first dimension, rest) and are cut into row blocks of equal height.
    Equal blocks are stacked, so that all of them take part in one batched product; so are the
    factors of equal side, whichever bucket they belong to.

    Args:
        params: real tensors; only their shapes and the device matter.
        blocks: number of row blocks of each.
        dtype: dtype of the state, float32 or float64.
        max_factor_dim: sides longer than this are not factored.
        max_vector_dim: nor are vectors longer than this.

    Attributes:
        accumulator: v, (d,), bucket after bucket.
        factors: L and R by side length, (n, side, side).
        bases: Q_L and Q_R likewise.
    """

    accumulator: Tensor
    factors: dict[int, Tensor]
    bases: dict[int, Tensor]

    def __init__(
        self,
        params: Sequence[Tensor],
        blocks: Sequence[int],
        dtype: torch.dtype,
        max_factor_dim: int,
        max_vector_dim: int,
    ) -> None:
        self.plan = Plan(params, blocks, max_factor_dim, max_vector_dim)
        device = params[0].device
        self._bind([torch.zeros(s, dtype=dtype, device=device) for s in self.plan.buffers()])
        for basis in self.bases.values():
            basis.diagonal(dim1=-2, dim2=-1).fill_(1)

    @staticmethod
    def bytes(
        params: Sequence[Tensor],
        blocks: Sequence[int],
        dtype: torch.dtype,
        max_factor_dim: int,
        max_vector_dim: int,
    ) -> int:
        """Device memory that the buffers for such parameters take."""
        shapes = Plan(params, blocks, max_factor_dim, max_vector_dim).buffers()
        return sum(map(prod, shapes)) * dtype.itemsize

    # ------------------------------------------------------------------ buffers

    def tensors(self) -> list[Tensor]:
        """All buffers: the accumulator, then factors and bases by side length."""
        pairs = zip(self.factors.values(), self.bases.values(), strict=True)
        return [self.accumulator, *(tensor for pair in pairs for tensor in pair)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Kronecker:
        """The same matrix over other buffers, given in the order of :meth:`tensors`."""
        other = copy.copy(self)
        other._bind(tensors)
        return other

    def _bind(self, tensors: Sequence[Tensor]) -> None:
        self.accumulator, *stacks = tensors
        self.factors = dict(zip(self.plan.factors, stacks[::2], strict=True))
        self.bases = dict(zip(self.plan.factors, stacks[1::2], strict=True))

    def views(self) -> list[dict[str, Tensor]]:
        """Per parameter, its part of every buffer.

        ``accumulator`` is shaped like the parameter; ``left`` and ``left_basis`` are (k, a, a),
        ``right`` and ``right_basis`` (k, b, b) for k row blocks.  Sides without factors are absent.
        """
        entries: list[dict[str, Tensor]] = [{} for _ in self.plan.shapes]
        start = 0
        for bucket in self.plan.buckets:
            stacks = zip(
                ("left", "right", "left_basis", "right_basis"),
                (*bucket.sides(self.factors), *bucket.sides(self.bases)),
                strict=True,
            )
            stacks = {name: stack for name, stack in stacks if stack is not None}
            block = 0
            for index in bucket.members:
                shape, k = self.plan.shapes[index], self.plan.counts[index]
                v = self.accumulator[start : start + shape.numel()].view(shape)
                parts = {name: stack[block : block + k] for name, stack in stacks.items()}
                entries[index] = {"accumulator": v, **parts}
                start, block = start + shape.numel(), block + k
        return entries

    # ------------------------------------------------------------------ between layouts

    def _sides(self, stacks: dict[int, Tensor]) -> list[tuple[Tensor | None, Tensor | None]]:
        """Left and right part of every bucket, of stacks by side length."""
        return [bucket.sides(stacks) for bucket in self.plan.buckets]

    def _stacks(self, flat: Tensor) -> list[Tensor]:
        """(n, a, b) of every bucket; ``flat`` holds bucket after bucket."""
        shapes = [bucket.shape for bucket in self.plan.buckets]
        pieces = flat.split_with_sizes([prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _gather(self, x: Tensor) -> list[Tensor]:
        """(n, a, b) of every bucket; ``x`` holds parameter after parameter."""
        pieces = x.split_with_sizes([shape.numel() for shape in self.plan.shapes])
        return [
            joined([pieces[i] for i in bucket.members]).view(bucket.shape)
            for bucket in self.plan.buckets
        ]

    def _scatter(self, stacks: list[Tensor], out: Tensor) -> None:
        """Undo :meth:`_gather`."""
        pieces: list[Tensor] = [out] * len(self.plan.shapes)
        for bucket, stack in zip(self.plan.buckets, stacks, strict=True):
            sizes = [self.plan.shapes[i].numel() for i in bucket.members]
            parts = stack.reshape(-1).split_with_sizes(sizes)
            for index, part in zip(bucket.members, parts, strict=True):
                pieces[index] = part
        torch.cat(pieces, out=out)

    def _gradient(self, grads: Sequence[Tensor | None], scale: Tensor) -> Tensor:
        """scale * g in the state's dtype, bucket after bucket."""
        pieces = [
            self.accumulator.new_zeros(self.plan.shapes[index].numel())
            if grads[index] is None
            else grads[index].reshape(-1).to(self.accumulator.dtype)
            for bucket in self.plan.buckets
            for index in bucket.members
        ]
        return torch.cat(pieces).mul_(scale)

    def _rotated(self, stacks: list[Tensor]) -> Tensor:
        """Q_L^T X Q_R, bucket after bucket."""
        return joined(
            [
                sandwich(transposed(left), x, right).reshape(-1)
                for x, (left, right) in zip(stacks, self._sides(self.bases), strict=True)
            ]
        )

    # ------------------------------------------------------------------ updates

    def accumulated(
        self,
        grads: Sequence[Tensor | None],
        scale: Tensor,
        accepted: Tensor,
        decay: float,
        refresh: int,
        taken: bool = True,
    ) -> Kronecker:
        """The matrix that has taken in a gradient: L and R, then the bases, then v.

        Buffers that do not change are shared with this one, which stays as it is: see :meth:`take`.

        Args:
            grads: a gradient per parameter, in any floating dtype; where it is ``None``, what
                belongs to the parameter keeps every bit.
            scale: 0-d; what the gradient is multiplied with.
            accepted: 0-d bool; where it is false, every buffer keeps every bit.
            decay: of v.
            refresh: subspace iterations of the bases; 0 leaves them as they are.
            taken: whether L and R take it in, too.
        """
        moving, sides = self._moving(grads, accepted)
        stacks = self._stacks(self._gradient(grads, scale))
        new, v = copy.copy(self), self.accumulator
        if taken:
            new.factors = self._with_gradient(stacks, sides)
        if refresh:
            new.bases, v = new._refreshed(refresh, sides)
        r = new._rotated(stacks)
        v = (decay * v).addcmul_(r, r, value=1 - decay)
        old = self._stacks(self.accumulator)
        parts = zip(moving, self._stacks(v), old, strict=True)
        new.accumulator = joined([torch.where(m, v, o).reshape(-1) for m, v, o in parts])
        return new

    def accumulate(self, *args: Any, **kwargs: Any) -> None:
        """Take in a gradient; arguments as in :meth:`accumulated`."""
        self.take(self.accumulated(*args, **kwargs))

    def take(self, other: Kronecker) -> None:
        """Copy the buffers of ``other`` into this one's."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            if theirs is not mine:
                mine.copy_(theirs)

    def _moving(
        self, grads: Sequence[Tensor | None], accepted: Tensor
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Which blocks of every bucket, and which factors of every side, change.

        Those of parameters that have a gradient, if the step is accepted; to be broadcast over
        (n, a, b) and (n, side, side).
        """
        if all(g is not None for g in grads):
            return [accepted] * len(self.plan.buckets), dict.fromkeys(self.factors, accepted)
        still = torch.zeros_like(accepted)
        blocks: list[Tensor] = []
        sides: dict[int, list[Tensor]] = {side: [] for side in self.factors}
        for bucket in self.plan.buckets:
            mask = torch.cat(
                [
                    (still if grads[i] is None else accepted).expand(
                        self.plan.counts[i] if bucket.factored else self.plan.shapes[i].numel()
                    )
                    for i in bucket.members
                ]
            )
            blocks.append(mask[:, None, None] if bucket.factored else mask[None, :, None])
            for side, place in zip(bucket.shape[1:], (bucket.left, bucket.right), strict=True):
                if place is not None:  # in the order in which the plan reserved their places
                    sides[side].append(blocks[-1])
        return blocks, {side: torch.cat(masks) for side, masks in sides.items()}

    def _with_gradient(self, stacks: list[Tensor], moving: dict[int, Tensor]) -> dict[int, Tensor]:
        """L = .95 L + .05 G G^T,  R = .95 R + .05 G^T G."""
        factors = {side: FACTOR_DECAY * stack for side, stack in self.factors.items()}
        for g, (left, right) in zip(stacks, self._sides(factors), strict=True):
            if left is not None:
                left.baddbmm_(g, g.mT, alpha=1 - FACTOR_DECAY)
            if right is not None:
                right.baddbmm_(g.mT, g, alpha=1 - FACTOR_DECAY)
        return {
            side: torch.where(moving[side], factors[side], stack)
            for side, stack in self.factors.items()
        }

    def _refreshed(
        self, iterations: int, moving: dict[int, Tensor]
    ) -> tuple[dict[int, Tensor], Tensor]:
        """The bases, turned towards the eigenvectors, and v in the order of their columns."""
        bases, places = {}, {}
        for side, stack in self.factors.items():
            chunk = max(CHUNK // side**2, 1)
            parts = zip(stack.split(chunk), self.bases[side].split(chunk), strict=True)
            turned, orders = zip(*(refreshed(*part, iterations) for part in parts), strict=True)
            bases[side] = torch.where(moving[side], joined(turned), self.bases[side])
            places[side] = joined(orders)
        pairs = zip(self._stacks(self.accumulator), self._sides(places), strict=True)
        return bases, joined([permuted(v, *sides).reshape(-1) for v, sides in pairs])

    # ------------------------------------------------------------------ products

    def apply(
        self,
        x: Tensor,
        correction: Tensor | float,
        eps: float,
        out: Tensor,
        floor: Tensor | float = 0.0,
    ) -> None:
        """out = H0 x.

        Args:
            x: (d,), parameter after parameter, in the state's dtype.
            correction: factor of v, such as 1 / (1 - decay^t).
            eps: added to v inside the square root.
            out: (d,), may be ``x``.
            floor: share of the largest v that is added to each, as of :func:`floor_under`.
        """
        self._product(torch.div, x, self._root(correction, eps, floor), out)

    def apply_inverse(
        self,
        x: Tensor,
        correction: Tensor | float,
        eps: float,
        out: Tensor,
        floor: Tensor | float = 0.0,
    ) -> None:
        """out = B0 x with B0 = H0^-1; arguments as in :meth:`apply`."""
        self._product(torch.mul, x, self._root(correction, eps, floor), out)

    def _product(
        self,
        scaled: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        root: Tensor,
        out: Tensor,
    ) -> None:
        rotated = self._stacks(scaled(self._rotated(self._gather(x)), root))
        products = [
            sandwich(left, r, transposed(right))
            for r, (left, right) in zip(rotated, self._sides(self.bases), strict=True)
        ]
        self._scatter(products, out)

    def _root(self, correction: Tensor | float, eps: float, floor: Tensor | float) -> Tensor:
        """sqrt(correction (v + floor max v) + eps), bucket after bucket."""
        v = correction * self.accumulator
        for bucket, part in zip(self.plan.buckets, self._stacks(v), strict=True):
            if bucket.factored:
                part.add_(floor * part.amax((1, 2), keepdim=True))
        return v.add_(eps).sqrt_()

    def mean_square(self, correction: Tensor | float) -> Tensor:
        """The average of |g|^2, which no rotation changes; in float64."""
        return correction * self.accumulator.sum(dtype=torch.float64)


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenation along the first dimension; without a copy if there is but one."""
    tensors = list(tensors)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
