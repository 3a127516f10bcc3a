"""Flat vectors in a ``state_dict``: whole under the first parameter, or a part under each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from ..distributed.sharding import Shards, whole
from .arena import FACTORED
from .plan import Plan

#: Flat vectors, and lists of them.
VECTORS = ("d", "prev_flat_grad", "accumulator")
ROWS = ("old_dirs", "old_stps")


class Filing:
    """How the state of :class:`LBFGS` is filed.

    Like torch's it lies under the first parameter, in flat vectors of all of them.  Where they are
    divided among processes, every parameter has its part of each vector, a DTensor that is divided
    likewise; what belongs to all of them stays under the first.

    Args:
        shapes: of the whole parameters, real ones.
        plan: of the Kronecker factors that are here.
        shards: how the parameters are divided, if they are.
    """

    def __init__(self, shapes: Sequence[Size], plan: Plan | None, shards: Shards | None) -> None:
        self._shapes = [shape or Size((1,)) for shape in shapes]
        self._spans = [slice(0)] * len(shapes) if plan is None else plan.spans
        self._shards = shards

    def entries(
        self, vectors: Mapping[str, Any], factors: Mapping[str, Tensor], shared: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """What to file under each parameter.

        Args:
            vectors: flat vectors of this process, or lists of such.
            factors: flat buffers of factors.
            shared: what belongs to all parameters.
        """
        if self._shards is None:
            return [{**vectors, **factors, **shared}, *({} for _ in self._shapes[1:])]
        found: list[dict[str, Any]] = [{} for _ in self._shapes]
        for name, value in vectors.items():
            for entry, part in zip(found, self._parts(value), strict=True):
                entry[name] = part
        for name, flat in factors.items():
            for entry, span in zip(found, self._spans, strict=True):
                rows = (span.stop - span.start) * self._shards.count
                entry.update({name: self._shards.of_all(flat[span], rows, 0)} if rows else {})
        found[0].update(shared, by_parameter=True)
        return found

    def _parts(self, value: Any) -> Iterable[Any]:
        """By parameter, the parts of a vector, or of each vector in a list."""
        if isinstance(value, list):
            each = [self._parts(flat) for flat in value]
            return map(list, zip(*each, strict=True)) if each else [[] for _ in self._shapes]
        shards = self._shards
        assert shards is not None
        shapes = [(len(shards.rows(s[0], shards.rank)), *s[1:]) for s in self._shapes]
        flats = value.split([Size(shape).numel() for shape in shapes])
        return [
            shards.of_all(flat.view(shape), of_all[0], 0)
            for flat, shape, of_all in zip(flats, shapes, self._shapes, strict=True)
        ]

    # ------------------------------------------------------------------ read

    def own(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What was filed, here, in any other processes, or by torch: with flat vectors of this one.

        Raises:
            ValueError: a vector does not fit the parameters.
        """
        first = dict(entries[0])
        by_parameter = first.get("by_parameter", False)
        if not by_parameter and self._shards is None:
            return first
        for name in [name for name in VECTORS if name in first]:
            of_each = [entry[name] for entry in entries] if by_parameter else first[name]
            first[name] = self._own_flat(name, of_each)
        for name in ROWS:
            rows = (
                zip(*(entry[name] for entry in entries), strict=True)
                if by_parameter
                else first[name]
            )
            first[name] = [self._own_flat(name, row) for row in rows]
        for name in FACTORED if by_parameter and "accumulator" in first else ():
            parts = [self._own_part(entry[name]) for entry in entries if name in entry]
            first[name] = torch.cat([first["accumulator"][:0], *parts])
        return first

    def _own_flat(self, name: str, value: Any) -> Tensor:
        """This process's rows of a vector, given whole or as the parts of all parameters."""
        if isinstance(value, Tensor):
            sizes = [shape.numel() for shape in self._shapes]
            check_shape(name, value, (sum(sizes),))
            value = list(map(Tensor.view, value.split(sizes), self._shapes))
        for part, shape in zip(value, self._shapes, strict=True):
            check_shape(name, part, shape)
        return torch.cat([self._own_part(part).reshape(-1) for part in value])

    def _own_part(self, part: Tensor) -> Tensor:
        return whole(part) if self._shards is None else self._shards.part(part, 0)


def check_shape(name: str, value: Any, shape: Sequence[int]) -> None:
    """Raise ``ValueError`` for what is no tensor of that shape."""
    if not isinstance(value, Tensor) or value.shape != tuple(shape):
        found = tuple(value.shape) if isinstance(value, Tensor) else value
        raise ValueError(
            f"state_dict: expected {name!r} of shape {tuple(shape)}, got {found}; load a "
            "state_dict of LBFGS with the same options, for parameters of the same shapes"
        )
