"""Parameters of which a process holds but a part: what would be silently wrong is refused."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

_REMEDY = "give the optimizer whole parameters, as with DistributedDataParallel"


def _loaded(module: str, name: str) -> Any:
    """A class of torch's, or ``None`` where its module was never imported."""
    return getattr(sys.modules.get(module), name, None)


def check_whole(params: list[Tensor]) -> None:
    """Raise ``RuntimeError`` for a parameter that is a shard, or is made of several.

    Matrices, norms and curvature pairs are those of whole parameters.
    """
    dtensor = _loaded("torch.distributed.tensor", "DTensor")
    for index, p in enumerate(params):
        if dtensor is not None and isinstance(p, dtensor):
            raise RuntimeError(
                f"params: parameter {index}, of shape {tuple(p.shape)}, is a DTensor (fully_shard, "
                f"tensor parallelism), of which every process has a part; {_REMEDY}"
            )
        if getattr(p, "_fsdp_flattened", False):
            raise RuntimeError(
                f"params: parameter {index}, of shape {tuple(p.shape)}, is a part of a flat "
                "parameter of FullyShardedDataParallel, with neither its rows and columns nor all "
                f"of its elements; {_REMEDY}"
            )


def check_not_divided(needs: str) -> None:
    """Raise ``RuntimeError`` if a ZeroRedundancyOptimizer is making the optimizer.

    It gives every process the whole of some parameters.

    Args:
        needs: what would be that of those parameters alone, and how to do without.
    """
    zero = _loaded("torch.distributed.optim", "ZeroRedundancyOptimizer")
    frame = sys._getframe(1) if zero is not None else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), zero):
            raise RuntimeError(
                "ZeroRedundancyOptimizer: it divides the parameters among the processes, but "
                f"{needs}"
            )
        frame = frame.f_back
