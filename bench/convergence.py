"""Convergence of AdaQN and of other optimizers, lr tuned alike for each.

    python bench/convergence.py run --work runs.jsonl --data tinyshakespeare.txt --words ptb-folder
    python bench/convergence.py time --work runs.jsonl --data ... --words ...
    python bench/convergence.py report --work runs.jsonl

``run`` makes the runs that the ledger lacks, and can be killed and started again at will; ``time``
measures the seconds of a step, on a machine that does nothing else; ``report`` writes
``convergence.json``, ``.md`` and pictures to ``bench/results``.  The ledger knows a method by its
options: begin a new one when the optimizer itself has changed.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from experiments import report, timing
from experiments.ledger import Ledger
from experiments.methods import METHODS
from experiments.pool import Pool
from experiments.protocol import Study, in_order
from experiments.tasks import TASKS, Texts

RESULTS = Path(__file__).parent / "results"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "time", "report"))
    parser.add_argument("--work", type=Path, required=True, metavar="FILE", help="the ledger")
    parser.add_argument("--data", metavar="PATH", help="text for character models")
    parser.add_argument("--words", metavar="PATH", help="text or folder for word models")
    parser.add_argument("--tasks", metavar="A,B", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--methods", metavar="X,Y", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="start no run later")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a try")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    return parser.parse_args()


def chosen(table: dict, names: str | None, what: str) -> list:
    """Entries of ``table`` by their comma-separated names, or all; a comma may be in a name."""
    if names is None:
        return list(table.values())
    found, rest = [], names
    while rest:
        name = max((n for n in table if f"{rest},".startswith(f"{n},")), key=len, default=None)
        if name is None:
            raise SystemExit(f"--{what}: no {rest.split(',')[0]!r}; there are {', '.join(table)}")
        found.append(table[name])
        rest = rest[len(name) + 1 :]
    return found


def main() -> None:
    options = parse()
    tasks = [
        replace(task, steps=max(1, round(options.scale * task.steps)))
        for task in chosen(TASKS, options.tasks, "tasks")
    ]
    methods = chosen(METHODS, options.methods, "methods")
    texts, ledger = Texts(options.data, options.words), Ledger(options.work)
    if options.action == "run":
        studies = [Study(t, m, texts.identity(t)) for t in tasks for m in methods if m.runs_on(t)]
        Pool(in_order(studies), ledger, texts, options.jobs, options.max_minutes).work_off()
    elif options.action == "time":
        for task in tasks:
            timing.measure(task, [m for m in methods if m.runs_on(task)], ledger, texts)
    else:
        command = "python bench/convergence.py report --work runs.jsonl"
        command += f" --scale {options.scale:g}" if options.scale != 1 else ""
        command += f" --tasks {options.tasks}" if options.tasks else ""
        command += f' --methods "{options.methods}"' if options.methods else ""
        for path in report.write(ledger, tasks, methods, options.results, command):
            print(path)


if __name__ == "__main__":
    main()
