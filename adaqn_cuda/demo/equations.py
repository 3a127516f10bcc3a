"""Differential equations with known solutions, and networks that are to solve them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Units in the hidden layers.
WIDTHS = (20, 20, 20)
#: What the squared error on the boundary counts, as a multiple of the squared residual inside.
BOUNDARY_WEIGHT = 100.0
#: Collocation points inside for every one on the boundary, and points of the grid along a side.
INSIDE_PER_BOUNDARY, GRID = 5, 101


@dataclass(frozen=True)
class Equation:
    r"""Solved by :math:`u = \sin(a \pi x) \sin(b \pi y)`, which is 0 on the boundary.

    It is :math:`\Delta u + q u = f` on the square :math:`[-1, 1]^2`.

    Args:
        title: what it is, for people.
        frequencies: a and b, whole numbers.
        shift: q.
    """

    title: str
    frequencies: tuple[int, int]
    shift: float

    def exact(self, points: Tensor) -> Tensor:
        """The solution at ``points`` of shape (n, 2)."""
        a, b = self.frequencies
        return torch.sin(a * math.pi * points[:, 0]) * torch.sin(b * math.pi * points[:, 1])

    def forcing(self, points: Tensor) -> Tensor:
        """The right-hand side f."""
        a, b = self.frequencies
        return (self.shift - (a**2 + b**2) * math.pi**2) * self.exact(points)

    def residual(self, points: Tensor, values: Tensor, laplacian: Tensor) -> Tensor:
        """What is left of the equation for a function with these values and Laplacian."""
        return laplacian + self.shift * values - self.forcing(points)


EQUATIONS = {
    "helmholtz": Equation("Helmholtz equation, sin(pi x) sin(4 pi y)", (1, 4), 1.0),
    "poisson": Equation("Poisson equation, sin(2 pi x) sin(2 pi y)", (2, 2), 0.0),
}


class Network(nn.Module):
    """Hidden layers with tanh, one output, float64."""

    def __init__(self) -> None:
        super().__init__()
        sides = zip((2, *WIDTHS), (*WIDTHS, 1), strict=True)
        layers = [nn.Linear(*pair, dtype=torch.float64) for pair in sides]
        self.hidden: Any = nn.ModuleList(layers[:-1])  # of linear layers
        self.output = layers[-1]
        for layer in layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, points: Tensor) -> Tensor:
        """Values at ``points`` of shape (n, 2)."""
        for layer in self.hidden:
            points = torch.tanh(layer(points))
        values: Tensor = self.output(points)
        return values.squeeze(1)

    def with_laplacian(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Values and Laplacian, carried from layer to layer together with both slopes."""
        one, zero = torch.ones_like(points[:, 0]), torch.zeros_like(points)
        slopes = [torch.stack(pair, 1) for pair in ((one, zero[:, 0]), (zero[:, 0], one))]
        carried = torch.stack([points, *slopes, zero])
        for layer in self.hidden:
            value, dx, dy, laplacian = carried @ layer.weight.T
            value = torch.tanh(value + layer.bias)
            slope = 1 - value**2
            bend = -2 * value * slope
            laplacian = slope * laplacian + bend * (dx**2 + dy**2)
            carried = torch.stack([value, slope * dx, slope * dy, laplacian])
        ends = carried[[0, 3]] @ self.output.weight.T
        return ends[0, :, 0] + self.output.bias, ends[1, :, 0]


class Collocation:
    """An equation at fixed random points: the loss of a network, and its distance to the solution.

    Args:
        equation: what is to be solved.
        points: how many inside the square.
        generator: draws them.
        device: where they live.
    """

    def __init__(
        self, equation: Equation, points: int, generator: torch.Generator, device: torch.device
    ) -> None:
        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(*shape, dtype=torch.float64, generator=generator) - 1

        self.equation = equation
        self.inside = uniform(points, 2).to(device)
        count = max(1, points // (4 * INSIDE_PER_BOUNDARY))
        along, across = uniform(4, count), torch.ones(count, dtype=torch.float64)
        sides = [(along[0], -across), (along[1], across), (-across, along[2]), (across, along[3])]
        self.boundary = torch.cat([torch.stack(side, 1) for side in sides]).to(device)
        line = torch.linspace(-1, 1, GRID, dtype=torch.float64, device=device)
        self.grid = torch.cartesian_prod(line, line)

    def loss(self, network: Network) -> Tensor:
        """Mean squared residual, and that of the error on the boundary times its weight."""
        residual = self.equation.residual(self.inside, *network.with_laplacian(self.inside))
        outside: Tensor = network(self.boundary) - self.equation.exact(self.boundary)
        return residual.square().mean() + BOUNDARY_WEIGHT * outside.square().mean()

    @torch.no_grad()
    def on_grid(self, network: Network) -> tuple[Tensor, Tensor]:
        """The network's values and their errors, as matrices of y by x."""
        values = network(self.grid)
        errors = values - self.equation.exact(self.grid)
        return values.view(GRID, GRID).T, errors.view(GRID, GRID).T

    def relative_error(self, network: Network) -> float:
        """Euclidean norm of the errors on the grid over that of the solution."""
        _, errors = self.on_grid(network)
        return float(errors.norm() / self.equation.exact(self.grid).norm())
