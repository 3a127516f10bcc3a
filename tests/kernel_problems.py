"""Arguments for single operations, with guards around every buffer, and their check.

Kernels run on buffers that lie inside larger ones, full of a sentinel, and in which whatever an
operation may not read (free ring slots, unused gradients, the lower triangle of gram) is NaN.  The
reference runs on plain copies with zeros there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaqn_cuda import ops, reference
from adaqn_cuda.layout import Counter, Flag, pair_slots, projections_size, state_dtype

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
GUARD = 64
RINGS = ("s_ring", "y_ring", "fisher")
#: Largest relative error of a buffer, by dtype; narrow ones may round a tie the other way.
TOLERANCE = {F32: 2e-5, F64: 1e-12, BF16: 2e-3, F16: 3e-4}


@dataclass(frozen=True)
class Case:
    """What a problem looks like.

    Args:
        numels: sizes of the parameters.
        dtypes: of the parameters, cycled through.
        offset: elements between a 16-byte boundary and the beginning of every buffer.
        row_padding: elements between the rows of a ring; ``None`` aligns the rows.
        history_size, fisher_size, pairs, oldest, gradients: the rings and what is in them.
        pair_dtype, fisher_dtype: ``None`` for that of the vectors.
        diagonal: whether there is an accumulator.
        groups: parameter groups.
        missing: every how many parameters one has no gradient; 0 for none.
    """

    numels: tuple[int, ...] = (4097,)
    dtypes: tuple[torch.dtype, ...] = (F32,)
    offset: int = 0
    row_padding: int | None = None
    history_size: int = 5
    pairs: int = 3
    oldest: int = 4
    fisher_size: int = 6
    gradients: int = 4
    pair_dtype: torch.dtype | None = None
    fisher_dtype: torch.dtype | None = None
    diagonal: bool = True
    groups: int = 1
    missing: int = 0
    seed: int = 0

    def but(self, **changes) -> Case:
        return replace(self, **changes)


class Problem:
    """The arguments of all operations by their schema's names, on ``device``."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device = case, device
        self.guards: list[tuple[Tensor, Tensor]] = []
        draw = torch.Generator(device).manual_seed(case.seed)
        options = dict(generator=draw, dtype=F64, device=device)
        self.draw = lambda *shape: torch.randn(*shape, **options)
        d, slots = sum(case.numels), pair_slots(case.history_size)
        kinds = [case.dtypes[i % len(case.dtypes)] for i in range(len(case.numels))]
        vector = state_dtype([torch.empty(0, dtype=kind) for kind in kinds])
        self.vector = vector
        v: dict = {}
        pairs = list(zip(case.numels, kinds, strict=True))
        v["params"] = [self.guarded(self.draw(n), kind) for n, kind in pairs]
        v["grads"] = [self.guarded(self.draw(n), kind) for n, kind in pairs]
        if case.missing:
            v["grads"][:: case.missing] = [None] * len(v["grads"][:: case.missing])
        stored = [(case.oldest + i) % slots for i in range(case.pairs)]
        self.unread = {
            "s_ring": [i for i in range(slots) if i not in stored],
            "fisher": list(range(case.gradients, case.fisher_size)),
        }
        self.unread["y_ring"] = self.unread["s_ring"]
        rows = {"s_ring": slots, "y_ring": slots, "fisher": case.fisher_size}
        for name, count in rows.items():
            dtype = (case.fisher_dtype if name == "fisher" else case.pair_dtype) or vector
            size = max(d, 1) ** (0 if name == "fisher" else -0.5)  # pairs of length about 1
            padding = -d % 8 if case.row_padding is None else case.row_padding
            v[name] = self.guarded(size * self.draw(count, d), dtype, padding)
        for name in ("iterate_sum", "anchor", "direction"):
            v[name] = self.guarded(self.draw(d), vector)
        v["accumulator"] = self.guarded(self.draw(d).square(), vector) if case.diagonal else None
        gram = torch.full((slots + 1, slots), torch.nan, dtype=F64, device=device)
        for i, row in enumerate(stored):
            gram[row, stored[i:]] = 0.2 * self.draw(case.pairs - i)
            gram[row, row] = 1.5 + torch.rand((), **options)
            gram[slots, row] = 2.5
        v["gram"] = self.guarded(gram, F64)
        v["losses"] = self.guarded(torch.tensor([1.0, torch.nan]), F64)
        words = self.draw(projections_size(case.history_size))
        words[Flag.NONFINITE], words[Flag.NONZERO] = 0, 5
        v["projections"] = self.guarded(words, F64)
        v["images"] = self.guarded(self.draw(slots), F64)
        v["weights"] = self.guarded(self.draw(case.fisher_size), F64)
        v["column"] = self.guarded(self.draw(slots + 1).abs() + 1, F64)
        counters = torch.zeros(len(Counter), dtype=torch.int64)
        counters[Counter.PAIRS], counters[Counter.OLDEST_PAIR] = case.pairs, case.oldest
        counters[Counter.GRADIENTS] = case.gradients
        counters[Counter.NEXT_GRADIENT] = case.gradients % case.fisher_size
        counters[Counter.ITERATES], counters[Counter.ANCHORED] = 3, 1
        v["counters"] = self.guarded(counters, torch.int64)
        v.update(saved=v["direction"], grad_scale=None, found_inf=None, maximize=False)
        v.update(keep=0.9, add=0.1, eps=1e-3, fisher_size=case.fisher_size)
        count, groups = len(case.numels), case.groups
        v["group_sizes"] = [count * (k + 1) // groups - count * k // groups for k in range(groups)]
        v["lr"] = [0.1 + 0.01 * k for k in range(groups)]
        v["weight_decay"] = [0.02 * (k % 3) for k in range(groups)]
        v.update(lr_tensor=None, weight_decay_tensor=None, monitored_loss=None)
        v.update(min_curvature=1e-4, max_increase=1.01)
        self.values = v

    def __getitem__(self, name: str):
        return self.values[name]

    def __setitem__(self, name: str, value) -> None:
        self.values[name] = value.to(self.device) if isinstance(value, Tensor) else value

    def guarded(self, values: Tensor, dtype: torch.dtype, padding: int = 0) -> Tensor:
        """``values`` in the midst of a larger buffer of sentinels."""
        rows = values.shape[0] if values.dim() == 2 else 1
        columns = values.numel() // rows
        start = GUARD + self.case.offset
        stride = columns + padding
        whole = torch.full((start + rows * stride + GUARD,), 77, dtype=dtype, device=self.device)
        inner = whole[start : start + rows * stride].view(rows, stride)[:, :columns]
        inner.copy_(values.reshape(rows, columns))
        guard = torch.ones(whole.shape, dtype=torch.bool, device=self.device)
        guard[start : start + rows * stride].view(rows, stride)[:, :columns] = False
        self.guards.append((whole, guard))
        return inner if values.dim() == 2 else inner.reshape(values.shape) if not columns else (
            inner[0]
        )  # fmt: skip

    def assert_guards(self) -> None:
        for whole, guard in self.guards:
            assert (whole[guard] == 77).all(), "a write out of bounds"

    def poison(self) -> None:
        """NaN in every ring row that holds nothing."""
        for name, rows in self.unread.items():
            self[name][rows] = torch.nan

    def for_reference(self) -> dict:
        """Plain copies, with zeros in every ring row that holds nothing."""
        copies = {name: copy(value) for name, value in self.values.items()}
        for name, rows in self.unread.items():
            copies[name][rows] = 0
        copies["gram"].nan_to_num_(0.0)
        copies["saved"] = copies["direction"]
        return copies

    def persistent(self) -> list[Tensor]:
        """Copies of all that a dropped step must leave alone, to the bit."""
        names = ("s_ring", "y_ring", "fisher", "iterate_sum", "anchor", "accumulator", "gram")
        kept = [self[name] for name in names if self[name] is not None]
        return [bits(t) for t in [*self["params"], *kept]]

    def total(self) -> int:
        return sum(self.case.numels)


def copy(value):
    if isinstance(value, Tensor):
        return value.clone()
    return [copy(x) for x in value] if isinstance(value, list) else value


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals NaN."""
    return tensor.contiguous().view(-1).view(torch.uint8).clone()


def arguments(name: str, values) -> list:
    schema = getattr(torch.ops.adaqn, name).default._schema
    assert name in ops.SCHEMAS
    return [values[argument.name] for argument in schema.arguments]


def run(namespace, name: str, problem: Problem) -> None:
    getattr(namespace, name)(*arguments(name, problem.values))
    problem.assert_guards()


def assert_close(mine: Tensor, theirs: Tensor, what: str, tolerance: float | None = None) -> None:
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    a, b = mine.double(), theirs.double()
    assert torch.equal(a.isnan(), b.isnan()), f"{what}: NaN"
    a, b = a.nan_to_num(), b.nan_to_num()
    error, size = (a - b).norm(), b.norm()
    limit = TOLERANCE.get(mine.dtype, 0) if tolerance is None else tolerance
    assert error <= limit * (size + 1e-30), f"{what}: relative error {error / size:.1e}"


def is_a(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    return tensor is not None and tensor.dtype == dtype


def check(namespace, name: str, problem: Problem, unwritten: tuple[str, ...] = ()) -> None:
    """Run operation ``name`` by ``namespace`` and by the reference, and compare every argument.

    Args:
        namespace: has the operations as attributes.
        name: an operation.
        problem: its arguments; changed by the run.
        unwritten: scratch that the reference writes and a kernel need not.
    """
    theirs = problem.for_reference()
    getattr(reference, name)(*arguments(name, theirs))
    problem.poison()
    poisoned = {ring: problem[ring].clone() for ring in RINGS}
    run(namespace, name, problem)
    words = TOLERANCE[problem.vector]  # sums of products of vectors
    for key, value in problem.values.items():
        if key in unwritten or value is None or key in ("gram", "saved"):
            continue
        if key in RINGS:
            for row in range(len(value)):
                untouched = torch.equal(bits(value[row]), bits(poisoned[key][row]))
                if row in problem.unread[key] and untouched:
                    assert not theirs[key][row].any(), f"{key}[{row}]: not written"
                else:
                    assert_close(value[row], theirs[key][row], f"{key}[{row}]")
        elif isinstance(value, Tensor):
            is_word = key in ("projections", "images", "weights", "column", "losses")
            assert_close(value, theirs[key], key, words if is_word else None)
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            for dtype in TOLERANCE:
                both = [(a, b) for a, b in zip(value, theirs[key], strict=True) if is_a(a, dtype)]
                if both:
                    assert_close(*map(torch.cat, zip(*both, strict=True)), f"{key} of {dtype}")
    assert_close(problem["gram"].nan_to_num(0.0), theirs["gram"], "gram", words)
