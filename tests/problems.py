"""Small problems that several tests share."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


class AuthorsProblem:
    """Regularised nonlinear least squares on 256 rows: the problem of the authors' trajectories."""

    rows, batch = 256, 16

    def __init__(self, scale: float) -> None:
        i = torch.arange(1, self.rows + 1, dtype=torch.float64)[:, None]
        j = torch.arange(1, 25, dtype=torch.float64)
        self.scale = scale
        self.a = torch.sin(0.7 * i * j + 0.3 * i + 1.1 * j**1.5) * 10 ** (-(j - 1) / 23)
        self.b = torch.tanh(self.a @ (2 * torch.cos(j))) + 0.1 * torch.sin(13 * i[:, 0])
        self.w0 = 0.5 * torch.sin(j)

    def loss(self, w: Tensor) -> Tensor:
        residual = torch.tanh(self.a @ w) - self.b
        return self.scale * (0.5 * (residual**2).mean() + 0.005 * torch.log(1 + w * w).sum())

    def gradient(self, w: Tensor, step: int) -> Tensor:
        """Gradient of the mini-batch of 0-based ``step`` at ``w``."""
        rows = (self.batch * step + torch.arange(self.batch)) % self.rows
        a, z = self.a[rows], torch.tanh(self.a[rows] @ w)
        fit = a.T @ ((z - self.b[rows]) * (1 - z * z)) / self.batch
        return self.scale * (fit + 0.01 * w / (1 + w * w))


def trajectory(name: str) -> Tensor:
    """Iterates of the authors' own implementation, one per row, before each step."""
    with open(DATA / name, newline="") as file:
        return torch.tensor(
            [[float(word) for word in row] for row in csv.reader(file)], dtype=torch.float64
        )


def random_parameters(shapes, dtype=torch.float32, seed=0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def set_gradients(params, step: int) -> None:
    """Deterministic gradients of a slightly curved bowl with noise, in the parameters' dtype."""
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(7919 * step + index)
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = (0.3 + 0.1 * index) * p.detach() + 0.2 * noise
