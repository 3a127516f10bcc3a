"""Arguments for single operations, with guards around every buffer, and their check.

Kernels run on buffers that lie inside larger ones, full of a sentinel, and in which whatever an
operation may not read (free ring slots, unused gradients, the lower triangle of gram) is NaN.  The
reference runs on plain copies with zeros there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import torch
from by_group import apart, by_group
from torch import Tensor

from adaqn_cuda import ops, reference
from adaqn_cuda.state.layout import Counter, Flag, pair_slots, projections_size, state_dtype

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
GUARD = 64
RINGS = ("s_ring", "y_ring", "fisher")
#: Buffers of sums and coefficients, and how many words at their end are no part of the vector.
WORDS = {"projections": 3, "images": 1, "weights": 1, "column": 2, "moments": 0, "losses": 0}
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
        history_size, fisher_size, pairs, oldest, gradients: the rings and what is in them; sizes
            of zero for none.
        pair_dtype, fisher_dtype: ``None`` for that of the vectors.
        diagonal: whether there is an accumulator.
        groups: parameter groups.
        apart: whether their averages differ.
        missing: every how many parameters one has no gradient, or which have none; 0 for none.
        beta: of the momentum; 0 for none.
        accepted: steps before this one.
        correct_bias, max_grad_norm, max_direction, identity, explicit: as in the reference.
        damping: of the pair; 0 for none.
        image_size: of B0 s / s.
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
    apart: bool = False
    missing: int | tuple[int, ...] = 0
    beta: float = 0.0
    accepted: int = 6
    correct_bias: bool = False
    max_grad_norm: float = inf
    max_direction: float = inf
    identity: bool = False
    explicit: bool = False
    damping: float = 0.0
    image_size: float = 1.0
    seed: int = 0

    def but(self, **changes) -> Case:
        return replace(self, **changes)

    def standing(self) -> list[int]:
        """The parameters without a gradient."""
        count = len(self.numels)
        if isinstance(self.missing, tuple):
            return list(self.missing)
        return list(range(0, count, self.missing)) if self.missing else []

    def without_pairs(self) -> Case:
        return self.but(history_size=0, pairs=0, oldest=0, fisher_size=0, gradients=0)


class Problem:
    """The arguments of all operations by their schema's names, on ``device``."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device = case, device
        self.guards: list[tuple[Tensor, Tensor]] = []
        draw = torch.Generator(device).manual_seed(case.seed)
        options = dict(generator=draw, dtype=F64, device=device)
        self.draw = lambda *shape: torch.randn(*shape, **options)
        slots = pair_slots(case.history_size)
        stored = [(case.oldest + i) % slots for i in range(case.pairs)]
        self.unread = {
            "s_ring": [i for i in range(slots) if i not in stored],
            "fisher": list(range(case.gradients, case.fisher_size)),
        }
        self.unread["y_ring"] = self.unread["s_ring"]
        self.values: dict = {}
        self.values.update(self.parameters())
        self.values.update(self.rings(slots))
        self.values.update(self.vectors())
        self.values.update(self.words(slots, stored))
        self.values.update(self.options())
        self.values["saved"] = self["direction"]

    def parameters(self) -> dict:
        case = self.case
        kinds = [case.dtypes[i % len(case.dtypes)] for i in range(len(case.numels))]
        self.vector = state_dtype([torch.empty(0, dtype=kind) for kind in kinds])
        pairs = list(zip(case.numels, kinds, strict=True))
        params = [self.guarded(self.draw(n), kind) for n, kind in pairs]
        grads = [self.guarded(self.draw(n), kind) for n, kind in pairs]
        for i in case.standing():
            grads[i] = None
        return {"params": params, "grads": grads}

    def rings(self, slots: int) -> dict:
        case, d, rings = self.case, self.total(), {}
        for name, count in (("s_ring", slots), ("y_ring", slots), ("fisher", case.fisher_size)):
            dtype = (case.fisher_dtype if name == "fisher" else case.pair_dtype) or self.vector
            size = max(d, 1) ** (0 if name == "fisher" else -0.5)  # pairs of length about 1
            padding = -d % 8 if case.row_padding is None else case.row_padding
            rings[name] = self.guarded(size * self.draw(count, d), dtype, padding)
        return rings

    def vectors(self) -> dict:
        case, d = self.case, self.total()
        drawn = {name: self.draw(d) for name in ("iterate_sum", "anchor", "direction", "momentum")}
        drawn["accumulator"] = self.draw(d).square()
        s = drawn["iterate_sum"] / 3 - drawn["anchor"]
        drawn["image"] = case.image_size * s * (0.5 + self.draw(d).square())
        present = {
            "iterate_sum": case.history_size > 0,
            "momentum": case.beta > 0,
            "accumulator": case.diagonal,
            "image": case.damping > 0,
        }
        return {
            name: self.guarded(x, self.vector) if present.get(name, True) else None
            for name, x in drawn.items()
        }

    def words(self, slots: int, stored: list[int]) -> dict:
        case, draw = self.case, self.draw
        gram = torch.full((slots + 1, slots), torch.nan, dtype=F64, device=self.device)
        for i, row in enumerate(stored):
            gram[row, stored[i:]] = 0.2 * draw(case.pairs - i)
            gram[row, row] = 1.5 + 0.5 * draw(()).tanh()
            gram[slots, row] = 2.5
        flags = {Flag.NONFINITE: 0, Flag.NONZERO: 5}
        flags[Flag.SQUARE] = sum(g.double().square().sum() for g in self["grads"] if g is not None)
        projections = draw(projections_size(case.history_size))
        for flag, value in flags.items():
            projections[flag] = value
        images = draw(slots + 1)
        images[-1] = self.total()  # of the size of |p|^2
        counters = torch.zeros(len(Counter), dtype=torch.int64)
        counters[Counter.PAIRS], counters[Counter.OLDEST_PAIR] = case.pairs, case.oldest
        counters[Counter.GRADIENTS] = case.gradients
        counters[Counter.NEXT_GRADIENT] = case.gradients % max(case.fisher_size, 1)
        counters[Counter.ITERATES], counters[Counter.ANCHORED] = 3, 1
        counters[Counter.ACCEPTED] = case.accepted
        doubles = {
            "gram": gram,
            "losses": torch.tensor([1.0, torch.nan]),
            "moments": draw(slots),
            "projections": projections,
            "images": images,
            "weights": draw(case.fisher_size + 1),
            "column": draw(slots + 2).abs() + 1,
        }
        guarded = {name: self.guarded(values, F64) for name, values in doubles.items()}
        return {**guarded, "counters": self.guarded(counters, torch.int64)}

    def options(self) -> dict:
        case, count = self.case, len(self.case.numels)
        groups = case.groups
        copied = ("beta", "correct_bias", "max_grad_norm", "max_direction", "identity", "explicit")
        return {
            **{name: getattr(case, name) for name in (*copied, "damping")},
            **dict(keep=0.9, add=0.1, eps=1e-3, fisher_size=max(case.fisher_size, 1)),
            **(apart(groups) if case.apart else {}),
            "group_sizes": [count * (k + 1) // groups - count * k // groups for k in range(groups)],
            "lr": [0.1 + 0.01 * k for k in range(groups)],
            "weight_decay": [0.02 * (k % 3) for k in range(groups)],
            **dict(lr_tensor=None, weight_decay_tensor=None, monitored_loss=None),
            **dict(grad_scale=None, found_inf=None, maximize=False),
            **dict(min_curvature=1e-4, max_increase=1.01, max_growth=1.05),
        }

    def __getitem__(self, name: str):
        return self.values[name]

    def __setitem__(self, name: str, value) -> None:
        self.values[name] = value.to(self.device) if isinstance(value, Tensor) else value

    def guarded(self, values: Tensor, dtype: torch.dtype, padding: int = 0) -> Tensor:
        """``values`` in the midst of a larger buffer of sentinels."""
        rows, columns = values.shape if values.dim() == 2 else (1, values.numel())
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
        names = (*RINGS, "iterate_sum", "anchor", "accumulator", "momentum", "gram", "moments")
        kept = [self[name] for name in names if self[name] is not None]
        return [bits(t) for t in [*self["params"], *kept]]

    def at_rest(self) -> list[Tensor]:
        """Bits of all that a step must leave alone where there is no gradient."""
        vectors = [self[name] for name in ("momentum", "accumulator") if self[name] is not None]
        parts = [self["params"], *(x.split(list(self.case.numels)) for x in vectors)]
        return [bits(part[i]) for part in parts for i in self.case.standing()]

    def everything(self) -> list[Tensor]:
        """The bits of every tensor."""
        lists = [v if isinstance(v, list) else [v] for v in self.values.values()]
        return [bits(t) for tensors in lists for t in tensors if isinstance(t, Tensor)]

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
    known = by_group(values)
    return [known[argument.name] for argument in schema.arguments]


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


def assert_words_close(mine: Tensor, theirs: Tensor, what: str, tolerance: float) -> None:
    """A vector by its norm; the words at its end, which may be much larger, one by one."""
    end = len(mine) - WORDS[what]
    assert_close(mine[:end], theirs[:end], what, tolerance)
    for i in range(end, len(mine)):
        assert_close(mine[i : i + 1], theirs[i : i + 1], f"{what}[{i}]", tolerance)


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
    words = 4 * TOLERANCE[problem.vector]  # sums of products of either sign
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
            if key in WORDS:
                assert_words_close(value, theirs[key], key, words)
            else:
                assert_close(value, theirs[key], key)
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            for dtype in TOLERANCE:
                both = [(a, b) for a, b in zip(value, theirs[key], strict=True) if is_a(a, dtype)]
                if both:
                    assert_close(*map(torch.cat, zip(*both, strict=True)), f"{key} of {dtype}")
    assert_close(problem["gram"].nan_to_num(0.0), theirs["gram"], "gram", words)
