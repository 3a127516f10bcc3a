"""The Kronecker operations of the native library against the reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from math import inf

import pytest
import torch
from by_group import apart
from kernel_problems import BF16, F16, F32, F64, arguments, assert_close, bits, copy
from torch import Tensor

from adaqn_cuda import native, reference
from adaqn_cuda.reference.acceptance import measure_gradient
from adaqn_cuda.reference.flat import gradient_vector
from adaqn_cuda.state.layout import Counter, Flag, state_dtype
from adaqn_cuda.state.plan import Column, Cut, Plan

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
        apart: whether their averages differ.
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
    apart: bool = False
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
            x=self.randn(d).to(self.dtype), **(apart(groups) if case.apart else {}),
        )  # fmt: skip
        for place, side in self.plan.squares():
            self.square("bases", place, side).copy_(torch.eye(side))
        if case.warm:
            self.warm_up()
        self.new_gradient()

    def heights(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        blocks, rows = self.case.blocks, shape[0] if shape else 1
        return (rows // blocks,) * blocks if rows % blocks == 0 else (rows,)

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


def test_the_library_serves_the_operations():
    for name in OPERATIONS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"adaqn::{name}", "CPU")


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


LSTM = ((96, 65), (96, 24), (96,), (65, 24))
CASES = {
    "no momentum": Case(LSTM, blocks=4, beta=0.0),
    "no factors": Case((*LSTM, (300, 200)), block_size=None),
    "narrow": Case(LSTM, (BF16, F16, F32), blocks=4),
    "mixed": Case(LSTM, (F64, BF16, F32), 32, groups=3),
    "apart": Case((*LSTM, *LSTM), (F64, BF16, F32), 32, groups=5, apart=True, missing=(2,)),
    "transposed": Case((*LSTM, (4, 5, 6)), (F32, BF16), 20, transposed=True),
    "missing": Case(LSTM, (F32, F64), 32, missing=(0, 3)),
    "all missing": Case(LSTM, missing=(0, 1, 2, 3)),
    "clipped": Case(LSTM, (F64,), max_grad_norm=0.5, groups=2),
    "later": Case(LSTM, (F64,), 16, call=21, interval=3),
    "nothing due": Case(LSTM, (F32,), 128, call=12, interval=1000),
    "at once": Case(LSTM, (F32,), 24, call=12, interval=1),
    "empty": Case(((0,), (0, 3))),
    "first": Case(LSTM, (F64,), accepted=0),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("case", CASES)
def test_agrees_in_every_case(name, case):
    check(name, Problem(CASES[case]))


OPTIONS = {
    "maximize": {"maximize": True},
    "scaled": {"grad_scale": torch.tensor(1024.0)},
    "no bias correction": {"correct_bias": False},
    "large eps": {"eps": 0.3},
    "inverse": {"inverse": True},
    "counted": {"pending": 0},
    "inverse and counted": {"inverse": True, "pending": 0},
    "rates in tensors": {"lr_tensor": torch.tensor([0.3]), "weight_decay_tensor": torch.ones(1)},
    "an outlier": {"square": torch.full((1,), 1e-9, dtype=F64)},
    "a scaled outlier": {
        "square": torch.full((1,), 1e-9, dtype=F64), "grad_scale": torch.tensor(0.7),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_agrees_with_every_option(name, option, dtype):
    problem = Problem(Case(LSTM, (dtype,), blocks=2))
    problem.values.update({key: copy(value) for key, value in OPTIONS[option].items()})
    problem.measure()
    check(name, problem)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e17])
@pytest.mark.parametrize("name", OPERATIONS)
def test_agrees_with_gradients_of_any_size(name, scale):
    """Squares of the largest are near the end of float32; those of the smallest vanish."""
    problem = Problem(Case(((60, 31), (40,)), max_grad_norm=2.0**62))
    problem.new_gradient(scale)
    for key in ("accumulator", "factors", "square"):
        problem[key] = problem[key] * scale**2
    check(name, problem)
    assert all(t.isfinite().all() for t in problem["params"])


def test_the_inverse_is_one():
    problem = Problem(Case(SHAPES["uneven"], (F64,), 32))
    for place, side in problem.plan.squares():  # to float64 orthogonal
        q = problem.square("bases", place, side)
        q.copy_(torch.linalg.qr(q)[0])
    before = problem["x"].clone()
    run("kronecker_apply", problem.values)
    assert (problem["x"] - before).norm() > 0.1 * before.norm()
    problem["inverse"] = True
    run("kronecker_apply", problem.values)
    assert_close(problem["x"], before, "x", 1e-10)


# --------------------------------------------------------------------- from nothing, and on


@pytest.mark.parametrize("block_size", [8, 32, 100])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_agrees_call_by_call_from_the_start(block_size, beta):
    """Where eigenvalues coincide, bases may differ: H0 is compared, on what gradients span."""
    shapes = ((40, 7), (33,), (12, 50), (3, 3))
    case = Case(shapes, (F64,), block_size, beta=beta, interval=3, accepted=0, warm=False)
    problem = Problem(case)
    problem["momentum"] = problem["momentum"].zero_() if beta else None
    for call in range(1, 16):
        problem["call"] = call
        problem.new_gradient()
        theirs = problem.copies()
        reference.kronecker_step(*arguments("kronecker_step", theirs))
        run("kronecker_step", problem.values)
        assert_close(problem["factors"], theirs["factors"], "factors")
        assert_close(problem["square"], theirs["square"], "square")
        assert torch.equal(problem["counters"], theirs["counters"])
        moved = torch.cat([p.flatten() for p in problem["params"]])
        assert_close(moved, torch.cat([p.flatten() for p in theirs["params"]]), "params", 1e-6)
        for place, side in problem.plan.squares():
            q = problem.square("bases", place, side)
            assert_close(q.T @ q, torch.eye(side, dtype=F64), "Q^T Q", 1e-7)


def test_bases_become_eigenvectors():
    problem = Problem(Case(((70, 45),), (F64,), warm=False, accepted=0))
    problem.warm_up()
    for place, side in problem.plan.squares():
        problem.square("bases", place, side).copy_(torch.eye(side))
    for call in range(2, 400):
        problem["call"], problem["interval"] = 2 * (call // 2) + 11, 1  # half of the factors stand
        run("kronecker_accumulate", problem.values)
    for place, side in problem.plan.squares():
        q = problem.square("bases", place, side)
        rotated = q.T @ problem.square("factors", place, side) @ q
        assert (rotated - rotated.diagonal().diag()).norm() < 1e-3 * rotated.norm()
        assert (rotated.diagonal().diff() < 1e-3 * rotated[0, 0]).all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_zero_factor_keeps_its_basis(dtype):
    problem = Problem(Case(((20, 9), (5,)), (dtype,)))
    problem["factors"].zero_()
    for g in problem["grads"]:
        g.zero_()
    problem.measure()
    before = problem["bases"].clone()
    check("kronecker_step", problem)
    assert torch.equal(problem["bases"], before)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 0.0])
def test_a_factor_that_cannot_be_decomposed_keeps_its_columns(value):
    """With an infinite, missing or indefinite entry, columns may at most change places."""
    problem = Problem(Case(((20, 1),), (F64,), call=12, interval=1))
    place, side = next(problem.plan.squares())
    if value == 0:
        factor = -problem.square("factors", place, side)
        factor.diagonal().add_(1e-9 - factor.trace() / side)
        problem.square("factors", place, side).copy_(factor)
    problem.square("factors", place, side)[3, 4] += value
    before = problem.square("bases", place, side).clone()
    run("kronecker_accumulate", problem.values)
    after = problem.square("bases", place, side)
    if value != 0:
        assert torch.equal(after.sort(1).values, before.sort(1).values)
    assert after.isfinite().all()


# --------------------------------------------------------------------- what stands still


def test_a_dropped_step_changes_nothing_that_lasts():
    for changes in ({"found_inf": torch.ones(1)}, {"grad_scale": torch.tensor(0.0)}):
        for name in ("kronecker_step", "kronecker_accumulate"):
            problem = Problem(Case(LSTM, (F32,)))
            problem.values.update(changes)
            problem.measure()
            check(name, problem)
            before, counters = problem.copies(), problem["counters"].tolist()
            run(name, problem.values)
            for key in ("momentum", "accumulator", "factors", "bases", "square"):
                assert torch.equal(problem[key], before[key]), key
            for p, q in zip(problem["params"], before["params"], strict=True):
                assert torch.equal(p, q)
            skipped = problem["counters"].tolist()
            assert skipped[Counter.ACCEPTED] == counters[Counter.ACCEPTED]


def test_a_zero_gradient_before_any_other_changes_nothing():
    problem = Problem(Case(LSTM, warm=False, accepted=0))
    problem.new_gradient(0.0)
    before = [bits(t) for t in [*problem["params"], problem["bases"], problem["counters"]]]
    run("kronecker_step", problem.values)
    after = [bits(t) for t in [*problem["params"], problem["bases"], problem["counters"]]]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("name", ["kronecker_step", "kronecker_accumulate"])
def test_what_has_no_gradient_keeps_every_bit(name):
    problem = Problem(Case(LSTM, (F32, BF16), 32, missing=(1, 2)))
    sizes = [p.numel() for p in problem.params]

    def at_rest() -> list[Tensor]:
        kept = [problem["params"][i] for i in (1, 2)]
        for key in ("accumulator", "momentum"):
            parts = problem[key].split(sizes)
            kept += [parts[1], parts[2]]
        for key in ("factors", "bases"):
            squares = [problem.square(key, *s) for s in problem.plan.squares()]
            for i in (1, 2):
                kept += squares[problem_span(problem, i)]
        return [bits(t) for t in kept]

    before = at_rest()
    run(name, problem.values)
    assert all(map(torch.equal, before, at_rest()))


def problem_span(problem: Problem, index: int) -> slice:
    """Which of all squares are those of a parameter."""
    first, last = problem.plan.spans[index].start, problem.plan.spans[index].stop
    places = [place for place, _ in problem.plan.squares()]
    return slice(sum(p < first for p in places), sum(p < last for p in places))


# --------------------------------------------------------------------- threads, memory, arguments


@pytest.mark.parametrize("dtype", [F32, F64])
def test_threads_do_not_change_a_bit(dtype):
    threads, results = torch.get_num_threads(), []
    problem = Problem(Case((*LSTM, (50_000,), (130, 100)), (dtype,), 32))
    start = problem.copies()
    try:
        for count in (1, 2, 3, 5, 1):
            torch.set_num_threads(count)
            problem.values = {name: copy(value) for name, value in start.items()}
            for name in OPERATIONS:
                run(name, problem.values)
            results.append(problem.everything())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_written_out_of_bounds(name):
    problem = Problem(Case(((33, 31), (17,), (5, 2)), (F32,), 16))
    guards = []
    for key in ("momentum", "accumulator", "factors", "bases", "x"):
        whole = torch.full((problem[key].numel() + 128,), 77.0)
        whole[64:-64] = problem[key]
        problem[key] = whole[64:-64]
        guards.append(whole)
    run(name, problem.values)
    for whole in guards:
        assert (whole[:64] == 77).all() and (whole[-64:] == 77).all()


def broken(row: int, column: Column, value: int):
    """The table with one entry changed."""

    def change(problem: Problem) -> dict:
        table = problem["table"].clone()
        table[row, column] = value
        return {"table": table}

    return change


def given(**changes):
    return lambda problem: changes


TABLES = {
    "table: expected a matrix": given(table=torch.zeros(9, dtype=torch.int64)),
    "table: expected shape (2, 9), got (2, 8)": given(table=torch.zeros(2, 8, dtype=torch.int64)),
    "table: expected dtype int64": given(table=torch.zeros(2, 9)),
    "table: expected a contiguous": given(table=torch.zeros(9, 2, dtype=torch.int64).T),
    "table: expected matrices of 125 elements, got 0": given(
        table=torch.zeros(0, 9, dtype=torch.int64)
    ),
    "table[0]: start: expected 0..0, got 1": broken(0, Column.START, 1),
    "table[1]: start: expected 120..120, got -1": broken(1, Column.START, -1),
    "table[0]: rows: expected 1..125, got 0": broken(0, Column.ROWS, 0),
    "table[0]: rows: expected 1..125, got 4611686018427387904": broken(0, Column.ROWS, 2**62),
    "table[0]: columns: expected 1..10, got 11": broken(0, Column.COLUMNS, 11),
    "table[0]: columns: expected 1..10, got -3": broken(0, Column.COLUMNS, -3),
    "table[0]: row pieces: expected 1..12, got 0": broken(0, Column.ROW_PIECES, 0),
    "table[0]: row pieces: expected 1..12, got 13": broken(0, Column.ROW_PIECES, 13),
    "table[0]: column pieces: expected 1..10, got 11": broken(0, Column.COLUMN_PIECES, 11),
    f"table[0]: left: expected 0..{2**60}, got -2": broken(0, Column.LEFT, -2),
    f"table[0]: right: expected 72..{2**60}, got 0": broken(0, Column.RIGHT, 0),
    f"table[1]: left: expected 122..{2**60}, got {2**63 - 1}": broken(1, Column.LEFT, 2**63 - 1),
    "bases: expected shape (148), got (147)": broken(1, Column.LEFT, 123),
    f"table[0]: turn: expected 0..{2**31 - 1}, got -1": broken(0, Column.TURN, -1),
}
BAD = {
    "call: expected at least 1, got 0": given(call=0),
    "interval: expected at least 1, got 0": given(interval=0),
    "table[0]: parameter: expected 0..0, got 1": broken(0, Column.PARAM, 1),
    "table[1]: parameter: expected 1..1, got 2": broken(1, Column.PARAM, 2),
    "factors: expected shape (147)": given(factors=torch.zeros(146)),
    "factors: expected dtype float32": given(factors=torch.zeros(147, dtype=F64)),
    "bases: expected shape (147)": given(bases=torch.zeros(146)),
    "square: expected shape (1)": given(square=torch.zeros(2, dtype=F64)),
    "square: expected dtype float64": given(square=torch.zeros(1)),
    "accumulator: expected shape (125)": given(accumulator=torch.zeros(124)),
    "accumulator: expected dtype float32 or float64": given(accumulator=torch.zeros(125).to(BF16)),
    "grads: expected one for each": given(grads=[]),
    "counters: expected shape": given(counters=torch.zeros(3, dtype=torch.int64)),
}
BAD_BY_OPERATION = {
    "kronecker_step": {
        **BAD,
        "momentum: expected shape (125)": given(momentum=torch.zeros(124)),
        "projections: expected shape (3)": given(projections=torch.zeros(4, dtype=F64)),
        "found_inf: expected 1": given(found_inf=torch.zeros(2)),
        "lr: expected 1 numbers": given(lr=[0.1, 0.2]),
        "betas: expected 1 numbers": given(betas=[]),
        "adds: expected 1 numbers": given(adds=[0.1, 0.2]),
        "epsilons: expected 1 numbers": given(epsilons=[1e-8, 1e-8]),
    },
    "kronecker_accumulate": {
        **BAD,
        "projections: expected at least 3": given(projections=torch.zeros(2, dtype=F64)),
        "keeps: expected 1 numbers": given(keeps=[0.9, 0.9]),
    },
    "kronecker_apply": {
        "pending: expected 0 or 1, got 2": given(pending=2),
        "table[1]: parameter: expected 0..0, got 1": given(group_sizes=[1]),
        "keeps: expected 1 numbers": given(keeps=[0.9, 0.9]),
        "x: expected dtype": given(x=torch.zeros(125, dtype=torch.int64)),
        "accumulator: expected shape (125)": given(accumulator=torch.zeros(124)),
        "bases: expected dtype float32": given(bases=torch.zeros(147, dtype=F64)),
        "counters: expected shape": given(counters=torch.zeros(3, dtype=torch.int64)),
    },
}


@pytest.mark.parametrize(
    ("name", "message", "changes"),
    [(name, *bad) for name in OPERATIONS for bad in TABLES.items() if "bases" not in bad[0]]
    + [(name, *bad) for name, bads in BAD_BY_OPERATION.items() for bad in bads.items()],
)
def test_bad_arguments_are_named_before_anything_is_written(name, message, changes):
    problem = Problem(Case(((12, 10), (5,)), (F32,), 6))
    problem.values.update(changes(problem))
    before = problem.everything()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run(name, problem.values)
    assert all(map(torch.equal, before, problem.everything()))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("case", ["narrow", "mixed", "missing", "no momentum", "no factors"])
def test_opcheck(name, case):
    values = Problem(CASES[case]).values
    torch.library.opcheck(getattr(torch.ops.adaqn, name).default, arguments(name, values))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets(isa):
    """The same tests with narrower vectors; where a machine lacks them, with what it has."""
    chosen = ("-k", "uneven-64 or long-128 or cannot or bounds")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen, __file__],
        env={**os.environ, "ADAQN_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
