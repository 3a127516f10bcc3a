"""Every CUDA kernel against the reference, run on the CPU by the emulation of tests/emulation."""

from itertools import product
from math import inf

import pytest
import torch
from emulated import TYPES, EmulatedOps, build, copy_strided
from kernel_problems import F32, F64, Case, Problem, run
from kernel_properties import (
    ALL,
    CASES,
    CHECKED,
    EVERYTHING,
    EXTREME,
    EXTREMES,
    MOVING,
    OUTCOMES,
    STANDING,
    STEP,
    WHOLE,
    assert_same_bits,
    check_case,
    check_direction_accuracy,
    check_dropped,
    check_dropped_pair_update,
    check_extreme_direction,
    check_extreme_gradients,
    check_fused_is_separate,
    check_growth,
    check_outcome,
    check_overflow_bars_the_pair,
    check_rate_tensors,
    check_repeatable,
    check_restore,
    check_scaling,
    check_standing,
    check_swap_without_iterates,
)
from problems import AuthorsProblem, plain_adaqn, random_parameters, set_gradients, trajectory

from adaqn_cuda import ops

FUSED = (
    *("plain", "mixed", "bfloat16 rings", "full rings", "100 000", "momentum", "clipped"),
    *("bias correction", "capped", "cap out of reach", "everything", "everything, mixed"),
    *("everything in float64", "everything in bfloat16 rings", "no history"),
)

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


@pytest.mark.parametrize(("operation", "case"), CHECKED)
def test_operation_agrees_with_the_reference(emulated, operation, case):
    check_case(emulated, operation, CASES[case], "cpu")


@pytest.mark.parametrize("case", ["mixed", "everything, mixed"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("operation", STEP[:-1])
def test_gradient_scale(emulated, operation, maximize, case):
    check_scaling(emulated, operation, "cpu", maximize, CASES[case])


@pytest.mark.parametrize("case", ["no history", "no history, everything"])
@pytest.mark.parametrize("maximize", [False, True])
def test_gradient_scale_without_pairs(emulated, maximize, case):
    check_scaling(emulated, "diagonal_step", "cpu", maximize, CASES[case])


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("operation", ["direction_pass3", "direction_step"])
def test_rates_on_the_device(emulated, operation, options):
    check_rate_tensors(emulated, operation, "cpu", CASES["300 tensors"].but(**options))


def test_rates_on_the_device_without_pairs(emulated):
    case = CASES["300 tensors"].without_pairs()
    check_rate_tensors(emulated, "diagonal_step", "cpu", case)


@pytest.mark.parametrize("case", ["plain", "mixed", "everything", "everything, mixed"])
@pytest.mark.parametrize("way", WHOLE)
@pytest.mark.parametrize("reason", ["nan", "inf", "-inf", "found_inf", "blank"])
def test_dropped_step_changes_nothing(emulated, reason, way, case):
    check_dropped(emulated, "cpu", reason, way, CASES[case].but(missing=0))


@pytest.mark.parametrize("case", STANDING)
@pytest.mark.parametrize("operation", MOVING)
def test_parameters_without_a_gradient_stand_still(emulated, operation, case):
    check_standing(emulated, operation, "cpu", STANDING[case])


@pytest.mark.parametrize("case", EXTREME)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("operation", STEP)
def test_extreme_gradients(emulated, operation, extreme, scale, case):
    check_extreme_gradients(emulated, operation, "cpu", extreme, scale, EXTREME[case])


@pytest.mark.parametrize("size", [1e25, 1e-28])
def test_extreme_direction(emulated, size):
    check_extreme_direction(emulated, "cpu", size)


@pytest.mark.parametrize("case", FUSED)
def test_fused_step_is_its_passes(emulated, case):
    check_fused_is_separate(emulated, "cpu", CASES[case])


@pytest.mark.parametrize(
    "case",
    ["plain", "unpadded rows", "bfloat16 rings", "full rings", "100 000", "momentum", "everything"],
)
def test_direction_is_accurate(emulated, case):
    check_direction_accuracy(emulated, "cpu", CASES[case])


@pytest.mark.parametrize("case", ["plain", "everything"])
def test_same_bits_on_repetition(emulated, case):
    check_repeatable(emulated, "cpu", CASES[case])


@pytest.mark.parametrize("case", ["plain", "mixed", "mixed with float64", "1 650 tensors"])
def test_restore_undoes_swap(emulated, case):
    check_restore(emulated, "cpu", CASES[case])


def test_swap_without_iterates(emulated):
    check_swap_without_iterates(emulated, "cpu")


@pytest.mark.parametrize("case", ["plain", "mixed", "momentum", "everything, mixed"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_commit(emulated, outcome, case):
    check_outcome(emulated, "cpu", outcome, CASES[case])


@pytest.mark.parametrize("case", ["plain", "mixed", "everything", "everything, mixed"])
@pytest.mark.parametrize("reason", ["not finite", "blank"])
def test_dropped_step_updates_no_pairs(emulated, reason, case):
    check_dropped_pair_update(emulated, "cpu", reason, CASES[case])


@pytest.mark.parametrize("max_growth", [1.0, 1.05, 100.0, inf])
@pytest.mark.parametrize("pairs", [0, 1, 3, 5])
def test_growth_of_the_scalar_initial_matrix(emulated, max_growth, pairs):
    check_growth(emulated, "cpu", max_growth, pairs)


def test_overflow_bars_the_pair(emulated):
    check_overflow_bars_the_pair(emulated, "cpu")


def launches(namespace, operation, case):
    problem, before = Problem(case), build().launches()
    run(namespace, operation, problem)
    return build().launches() - before


def test_launches(emulated):
    """One launch where one table holds the parameters, else one per table and pass."""
    assert launches(emulated, "direction_step", CASES["plain"]) == 1
    assert launches(emulated, "direction_step", CASES["everything, mixed"]) == 1
    many, groups = Case(numels=(1,) * 1025), Case(numels=(1,) * 65, groups=65)
    assert launches(emulated, "direction_step", Case(numels=(1,) * 1024)) == 1
    assert launches(emulated, "direction_step", many) == 3 * 2 + 3
    assert launches(emulated, "direction_step", groups) == 3 * 2 + 3
    assert launches(emulated, "direction_step", many.but(max_direction=1.0)) == 4 * 2 + 3
    assert launches(emulated, "direction_pass2", Case(diagonal=False, identity=True)) == 1
    assert launches(emulated, "diagonal_step", CASES["no history, everything"]) == 1
    assert launches(emulated, "diagonal_step", many.without_pairs()) == 2 * 2 + 2
    apart = Case(numels=(8,) * 4, groups=4, apart=True).without_pairs()
    assert launches(emulated, "diagonal_step", apart) == 4 * 2 + 2
    assert launches(emulated, "diagonal_step", apart.but(apart=False)) == 1


def test_no_cooperative_launch_beyond_residency():
    """A grid whose blocks cannot all run at once would wait forever at its barrier."""
    crowded = EmulatedOps(multiprocessors=4, blocks=1)
    large, small = Case(numels=(8192,)), Case(numels=(4096,))
    assert launches(crowded, "direction_step", large) == 3 + 3
    assert launches(crowded, "direction_step", small) == 1
    assert launches(crowded, "diagonal_step", large.without_pairs()) == 2 + 2
    assert launches(crowded, "diagonal_step", small.without_pairs()) == 1


@pytest.mark.parametrize("case", ["100 000", "everything", "no history", "no history, everything"])
def test_same_bits_without_cooperative_launch(case):
    """The same grid on devices with room for all of its blocks at once, and for half of them."""
    case = CASES[case].but(numels=(5, 0, 9_000, 64, 1))
    operation = "direction_step" if case.history_size else "diagonal_step"
    problems = []
    for blocks in (2, 1):
        problem, before = Problem(case), build().launches()
        run(EmulatedOps(multiprocessors=2, blocks=blocks), operation, problem)
        assert (build().launches() - before == 1) == (blocks == 2)
        problems.append(problem)
    assert_same_bits(*problems)


@pytest.mark.parametrize("operation", ["direction_step", "diagonal_step"])
def test_a_refused_cooperative_launch_is_made_up_for(operation):
    """As on a share of a device, of which the runtime does not tell."""
    case = CASES["everything"].but(numels=(5, 0, 9_000, 64, 1))
    case = case if operation == "direction_step" else case.without_pairs()
    problems, counts = [], []
    for blocks in (0, 3):
        problem, before = Problem(case), build().launches()
        build().limit_cooperative_launches(blocks)
        try:
            run(EmulatedOps(), operation, problem)
        finally:
            build().limit_cooperative_launches(0)
        counts.append(build().launches() - before)
        problems.append(problem)
    assert counts[0] == 1 < counts[1]
    assert_same_bits(*problems)


# ------------------------------------------------------------------ tensors that are not contiguous


LAYOUTS = {
    "channels last": lambda t: t(8, 5, 3, 3).to(memory_format=torch.channels_last),
    "channels last, 3-D": lambda t: t(2, 5, 3, 2, 2).to(memory_format=torch.channels_last_3d),
    "transposed": lambda t: t(7, 5).mT,
    "every other": lambda t: t(6, 10)[:, ::2],
    "a part": lambda t: t(6, 10)[1:5, 2:7],
    "reversed dimensions": lambda t: t(2, 3, 4, 5).permute(3, 2, 1, 0),
    "ones": lambda t: t(1, 6, 1, 4).permute(0, 3, 2, 1),
}


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_elements_in_their_order_and_back(layout, dtype):
    """What lies between them stays."""
    storage = []

    def tensor(*shape):
        storage.append(torch.randn(*shape).to(dtype))
        return storage[-1]

    strided = LAYOUTS[layout](tensor)
    assert not strided.is_contiguous()
    dense = torch.full(strided.shape, torch.nan, dtype=dtype)
    assert copy_strided([strided], [dense], True)
    assert torch.equal(dense, strided)
    before = storage[0].clone()
    strided.fill_(torch.nan)
    assert copy_strided([strided], [dense], False)
    assert torch.equal(dense, strided)
    assert torch.equal(storage[0], before)


def test_all_strided_tensors_go_in_one_launch():
    """Those of a ResNet-50 in channels_last do: 17 weights, or their gradients."""
    for count, launched in ((17, 1), (48, 1), (60, 2)):
        strided = [torch.randn(5, 4 + k % 3).mT for k in range(count)]
        dense = [torch.empty(t.shape) for t in strided]
        before = build().launches()
        assert copy_strided(strided, dense, True)
        assert build().launches() - before == launched
        assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_more_dimensions_than_a_table_has_are_refused():
    strided = torch.randn(2, 2, 2, 2, 2).permute(4, 3, 2, 1, 0)
    assert not copy_strided([strided], [torch.empty(strided.shape)], True)


# ------------------------------------------------------------------ what the runtime is asked for


def test_the_device_is_set_only_when_it_is_another():
    module, before = build(), build().device_changes()
    try:
        for device in (0, 0, 1, 1, 1, 0):
            module.make_current(device)
        assert module.device_changes() - before == 2
    finally:
        module.make_current(0)


def test_shared_memory_is_granted_once():
    """Whatever the steps need of it."""
    large = Case(numels=(5,), history_size=60, pairs=60)
    launches(EmulatedOps(), "direction_step", large)
    before = build().grants()
    for history in (60, 50, 62):
        launches(EmulatedOps(), "direction_step", large.but(history_size=history, pairs=50))
    assert build().grants() == before


#: Devices, and numbers of tensors, that between them need every instance of a kernel.
ROOMY, CROWDED = EmulatedOps(), EmulatedOps(multiprocessors=4, blocks=1)
SIZES = ((8192,), (3,) * 70)


@pytest.mark.parametrize("case", ["plain", "bfloat16 rings", "everything in float64"])
def test_loading_covers_steps_and_pair_updates(launched_late, case):
    case, problem = CASES[case], Problem(CASES[case])
    rings = (problem[name].dtype for name in ("s_ring", "fisher"))
    build().load(*(TYPES[t] for t in (problem.vector, *rings)), True, False)
    for device, numels in product((ROOMY, CROWDED), SIZES):
        for operation in set(ALL) - {"diagonal_step"}:
            run(device, operation, Problem(case.but(numels=numels)))
    assert launched_late() == 0


@pytest.mark.parametrize("dtype", [F32, F64])
def test_loading_covers_steps_without_pairs(launched_late, dtype):
    build().load(*[TYPES[dtype]] * 3, False, False)
    for device, numels in product((ROOMY, CROWDED), SIZES):
        run(device, "diagonal_step", Problem(Case(numels=numels, dtypes=(dtype,)).without_pairs()))
    assert launched_late() == 0


def test_what_is_not_loaded_is_noticed(launched_late):
    build().load(*[TYPES[F32]] * 3, False, False)
    run(ROOMY, "iterate_swap", Problem(CASES["plain"]))
    assert launched_late() == 1


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
    optimizer = plain_adaqn(
        [w], lr=0.02, history_size=5, fisher_size=fisher_size, update_interval=5,
        monitor=lambda: problem.loss(w),
    )  # fmt: skip
    for step, iterate in enumerate(expected):
        assert (w.detach() - iterate).norm() <= 1e-9 * iterate.norm(), f"step {step}"
        w.grad = problem.gradient(w.detach(), step)
        optimizer.step()
    stats = optimizer.stats()
    assert (stats["stored"], stats["skipped"], stats["resets"]) == outcome


SWITCHED_ON = dict(
    momentum=0.9, bias_correction=True, max_grad_norm=1.0, max_direction=0.9, damping=0.2
)
OPTIMIZERS = {
    "everything": SWITCHED_ON,
    "scalar": dict(SWITCHED_ON, init="scalar"),
    "given y": dict(SWITCHED_ON, curvature="gradients"),
    "kronecker": dict(SWITCHED_ON, init="kronecker"),
    "no history": dict(history_size=0, momentum=0.9, bias_correction=True, max_grad_norm=1.0),
    "no history, scalar": dict(history_size=0, momentum=0.9, init="scalar"),
    "no history, kronecker": dict(SWITCHED_ON, history_size=0, init="kronecker"),
}


def path(options):
    params = random_parameters([(6, 5), (4,), ()], torch.float64)
    start = [p.detach().clone() for p in params]
    options = {"lr": 0.05, "update_interval": 3, "history_size": 3, **options}
    optimizer = plain_adaqn(params, **options)
    for step in range(24):
        set_gradients(params, step)
        optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, start, strict=True))
    return [p.detach() for p in params], optimizer.stats()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_goes_the_references_way(monkeypatch, name):
    """Whole steps and pair updates, of every kind of optimizer."""
    expected, counts = path({**OPTIMIZERS[name], "fused": False})
    backend = ops.Backend("emulated", "test", EmulatedOps())
    monkeypatch.setattr(ops, "select_backend", lambda *_: backend)
    params, own_counts = path(OPTIMIZERS[name])
    assert own_counts == counts
    assert counts["stored"] > 0 or "no history" in name
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
