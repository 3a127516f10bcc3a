"""What people see of runs: the opening lines, the table, the file of numbers, the picture."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..version import __version__
from . import fit
from .equations import WIDTHS
from .numbers import write_json
from .plots import PlotUnavailable
from .train import Config, Result, Run


def introduce(run: Run) -> None:
    corpus, result = run.corpus, run.result
    sizes = " / ".join(f"{len(part):,}" for part in (corpus.train, corpus.valid, corpus.test))
    print(
        f"data   {corpus.name}: {sizes} {corpus.level}s to train / validate / test, "
        f"vocabulary {result.vocabulary}, guessing is {math.log(result.vocabulary):.3f} nats"
    )
    print(f"model  {run.config.model}, {result.parameters:,} parameters, on {run.config.device}")


def table(results: list[Result]) -> str:
    unit = next(iter(results[0].summary())).replace("_", " ")
    columns = f"{'train':>7} {'valid':>7} {unit:>18} {'time':>7} {'opt.':>5}"
    head = f"{'optimizer':10} {'lr':>8} {columns}"
    lines = [head, "-" * len(head)]
    for r in results:
        config = Config(**r.config)
        (value,) = r.summary().values()
        lines.append(
            f"{config.optimizer:10} {config.rate:8.4g} {_loss(r.train, 7)} {_loss(r.valid, 7)} "
            f"{_loss(value, 18)} {r.seconds:6.1f}s {r.optimizer_share:5.0%}"
        )
        if r.stats:
            words = ("stored", "skipped", "resets", "steps_skipped", "state_bytes")
            lines.append("  " + ", ".join(f"{w.replace('_', ' ')} {r.stats[w]:,}" for w in words))
        if r.curve[-1]["step"] < config.steps:
            lines.append(f"  stopped after step {r.curve[-1]['step']} of {config.steps}")
    return "\n".join(lines)


def introduce_fit(run: fit.Fit) -> None:
    inside, boundary = len(run.task.inside), len(run.task.boundary)
    points = f"{inside:,} points inside, {boundary:,} on the boundary"
    print(f"problem  {run.task.equation.title}: {points}")
    sides = "-".join(map(str, (2, *WIDTHS, 1)))
    print(f"network  {sides} with tanh, {run.result.parameters:,} parameters, float64, "
          f"on {run.config.device}")  # fmt: skip


def fit_table(results: list[fit.Result]) -> str:
    columns = f"{'loss':>9} {'rel. error':>10} {'evaluations':>11} {'time':>7} {'opt.':>5}"
    head = f"{'optimizer':17} {columns}"
    lines = [head, "-" * len(head)]
    for r in results:
        lines.append(
            f"{r.name:17} {r.loss:9.2e} {r.relative_error:10.2e} {r.evaluations:11,} "
            f"{r.seconds:6.1f}s {r.optimizer_share:5.0%}"
        )
        if r.evaluations < r.config["evaluations"]:
            lines.append(f"  stopped after evaluation {r.evaluations} of {r.config['evaluations']}")
    return "\n".join(lines)


def _loss(value: float, width: int) -> str:
    return f"{value:{width}.3f}" if value < 1e5 else f"{value:{width}.1e}"


def write(
    options: argparse.Namespace, command: str, results: Sequence[Result | fit.Result]
) -> None:
    if options.json is None:
        return
    versions = {"adaqn_cuda": __version__, "torch": torch.__version__}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    runs = [result.record() for result in results]
    content = {"command": command, "date": date, "versions": versions, "runs": runs}
    try:
        write_json(options.json, content)
    except OSError as error:
        raise _unwritten("--json", options.json, error) from error


def draw(plot: Callable[[], None], path: Path) -> None:
    try:
        plot()
        print(f"picture {path}")
    except PlotUnavailable as error:
        print(error, file=sys.stderr)
    except OSError as error:
        raise _unwritten("--plot", path, error) from error


def _unwritten(option: str, path: Path, error: OSError) -> OSError:
    return OSError(f"{option} {path}: {error.strerror}; name another file")
