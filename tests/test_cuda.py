"""The CUDA kernels on a GPU: the properties of the emulated ones, and what only a GPU shows."""

from math import inf
from types import SimpleNamespace

import pytest
import torch
from every_option import EVERY_OPTION, make_every
from kernel_problems import BF16, F32, F64, Case
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
from kronecker_arguments import Blocks
from kronecker_properties import (
    ACCUMULATE,
    check_bases,
    check_dropped_step,
    check_extreme_gradient,
    check_hopeless_factors,
    check_inverse,
    check_kronecker_case,
    check_kronecker_rates,
    check_kronecker_repeatable,
    check_kronecker_scaling,
    check_kronecker_standing,
    check_new_directions,
    check_options_of_apply,
    check_passes_are_the_step,
    check_with_pairs,
)
from kronecker_properties import CASES as BLOCKS
from kronecker_properties import EXTREMES as EXTREME_BLOCKS
from kronecker_properties import OPERATIONS as KRONECKER
from kronecker_properties import STANDING as STANDING_BLOCKS
from kronecker_properties import STEP as KRONECKER_STEP
from problems import plain_adaqn, random_parameters
from secant_arguments import OPERATIONS as SECANT
from secant_arguments import Search, check_search
from secant_properties import CASES as SEARCHES
from secant_properties import (
    COMBINE,
    PAIR,
    RESIDUAL,
    check_accepted_alone_keeps,
    check_decisions,
    check_long_triangle,
    check_no_pair,
    check_overflow,
    check_refused,
    check_search_repeatable,
    check_trial_that_is_not_finite,
)
from torch.utils._python_dispatch import TorchDispatchMode

from adaqn_cuda import LBFGS, ops
from adaqn_cuda.capture import period
from adaqn_cuda.lbfgs import DETERMINISTIC
from adaqn_cuda.state.layout import Turn

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NATIVE = SimpleNamespace(**{name: getattr(torch.ops.adaqn, name).default for name in ops.SCHEMAS})
FUSED = (
    *("plain", "mixed", "bfloat16 rings", "full rings", "3 000 001", "momentum", "capped"),
    *("everything", "everything, mixed", "everything in bfloat16 rings", "no history"),
)
LARGE = {
    "3 000 001": Case(numels=(3_000_001,)),
    "3 000 001 in bfloat16": Case(numels=(3_000_001,), pair_dtype=BF16, fisher_dtype=BF16),
    "3 000 001, everything": Case(numels=(3_000_001,), **EVERYTHING),
    "20 000 000": Case(numels=(20_000_000,), history_size=2, pairs=2, oldest=1, fisher_size=2),
}


@pytest.fixture(scope="module", autouse=True)
def native():
    """The kernels, not the reference, are what runs."""
    obstacle = ops.native_obstacle(torch.device("cuda"))
    assert obstacle is None, obstacle


@pytest.mark.parametrize(
    ("operation", "case"), [*CHECKED, *((operation, name) for name in LARGE for operation in ALL)]
)
def test_operation_agrees_with_the_reference(operation, case):
    check_case(NATIVE, operation, {**CASES, **LARGE}[case], "cuda")


@pytest.mark.parametrize("case", ["mixed", "everything, mixed"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("operation", STEP[:-1])
def test_gradient_scale(operation, maximize, case):
    check_scaling(NATIVE, operation, "cuda", maximize, CASES[case])


@pytest.mark.parametrize("case", ["no history", "no history, everything"])
@pytest.mark.parametrize("maximize", [False, True])
def test_gradient_scale_without_pairs(maximize, case):
    check_scaling(NATIVE, "diagonal_step", "cuda", maximize, CASES[case])


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("operation", ["direction_pass3", "direction_step"])
def test_rates_on_the_device(operation, options):
    check_rate_tensors(NATIVE, operation, "cuda", CASES["300 tensors"].but(**options))


def test_rates_on_the_device_without_pairs():
    case = CASES["300 tensors"].without_pairs()
    check_rate_tensors(NATIVE, "diagonal_step", "cuda", case)


@pytest.mark.parametrize("case", ["plain", "mixed", "everything", "everything, mixed"])
@pytest.mark.parametrize("way", WHOLE)
@pytest.mark.parametrize("reason", ["nan", "inf", "-inf", "found_inf", "blank"])
def test_dropped_step_changes_nothing(reason, way, case):
    check_dropped(NATIVE, "cuda", reason, way, CASES[case].but(missing=0))


@pytest.mark.parametrize("case", STANDING)
@pytest.mark.parametrize("operation", MOVING)
def test_parameters_without_a_gradient_stand_still(operation, case):
    check_standing(NATIVE, operation, "cuda", STANDING[case])


@pytest.mark.parametrize("case", EXTREME)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("operation", STEP)
def test_extreme_gradients(operation, extreme, scale, case):
    check_extreme_gradients(NATIVE, operation, "cuda", extreme, scale, EXTREME[case])


@pytest.mark.parametrize("size", [1e25, 1e-28])
def test_extreme_direction(size):
    check_extreme_direction(NATIVE, "cuda", size)


@pytest.mark.parametrize("case", FUSED)
def test_fused_step_is_its_passes(case):
    check_fused_is_separate(NATIVE, "cuda", {**CASES, **LARGE}[case])


@pytest.mark.parametrize(
    "case", ["plain", "unpadded rows", "bfloat16 rings", "full rings", "3 000 001", "everything"]
)
def test_direction_is_accurate(case):
    check_direction_accuracy(NATIVE, "cuda", {**CASES, **LARGE}[case])


@pytest.mark.parametrize("case", ["plain", "1 650 tensors", "3 000 001", "everything"])
def test_same_bits_on_repetition(case):
    check_repeatable(NATIVE, "cuda", {**CASES, **LARGE}[case])


@pytest.mark.parametrize("case", ["plain", "mixed", "mixed with float64", "1 650 tensors"])
def test_restore_undoes_swap(case):
    check_restore(NATIVE, "cuda", CASES[case])


def test_swap_without_iterates():
    check_swap_without_iterates(NATIVE, "cuda")


@pytest.mark.parametrize("case", ["plain", "mixed", "momentum", "everything, mixed"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_commit(outcome, case):
    check_outcome(NATIVE, "cuda", outcome, CASES[case])


@pytest.mark.parametrize("case", ["plain", "mixed", "everything", "everything, mixed"])
@pytest.mark.parametrize("reason", ["not finite", "blank"])
def test_dropped_step_updates_no_pairs(reason, case):
    check_dropped_pair_update(NATIVE, "cuda", reason, CASES[case])


@pytest.mark.parametrize("max_growth", [1.0, 1.05, 100.0, inf])
@pytest.mark.parametrize("pairs", [0, 1, 3, 5])
def test_growth_of_the_scalar_initial_matrix(max_growth, pairs):
    check_growth(NATIVE, "cuda", max_growth, pairs)


def test_overflow_bars_the_pair():
    check_overflow_bars_the_pair(NATIVE, "cuda")


# ------------------------------------------------------------------ the Kronecker matrix


LARGE_BLOCKS = {
    "a large matrix": Blocks(shapes=((1000, 2500), (3001,)), beta=0.9),
    "a large matrix in wide blocks": Blocks(shapes=((1000, 700),), block_size=128, beta=0.9),
}


@pytest.mark.parametrize("case", [*BLOCKS, *LARGE_BLOCKS])
@pytest.mark.parametrize("operation", KRONECKER)
def test_kronecker_operation_agrees_with_the_reference(operation, case):
    check_kronecker_case(NATIVE, operation, {**BLOCKS, **LARGE_BLOCKS}[case], "cuda")


@pytest.mark.parametrize("case", ["plain", "mixed", "no factors"])
def test_kronecker_apply(case):
    check_options_of_apply(NATIVE, BLOCKS[case], "cuda")


def test_kronecker_flags_behind_those_of_pairs():
    check_with_pairs(NATIVE, "cuda")


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("operation", [ACCUMULATE, KRONECKER_STEP])
def test_kronecker_gradient_scale(operation, maximize):
    check_kronecker_scaling(NATIVE, operation, maximize, "cuda")


def test_kronecker_rates_on_the_device():
    check_kronecker_rates(NATIVE, "cuda")


@pytest.mark.parametrize("case", ["plain", "mixed", "first call", "an outlier"])
@pytest.mark.parametrize("reason", ["nan", "inf", "-inf", "found_inf", "blank"])
def test_dropped_kronecker_step_changes_nothing(reason, case):
    check_dropped_step(NATIVE, reason, BLOCKS[case], "cuda")


@pytest.mark.parametrize("case", STANDING_BLOCKS)
@pytest.mark.parametrize("operation", [ACCUMULATE, KRONECKER_STEP])
def test_blocks_without_a_gradient_stand_still(operation, case):
    check_kronecker_standing(NATIVE, operation, STANDING_BLOCKS[case], "cuda")


@pytest.mark.parametrize("case", ["plain", "mixed", "full tiles in float64", "first call"])
def test_accumulating_alone_is_what_the_step_does(case):
    check_passes_are_the_step(NATIVE, BLOCKS[case], "cuda")


@pytest.mark.parametrize("case", ["plain", "blocks", "full tiles", "wide"])
def test_kronecker_inverse(case):
    check_inverse(NATIVE, BLOCKS[case], "cuda")


@pytest.mark.parametrize("side", [3, 64, 100, 256])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_bases_of_low_rank(dtype, rank, side):
    check_bases(NATIVE, dtype, rank, side, "cuda")


@pytest.mark.parametrize("side", [40, 64, 150])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_basis_that_knows_nothing_of_what_came(dtype, side):
    check_new_directions(NATIVE, dtype, side, "cuda")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_hopeless_factors_keep_their_bases(value):
    check_hopeless_factors(NATIVE, value, "cuda")


@pytest.mark.parametrize("case", ["plain", "mixed", "full tiles", "wide", "a large matrix"])
def test_same_kronecker_bits_on_repetition(case):
    check_kronecker_repeatable(NATIVE, NATIVE, {**BLOCKS, **LARGE_BLOCKS}[case], "cuda")


@pytest.mark.parametrize("extreme", EXTREME_BLOCKS)
def test_extreme_gradients_of_blocks(extreme):
    check_extreme_gradient(NATIVE, extreme, "cuda")


# ------------------------------------------------------------------ the optimizer on a GPU


def make(device="cuda", shapes=((64, 33), (64,), (), (7, 5)), **options):
    params = [torch.nn.Parameter(p.detach().to(device)) for p in random_parameters(shapes)]
    options = {"lr": 0.01, "history_size": 4, "fisher_size": 6, "update_interval": 3, **options}
    return params, plain_adaqn(params, **options)


def set_gradients(params, step, bad=False):
    """Gradients of a noisy bowl, in place, so that a captured graph finds them."""
    for index, p in enumerate(params):
        draw = torch.Generator().manual_seed(7919 * step + index)
        noise = torch.randn(p.shape, generator=draw).to(p.device, non_blocking=True)
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        torch.mul(p.detach(), 0.3 + 0.1 * index, out=p.grad)
        p.grad.add_(noise, alpha=0.2)
        if bad:
            p.grad.fill_(torch.nan)


#: Optimizers beyond the paper's.
OPTIONS = {
    "plain": {},
    "everything": dict(
        momentum=0.9, bias_correction=True, max_grad_norm=2.0, max_direction=1.0, damping=0.2
    ),
    "no history": dict(history_size=0, momentum=0.9, bias_correction=True),
}
#: Those whose steps depend on the number of the call.
BLOCK_OPTIONS = {
    "kronecker": dict(OPTIONS["everything"], init="kronecker", block_size=16),
    "kronecker, no history": dict(OPTIONS["no history"], init="kronecker", block_size=16),
}


@pytest.mark.parametrize("name", [*OPTIONS, *BLOCK_OPTIONS])
def test_cpu_and_gpu_go_the_same_way(name):
    paths = []
    for device in ("cpu", "cuda"):
        params, optimizer = make(device, **{**OPTIONS, **BLOCK_OPTIONS}[name])
        for p in params:
            p.data = p.data.to(F64)
        for step in range(30):
            set_gradients(params, step)
            optimizer.step()
        paths.append([p.detach().cpu() for p in params])
    for a, b in zip(*paths, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


LAYOUTS = {
    "transposed": ((6, 5), lambda t: t.t().contiguous().t()),
    "channels last": ((8, 6, 3, 3), lambda t: t.contiguous(memory_format=torch.channels_last)),
    "five dimensions": (
        (2, 3, 2, 3, 2),
        lambda t: t.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*OPTIONS, *BLOCK_OPTIONS])
def test_parameters_that_are_not_contiguous(name, layout):
    """They give what contiguous ones give, and keep their strides."""
    shape, strided = LAYOUTS[layout]
    results = []
    for lay in (torch.Tensor.contiguous, strided):
        params, optimizer = make(shapes=(shape, (4,)), **{**OPTIONS, **BLOCK_OPTIONS}[name])
        params[0].data = lay(params[0].data)
        for step in range(8):
            set_gradients(params, step)
            params[0].grad = lay(params[0].grad)
            optimizer.step()
        assert params[0].is_contiguous() == (lay is torch.Tensor.contiguous)
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def launched(call):
    """Kernels and copies that a call puts on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device for event in profiler.events())


def test_strided_parameters_take_three_more_launches():
    """Parameters and gradients come in one each, and parameters go back in one."""
    counts = []
    for layout in (torch.contiguous_format, torch.channels_last):
        params, optimizer = make_every_on("cuda", "the default", shapes=((8, 6, 3, 3),) * 17)
        for p in params:
            p.data = p.data.contiguous(memory_format=layout)
            p.grad = torch.randn_like(p)
        optimizer.step()
        counts.append(launched(optimizer.step))
    assert counts[1] == counts[0] + 3


@pytest.fixture
def no_synchronisation():
    """A function that makes every wait for the device an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def step_without_waiting(params, optimizer, steps, no_synchronisation):
    """Steps, some of them dropped, during which waiting for the device is an error."""
    gradients = []
    for step in range(steps):
        set_gradients(params, step, bad=step % 17 == 5)
        gradients.append([p.grad.clone() for p in params])
    optimizer.step()  # allocates
    torch.cuda.synchronize()
    no_synchronisation()
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("name", "monitored"),
    [
        *(("plain", False), ("plain", True), ("everything", True), ("no history", False)),
        *(("kronecker", True), ("kronecker, no history", False)),
    ],
)
def test_a_hundred_steps_never_wait(no_synchronisation, name, monitored):
    """Pair updates, resets and dropped steps among them."""
    params, optimizer = make(max_increase=1.0, **{**OPTIONS, **BLOCK_OPTIONS}[name])
    losses = [torch.tensor(x, device="cuda") for x in (1.0, 3.0, 0.9, 5.0)]
    if monitored:
        calls = iter(range(1000))
        optimizer.monitor = lambda: losses[next(calls) % 4]
    step_without_waiting(params, optimizer, 100, no_synchronisation)
    stats = optimizer.stats()
    assert stats["steps_skipped"] >= 5
    assert (stats["stored"] > 0) == ("no history" not in name)
    assert (stats["resets"] > 0) == monitored


def capture(optimizer, interval):
    """Graphs of a plain step (False) and of a step with a pair update (True).

    The host knows which step is due, so as many steps are captured as make a whole interval.
    """
    graphs = {}
    for step in range(interval):
        graph = graphs[step == interval - 1] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
    return graphs


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore:AdaQN.step.. is being captured")
def test_captured_steps_replay_as_eager_ones(name):
    """lr changes between replays, and gradients come and go as not finite."""
    interval, results = 3, []
    for captured in (False, True):
        lr = torch.tensor(0.01, dtype=F64, device="cuda")
        params, optimizer = make(lr=lr, update_interval=interval, **OPTIONS[name])
        for step in range(interval):  # both kinds of step run before their capture
            set_gradients(params, step)
            optimizer.step()
        graphs = capture(optimizer, interval) if captured else None
        for step in range(interval, 10 * interval):
            if step == 5 * interval:
                lr.fill_(0.002)
            set_gradients(params, step, bad=step == 20)
            if captured:
                graphs[(step + 1) % interval == 0].replay()
            else:
                optimizer.step()
        stats = optimizer.stats()
        assert (stats["stored"] > 1) == (name != "no history") and stats["steps_skipped"] == 1
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", BLOCK_OPTIONS)
@pytest.mark.filterwarnings("ignore:AdaQN.step.. is being captured")
def test_captured_kronecker_steps_are_eager_ones(name):
    """A graph for each of some calls, refreshes of bases among them."""
    results = []
    for captured in (False, True):
        params, optimizer = make(**BLOCK_OPTIONS[name], factor_interval=4)
        for step in range(24):
            set_gradients(params, step)
            if captured and step >= 12:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step()
                graph.replay()
            else:
                optimizer.step()
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def make_every_on(device, name, shapes=((64, 33), (64,), (), (7, 5)), dtype=torch.float32):
    params = [torch.nn.Parameter(p.detach().to(device, dtype)) for p in random_parameters(shapes)]
    return params, make_every(name, params)


@pytest.mark.parametrize("name", EVERY_OPTION)
def test_every_option_goes_the_cpus_way(name):
    paths = []
    for device in ("cpu", "cuda"):
        params, optimizer = make_every_on(device, name, dtype=F64)
        for step in range(24):
            set_gradients(params, step)
            optimizer.step()
        paths.append([p.detach().cpu() for p in params])
    rounded = EVERY_OPTION[name].get("history_dtype") is not None  # ties may go the other way
    for a, b in zip(*paths, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if rounded else 1e-6, atol=1e-8)


@pytest.mark.parametrize("name", EVERY_OPTION)
def test_no_option_waits(no_synchronisation, name):
    params, optimizer = make_every_on("cuda", name)
    step_without_waiting(params, optimizer, 40, no_synchronisation)
    assert optimizer.stats()["steps_skipped"] >= 2


@pytest.mark.parametrize("name", [n for n in EVERY_OPTION if n not in ("difference", "product")])
@pytest.mark.filterwarnings("ignore:AdaQN.step.. is being captured")
def test_a_captured_period_is_what_as_many_steps_are(name):
    """Graphs of successive steps, replayed in their order; those of hooks run the user's code."""
    results = []
    for captured in (False, True):
        params, optimizer = make_every_on("cuda", name)
        factored = optimizer.param_groups[0]["init"] == "kronecker"
        turns, graphs = period(optimizer.param_groups[0], factored), []
        for step in range(12 + 3 * turns):
            set_gradients(params, step)
            if not captured or step < 12:
                optimizer.step()
                continue
            if len(graphs) < turns:
                graphs.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(graphs[-1]):
                    optimizer.step()
            graphs[(step - 12) % turns].replay()
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_capture_of_the_default_warns():
    params, optimizer = make_every_on("cuda", "the default")
    set_gradients(params, 0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(RuntimeWarning, match="Capture 10 successive"), torch.cuda.graph(graph):
        optimizer.step()


def test_first_launches_of_a_pair_update_in_a_graph():
    """The kernels have been loaded, though none of them has run."""
    params, optimizer = make(update_interval=2)
    set_gradients(params, 0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(RuntimeWarning), torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    assert all(p.isfinite().all() for p in params)


def test_side_stream():
    results = []
    for side in (False, True):
        params, optimizer = make()
        stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(10):
                set_gradients(params, step)
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(overflow):
    """Scaled half-precision training; an overflow changes nothing."""
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    params, optimizer = make()
    scaler.scale(torch.zeros((), device="cuda", requires_grad=True))
    for step in range(6):
        set_gradients(params, step)
        for p in params:
            p.grad.mul_(scaler.get_scale())
        if overflow and step == 5:
            params[0].grad[0, 0] = torch.inf
        before = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
    changed = any(not torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert changed != overflow
    assert optimizer.stats()["steps_skipped"] == overflow


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_device_other_than_the_current_one():
    params, optimizer = make("cuda:1")
    for step in range(7):
        set_gradients(params, step)
        optimizer.step()
    assert torch.cuda.current_device() == 0
    assert all(p.isfinite().all() for p in params)


def test_too_long_a_history_is_refused():
    params, optimizer = make(history_size=65)
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="history_size"):
        optimizer.step()


# ------------------------------------------------------------------ L-BFGS

LARGE_SEARCHES = {
    "3 000 001": Search(numels=(3_000_001,), history_size=20, pairs=20, oldest=7),
    "3 000 001 in bfloat16": Search(
        numels=(3_000_001,), history_size=20, pairs=20, oldest=7, pair_dtype=BF16
    ),
    "1 000 pairs": Search(numels=(10_007,), history_size=1000, pairs=1000, oldest=300),
    "4 096 pairs": Search(
        numels=(1000,), dtypes=(F64,), history_size=4096, pairs=4096, oldest=1000
    ),
}


@pytest.mark.parametrize("case", [*SEARCHES, *LARGE_SEARCHES])
@pytest.mark.parametrize("operation", SECANT)
def test_search_operation_agrees_with_the_reference(operation, case):
    check_search(NATIVE, operation, {**SEARCHES, **LARGE_SEARCHES}[case], "cuda")


@pytest.mark.parametrize("pairs", [0, 1, 65, 130])
def test_images_of_any_number_of_pairs(pairs):
    case = Search(history_size=130, pairs=pairs, oldest=100)
    check_search(NATIVE, "direction_images", case, "cuda")


@pytest.mark.parametrize("operation", [PAIR, RESIDUAL, COMBINE])
@pytest.mark.parametrize("case", ["plain", "130 pairs", "bfloat16 rings"])
def test_refused_trial_changes_nothing(operation, case):
    check_refused(NATIVE, operation, SEARCHES[case], "cuda")


@pytest.mark.parametrize("turn", list(Turn))
def test_origin_is_the_accepted_trial(turn):
    check_accepted_alone_keeps(NATIVE, turn, "cuda")


@pytest.mark.parametrize("value", [inf, -inf, float("nan")])
@pytest.mark.parametrize("where", ["direction", "gradient"])
def test_candidate_that_is_not_finite(where, value):
    check_no_pair(NATIVE, value, where, SEARCHES["plain"], "cuda")
    check_trial_that_is_not_finite(NATIVE, value, "cuda")


def test_overflow_of_a_pair():
    check_overflow(NATIVE, "cuda")


def test_decisions_of_a_search():
    check_decisions(NATIVE, "cuda")


@pytest.mark.parametrize("pairs", [31, 32, 33, 64, 257, 700])
@pytest.mark.parametrize("operation", [RESIDUAL, COMBINE])
def test_long_triangle(operation, pairs):
    check_long_triangle(NATIVE, operation, pairs, "cuda")


@pytest.mark.parametrize("case", ["plain", "130 pairs", "3 000 001"])
@pytest.mark.parametrize("operation", SECANT)
def test_same_bits_of_a_search_on_repetition(operation, case):
    check_search_repeatable(NATIVE, operation, {**SEARCHES, **LARGE_SEARCHES}[case], "cuda")


def valley(params):
    """Rosenbrock's function of all parameters."""
    x = torch.cat([p.reshape(-1) for p in params])
    return (20 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).mean()


def search_parameters():
    shapes = ((6, 5), (4,), (), (3, 2))
    return [torch.nn.Parameter(p.detach().cuda()) for p in random_parameters(shapes, F64)]


def evaluations(kind, params, **options):
    """Losses of three calls of ``step()``."""
    optimizer, losses = kind(params, max_iter=8, **options), []

    def closure():
        optimizer.zero_grad()
        loss = valley(params)
        loss.backward()
        losses.append(loss.detach())
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_same_evaluations_as_torchs_lbfgs(line_search_fn):
    options = dict(lr=1 if line_search_fn else 0.1, line_search_fn=line_search_fn)
    theirs = evaluations(torch.optim.LBFGS, search_parameters(), **options)
    ours = evaluations(LBFGS, search_parameters(), **options)
    assert len(ours) == len(theirs)
    torch.testing.assert_close(ours[:15], theirs[:15], rtol=1e-6, atol=0)


class Reads(TorchDispatchMode):
    """Counts the copies of device numbers to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = [result] if isinstance(result, torch.Tensor) else []
        to_host = any(
            isinstance(a, torch.Tensor) and a.is_cuda and not out.is_cuda
            for out in outputs
            for a in args
        )
        self.count += to_host or func is torch.ops.aten._local_scalar_dense.default
        return result


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_at_most_one_read_per_evaluation(line_search_fn):
    params = search_parameters()
    optimizer, calls = LBFGS(params, lr=0.1, line_search_fn=line_search_fn), []

    def closure():
        optimizer.zero_grad()
        loss = valley(params)
        loss.backward()
        calls.append(1)
        return loss

    with Reads() as reads:
        optimizer.step(closure)
    assert 0 < reads.count <= len(calls)


SEARCH_OPTIONS = {
    "armijo": dict(line_search_fn="armijo", lr=1),
    "deterministic": dict(DETERMINISTIC),
}


@pytest.mark.parametrize("name", SEARCH_OPTIONS)
def test_armijo_never_waits_in_a_step(no_synchronisation, name):
    """But for the counts of the call before, which a step reads first."""
    params = search_parameters()
    optimizer = LBFGS(params, max_iter=16, max_eval=16, **SEARCH_OPTIONS[name])

    def closure():
        no_synchronisation()
        optimizer.zero_grad()
        loss = valley(params)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.stats()["stored"] > 3


def test_converged_steps_make_few_evaluations():
    params, calls = search_parameters(), []
    optimizer = LBFGS(params, line_search_fn="armijo", tolerance_grad=1e-3, max_iter=200)

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = valley(params)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert "tolerance_grad" in optimizer.stats()["stopped"] and len(calls) <= 201
    del calls[:]
    optimizer.step(closure)
    assert len(calls) == 1


@pytest.mark.parametrize("name", SEARCH_OPTIONS)
def test_captured_armijo_iterations(name):
    """A graph of ten evaluations and what follows them, replayed, is what happens eagerly."""
    results = []
    for captured in (False, True):
        params = search_parameters()
        options = {**SEARCH_OPTIONS[name], "history_size": 20, "max_iter": 10, "max_eval": 10}
        optimizer = LBFGS(params, **options)
        optimizer.reserve()

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=False)
            loss = valley(params)
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step(closure)
            for _ in range(3):
                graph.replay()
        else:
            for _ in range(3):
                optimizer.step(closure)
        results.append(([p.detach().clone() for p in params], optimizer.stats()))
    (params, counts), (others, other_counts) = results
    assert all(map(torch.equal, params, others)) and counts == other_counts
