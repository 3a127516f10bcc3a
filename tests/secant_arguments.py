"""Arguments for the operations of L-BFGS on a deterministic loss, and their check.

As in :mod:`kernel_problems`: kernels run on buffers with guards around them, in which whatever an
operation may not read is NaN; the reference runs on plain copies with zeros there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_problems import (
    F32,
    F64,
    TOLERANCE,
    Case,
    Problem,
    arguments,
    assert_close,
    bits,
    run,
)
from torch import Tensor

from adaqn_cuda import reference
from adaqn_cuda.state.layout import Counter, Flag, Stop, Turn, Word

MEASURE, DECIDE, KEEP, PAIR, RESIDUAL, COMBINE, MOVE = OPERATIONS = (
    "secant_measure", "secant_decide", "secant_keep", "secant_pair", "secant_residual",
    "secant_combine", "secant_move",
)  # fmt: skip
RING_NAMES = ("s_ring", "y_ring")
#: Those of one word per slot, of which only those of pairs mean anything.
BY_SLOT = ("scales", "projections", "images")


@dataclass(frozen=True)
class Search(Case):
    """What a problem looks like, beside what :class:`Case` says of it.

    Args:
        history_size, pairs, oldest: rows of the rings are one more than ``history_size``.
        turn: what the search has decided.
        step, taken: t of the trial, and of the latest iterate.
        curvature: sign and size of the candidate's s.y.
        strided: every how many parameters one is not contiguous; 0 for none.
        loss_dtype: of the loss, as the closure returned it.
        relative, absolute, self_scaled, maximize, given_step, limit, lr, first: as the operations
            have them; ``given_step`` is ``step`` of :func:`secant_move`.
    """

    history_size: int = 6
    pairs: int = 4
    oldest: int = 5
    turn: Turn = Turn.ACCEPT
    step: float = 0.7
    taken: float = 0.0
    curvature: float = 1.0
    strided: int = 0
    loss_dtype: torch.dtype = F32
    absolute: float = 1e-10
    relative: float = 0.0
    self_scaled: bool = True
    maximize: bool = False
    given_step: float | None = None
    limit: float = 0.0
    lr: float = 0.9
    first: float = 0.0
    status: Stop = Stop.NOT

    def stored(self) -> list[int]:
        """Slots of the pairs, oldest first."""
        return [(self.oldest + age) % (self.history_size + 1) for age in range(self.pairs)]


class SearchProblem(Problem):
    """The arguments of the seven operations by their schema's names, on ``device``."""

    def __init__(self, case: Search, device: str = "cpu") -> None:
        self.case, self.device = case, device
        self.guards: list[tuple[Tensor, Tensor]] = []
        draw = torch.Generator(device).manual_seed(case.seed)
        self.draw = lambda *shape: torch.randn(*shape, generator=draw, dtype=F64, device=device)
        self.slots, stored = case.history_size + 1, case.stored()
        free = [i for i in range(self.slots) if i not in stored]
        self.unread = dict.fromkeys(RING_NAMES, free)
        self.values: dict = {}
        self.values.update(self.parameters())
        self.values.update(self.pair_rings())
        self.values.update(self.flat_vectors())
        self.values.update(self.numbers(stored))
        self.values.update(self.options())

    def parameters(self) -> dict:
        values = super().parameters()
        if self.case.strided:
            for name in ("params", "grads"):
                for i in range(0, len(values[name]), self.case.strided):
                    if values[name][i] is not None:
                        values[name][i] = values[name][i].repeat_interleave(2)[::2]
        return values

    def pair_rings(self) -> dict:
        d = self.total()
        padding = -d % 8 if self.case.row_padding is None else self.case.row_padding
        size, dtype = max(d, 1) ** -0.5, self.case.pair_dtype or self.vector
        return {
            name: self.guarded(size * self.draw(self.slots, d), dtype, padding)
            for name in RING_NAMES
        }

    def flat_vectors(self) -> dict:
        """p descends, and y = A s with A of one sign."""
        d, case = self.total(), self.case
        gradient = self.draw(d)
        direction = -gradient * (0.5 + self.draw(d).square())
        image = case.curvature * (0.5 + self.draw(d).square()) * case.step * direction
        drawn = {
            "gradient": gradient,
            "direction": direction,
            "trial": gradient + image,
            "origin": self.draw(d),
            "residual": self.draw(d),
        }
        return {name: self.guarded(x, self.vector) for name, x in drawn.items()}

    def numbers(self, stored: list[int]) -> dict:
        case, draw, slots = self.case, self.draw, self.slots
        gram = torch.full((slots + 1, slots), torch.nan, dtype=F64, device=self.device)
        for i, row in enumerate(stored):
            gram[row, stored[i:]] = 0.3 * draw(case.pairs - i) / case.pairs**0.5
            gram[row, row] = 1.5 + 0.5 * draw(()).tanh()
            gram[slots, row] = 2.5
        counters = torch.zeros(len(Counter), dtype=torch.int64)
        counters[Counter.PAIRS], counters[Counter.OLDEST_PAIR] = case.pairs, case.oldest
        counters[Counter.STORED], counters[Counter.ACCEPTED] = case.pairs + 3, case.accepted
        projections = torch.zeros(slots + len(Flag), dtype=F64, device=self.device)
        g = self["gradient"].double()
        projections[stored] = self["s_ring"][stored].double() @ -g
        projections[Flag.NONFINITE], projections[Flag.NONZERO] = 0, (g != 0).sum()
        projections[Flag.SQUARE] = g @ g
        doubles = {
            "gram": gram,
            "scales": 1 + 0.05 * draw(slots).abs(),
            "projections": projections,
            "images": draw(slots + 1),
            "words": self.words_of_search(),
        }
        guarded = {name: self.guarded(values, F64) for name, values in doubles.items()}
        return {**guarded, "counters": self.guarded(counters, torch.int64)}

    def words_of_search(self) -> Tensor:
        """Of a search whose trial has been measured."""
        case = self.case
        g, p, trial = (self[name].double() for name in ("gradient", "direction", "trial"))
        words = torch.zeros(len(Word), dtype=F64)
        values = {
            Word.STEP: case.step, Word.TRIALS: 1, Word.ITERATIONS: 3, Word.STATUS: case.status,
            Word.TURN: case.turn, Word.TRIAL_LOSS: 1.0, Word.LOSS: 2.0, Word.GAMMA: 0.4,
            Word.TRIAL_SLOPE: trial @ p, Word.TRIAL_SUM: trial.abs().sum(),
            Word.TRIAL_MAX: trial.abs().max() if len(g) else 0, Word.SLOPE: g @ p,
            Word.GRADIENT_SUM: g.abs().sum(), Word.DIRECTION_MAX: p.abs().max() if len(p) else 0,
            Word.CURVATURE: 0.3, Word.SQUARE: 0.6, Word.TAKEN: case.taken, Word.MADE: 5,
            Word.JUDGED: 8,
        }  # fmt: skip
        for word, value in values.items():
            words[word] = value
        return words

    def options(self) -> dict:
        case = self.case
        copied = ("absolute", "relative", "self_scaled", "maximize", "limit", "lr", "first")
        return {
            **{name: getattr(case, name) for name in (*copied, "identity")},
            **dict(decrease=1e-4, noise=1e-6, tolerance_grad=1e-7, tolerance_change=1e-9),
            **dict(max_trials=20, max_iter=100, step=case.given_step),
            "loss": torch.tensor(1.25, dtype=case.loss_dtype, device=self.device),
        }

    def for_reference(self) -> dict:
        self.values["saved"] = self["direction"]
        copies = super().for_reference()
        del self.values["saved"], copies["saved"]
        return copies

    def assert_written(self, theirs: dict) -> None:
        """Every argument is what the reference made of ``theirs``, as far as anyone reads it."""
        tolerance = 4 * TOLERANCE[self.vector]
        stored = self.stored_now()
        assert torch.equal(self["counters"], theirs["counters"])
        for word in Word:
            pair = (values["words"][word : word + 1] for values in (self, theirs))
            assert_close(*pair, f"words[{word.name}]", tolerance)
        for key in ("gradient", "direction", "trial", "origin", "residual"):
            assert_close(self[key], theirs[key], key)
        for key, values in (("params", self["params"]), ("grads", self["grads"])):
            for mine, other in zip(values, theirs[key], strict=True):
                if mine is not None:
                    assert_close(mine, other, key)
        for key in BY_SLOT:
            assert_close(self[key][stored], theirs[key][stored], key, tolerance)
        free = [i for i in range(self.slots) if i not in stored]
        if not torch.equal(self["words"][Word.TURN], torch.tensor(0.0).to(self["words"])):
            assert torch.equal(self["projections"][free], theirs["projections"][free])
        for flag in Flag:
            both = [values["projections"][flag].reshape(1) for values in (self, theirs)]
            assert_close(*both, f"projections[{flag.name}]", tolerance)
        for i, row in enumerate(stored):
            both = [values["gram"][row, stored[i:]] for values in (self, theirs)]
            assert_close(*both, f"gram[{row}]", tolerance)
        last = [values["gram"][self.slots, stored] for values in (self, theirs)]
        assert_close(*last, "gram[-1]", tolerance)
        for ring in RING_NAMES:
            assert_close(self[ring][stored], theirs[ring][stored], ring)

    def stored_now(self) -> list[int]:
        pairs, oldest = (int(self["counters"][w]) for w in (Counter.PAIRS, Counter.OLDEST_PAIR))
        return [(oldest + age) % self.slots for age in range(pairs)]


def check_search(namespace, name: str, case: Search, device: str = "cpu", change=None) -> None:
    """Run operation ``name`` by ``namespace`` and by the reference, and compare every argument.

    Args:
        namespace: has the operations as attributes.
        name: an operation.
        case: its arguments.
        device: where they are.
        change: a function that changes the problem before both runs.
    """
    problem = SearchProblem(case, device)
    if change is not None:
        change(problem)
    theirs = problem.for_reference()
    getattr(reference, name)(*arguments(name, theirs))
    problem.poison()
    before = {ring: bits(problem[ring][case.stored()]) for ring in RING_NAMES}
    run(namespace, name, problem)
    problem.assert_written(theirs)
    for ring in RING_NAMES:
        assert torch.equal(bits(problem[ring][case.stored()]), before[ring]), f"{ring}: a pair"


def everything_but(problem: SearchProblem, *names: str) -> list[Tensor]:
    """The bits of every tensor argument except ``names``."""
    kept = [value for name, value in problem.values.items() if name not in names]
    lists = [value if isinstance(value, list) else [value] for value in kept]
    return [bits(t) for tensors in lists for t in tensors if isinstance(t, Tensor)]
