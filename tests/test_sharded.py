"""Parameters divided among processes: every step is that of one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import in_processes
from sharded_cases import CASES, alone, together
from sharded_lbfgs import of_a_complex_number, searched_alone
from sharded_models import OPTIONS, STATES, batches, fit, in_three, in_two, load, network, strips

from adaqn_cuda import AdaQN

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left their checkpoints."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def of_two(folder, tmp_path_factory):
    return in_processes(2, in_two, tmp_path_factory.mktemp("two"), str(folder))


@pytest.fixture(scope="module")
def of_three(of_two, folder, tmp_path_factory):
    return in_processes(3, in_three, tmp_path_factory.mktemp("three"), str(folder))


@pytest.fixture(params=[2, 3])
def runs(request):
    """What each of two processes has to tell, or each of three."""
    return request.getfixturevalue({2: "of_two", 3: "of_three"}[request.param])


def error_of(found, expected):
    """The largest difference, relative to the largest value."""
    scale = max(p.abs().max() for p in expected)
    return max(((p - q).abs().max() / scale).item() for p, q in zip(found, expected, strict=True))


def bits(words):
    return {name: word.view(torch.int64).tolist() for name, word in words.items()}


def check_cases(runs, device):
    """In every case, the parameters are those of one process; the words, everywhere the same."""
    wrong = {}
    for name in runs[0]:
        expected, found = alone(name, len(runs), device), [run[name] for run in runs]
        error = error_of(found[0].params, expected.params)
        alike = all(bits(f.words) == bits(found[0].words) for f in found)
        if not (error < 1e-9 and alike and found[0].stats == expected.stats):
            wrong[name] = error, alike, found[0].stats, expected.stats
    assert not wrong


def test_shards_step_as_one_process_does(runs):
    check_cases([run["cases"] for run in runs], "cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_shards_on_one_gpu_step_as_one_process_does(tmp_path):
    """What they tell each other goes by gloo, as NCCL wants a GPU for every process."""
    check_cases(in_processes(2, together, tmp_path, list(CASES), "cuda"), "cuda")


@pytest.mark.parametrize("name", STATES)
def test_divided_states_step_as_one_process_does(name, of_two):
    """All processes have the same parameters, to the bit."""
    expected = alone(name, 2)
    for run in of_two:
        found = run["states"][name]
        assert error_of(found.params, expected.params) < 1e-9
        assert all(map(torch.equal, found.params, of_two[0]["states"][name].params))
        assert found.stats == expected.stats


def test_divided_state_of_replicas(of_two):
    """With a number and complex parameters; it goes on from what was saved, and is not copied."""
    for after, again, said in of_two[0]["replicas"], of_two[1]["replicas"]:
        assert said.startswith("RuntimeError: state_sharding: a process group is neither copied")
        assert all(map(torch.equal, after, again))
        assert all(map(torch.equal, after, of_two[0]["replicas"][0]))


# --------------------------------------------------------------------------- fully_shard


def in_one_process(options, steps):
    model = network()
    optimizer = AdaQN(model.parameters(), blocks=strips(model.parameters()), **options)
    fit(model, optimizer, steps)
    return model, optimizer


def values(model):
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIONS)
def test_models_of_fully_shard_train_as_in_one_process(name, of_two):
    model, _ = in_one_process(OPTIONS[name], batches(20))
    for run in of_two:
        assert error_of(run["saved"][name][0], values(model)) < 1e-9


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpoints_go_on_in_any_number_of_processes(name, of_two, runs):
    """To the bit in as many as before."""
    expected = of_two[0]["saved"][name][0]
    for run in runs:
        found = run["loaded"][name]
        assert error_of(found, expected) < 1e-9
        if len(runs) == 2:
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpoints_go_on_in_one_process(name, of_two, folder):
    model = network()
    optimizer = AdaQN(model.parameters(), blocks=strips(model.parameters()), **OPTIONS[name])
    load(model, optimizer, f"{folder}/{name}")
    fit(model, optimizer, batches(20)[10:])
    assert error_of(values(model), of_two[0]["saved"][name][0]) < 1e-9


@pytest.mark.parametrize("name", OPTIONS)
def test_a_full_state_dict_is_that_of_one_process(name, of_two):
    model, optimizer = in_one_process(OPTIONS[name], batches(20)[:10])
    full = of_two[0]["saved"][name][1]["state"]
    for key, p in model.named_parameters():
        own = optimizer.state[p]
        assert full[key].keys() == own.keys()
        for kind in {"momentum", "accumulator", "factors", "s_ring", "square"} & own.keys():
            assert error_of([full[key][kind]], [own[kind]]) < 1e-6, kind


def test_words_of_replicated_shards(of_two):
    """They are summed over the shards alone; the monitored loss is the mean over all."""
    model, _ = in_one_process(OPTIONS["pairs"], batches(12))
    for run in of_two:
        for params, loss in run["meshes"].values():
            assert error_of(params, values(model)) < 1e-9
            assert loss == 0.5


def test_replicas_that_drift_are_found(of_two):
    for run in of_two:
        equal, of_state, of_parameter, of_number = run["drift"]
        assert equal == "none"
        assert "state 's_ring' of parameter 1 differs between processes 0 and 1" in of_state
        assert "optimizer: parameter 0 differs between processes 0 and 1" in of_parameter
        assert "process 1 has 2 tensors and numbers, and process 0 1" in of_number


# --------------------------------------------------------------------------- LBFGS


def test_shards_search_as_one_process_does(runs):
    """In every case; and they go on from what was saved to the bit, as does one process."""
    wrong = {}
    for name in runs[0]["searches"]:
        expected, stats, _ = searched_alone(name, len(runs))
        for run in runs:
            (values, found), (again, _), between, whole = run["searches"][name]
            error = error_of(values, expected)
            same = all(map(torch.equal, values, again))
            if not (error < 1e-8 and same and found == stats):
                wrong[name] = error, same, found, stats
        if whole is not None:
            alone = searched_alone(name, 1, steps=1, state=whole, values=between)[0]
            if not error_of(alone, expected) < 1e-8:
                wrong[name, "whole"] = error_of(alone, expected)
    assert not wrong


def test_replicas_search_as_one_process_does(of_two):
    for run in of_two:
        for name, ((values, stats), (again, _)) in run["searches of replicas"].items():
            expected, found, _ = searched_alone(name, 2)
            assert error_of(values, expected) < 1e-8
            assert stats == found
            assert all(map(torch.equal, values, again))


def test_shards_search_on_from_one_process(of_two):
    expected, _, _ = searched_alone("strong Wolfe", 1)
    for run in of_two:
        assert error_of(run["from one process"][0], expected) < 1e-8


def test_a_process_may_have_no_rows(of_two):
    for run in of_two:
        difference, loaded = run["single row"]
        assert difference.abs().max() < 1e-9 and loaded


def test_a_complex_number_is_one_row(of_two):
    expected = of_a_complex_number({})
    assert all(error_of(run["complex"], expected) < 1e-9 for run in of_two)


def test_a_search_goes_on_from_a_state_by_fqn(of_two):
    for run in of_two:
        assert all(map(torch.equal, *run["model"]))


def test_a_closure_that_fails_leaves_whole_parameters(of_two):
    for run in of_two:
        p, evaluations = run["failure"]
        assert evaluations == 7 and p.abs().max() < 1 and torch.equal(p, of_two[0]["failure"][0])


# --------------------------------------------------------------------------- mistakes


def test_mistakes_are_told_in_every_process(of_two):
    expected = {
        "shapes": "RuntimeError: shard 0 has a parameter of shape (4, 3), torch.float32, and shard "
        "1 a parameter of shape (4, 4)",
        "number": "RuntimeError: shard 0 has 1 parameters, and shard 1 2 parameters; make the same",
        "dtypes": "RuntimeError: shard 0 has a parameter of shape (4, 3), torch.float32, and shard "
        "1 a parameter of shape (4, 3), torch.float64",
        "options": "RuntimeError: shard 0 has history_size=0, and shard 1 history_size=1",
        "closures": "RuntimeError: curvature: 'difference' takes gradients of whole parameters",
    }
    for run in of_two:
        assert run["mistakes"].keys() == expected.keys()
        for name, beginning in expected.items():
            assert run["mistakes"][name].startswith(beginning), name


# --------------------------------------------------------------------------- torchrun


def test_the_example_goes_on_where_a_process_was_killed(tmp_path):
    """Started anew by torchrun, the processes take up the checkpoint at 40 steps."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "--max-restarts=1", "--monitor-interval=0.1", "tests/failing.py", f"--save={tmp_path}",
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    first, loss = re.search(r"from step (\d+), loss (\S+)", done.stdout).groups()
    assert first == "40" and float(loss) < 0.01
