"""What an optimizer is given to solve, whatever the task."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Problem(Protocol):
    """A model, a stream of losses to differentiate, and the figure that counts in the end."""

    model: nn.Module
    repeats: int  # calls of `again`

    def loss(self) -> Tensor:
        """The training loss, with its graph; on the next batch where there are batches."""
        ...

    def again(self) -> Tensor:
        """The loss once more, on the batch that :meth:`loss` was last taken on."""
        ...

    def metric(self) -> float:
        """The figure that counts, smaller is better; leaves no trace in the training."""
        ...
