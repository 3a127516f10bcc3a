"""Steps of another length: is there a normalisation under which one lr suits every problem?

Each rule looks at a parameter tensor w before a step and at the step's displacement lr * p, and
gives a factor for it, by the root mean square (rms) of either:

- ``"unit"``: p is scaled to rms 1, so that lr is the size of the step;
- ``"relative"``: p is multiplied by rms(w), as in Adafactor;
- ``"trust"``: both, as in LAMB: lr is the relative size of the step;
- ``"distance"``: p is scaled to rms 1 and multiplied by the largest distance from the initial
  parameters so far over the root of the number of steps, as in DoG.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaqn_cuda import AdaQN

RULES = ("unit", "relative", "trust", "distance")
#: Below this, an rms of parameters or distances counts as this.
LEAST = 1e-3


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


class Rescaled:
    """AdaQN with every tensor's step rescaled by one of :data:`RULES`."""

    def __init__(self, optimizer: AdaQN, rule: str) -> None:
        self.optimizer, self.rule, self.steps = optimizer, rule, 0
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.initial = [p.detach().clone() for p in self.params]
        self.farthest = [torch.full((), LEAST, dtype=p.dtype) for p in self.params]

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    @property
    def state(self) -> dict:
        return self.optimizer.state

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def stats(self) -> dict:
        return self.optimizer.stats()

    @torch.no_grad()
    def step(self) -> None:
        before = [p.clone() for p in self.params]
        self.optimizer.step()
        self.steps += 1
        rates = [group["lr"] for group in self.param_groups for _ in group["params"]]
        for index, (p, w, lr) in enumerate(zip(self.params, before, rates, strict=True)):
            moved = p - w
            p.copy_(w + self._factor(index, w, rms(moved) / lr) * moved)

    def _factor(self, index: int, w: Tensor, size: Tensor) -> Tensor:
        """What a step whose p has rms ``size`` is multiplied with."""
        unit = 1 / size.clamp(min=1e-30)
        if self.rule == "unit":
            return unit
        if self.rule in ("relative", "trust"):
            scale = rms(w).clamp(min=LEAST)
            return scale if self.rule == "relative" else scale * unit
        farthest = torch.maximum(self.farthest[index], rms(w - self.initial[index]))
        self.farthest[index] = farthest
        return farthest / self.steps**0.5 * unit
