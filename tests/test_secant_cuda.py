"""The CUDA kernels of L-BFGS against the reference, by the emulation."""

from itertools import cycle
from math import inf, nan

import pytest
import torch
from emulated import TYPES, EmulatedOps, build
from kernel_problems import BF16, F32, F64, run
from problems import random_parameters
from secant_arguments import OPERATIONS, Search, SearchProblem, check_search
from secant_properties import (
    CASES,
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

from adaqn_cuda import LBFGS, ops
from adaqn_cuda.lbfgs import DETERMINISTIC
from adaqn_cuda.state.layout import Turn

#: Simulated devices: threads that run in either order, and with room for one block or for many.
DEVICES = {
    "forward": EmulatedOps(),
    "reverse": EmulatedOps(1, 3, reverse_order=True),
    "many blocks": EmulatedOps(multiprocessors=20),
}


@pytest.fixture(params=DEVICES)
def emulated(request):
    return DEVICES[request.param]


@pytest.mark.parametrize(("case", "device"), list(zip(CASES, cycle(DEVICES), strict=False)))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_agrees_with_the_reference(operation, case, device):
    """Cases take turns with the ways of running them."""
    check_search(DEVICES[device], operation, CASES[case])


@pytest.mark.parametrize("case", ["plain", "no pairs", "one pair", "130 pairs", "bfloat16 rings"])
def test_residual_of_another_initial_matrix(emulated, case):
    """``images`` are left to direction_images."""
    case = Search(**{**vars(CASES[case]), "identity": True})
    check_search(emulated, RESIDUAL, case)


@pytest.mark.parametrize("pairs", [0, 1, 65, 130])
def test_images_of_any_number_of_pairs(emulated, pairs):
    case = Search(history_size=130, pairs=pairs, oldest=100)
    check_search(emulated, "direction_images", case)


@pytest.mark.parametrize("operation", [PAIR, RESIDUAL, COMBINE])
@pytest.mark.parametrize("case", ["plain", "130 pairs", "bfloat16 rings"])
def test_refused_trial_changes_nothing(emulated, operation, case):
    check_refused(emulated, operation, CASES[case], "cpu")


@pytest.mark.parametrize("turn", list(Turn))
def test_origin_is_the_accepted_trial(emulated, turn):
    check_accepted_alone_keeps(emulated, turn, "cpu")


@pytest.mark.parametrize("value", [inf, -inf, nan])
@pytest.mark.parametrize("where", ["direction", "gradient"])
@pytest.mark.parametrize("case", ["plain", "bfloat16 rings", "full ring"])
def test_candidate_that_is_not_finite(emulated, case, where, value):
    check_no_pair(emulated, value, where, CASES[case], "cpu")


def test_overflow_bars_the_pair(emulated):
    check_overflow(emulated, "cpu")


@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_trial_that_is_not_finite(emulated, value):
    check_trial_that_is_not_finite(emulated, value, "cpu")


def test_decisions():
    check_decisions(DEVICES["forward"], "cpu")


@pytest.mark.parametrize("pairs", [31, 32, 33, 64, 257, 700])
@pytest.mark.parametrize("operation", [RESIDUAL, COMBINE])
def test_long_triangle(operation, pairs):
    check_long_triangle(DEVICES["forward"], operation, pairs, "cpu")


@pytest.mark.parametrize("case", ["plain", "130 pairs"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_bits_on_repetition(emulated, operation, case):
    check_search_repeatable(emulated, operation, CASES[case], "cpu")


def launches(operation, case):
    problem, before = SearchProblem(case), build().launches()
    run(DEVICES["forward"], operation, problem)
    return build().launches() - before


def test_launches():
    """However many pairs there are; one more for every further table of parameters."""
    counts = dict(zip(OPERATIONS, (2, 1, 1, 3, 4, 3, 1), strict=True))
    many = Search(numels=(1,) * 1025)
    tables = {"secant_measure", "secant_keep", "secant_move"}
    for operation, count in counts.items():
        for case in ("plain", "no pairs", "130 pairs", "refused"):
            assert launches(operation, CASES[case]) == count, (operation, case)
        assert launches(operation, many) == count + (operation in tables)
    assert launches(RESIDUAL, Search(identity=True)) == 2
    assert launches("direction_images", CASES["130 pairs"]) == 2


@pytest.mark.parametrize(("dtype", "pair_dtype"), [(F32, F32), (F32, BF16), (F64, F64)])
def test_loading_covers_a_search(launched_late, dtype, pair_dtype):
    build().load_search(TYPES[dtype], TYPES[pair_dtype], False)
    for numels in ((4097,), (3,) * 70):
        case = Search(numels=numels, dtypes=(dtype,), pair_dtype=pair_dtype)
        for operation in OPERATIONS:
            run(DEVICES["forward"], operation, SearchProblem(case))
    assert launched_late() == 0


# ------------------------------------------------------------------ the optimizer


SHAPES = ((6, 5), (4,), (), (3, 2))
OPTIONS = {
    "as torch's": {},
    "strong Wolfe": dict(line_search_fn="strong_wolfe"),
    "armijo": dict(line_search_fn="armijo"),
    "a few pairs": dict(line_search_fn="armijo", history_size=3, self_scaled=True),
    "deterministic": dict(DETERMINISTIC),
    "bfloat16 pairs": dict(line_search_fn="armijo", history_dtype=BF16),
    "diagonal": dict(DETERMINISTIC, init="rmsprop"),
}


def path(options, iterations=90, **more):
    """Losses and final parameters on Rosenbrock's function of all parameters, in float64."""
    params = random_parameters(SHAPES, F64)
    optimizer = LBFGS(params, **{"max_iter": iterations // 3, **options, **more})
    losses = []

    def closure():
        optimizer.zero_grad()
        x = torch.cat([p.reshape(-1) for p in params])
        loss = (20 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return losses, [p.detach() for p in params], optimizer.stats()


@pytest.mark.parametrize("name", OPTIONS)
def test_optimizer_goes_the_references_way(monkeypatch, name):
    """Of a chaotic search, whose rounding errors grow, the first evaluations, and where it ends."""
    losses, params, counts = path(OPTIONS[name], fused=False)
    backend = ops.Backend("emulated", "test", DEVICES["many blocks"])
    monkeypatch.setattr(ops, "select_backend", lambda *_: backend)
    own_losses, own_params, own_counts = path(OPTIONS[name])
    assert counts["stored"] > 10
    assert own_losses[:20] == pytest.approx(losses[:20], rel=1e-7)
    assert own_losses[-1] == pytest.approx(losses[-1], rel=1e-2, abs=1e-9)
    if own_counts == counts:
        for p, q in zip(own_params, params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
