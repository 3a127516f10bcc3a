"""State of which every process has a part, in checkpoints that one process writes.

Parameters are whole there.  The state of an optimizer is there once for every process, as that one
has it: factors of its rows, say, are of no use to others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..distributed.sharding import Shards, is_spread, local, whole
from .data import DataError
from .processes import Alone

#: What is kept of a DTensor.
PART = {"part", "rows", "dim"}


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model``, of whole tensors: a collective if they are divided."""
    return {name: whole(value) for name, value in model.state_dict().items()}


def load_parameters(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Take over what :func:`whole_parameters` returned."""
    shards = Shards.of(list(model.parameters()))
    if shards is None:
        model.load_state_dict(saved)
        return
    for name, mine in model.state_dict().items():
        local(mine).copy_(shards.part(saved[name], 0))


def parts_of_all(state: dict[str, Any], processes: Alone) -> list[Any]:
    """An optimizer's state dict as each process has it."""
    return processes.every(tree_map(_part, state))


def own_parts(saved: list[Any], model: nn.Module, processes: Alone) -> Any:
    """The state dict of this process, in what :func:`parts_of_all` returned.

    Raises:
        DataError: there were more processes, or fewer.
    """
    if len(saved) != processes.count:
        raise DataError(
            f"--resume: the checkpoint is of {len(saved)} processes, and there are "
            f"{processes.count}; start as many"
        )
    shards = Shards.of(list(model.parameters()))
    shards = shards or Shards.over(processes.group, next(model.parameters()).device)

    def restored(value: Any) -> Any:
        return shards.of_all(**value) if _is_part(value) else value

    return tree_map(restored, saved[processes.rank], is_leaf=_is_part)


def _part(value: Any) -> Any:
    """A DTensor as a dict, and tensors as copies on the CPU: views would take their base along."""
    if not isinstance(value, Tensor):
        return value
    if not is_spread(value):
        return value.detach().cpu().clone()
    spread: Any = value
    (dim,) = (by.dim for by in spread.placements)
    return {"part": local(value).cpu().clone(), "rows": value.shape[dim], "dim": dim}


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == PART
