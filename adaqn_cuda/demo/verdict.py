"""Whether a run has learned anything, and what would help where it has not."""

from __future__ import annotations

import math

from .optimizers import default_lr
from .train import Config, Result


def failure(result: Result, *, named: bool = False) -> str | None:
    """Why the run is worth nothing and what to change; ``None`` if it has learned.

    Args:
        named: ask for ``--lr NAME=LR``, as ``adaqn compare`` takes it.
    """
    guessing = math.log(result.vocabulary)
    if math.isfinite(result.train) and result.valid < guessing:
        return None
    losses = f"validation loss {result.valid:.4g}, guessing is {guessing:.4g}"
    if result.train < guessing <= result.valid:
        return f"learned the training text only ({losses}); lower --steps, or give more --data"
    # an untrained model is a little worse than guessing, and a slow start leaves it there
    if math.isfinite(result.train) and result.valid < 1.05 * result.curve[0]["valid"]:
        steps = result.config["steps"]
        return f"no better than guessing yet ({losses}); raise --steps above {steps}, or --lr"
    lr = f"{lower_lr(Config(**result.config)):.2g}"
    if named:
        lr = f"{result.config['optimizer']}={lr}"
    return f"diverged ({losses}); try --lr {lr}"


def lower_lr(config: Config) -> float:
    """A lr to try after one that diverged: well below that one and no higher than the default."""
    return min(default_lr(config.optimizer, config.model), config.rate / 4)
