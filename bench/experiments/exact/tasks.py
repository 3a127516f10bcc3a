"""The problems of the second record, and how many evaluations a run may make."""

from __future__ import annotations

from dataclasses import replace

from ..tasks import Task
from .equations import AllenCahn, Burgers, Helmholtz
from .fits import Autoencoder, Classification, Field

#: Seeds whose results count; lr is tuned on another one.
SEEDS = (1, 2, 3)
#: Evaluations of loss and gradient in a run.
BUDGETS = (1_000, 10_000)
#: Of a run, points at which loss and time are kept.
MARKS = 50

_ALL = (
    Task(
        "burgers", "Burgers' equation", Burgers,
        dict(points=1000, edge=40, weight=10.0, width=20, layers=3), 1000, 20,
    ),
    Task(
        "allen-cahn", "the Allen-Cahn equation", AllenCahn,
        dict(points=1000, edge=128, weight=100.0, width=20, layers=3), 1000, 20,
    ),
    Task(
        "helmholtz", "Helmholtz' equation", Helmholtz,
        dict(points=1000, edge=25, weight=100.0, width=24, layers=3, a=1, b=4, k=1.0), 1000, 20,
    ),
    Task(
        "poisson", "Poisson's equation", Helmholtz,
        dict(points=600, edge=25, weight=100.0, width=20, layers=3, a=1, b=2, k=0.0), 1000, 12,
    ),
    Task(
        "field", "a picture by a network of its coordinates", Field,
        dict(side=64, waves=32, frequency=2.0, width=32, layers=2), 1000, 25,
    ),
    Task("classification", "multinomial regression of digits", Classification,
         dict(l2=1e-4), 1000, 5),
    Task("autoencoder", "an autoencoder of digits", Autoencoder,
         dict(rows=1000, sizes=[32, 10, 32]), 1000, 15),
)  # fmt: skip

TASKS: dict[str, Task] = {task.name: replace(task, seeds=SEEDS) for task in _ALL}
