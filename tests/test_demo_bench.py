"""The ledger of ``bench/language_models.py``: what counts as the same run."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "language_models.py"
TASK = dict(level="char", model="lstm", hidden=8, batch=2, bptt=4, steps=2)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("language_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def record(bench, job, task=TASK, data="text.txt", valid=1.0):
    config = bench.asdict(bench.config_of(job, task, data))
    return {"job": bench.asdict(job), "result": {"config": config, "valid": valid}}


def test_a_run_of_another_length_or_text_does_not_count(bench, tmp_path):
    job, path = bench.Job("adam", 0.005, 0), tmp_path / "work.jsonl"
    bench.Ledger(path, TASK, "text.txt").add(record(bench, job))
    assert bench.Ledger(path, TASK, "text.txt").find(job)["valid"] == 1.0
    for task, data in (({**TASK, "steps": 3}, "text.txt"), (TASK, "other.txt")):
        assert bench.Ledger(path, task, data).find(job) is None


def test_a_line_cut_off_by_a_kill_is_run_again(bench, tmp_path):
    first, second = (bench.Job("adam", lr, 0) for lr in (0.005, 0.01))
    path = tmp_path / "work.jsonl"
    bench.Ledger(path, TASK, "text.txt").add(record(bench, first))
    with path.open("a") as file:
        file.write('{"job": {"meth')
    ledger = bench.Ledger(path, TASK, "text.txt")
    assert ledger.find(first) and not ledger.find(second)
    ledger.add(record(bench, second))
    assert bench.Ledger(path, TASK, "text.txt").find(second)


def test_a_diverged_run_is_never_the_best(bench, tmp_path):
    ledger = bench.Ledger(tmp_path / "work.jsonl", TASK, "text.txt")
    grid = bench.METHODS["adam"][1]
    for lr, valid in zip(grid, (math.nan, 2.0, 1.5, math.inf, 1.9), strict=True):
        ledger.add(record(bench, bench.Job("adam", lr, 0), valid=valid))
    assert bench.best_rate("adam", ledger, 0) == grid[2]
    assert bench.at_edge("adam", grid[0]) and not bench.at_edge("adam", grid[2])


def test_methods_get_equally_many_grid_points(bench):
    assert len({len(grid) for _, grid, _ in bench.METHODS.values()}) == 1
