"""What two processes do that train by the demo's command line, in each of its ways."""

from __future__ import annotations

import io
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from adaqn_cuda.demo import cli
from adaqn_cuda.demo.train import Result, Run

MODES = {"replicas": [], "state": ["--shard-state"], "rows": ["--fsdp"]}


@dataclass
class Outcome:
    """What a command leaves: its exit code, what it said, and what it would show and write."""

    code: int
    out: str
    err: str
    results: list[Result]
    plots: int

    def losses(self) -> list[float]:
        """Validation losses of all steps, and the training loss in the end."""
        [result] = self.results
        return [*(record["valid"] for record in result.curve), result.train]


def small(text: str) -> list[str]:
    """Words for a run with pairs, on four streams; there are three to validate on."""
    words = f"--data {text} --steps 5 --batch 4 --bptt 24 --hidden 12 --warmup 0"
    return f"{words} --history-size 2 --update-interval 1 --monitor 2".split()


def train(*words: Any) -> Outcome:
    """``adaqn train``, which draws and writes nothing but checkpoints."""
    found, plots = [], []
    cli.write = lambda options, command, results: found.extend(results)
    cli.draw = lambda plot, path: plots.append(path)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(["train", *map(str, words)])
    return Outcome(code, out.getvalue(), err.getvalue(), found, len(plots))


def interrupted(*words: str) -> Outcome:
    """The same, with Ctrl-C in the middle of the third step of the last process."""
    whole_step = Run._step

    def step(run: Run) -> None:
        if run.step == 2 and run.processes.rank == run.processes.count - 1:
            signal.raise_signal(signal.SIGINT)
        whole_step(run)

    Run._step = step
    try:
        return train(*words)
    finally:
        Run._step = whole_step


def in_two(text: str, folder: str) -> dict[str, dict[str, Outcome]]:
    """Whole runs, and those that are interrupted and go on."""
    rank = dist.get_rank()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_default_dtype(torch.float64)
    outcomes = {}
    for mode, words in MODES.items():
        command, file = [*small(text), *words], f"{folder}/{mode}.pt"
        outcomes[mode] = {
            "whole": train(*command),
            "interrupted": interrupted(*command, "--save", file),
        }
        if rank == 0:
            shutil.copy(file, f"{folder}/{mode}-interrupted.pt")
        outcomes[mode]["resumed"] = train(*command, "--save", file, "--resume")
    return outcomes
