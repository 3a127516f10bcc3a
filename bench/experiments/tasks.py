"""The tasks: what is solved, for how many steps, and what one run costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .deterministic import Poisson, least_squares, regression
from .language import LanguageModelling, corpus_at
from .problem import Problem

#: Seeds: the first one tunes lr, the others are never looked at for that.
TUNING_SEED, TEST_SEEDS = 0, (1, 2)


@dataclass(frozen=True)
class Task:
    """A family of problems, one for each seed.

    Args:
        name: unique.
        title: what it is, for people.
        make: builds a problem from ``options``, a seed and the path of the text.
        options: all that determines the problem but seed and text.
        steps: evaluations of the gradient in a run of full length.
        seconds: what a run takes on one core, about.
        evaluations: looks at the metric during a run.
        clip: bound on the norm of the gradient.
        weight_decay: decoupled, for every method.
        patience: steps on end with a far too large loss that end a run; without noise a loss may
            jump up and come back.
        seeds: those of the runs that count, on which lr is not tuned.
    """

    name: str
    title: str
    make: Callable[[dict[str, Any], int, str | None], Problem]
    options: dict[str, Any]
    steps: int
    seconds: float
    evaluations: int = 10
    clip: float | None = None
    weight_decay: float = 0.0
    patience: int = 1
    seeds: tuple[int, ...] = TEST_SEEDS

    @property
    def stochastic(self) -> bool:
        return self.make is LanguageModelling

    @property
    def metric(self) -> str:
        return {
            LanguageModelling: "validation loss, nats per symbol",
            Poisson: "loss",
        }.get(self.make, "loss above the optimum")

    def build(self, seed: int, path: str | None = None) -> Problem:
        """The problem of ``seed``, the same one whenever it is asked for."""
        return self.make(self.options, seed, path)

    def definition(self) -> dict[str, Any]:
        """All that a result depends on, as JSON."""
        return {
            "name": self.name, "steps": self.steps, "clip": self.clip,
            "evaluations": self.evaluations, **self.options,
            **({"patience": self.patience} if self.patience > 1 else {}),
            **({"weight_decay": self.weight_decay} if self.weight_decay else {}),
        }  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Where the texts are; the standard library's sources if ``None``."""

    char: str | None = None
    word: str | None = None

    def path(self, task: Task) -> str | None:
        return getattr(self, task.options["level"]) if task.stochastic else None

    def identity(self, task: Task) -> dict[str, str] | None:
        """Name and fingerprint of the task's text, the same wherever the text lies."""
        if not task.stochastic:
            return None
        corpus = corpus_at(self.path(task), task.options["level"])
        return {"name": corpus.name, "fingerprint": corpus.fingerprint}


def _language(
    name: str,
    title: str,
    steps: int,
    seconds: float,
    evaluations: int = 10,
    weight_decay: float = 0.0,
    **options: Any,
) -> Task:
    options = {"level": "char", "batch": 32, "bptt": 35, "carry": True, **options}
    return Task(
        name,
        title,
        LanguageModelling,
        options,
        steps,
        seconds,
        evaluations,
        clip=1.0,
        weight_decay=weight_decay,
    )


#: Without noise: more looks at the metric, which is cheap, and a loss may jump up and come back.
_SMOOTH = {"evaluations": 50, "patience": 100}

_ALL = (
    Task(
        "least-squares", "ill-conditioned linear fit, 60 unknowns, float64", least_squares,
        dict(rows=300, columns=60, decades=2.5), 1000, 0.5, **_SMOOTH,
    ),
    Task(
        "regression", "multinomial regression, ill-scaled features, float64", regression,
        dict(rows=400, features=30, classes=5, decades=2.5, l2=1e-4), 1000, 0.6, **_SMOOTH,
    ),
    Task(
        "pinn", "physics-informed network for a Poisson equation, float64", Poisson,
        dict(points=101, width=32, layers=3, k=2, boundary=10.0), 2000, 4.0, **_SMOOTH,
    ),
    _language("tanh", "Elman network, 128 units", 600, 6, model="tanh", hidden=128),
    _language(
        "irnn", "ReLU network from the identity, 128 units", 600, 4,
        model="irnn", hidden=128, carry=False,
    ),
    _language("gru", "GRU, 128 units", 500, 8, model="gru", hidden=128),
    _language("lstm", "LSTM, 128 units", 600, 8, model="lstm", hidden=128),
    _language(
        "transformer", "transformer, 2 layers of width 64", 250, 8,
        model="transformer", width=64, heads=4, layers=2, bptt=64, carry=False,
    ),
    _language(
        "transformer-256", "transformer, 2 layers of width 256", 200, 90, evaluations=4,
        weight_decay=0.1, model="transformer", width=256, heads=4, layers=2, bptt=64, carry=False,
    ),
    _language(
        "transformer-512", "transformer, 2 layers of width 512", 120, 240, evaluations=4,
        weight_decay=0.1, model="transformer", width=512, heads=8, layers=2, bptt=64, carry=False,
    ),
    _language(
        "tanh-512", "Elman network, 128 units, batch 512", 200, 9,
        model="tanh", hidden=128, batch=512, bptt=20,
    ),
    _language(
        "lstm-512", "LSTM, 128 units, batch 512", 100, 11,
        model="lstm", hidden=128, batch=512, bptt=20,
    ),
    _language(
        "lstm-word", "LSTM on words, 64 units", 240, 22,
        model="lstm", level="word", hidden=64, batch=20, bptt=35, evaluations=7,
    ),
)  # fmt: skip

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
