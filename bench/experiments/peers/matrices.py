"""What the peers have in common: every matrix has a state of its own and moves by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class PerMatrix(Optimizer):
    """An optimizer that knows nothing but single matrices and vectors.

    Tensors of higher order count as matrices (first dimension, rest).

    Args:
        params: as for every optimizer.
        defaults: its options, ``lr`` among them.
        blocks: parameters that are several matrices on top of each other, and how many.
    """

    def __init__(
        self, params: Any, defaults: dict[str, Any], blocks: Mapping[Tensor, int] | None
    ) -> None:
        super().__init__(params, defaults)
        self.blocks = blocks or {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)

    def _move(self, p: Tensor, group: dict[str, Any]) -> None:
        count = self.blocks.get(p, 1)
        parts = self.cut(p, count, group), self.cut(p.grad, count, group)
        states = self.state[p].setdefault("matrices", [{"step": 0} for _ in parts[0]])
        for w, g, state in zip(*parts, states, strict=True):
            state["step"] += 1
            w.sub_(self.direction(g, state, group), alpha=group["lr"])

    def cut(self, x: Tensor, count: int, group: dict[str, Any]) -> list[Tensor]:
        """The matrices, or the vector, that ``x`` consists of; views of it."""
        return [part.flatten(1) if part.ndim > 2 else part for part in x.chunk(count)]

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """What lr times is subtracted from a matrix.

        Args:
            g: gradient of the matrix or vector.
            state: of this matrix; ``state["step"]`` counts from 1 on.
            group: the options.
        """
        raise NotImplementedError


def gram(x: Tensor, axis: int) -> Tensor:
    """x x^T for axis 0, x^T x for axis 1; the outer product of a vector with itself."""
    if x.ndim == 1:
        return x.outer(x)
    return x @ x.T if axis == 0 else x.T @ x


def averaged(state: dict[str, Any], name: str, x: Tensor, decay: float, steps: int) -> Tensor:
    """Take ``x`` into the running average ``name``; the average without its bias towards zero."""
    average = state.setdefault(name, torch.zeros_like(x))
    average.lerp_(x, 1 - decay)
    return average / (1 - decay**steps)
