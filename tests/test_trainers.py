"""Optimizers in the hands of trainers: examples, and wrappers that must not swallow what is set."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from adaqn_cuda import LBFGS, AdaQN, unwrap

ROOT = Path(__file__).parents[1]
#: Example, and the package that it needs.
EXAMPLES = {
    "accelerate_loop": "accelerate",
    "lightning_module": "lightning",
    "transformers_trainer": "transformers",
}


class Holding(torch.optim.Optimizer):
    """A wrapper like Accelerate's: a class of its own, which has the optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)


class Posing:
    """A wrapper like Lightning's: it poses as the optimizer's class, and has nothing of its own."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Posing", (Posing, type(optimizer)), {})

    optimizer = property(lambda self: self._optimizer)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def parameters():
    return nn.Linear(2, 2).parameters()


@pytest.mark.parametrize("make", [AdaQN, LBFGS])
@pytest.mark.parametrize(
    "wrap", [lambda o: o, Holding, Posing, lambda o: Holding(Posing(o)), lambda o: Posing(o)]
)
def test_unwrap(make, wrap):
    optimizer = make(parameters())
    assert unwrap(wrap(optimizer)) is optimizer


def test_unwrap_finds_the_optimizer_of_a_scheduler():
    optimizer = AdaQN(parameters())
    assert unwrap(torch.optim.lr_scheduler.ConstantLR(optimizer)) is optimizer


@pytest.mark.parametrize(
    "other", [None, nn.Linear(2, 2), Holding(torch.optim.SGD(parameters(), lr=1.0))]
)
def test_unwrap_refuses_others(other):
    with pytest.raises(TypeError, match="optimizer: expected AdaQN or LBFGS"):
        unwrap(other)


@pytest.mark.parametrize("name", ["monitor", "curvature_closure", "curvature_product"])
def test_what_is_assigned_to_a_posing_wrapper_reaches_the_optimizer(name):
    optimizer = AdaQN(parameters(), history_size=2, curvature=lambda s: s)
    wrapper = Posing(optimizer)

    def function(*arguments):
        raise AssertionError("not called here")

    setattr(wrapper, name, function)
    assert getattr(optimizer, name) is function and name not in vars(wrapper)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, tmp_path):
    package = EXAMPLES[example]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is missing; pip install '.[trainers]'")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / f"{example}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loss = re.search(r"^loss (\S+)$", done.stdout, re.MULTILINE)
    assert loss and float(loss[1]) < 0.1, done.stdout
    stats = re.search(r"'stored': (\d+).*'monitored_loss': ([^,]+)", done.stdout)
    assert stats and int(stats[1]) > 5 and float(stats[2]) < 0.1, done.stdout
