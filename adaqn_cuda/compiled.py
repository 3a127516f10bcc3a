"""One opaque operation for a whole step, so that ``torch.compile`` can put it into a graph.

The tracer cannot follow a schedule that counts calls on the host.  Under ``torch.compile`` the
optimizer therefore calls ``torch.ops.adaqn.whole_step``: the graph sees which tensors change, and
the host part of the step (schedule, learning rates) runs as Python when the operation runs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(function: Function) -> Function:
    """What :func:`torch.compiler.disable` does, at the first call of the function.

    That one imports the compiler, which takes as long as to import torch.
    """
    disable: Any = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable
    outside: Function = disable(function)
    return outside


class Compilable(Protocol):
    """An optimizer whose step a graph may hold."""

    def _advance_compiled(
        self, params: list[Tensor], grads: list[Tensor | None], state: list[Tensor]
    ) -> None:
        """Step, with the parameters, gradients and state tensors of the graph."""


_optimizers: WeakValueDictionary[int, Compilable] = WeakValueDictionary()
_handles = count()

#: A CUDA graph would repeat what the host has decided in one call.
_TAGS = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):  # not in older versions
    _TAGS.append(torch.Tag.cudagraph_unsafe)

_library = torch.library.Library("adaqn", "FRAGMENT")
_library.define(
    "whole_step(int handle, Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] state) -> ()",
    tags=tuple(_TAGS),
)


def register(optimizer: Compilable) -> int:
    """A handle by which a graph finds ``optimizer``."""
    handle = next(_handles)
    _optimizers[handle] = optimizer
    return handle


def _whole_step(
    handle: int, params: list[Tensor], grads: list[Tensor | None], state: list[Tensor]
) -> None:
    optimizer = _optimizers.get(handle)
    if optimizer is None:
        raise RuntimeError("the optimizer of this compiled step no longer exists; compile it again")
    optimizer._advance_compiled(params, grads, state)


def _fake(handle: int, params: object, grads: object, state: object) -> None:
    """The operation returns nothing; it writes into its arguments."""


_library.impl("whole_step", _whole_step, "CompositeExplicitAutograd")
torch.library.register_fake("adaqn::whole_step", _fake, lib=_library)
