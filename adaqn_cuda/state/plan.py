"""Where Kronecker factors lie: parameters as matrices, and their sides cut into pieces.

A tensor is the matrix (first dimension, rest), or several on top of each other where it is given
row blocks.  Both sides of a matrix are cut into even pieces of at most ``block_size``, so that what
a factor costs per parameter does not grow with the matrix.  There is one left factor for each piece
of the rows and one right factor for each piece of the columns: the diagonal blocks of the two
factors of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from enum import IntEnum
from math import prod

import torch


class Column(IntEnum):
    """Columns of :attr:`Plan.table`, which has a row per matrix; csrc/common/kronecker.h."""

    START = 0
    """Its first element in the flat vectors."""
    ROWS = 1
    COLUMNS = 2
    ROW_PIECES = 3
    COLUMN_PIECES = 4
    LEFT = 5
    """Where its left factors begin in the flat buffers of factors and bases; -1 without."""
    RIGHT = 6
    """Where its right factors begin; -1 without."""
    PARAM = 7
    """Index of its parameter."""
    TURN = 8
    """Number of its first factor among all, by which factors take turns."""


def pieces(side: int, count: int) -> list[int]:
    """Lengths of ``count`` even pieces: the first ones are longer, if any are."""
    return [side // count + (k < side % count) for k in range(count)]


@dataclass(frozen=True)
class Cut:
    """How one parameter is cut.

    Args:
        heights: rows of each of its matrices.
        block_size: longest piece of a side; ``None`` for no factors at all.
    """

    heights: tuple[int, ...]
    block_size: int | None

    @property
    def longest(self) -> int:
        """The longest piece of a side; pieces of one element have no factors."""
        return 1 if self.block_size is None else self.block_size

    @property
    def has_factors(self) -> bool:
        return self.longest > 1


def _matrices_of(shape: torch.Size, cut: Cut) -> Iterator[tuple[int, int]]:
    """Height and width of the matrices of a parameter; none if it is empty."""
    if shape.numel() == 0:
        return
    width = prod(shape[1:])
    for height in cut.heights if cut.has_factors else (shape.numel() // width,):
        yield height, width


def _pieces_of(height: int, width: int, cut: Cut, max_vector_dim: int) -> list[int]:
    """What a row of the table says of a matrix, from ``ROWS`` on; 0 in place of an offset."""
    longest = _longest(height, width, cut, max_vector_dim)
    if longest == 1:
        return [height * width, 1, 1, 1, -1, -1]
    counts = [-(-side // longest) for side in (height, width)]
    # A side of one element has no factors.
    return [height, width, *counts, *(0 if side > 1 else -1 for side in (height, width))]


def _longest(height: int, width: int, cut: Cut, max_vector_dim: int) -> int:
    """The longest piece of a side; 1 for no factors."""
    if not cut.has_factors:
        return 1
    if height > 1 and width > 1:
        return cut.longest
    length = height * width
    return length if length <= min(max_vector_dim, cut.longest) else 1


def _factored_sides(row: Sequence[int]) -> list[int]:
    """Which sides of a matrix have factors: 0 for the rows, 1 for the columns."""
    return [side for side in (0, 1) if row[Column.LEFT + side] >= 0]


def factors_in(row: Sequence[int]) -> int:
    """How many factors a row of the table has."""
    return sum(row[Column.ROW_PIECES + side] for side in _factored_sides(row))


def _squares_on(row: Sequence[int], side: int) -> int:
    """Numbers in the factors of a side."""
    lengths = pieces(row[Column.ROWS + side], row[Column.ROW_PIECES + side])
    return sum(length**2 for length in lengths)


def _squares_in(row: Sequence[int]) -> int:
    """Numbers in the factors of a matrix."""
    return sum(_squares_on(row, side) for side in _factored_sides(row))


def _part_of(row: Sequence[int], start: int, elements: range) -> list[int]:
    """A matrix, if it lies in a range of elements; of one without factors, what lies in it.

    ``start`` is where it begins, counted as the elements are.
    """
    if _factored_sides(row):
        return list(row) if start in elements else []
    stop = start + row[Column.ROWS] * row[Column.COLUMNS]
    inside = range(max(start, elements.start), min(stop, elements.stop))
    return [0, len(inside), *row[Column.COLUMNS :]] if inside else []


class Plan:
    """The matrices of all parameters, in the order of the flat vectors.

    Args:
        shapes: shape of every parameter, real ones.
        cuts: how each is cut.
        max_vector_dim: longest vector that gets its whole covariance as a factor; a matrix of one
            row or column is a vector.

    Attributes:
        table: (matrices, 9), int64, on the CPU; see :class:`Column`.  Empty parameters have no row.
        factors: numbers in all factors.
        spans: for every parameter, where its factors lie among those numbers.
        sides: for every parameter, how many of its sides have factors, in any of its matrices.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], cuts: Sequence[Cut], max_vector_dim: int
    ) -> None:
        self._matrices: list[list[list[int]]] = []
        turn = 0
        for index, (shape, cut) in enumerate(zip(shapes, cuts, strict=True)):
            own = []
            for height, width in _matrices_of(shape, cut):
                own.append([0, *_pieces_of(height, width, cut, max_vector_dim), index, turn])
                turn += factors_in(own[-1])
            self._matrices.append(own)
        self._lay_out([0] * len(self._matrices))

    def _lay_out(self, rooms: Sequence[int]) -> None:
        """Give matrices and factors their places, parameter after parameter.

        Args:
            rooms: how many numbers there must be for the factors of each parameter, at least.
        """
        self.factors, start = 0, 0
        self.spans: list[slice] = []
        self.sides: list[int] = []
        for own, room in zip(self._matrices, rooms, strict=True):
            first = self.factors
            for row in own:
                row[Column.START] = start
                start += row[Column.ROWS] * row[Column.COLUMNS]
                for side in _factored_sides(row):
                    row[Column.LEFT + side] = self.factors
                    self.factors += _squares_on(row, side)
            self.factors = max(self.factors, first + room)
            self.spans.append(slice(first, self.factors))
            self.sides.append(len({side for row in own for side in _factored_sides(row)}))
        self._rows = [row for own in self._matrices for row in own]
        rows = torch.tensor(self._rows, dtype=torch.int64, device="cpu")
        self.table = rows.reshape(-1, len(Column))

    def part(self, shards: Sequence[Sequence[range]], number: int) -> Plan:
        """The plan of one of the shards that the parameters are divided into.

        Factors have the turns that they have in the whole, and in all shards as much room for those
        of a parameter as one of them needs.

        Args:
            shards: the elements of every parameter that each shard has; of matrices with factors,
                all or none.
            number: of the shard.
        """
        divided = [self._within(ranges) for ranges in shards]
        needs = [[sum(map(_squares_in, own)) for own in matrices] for matrices in divided]
        plan = copy(self)
        plan._matrices = divided[number]
        plan._lay_out([max(of_param) for of_param in zip(*needs, strict=True)])
        return plan

    def _within(self, ranges: Sequence[range]) -> list[list[list[int]]]:
        """What lies of the matrices of every parameter in its range of elements."""
        found = []
        for own, elements in zip(self._matrices, ranges, strict=True):
            first = own[0][Column.START] if own else 0
            parts = [_part_of(row, row[Column.START] - first, elements) for row in own]
            found.append([part for part in parts if part])
        return found

    def squares(self) -> Iterator[tuple[int, int]]:
        """Where each factor begins, and its side."""
        for row in self._rows:
            for place, side, count in zip(
                row[Column.LEFT : Column.PARAM],
                row[Column.ROWS : Column.ROW_PIECES],
                row[Column.ROW_PIECES : Column.LEFT],
                strict=True,
            ):
                for length in pieces(side, count) if place >= 0 else ():
                    yield place, length
                    place += length**2

    def fill_identities(self, bases: torch.Tensor) -> None:
        """Make every basis in a flat buffer of zeros the identity."""
        for place, side in self.squares():
            bases[place : place + side**2].view(side, side).fill_diagonal_(1)
