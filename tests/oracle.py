"""adaQN the textbook way: lists of pairs and the sequential two-loop recursion, in float64.

Shares no code with the package, so that agreement means something.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


def two_loop(g: Tensor, pairs: list[tuple[Tensor, Tensor]], h0: Tensor | float) -> Tensor:
    """H g by Algorithm 7.4 of Nocedal & Wright, oldest pair first, in the dtype of ``g``."""
    q, alphas = g.clone(), []
    for s, y in reversed(pairs):
        alpha = torch.dot(s, q) / torch.dot(s, y)
        q = q - alpha * y
        alphas.append(alpha)
    r = h0 * q
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        beta = torch.dot(y, r) / torch.dot(s, y)
        r = r + (alpha - beta) * s
    return r


class Oracle:
    """One flat parameter vector under adaQN, step by step."""

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
        monitor: Callable[[Tensor], float] | None = None,
    ) -> None:
        self.w = w.double().clone()
        self.lr, self.weight_decay = lr, weight_decay
        self.interval, self.init, self.decay, self.eps = update_interval, init, decay, eps
        self.min_curvature, self.max_increase, self.monitor = min_curvature, max_increase, monitor
        self.pairs: deque = deque(maxlen=history_size)
        self.fisher: deque = deque(maxlen=fisher_size)
        self.v = torch.zeros_like(self.w)
        self.iterates: list[Tensor] = []
        self.anchor: Tensor | None = None
        self.anchor_loss = float("nan")
        self.calls = self.stored = self.skipped = self.resets = self.dropped = 0

    def h0(self) -> Tensor | float:
        if self.init == "scalar":
            if not self.pairs:
                return 1.0
            s, y = self.pairs[-1]
            return torch.dot(s, y) / torch.dot(y, y)
        return 1.0 / torch.sqrt(self.v + self.eps)

    def step(self, g: Tensor) -> None:
        g = g.double()
        self.calls += 1
        if g.isfinite().all():
            self._move(g)
        else:
            self.dropped += 1
        if self.calls % self.interval == 0 and self.iterates:
            self._update_pairs()

    def _move(self, g: Tensor) -> None:
        self.fisher.append(g)
        self.iterates.append(self.w)
        if self.init == "adagrad":
            self.v = self.v + g * g
        else:
            self.v = self.decay * self.v + (1 - self.decay) * g * g
        p = two_loop(g, list(self.pairs), self.h0())
        self.w = self.w - self.lr * self.weight_decay * self.w - self.lr * p

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
            self.w = self.anchor
            return
        s = average - self.anchor
        y = sum(f * torch.dot(f, s) for f in self.fisher) / len(self.fisher)
        if torch.dot(s, y) / torch.dot(y, y) > self.min_curvature:
            self.stored += 1
            self.pairs.append((s, y))
            self.anchor, self.anchor_loss = average, loss
        else:
            self.skipped += 1
