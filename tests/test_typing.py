"""Types: what checkers say of the package, of the README's and other examples, and of mistakes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What the examples take for granted.
PRELUDE = """# mypy: allow-untyped-defs, allow-untyped-calls, allow-redefinition
from collections.abc import Iterable

import torch
from torch import Tensor, nn

model = nn.LSTM(3, 5)
loss_fn = nn.CrossEntropyLoss()
batches: Iterable[tuple[Tensor, Tensor]] = []
x = y = held_x = held_y = torch.zeros(3)
"""
#: What no example of the README shows, and must be accepted all the same.
FURTHER = """
from collections.abc import Callable, Mapping
from typing import Any

from adaqn_cuda import hessian, unwrap

by_hand = {p: 1 for p in model.parameters()}
optimizer = AdaQN(model.named_parameters(), lr=torch.tensor(0.1), blocks=by_hand)
optimizer = AdaQN([{"params": model.parameters(), "weight_decay": 0.1}], blocks={x: [1, 2]})
Vectors = Mapping[Tensor, Tensor]
times: Callable[[Vectors], Vectors] = hessian(model, loss_fn, (x, y))
base: torch.optim.Optimizer = optimizer
unwrap(optimizer).monitor = None
wrapped: Any = optimizer
unwrap(wrapped).monitor = None
scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
optimizer.step(lambda: loss_fn(x, y))
optimizer.step(lambda: 1.0)
"""
#: Mistakes, and a word of what must be said about each.
MISTAKES = {
    "AdaQN(model.parameters(), init=3)": "init",
    "AdaQN(model.parameters(), 0.1, 10)": "positional",
    "AdaQN(model.parameters(), history=10)": "history",
    "LBFGS(model.parameters(), line_search_fn=1)": "line_search_fn",
    "AdaQN(model.parameters()).step(3)": "step",
    "unwrap(LBFGS(model.parameters())).monitor": "monitor",
}


def check(checker: str, *arguments: str) -> str:
    """What a type checker says; skips where it is not installed."""
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is missing; pip install '.[test]'")
    command = [sys.executable, "-m", checker, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout + done.stderr


def examples() -> str:
    """The README's Python, one block after the other, and more."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) > 3
    return PRELUDE + "\n".join(blocks) + FURTHER


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples and, one to a line at the end, the mistakes."""
    path = tmp_path_factory.mktemp("examples") / "examples.py"
    path.write_text(examples() + "\n".join(MISTAKES) + "\n")
    return path


def assert_only_mistakes_are_reported(said: str, program: Path) -> None:
    """Of the package nothing is said, and of the program what is wrong in it."""
    reported: dict[int, str] = {}
    for line in said.splitlines():
        if "error:" in line:
            found = re.search(rf"{program.name}:(\d+)", line)
            assert found, said
            number = int(found[1])
            reported[number] = reported.get(number, "") + line
    count = len(program.read_text().splitlines())
    expected = dict(enumerate(MISTAKES.values(), count - len(MISTAKES) + 1))
    assert reported.keys() == expected.keys(), said
    for number, word in expected.items():
        assert word in reported[number], reported[number]


def test_mypy_strict_sees_the_mistakes_alone(program: Path) -> None:
    said = check("mypy", "adaqn_cuda", "examples", str(program))
    assert_only_mistakes_are_reported(said, program)


def test_pyright_sees_the_mistakes_alone(program: Path) -> None:
    said = check("basedpyright", "--pythonpath", sys.executable, "adaqn_cuda", str(program))
    assert_only_mistakes_are_reported(said, program)
