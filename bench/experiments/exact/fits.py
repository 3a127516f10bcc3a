"""Fits on all data: a picture by a network of coordinates, and scikit-learn's digits."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..deterministic import FullBatch, Linear
from .equations import grid
from .jets import Network

#: Newton's method ends when the gradient's largest element is below this.
SOLVED = 1e-13


class Field(FullBatch):
    """A picture as a function of the place: a network of fixed random waves of the coordinates.

    The loss is the mean square over the pixels; the error that between the pixels.

    Args:
        options: ``side`` in pixels, ``waves`` and their ``frequency``, ``width`` and ``layers``.
        seed: sets waves and initial parameters.
        path: not used.
    """

    def __init__(self, options: dict[str, Any], seed: int, path: None = None) -> None:
        self.side = options["side"]
        generator = torch.Generator().manual_seed(seed)
        size = 2, options["waves"]
        self.waves = torch.randn(size, generator=generator, dtype=torch.float64)
        self.waves *= 2 * math.pi * options["frequency"]
        sizes = [2 * options["waves"]] + [options["width"]] * options["layers"] + [1]
        self.model = Network(sizes, seed)
        self.seen, self.unseen = (self._pixels(shift) for shift in (0.5, 1.0))

    def _pixels(self, shift: float) -> tuple[Tensor, Tensor]:
        """What the network is given at the pixels, and their values."""
        axis = (torch.arange(self.side, dtype=torch.float64) + shift) / self.side
        points = grid(axis, axis)
        angles = points @ self.waves
        return torch.cat([torch.sin(angles), torch.cos(angles)], 1), picture(points)

    def loss(self) -> Tensor:
        inputs, values = self.seen
        return (self.model(inputs)[:, 0] - values).square().mean()

    @torch.no_grad()
    def error(self) -> float:
        inputs, values = self.unseen
        return float((self.model(inputs)[:, 0] - values).norm() / values.norm())


def picture(points: Tensor) -> Tensor:
    """A ball in front of stripes that grow finer, at places in the unit square."""
    x, y = points.unbind(1)
    stripes = 0.5 + 0.3 * torch.sin(6 * math.pi * x * (1 + x) + 2 * y)
    distance = ((x - 0.4).square() + (y - 0.55).square()).sqrt()
    inside = torch.sigmoid((0.25 - distance) / 0.02)
    light = 1 - 2 * ((x - 0.33).square() + (y - 0.48).square()).sqrt()
    return (1 - inside) * stripes + inside * light


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """1,797 pictures of 8 x 8 pixels in [0, 1], and which digit each shows."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.data) / 16, torch.from_numpy(found.target)


class Classification(FullBatch):
    """Multinomial regression of the digits on their pixels, with a penalty; convex.

    The loss is what is left to the optimum, and the error the relative distance from its weights.

    Args:
        options: ``l2``, half of which is multiplied with the sum of squared weights.
        seed: sets the initial weights.
        path: not used.
    """

    def __init__(self, options: dict[str, Any], seed: int, path: None = None) -> None:
        self.l2 = options["l2"]
        self.x, self.labels = with_ones(digits()[0]), digits()[1]
        self.model = Linear(self.x.shape[1], 10)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.model.weight, std=0.1, generator=generator)
        self.optimum, self.solution = best_classification(self.l2)

    def loss(self) -> Tensor:
        return penalised(self.model.weight, self.x, self.labels, self.l2)

    @torch.no_grad()
    def error(self) -> float:
        return float((self.model.weight - self.solution).norm() / self.solution.norm())


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def penalised(w: Tensor, x: Tensor, labels: Tensor, l2: float) -> Tensor:
    return nn.functional.cross_entropy(x @ w, labels) + l2 / 2 * w.square().sum()


@lru_cache(maxsize=4)
def best_classification(l2: float) -> tuple[float, Tensor]:
    """The least loss and its weights, by Newton's method with halved steps."""
    x, labels = with_ones(digits()[0]), digits()[1]
    w = torch.zeros(x.shape[1], 10, dtype=torch.float64)
    for _ in range(100):
        gradient, hessian = derivatives(w, x, labels, l2)
        if gradient.abs().max() < SOLVED:
            break
        direction = torch.linalg.solve(hessian, gradient.flatten()).view_as(w)
        loss, slope, length = penalised(w, x, labels, l2), (gradient * direction).sum(), 1.0
        while length > 1e-3 and not (
            penalised(w - length * direction, x, labels, l2) <= loss - 0.1 * length * slope
        ):
            length /= 2
        # Where rounding hides the decrease, the whole step is right.
        w = w - (length if length > 1e-3 else 1.0) * direction
    return float(penalised(w, x, labels, l2)), w


def derivatives(w: Tensor, x: Tensor, labels: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Gradient, and the Hessian as a matrix, of :func:`penalised`."""
    p = torch.softmax(x @ w, 1)
    gradient = x.T @ (p - nn.functional.one_hot(labels, p.shape[1])) / len(x) + l2 * w
    spread = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    classes = range(p.shape[1])
    blocks = [[(x * spread[:, c, k, None]).T @ x for k in classes] for c in classes]
    hessian = torch.stack([torch.stack(row) for row in blocks]) / len(x)
    hessian = hessian.permute(2, 0, 3, 1).reshape(w.numel(), -1)
    return gradient, hessian + l2 * torch.eye(w.numel(), dtype=w.dtype)


class Autoencoder(FullBatch):
    """The digits through a narrow layer and back; the error is that on the other digits.

    Args:
        options: ``rows`` that it is fitted to, ``sizes`` of the layers between the pixels.
        seed: sets the initial parameters.
        path: not used.
    """

    def __init__(self, options: dict[str, Any], seed: int, path: None = None) -> None:
        pixels, rows = digits()[0], options["rows"]
        self.seen, self.unseen = pixels[:rows], pixels[rows:]
        self.model = Network([64, *options["sizes"], 64], seed)

    def loss(self) -> Tensor:
        return (self.model(self.seen) - self.seen).square().mean()

    @torch.no_grad()
    def error(self) -> float:
        return float((self.model(self.unseen) - self.unseen).norm() / self.unseen.norm())
