"""The presets of sibling methods against implementations written from their papers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from problems import both_backends, flat
from torch import Tensor, func, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from adaqn_cuda import OLBFGS, PAPER, SQN, AdaQN, hessian
from adaqn_cuda.options import CHECKS

Vector = np.ndarray
#: Steps of a run, and pairs in memory: fewer than come, so that it turns.
STEPS, MEMORY = 60, 4


# --------------------------------------------------------------------------- the papers' methods


def inverse_hessian(pairs: deque[tuple[Vector, Vector]], size: int) -> Vector:
    """H as a dense matrix: Byrd et al., Algorithm 2; I where there are no pairs."""
    h = np.eye(size)
    if pairs:
        s, y = pairs[-1]
        h *= (s @ y) / (y @ y)
    for s, y in pairs:
        rho = 1 / (s @ y)
        v = np.eye(size) - rho * np.outer(y, s)
        h = v.T @ h @ v + rho * np.outer(s, s)
    return h


def sqn(problem: Problem, interval: int) -> Iterator[Vector]:
    """The iterates of Byrd et al., Algorithm 1; a pair without curvature is left out."""
    w, pairs, before = problem.parameters(), deque(maxlen=MEMORY), None
    total = np.zeros_like(w)
    for k in range(1, STEPS + 1):
        total = total + w
        w = w - rate(k) * inverse_hessian(pairs, len(w)) @ problem.gradient(w, k)
        if k % interval == 0:
            average, total = total / interval, np.zeros_like(w)
            if before is None:
                before = average
            else:
                s = average - before
                y = problem.hessian_times(average, s, k)
                if s @ y > 0:
                    pairs.append((s, y))
                    before = average
        yield w


def olbfgs(problem: Problem, regularization: float, delay: int) -> Iterator[Vector]:
    """The iterates of Mokhtari and Ribeiro, with the lambda of Schraudolph et al.

    A pair is used ``delay`` steps later than in the papers.  Where one without curvature is left
    out, the next one begins where it began.
    """
    w = before = problem.parameters()
    pairs, coming = deque(maxlen=MEMORY), deque()
    for t in range(1, STEPS + 1):
        w = w - rate(t) * inverse_hessian(pairs, len(w)) @ problem.gradient(w, t)
        s = w - before
        y = problem.gradient(w, t) - problem.gradient(before, t) + regularization * s
        coming.append([])
        if s @ y > 0:
            coming[-1].append((s, y))
            before = w
        if len(coming) > delay:
            pairs.extend(coming.popleft())
        yield w


def rate(step: int) -> float:
    """Step length of the 1-based ``step``: Schraudolph et al., eta_0 tau / (tau + t)."""
    return 0.1 * 20 / (20 + step - 1)


# --------------------------------------------------------------------------- problems


class Problem:
    """A model in float64 on mini-batches, and its derivatives by other means than the package's."""

    rows, batch, hessian_batch = 256, 16, 64
    model: nn.Module
    targets: Tensor

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.inputs = torch.logspace(0, -1, 8, dtype=torch.float64) * normal(self.rows, 8)
        self.scores = self.inputs.sin() @ normal(8, 3) + 0.5 * normal(self.rows, 3)
        self.model = model.double()
        for p in model.parameters():
            p.data = 0.3 * normal(*p.shape)

    def part(self, size: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the batch of ``step``."""
        rows = (size * step + torch.arange(size)) % self.rows
        return self.inputs[rows], self.targets[rows]

    def parameters(self) -> Vector:
        return flat(self.model.parameters()).numpy()

    def loss(self, step: int) -> Tensor:
        x, targets = self.part(self.batch, step)
        return self.criterion(self.model(x), targets)

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient(self, w: Vector, step: int) -> Vector:
        raise NotImplementedError

    def hessian_times(self, w: Vector, s: Vector, step: int) -> Vector:
        raise NotImplementedError


class LogisticRegression(Problem):
    """Convex; derivatives by hand."""

    penalty = 0.01

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 1, bias=False))
        self.targets = (self.scores[:, :1] > 0).double()

    def criterion(self, outputs, targets):
        square = self.model.weight.square().sum()
        return binary_cross_entropy_with_logits(outputs, targets) + 0.5 * self.penalty * square

    def gradient(self, w, step):
        x, targets = (part.numpy() for part in self.part(self.batch, step))
        probability = 1 / (1 + np.exp(-x @ w))
        return x.T @ (probability - targets[:, 0]) / len(x) + self.penalty * w

    def hessian_times(self, w, s, step):
        x = self.part(self.hessian_batch, step)[0].numpy()
        probability = 1 / (1 + np.exp(-x @ w))
        return x.T @ (probability * (1 - probability) * (x @ s)) / len(x) + self.penalty * s


class Network(Problem):
    """Not convex; derivatives of a function of one vector, the Hessian as a dense matrix."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)))
        self.targets = self.scores.argmax(1)

    def criterion(self, outputs, targets):
        return cross_entropy(outputs, targets)

    def function(self, size: int, step: int) -> Callable[[Tensor], Tensor]:
        """The loss on a batch as a function of all parameters in one vector."""
        x, targets = self.part(size, step)
        shapes = {name: p.shape for name, p in self.model.named_parameters()}

        def loss(w: Tensor) -> Tensor:
            pieces = w.split([shape.numel() for shape in shapes.values()])
            pairs = zip(shapes.items(), pieces, strict=True)
            values = {name: piece.view(shape) for (name, shape), piece in pairs}
            return self.criterion(func.functional_call(self.model, values, (x,)), targets)

        return loss

    def gradient(self, w, step):
        return func.grad(self.function(self.batch, step))(torch.from_numpy(w)).numpy()

    def hessian_times(self, w, s, step):
        matrix = func.hessian(self.function(self.hessian_batch, step))(torch.from_numpy(w))
        return matrix.numpy() @ s


class Wells(Problem):
    """Two wells in every coordinate, and noise; it begins between them, where curvature is < 0.

    Their curvature is positive where |w| > 0.58.
    """

    depth = np.linspace(1, 2, 8)

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 1, bias=False))
        self.targets = torch.zeros(self.rows)
        self.model.weight.data = 0.4 * self.model.weight.data.sign()

    def criterion(self, outputs, targets):
        wells = (self.model.weight.square() - 1).square() @ torch.from_numpy(self.depth)
        return outputs.mean() + 0.25 * wells.sum()

    def gradient(self, w, step):
        x = self.part(self.batch, step)[0].numpy()
        return x.mean(0) + self.depth * w * (w * w - 1)

    def hessian_times(self, w, s, step):
        return self.depth * (3 * w * w - 1) * s


on_all_problems = pytest.mark.parametrize("make_problem", [LogisticRegression, Network, Wells])


def take_step(optimizer: AdaQN, problem: Problem, step: int) -> None:
    optimizer.zero_grad()
    problem.loss(step).backward()
    optimizer.step()


def assert_at(problem: Problem, expected: Vector, step: int) -> None:
    distance = np.linalg.norm(problem.parameters() - expected)
    assert distance <= 1e-9 * np.linalg.norm(expected), f"step {step}"


def assert_eventful(optimizer: AdaQN, problem: Problem, empty: int = 0) -> None:
    """Pairs were dropped from a full memory, and refused, beside ``empty`` ones, for curvature."""
    stats = optimizer.stats()
    assert stats["stored"] > 2 * MEMORY and stats["pairs"] == MEMORY
    if isinstance(problem, Wells):
        assert stats["skipped"] > empty


# --------------------------------------------------------------------------- the presets


@both_backends
@on_all_problems
def test_sqn_follows_its_paper(make_problem, fused):
    problem, step, interval = make_problem(), 0, 2
    product = hessian(
        problem.model, problem.criterion, lambda: problem.part(problem.hessian_batch, step)
    )
    options = {**SQN, "curvature": product, "update_interval": interval, "history_size": MEMORY}
    optimizer = AdaQN(problem.model.parameters(), lr=rate(1), fused=fused, **options)
    scheduler = LambdaLR(optimizer, lambda k: rate(k + 1) / rate(1))
    for step, expected in enumerate(sqn(problem, interval), start=1):
        take_step(optimizer, problem, step)
        scheduler.step()
        assert_at(problem, expected, step)
    assert_eventful(optimizer, problem)


def regularized(problem: Problem, step: int, regularization: float) -> Callable[[], Tensor]:
    """The loss on the batch of ``step``, whose gradients' difference has the papers' lambda s."""

    def loss() -> Tensor:
        square = sum(p.square().sum() for p in problem.model.parameters())
        return problem.loss(step) + 0.5 * regularization * square

    return loss


@both_backends
@on_all_problems
@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_olbfgs_follows_its_paper_one_step_later(make_problem, regularization, fused):
    problem = make_problem()
    options = {**OLBFGS, "history_size": MEMORY}
    optimizer = AdaQN(problem.model.parameters(), lr=rate(1), fused=fused, **options)
    scheduler = LambdaLR(optimizer, lambda k: rate(k + 1) / rate(1))
    for step, expected in enumerate(olbfgs(problem, regularization, delay=1), start=1):
        optimizer.curvature_closure = regularized(problem, step - 1, regularization)
        take_step(optimizer, problem, step)
        scheduler.step()
        assert_at(problem, expected, step)
    assert_eventful(optimizer, problem)


@both_backends
@on_all_problems
@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_olbfgs_with_a_second_call_at_lr_zero_follows_its_paper(
    make_problem, regularization, fused
):
    problem = make_problem()
    options = {**OLBFGS, "history_size": MEMORY}
    optimizer = AdaQN(problem.model.parameters(), fused=fused, **options)
    (group,) = optimizer.param_groups
    for step, expected in enumerate(olbfgs(problem, regularization, delay=0), start=1):
        for group["lr"], batch in ((rate(step), step - 1), (0.0, step)):
            optimizer.curvature_closure = regularized(problem, batch, regularization)
            take_step(optimizer, problem, step)
        assert_at(problem, expected, step)
    assert_eventful(optimizer, problem, empty=STEPS - 1)


@pytest.mark.parametrize("preset", [PAPER, SQN, OLBFGS])
def test_presets_hold_valid_options(preset):
    for name, value in preset.items():
        CHECKS[name](name, value)


@pytest.mark.parametrize(
    ("preset", "remedy"), [(SQN, "curvature_product"), (OLBFGS, "curvature_closure")]
)
def test_presets_ask_for_what_they_need(preset, remedy):
    problem = LogisticRegression()
    optimizer = AdaQN(problem.model.parameters(), **preset)
    start = problem.parameters()
    with pytest.raises(RuntimeError, match=remedy):
        take_step(optimizer, problem, 0)
    assert (problem.parameters() == start).all()
