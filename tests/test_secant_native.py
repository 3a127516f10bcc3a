"""The native CPU operations of L-BFGS against the reference."""

from math import inf, nan
from types import SimpleNamespace

import pytest
import torch
from kernel_problems import F64, arguments
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

from adaqn_cuda import native
from adaqn_cuda.ops import SCHEMAS
from adaqn_cuda.state.layout import Turn

pytestmark = pytest.mark.skipif(
    native.obstacle("cpu") is not None, reason="the native library is not built"
)
NATIVE = SimpleNamespace(**{name: getattr(torch.ops.adaqn, name) for name in SCHEMAS})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_agrees_with_the_reference(operation, case):
    check_search(NATIVE, operation, CASES[case])


@pytest.mark.parametrize("operation", [PAIR, RESIDUAL, COMBINE])
def test_several_million_elements(operation):
    """In float64: the reference's own sums of so many float32 products are inexact."""
    case = Search(numels=(3_000_017,), dtypes=(F64,), history_size=3, pairs=2, oldest=1)
    check_search(NATIVE, operation, case)


@pytest.mark.parametrize("case", ["plain", "no pairs", "one pair", "130 pairs", "bfloat16 rings"])
def test_residual_of_another_initial_matrix(case):
    check_search(NATIVE, RESIDUAL, Search(**{**vars(CASES[case]), "identity": True}))


@pytest.mark.parametrize("operation", [PAIR, RESIDUAL, COMBINE])
@pytest.mark.parametrize("case", ["plain", "130 pairs", "bfloat16 rings"])
def test_refused_trial_changes_nothing(operation, case):
    check_refused(NATIVE, operation, CASES[case], "cpu")


@pytest.mark.parametrize("turn", list(Turn))
def test_origin_is_the_accepted_trial(turn):
    check_accepted_alone_keeps(NATIVE, turn, "cpu")


@pytest.mark.parametrize("value", [inf, -inf, nan])
@pytest.mark.parametrize("where", ["direction", "gradient"])
@pytest.mark.parametrize("case", ["plain", "bfloat16 rings", "full ring"])
def test_candidate_that_is_not_finite(case, where, value):
    check_no_pair(NATIVE, value, where, CASES[case], "cpu")


def test_overflow_bars_the_pair():
    check_overflow(NATIVE, "cpu")


@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_trial_that_is_not_finite(value):
    check_trial_that_is_not_finite(NATIVE, value, "cpu")


def test_decisions():
    check_decisions(NATIVE, "cpu")


@pytest.mark.parametrize("pairs", [31, 32, 33, 64, 257, 700])
@pytest.mark.parametrize("operation", [RESIDUAL, COMBINE])
def test_long_triangle(operation, pairs):
    check_long_triangle(NATIVE, operation, pairs, "cpu")


@pytest.mark.parametrize("case", ["plain", "130 pairs"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_bits_on_repetition(operation, case):
    check_search_repeatable(NATIVE, operation, CASES[case], "cpu")


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_do_not_depend_on_the_number_of_threads(threads):
    before, results = torch.get_num_threads(), []
    for count in (threads, 3):
        torch.set_num_threads(count)
        problem = SearchProblem(Search(numels=(70_001,), history_size=9, pairs=9, oldest=0))
        NATIVE.secant_pair(*arguments(PAIR, problem.values))
        results.append(problem["gram"].clone())
    torch.set_num_threads(before)
    assert torch.equal(*(gram.nan_to_num() for gram in results))


@pytest.mark.parametrize("case", ["plain", "mixed", "bfloat16 rings", "step given"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation, case):
    problem = SearchProblem(CASES[case])
    for values in (problem["gram"], problem["s_ring"], problem["y_ring"]):
        values.nan_to_num_()
    torch.library.opcheck(
        getattr(torch.ops.adaqn, operation).default, arguments(operation, problem.values)
    )


def test_errors_name_the_argument():
    values = SearchProblem(Search()).values
    short = {**values, "words": values["words"][:-1].clone()}
    with pytest.raises(RuntimeError, match="words: expected shape"):
        NATIVE.secant_pair(*arguments(PAIR, short))
    other = {**values, "scales": values["scales"].float()}
    with pytest.raises(RuntimeError, match="scales: expected dtype float64"):
        NATIVE.secant_combine(*arguments(COMBINE, other))
    values["counters"][0] = 99
    with pytest.raises(RuntimeError, match="pairs: expected 0..6, got 99"):
        NATIVE.secant_residual(*arguments(RESIDUAL, values))
