"""Where Kronecker factors lie: parameters as matrices, and their sides cut into pieces.

A tensor is the matrix (first dimension, rest), or several on top of each other where it is given
row blocks.  Both sides of a matrix are cut into even pieces of at most ``block_size``, so that what
a factor costs per parameter does not grow with the matrix.  There is one left factor for each piece
of the rows and one right factor for each piece of the columns: the diagonal blocks of the two
factors of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class Plan:
    """The matrices of all parameters, in the order of the flat vectors.

    Args:
        shapes: shape of every parameter, real ones.
        cuts: how each is cut.
        max_vector_dim: longest vector that gets its whole covariance as a factor; a matrix of one
            row or column is a vector.

    Attributes:
        table: (matrices, 8), int64, on the CPU; see :class:`Column`.  Empty parameters have no row.
        factors: numbers in all factors.
        spans: for every parameter, where its factors lie among those numbers.
        sides: for every parameter, how many of its sides have factors, in any of its matrices.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], cuts: Sequence[Cut], max_vector_dim: int
    ) -> None:
        self._longest_vector = max_vector_dim
        self._rows: list[list[int]] = []
        self.factors = 0
        self.spans: list[slice] = []
        self.sides: list[int] = []
        start = 0
        for index, (shape, cut) in enumerate(zip(shapes, cuts, strict=True)):
            first = self.factors
            self.sides.append(self._add(index, shape, cut, start))
            self.spans.append(slice(first, self.factors))
            start += shape.numel()
        rows = torch.tensor(self._rows, dtype=torch.int64, device="cpu")
        self.table = rows.reshape(-1, len(Column))

    def _add(self, index: int, shape: torch.Size, cut: Cut, start: int) -> int:
        """Add the matrices of a parameter; how many of their sides have factors."""
        if shape.numel() == 0:
            return 0
        width, first = prod(shape[1:]), len(self._rows)
        for height in cut.heights if cut.has_factors else (shape.numel() // width,):
            self._rows.append([start, *self._matrix(height, width, cut), index])
            start += height * width
        own = self._rows[first:]
        return sum(any(row[place] >= 0 for row in own) for place in (Column.LEFT, Column.RIGHT))

    def _matrix(self, height: int, width: int, cut: Cut) -> list[int]:
        """What the table says of a matrix, between its start and its parameter."""
        longest = self._longest(height, width, cut)
        if longest == 1:
            return [height * width, 1, 1, 1, -1, -1]
        counts = [-(-side // longest) for side in (height, width)]
        places = map(self._reserve, (height, width), counts)
        return [height, width, *counts, *places]

    def _longest(self, height: int, width: int, cut: Cut) -> int:
        """The longest piece of a side; 1 for no factors."""
        if not cut.has_factors:
            return 1
        if height > 1 and width > 1:
            return cut.longest
        length = height * width
        return length if length <= min(self._longest_vector, cut.longest) else 1

    def _reserve(self, side: int, count: int) -> int:
        """Room for the factors of a side's pieces; a side of one element has none."""
        if side == 1:
            return -1
        first = self.factors
        self.factors += sum(length**2 for length in pieces(side, count))
        return first

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
