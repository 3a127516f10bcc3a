"""csrc/common, the C++ that all native kernels share, against the reference."""

from __future__ import annotations

from math import inf, isfinite, nan

import pytest
import torch
from cmake_module import ROOT, build_module
from emulated import build
from hypothesis import given, settings
from hypothesis import strategies as st

from adaqn_cuda import reference
from adaqn_cuda.state.layout import (
    Counter,
    Flag,
    Loss,
    Stop,
    Turn,
    Word,
    pair_slots,
    projections_size,
)


@pytest.fixture(scope="module")
def common():
    """The test module of CMakeLists.txt."""
    return build_module(ROOT, "adaqn_common_test")


@pytest.fixture(scope="module")
def kernels():
    """The emulation of the CUDA kernels."""
    return build()


def test_words_are_those_of_the_layout(common):
    enums = [(Counter, "COUNTERS"), (Loss, "LOSSES"), (Flag, "FLAGS")]
    enums += [(Word, "WORDS"), (Turn, "TURNS"), (Stop, "STOPS")]
    for ours, theirs in enums:
        assert dict(getattr(common, theirs)) == {word.name: word.value for word in ours}


@st.composite
def rings(draw):
    """A ring in any position, and the numbers of its pairs."""
    slots = pair_slots(draw(st.one_of(st.integers(1, 8), st.integers(1, 64))))
    counters = torch.zeros(len(Counter), dtype=torch.int64)
    counters[Counter.PAIRS] = draw(st.integers(0, slots - 1))
    counters[Counter.OLDEST_PAIR] = draw(st.integers(0, slots - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    gram = torch.randn(slots + 1, slots, generator=generator, dtype=torch.float64) / slots
    gram.diagonal().abs_().add_(1)
    gram[slots].abs_().add_(1)
    u, z = torch.randn(2, slots, generator=generator, dtype=torch.float64)
    return slots, counters, gram, u, z


@settings(max_examples=200, deadline=None)
@given(rings())
def test_recursions(common, ring):
    slots, counters, gram, u, z = ring
    projections = torch.zeros(projections_size(slots - 1), dtype=torch.float64)
    projections[:slots] = u
    a = common.backward(gram.flatten().tolist(), counters.tolist(), slots, u.tolist())
    c = common.forward(gram.flatten().tolist(), counters.tolist(), slots, a, z.tolist())
    expected_a = reference.backward_coefficients(gram, counters, projections)
    expected_c = reference.forward_coefficients(gram, counters, projections, z)
    for ours, theirs in [(a, expected_a), (c, expected_c)]:
        ours = torch.tensor(ours, dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert torch.equal(ours == 0, theirs == 0)
    gamma = common.scalar_initial_matrix(gram.flatten().tolist(), counters.tolist(), slots)
    assert gamma == pytest.approx(reference.scalar_initial_matrix(gram, counters).item())


@settings(max_examples=200, deadline=None)
@given(rings())
def test_recursions_of_a_block_have_the_same_bits(common, kernels, ring):
    slots, counters, *numbers = ring
    gram, u, z = (x.flatten().tolist() for x in numbers)
    a = common.backward(gram, counters.tolist(), slots, u)
    c = common.forward(gram, counters.tolist(), slots, a, z)
    assert kernels.recursions(gram, counters.tolist(), slots, u, z) == (a, c)


@settings(max_examples=300, deadline=None)
@given(
    pairs=st.integers(0, 1),
    values=st.fixed_dictionaries({
        Word.STEP: st.sampled_from([0.0, 0.5]), Word.TRIALS: st.sampled_from([0, 19]),
        Word.STATUS: st.sampled_from([0, 1]), Word.FORGOTTEN: st.sampled_from([0, 1]),
        Word.TRIAL_LOSS: st.sampled_from([1.0, 1.9, 2.0, 2.4, inf, nan]),
        Word.SLOPE: st.sampled_from([-1.0, 0.5, nan]), Word.ITERATIONS: st.sampled_from([3, 99]),
        Word.TRIAL_NONFINITE: st.sampled_from([0, 2]), Word.LOSS: st.just(2.0),
        Word.TRIAL_SLOPE: st.sampled_from([-0.9, 3.0]), Word.TRIAL_SUM: st.just(7.0),
        Word.TRIAL_MAX: st.sampled_from([1e-9, 1.0]),
        Word.DIRECTION_MAX: st.sampled_from([1e-10, 1.0]),
    }),
)  # fmt: skip
def test_decision_of_a_search(common, pairs, values):
    words, counters = torch.zeros(len(Word), dtype=torch.float64), torch.zeros(len(Counter)).long()
    for word, value in values.items():
        words[word] = value
    counters[Counter.PAIRS] = pairs
    rule = (1e-4, 1e-6, 1e-7, 1e-9, 20, 100)
    ours = common.decide(words.tolist(), counters.tolist(), *rule)
    reference.secant_decide(*rule, counters, words)
    ours = torch.tensor(ours, dtype=torch.float64)
    torch.testing.assert_close(ours, words, rtol=1e-14, atol=0, equal_nan=True)


@given(
    gradients=st.integers(0, 3),
    next_gradient=st.integers(0, 2),
    anchored=st.integers(0, 1),
    flags=st.tuples(
        st.sampled_from([0.0, 1.0, 7.0]), st.sampled_from([0.0, 1.0, 9.0]), st.just(2.0)
    ),
)
def test_acceptance_of_a_step(common, gradients, next_gradient, anchored, flags):
    counters = torch.arange(len(Counter))
    counters[Counter.GRADIENTS] = gradients
    counters[Counter.NEXT_GRADIENT] = next_gradient
    counters[Counter.ANCHORED] = anchored
    ours, words = common.step(counters.tolist(), list(flags), 3)
    projections = torch.tensor(flags, dtype=torch.float64)
    accepted = reference.step_is_accepted(projections, counters)
    reference.count_step(counters, projections, accepted, 3)
    assert ours == bool(accepted)
    assert words == counters.tolist()


def counters_after(steps: int) -> torch.Tensor:
    counters = torch.zeros(len(Counter), dtype=torch.int64)
    counters[Counter.ACCEPTED] = steps
    return counters


STEPS = st.one_of(st.integers(0, 10), st.integers(0, 10**9))
NUMBERS = st.floats(-1e3, 1e3)


@given(
    square=st.one_of(st.floats(0.0, 1e30), st.sampled_from([0.0, 4.0, inf, nan])),
    max_norm=st.one_of(st.floats(1e-6, 1e6), st.sampled_from([2.0, inf])),
)
def test_clip_factor(common, square, max_norm):
    flags = torch.tensor([0.0, 5.0, square], dtype=torch.float64)
    factor = common.clip_factor(flags.tolist(), max_norm)
    assert factor == pytest.approx(reference.clip_factor(flags, max_norm).item(), rel=1e-15)
    assert factor * square**0.5 <= max_norm * (1 + 1e-15) or square in (inf, nan)


@given(steps=STEPS, beta=st.one_of(st.just(0.0), st.floats(0.0, 0.999)), s_m=NUMBERS, s_g=NUMBERS)
def test_look_ahead(common, steps, beta, s_m, s_g):
    """The weights of the reference, and s.m that moves as the vector m does."""
    counters = counters_after(steps)
    of_m, of_g = (x.item() for x in reference.old_and_new(counters, beta))
    ours = common.look_ahead(counters.tolist(), beta)
    assert ours == pytest.approx((of_m, of_g), rel=1e-12)
    u, moment = common.follow(counters.tolist(), beta, s_m, s_g)
    size = abs(s_m) + abs(s_g)
    assert u == pytest.approx(of_m * s_m + of_g * s_g, rel=1e-9, abs=1e-12 * size)
    assert moment == pytest.approx(beta * s_m + (1 - beta) * s_g, rel=1e-9, abs=1e-12 * size)


def test_without_momentum_q_is_the_gradient(common):
    assert common.look_ahead(counters_after(3).tolist(), 0.0) == (0.0, 1.0)
    assert common.follow(counters_after(3).tolist(), 0.0, 7.0, 0.3) == (0.3, 0.3)


@given(
    steps=STEPS,
    keep=st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.9, 0.999, 1.0])),
    enabled=st.booleans(),
)
def test_bias_correction(common, steps, keep, enabled):
    counters = counters_after(steps)
    expected = reference.bias_correction(counters, keep, enabled).item()
    assert common.bias_correction(counters.tolist(), keep, enabled) == pytest.approx(expected)


@given(
    s_y=st.one_of(NUMBERS, st.sampled_from([0.0, nan, inf, -inf])),
    s_b0_s=st.one_of(st.floats(0.0, 1e3), st.sampled_from([0.0, 1.0, nan, inf])),
    damping=st.sampled_from([0.0, 0.1, 0.2, 0.9]),
)
def test_damping_factor(common, s_y, s_b0_s, damping):
    words = torch.tensor([s_y, s_b0_s], dtype=torch.float64)
    expected = reference.damping_factor(*words, damping).item()
    theta = common.damping_factor(s_y, s_b0_s, damping)
    assert theta == pytest.approx(expected, rel=1e-15, nan_ok=True)
    if s_y < damping * s_b0_s and isfinite(s_y) and isfinite(s_b0_s):
        assert 0 <= theta <= 1
        damped = theta * s_y + (1 - theta) * s_b0_s
        assert damped == pytest.approx(damping * s_b0_s, abs=1e-9 * (abs(s_y) + s_b0_s))
    elif not s_y < damping * s_b0_s:
        assert theta == 1


LOSSES = st.one_of(st.floats(0.5, 2.0), st.sampled_from([1.0, 1.01, nan, inf]))
PRODUCTS = st.one_of(st.floats(-1.0, 1.0), st.sampled_from([0.0, 1e-4, nan]))


@settings(max_examples=300, deadline=None)
@given(
    ring=rings(),
    iterates=st.integers(0, 2),
    anchored=st.integers(0, 1),
    losses=st.tuples(LOSSES, LOSSES),
    loss=st.one_of(st.none(), LOSSES),
    sy=PRODUCTS,
    yy=st.sampled_from([0.0, 1.0, 3.0]),
    max_increase=st.sampled_from([1.0, 1.01, inf]),
    max_growth=st.sampled_from([1.0, 1.05, inf]),
    nonfinite=st.integers(0, 1),
)
def test_pair_update(
    common, ring, iterates, anchored, losses, loss, sy, yy, max_increase, max_growth, nonfinite
):
    slots, counters, gram, column, _ = ring
    counters[Counter.GRADIENTS], counters[Counter.NEXT_GRADIENT] = 5, 2
    counters[Counter.ITERATES], counters[Counter.ANCHORED] = iterates, anchored
    column = torch.cat([column, torch.tensor([yy, -0.7], dtype=torch.float64)])
    moments = torch.linspace(1.0, 2.0, slots, dtype=torch.float64)
    column[reference.free_slot(counters, slots)] = sy
    losses = torch.tensor(losses, dtype=torch.float64)
    projections = torch.zeros(slots + len(Flag), dtype=torch.float64)
    projections[Flag.NONFINITE], projections[Flag.NONZERO] = nonfinite, 1
    _, *ours = common.pair_update(
        counters.tolist(), slots, column.tolist(), projections[slots:].tolist(), losses.tolist(),
        loss, 1e-4, max_increase, max_growth, gram.flatten().tolist(), moments.tolist(),
    )  # fmt: skip
    w, anchor, total = torch.randn(3, 1, dtype=torch.float64)
    monitored = None if loss is None else torch.tensor(loss, dtype=torch.float64)
    reference.curvature_commit(
        [w], column, projections, monitored, 1e-4, max_increase, max_growth, gram, moments, losses,
        anchor, total, None, counters,
    )  # fmt: skip
    for mine, theirs in zip(ours, (gram, moments, losses, counters), strict=True):
        mine = torch.tensor(mine, dtype=theirs.dtype)
        torch.testing.assert_close(mine, theirs.flatten(), rtol=0, atol=0, equal_nan=True)
