"""The report people read: tables of losses and errors, then a section for each problem."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import adaqn_cuda
from adaqn_cuda.demo.numbers import write_json

from ..ledger import Ledger
from ..report import ABSENT, filled, markdown, rounded
from . import pictures
from .methods import METHODS
from .tables import TARGET, Table, collect
from .tasks import MARKS, SEEDS, TASKS

NAME = "deterministic"
COMMAND = "python bench/deterministic.py report --work runs.jsonl"
#: Points of a curve that are kept in the numbers.
POINTS = 10


def write(ledger: Ledger, folder: Path) -> list[Path]:
    """Write JSON, pictures and text to ``folder``; the files written."""
    results = collect(ledger)
    if not results:
        raise SystemExit(f"{ledger.path}: no method is finished on any of the problems")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for budget, tables in results.items():
        drawn.append(folder / f"{NAME}-{budget}.png")
        pictures.draw(tables, drawn[-1])
    text = folder / f"{NAME}.md"
    text.write_text(report(results))
    numbers = folder / f"{NAME}.json"
    content = {
        "command": COMMAND,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {"adaqn_cuda": adaqn_cuda.__version__, "torch": torch.__version__},
        "budgets": {str(budget): thinned(tables) for budget, tables in results.items()},
    }
    write_json(numbers, rounded(content))
    return [numbers, text, *drawn]


def thinned(tables: dict[str, Table]) -> Any:
    """The same, with fewer points to a curve."""
    every = max(1, MARKS // POINTS)

    def entry(found: Table) -> Table:
        curves = [curve[::-1][::every][::-1] for curve in found["curves"]]
        return {**found, "curves": curves, "timed_curve": None}

    return {
        name: {**table, "methods": {m: entry(e) for m, e in table["methods"].items()}}
        for name, table in tables.items()
    }


def report(results: dict[int, dict[str, Table]]) -> str:
    parts = [introduction(results)]
    for budget, tables in results.items():
        parts.append(f"## {budget:,} evaluations")
        parts.append(f"![Loss over evaluations and seconds]({NAME}-{budget}.png)")
        parts.append(summary(tables, "loss", "Median loss"))
        parts.append(leads(tables))
        parts.append(summary(tables, "error", "Median error"))
        parts += [section(name, table) for name, table in tables.items()]
    return "\n\n".join(parts) + "\n"


def introduction(results: dict[int, dict[str, Table]]) -> str:
    entries = [e for ts in results.values() for t in ts.values() for e in t["methods"].values()]
    quiet = sum(e["ms"] is not None for e in entries)
    clock = (
        "Milliseconds are those of an evaluation with all that the method does for it, on one "
        "thread of a machine that does nothing else, where `time` has measured them"
        + (
            "; the others, in brackets, are of the processor in runs beside other work, which "
            "says little."
            if quiet < len(entries)
            else "."
        )
    )
    if not quiet:
        clock = """Milliseconds, in brackets, are those of the processor for an evaluation and all
        that the method does for it, on one thread **beside other work on the same cores**: they
        show orders of magnitude, and no more. `time` measures them on a quiet machine."""
    paragraphs = (
        f"Written by `{COMMAND}`; the numbers are in [{NAME}.json]({NAME}.json).",
        f"""All problems are in float64, and all data is in every evaluation. A run may evaluate
        loss and gradient so many times, trials of line searches included; what counts is the lowest
        loss among them, and the error at that point. Numbers are medians over seeds
        {", ".join(map(str, SEEDS))}, which set initial parameters and points. Methods without a
        line search have their lr tuned on seed 0, over three points a factor of 2.5 apart that
        grow while the best is at an edge, at most twice each way. lr warms up over the first 5 % of
        the evaluations and falls linearly to zero.""",
        f"""`k-ss` is `LBFGS(params, **DETERMINISTIC)`: self-scaled pairs, up to 1000, on the
        Kronecker matrix, with Armijo's rule. The names below it say what is different: the search
        (`wolfe`), pairs without scaling (`k`), a scalar matrix (`scalar`), fewer pairs. `k alone`
        is the matrix and the search without pairs, at a tuned lr. `lbfgs-10`, `lbfgs-100` are
        torch's, with the strong Wolfe search, and `{TARGET}` is what leads are measured against;
        `adam, lbfgs-100` spends the first quarter on Adam at a tuned lr. `dense` keeps the whole
        inverse Hessian; these three and `soap` are written from their papers. `adaqn` is AdaQN's
        default and `adaqn, slow` the same with momentum and decay .95.""",
        clock,
    )
    return "\n\n".join(("# Deterministic problems", *map(filled, paragraphs), problems()))


def problems() -> str:
    rows = [[f"`{name}`", task.title, words(task.make.__doc__)] for name, task in TASKS.items()]
    rows = [[*row[:2], row[2], sizes(name)] for row, name in zip(rows, TASKS, strict=True)]
    return markdown(["problem", "", "", "options"], rows)


def words(doc: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((doc or "").split("\n\n")[0].split())


def sizes(name: str) -> str:
    return ", ".join(f"{key} {value}" for key, value in TASKS[name].options.items())


# ---------------------------------------------------------------------- tables


def summary(tables: dict[str, Table], figure: str, title: str) -> str:
    """Methods by problems; the best of a column is bold."""
    best = {
        name: min(entry[figure] for entry in table["methods"].values())
        for name, table in tables.items()
    }
    rows = []
    for method in METHODS:
        found = {name: table["methods"].get(method) for name, table in tables.items()}
        if any(found.values()):
            cells = [cell(e and e[figure], best[name]) for name, e in found.items()]
            rows.append([label(method), *cells])
    return f"### {title}\n\n{markdown(['method', *tables], rows)}"


def cell(value: float | None, best: float) -> str:
    if value is None:
        return ABSENT
    return f"**{number(value)}**" if value == best else number(value)


def leads(tables: dict[str, Table]) -> str:
    """How many times lower the loss is than the target's, or higher."""
    rows = []
    for method in METHODS:
        found = [table["methods"].get(method) for table in tables.values()]
        if any(entry and entry["lead"] is not None for entry in found):
            rows.append([label(method), *(lead(entry) for entry in found)])
    title = f"### How many times lower than `{TARGET}`"
    note = "In brackets, the evaluations after which the final loss of that one is reached."
    return f"{title}\n\n{note}\n\n{markdown(['method', *tables], rows)}"


def lead(entry: Table | None) -> str:
    if entry is None or entry["lead"] is None:
        return ABSENT
    after = entry["evaluations_to_target"]
    return f"{entry['lead']:.2g}" + (f" ({after:.0f})" if after is not None else "")


def section(name: str, table: Table) -> str:
    head = ["method", "lr", *(f"seed {seed}" for seed in SEEDS), "error", "stuck at", "ms"]
    by_loss = sorted(table["methods"].items(), key=lambda item: item[1]["loss"])
    rows = [row(method, entry) for method, entry in by_loss]
    missing = ", ".join(f"`{method}`" for method in table["unfinished"])
    rest = f"\n\nNot finished: {missing}." if missing else ""
    return f"### {name}\n\n{verdict(table)}\n\n{markdown(head, rows)}{rest}"


def row(method: str, entry: Table) -> list[str]:
    losses = [number(loss) for loss in entry["losses"]]
    losses += [ABSENT] * (len(SEEDS) - len(losses))
    stuck = [str(at) for at in entry["stopped_at"] if at is not None]
    lr = f"{entry['lr']:g}{' (edge)' if entry['edge'] else ''}" if entry["tuned"] else ABSENT
    return [
        label(method), lr, *losses, number(entry["error"]), ", ".join(stuck) or ABSENT,
        milliseconds(entry),
    ]  # fmt: skip


def milliseconds(entry: Table) -> str:
    if entry["ms"] is not None:
        return f"{entry['ms']:.2g}"
    return ABSENT if entry["busy_ms"] is None else f"({entry['busy_ms']:.2g})"


def label(method: str) -> str:
    return f"**{method}**" if METHODS[method].ours else method


def number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "diverged"


def verdict(table: Table) -> str:
    """One sentence: who is ahead, and of what."""
    sides: dict[bool, tuple[str, Table]] = {}
    for name, entry in table["methods"].items():
        kept = sides.get(entry["ours"])
        if kept is None or entry["loss"] < kept[1]["loss"]:
            sides[entry["ours"]] = name, entry
    if len(sides) < 2:
        name, entry = next(iter(sides.values()))
        return f"Of the methods run so far, `{name}` ends lowest, at {number(entry['loss'])}."
    (ours, mine), (theirs, other) = sides[True], sides[False]
    won = mine["loss"] < other["loss"]
    ratio = max(mine["loss"], other["loss"]) / min(mine["loss"], other["loss"])
    size = f"{ratio:.2g} times higher" if ratio >= 1.05 else "level with it"
    if won:
        return f"`{ours}` is ahead; `{theirs}`, the best of the others, ends {size}."
    return f"This package loses: `{theirs}` is ahead, and `{ours}` ends {size}."
