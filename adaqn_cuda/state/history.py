"""The flat state of :class:`LBFGS`: its pairs, which grow in number, and its vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.sharding import Shards
from ..watch import check_numbers
from .arena import FACTORED, own_part, real_shape, ring
from .filing import Filing, check_shape
from .layout import Counter, Flag, Word, state_dtype
from .plan import Plan

#: Rows that the rings begin with, and what they grow by.
FIRST_ROWS, GROWTH = 16, 2.0
VECTORS = ("direction", "gradient", "trial", "origin", "residual")
#: What :class:`torch.optim.LBFGS` files of these, under the names that it has for them.
FOREIGN = {"d": "direction", "prev_flat_grad": "gradient"}
#: How many words a state has that was saved before there were more; the later ones are zero then.
FIRST_WORDS = Word.TAKEN
#: Buffers of an initial matrix that is not a number.
MATRIX = ("accumulator", *FACTORED, "square")


class History:
    """Buffers for ``size`` scalar parameters.

    Args:
        params: the parameters.
        history_size: pairs kept at most.
        plan: of the Kronecker factors; one without factors for a diagonal; ``None`` for a scalar.
        history_dtype: of the pairs; ``None`` for that of the vectors.
        shards: how the parameters are divided among processes, if they are.
    """

    def __init__(
        self,
        params: list[Tensor],
        history_size: int,
        plan: Plan | None,
        history_dtype: torch.dtype | None,
        shards: Shards | None = None,
    ) -> None:
        own = [own_part(p, shards) for p in params]
        self.shapes = [real_shape(p) for p in params]
        self.size = sum(p.numel() for p in own)
        self.device = params[0].device
        self.dtype = state_dtype(own)
        self.shards = shards
        self.filing = Filing(self.shapes, plan, shards)
        self.history_size = history_size
        self.table = None if plan is None else plan.table
        self.direction, self.gradient, self.trial, self.origin, self.residual = (
            self._vector() for _ in VECTORS
        )
        if plan is not None:
            self.accumulator = self._vector()
            self.factors, self.bases = (self._zeros(plan.factors) for _ in range(2))
            self.square = self._zeros(1, dtype=torch.float64)
            plan.fill_identities(self.bases)
        self.counters = self._zeros(len(Counter), dtype=torch.int64)
        self.words = self._zeros(len(Word), dtype=torch.float64)
        self.words[Word.GAMMA] = 1.0
        self.calls = 0
        self.pair_dtype = history_dtype or self.dtype
        self._allocate(min(FIRST_ROWS, history_size) + 1)
        self._bound = 0

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def _vector(self) -> Tensor:
        return self._zeros(self.size)

    def _allocate(self, slots: int) -> None:
        self.s_ring, self.y_ring = (
            ring(slots, self.size, self.pair_dtype, self.device) for _ in range(2)
        )
        self.gram = self._zeros(slots + 1, slots, dtype=torch.float64)
        self.scales, self.projections, self.images = (
            self._zeros(n, dtype=torch.float64) for n in (slots, slots + len(Flag), slots + 1)
        )

    @property
    def slots(self) -> int:
        """Rows of the rings, one of which is free for the candidate."""
        return len(self.scales)

    def reserve(self, pairs: int) -> None:
        """Make room for so many more pairs, before the ring turns.

        It never turns before it has all its rows, so what is copied begins with the oldest pair.
        """
        self._bound = min(self._bound + pairs, self.history_size)
        if self._bound + 1 <= self.slots:
            return
        old = {name: getattr(self, name) for name in ("s_ring", "y_ring", "gram", "scales")}
        rows = self.slots
        self._allocate(min(max(self._bound, int(GROWTH * rows)), self.history_size) + 1)
        self.s_ring[:rows], self.y_ring[:rows] = old["s_ring"], old["y_ring"]
        self.scales[:rows] = old["scales"]
        self.gram[:rows, :rows], self.gram[-1, :rows] = old["gram"][:-1], old["gram"][-1]

    def is_complete(self) -> bool:
        """Whether there is room for all pairs."""
        return self.slots > self.history_size

    def has_factors(self) -> bool:
        """Whether the initial matrix has Kronecker factors, which take turns."""
        return self.table is not None and len(self.factors) > 0

    def bytes(self) -> int:
        """Device memory of the state."""
        buffers = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(buffer.untyped_storage().nbytes() for buffer in buffers)

    # ------------------------------------------------------------------ checkpoints

    def entries(self) -> list[dict[str, Any]]:
        """The state for each parameter, under torch's names, and what torch does not have.

        It is filed under the first, as :class:`torch.optim.LBFGS` does, but for the vectors where
        parameters are divided.
        """
        pairs, oldest = (int(self.counters[w]) for w in (Counter.PAIRS, Counter.OLDEST_PAIR))
        order = [(oldest + age) % self.slots for age in range(pairs)]
        words = self.words.tolist()
        vectors: dict[str, Any] = {theirs: getattr(self, ours) for theirs, ours in FOREIGN.items()}
        vectors["old_dirs"] = [self.y_ring[i] for i in order]
        vectors["old_stps"] = [self.s_ring[i] for i in order]
        shared = {
            "t": words[Word.STEP],
            "H_diag": words[Word.GAMMA],
            "prev_loss": words[Word.LOSS],
            "ro": [1 / self.gram[i, i] for i in order],
            "slots": self.slots,
            "bound": self._bound,
            "calls": self.calls,
            "gram": self.gram,
            "scales": self.scales,
            "counters": self.counters,
            "words": self.words,
        }
        factors = {}
        if self.table is not None:
            vectors["accumulator"], shared["square"] = self.accumulator, self.square
            factors = {name: getattr(self, name) for name in FACTORED}
        return self.filing.entries(vectors, factors, shared)

    def adopt(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Continue what :meth:`entries`, or a :class:`torch.optim.LBFGS`, has filed.

        Raises:
            ValueError: it does not fit the parameters or the options; some of it may be in place.
        """
        entry = self.filing.own(entries)
        s_rows, y_rows = entry["old_stps"], entry["old_dirs"]
        if len(s_rows) > self.history_size:
            raise ValueError(
                f"state_dict: it has {len(s_rows)} pairs, and history_size is {self.history_size}; "
                "load it with the options it was saved with"
            )
        own = "counters" in entry
        self._allocate(int(entry["slots"]) if own else max(len(s_rows), self.slots - 1) + 1)
        for theirs, ours in FOREIGN.items():
            self._fill(ours, entry[theirs])
        if own:
            for name in ("gram", "scales", "counters"):
                self._fill(name, entry[name])
            self._fill("words", self._with_later_words(entry["words"]))
            self.calls = int(entry["calls"])
        else:
            self.words[Word.STEP] = float(entry["t"])
            self.words[Word.GAMMA] = float(entry["H_diag"])
            self.words[Word.LOSS] = float(entry["prev_loss"])
            slope = self.gradient.double() @ self.direction.double()
            self.words[Word.SLOPE] = self._total(slope)
            self.counters[Counter.PAIRS] = len(s_rows)
        oldest = int(self.counters[Counter.OLDEST_PAIR])
        for age, (s, y) in enumerate(zip(s_rows, y_rows, strict=True)):
            slot = (oldest + age) % self.slots
            self._check("old_stps", s, self.s_ring[slot])
            self._check("old_dirs", y, self.y_ring[slot])
            self.s_ring[slot], self.y_ring[slot] = s, y
        if not own:
            self._measure_pairs()
        for name in MATRIX if self.table is not None and own else ():
            self._fill(name, entry.get(name))
        self._bound = int(entry["bound"]) if own else len(s_rows)

    @staticmethod
    def _with_later_words(words: Any) -> Any:
        if not isinstance(words, Tensor) or words.shape != (FIRST_WORDS,):
            return words
        return torch.nn.functional.pad(words, (0, len(Word) - FIRST_WORDS))

    def _fill(self, name: str, value: Any) -> None:
        buffer = getattr(self, name)
        self._check(name, value, buffer)
        buffer.copy_(value)

    @staticmethod
    def _check(name: str, value: Any, buffer: Tensor) -> None:
        check_shape(name, value, buffer.shape)
        check_numbers(name, value, buffer)

    def _measure_pairs(self) -> None:
        """Products of pairs that came without them; none of them scales the others."""
        s, y = self.s_ring.double(), self.y_ring.double()
        self.gram.copy_(self._total(torch.cat([s @ y.mT, (y * y).sum(1)[None]])))
        self.scales.fill_(1.0)

    def _total(self, words: Tensor) -> Tensor:
        return words if self.shards is None else self.shards.total(words)
