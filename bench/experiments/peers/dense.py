"""Quasi-Newton methods that keep the whole inverse Hessian: d^2 numbers, and as much work a step.

BFGS as in Nocedal and Wright, "Numerical Optimization", 2006, algorithm 6.1; self-scaled BFGS and
SSBroyden as in Al-Baali, "Numerical experience with a class of self-scaling quasi-Newton
algorithms", 1998, and in Urban, Stefanou and Pons, "Unveiling the optimization process of physics
informed neural networks", 2025, where the second of its three Broyden methods is this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

from adaqn_cuda.wolfe import StrongWolfe, Trial

#: Evaluations that a line search takes at most.
MOST_TRIALS = 25
#: A pair is left out if s.y is at most this multiple of |s| |y|.
LEAST_CURVATURE = 1e-12


class Dense(Optimizer):
    """With H the inverse Hessian, g the gradient, and strong Wolfe's step t along p = -H g::

        s = t p     y = g' - g      b = -t s.g / s.y    h = y.H y / s.y     a = b h - 1
        v = sqrt(y.H y) (s / s.y - H y / y.H y)
        H = (H - H y y^T H / y.H y + phi v v^T) / tau + s s^T / s.y

    ===============  ========================================================================
    ``formula``      phi and tau
    ===============  ========================================================================
    ``"bfgs"``       1 and 1
    ``"ss-bfgs"``    1 and min(1, 1 / b)
    ``"ss-broyden"`` see :func:`ss_broyden`
    ===============  ========================================================================

    H begins as the identity, and s.y / y.y times that before its first update.
    A step that finds no lower loss starts H anew.

    Args:
        params: as for every optimizer.
        lr: step that is tried first.
        formula: see above.
        scale_first: whether H is scaled before its first update.
    """

    def __init__(
        self, params: Any, lr: float = 1.0, formula: str = "bfgs", scale_first: bool = True
    ) -> None:
        super().__init__(params, dict(lr=lr, formula=formula, scale_first=scale_first))
        self.params = [p for group in self.param_groups for p in group["params"]]
        self.inverse: Tensor | None = None
        self.now: Trial | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        """One iteration; the loss before it."""
        group, w = self.param_groups[0], parameters_to_vector(self.params)
        now = self.now or self._evaluate(closure, w, torch.zeros_like(w), 0.0)
        if now.largest == 0:
            return now.loss
        fresh = self.inverse is None
        p = -now.gradient if fresh else -(self.inverse @ now.gradient)
        slope = float(p @ now.gradient)
        start = Trial(0.0, now.loss, slope, now.largest, now.total, now.gradient)

        def evaluate(step: float) -> Trial:
            return self._evaluate(closure, w, p, step)

        wolfe = StrongWolfe(start, evaluate, float(p.abs().max()), 0.0, MOST_TRIALS, w.dtype)
        first = group["lr"] * (min(1.0, 1 / now.total) if fresh else 1.0)
        trial = wolfe.search(evaluate(first))
        vector_to_parameters(w + trial.step * p, self.params)
        if trial.step == 0 or not math.isfinite(trial.loss):
            self.inverse, self.now = None, None
        else:
            s_b_s = -(trial.step**2) * slope
            self._update(trial.step * p, trial.gradient - now.gradient, s_b_s)
            self.now = trial
        return now.loss

    def _evaluate(self, closure: Callable[[], Tensor], w: Tensor, p: Tensor, step: float) -> Trial:
        vector_to_parameters(w + step * p, self.params)
        loss = float(closure())
        g = parameters_to_vector([q.grad for q in self.params])
        return Trial.of(step, loss, float(g @ p), float(g.abs().max()), float(g.abs().sum()), g)

    def _update(self, s: Tensor, y: Tensor, s_b_s: float) -> None:
        """H takes in a pair; s.B s, with B the inverse of H, is known."""
        group, s_y = self.param_groups[0], float(s @ y)
        if s_y <= LEAST_CURVATURE * float(s.norm() * y.norm()):
            return
        if self.inverse is None:
            gamma = s_y / float(y @ y) if group["scale_first"] else 1.0
            self.inverse = gamma * torch.eye(len(s), dtype=s.dtype)
            s_b_s = float(s @ s) / gamma
        image = self.inverse @ y
        y_h_y = float(y @ image)
        if not y_h_y > 0:  # rounding has eaten what H knew
            self.inverse = None
            return
        phi, tau = FORMULAS[group["formula"]](s_b_s / s_y, y_h_y / s_y, len(s))
        v = math.sqrt(y_h_y) * (s / s_y - image / y_h_y)
        self.inverse.addr_(image, image, alpha=-1 / y_h_y).addr_(v, v, alpha=phi)
        self.inverse.div_(tau).addr_(s, s, alpha=1 / s_y)


def bfgs(b: float, h: float, size: int) -> tuple[float, float]:
    return 1.0, 1.0


def self_scaled_bfgs(b: float, h: float, size: int) -> tuple[float, float]:
    return 1.0, min(1.0, 1 / b)


def ss_broyden(b: float, h: float, size: int) -> tuple[float, float]:
    """With theta the member of Broyden's family, for H's inverse, and phi that for H::

    a = b h - 1     c = sqrt(a / (1 + a))       rho = min(1, h (1 - c))
    theta = max((rho - 1) / a, min(1 / rho, (1 - b) / b))
    phi = (1 - theta) / (1 + a theta)           sigma = (1 + a theta)^(1 / (1 - d))
    tau = min(1, 1 / b) min(sigma, 1 / theta)           where theta > 0
    tau = min(min(1, 1 / b) sigma, 1 + a theta)         elsewhere
    """
    a = max(b * h - 1, 1e-15)  # by Cauchy and Schwarz it is positive, but for rounding
    rho = min(1.0, h * (1 - math.sqrt(a / (1 + a))))
    theta = max((rho - 1) / a, min(1 / rho, (1 - b) / b))
    determinant = 1 + a * theta
    sigma, least = abs(determinant) ** (1 / (1 - size)), min(1.0, 1 / b)
    tau = least * min(sigma, 1 / theta) if theta > 0 else min(least * sigma, determinant)
    return (1 - theta) / determinant, tau


FORMULAS = {"bfgs": bfgs, "ss-bfgs": self_scaled_bfgs, "ss-broyden": ss_broyden}
