"""Seconds of a run, on a machine that does nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm

from ..ledger import Ledger, key_of
from ..protocol import Plain
from .runs import execute
from .tasks import SEEDS


def definition(study: Plain) -> dict[str, Any]:
    """What a timing belongs to."""
    return {"task": study.task.definition(), "method": study.method.definition()}


def measure(studies: Iterable[Plain], ledger: Ledger) -> None:
    """Repeat a run of each finished study that has no timing yet, on one thread."""
    torch.set_num_threads(1)
    timed = {key_of(record["definition"]) for record in ledger.timings()}
    ready = [s for s in studies if s.finished(ledger) and key_of(definition(s)) not in timed]
    for study in tqdm(ready, unit="run", dynamic_ncols=True):
        result = execute(study.run(study.best(ledger), SEEDS[0]))
        kept = {name: result[name] for name in ("evaluations", "seconds", "processor_seconds")}
        record = {"kind": "time", "definition": definition(study), "curve": result["curve"], **kept}
        ledger.add(record)
        each = 1000 * result["seconds"] / result["evaluations"]
        tqdm.write(f"{study.task.name:14} {study.method.name:24} {each:.3f} ms an evaluation")
