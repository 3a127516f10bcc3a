"""Three scripts as people write them for torch.optim.LBFGS, and the same with the import swapped.

    python bench/drop_in.py

A physics-informed network for a Poisson equation, a picture fitted through its blurred image, and a
logistic regression.  Prints loss, evaluations and seconds with either optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import adaqn_cuda


def poisson() -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """u'' = -pi^2 sin(pi x) on [-1, 1] with u = 0 at both ends, float64."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
    ).double()
    x = torch.linspace(-1, 1, 128, dtype=torch.float64)[:, None].requires_grad_()
    source = torch.pi**2 * torch.sin(torch.pi * x.detach())

    def loss() -> Tensor:
        u = net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return ((bend + source) ** 2).mean() + 100 * (u[0] ** 2 + u[-1] ** 2).sum()

    return list(net.parameters()), loss


def picture() -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Pixels whose features, a fixed random convolution, are those of a target picture."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 16, 5), nn.Softplus(), nn.Conv2d(16, 16, 5)).double()
    features.requires_grad_(False)
    side = torch.linspace(0, 6, 64, dtype=torch.float64)
    target = torch.stack([torch.sin(k * side)[:, None] * torch.cos(side)[None] for k in (1, 2, 3)])
    wanted = features(target[None])
    pixels = nn.Parameter(torch.rand(1, 3, 64, 64, dtype=torch.float64))
    return [pixels], lambda: nn.functional.mse_loss(features(pixels), wanted)


def regression() -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Logistic regression with ill-scaled features and a penalty."""
    torch.manual_seed(0)
    x = torch.randn(2000, 200, dtype=torch.float64) * torch.logspace(-2, 0, 200).double()
    y = (x @ torch.randn(200, dtype=torch.float64) > 0).double()
    weights = nn.Parameter(torch.zeros(200, dtype=torch.float64))

    def loss() -> Tensor:
        misfit = nn.functional.binary_cross_entropy_with_logits(x @ weights, y)
        return misfit + 1e-5 * (weights**2).sum()

    return [weights], loss


#: Problem, and what is swapped between the two scripts: nothing but the class.
SCRIPTS = {
    "physics-informed network": (poisson, dict(max_iter=500, history_size=100)),
    "picture": (picture, dict(max_iter=200, history_size=100)),
    "logistic regression": (regression, dict(max_iter=300, history_size=50)),
}


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    seconds: float


def run(optimizer: type[torch.optim.Optimizer], name: str, **more: object) -> Outcome:
    """The script with ``optimizer``; ``more`` options take precedence."""
    build, options = SCRIPTS[name]
    params, loss_of = build()
    chosen = {"line_search_fn": "strong_wolfe", "tolerance_change": 1e-12, **options, **more}
    solver = optimizer(params, **chosen)
    losses: list[float] = []

    def closure() -> Tensor:
        solver.zero_grad()
        loss = loss_of()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    began = time.perf_counter()
    solver.step(closure)
    return Outcome(losses, time.perf_counter() - began)


def main() -> None:
    print(f"{'script':26}{'optimizer':20}{'loss':>10}{'evaluations':>13}{'seconds':>9}")
    for name in SCRIPTS:
        for label, optimizer in (
            ("torch.optim.LBFGS", torch.optim.LBFGS),
            ("adaqn_cuda.LBFGS", adaqn_cuda.LBFGS),
        ):
            outcome = run(optimizer, name)
            print(
                f"{name:26}{label:20}{min(outcome.losses):10.2e}{len(outcome.losses):13}"
                f"{outcome.seconds:9.1f}"
            )


if __name__ == "__main__":
    main()
