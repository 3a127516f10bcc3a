"""Arguments for every operation: a plausible state of any shape, dtype and history."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf

import torch
from by_group import by_group
from torch import Tensor

from adaqn_cuda.state.arena import RINGS, ROW_BYTES, row_stride
from adaqn_cuda.state.layout import Counter, pair_slots, projections_size, state_dtype

F64 = torch.float64


def spaced(matrix: Tensor) -> Tensor:
    """The same, with NaN between the rows, where nobody may read."""
    rows, columns = matrix.shape
    stride = row_stride(columns, matrix.dtype) + ROW_BYTES // matrix.dtype.itemsize
    memory = torch.full((rows, stride), torch.nan, dtype=matrix.dtype)
    memory[:, :columns] = matrix
    return memory[:, :columns]


@dataclass
class State:
    """Parameters, gradients and the buffers of the arena, with ``pairs`` pairs from ``oldest`` on.

    The pairs are of a diagonal matrix, so that their products are positive.  With a history of
    zero, there are neither pairs nor gradients.  There is a diagonal unless ``scalar``, momentum if
    ``averaged``, and the candidate's image under the initial matrix if ``damped``.
    """

    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype] = field(default_factory=lambda: [torch.float32])
    history_size: int = 4
    fisher_size: int = 3
    pairs: int = 3
    oldest: int = 0
    gradients: int = 2
    scalar: bool = False
    averaged: bool = False
    damped: bool = False
    history_dtype: torch.dtype | None = None
    fisher_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        kinds = [self.dtypes[i % len(self.dtypes)] for i in range(len(self.shapes))]
        self.params = [self.randn(*s).to(t) for s, t in zip(self.shapes, kinds, strict=True)]
        self.grads = [self.randn(*s).to(t) for s, t in zip(self.shapes, kinds, strict=True)]
        self.dtype = state_dtype(self.params)
        d, slots = sum(p.numel() for p in self.params), pair_slots(self.history_size)
        self.numel, self.slots = d, slots
        curvature = 0.5 + torch.rand(d, generator=self.generator)
        s = self.randn(slots, d)
        self.s_ring = spaced(s.to(self.history_dtype or self.dtype))
        self.y_ring = spaced((s * curvature).to(self.history_dtype or self.dtype))
        self.gram = torch.zeros(slots + 1, slots, dtype=F64)
        self.gram[:slots] = self.s_ring.double() @ self.y_ring.double().T
        self.gram[slots] = self.y_ring.double().square().sum(1)
        if not slots:
            self.fisher_size = 1  # as if it had one row
        self.fisher_rows = self.fisher_size if slots else 0
        self.fisher = spaced(self.randn(self.fisher_rows, d).to(self.fisher_dtype or self.dtype))
        self.accumulator = None if self.scalar else self.vector().abs()
        self.momentum = self.vector() if self.averaged else None
        self.image = self.vector() if self.damped else None
        self.moments = torch.zeros(slots, dtype=F64)
        if self.averaged:
            stored = self.rows()
            self.moments[stored] = self.s_ring[stored].double() @ self.momentum.double()
        self.iterate_sum, self.anchor = self.vector(), self.vector()
        self.direction = torch.zeros(d, dtype=self.dtype)
        self.projections = torch.zeros(projections_size(self.history_size), dtype=F64)
        self.images = torch.zeros(slots + 1, dtype=F64)
        self.weights = torch.randn(self.fisher_rows + 1, generator=self.generator, dtype=F64)
        self.weights[self.gradients : -1] = 0.0
        self.column = torch.rand(slots + 2, generator=self.generator, dtype=F64)
        self.losses = torch.tensor([1.0, 0.5], dtype=F64)
        self.counters = torch.zeros(len(Counter), dtype=torch.int64)
        self.counters[Counter.PAIRS] = self.pairs
        self.counters[Counter.OLDEST_PAIR] = self.oldest
        self.counters[Counter.GRADIENTS] = self.gradients
        self.counters[Counter.NEXT_GRADIENT] = self.gradients % self.fisher_size
        self.counters[Counter.ITERATES] = 3
        self.counters[Counter.ANCHORED] = 1
        self.counters[Counter.ACCEPTED] = 5

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def vector(self) -> Tensor:
        return self.randn(self.numel).to(self.dtype)

    def clone(self) -> State:
        other = replace(self, shapes=[])
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                value = spaced(value) if name in RINGS else value.clone()
            elif name in ("params", "grads"):
                value = [None if t is None else t.clone() for t in value]
            setattr(other, name, value)
        return other

    def without_history(self) -> State:
        """Another state of the same kind, without pairs."""
        return replace(self, history_size=0, pairs=0, oldest=0, gradients=1)

    def rows(self) -> list[int]:
        """Ring slots of the pairs, oldest first."""
        return [(self.oldest + age) % self.slots for age in range(self.pairs)]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that an operation may write, by name."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {**own, **{f"params[{i}]": p for i, p in enumerate(self.params)}}

    def arguments(self, name: str, **changes) -> tuple:
        """Positional arguments of the operation ``name``."""
        options = {
            "grad_scale": None, "found_inf": None, "maximize": False, "max_grad_norm": inf,
            "beta": 0.9 if self.averaged else 0.0, "keep": 0.9, "add": 0.1, "eps": 1e-8,
            "correct_bias": False, "identity": False, "max_direction": inf,
            "group_sizes": [len(self.params)], "lr": [0.1], "weight_decay": [0.01],
            "lr_tensor": None, "weight_decay_tensor": None,
            "saved": self.direction, "explicit": False,
            "damping": 0.2, "monitored_loss": torch.tensor(1.0, dtype=F64), "min_curvature": 1e-4,
            "max_increase": 1.01, "max_growth": inf,
        }  # fmt: skip
        schema = getattr(torch.ops.adaqn, name).default._schema
        known = by_group({**vars(self), **options, **changes})
        if name == "diagonal_step":
            known["projections"] = known["projections"][self.slots :]
        return tuple(known[argument.name] for argument in schema.arguments)


def native(name: str, state: State, **changes) -> State:
    """``state`` after the operation's kernel."""
    getattr(torch.ops.adaqn, name).default(*state.arguments(name, **changes))
    return state
