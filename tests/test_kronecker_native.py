"""The Kronecker operations of the native library against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, prod

import pytest
import torch
from kernel_problems import BF16, F16, F32, F64, arguments, assert_close, bits, copy
from torch import Tensor

from adaqn_cuda import native, reference
from adaqn_cuda.layout import Counter, Flag, state_dtype
from adaqn_cuda.plan import Column, Cut, Plan
from adaqn_cuda.reference.acceptance import measure_gradient
from adaqn_cuda.reference.flat import gradient_vector

needs_native = pytest.mark.skipif(
    native.obstacle("cpu") is not None, reason="the native library is not built"
)
pytestmark = needs_native

OPERATIONS = ("kronecker_step", "kronecker_accumulate", "kronecker_apply")
#: Largest relative error, by the state's dtype: of sums, and of bases and what follows from them.
SUMS = {F32: 2e-5, F64: 1e-12}
BASES = {F32: 2e-3, F64: 1e-9}


@dataclass(frozen=True)
class Case:
    """What a problem looks like.

    Args:
        shapes: of the parameters.
        dtypes: of the parameters, cycled through.
        block_size: longest piece of a side; ``None`` for no factors.
        blocks: row blocks of every parameter with rows enough.
        max_vector_dim: longest vector with a factor.
        beta: of the momentum; 0 for none.
        missing: parameters without a gradient.
        transposed: whether the memory of matrices is column by column.
        call, interval: of the schedule.
        accepted: steps before this one.
        max_grad_norm: as in the reference.
        groups: parameter groups.
        warm: whether there were gradients before; the spectra of the factors are simple then.
    """

    shapes: tuple[tuple[int, ...], ...] = ((31, 17),)
    dtypes: tuple[torch.dtype, ...] = (F32,)
    block_size: int | None = 64
    blocks: int = 1
    max_vector_dim: int = 100
    beta: float = 0.9
    missing: tuple[int, ...] = ()
    transposed: bool = False
    call: int = 1
    interval: int = 4
    accepted: int = 5
    max_grad_norm: float = inf
    groups: int = 1
    warm: bool = True
    seed: int = 0


class Problem:
    """The arguments of all operations by their schema's names."""

    def __init__(self, case: Case) -> None:
        self.case, self.draw = case, torch.Generator().manual_seed(case.seed)
        kinds = [case.dtypes[i % len(case.dtypes)] for i in range(len(case.shapes))]
        self.params = [self.tensor(s, t) for s, t in zip(case.shapes, kinds, strict=True)]
        self.dtype = state_dtype(self.params)
        cuts = [Cut(self.heights(s), case.block_size) for s in case.shapes]
        self.plan = Plan([p.shape for p in self.params], cuts, case.max_vector_dim)
        d, f = sum(p.numel() for p in self.params), self.plan.factors
        counters = torch.zeros(len(Counter), dtype=torch.int64)
        counters[Counter.ACCEPTED], counters[Counter.GRADIENTS] = case.accepted, case.warm
        count, groups = len(self.params), case.groups
        self.values = dict(
            params=self.params, grads=[], table=self.plan.table, grad_scale=None, found_inf=None,
            maximize=False, max_grad_norm=case.max_grad_norm, beta=case.beta, keep=0.95, eps=1e-8,
            correct_bias=True, call=case.call, interval=case.interval, lr_tensor=None,
            weight_decay_tensor=None, pending=1, inverse=False, counters=counters,
            group_sizes=[count * (k + 1) // groups - count * k // groups for k in range(groups)],
            lr=[0.1 + 0.02 * k for k in range(groups)],
            weight_decay=[0.01 * k for k in range(groups)],
            momentum=self.randn(d).to(self.dtype) if case.beta else None,
            accumulator=torch.zeros(d, dtype=self.dtype),
            factors=torch.zeros(f, dtype=self.dtype), bases=torch.zeros(f, dtype=self.dtype),
            square=torch.zeros(1, dtype=F64), projections=torch.zeros(len(Flag), dtype=F64),
            x=self.randn(d).to(self.dtype),
        )  # fmt: skip
        for place, side in self.plan.squares():
            self.square("bases", place, side).copy_(torch.eye(side))
        if case.warm:
            self.warm_up()
        self.new_gradient()

    def heights(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        blocks = self.case.blocks
        return (shape[0] // blocks,) * blocks if shape and shape[0] % blocks == 0 else shape[:1]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw, dtype=F64)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = self.randn(*shape).to(dtype)
        return x.mT.contiguous().mT if self.case.transposed and len(shape) > 1 else x

    def square(self, name: str, place: int, side: int) -> Tensor:
        return self.values[name][place : place + side**2].view(side, side)

    def warm_up(self) -> None:
        """Factors with eigenvalues that differ, bases that are near theirs, and v."""
        for place, side in self.plan.squares():
            q = torch.linalg.qr(self.randn(side, side))[0]
            spectrum = torch.logspace(0, 2, side, dtype=F64).flip(0)
            self.square("factors", place, side).copy_(q @ spectrum.diag() @ q.T)
            near = torch.linalg.qr(q + 0.03 * self.randn(side, side) / side**0.5)[0]
            self.square("bases", place, side).copy_(near)
        v = self["accumulator"]
        v.copy_(self.randn(v.numel()).square())
        self["square"].fill_(v.sum().item())

    def new_gradient(self, scale: float = 1.0) -> None:
        grads = [self.tensor(p.shape, F64).mul_(scale).to(p.dtype) for p in self.params]
        for i in self.case.missing:
            grads[i] = None
        self["grads"] = grads
        self.measure()

    def measure(self) -> None:
        """The flags of the gradient, as pass 1 leaves them."""
        g = gradient_vector(self["params"], self["grads"], self.dtype, self["grad_scale"], False)
        measure_gradient(g, self["found_inf"], self["projections"])

    def __getitem__(self, name: str):
        return self.values[name]

    def __setitem__(self, name: str, value) -> None:
        self.values[name] = value

    def copies(self) -> dict:
        return {name: copy(value) for name, value in self.values.items()}

    def everything(self) -> list[Tensor]:
        lists = [v if isinstance(v, list) else [v] for v in self.values.values()]
        return [bits(t) for tensors in lists for t in tensors if isinstance(t, Tensor)]


def run(name: str, values) -> None:
    getattr(torch.ops.adaqn, name)(*arguments(name, values))


def check(name: str, problem: Problem, bases: float | None = None) -> None:
    """Run operation ``name`` natively and by the reference, and compare every argument."""
    theirs = problem.copies()
    getattr(reference, name)(*arguments(name, theirs))
    run(name, problem.values)
    compare(problem, theirs, bases)


def compare(problem: Problem, theirs: dict, bases: float | None = None) -> None:
    limit = BASES[problem.dtype] if bases is None else bases
    rotated = ("bases", "accumulator", "x", "params")
    for key, value in problem.values.items():
        if isinstance(value, Tensor):
            assert_close(value, theirs[key], key, limit if key in rotated else SUMS[problem.dtype])
        elif key == "params":
            for p, q in zip(value, theirs[key], strict=True):
                assert_close(p, q, key, limit if p.dtype in BASES else 1e-2)


SHAPES = {
    "one": ((1, 1), (1,), ()),
    "two": ((2, 2), (2, 1), (1, 2), (2,)),
    "uneven": ((59, 60), (60, 59), (31, 100)),
    "even": ((64, 64), (128, 64)),
    "long": ((100, 3), (3, 130), (200, 67)),
    "vectors": ((31,), (100,), (101,), (20000,)),
    "orders": ((8, 3, 5, 5), (6, 1, 7), (0, 4), (5, 4)),
    "many": tuple((5 + i % 7, 3 + i % 11) for i in range(60)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_agrees_with_reference(name, block_size, shapes, dtype):
    check(name, Problem(Case(SHAPES[shapes], (dtype,), block_size)))
