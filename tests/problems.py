"""Small problems that several tests share, and what is compared of optimizers on them."""

from __future__ import annotations

import copy
import csv
import os
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaqn_cuda import AdaQN, native

DATA = Path(__file__).parent / "data"

#: Pairs on a plain RMSprop diagonal with every safeguard off, whatever the class's defaults are.
PLAIN: dict[str, Any] = dict(
    lr=0.01, history_size=10, fisher_size=32, update_interval=10, init="rmsprop", decay=0.9,
    eps=2**-26, min_curvature=1e-4, max_increase=1.01, curvature="fisher", momentum=0.0,
    damping=0.0, max_direction=inf, bias_correction=False, max_grad_norm=inf, weight_decay=0.0,
    maximize=False, history_dtype=None, fisher_dtype=None, fused=None,
)  # fmt: skip


def plain_adaqn(params, **options) -> AdaQN:
    """An optimizer with the options of :data:`PLAIN`, where no others are given."""
    return AdaQN(params, **{**PLAIN, **options})


needs_library = pytest.mark.skipif(
    native.library_obstacle() is not None and os.environ.get("ADAQN_REQUIRE_EXT") != "1",
    reason="the native library is not built",
)
#: Runs a test on the reference and, where there are any, on native kernels.
both_backends = pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_library)])
#: The same as values of ``fused``, of which ``None`` takes the best there is.
BACKENDS = [False, pytest.param(None, marks=needs_library)]
#: Devices with native kernels: the CPU and, where there is one, a GPU.
DEVICES = ["cpu"]
#: The same as values of ``fused`` and of a device, after the reference.
PLACES = [
    pytest.param(False, "cpu", id="reference"),
    pytest.param(None, "cpu", id="cpu", marks=needs_library),
]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))
    PLACES.append(pytest.param(None, "cuda", id="cuda", marks=pytest.mark.cuda))
every_device = pytest.mark.parametrize("device", DEVICES)
every_place = pytest.mark.parametrize(("fused", "device"), PLACES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


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


def random_parameters(
    shapes, dtype=torch.float32, seed=0, device="cpu"
) -> list[torch.nn.Parameter]:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(value.to(device, dtype)) for value in values]


def set_gradients(params, step: int) -> None:
    """Deterministic gradients of a slightly curved bowl with noise, in the parameters' dtype."""
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(7919 * step + index)
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        p.grad = (0.3 + 0.1 * index) * p.detach() + 0.2 * noise


def flat(tensors) -> Tensor:
    """One vector of copies of all numbers, parameter after parameter."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def snapshot(optimizer):
    """Parameters and state, copied."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy(([p.detach() for p in params], [dict(optimizer.state[p]) for p in params]))


def assert_same(a, b):
    """Two snapshots are the same to the bit."""
    (params_a, state_a), (params_b, state_b) = a, b
    for p, q in zip(params_a, params_b, strict=True):
        assert torch.equal(p, q)
    for x, y in zip(state_a, state_b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=0, atol=0, equal_nan=True, msg=name)
