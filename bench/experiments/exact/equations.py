"""Physics-informed networks for partial differential equations in two coordinates.

The loss is the mean square of the equation's residual at fixed points, plus the mean squares of
what is wrong at the boundary, weighted.  The points are those of all runs of a seed, so the loss is
the same function at every call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy
import torch
from torch import Tensor

from ..deterministic import FullBatch
from .jets import Jet, Network, coordinates

PI = math.pi


def spread(count: int, low: Sequence[float], high: Sequence[float], seed: int) -> Tensor:
    """Points of a scrambled Sobol sequence between two corners, (count, 2)."""
    engine = torch.quasirandom.SobolEngine(len(low), scramble=True, seed=seed)
    low, high = (torch.tensor(corner, dtype=torch.float64) for corner in (low, high))
    return low + (high - low) * engine.draw(count, dtype=torch.float64)


def grid(*axes: Tensor) -> Tensor:
    """All points whose coordinates are on the axes, (n, len(axes)); the last one varies fastest."""
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def line(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


class Equation(FullBatch):
    """What the equations have in common.

    A subclass says what the network is given, the residual, the boundary and the solution.

    Args:
        options: ``points`` inside, ``edge`` points on each part of the boundary, ``weight`` of the
            boundary, ``width`` and ``layers`` of the network.
        seed: sets the initial parameters and the points inside.
        path: not used.
    """

    #: Corners of the domain, and in how many coordinates, the first ones, u is derived twice.
    low: tuple[float, float]
    high: tuple[float, float]
    twice: int
    #: What the network is given.
    features = 2

    def __init__(self, options: dict[str, Any], seed: int, path: None = None) -> None:
        self.options = options
        sizes = [self.features] + [options["width"]] * options["layers"] + [1]
        self.model = Network(sizes, seed)
        self.points = self.placed(spread(options["points"], self.low, self.high, seed))
        self.inside = self.inputs(self.points)
        self.prepare()

    def prepare(self) -> None:
        """Make what the loss needs at every call."""

    def placed(self, points: Tensor) -> Tensor:
        """Points inside, from evenly spread ones."""
        return points

    def inputs(self, points: Tensor) -> Jet:
        """The jet of what the network is given."""
        return coordinates(points, self.twice)

    def value(self, points: Tensor) -> Tensor:
        """The network's solution."""
        return self.model(self.inputs(points).value)[:, 0]

    def residual(self, u: Tensor, *derivatives: Tensor) -> Tensor:
        """What the equation leaves, from u, its derivatives in both coordinates, second ones."""
        raise NotImplementedError

    def mistakes(self) -> Tensor:
        """Mean squares of what is wrong at the boundary."""
        raise NotImplementedError

    def solution(self) -> tuple[Tensor, Tensor]:
        """Points (n, 2), and the solution there."""
        raise NotImplementedError

    def loss(self) -> Tensor:
        residual = self.residual(*self.model.jet(self.inside).features())
        return residual.square().mean() + self.options["weight"] * self.mistakes()

    @torch.no_grad()
    def error(self) -> float:
        """Relative L2 error of the network's solution."""
        points, exact = self.solution()
        return float((self.value(points) - exact).norm() / exact.norm())


# --------------------------------------------------------------------------- in space and time


class Burgers(Equation):
    """u_t + u u_x = (0.01 / pi) u_xx for x in [-1, 1] and t in [0, 1].

    u = -sin(pi x) at t = 0, and zero at both ends; a shock stands at x = 0 from t = 1 / pi on.  The
    points are the denser the closer to it, as x = r^3 with r evenly spread: its width is 0.01.
    """

    low, high, twice = (-1.0, 0.0), (1.0, 1.0), 1
    viscosity = 0.01 / PI

    def placed(self, points: Tensor) -> Tensor:
        return torch.stack([points[:, 0] ** 3, points[:, 1]], 1)

    def prepare(self) -> None:
        count = self.options["edge"]
        x, t, zero = line(-1, 1, 2 * count), line(0, 1, count), torch.zeros(1).double()
        self.start, self.start_value = grid(x, zero), -torch.sin(PI * x)
        self.ends = grid(torch.tensor([-1.0, 1.0]).double(), t)

    def residual(self, u: Tensor, u_x: Tensor, u_t: Tensor, u_xx: Tensor) -> Tensor:
        return u_t + u * u_x - self.viscosity * u_xx

    def mistakes(self) -> Tensor:
        start = self.value(self.start) - self.start_value
        return start.square().mean() + self.value(self.ends).square().mean()

    def solution(self) -> tuple[Tensor, Tensor]:
        points = grid(line(-1, 1, 201), line(0, 1, 41))
        return points, burgers(points)


def burgers(points: Tensor, nodes: int = 200) -> Tensor:
    """The solution by Cole and Hopf, with Hermite's quadrature.

    u = -E[sin(pi y) f(y)] / E[f(y)] with f(y) = exp(-cos(pi y) / (2 pi viscosity)), where y is
    normal around x with variance 2 viscosity t.
    """
    z, weights = map(torch.from_numpy, numpy.polynomial.hermite.hermgauss(nodes))
    x, t = points[:, :1], points[:, 1:]
    y = x - (4 * Burgers.viscosity * t).sqrt() * z
    share = torch.softmax(weights.log() - torch.cos(PI * y) / (2 * PI * Burgers.viscosity), 1)
    return -(torch.sin(PI * y) * share).sum(1)


class AllenCahn(Equation):
    """u_t = 0.0001 u_xx + 5 (u - u^3) for x in [-1, 1] and t in [0, 1], periodic in x.

    u = x^2 cos(pi x) at t = 0.  The network is given cos(pi x), sin(pi x) and t, so that it is
    periodic whatever its parameters.
    """

    low, high, twice = (-1.0, 0.0), (1.0, 1.0), 1
    features = 3
    diffusion, rate = 1e-4, 5.0

    def inputs(self, points: Tensor) -> Jet:
        x, t = points.unbind(1)
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        cosine, sine = torch.cos(PI * x), torch.sin(PI * x)
        in_x, in_t = (-PI * sine, PI * cosine, zero), (zero, zero, one)
        twice_in_x = (-(PI**2) * cosine, -(PI**2) * sine, zero)
        value, *derivatives = (
            torch.stack(row, 1) for row in ((cosine, sine, t), in_x, in_t, twice_in_x)
        )
        return Jet(value, torch.stack(derivatives[:2]), derivatives[2][None])

    def prepare(self) -> None:
        x = line(-1, 1, self.options["edge"] + 1)[:-1]
        self.start = grid(x, torch.zeros(1).double())
        self.start_value = x.square() * torch.cos(PI * x)

    def residual(self, u: Tensor, u_x: Tensor, u_t: Tensor, u_xx: Tensor) -> Tensor:
        return u_t - self.diffusion * u_xx - self.rate * (u - u**3)

    def mistakes(self) -> Tensor:
        return (self.value(self.start) - self.start_value).square().mean()

    def solution(self) -> tuple[Tensor, Tensor]:
        x, t, u = allen_cahn()
        return grid(x, t), u.flatten()


@lru_cache(maxsize=4)
def allen_cahn(
    modes: int = 1024, steps: int = 1000, times: int = 20, every: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """The solution by a Fourier method in space and Runge and Kutta's of fourth order in time.

    Its relative error is about 1e-5, from the kink that x^2 cos(pi x) has at the ends.

    Returns:
        x, t, and u of shape (len(x), len(t)): ``times`` + 1 moments, every so many points.
    """
    x = line(-1, 1, modes + 1)[:-1]
    wave = PI * torch.fft.rfftfreq(modes, 1 / modes, dtype=torch.float64)

    def change(u: Tensor) -> Tensor:
        u_xx = torch.fft.irfft(-wave.square() * torch.fft.rfft(u), modes)
        return AllenCahn.diffusion * u_xx + AllenCahn.rate * (u - u**3)

    u, h = x.square() * torch.cos(PI * x), 1 / steps
    found = [u]
    for step in range(steps):
        k1 = change(u)
        k2 = change(u + h / 2 * k1)
        k3 = change(u + h / 2 * k2)
        k4 = change(u + h * k3)
        u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        if (step + 1) % (steps // times) == 0:
            found.append(u)
    return x[::every], line(0, 1, times + 1), torch.stack(found, 1)[::every]


# --------------------------------------------------------------------------- in the plane


class Helmholtz(Equation):
    """u_xx + u_yy + k^2 u = f on [-1, 1]^2, zero at the boundary.

    f is such that u = sin(a pi x) sin(b pi y); k = 0 makes it Poisson's equation.

    Args:
        options: besides, the frequencies ``a`` and ``b``, and ``k``.
    """

    low, high, twice = (-1.0, -1.0), (1.0, 1.0), 2

    def prepare(self) -> None:
        edge, ends = line(-1, 1, self.options["edge"]), torch.tensor([-1.0, 1.0]).double()
        self.edges = torch.cat([grid(edge, ends), grid(ends, edge)])
        a, b, k = (self.options[name] for name in "abk")
        self.right = (k**2 - (a * PI) ** 2 - (b * PI) ** 2) * self.exact(self.points)

    def exact(self, points: Tensor) -> Tensor:
        x, y = points.unbind(1)
        return torch.sin(self.options["a"] * PI * x) * torch.sin(self.options["b"] * PI * y)

    def residual(self, u: Tensor, u_x: Tensor, u_y: Tensor, u_xx: Tensor, u_yy: Tensor) -> Tensor:
        return u_xx + u_yy + self.options["k"] ** 2 * u - self.right

    def mistakes(self) -> Tensor:
        return self.value(self.edges).square().mean()

    def solution(self) -> tuple[Tensor, Tensor]:
        points = grid(line(-1, 1, 101), line(-1, 1, 101))
        return points, self.exact(points)
