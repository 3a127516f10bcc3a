"""A line search for the strong Wolfe conditions, on numbers alone.

Nocedal & Wright, Algorithms 3.5 and 3.6, with the cubic interpolation and the safeguards of
Schmidt's minFunc, so that it makes the same trials as :class:`torch.optim.LBFGS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from struct import Struct

import torch
from torch import Tensor

#: Share of the slope's decrease that is asked for.
DECREASE = 1e-4
#: Relative noise of a loss, in units of its rounding error (Hager & Zhang 2005, section 4).
NOISE = 8
_SINGLE = Struct("f")


@dataclass(frozen=True)
class Trial:
    """What one evaluation has found, ``step`` times the direction away from the iterate.

    A loss or gradient that is not finite counts as an infinite loss that rises.
    """

    step: float
    loss: float
    slope: float
    largest: float
    total: float
    gradient: Tensor

    @classmethod
    def of(
        cls, step: float, loss: float, slope: float, largest: float, total: float, gradient: Tensor
    ) -> Trial:
        finite = isfinite(loss) and isfinite(slope) and isfinite(largest)
        loss, slope = (loss, slope) if finite else (inf, inf)
        return cls(step, loss, slope, largest, total, gradient)


def minimizer(a: Trial, b: Trial, low: float, high: float) -> float:
    """Where the cubic through two trials has its minimum, within [low, high]; else the middle."""
    if a.step > b.step:
        a, b = b, a
    middle = (low + high) / 2
    if not (isfinite(a.loss) and isfinite(b.loss)) or a.step == b.step:
        return middle
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.step - b.step)
    square = d1 * d1 - a.slope * b.slope
    if not 0 <= square < inf:
        return middle
    d2 = sqrt(square)
    width = b.slope - a.slope + 2 * d2
    if width == 0:
        return middle
    return min(max(b.step - (b.step - a.step) * ((b.slope + d2 - d1) / width), low), high)


def rounded_to_single(x: float) -> float:
    """x as a float32 has it, where it is in its range."""
    return _SINGLE.unpack(_SINGLE.pack(x))[0] if abs(x) < 1e38 else x


class StrongWolfe:
    """The conditions along one direction.

    Args:
        start: the iterate, with the slope along the direction.
        evaluate: what there is so many steps along the direction.
        longest: largest element of the direction.
        tolerance_change: brackets that change no parameter by more than this are not refined.
        max_trials: evaluations at most, but for the first.
        dtype: in which losses are compared: a decrease that it cannot show is not asked for.
        decrease: c1 of the sufficient decrease.
        curvature: c2 of the curvature condition.
    """

    def __init__(
        self,
        start: Trial,
        evaluate: Callable[[float], Trial],
        longest: float,
        tolerance_change: float,
        max_trials: int,
        dtype: torch.dtype,
        decrease: float = DECREASE,
        curvature: float = 0.9,
    ) -> None:
        self.start = start
        self.evaluate = evaluate
        self.longest = longest
        self.tolerance_change = tolerance_change
        self.left = max_trials
        self.round = rounded_to_single if dtype != torch.float64 else float
        self.noise = NOISE * torch.finfo(dtype).eps
        self.decrease = decrease
        self.curvature = curvature

    def _rises(self, trial: Trial) -> bool:
        """Whether the loss falls too little; of two equal up to rounding, the slope has to tell."""
        start = self.start
        if trial.loss - start.loss <= self.noise * abs(start.loss) and self._is_flat(trial):
            return False
        return trial.loss > self.round(start.loss + self.decrease * trial.step * start.slope)

    def _is_flat(self, trial: Trial) -> bool:
        return abs(trial.slope) <= -self.curvature * self.start.slope

    def search(self, trial: Trial) -> Trial:
        """The trial to accept, from a first one on."""
        previous, tried = self.start, 0
        while tried < self.left:
            if self._rises(trial) or (tried > 1 and trial.loss >= previous.loss):
                return self._zoom(previous, trial, tried)
            if self._is_flat(trial):
                return trial
            if trial.slope >= 0:
                return self._zoom(previous, trial, tried)
            low = trial.step + 0.01 * (trial.step - previous.step)
            further = minimizer(previous, trial, low, 10 * trial.step)
            previous, trial = trial, self.evaluate(further)
            tried += 1
        return min(self.start, trial, key=lambda end: end.loss)

    def _zoom(self, one: Trial, other: Trial, tried: int) -> Trial:
        """The same between two trials.

        ``low`` is the better one; of equals, the one in the place of ``one``, where ``first`` says
        that ``low`` is.
        """
        low, high = (one, other) if one.loss <= other.loss else (other, one)
        first, stuck = low is one, False
        while tried < self.left:
            left, right = sorted((low.step, high.step))
            if (right - left) * self.longest < self.tolerance_change:
                break
            step, stuck = self._inside(minimizer(low, high, left, right), left, right, stuck)
            trial = self.evaluate(step)
            tried += 1
            if self._rises(trial) or trial.loss >= low.loss:
                high = trial
                if high.loss < low.loss or (high.loss == low.loss and not first):
                    low, high, first = high, low, not first
            else:
                done = self._is_flat(trial)
                if not done and trial.slope * (high.step - low.step) >= 0:
                    high = low
                low = trial
                if done:
                    break
        return low

    @staticmethod
    def _inside(step: float, left: float, right: float, stuck: bool) -> tuple[float, bool]:
        """The step, kept away from an end that it has come close to twice, and whether it has."""
        margin = 0.1 * (right - left)
        if min(right - step, step - left) >= margin:
            return step, False
        if not stuck and left < step < right:
            return step, True
        return (right - margin if right - step < step - left else left + margin), False
