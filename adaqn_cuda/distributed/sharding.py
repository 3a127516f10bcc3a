"""Parameters of which a process holds but a part: how they are divided, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, zip_longest
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.dlpack import from_dlpack

_BY_ROWS = "divide the rows of all parameters over one mesh dimension, as fully_shard(model) does"


def _loaded(module: str, name: str) -> Any:
    """A class of torch's, or ``None`` where its module was never imported."""
    return getattr(sys.modules.get(module), name, None)


def is_spread(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor, of which every process has a part."""
    dtensor = _loaded("torch.distributed.tensor", "DTensor")
    return dtensor is not None and isinstance(tensor, dtensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, without a graph if that is a part of it."""
    if not is_spread(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, without a graph if it is gathered from the processes: a collective."""
    if not is_spread(tensor):
        return tensor
    with torch.no_grad():
        gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


# --------------------------------------------------------------------------- shards by rows


@dataclass(frozen=True)
class Shards:
    """Parameters divided by rows, as :func:`torch.chunk` divides, over a dimension of a mesh.

    Along the other dimensions they are replicated.

    Args:
        mesh: the processes.
        dim: the dimension along which rows are divided.
        whole: whether all processes have whole parameters, of which each steps its rows.
    """

    mesh: Any
    dim: int
    whole: bool = False

    @classmethod
    def over(cls, group: Any, device: torch.device) -> Shards:
        """Whole parameters on ``device``, of which each process of a group steps some rows."""
        from torch.distributed.device_mesh import DeviceMesh

        return cls(DeviceMesh.from_group(group, device.type), 0, whole=True)

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> Shards | None:
        """How ``params`` are divided, all alike; ``None`` for whole ones.

        Raises:
            RuntimeError: they are divided otherwise than by rows, or not all in the same way.
        """
        found = [cls._of(index, p) if is_spread(p) else None for index, p in enumerate(params)]
        for index, (p, shards) in enumerate(zip(params, found, strict=True)):
            if shards != found[0]:
                raise RuntimeError(
                    f"params: parameter {index}, of shape {tuple(p.shape)}, is divided among the "
                    f"processes otherwise than parameter 0; {_BY_ROWS}"
                )
        return found[0] if found else None

    @classmethod
    def _of(cls, index: int, p: Any) -> Shards:
        from torch.distributed.tensor import Replicate, Shard

        rows = [i for i, by in enumerate(p.placements) if type(by) is Shard and by.dim == 0]
        whole = [i for i, by in enumerate(p.placements) if type(by) is Replicate]
        if len(rows) != 1 or len(rows) + len(whole) != len(p.placements):
            raise RuntimeError(
                f"params: parameter {index}, of shape {tuple(p.shape)}, is a DTensor placed by "
                f"{tuple(p.placements)}, not by Shard(0) along one dimension of the mesh and by "
                f"Replicate() along the others; {_BY_ROWS}"
            )
        return cls(p.device_mesh, rows[0])

    # ------------------------------------------------------------------ who has what

    @property
    def count(self) -> int:
        return int(self.mesh.size(self.dim))

    @property
    def rank(self) -> int:
        """Which shard this process has."""
        return int(self.mesh.get_local_rank(self.dim))

    def rows(self, rows: int, rank: int) -> range:
        """Of so many rows, those in a shard."""
        most = -(-rows // self.count)
        return range(min(rank * most, rows), min((rank + 1) * most, rows))

    def elements(self, shape: Size, rank: int) -> range:
        """Of the elements of a parameter, in C order, those in a shard."""
        rows, width = self.rows(_rows_in(shape), rank), shape[1:].numel()
        return range(rows.start * width, rows.stop * width)

    def ranges(self, shapes: Sequence[Size]) -> list[list[range]]:
        """The elements of every parameter that each shard has."""
        return [[self.elements(shape, rank) for shape in shapes] for rank in range(self.count)]

    def own(self, tensor: Tensor) -> Tensor:
        """What this process steps of a parameter, or of its gradient: a view."""
        return self._rows_of(tensor, self.rank) if self.whole else local(tensor)

    def _rows_of(self, tensor: Tensor, rank: int) -> Tensor:
        rows = self.rows(_rows_in(tensor.shape), rank)
        return (tensor if tensor.dim() else tensor[None]).narrow(0, rows.start, len(rows))

    def cut(self, heights: Sequence[int]) -> tuple[int, ...]:
        """Row blocks, cut where a shard ends, so that each lies in one."""
        ends = {self.rows(sum(heights), rank).stop for rank in range(self.count)}
        edges = sorted({0, *accumulate(heights), *ends})
        return tuple(end - start for start, end in pairwise(edges))

    def of_all(self, part: Tensor, rows: int, dim: int) -> Tensor:
        """The DTensor of which ``part`` is what this process has.

        Args:
            part: shares its memory with the DTensor.
            rows: of the whole, along ``dim``.
            dim: the dimension that is divided.
        """
        from torch.distributed.tensor import DTensor

        if part.storage_offset():  # of which torch.save fails; this shares the memory, from 0 on
            part = from_dlpack(part)
        shape = Size((*part.shape[:dim], rows, *part.shape[dim + 1 :]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, self.mesh, self._by(dim), run_check=False, shape=shape, stride=stride
        )

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """What this process has of a tensor that is divided along ``dim``.

        A DTensor that is divided otherwise is gathered: a collective.
        """
        if is_spread(tensor):
            found: Any = tensor
            if found.device_mesh == self.mesh and tuple(found.placements) == self._by(dim):
                return local(tensor)
        tensor = whole(tensor)
        rows = self.rows(tensor.shape[dim], self.rank)
        return tensor.narrow(dim, rows.start, len(rows))

    def _by(self, dim: int) -> tuple[Any, ...]:
        """Placements of a DTensor that is divided along ``dim``."""
        from torch.distributed.tensor import Replicate, Shard

        return tuple(
            Shard(dim) if axis == self.dim else Replicate() for axis in range(self.mesh.ndim)
        )

    # ------------------------------------------------------------------ what they tell each other

    def spread(self, params: Sequence[Tensor]) -> None:
        """Where processes have whole parameters, let all have what each has stepped.

        One collective for every dtype.
        """
        if self.whole and self.count > 1:
            for dtype in dict.fromkeys(p.dtype for p in params):
                self._spread([p.detach() for p in params if p.dtype == dtype])

    def _spread(self, params: list[Tensor]) -> None:
        parts = [[self._rows_of(p, rank) for p in params] for rank in range(self.count)]
        if params[0].is_complex():
            parts = [list(map(torch.view_as_real, of_rank)) for of_rank in parts]
        sizes = [sum(part.numel() for part in of_rank) for of_rank in parts]
        sent = parts[0][0].new_zeros(max(sizes))
        sent[: sizes[self.rank]] = torch.cat([part.reshape(-1) for part in parts[self.rank]])
        received = sent.new_empty(self.count, len(sent))
        bytes_of_ranks = list(received.view(torch.uint8).unbind())
        group = self.mesh.get_group(self.dim)
        torch.distributed.all_gather(bytes_of_ranks, sent.view(torch.uint8), group=group)
        for rank, of_rank in enumerate(parts):
            if rank != self.rank:
                flat = received[rank, : sizes[rank]].split([part.numel() for part in of_rank])
                found = [f.view(part.shape) for f, part in zip(flat, of_rank, strict=True)]
                torch._foreach_copy_(of_rank, found)

    def total(self, words: Tensor) -> Tensor:
        """``words`` summed over the shards, in place: one collective."""
        torch.distributed.all_reduce(words, group=self.mesh.get_group(self.dim))
        return words

    def of_each(self, words: Tensor) -> Tensor:
        """``words`` of every shard, one in a row: one collective."""
        rows = words.new_empty(self.count, len(words))
        group = self.mesh.get_group(self.dim)
        torch.distributed.all_gather(list(rows.unbind()), words, group=group)
        return rows

    def mean(self, number: Tensor) -> Tensor:
        """The mean of a number over all processes, replicas among them, in place."""
        for dim in range(self.mesh.ndim):
            torch.distributed.all_reduce(number, group=self.mesh.get_group(dim))
        return number.div_(self.mesh.size())

    def check_alike(self, params: Sequence[Tensor], options: Mapping[str, Any]) -> None:
        """Raise ``RuntimeError`` in all processes unless both are the same in all.

        Those that have shards of different things would wait for each other.
        """
        facts = [
            f"{len(params)} parameters",
            *(f"a parameter of shape {tuple(p.shape)}, {p.dtype}" for p in params),
            *(f"{name}={value!r}" for name, value in options.items()),
        ]
        theirs: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(theirs, facts, group=self.mesh.get_group(self.dim))
        for rank, found in enumerate(theirs):
            for own, first in zip_longest(found, theirs[0], fillvalue="nothing more"):
                if own != first:
                    raise RuntimeError(
                        f"shard 0 has {first}, and shard {rank} {own}; make the same model and "
                        "optimizer in all processes"
                    )


class Division:
    """How the parameters of an optimizer are divided among processes, if they are.

    Args:
        group: processes with whole parameters, of which each steps some rows; ``None`` where the
            parameters say themselves how they are divided.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._whole: dict[str, Shards] = {}

    def of(self, params: Sequence[Tensor]) -> Shards | None:
        """How ``params`` are divided, all alike; ``None`` if they are not.

        Raises:
            RuntimeError: they are divided otherwise than by rows, or not all in the same way, or
                though they should be whole.
        """
        shards = Shards.of(params)
        if self._group is None or not params:
            return shards
        if shards is not None:
            raise RuntimeError(
                "state_sharding: the parameters are DTensors, whose state is divided as they are; "
                "leave it out"
            )
        device = params[0].device
        if device.type not in self._whole:
            self._whole[device.type] = Shards.over(self._group, device)
        return self._whole[device.type]


def _rows_in(shape: Size) -> int:
    """A number is one row."""
    return shape[0] if shape else 1


# --------------------------------------------------------------------------- what is refused


def check_not_copied(params: Sequence[Tensor], entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``RuntimeError`` for the copy of an optimizer with ``state_sharding``.

    Args:
        params: of the copy.
        entries: the state of each.
    """
    divided = any(is_spread(value) for entry in entries for value in entry.values())
    if divided and not any(map(is_spread, params)):
        raise RuntimeError(
            "state_sharding: a process group is neither copied nor pickled; make a new optimizer, "
            "and load the state_dict"
        )


def check_flat(params: list[Tensor]) -> None:
    """Raise ``RuntimeError`` for a part of one of FullyShardedDataParallel's flat parameters."""
    for index, p in enumerate(params):
        if getattr(p, "_fsdp_flattened", False):
            raise RuntimeError(
                f"params: parameter {index}, of shape {tuple(p.shape)}, is a part of a flat "
                "parameter of FullyShardedDataParallel, with neither its rows and columns nor all "
                "of its elements; use torch.distributed.fsdp.fully_shard, or give the optimizer "
                "whole parameters, as with DistributedDataParallel"
            )


def check_not_divided(needs: str) -> None:
    """Raise ``RuntimeError`` if a ZeroRedundancyOptimizer is making the optimizer.

    It gives every process the whole of some parameters.

    Args:
        needs: what would be that of those parameters alone, and how to do without.
    """
    zero = _loaded("torch.distributed.optim", "ZeroRedundancyOptimizer")
    if zero is None:
        return
    frame = sys._getframe(1).f_back
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), zero):
            raise RuntimeError(
                "ZeroRedundancyOptimizer: it divides the parameters among the processes, but "
                f"{needs}"
            )
        frame = frame.f_back
