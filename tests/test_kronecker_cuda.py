"""The CUDA kernels of the Kronecker matrix against the reference, by the emulation."""

from itertools import cycle

import pytest
from emulated import TYPES, EmulatedOps, build
from kernel_problems import F32, F64, run
from kronecker_arguments import Blocks, BlocksProblem
from kronecker_properties import (
    ACCUMULATE,
    APPLY,
    CASES,
    EXTREMES,
    OPERATIONS,
    STANDING,
    STEP,
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

#: Simulated devices: threads that run in either order, and shared memory for little.
DEVICES = {
    "forward": EmulatedOps(),
    "reverse": EmulatedOps(1, 3, reverse_order=True),
    "little memory": EmulatedOps(shared_kib=28),
}


@pytest.fixture(params=DEVICES)
def emulated(request):
    return DEVICES[request.param]


@pytest.mark.parametrize(("case", "device"), list(zip(CASES, cycle(DEVICES), strict=False)))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_agrees_with_the_reference(operation, case, device):
    """Cases take turns with the ways of running them."""
    check_kronecker_case(DEVICES[device], operation, CASES[case], "cpu")


@pytest.mark.parametrize("case", ["plain", "mixed", "no factors"])
def test_apply(emulated, case):
    check_options_of_apply(emulated, CASES[case], "cpu")


def test_flags_behind_those_of_pairs(emulated):
    check_with_pairs(emulated, "cpu")


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("operation", [ACCUMULATE, STEP])
def test_gradient_scale(emulated, operation, maximize):
    check_kronecker_scaling(emulated, operation, maximize, "cpu")


def test_rates_on_the_device(emulated):
    check_kronecker_rates(emulated, "cpu")


@pytest.mark.parametrize("case", ["plain", "mixed", "first call", "an outlier"])
@pytest.mark.parametrize("reason", ["nan", "inf", "-inf", "found_inf", "blank"])
def test_dropped_step_changes_nothing(emulated, reason, case):
    check_dropped_step(emulated, reason, CASES[case], "cpu")


@pytest.mark.parametrize("case", STANDING)
@pytest.mark.parametrize("operation", [ACCUMULATE, STEP])
def test_parameters_without_a_gradient_stand_still(emulated, operation, case):
    check_kronecker_standing(emulated, operation, STANDING[case], "cpu")


@pytest.mark.parametrize("case", ["plain", "mixed", "full tiles in float64", "first call"])
def test_accumulating_alone_is_what_the_step_does(emulated, case):
    check_passes_are_the_step(emulated, CASES[case], "cpu")


@pytest.mark.parametrize("case", ["plain", "blocks", "full tiles", "wide"])
def test_inverse(emulated, case):
    check_inverse(emulated, CASES[case], "cpu")


@pytest.mark.parametrize("side", [3, 64, 100])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_bases_of_low_rank(emulated, dtype, rank, side):
    check_bases(emulated, dtype, rank, side, "cpu")


@pytest.mark.parametrize("side", [40, 64, 150])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_basis_that_knows_nothing_of_what_came(emulated, dtype, side):
    check_new_directions(emulated, dtype, side, "cpu")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_hopeless_factors_keep_their_bases(emulated, value):
    check_hopeless_factors(emulated, value, "cpu")


@pytest.mark.parametrize("case", ["plain", "mixed", "full tiles", "wide", "first call in float64"])
def test_same_bits_on_repetition(case):
    check_kronecker_repeatable(DEVICES["forward"], DEVICES["little memory"], CASES[case], "cpu")


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_gradients(emulated, extreme):
    check_extreme_gradient(emulated, extreme, "cpu")


def launches(operation, case):
    problem, before = BlocksProblem(case), build().launches()
    run(DEVICES["forward"], operation, problem)
    return build().launches() - before


def test_launches():
    """Three at most where one table holds the matrices, and one more for the rest of them each."""
    assert launches(STEP, CASES["blocks"]) == 3
    assert launches(STEP, CASES["first call"]) == 3
    assert launches(STEP, CASES["no factors"]) == 2
    assert launches(ACCUMULATE, CASES["blocks"]) == 2
    assert launches(APPLY, CASES["blocks"]) == 1
    assert launches(STEP, CASES["empty"]) == 1
    vector = Blocks(shapes=((7,),), interval=5)
    assert [launches(STEP, vector.but(call=call)) for call in (20, 21, 25)] == [3, 2, 3]
    assert launches(STEP, CASES["300 matrices"]) == 1 + 2 + 2
    groups = Blocks(shapes=((3, 2),) * 65, groups=65)
    assert launches(STEP, groups) == 2 + 2 + 2


@pytest.mark.parametrize("dtype", [F32, F64])
def test_loading_covers_everything(launched_late, dtype):
    build().load(*[TYPES[dtype]] * 3, False, True)
    for shapes in (((6, 5), (4,)), ((3, 2),) * 70):
        for operation in OPERATIONS:
            run(
                DEVICES["forward"], operation, BlocksProblem(Blocks(shapes=shapes, dtypes=(dtype,)))
            )
    assert launched_late() == 0
