"""What a call puts on the device, recorded and repeated as a CUDA graph does it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from adaqn_cuda import ops


def memory_of(arguments: Any) -> Any:
    """The same, whose tensors keep their shapes where ``squeeze_`` and its like change them."""
    return tree_map_only(Tensor, Tensor.detach, arguments)


class Recording(TorchDispatchMode):
    """The operations of a ``with`` block, which runs them, too, and the memory that they work on.

    A replay repeats them on the memory they had: numbers of the host are those of the recorded
    call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        before = memory_of((args, kwargs))
        result = func(*args, **kwargs)
        if not leaves_memory(func):
            self.calls.append((func, *before, memory_of(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """What operations return goes where it went when they were recorded."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def leaves_memory(func: Callable) -> bool:
    """Whether an operation of torch's neither reads nor writes elements."""
    if not isinstance(func, torch._ops.OpOverload):
        return False
    is_view = func.is_view or torch.Tag.inplace_view in func.tags
    return is_view or func.namespace == "profiler"


class Recorded(SimpleNamespace):
    """Operations that no dispatcher sees, such as those of the emulation, for recordings."""

    def __init__(self, namespace: Any) -> None:
        super().__init__(**{n: self._recorded(getattr(namespace, n)) for n in ops.SCHEMAS})

    @staticmethod
    def _recorded(operation: Callable) -> Callable:
        def call(*args, **kwargs):
            mode = torch.utils._python_dispatch._get_current_dispatch_mode()
            if not isinstance(mode, Recording):
                return operation(*args, **kwargs)
            return mode.run(operation, args, kwargs)

        return call
