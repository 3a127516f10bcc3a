"""What kernels of the L-BFGS operations must do on every device, against the reference."""

from __future__ import annotations

from itertools import product
from math import inf, nan
from random import Random

import torch
from kernel_problems import BF16, F16, F32, F64, bits, run
from secant_arguments import (
    COMBINE,
    DECIDE,
    MEASURE,
    OPERATIONS,
    PAIR,
    RESIDUAL,
    Search,
    SearchProblem,
    check_search,
    everything_but,
)

from adaqn_cuda.state.layout import Counter, Flag, Stop, Turn, Word

FULL_65 = dict(history_size=65, pairs=65, oldest=40)
FULL_130 = dict(history_size=130, pairs=130, oldest=7)
CASES = {
    "plain": Search(),
    "no pairs": Search(pairs=0, oldest=3),
    "no pairs, first step given": Search(pairs=0, oldest=3, first=0.01),
    "no pairs, a step taken": Search(pairs=0, oldest=3, taken=0.3, first=0.01),
    "one pair": Search(pairs=1, taken=0.3),
    "no elements": Search(numels=(0, 0), pairs=2),
    "one element": Search(numels=(1,), history_size=5, pairs=5, oldest=2),
    "31 elements": Search(numels=(31,), pairs=5),
    "one row": Search(history_size=1, pairs=1, oldest=1),
    "full ring": Search(history_size=5, pairs=5, oldest=3),
    "65 pairs": Search(**FULL_65),
    "65 of 130 pairs": Search(history_size=130, pairs=65, oldest=100),
    "130 pairs": Search(**FULL_130),
    "130 pairs of 31 elements": Search(numels=(31,), **FULL_130),
    "float64": Search(dtypes=(F64,)),
    "float64, 130 pairs": Search(dtypes=(F64,), **FULL_130),
    "bfloat16 rings": Search(pair_dtype=BF16),
    "bfloat16 rings, 65 pairs": Search(pair_dtype=BF16, **FULL_65),
    "float64 in bfloat16 rings": Search(dtypes=(F64,), pair_dtype=BF16, **FULL_65),
    "mixed": Search(
        numels=(5, 0, 700, 64, 1), dtypes=(F32, BF16, F16), strided=2, missing=3, loss_dtype=F64
    ),
    "mixed with float64": Search(numels=(33, 8, 129), dtypes=(F32, F64), missing=2),
    "300 tensors": Search(numels=(3, 17, 0) * 100),
    "unpadded rows": Search(numels=(1003,), row_padding=0, **FULL_65),
    "unaligned": Search(numels=(1003,), offset=1),
    "unaligned bfloat16 rings": Search(numels=(1003,), offset=3, pair_dtype=BF16),
    "100 000": Search(numels=(100_003,)),
    "maximize": Search(maximize=True, loss_dtype=BF16),
    "step given": Search(given_step=0.25),
    "step of zero given": Search(given_step=0.0),
    "ascending": Search(limit=-inf),
    "not self-scaled": Search(self_scaled=False),
    "negative curvature": Search(curvature=-1.0),
    "relative bound": Search(absolute=0.0, relative=0.999999),
    "refused": Search(turn=Turn.REFUSE),
    "forgotten": Search(turn=Turn.FORGET),
    "stopped": Search(status=Stop.ITERATIONS, step=0.0),
}


def check_refused(namespace, operation: str, case: Search, device: str) -> None:
    """A refused trial changes nothing but the flag that keeps it from other operations."""
    problem = SearchProblem(case.__class__(**{**vars(case), "turn": Turn.REFUSE}), device)
    problem.poison()
    before = everything_but(problem, "projections")
    run(namespace, operation, problem)
    assert all(map(torch.equal, everything_but(problem, "projections"), before))
    assert problem["projections"][Flag.NONFINITE] == (operation == PAIR)


def check_accepted_alone_keeps(namespace, turn: Turn, device: str) -> None:
    problem = SearchProblem(Search(turn=turn), device)
    before = bits(problem["origin"])
    run(namespace, "secant_keep", problem)
    assert torch.equal(bits(problem["origin"]), before) == (turn != Turn.ACCEPT)


def check_no_pair(namespace, value: float, where: str, case: Search, device: str) -> None:
    """A candidate that is not finite is no pair, and leaves neither NaN nor infinity behind."""
    problem = SearchProblem(case, device)
    problem[where][-1] = value
    run(namespace, PAIR, problem)
    counters, words = problem["counters"], problem["words"]
    assert counters[Counter.SKIPPED] == 1 and counters[Counter.PAIRS] == case.pairs
    assert problem.stored_now() == case.stored()
    assert words[Word.CURVATURE] == 0 and words[Word.SQUARE] == 0
    assert words[Word.GAMMA] == 0.4
    for ring in ("s_ring", "y_ring"):
        assert problem[ring].isfinite().all()


def check_overflow(namespace, device: str) -> None:
    """Products that float32 cannot hold are no pair."""
    problem = SearchProblem(Search(), device)
    problem["s_ring"][problem.case.stored()] = 1e30
    problem["trial"].fill_(1e30)
    run(namespace, PAIR, problem)
    assert problem["counters"][Counter.SKIPPED] == 1
    assert problem["projections"].isfinite().all()


def check_trial_that_is_not_finite(namespace, value: float, device: str) -> None:
    def spoil(problem: SearchProblem) -> None:
        problem["grads"][0][::7] = value

    problem = SearchProblem(Search(), device)
    spoil(problem)
    run(namespace, MEASURE, problem)
    assert problem["words"][Word.TRIAL_NONFINITE] == len(problem["grads"][0][::7])
    check_search(namespace, MEASURE, Search(), device, spoil)


def check_decisions(namespace, device: str) -> None:
    """The reference's decision at many combinations of what it looks at."""
    choices = {
        Word.STEP: (0.0, 0.5), Word.TRIALS: (0, 19), Word.STATUS: (Stop.NOT, Stop.GRADIENT),
        Word.FORGOTTEN: (0, 1), Word.TRIAL_LOSS: (1.0, 1.9, 2.0, 2.4, nan), Word.SLOPE: (-1.0, 0.5),
        Word.TRIAL_NONFINITE: (0, 2), Word.TRIAL_SLOPE: (-0.9, 3.0), Word.TRIAL_MAX: (1e-9, 1.0),
        Word.DIRECTION_MAX: (1e-10, 1.0), Word.ITERATIONS: (3, 99), Word.TAKEN: (0.0, 0.2),
    }  # fmt: skip
    every = list(product((0, 4), *choices.values()))
    for pairs, *values in Random(0).sample(every, 400):

        def change(problem: SearchProblem, values=values) -> None:
            for word, value in zip(choices, values, strict=True):
                problem["words"][word] = value

        case = Search(numels=(1,), pairs=pairs)
        check_search(namespace, DECIDE, case, device, change)


def check_search_repeatable(namespace, operation: str, case: Search, device: str) -> None:
    problems = [SearchProblem(case, device) for _ in range(2)]
    for problem in problems:
        run(namespace, operation, problem)
    assert all(map(torch.equal, problems[0].everything(), problems[1].everything()))


def check_long_triangle(namespace, operation: str, pairs: int, device: str) -> None:
    """More pairs than the panels of a block's solve, with a triangle that is far from diagonal."""

    def fill(problem: SearchProblem) -> None:
        stored = problem.case.stored()
        for i, row in enumerate(stored):
            later = stored[i + 1 :]
            problem["gram"][row, later] *= 2

    case = Search(numels=(40,), dtypes=(F64,), history_size=pairs, pairs=pairs, oldest=pairs // 3)
    check_search(namespace, operation, case, device, fill)


__all__ = [
    "CASES", "COMBINE", "OPERATIONS", "PAIR", "RESIDUAL",
    *(name for name in list(globals()) if name.startswith("check_")),
]  # fmt: skip
