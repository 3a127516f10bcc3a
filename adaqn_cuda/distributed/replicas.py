"""Whether processes that should have the same parameters and state do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .sharding import is_spread

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Elements that are taken at a time.
CHUNK = 1 << 18
#: Odd numbers that spread bits over a word, as integers with a sign.
MIX, PLACE = 6364136223846793005, -7046029254386353131
#: Integers of the sizes that elements have.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(optimizer: Optimizer, group: ProcessGroup | None = None) -> None:
    """Raise in all processes unless they have the same parameters and optimizer state, to the bit.

    Replicas of ``DistributedDataParallel`` take the same steps from the same gradients, but nothing
    keeps them together where processors or numbers of threads differ, or a monitor sees other data.
    This reads all parameters and state, and exchanges a few bytes for each tensor: call it now and
    then, or after every step to find the first one that differs. It is a collective, and waits
    for the device. State that is divided among the processes is left out.

    Args:
        optimizer (Optimizer): any, of whole parameters.
        group (ProcessGroup, optional): the replicas (default: all processes).

    Raises:
        RuntimeError: a tensor or number differs, which the message names; or processes have others.

    Example:
        >>> for step, batch in enumerate(batches):
        ...     train_step(model, optimizer, batch)
        ...     if step % 100 == 0:
        ...         check_replicas(optimizer)
    """
    named = list(_values(optimizer))
    names = [name for name, _ in named]
    values = [_digest(value) if isinstance(value, Tensor) else value for _, value in named]
    digests = [value.item() if isinstance(value, Tensor) else value for value in values]
    theirs: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(theirs, (names, digests), group=group)
    names, first = theirs[0]
    for rank, (own, found) in enumerate(theirs):
        if own != names:
            raise RuntimeError(
                f"optimizer: process {rank} has {len(own)} tensors and numbers, and process 0 "
                f"{len(names)}, or others; make the same model and optimizer in all processes"
            )
        for name, one, other in zip(names, first, found, strict=True):
            if one != other:
                raise RuntimeError(
                    f"optimizer: {name} differs between processes 0 and {rank}; give them the same "
                    "OMP_NUM_THREADS and ADAQN_ISA and average what a monitor returns, or pass "
                    "state_sharding, and begin anew from one checkpoint"
                )


def _values(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """Parameters, and tensors and numbers of the state, by name: what is whole of them."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in enumerate(params):
        yield f"parameter {index}", p.detach()
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            for part in value if isinstance(value, list) else [value]:
                if not is_spread(part):
                    yield f"state {key!r} of parameter {index}", part


def _digest(tensor: Tensor) -> Tensor:
    """A number in which all bits of a tensor have a share, each by its place."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = real.reshape(-1).view(_INTEGERS[real.itemsize])
    places = PLACE * torch.arange(min(CHUNK, len(flat)), device=flat.device)
    digest = places.new_zeros(())
    for chunk in flat.split(CHUNK):
        mixed = (chunk ^ places[: len(chunk)]) * MIX
        mixed = (mixed ^ (mixed >> 29)) * MIX
        digest = digest * MIX + (mixed ^ (mixed >> 32)).sum()
    return digest
