"""What the ledger says about each problem, budget and method, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from statistics import median
from typing import Any

from ..ledger import Ledger, Record, key_of
from ..protocol import Plain
from ..results import crossing
from ..tasks import Task
from .methods import METHODS
from .tasks import SEEDS, TASKS
from .timing import definition

#: What the others are held against.
TARGET = "lbfgs-100"

Table = dict[str, Any]


def collect(ledger: Ledger) -> dict[int, dict[str, Table]]:
    """Results by budget and task; what has no finished method is left out."""
    budgets = sorted({r["definition"]["task"]["steps"] for r in ledger.runs()})
    found: dict[int, dict[str, Table]] = {}
    for budget in budgets:
        tables = {name: of_task(ledger, replace(t, steps=budget)) for name, t in TASKS.items()}
        found[budget] = {name: table for name, table in tables.items() if table["methods"]}
    return {budget: tables for budget, tables in found.items() if tables}


def of_task(ledger: Ledger, task: Task) -> Table:
    methods, unfinished = {}, []
    for method in METHODS.values():
        study = Plain(task, method, None)
        if study.finished(ledger):
            methods[method.name] = of_method(ledger, study)
        else:
            unfinished.append(method.name)
    target = methods.get(TARGET)
    for entry in methods.values():
        entry["lead"] = target["loss"] / entry["loss"] if target else None
        entry["evaluations_to_target"] = reach(entry["curves"], target["loss"]) if target else None
    return {
        "title": task.title, "definition": task.definition(), "methods": methods,
        "unfinished": unfinished,
    }  # fmt: skip


def of_method(ledger: Ledger, study: Plain) -> Table:
    """Losses and errors by seed, their medians, and what an evaluation takes."""
    tuning = study.tuning(ledger)
    lr = study.best(ledger)
    records = [study.find(ledger, study.run(lr, seed)) for seed in SEEDS]
    records = [record for record in records if record is not None]
    losses = [math.inf if r["loss"] is None else r["loss"] for r in records] or [math.inf]
    errors = [r["error"] for r in records] or [math.inf]
    return {
        "ours": study.method.ours, "options": study.method.definition(), "lr": lr,
        "tuned": study.method.lr is None, "tuning": [list(p) for p in tuning.items()],
        "edge": bool(tuning) and lr in (min(tuning), max(tuning)),
        "losses": losses, "loss": median(losses), "errors": errors, "error": median(errors),
        "stopped_at": [r["stopped_at"] for r in records],
        "iterations": [r["stats"] and r["stats"].get("iterations") for r in records],
        "state_bytes": records[0]["state_bytes"] if records else None,
        "curves": [r["curve"] for r in records],
        "busy_ms": mean_ms(records, "processor_seconds"),
        **timing_of(ledger, study),
    }  # fmt: skip


def mean_ms(records: Iterable[Record], kind: str) -> float | None:
    """Milliseconds of an evaluation and all that the method does for it."""
    records = list(records)
    evaluations = sum(r["evaluations"] for r in records)
    return 1000 * sum(r[kind] for r in records) / evaluations if evaluations else None


def timing_of(ledger: Ledger, study: Plain) -> Table:
    """The last timing on a quiet machine, if there is one."""
    wanted = key_of(definition(study))
    mine = [r for r in ledger.timings() if key_of(r["definition"]) == wanted][-1:]
    return {"ms": mean_ms(mine, "seconds"), "timed_curve": mine[0]["curve"] if mine else None}


def reach(curves: list[list[list[float]]], target: float) -> float | None:
    """Evaluations after which a loss is reached, median over the seeds, infinite as ``None``."""
    found = [crossing([(p[0], p[1]) for p in curve], target) for curve in curves]
    middle = median(math.inf if x is None else x for x in found) if found else math.inf
    return middle if math.isfinite(middle) else None
