"""Final losses of adaQN as published and of first-order methods, lr tuned alike for each.

    python bench/language_models.py --task char --data tinyshakespeare.txt
    python bench/language_models.py --task word --data ptb-folder

Every method gets the same number of grid points; the best on the first seed is then run on the
others.  A finished run is one line of ``--work FILE``, so that the script can be killed and
started again at will.  The result is one JSON file and one picture in ``bench/results``.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import adaqn_cuda
from adaqn_cuda.demo.data import load_corpus
from adaqn_cuda.demo.models import KINDS
from adaqn_cuda.demo.numbers import write_json
from adaqn_cuda.demo.plots import plot_comparison
from adaqn_cuda.demo.train import Config, Diverged, Result, Run

RESULTS = Path(__file__).parent / "results"
MONITOR = 256
NEVER = 10**9
EVALUATIONS = 6

#: Method: its optimizer, the lr grid, further options of :class:`Config`.
METHODS: dict[str, tuple[str, list[float], dict[str, Any]]] = {
    "adaqn (PAPER)": ("adaqn", [0.004, 0.01, 0.025, 0.06, 0.15], {"preset": "paper"}),
    "adaqn (PAPER, monitor)": (
        "adaqn",
        [0.004, 0.01, 0.025, 0.06, 0.15],
        {"preset": "paper", "monitor": MONITOR},
    ),
    "adaqn (PAPER, pairs off)": (
        "adaqn",
        [0.004, 0.01, 0.025, 0.06, 0.15],
        {"preset": "paper", "adaqn": {"update_interval": NEVER}},
    ),
    "adam": ("adam", [0.002, 0.005, 0.0125, 0.03, 0.07], {}),
    "nadam": ("nadam", [0.002, 0.005, 0.0125, 0.03, 0.07], {}),
    "rmsprop": ("rmsprop", [0.0015, 0.004, 0.01, 0.025, 0.06], {}),
    "adagrad": ("adagrad", [0.02, 0.05, 0.125, 0.3, 0.75], {}),
}

#: Tasks: the options of :class:`Config` that make them.
TASKS: dict[str, dict[str, Any]] = {
    "char": dict(level="char", hidden=128, batch=32, bptt=50, steps=600),
    "word": dict(level="word", hidden=64, batch=20, bptt=35, steps=200),
}


@dataclass(frozen=True)
class Job:
    """One run: a method at one lr and seed."""

    method: str
    lr: float
    seed: int


def config_of(job: Job, task: dict[str, Any], data: str) -> Config:
    optimizer, _, options = METHODS[job.method]
    common = dict(optimizer=optimizer, data=data, lr=job.lr, seed=job.seed)
    return Config(**{**common, **task, **options})


def execute(job: Job, task: dict[str, Any], data: str) -> dict[str, Any]:
    """Run ``job`` in this process; its losses are infinite if it diverged."""
    torch.set_num_threads(1)
    config = config_of(job, task, data)
    run = Run(config, load_corpus(data, config.level))
    try:
        result = run.train(evaluate_every=max(1, config.steps // EVALUATIONS))
    except Diverged:
        result = run.result
        result.train = result.valid = float("inf")
    return {"job": asdict(job), "result": asdict(result)}


class Ledger:
    """Finished runs of ``task`` on ``data``, one JSON line each.

    Lines of other tasks, lengths or data may stand in the same file and are left alone.  A last
    line without its end was cut off by a kill, and is dropped.
    """

    def __init__(self, path: Path, task: dict[str, Any], data: str) -> None:
        self.path, self.task, self.data = path, task, data
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        self.records = [json.loads(line) for line in whole.splitlines()]

    def find(self, job: Job) -> dict[str, Any] | None:
        wanted = asdict(config_of(job, self.task, self.data))
        return next((r["result"] for r in self.records if r["result"]["config"] == wanted), None)

    def loss(self, job: Job) -> float:
        """Final validation loss; infinite where it is not a number."""
        valid = self.find(job)["valid"]
        return valid if math.isfinite(valid) else math.inf

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def run_all(jobs: list[Job], ledger: Ledger, processes: int) -> None:
    """Run what the ledger lacks, ``processes`` at a time."""
    missing = [job for job in jobs if ledger.find(job) is None]
    with ProcessPoolExecutor(processes) as pool, tqdm(total=len(missing), unit="run") as bar:
        futures = [pool.submit(execute, job, ledger.task, ledger.data) for job in missing]
        for future in as_completed(futures):
            record = future.result()
            ledger.add(record)
            bar.set_postfix_str(f"{record['job']['method']} {record['result']['valid']:.3f}")
            bar.update()


def best_rate(method: str, ledger: Ledger, seed: int) -> float:
    """The grid's lr with the lowest validation loss on ``seed``."""
    grid = METHODS[method][1]
    return min(grid, key=lambda lr: ledger.loss(Job(method, lr, seed)))


def at_edge(method: str, lr: float) -> bool:
    """Whether the grid stops at ``lr``, so that the best one may lie beyond it."""
    grid = METHODS[method][1]
    return lr in (min(grid), max(grid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", required=True, metavar="PATH")
    parser.add_argument("--model", choices=KINDS, default="lstm")
    parser.add_argument("--steps", type=int, help="default: the task's own")
    parser.add_argument("--seeds", default="0,1", help="the first one tunes lr")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, metavar="FILE", help="ledger of finished runs")
    options = parser.parse_args()
    task = {**TASKS[options.task], "model": options.model}
    task["steps"] = options.steps or task["steps"]
    seeds = [int(word) for word in options.seeds.split(",")]
    name = f"language-model-{options.task}" + (f"-{options.model}" * (options.model != "lstm"))
    ledger = Ledger(options.work or Path(f"{name}.jsonl"), task, options.data)

    tuning = [Job(m, lr, seeds[0]) for m, (_, grid, _) in METHODS.items() for lr in grid]
    run_all(tuning, ledger, options.jobs)
    rates = {method: best_rate(method, ledger, seeds[0]) for method in METHODS}
    final = [Job(m, rates[m], seed) for m in METHODS for seed in seeds]
    run_all(final, ledger, options.jobs)
    write(name, ledger, tuning, final, rates)


def write(
    name: str,
    ledger: Ledger,
    tuning: list[Job],
    final: list[Job],
    rates: dict[str, float],
) -> None:
    """The JSON file, the table on the screen, and the picture of the first seed."""

    def record(job: Job) -> dict[str, Any]:
        result = ledger.find(job)
        kept = ("train", "valid", "stats", "parameters", "vocabulary", "data")
        # Runs share the machine: their seconds say nothing.
        curve = [{k: r[k] for k in ("step", "train", "valid")} for r in result["curve"]]
        return {**asdict(job), **{key: result[key] for key in kept}, "curve": curve}

    versions = {"adaqn_cuda": adaqn_cuda.__version__, "torch": torch.__version__}
    # The data's place is the user's own business: only its name is written down.
    words = [w.replace(ledger.data, Path(ledger.data).name) for w in sys.argv[1:]]
    content = {
        "command": shlex.join(["python", "bench/language_models.py", *words]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": versions,
        "task": ledger.task,
        "grids": {method: grid for method, (_, grid, _) in METHODS.items()},
        "best_lr": rates,
        "best_lr_at_grid_edge": [m for m in METHODS if at_edge(m, rates[m])],
        "final": [record(job) for job in final],
        "tuning": [{**asdict(job), "valid": ledger.loss(job)} for job in tuning],
    }
    write_json(RESULTS / f"{name}.json", content)
    for method in METHODS:
        losses = [f"{ledger.loss(job):.3f}" for job in final if job.method == method]
        edge = "  (lr at the edge of its grid)" if at_edge(method, rates[method]) else ""
        print(f"{method:26} lr {rates[method]:<7g} valid {'  '.join(losses)}{edge}")
    shown = ("adaqn (PAPER)", "adam", "nadam", "rmsprop", "adagrad")
    first = [Job(m, rates[m], final[0].seed) for m in shown]
    plot_comparison(
        [Result(**ledger.find(job)) for job in first], RESULTS / f"{name}.png", over=("step",)
    )


if __name__ == "__main__":
    main()
