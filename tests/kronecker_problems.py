"""The Kronecker-factored initial matrix on its own: its buffers, and gradients to feed it."""

from __future__ import annotations

from math import inf

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from problems import flat

from adaqn_cuda import ops
from adaqn_cuda.state.blocks import as_blocks, heights
from adaqn_cuda.state.layout import Counter, Flag
from adaqn_cuda.state.plan import Cut, Plan

settings.register_profile("kronecker", deadline=None, max_examples=20)
settings.load_profile("kronecker")

KEEP, EPS, LONGEST = 0.99, 1e-16, 4
#: What a call does with the factors: takes the gradient in, and then turns all bases never, once,
#: or until they are found.
TAKEN, TURNED = dict(call=2, interval=2**40), dict(call=2, interval=1)
SOUGHT = dict(call=1, interval=1)

DTYPES = [torch.float32, torch.float64]
BACKENDS = {"reference": ops._REFERENCE, "native": ops._DISPATCHED}
both_backends = pytest.mark.parametrize("backend", BACKENDS)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)

shape = st.lists(st.integers(0, 12), max_size=3).map(tuple)
shapes = st.lists(shape, min_size=1, max_size=5)
seeds = st.integers(0, 2**16)


class H0:
    """The buffers of the initial matrix, and the operations on them.

    It counts no steps: ``counters`` say that ``steps`` have been accepted, and whether a gradient
    has been seen, so that a zero one counts, too.
    """

    def __init__(
        self, shapes, backend="reference", *, blocks=None, dtype=torch.float64, kind=None,
        block_size=LONGEST, max_vector_dim=LONGEST, steps=20,
    ) -> None:  # fmt: skip
        shapes = [torch.Size(shape) for shape in shapes]
        blocks = blocks or [1] * len(shapes)
        cuts = [
            Cut(heights(s, as_blocks(b)), block_size) for s, b in zip(shapes, blocks, strict=True)
        ]
        self.ops, self.shapes = BACKENDS[backend], shapes
        self.plan = Plan(shapes, cuts, max_vector_dim)
        self.params = [torch.zeros(shape, dtype=kind or dtype) for shape in shapes]
        self.accumulator = torch.zeros(sum(s.numel() for s in shapes), dtype=dtype)
        self.factors, self.bases = torch.zeros(2, self.plan.factors, dtype=dtype)
        for basis in self.squares("bases"):
            basis.fill_diagonal_(1)
        self.square = torch.zeros(1, dtype=torch.float64)
        self.projections = torch.zeros(len(Flag), dtype=torch.float64)
        self.counters = torch.zeros(len(Counter), dtype=torch.int64)
        self.counters[Counter.GRADIENTS], self.counters[Counter.ACCEPTED] = 1, steps

    def squares(self, name: str) -> list[torch.Tensor]:
        """Views of all factors or bases."""
        buffer = getattr(self, name)
        return [buffer[k : k + n * n].view(n, n) for k, n in self.plan.squares()]

    def diagonals(self) -> list[torch.Tensor]:
        """Each parameter's v."""
        return list(self.accumulator.split([shape.numel() for shape in self.shapes]))

    def buffers(self) -> list[torch.Tensor]:
        return [self.accumulator, self.factors, self.bases, self.square]

    def saved(self) -> list[torch.Tensor]:
        return [buffer.clone() for buffer in self.buffers()]

    def become(self, other: H0) -> None:
        for mine, theirs in zip(self.buffers(), other.buffers(), strict=True):
            mine.copy_(theirs)

    def parts(self, index: int) -> list[torch.Tensor]:
        """What belongs to one parameter."""
        span = self.plan.spans[index]
        return [self.diagonals()[index], self.factors[span], self.bases[span]]

    def accumulate(
        self, grads, *, call, interval, accepted=True, keep=KEEP, scale=None, maximize=False,
        max_grad_norm=inf, surplus=1.0,
    ) -> None:  # fmt: skip
        """``surplus`` is what an outlier is divided by after it has been measured."""
        self.measure(grads, scale, accepted)
        self.projections[Flag.SQUARE] /= surplus**2
        if scale is not None or surplus != 1:
            scale = torch.tensor(float(1 if scale is None else scale)) * torch.tensor(surplus)
        self.ops.kronecker_accumulate(
            self.params, grads, self.plan.table, self.projections, self.counters, scale, maximize,
            max_grad_norm, [len(self.params)], [keep], [1 - keep], keep, call, interval,
            *self.buffers(),
        )  # fmt: skip

    def measure(self, grads, scale, accepted: bool) -> None:
        g = flat([g.double() for g in grads if g is not None] or [torch.zeros(0)])
        g = g / (1 if scale is None else scale)
        self.projections[Flag.NONFINITE] = (~g.isfinite()).sum() + (not accepted)
        self.projections[Flag.NONZERO] = (g != 0).sum()
        self.projections[Flag.SQUARE] = g.square().sum()

    def product(
        self, x, *, inverse=False, pending=0, keep=KEEP, eps=EPS, correct_bias=False
    ) -> torch.Tensor:
        out = x.clone()
        self.ops.kronecker_apply(
            self.plan.table, self.counters, self.accumulator, self.bases, [len(self.params)],
            [keep], [eps], correct_bias, pending, inverse, out,
        )  # fmt: skip
        return out


def noise(shapes, seed, dtype=torch.float64) -> list[torch.Tensor]:
    """Gradients with rows and columns of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for shape in shapes:
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        if g.dim() > 1:
            g = g * torch.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1)) ** 0.7
            g = g.cumsum(1)
        grads.append(g.to(dtype))
    return grads


def train(k: H0, steps: int, *, seed=0, interval=3) -> None:
    """The first calls of a run."""
    for call in range(1, steps + 1):
        grads = noise(k.shapes, 1000 * seed + call, k.accumulator.dtype)
        k.accumulate(grads, call=call, interval=interval)


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )
