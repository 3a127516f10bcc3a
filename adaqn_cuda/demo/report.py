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
from . import bench, fit
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
    print(
        f"model  {run.config.model}, {result.parameters:,} parameters, on {run.config.device}"
        + _division(run.config, result.processes)
    )


def _division(config: Config, processes: int) -> str:
    """What each of several processes has."""
    if processes == 1:
        return ""
    state = "the state is divided" if config.shard_state else "each has all of it"
    what = "parameters and state are divided" if config.fsdp else state
    return f", in {processes} processes: {what}"


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


def introduce_bench(run: bench.Bench) -> None:
    config = run.config
    of = "tensors of --sizes" if config.sizes else f"tensors of {config.model}"
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    print(
        f"{run.numel:,} parameters in {len(run.shapes):,} {of}, {config.dtype}, on "
        f"{config.device}{threads}"
    )


def bench_table(run: bench.Bench) -> str:
    against = f"x {run.config.against}"
    head = f"{'optimizer':14} {'us/step':>9} {'quartiles':>17} {'longest':>9} {against:>9} "
    head += f"{'bytes/param':>11}"
    lines = [head, "-" * len(head)]
    rows = {row.name: row for row in run.measured()}
    rival = rows.get(run.config.against)
    for row in rows.values():
        low, high = row.spread
        ratio = "" if rival is None else f"{row.ratio_to(rival):.2f}"
        lines.append(
            f"{row.name:14} {row.median:9,.0f} {f'{low:,.0f}..{high:,.0f}':>17} {row.worst:9,.0f} "
            f"{ratio:>9} {row.state:11.1f}"
        )
    return "\n".join(lines)


def _loss(value: float, width: int) -> str:
    return f"{value:{width}.3f}" if value < 1e5 else f"{value:{width}.1e}"


def write(
    options: argparse.Namespace, command: str, results: Sequence[Result | fit.Result | bench.Bench]
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
