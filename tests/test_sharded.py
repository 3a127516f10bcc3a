"""Parameters divided among processes: every step is that of one process."""

from __future__ import annotations

import pytest
import torch
from processes import in_processes
from sharded_cases import CASES, alone, together


@pytest.mark.parametrize("count", [2, 3])
def test_shards_step_as_one_process_does(count, tmp_path):
    """In every case the parameters are those of one process, and the words the same everywhere."""
    runs = in_processes(count, together, tmp_path, list(CASES))
    wrong = {}
    for name in CASES:
        expected, found = alone(name, count), [run[name] for run in runs]
        scale = max(p.abs().max() for p in expected.params)
        error = max(
            (p - q).abs().max() / scale
            for p, q in zip(found[0].params, expected.params, strict=True)
        )
        words = [tuple(w.view(torch.int64).flatten().tolist() for w in f.words.values()) for f in found]
        if not error < 1e-9 or found[0].stats != expected.stats or len(set(map(str, words))) > 1:
            wrong[name] = (error.item(), found[0].stats, expected.stats, len(set(map(str, words))))
    assert not wrong
