"""adaQN the textbook way: lists of pairs and the sequential two-loop recursion, in float64.

Shares no code with the package, so that agreement means something.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

Matrix = Callable[[Tensor], Tensor]


def two_loop(g: Tensor, pairs: list[tuple[Tensor, Tensor]], h0: Tensor | float | Matrix) -> Tensor:
    """H g by Algorithm 7.4 of Nocedal & Wright, oldest pair first, in the dtype of ``g``.

    ``h0`` is a diagonal, or a function that multiplies.
    """
    q, alphas = g.clone(), []
    for s, y in reversed(pairs):
        alpha = torch.dot(s, q) / torch.dot(s, y)
        q = q - alpha * y
        alphas.append(alpha)
    r = h0(q) if callable(h0) else h0 * q
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        beta = torch.dot(y, r) / torch.dot(s, y)
        r = r + (alpha - beta) * s
    return r


class Oracle:
    """One flat parameter vector under adaQN, step by step.

    ``product`` gives y from s in place of the accumulated Fisher product.  Pairs and gradients are
    kept in ``ring_dtype``.  The counts ``clipped``, ``damped`` and ``capped`` tell that a safeguard
    did something.
    """

    def __init__(
        self,
        w: Tensor,
        lr: float = 1e-2,
        *,
        history_size: int = 10,
        fisher_size: int = 32,
        update_interval: int = 10,
        init: str = "rmsprop",
        decay: float = 0.9,
        eps: float = 2**-26,
        min_curvature: float = 1e-4,
        max_increase: float = 1.01,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        damping: float = 0.0,
        max_direction: float = inf,
        bias_correction: bool = False,
        max_grad_norm: float = inf,
        monitor: Callable[[Tensor], float] | None = None,
        product: Matrix | None = None,
        ring_dtype: torch.dtype = torch.float64,
    ) -> None:
        self.w = w.double().clone()
        self.lr, self.weight_decay = lr, weight_decay
        self.interval, self.init, self.decay, self.eps = update_interval, init, decay, eps
        self.min_curvature, self.max_increase, self.monitor = min_curvature, max_increase, monitor
        self.momentum, self.damping, self.max_direction = momentum, damping, max_direction
        self.bias_correction, self.max_grad_norm = bias_correction, max_grad_norm
        self.product = self.fisher_product if product is None else product
        self.history_size, self.ring_dtype = history_size, ring_dtype
        self.pairs: deque = deque(maxlen=history_size)
        self.fisher: deque = deque(maxlen=fisher_size)
        self.v, self.m = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.iterates: list[Tensor] = []
        self.anchor: Tensor | None = None
        self.anchor_loss = float("nan")
        self.calls = self.stored = self.skipped = self.resets = self.dropped = self.accepted = 0
        self.clipped = self.damped = self.capped = 0
        self.gamma, self.bounded = 1.0, damping > 0 and product is None

    # ------------------------------------------------------------------ the initial matrix

    def root(self) -> Tensor | float:
        """1 / D."""
        if self.init == "scalar":
            return 1 / self.gamma if self.pairs else 1.0
        unbiased = self.v
        if self.init == "rmsprop" and self.bias_correction:
            unbiased = self.v / (1 - self.decay**self.accepted)
        return torch.sqrt(unbiased + self.eps)

    def h0(self, x: Tensor) -> Tensor:
        return x / self.root()

    def b0(self, x: Tensor) -> Tensor:
        return x * self.root()

    # ------------------------------------------------------------------ the step

    def step(self, g: Tensor) -> None:
        g = g.double()
        self.calls += 1
        if not g.isfinite().all():
            self.dropped += 1
            return
        self._move(g)
        if self.history_size and self.calls % self.interval == 0:
            self._update_pairs()

    def _move(self, g: Tensor) -> None:
        self.accepted += 1
        if g.norm() > self.max_grad_norm:
            self.clipped += 1
            g = g * (self.max_grad_norm / g.norm())
        self.fisher.append(self._rounded(g))
        self.iterates.append(self.w)
        if self.init == "adagrad":
            self.v = self.v + g * g
        else:
            self.v = self.decay * self.v + (1 - self.decay) * g * g
        p = self._direction(self._look_ahead(g))
        self.w = self.w - self.lr * self.weight_decay * self.w - self.lr * p

    def _look_ahead(self, g: Tensor) -> Tensor:
        beta, t = self.momentum, self.accepted
        self.m = beta * self.m + (1 - beta) * g
        return beta * self.m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)

    def _direction(self, q: Tensor) -> Tensor:
        p = two_loop(q, list(self.pairs), self.h0)
        if self.max_direction == inf:
            return p
        limit = self.max_direction * self.h0(q).norm()
        if p.norm() <= limit:
            return p
        self.capped += 1
        return p * (limit / p.norm())

    # ------------------------------------------------------------------ the pair update

    def _rounded(self, x: Tensor) -> Tensor:
        return x.to(self.ring_dtype).double()

    def fisher_product(self, s: Tensor) -> Tensor:
        return sum(f * torch.dot(f, s) for f in self.fisher) / len(self.fisher)

    def _update_pairs(self) -> None:
        average = sum(self.iterates) / len(self.iterates)
        self.iterates = []
        loss = float("nan") if self.monitor is None else float(self.monitor(average))
        if self.anchor is None:
            self.anchor, self.anchor_loss = average, loss
            return
        if self.monitor is not None and (
            loss > self.max_increase * self.anchor_loss or not abs(loss) < float("inf")
        ):
            self.resets += 1
            self.pairs.clear()
            self.fisher.clear()
            self.m = torch.zeros_like(self.m)
            self.w = self.anchor
            return
        s = average - self.anchor
        y = self._damp(s, self.product(s))
        s, y = self._rounded(s), self._rounded(y)
        if torch.dot(s, y) / torch.dot(y, y) > self.min_curvature:
            self.stored += 1
            self._scale(s, y)
            self.pairs.append((s, y))
            self.anchor, self.anchor_loss = average, loss
        else:
            self.skipped += 1
            if self.pairs and self.bounded:
                self.gamma = min(self.gamma, torch.dot(s, y) / torch.dot(y, y))

    def _scale(self, s: Tensor, y: Tensor) -> None:
        """gamma of the scalar matrix."""
        gamma = torch.dot(s, y) / torch.dot(y, y)
        self.gamma = min(gamma, self.gamma) if self.pairs and self.bounded else gamma

    def _damp(self, s: Tensor, y: Tensor) -> Tensor:
        """Procedure 18.2 of Nocedal & Wright, with ``damping`` for their 0.2."""
        b0_s = self.b0(s)
        s_y, s_b0_s = torch.dot(s, y), torch.dot(s, b0_s)
        if self.damping == 0 or s_y >= self.damping * s_b0_s:
            return y
        self.damped += 1
        theta = (1 - self.damping) * s_b0_s / (s_b0_s - s_y)
        return theta * y + (1 - theta) * b0_s
