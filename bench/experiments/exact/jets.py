"""Networks of coordinates, and their derivatives in these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Jet(NamedTuple):
    """Values at n points, and derivatives in the coordinates.

    ``value`` is (n, features), ``first`` (c, n, features) in all coordinates, ``second``
    (k, n, features) the second ones in the first k coordinates.
    """

    value: Tensor
    first: Tensor
    second: Tensor

    def features(self) -> tuple[Tensor, ...]:
        """Everything of the only feature: u, its derivatives, its second ones; (n,) each."""
        return (self.value[:, 0], *self.first[..., 0], *self.second[..., 0])


class Network(nn.Module):
    """Linear layers with tanh in between, in float64, from Glorot's normal weights and no biases.

    Args:
        sizes: of the layers, that of the input first.
        seed: sets the weights.
    """

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(
            nn.Linear(a, b, dtype=torch.float64) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(torch.tanh(x) if number else x)
        return x

    def jet(self, jet: Jet) -> Jet:
        """The jet of the output, from that of the input.

        It is carried forward through the layers, at the cost of a few products each, where autograd
        would build a graph for every derivative.
        """
        for number, layer in enumerate(self.layers):
            jet = jet_of_tanh(jet) if number else jet
            turned = layer.weight.t()
            jet = Jet(layer(jet.value), jet.first @ turned, jet.second @ turned)
        return jet


def jet_of_tanh(jet: Jet) -> Jet:
    return Jet(*JetOfTanh.apply(*jet))


class JetOfTanh(torch.autograd.Function):
    """v = tanh(x), v' = (1 - v^2) x' and v'' = (1 - v^2) (x'' - 2 v x' x'), and their gradients.

    These fill the time of a physics-informed network; autograd would take twice as many passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        value = torch.tanh(x)
        slope = torch.addcmul(torch.ones_like(value), value, value, value=-1)
        square = first[: len(second)].square()
        bend = torch.addcmul(second, value, square, value=-2)
        ctx.save_for_backward(value, slope, first, square, bend)
        return value, slope * first, slope * bend

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        value, slope, first, square, bend = ctx.saved_tensors
        of_value, of_first, of_second = gradients
        of_slope = (of_first * first).sum(0).add_((of_second * bend).sum(0))
        in_second = slope * of_second
        in_value = torch.addcmul(of_value, value, of_slope, value=-2)
        in_value.sub_((in_second * square).sum(0), alpha=2)
        in_first = slope * of_first
        in_first[: len(square)].addcmul_(in_second * value, first[: len(square)], value=-4)
        return in_value.mul_(slope), in_first, in_second


def coordinates(points: Tensor, twice: int) -> Jet:
    """The jet of the coordinates themselves, of points (n, c)."""
    count, c = points.shape
    first = torch.eye(c, dtype=points.dtype)[:, None, :].expand(c, count, c)
    return Jet(points, first, points.new_zeros(twice, count, c))
