"""The processes that train one model together: this one alone, or those that torchrun started.

Each has an even share of the streams of text.  What is said of all of them, such as the loss and
whether somebody has pressed Ctrl-C, is the same in every process, so that all go the same way.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .data import DataError

#: What processes talk through, by the device that they work on.
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process.

    Args:
        rank: which process this is.
        count: of how many.
        local_rank: which one it is on its machine.
    """

    rank: int
    count: int
    local_rank: int

    @classmethod
    def here(cls) -> Launch | None:
        """That of this process, or ``None`` if nobody launched several."""
        known = os.environ
        if "RANK" not in known or "WORLD_SIZE" not in known:
            return None
        rank = int(known["RANK"])
        return cls(rank, int(known["WORLD_SIZE"]), int(known.get("LOCAL_RANK", rank)))


def own_device(name: str) -> str:
    """The device that this process takes where all are told ``name``: each a GPU of its own."""
    launch = Launch.here()
    return name if launch is None or name != "cuda" else f"cuda:{launch.local_rank}"


class Alone:
    """One process, which has everything.

    Attributes:
        rank: which of the processes this is.
        count: how many there are.
        group: through which they talk, if they are several.
    """

    rank, count = 0, 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one that shows and writes what there is to see."""
        return self.rank == 0

    def parallel(self, model: nn.Module, divided: bool) -> nn.Module:
        """What to call instead of ``model``, for gradients that are the mean over all processes.

        Args:
            model: the same in all; its parameters become DTensors if they are divided.
            divided: whether each process keeps some rows of the parameters only.
        """
        return model

    def own(self, streams: Tensor) -> Tensor:
        """Of a tensor whose second dimension is that of streams, those of this process."""
        return streams.tensor_split(self.count, dim=1)[self.rank].contiguous()

    def all_streams(self, own: Tensor) -> Tensor:
        """The opposite of :meth:`own`, where all have as many."""
        return own

    def total(self, number: Tensor) -> Tensor:
        """The sum over all processes."""
        return number

    def every(self, value: Any) -> list[Any]:
        """What each process has."""
        return [value]

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return here

    def check_alike(self, facts: dict[str, Any]) -> None:
        """Raise ``DataError`` in all processes unless they have the same ``facts``."""
        first, *others = self.every(facts)
        for rank, theirs in enumerate(others, start=1):
            for name in sorted(first.keys() | theirs.keys()):
                if theirs.get(name) != first.get(name):
                    raise DataError(
                        f"process {rank} has {name} {theirs.get(name)}, and process 0 "
                        f"{first.get(name)}; start all with the same options, on the same files"
                    )


class Group(Alone):
    """Several processes, of which this is one.

    Args:
        launch: what it was told.
        device: what it works on.
    """

    def __init__(self, launch: Launch, device: torch.device) -> None:
        self.rank, self.count, self.device = launch.rank, launch.count, device
        self.group = dist.group.WORLD

    def parallel(self, model: nn.Module, divided: bool) -> nn.Module:
        if not divided:
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # Nobody changes what a layer returns in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(self.device.type, (self.count,))
        for part in (*model.children(), model):
            fully_shard(part, mesh=mesh)
        return model

    def all_streams(self, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts, dim=1)

    def total(self, number: Tensor) -> Tensor:
        total = number.clone()
        dist.all_reduce(total)
        return total

    def every(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def any(self, here: bool) -> bool:
        return bool(self.total(torch.tensor(int(here), device=self.device)))


@contextmanager
def joined(device: str) -> Iterator[Alone]:
    """The processes of this launch, until the end of the block; only the first of them prints.

    A group that this process is in already is used, and stays.  One that an error ends is left as
    it is: the others may be waiting for this process, which must not wait for them.  It is torchrun
    that ends them.

    Args:
        device: what all are told to work on.

    Raises:
        DataError: whoever set the environment has not said where processes find each other.
    """
    launch = Launch.here()
    if launch is None:
        yield Alone()
        return
    own, joins = torch.device(own_device(device)), not dist.is_initialized()
    if joins:
        _join(own)
    with nullcontext() if launch.rank == 0 else redirect_stdout(None):
        yield Group(launch, own)
    if joins:
        dist.destroy_process_group()


def _join(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(BACKENDS[device.type])
    except ValueError as error:
        raise DataError(
            f"RANK and WORLD_SIZE are set, as torchrun sets them, but not all else ({error}); "
            "start with torchrun, or unset both"
        ) from error
