"""What trainers make of an optimizer, and the way back."""

from __future__ import annotations

from typing import Any, overload

from torch.optim import Optimizer

from .adaqn import AdaQN
from .lbfgs import LBFGS


@overload
def unwrap(optimizer: AdaQN) -> AdaQN: ...
@overload
def unwrap(optimizer: LBFGS) -> LBFGS: ...
@overload
def unwrap(optimizer: Any) -> Any: ...  # a checker cannot know which of the two is in a wrapper
def unwrap(optimizer: Any) -> Any:
    """Returns the optimizer of this package that a trainer or a scheduler holds.

    Trainers hand out wrappers: ``Accelerator.prepare`` of Accelerate, ``self.optimizers()`` of
    Lightning, ``Trainer.optimizer`` of Transformers. What is assigned to a wrapper may stay there,
    and a ``monitor`` there is never called.

    Args:
        optimizer: the optimizer itself, or what holds it under the name ``optimizer``, at any
            depth.

    Raises:
        TypeError: there is no optimizer of this package in it.

    Example:
        >>> optimizer = accelerator.prepare(AdaQN(model.parameters(), history_size=10))
        >>> unwrap(optimizer).monitor = held_out_loss
        >>> unwrap(optimizer).stats()
    """
    found = optimizer
    while isinstance(getattr(found, "optimizer", None), Optimizer):
        found = found.optimizer
    if not isinstance(found, (AdaQN, LBFGS)):
        raise TypeError(
            f"optimizer: expected AdaQN or LBFGS, or a wrapper with one as its 'optimizer', got "
            f"{type(optimizer).__name__} of {type(found).__name__}"
        )
    return found
