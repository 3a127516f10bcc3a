"""What the ledger says about each task and method, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy

from .ledger import Ledger, Record, key_of
from .methods import Method
from .protocol import Study, best_rate
from .tasks import TEST_SEEDS, Task
from .timing import definition

#: The target is the best of these, tuned.
REFERENCES = ("adam", "nadam", "rmsprop")
#: Points of a curve that are kept.
POINTS = 20

Curve = list[tuple[float, float]]
Table = dict[str, Any]


def collect(ledger: Ledger, tasks: Sequence[Task], methods: Sequence[Method]) -> dict[str, Table]:
    """Results by task; tasks without any finished method are left out."""
    found = {task.name: of_task(ledger, task, methods) for task in tasks}
    return {name: table for name, table in found.items() if table["methods"] or table["blocks"]}


def of_task(ledger: Ledger, task: Task, methods: Sequence[Method]) -> Table:
    """Every method's losses and times on ``task``, and the target that all are held against."""
    text, table, trials, blocks, unfinished = text_of(ledger, task), {}, {}, {}, []
    for method in (m for m in methods if m.runs_on(task)):
        study = Study(task, method, text)
        if not study.finished(ledger):
            unfinished.append(method.name)
        elif method.block_size is not None:
            blocks[method.name] = of_block_size(ledger, study)
        elif method.trial:
            trials[method.name] = of_tuning(ledger, study)
        else:
            table[method.name] = of_method(ledger, study)
    references = [name for name in REFERENCES if name in table]
    target = min(references, key=lambda name: table[name]["mean"], default=None)
    for entry in table.values():
        add_reach(entry, task, table[target] if target else None)
    return {
        "title": task.title, "metric": task.metric, "stochastic": task.stochastic,
        "definition": task.definition(), "text": text and text["name"], "target": target,
        "unfinished": unfinished, "methods": table, "trials": trials, "blocks": blocks,
    }  # fmt: skip


def text_of(ledger: Ledger, task: Task) -> dict[str, str] | None:
    """The text that ``task`` was last run with."""
    wanted = key_of(task.definition())
    mine = [r for r in ledger.runs() if key_of(r["definition"]["task"]) == wanted]
    return mine[-1]["definition"]["text"] if mine else None


def of_tuning(ledger: Ledger, study: Study) -> Table:
    """The losses at each lr on the tuning seed, and the best of them."""
    losses = study.tuning(ledger)
    lr = best_rate(losses)
    return {
        "ours": study.method.ours, "options": study.method.definition(), "lr": lr,
        "tuned": study.method.lr is None, "edge": lr in (min(losses), max(losses)),
        "tuning": [list(p) for p in losses.items()],
    }  # fmt: skip


def of_block_size(ledger: Ledger, study: Study) -> Table:
    """A point of the curve over block sizes: tuning on one seed, and what the runs cost."""
    records = [study.find(ledger, run) for run in study.tuning_runs(ledger)]
    steps = sum(record["evaluations"] for record in records)
    return {
        **of_tuning(ledger, study), "state_bytes": records[0]["state_bytes"],
        "run_ms": 1000 * sum(record["seconds"] for record in records) / steps,
        **timing_of(ledger, study),
    }  # fmt: skip


def tuned_loss(entry: Table) -> float:
    """The loss on the tuning seed at the lr that was chosen there."""
    return dict(entry["tuning"])[entry["lr"]]


def of_method(ledger: Ledger, study: Study) -> Table:
    """Tuning and test losses of one method, its mean curve for each horizon, its step time."""
    table = of_tuning(ledger, study)
    tests = [] if math.isinf(tuned_loss(table)) else study.tests(ledger, table["lr"])
    records = {(run.horizon, run.seed): study.find(ledger, run) for run in tests}
    horizons = sorted({horizon for horizon, _ in records}, reverse=True)
    curves = {h: mean_curve([records[h, seed] for seed in TEST_SEEDS]) for h in horizons}
    finals = {h: [final_loss(records[h, seed]) for seed in TEST_SEEDS] for h in horizons}
    full = finals.pop(1.0, [math.inf] * len(TEST_SEEDS))
    shorter = {h: study.tuning_shorter(ledger, table["lr"], h) for h in finals}
    return {
        **table, "seeds": list(TEST_SEEDS), "losses": full, "mean": mean(full),
        "shorter": {
            str(h): {"tuning": [list(p) for p in shorter[h].items()], "lr": best_rate(shorter[h]),
                     "losses": finals[h]}
            for h in finals
        },
        "curves": {str(h): thinned(curve) for h, curve in curves.items()},
        "stats": records[1.0, TEST_SEEDS[0]]["stats"] if tests else None,
        "state_bytes": records[1.0, TEST_SEEDS[0]].get("state_bytes") if tests else None,
        **timing_of(ledger, study),
    }  # fmt: skip


def final_loss(record: Record) -> float:
    return math.inf if record["loss"] is None else record["loss"]


def timing_of(ledger: Ledger, study: Study) -> Table:
    """The last timing of this task and method, if there is one."""
    wanted = key_of(definition(study.task, study.method))
    mine = [r for r in ledger.timings() if key_of(r["definition"]) == wanted]
    return {name: mine[-1][name] if mine else None for name in ("ms", "iqr", "threads")}


# ---------------------------------------------------------------------- curves


def mean_curve(records: list[Record]) -> Curve:
    """Mean over seeds, at the points of the first; up to where the shortest ends."""
    curves = [numpy.array([p for p in r["curve"] if math.isfinite(p[1])]) for r in records]
    end = min(curve[-1, 0] for curve in curves)
    steps = [step for step in curves[0][:, 0] if step <= end]
    values = numpy.mean([numpy.interp(steps, *curve.T) for curve in curves], axis=0)
    return [(float(step), float(value)) for step, value in zip(steps, values, strict=True)]


def thinned(curve: Curve) -> Curve:
    """About :data:`POINTS` of its points, the last one among them."""
    every = max(1, len(curve) // POINTS)
    return curve[::-1][::every][::-1]


def crossing(curve: Curve, target: float) -> float | None:
    """Where ``curve`` first comes down to ``target``, between its points on a straight line."""
    above = None
    for step, value in curve:
        if value <= target * (1 + 1e-9):
            if above is None or above[1] <= value:
                return step
            share = (above[1] - max(target, value)) / (above[1] - value)
            return above[0] + share * (step - above[0])
        above = step, value
    return None


def promising(entry: Table, target: Table) -> str:
    """The shortest horizon over which ``entry`` was as good as ``target`` on the tuning seed."""
    wanted = tuned_loss(target)
    good = [horizon for horizon, run in entry["shorter"].items() if tuned_loss(run) <= wanted]
    return min(good, key=float, default="1.0")


def add_reach(entry: Table, task: Task, target: Table | None) -> None:
    """Add to ``entry`` how soon its method is as good as ``target``: steps, seconds, shares.

    A method that was run over shorter horizons counts with the sooner of two curves: of its full
    run, and of the shortest horizon over which it was as good as the target on the tuning seed.
    """
    found = []
    if target is not None and math.isfinite(target["mean"]):
        curves = [entry["curves"].get("1.0"), entry["curves"].get(promising(entry, target))]
        found = [crossing(curve, target["mean"]) for curve in curves if curve]
    steps = min((step for step in found if step is not None), default=None)
    times = entry["ms"] is not None and target is not None and target["ms"] is not None
    entry["steps_to_target"] = steps
    entry["steps_share"] = None if steps is None else steps / task.steps
    entry["seconds"] = None if entry["ms"] is None else task.steps * entry["ms"] / 1000
    wall = steps * entry["ms"] / 1000 if steps is not None and times else None
    entry["seconds_to_target"] = wall
    entry["wall_share"] = None if wall is None else wall / target["seconds"]
