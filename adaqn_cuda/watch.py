"""What users may replace behind the optimizer's back, noticed before a step writes anything."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from .distributed.sharding import local

_LAYOUT = attrgetter("shape", "dtype", "device")


def _layouts(params: list[Tensor]) -> tuple[list[Any], list[Any]]:
    return list(map(_LAYOUT, params)), list(map(Tensor.stride, params))


class Watch:
    """How parameters and their state looked when they were filed.

    Tensors are told apart by identity and by the address of their data, which is what
    ``state[p][key] = ...``, ``tensor.data = ...`` and their like change.

    Args:
        params: the parameters.
        entries: the state of each.
    """

    def __init__(self, params: list[Tensor], entries: list[dict[str, Tensor]]) -> None:
        self.params = params
        self._layouts = _layouts(params)
        self._parts = [part for entry in entries for part in entry.values()]
        distinct = {id(part): part for part in self._parts}  # many are shared
        self._distinct = list(map(local, distinct.values()))
        self._addresses = list(map(Tensor.data_ptr, self._distinct))

    def sees_change(self, params: list[Tensor], state: Mapping[Tensor, Any]) -> bool:
        """Whether parameters, their layout or their state are others than they were."""
        return (
            differ(params, self.params)
            or _layouts(params) != self._layouts
            or self._sees_other_state(state)
        )

    def _sees_other_state(self, state: Mapping[Tensor, Any]) -> bool:
        parts = [part for p in self.params for part in state.get(p, {}).values()]
        if differ(parts, self._parts):
            return True
        return list(map(Tensor.data_ptr, self._distinct)) != self._addresses


def differ(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether two lists hold other objects."""
    return len(ours) != len(theirs) or any(map(is_not, ours, theirs))


def check_numbers(name: str, found: Tensor, mine: Tensor) -> None:
    """Raise ``ValueError`` where a tensor that was filed does not say what it did any more."""
    if found.is_meta and not mine.is_meta:
        raise ValueError(
            f"state: {name!r} is on the meta device, which holds no numbers; put the tensor back "
            "that was there"
        )
    if not mine.is_floating_point() and found.is_floating_point() and found.element_size() < 4:
        raise ValueError(
            f"state: {name!r} counts, and {found.dtype} rounds it; change the dtype of "
            "floating-point tensors alone"
        )


def check_memory(params: list[Tensor]) -> None:
    """Raise ``RuntimeError`` for elements of the parameters that share one place in memory."""
    in_storage: dict[int, list[int]] = {}
    for index, p in enumerate(params):
        if not _is_nested(p) and _overlap([p]):
            raise RuntimeError(
                f"params: several elements of parameter {index}, of shape {tuple(p.shape)} and "
                f"strides {p.stride()}, share one place in memory, so that no step can be written "
                "to it; clone() what has been expanded"
            )
        if p.numel():
            in_storage.setdefault(p.untyped_storage()._cdata, []).append(index)
    for indices in in_storage.values():
        together = [params[index] for index in indices]
        if _spans_meet(together) and _overlap(together):
            raise RuntimeError(
                f"params: elements of parameters {', '.join(map(str, indices))} share places in "
                "memory, so that no step can be written to them; give the optimizer the tensor "
                "that they are views of, or clone() them"
            )


def _is_nested(p: Tensor) -> bool:
    """Whether every stride goes beyond all that the shorter ones reach."""
    reach = 0
    for stride, n in sorted(zip(p.stride(), p.shape, strict=True)):
        if n > 1 and stride <= reach:
            return False
        reach += (n - 1) * stride
    return True


def _spans_meet(params: list[Tensor]) -> bool:
    """Whether parameters of one storage may share places, as far as their first and last tell."""
    spans = sorted(map(_span, params))
    return any(start < end for (_, end), (start, _) in pairwise(spans))


def _span(p: Tensor) -> tuple[int, int]:
    """The bytes of its storage from the first element to the last one."""
    first = int(p.storage_offset())
    last = first + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
    return first * p.element_size(), (last + 1) * p.element_size()


def _overlap(params: list[Tensor]) -> bool:
    """Whether elements share places: it looks at every one."""
    spans = []
    for p in params:
        at = torch.full((1,), int(p.storage_offset()))
        for n, stride in zip(p.shape, p.stride(), strict=True):
            at = (at[:, None] + stride * torch.arange(n)).reshape(-1)
        spans.append(p.element_size() * torch.stack([at, at + 1]))
    starts, ends = torch.cat(spans, dim=1)
    order = starts.argsort()
    return bool((starts[order][1:] < ends[order][:-1]).any())


def check_dtypes(params: list[Tensor]) -> None:
    """Raise ``TypeError`` for a parameter that no gradient can have."""
    for p in params:
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(
                f"params: expected floating-point or complex parameters, got {p.dtype} of shape "
                f"{tuple(p.shape)}"
            )


def check_device(params: list[Tensor]) -> None:
    """Raise ``ValueError`` unless all parameters live on one device."""
    devices = {str(p.device) for p in params}
    if len(devices) > 1:
        raise ValueError(
            f"params: expected all on one device, got {', '.join(sorted(devices))}; give each "
            "device an optimizer of its own"
        )
