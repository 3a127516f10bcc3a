"""L-BFGS of this package, its rivals and AdaQN on problems whose loss and gradient are exact.

    python bench/deterministic.py run --work runs.jsonl
    python bench/deterministic.py time --work runs.jsonl
    python bench/deterministic.py report --work runs.jsonl

``run`` makes the runs that the ledger lacks, and can be killed and started again at will; ``time``
repeats one run of each on a machine that does nothing else; ``report`` writes text, numbers and
pictures to ``bench/results/deterministic``.  The digits need scikit-learn
(``pip install ".[bench]"``).  The ledger knows a method by its options: begin a new one when the
optimizer itself has changed.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from convergence import chosen
from experiments.exact import report, timing
from experiments.exact.methods import MAIN, METHODS
from experiments.exact.runs import work
from experiments.exact.tasks import BUDGETS, TASKS
from experiments.ledger import Ledger
from experiments.pool import Pool
from experiments.protocol import Plain
from experiments.tasks import Texts

RESULTS = Path(__file__).parent / "results" / "deterministic"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "time", "report"))
    parser.add_argument("--work", type=Path, required=True, metavar="FILE", help="the ledger")
    parser.add_argument("--tasks", metavar="A,B", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--methods", metavar="X,Y", help=f"of {', '.join(METHODS)}; or 'main'")
    parser.add_argument("--budget", type=int, default=BUDGETS[0], help="evaluations of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="start no run later")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    return parser.parse_args()


def main() -> None:
    options = parse()
    tasks = [
        replace(task, steps=options.budget, seconds=task.seconds * options.budget / task.steps)
        for task in chosen(TASKS, options.tasks, "tasks")
    ]
    names = ",".join(MAIN) if options.methods == "main" else options.methods
    methods, ledger = chosen(METHODS, names, "methods"), Ledger(options.work)
    if options.action == "report":
        for path in report.write(ledger, options.results):
            print(path)
        return
    studies = [Plain(task, method, None) for method in methods for task in tasks]
    if options.action == "run":
        Pool(studies, ledger, Texts(), options.jobs, options.max_minutes, work).work_off()
    else:
        timing.measure(studies, ledger)


if __name__ == "__main__":
    main()
