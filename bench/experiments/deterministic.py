"""Full-batch problems in float64: two convex ones, and a physics-informed network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: A gap to the optimum below this is rounding error, and is reported as this.
FLOOR = 1e-16


class Linear(nn.Module):
    """One weight, from zero."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))


class FullBatch:
    """A problem whose loss is the same function at every call.

    The figure that counts is what the loss is above the optimum, as far as that is known.
    """

    repeats = 0
    optimum = 0.0

    def loss(self) -> Tensor:
        raise NotImplementedError

    def again(self) -> Tensor:
        self.repeats += 1
        return self.loss()

    @torch.no_grad()
    def metric(self) -> float:
        return self.above(float(self.loss()))

    def above(self, loss: float) -> float:
        """What a loss is above the optimum; rounding error counts as :data:`FLOOR`."""
        gap = loss - self.optimum
        return max(gap, FLOOR) if self.optimum and math.isfinite(gap) else gap


class Convex(FullBatch):
    """A convex function of one weight; the metric is what is left to its optimum.

    Args:
        objective: loss of a weight.
        shape: of the weight.
    """

    def __init__(self, objective: Callable[[Tensor], Tensor], *shape: int) -> None:
        self.objective, self.model = objective, Linear(*shape)
        self.optimum = newton_minimum(objective, self.model.weight.detach())

    def loss(self) -> Tensor:
        return self.objective(self.model.weight)


def newton_minimum(
    objective: Callable[[Tensor], Tensor], start: Tensor, tolerance: float = 1e-13
) -> float:
    """Minimum of a strictly convex function, by Newton's method with halved steps.

    It stops when the decrement, twice what a quadratic would still lose, is below ``tolerance``.
    """
    flat = start.flatten()

    def of(w: Tensor) -> Tensor:
        return objective(w.view_as(start))

    for _ in range(100):
        gradient, hessian = torch.func.grad(of)(flat), torch.func.hessian(of)(flat)
        direction = torch.linalg.solve(hessian, gradient)
        decrement, length, before = float(gradient @ direction), 1.0, float(of(flat))
        if decrement < tolerance:
            return min(before, float(of(flat - direction)))
        while float(of(flat - length * direction)) > before - 0.1 * length * decrement:
            length /= 2
        flat = flat - length * direction
    raise RuntimeError(f"Newton's method has not converged; decrement {decrement:.1e}")


def regression(options: dict[str, Any], seed: int, path: None = None) -> Convex:
    """Multinomial regression on Gaussian features whose scales differ by decades.

    Args:
        options: ``rows``, ``features``, ``classes``, ``decades`` between the scales, ``l2``.
        seed: sets the data.
        path: not used.
    """
    rows, features, classes = (options[name] for name in ("rows", "features", "classes"))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    plain = normal(rows, features)
    labels = (plain @ normal(features, classes) / 2 + normal(rows, classes)).argmax(1)
    half = options["decades"] / 2
    scales = torch.logspace(-half, half, features, dtype=torch.float64)
    x = plain * scales[torch.randperm(features, generator=generator)]

    def objective(w: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x @ w, labels) + options["l2"] / 2 * w.square().sum()

    return Convex(objective, features, classes)


def least_squares(options: dict[str, Any], seed: int, path: None = None) -> Convex:
    """Linear fit with singular values spread evenly over decades; largest curvature 1.

    Args:
        options: ``rows``, ``columns``, ``decades`` between the singular values.
        seed: sets the data.
        path: not used.
    """
    rows, columns = options["rows"], options["columns"]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    values = torch.logspace(0, -options["decades"], columns, dtype=torch.float64)
    matrix = math.sqrt(rows) * (left * values) @ right
    truth = torch.randn(columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, generator=generator, dtype=torch.float64)
    target = matrix @ truth + 0.1 * noise
    return Convex(lambda w: 0.5 * (matrix @ w - target).square().mean(), columns)


class Poisson(FullBatch):
    """A physics-informed network for u'' = f on [0, 1], zero at both ends.

    The solution is sin(pi k x) + sin(pi x); the residual is taken on a fixed grid and divided by
    the largest |f|, the values at both ends count ``boundary`` times their squares.  The metric is
    the loss itself.

    Args:
        options: ``points``, ``width``, ``layers``, the frequency ``k``, ``boundary``.
        seed: sets the initial parameters.
        path: not used.
    """

    def __init__(self, options: dict[str, Any], seed: int, path: None = None) -> None:
        torch.manual_seed(seed)
        sizes = [1] + [options["width"]] * options["layers"] + [1]
        pairs = zip(sizes, sizes[1:], strict=False)
        self.model = nn.Sequential(*(nn.Linear(a, b, dtype=torch.float64) for a, b in pairs))
        self.x = torch.linspace(0, 1, options["points"], dtype=torch.float64).unsqueeze(1)
        k, pi = options["k"], math.pi
        right = -((pi * k) ** 2) * torch.sin(pi * k * self.x) - pi**2 * torch.sin(pi * self.x)
        self.scale, self.boundary = float(right.abs().max()), options["boundary"]
        self.right = right / self.scale

    def loss(self) -> Tensor:
        value, second = self._value_and_second_derivative()
        ends = value[0].square().sum() + value[-1].square().sum()
        return (second / self.scale - self.right).square().mean() + self.boundary * ends

    def _value_and_second_derivative(self) -> tuple[Tensor, Tensor]:
        """u and u'' on the grid; the derivatives in x are carried forward through the layers."""
        value, first, second = 2 * self.x - 1, torch.full_like(self.x, 2), torch.zeros_like(self.x)
        for number, layer in enumerate(self.model):
            if number:
                value = torch.tanh(value)
                slope = 1 - value.square()
                second = slope * (second - 2 * value * first.square())
                first = slope * first
            value = layer(value)
            first, second = first @ layer.weight.t(), second @ layer.weight.t()
        return value, second
