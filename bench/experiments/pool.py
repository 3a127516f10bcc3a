"""Makes the runs that are missing, some at a time, and writes each down as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from .ledger import Ledger, key_of
from .methods import METHODS
from .protocol import Study
from .tasks import TASKS, Texts
from .training import Run, execute


def prepare_worker() -> None:
    torch.set_num_threads(1)


def work(task: str, steps: int, method: str, settings: tuple[Any, ...], path: str | None) -> Any:
    """What a worker does; takes names, since the functions in a method cannot travel."""
    return execute(Run(replace(TASKS[task], steps=steps), METHODS[method], *settings), path)


Work = Callable[[str, int, str, tuple[Any, ...], str | None], Any]


class Pool:
    """Works off studies, in their order.

    Args:
        studies: what is wanted.
        ledger: what has been done.
        texts: where the texts are.
        processes: runs at a time, each with one thread.
        max_minutes: no run is started after so many minutes.
        work: what a worker does.
    """

    def __init__(
        self,
        studies: list[Study],
        ledger: Ledger,
        texts: Texts,
        processes: int,
        max_minutes: float,
        work: Work = work,
    ) -> None:
        self.studies, self.ledger, self.texts, self.work = studies, ledger, texts, work
        self.processes, self.deadline = processes, time.monotonic() + 60 * max_minutes
        self.flying: dict[Future[Any], tuple[Study, Run]] = {}
        self.failed: list[Study] = []

    def work_off(self) -> None:
        """Run until nothing is missing, or time is up."""
        context = get_context("spawn")
        with (
            ProcessPoolExecutor(self.processes, context, prepare_worker) as pool,
            tqdm(unit="run", dynamic_ncols=True) as bar,
        ):
            self._fill(pool)
            while self.flying:
                self._show(bar)
                done, _ = wait(self.flying, return_when=FIRST_COMPLETED)
                for future in done:
                    self._write_down(future, bar)
                self._fill(pool)
            self._show(bar)

    def _fill(self, pool: ProcessPoolExecutor) -> None:
        """Start the next runs, up to the number of processes."""
        while len(self.flying) < self.processes and time.monotonic() < self.deadline:
            found = self._next()
            if found is None:
                return
            study, run = found
            names = (run.task.name, run.task.steps, run.method.name)
            settings, path = (run.lr, run.seed, run.horizon), self.texts.path(run.task)
            future = pool.submit(self.work, *names, settings, path)
            self.flying[future] = found

    def _next(self) -> tuple[Study, Run] | None:
        flying = {key_of(run.definition(study.text)) for study, run in self.flying.values()}
        for study in self._open():
            for run in study.missing(self.ledger):
                if key_of(run.definition(study.text)) not in flying:
                    return study, run
        return None

    def _open(self) -> list[Study]:
        """Studies that have not failed; those are left for another time."""
        return [study for study in self.studies if study not in self.failed]

    def _write_down(self, future: Future[Any], bar: tqdm) -> None:
        study, run = self.flying.pop(future)
        if future.exception() is not None:
            self.failed.append(study)
            bar.write(f"{run.task.name}, {run.method.name} FAILED: {future.exception()!r:.200}")
            return
        result = future.result()
        self.ledger.add({"kind": "run", "definition": run.definition(study.text), **result})
        loss = "diverged" if result["loss"] is None else f"{result['loss']:.4g}"
        bar.write(
            f"{run.task.name:13} {run.method.name:16} lr {run.lr:<8g} seed {run.seed} "
            f"horizon {run.horizon:<4g} {loss:>9}  {result['seconds']:.0f} s"
        )
        bar.update()

    def _show(self, bar: tqdm) -> None:
        """Runs to go and the time they will take, as far as can be known."""
        runs = [(study, count) for study in self._open() if (count := expected(study, self.ledger))]
        seconds = sum(count * self._seconds(study) for study, count in runs) / self.processes
        bar.total = bar.n + sum(count for _, count in runs)
        bar.set_postfix_str(f"about {seconds / 60:.0f} min to go")
        bar.refresh()

    def _seconds(self, study: Study) -> float:
        """What runs of this study have taken, or are thought to take."""
        done = [study.find(self.ledger, run) for run in study.tuning_runs(self.ledger)]
        return mean(record["seconds"] for record in done) if done else study.task.seconds


def expected(study: Study, ledger: Ledger) -> int:
    """Runs that ``study`` still needs, as far as can be known."""
    missing, tuned = len(study.missing(ledger)), len(study.tuning(ledger))
    return max(missing, study.most_runs() - tuned) if tuned < len(study.grid()) else missing
