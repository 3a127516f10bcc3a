"""Every CUDA kernel against the reference, run on the CPU by the emulation of tests/emulation."""

import pytest
import torch
from emulated import EmulatedOps, build
from kernel_problems import Case, Problem, run
from kernel_properties import (
    ALL,
    CASES,
    MIXED,
    OUTCOMES,
    STEP,
    check_case,
    check_direction_accuracy,
    check_dropped,
    check_fused_is_separate,
    check_outcome,
    check_overflow_bars_the_pair,
    check_rate_tensors,
    check_repeatable,
    check_restore,
    check_scaling,
    check_swap_without_iterates,
)
from problems import AuthorsProblem, trajectory

from adaqn_cuda import AdaQN, ops

#: Simulated devices: threads that run in either order, and with room for one block or for several.
DEVICES = {"forward": EmulatedOps(), "reverse": EmulatedOps(1, 3, reverse_order=True)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The reference's work is small, and the emulation uses one thread."""
    build()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=DEVICES)
def emulated(request):
    return DEVICES[request.param]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operation", ALL)
def test_operation_agrees_with_the_reference(emulated, operation, case):
    check_case(emulated, operation, CASES[case], "cpu")


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("operation", STEP)
def test_gradient_scale(emulated, operation, maximize):
    check_scaling(emulated, operation, "cpu", maximize)


@pytest.mark.parametrize("operation", ["direction_pass3", "direction_step"])
def test_rates_on_the_device(emulated, operation):
    check_rate_tensors(emulated, operation, "cpu")


@pytest.mark.parametrize("case", [Case(), MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("reason", ["nan", "inf", "-inf", "found_inf", "blank"])
def test_dropped_step_changes_nothing(emulated, reason, fused, case):
    check_dropped(emulated, "cpu", reason, fused, case.but(missing=0))


@pytest.mark.parametrize("case", ["plain", "mixed", "bfloat16 rings", "full rings", "100 000"])
def test_fused_step_is_its_passes(emulated, case):
    check_fused_is_separate(emulated, "cpu", CASES[case])


@pytest.mark.parametrize(
    "case", ["plain", "unpadded rows", "bfloat16 rings", "full rings", "100 000"]
)
def test_direction_is_accurate(emulated, case):
    check_direction_accuracy(emulated, "cpu", CASES[case])


def test_same_bits_on_repetition(emulated):
    check_repeatable(emulated, "cpu", CASES["plain"])


@pytest.mark.parametrize("case", ["plain", "mixed", "mixed with float64", "3 000 tensors"])
def test_restore_undoes_swap(emulated, case):
    check_restore(emulated, "cpu", CASES[case])


def test_swap_without_iterates(emulated):
    check_swap_without_iterates(emulated, "cpu")


@pytest.mark.parametrize("case", [Case(), MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_commit(emulated, outcome, case):
    check_outcome(emulated, "cpu", outcome, case)


def test_overflow_bars_the_pair(emulated):
    check_overflow_bars_the_pair(emulated, "cpu")


def launches(namespace, operation, case):
    problem, before = Problem(case), build().launches()
    run(namespace, operation, problem)
    return build().launches() - before


def test_launches(emulated):
    """One launch where one table holds the parameters, else one per table and pass."""
    assert launches(emulated, "direction_step", CASES["plain"]) == 1
    assert launches(emulated, "direction_step", CASES["mixed"]) == 1
    assert launches(emulated, "direction_step", Case(numels=(1,) * 1024)) == 1
    assert launches(emulated, "direction_step", Case(numels=(1,) * 1025)) == 3 * 2 + 3
    assert launches(emulated, "direction_step", Case(numels=(1,) * 65, groups=65)) == 3 * 2 + 3


def test_no_cooperative_launch_beyond_residency():
    """A grid whose blocks cannot all run at once would wait forever at its barrier."""
    crowded = EmulatedOps(multiprocessors=4, blocks=1)
    assert launches(crowded, "direction_step", Case(numels=(8192,))) == 3 + 3
    assert launches(crowded, "direction_step", Case(numels=(4096,))) == 1


@pytest.fixture
def on_emulated_kernels(monkeypatch):
    backend = ops.Backend("emulated", "test", EmulatedOps())
    monkeypatch.setattr(ops, "select_backend", lambda *_: backend)


@pytest.mark.usefixtures("on_emulated_kernels")
@pytest.mark.parametrize(
    ("name", "scale", "fisher_size", "outcome"),
    [("case1.csv", 1.0, 20, (50, 0, 24)), ("case2.csv", 600.0, 12, (66, 7, 1))],
)
def test_authors_trajectory_is_reproduced(name, scale, fisher_size, outcome):
    problem, expected = AuthorsProblem(scale), trajectory(name)
    w = torch.nn.Parameter(problem.w0.clone())
    optimizer = AdaQN(
        [w], lr=0.02, history_size=5, fisher_size=fisher_size, update_interval=5,
        monitor=lambda: problem.loss(w),
    )  # fmt: skip
    for step, iterate in enumerate(expected):
        assert (w.detach() - iterate).norm() <= 1e-9 * iterate.norm(), f"step {step}"
        w.grad = problem.gradient(w.detach(), step)
        optimizer.step()
    stats = optimizer.stats()
    assert (stats["stored"], stats["skipped"], stats["resets"]) == outcome
