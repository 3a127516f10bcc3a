"""What all backends agree on: the words of the control block, ring sizes, the state's dtype.

The control block holds the few numbers that steer the algorithm on the device.  Every backend
reads and writes these words, so their order is part of the checkpoint format.
"""

from __future__ import annotations

from enum import IntEnum
from functools import reduce

import torch
from torch import Tensor


class Counter(IntEnum):
    """Words of the ``counters`` tensor (int64)."""

    PAIRS = 0
    """Curvature pairs stored now, 0..history_size."""
    OLDEST_PAIR = 1
    """Ring slot of the oldest pair; pair ``i`` lives in slot ``(OLDEST_PAIR + i) % slots``."""
    GRADIENTS = 2
    """Gradients in the Fisher ring now; they fill slots ``0..GRADIENTS-1``."""
    NEXT_GRADIENT = 3
    """Fisher slot that the next accepted gradient overwrites."""
    ITERATES = 4
    """Iterates in ``iterate_sum`` now."""
    ANCHORED = 5
    """1 once the anchor holds an averaged iterate."""
    STORED = 6
    """Pair updates that stored a pair, ever."""
    SKIPPED = 7
    """Pair updates that failed the curvature test, ever."""
    RESETS = 8
    """Pair updates that dropped the memory and went back to the anchor, ever."""
    STEPS_SKIPPED = 9
    """Steps dropped because their gradient was not finite, ever."""
    ACCEPTED = 10
    """Steps that moved the parameters, ever: the exponent of every bias correction."""


class Loss(IntEnum):
    """Words of the ``losses`` tensor (float64)."""

    ANCHOR = 0
    """Monitored loss at the anchor."""
    MONITORED = 1
    """Monitored loss at the latest averaged iterate; NaN until there is one."""


class Flag(IntEnum):
    """Trailing words of ``projections`` (float64), counted from its end."""

    NONFINITE = -3
    """Number of gradient elements that are not finite, plus ``found_inf``."""
    NONZERO = -2
    """Number of gradient elements that are not zero."""
    SQUARE = -1
    """Squared norm of the gradient, before clipping."""


class Word(IntEnum):
    """Words of the ``words`` tensor (float64): the line search of a deterministic problem.

    The iterate is ``w``, where the search began; the trial is ``w + t p``.
    """

    STEP = 0
    """t of the trial; 0: it is the iterate itself."""
    TRIALS = 1
    """Trials that this search has refused."""
    ITERATIONS = 2
    """Iterates accepted since the last call of ``step()``."""
    STATUS = 3
    """Why the search has stopped, a :class:`Stop`."""
    TURN = 4
    """What comes next, a :class:`Turn`."""
    FORGOTTEN = 5
    """Searches in a row that have failed, which forgets the pairs."""
    TRIAL_LOSS = 6
    TRIAL_SLOPE = 7
    """g.p at the trial."""
    TRIAL_MAX = 8
    """max |g| at the trial."""
    TRIAL_SUM = 9
    """sum |g| at the trial."""
    TRIAL_NONFINITE = 10
    """Number of elements of g at the trial that are not finite."""
    LOSS = 11
    """Of the iterate."""
    SLOPE = 12
    """g.p at the iterate."""
    GRADIENT_SUM = 13
    """sum |g| at the iterate."""
    DIRECTION_MAX = 14
    """max |p|."""
    GAMMA = 15
    """Factor of the initial matrix: s.y / y.K y of the newest pair; 1 while there is none."""
    CURVATURE = 16
    """s.y of the latest candidate."""
    SQUARE = 17
    """y.y of the latest candidate."""
    TAKEN = 18
    """t of the latest iterate; 0: there is none, or a search has failed since."""
    MADE = 19
    """Iterates accepted since the host looked last."""
    JUDGED = 20
    """Trials judged since the host looked last, the iterate itself among them."""


class Turn(IntEnum):
    """Values of ``Word.TURN``."""

    REFUSE = 0
    """The trial was refused: the direction stays, the step is shortened."""
    ACCEPT = 1
    """The trial is the next iterate: a pair, and a new direction."""
    FORGET = 2
    """The search has failed: no pairs any more, and a new direction from the iterate."""


class Stop(IntEnum):
    """Values of ``Word.STATUS``: why a search has stopped."""

    NOT = 0
    GRADIENT = 1
    STEP = 2
    LOSS = 3
    SLOPE = 4
    SEARCH = 5
    NONFINITE = 6
    ITERATIONS = 7
    EVALUATIONS = 8


def pair_slots(history_size: int) -> int:
    """Rows of the pair rings: one spare row takes the candidate, so storing moves an index only.

    None at all for a ``history_size`` of zero, which tries no pairs.
    """
    return history_size + 1 if history_size else 0


def projections_size(history_size: int) -> int:
    """Length of ``projections``: one word per pair slot, then the flags."""
    return pair_slots(history_size) + len(Flag)


def largest_norm(dtype: torch.dtype) -> float:
    """Norm to which a gradient is clipped in any case, so that sums of its squares stay finite."""
    return 2.0**510 if dtype == torch.float64 else 2.0**62


def state_dtype(params: list[Tensor]) -> torch.dtype:
    """Dtype of vectors in the state and of arithmetic on them: at least float32."""
    return reduce(torch.promote_types, {p.dtype for p in params}, torch.float32)
