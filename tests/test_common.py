"""csrc/common, the C++ that all native kernels share, against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cmake_module import build_module
from hypothesis import given, settings
from hypothesis import strategies as st

from adaqn_cuda import reference
from adaqn_cuda.layout import Counter, Flag, Loss, pair_slots, projections_size

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """The test module of CMakeLists.txt, built anew."""
    return build_module(ROOT, tmp_path_factory.mktemp("common"), "adaqn_common_test")


def test_words_are_those_of_the_layout(common):
    for ours, theirs in [(Counter, "COUNTERS"), (Loss, "LOSSES"), (Flag, "FLAGS")]:
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


@given(
    gradients=st.integers(0, 3),
    next_gradient=st.integers(0, 2),
    anchored=st.integers(0, 1),
    flags=st.tuples(st.sampled_from([0.0, 1.0, 7.0]), st.sampled_from([0.0, 1.0, 9.0])),
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


LOSSES = st.one_of(st.floats(0.5, 2.0), st.sampled_from([1.0, 1.01, float("nan"), float("inf")]))
PRODUCTS = st.one_of(st.floats(-1.0, 1.0), st.sampled_from([0.0, 1e-4, float("nan")]))


@settings(max_examples=300, deadline=None)
@given(
    ring=rings(),
    iterates=st.integers(0, 2),
    anchored=st.integers(0, 1),
    losses=st.tuples(LOSSES, LOSSES),
    loss=st.one_of(st.none(), LOSSES),
    sy=PRODUCTS,
    yy=st.sampled_from([0.0, 1.0, 3.0]),
    max_increase=st.sampled_from([1.0, 1.01, float("inf")]),
)
def test_pair_update(common, ring, iterates, anchored, losses, loss, sy, yy, max_increase):
    slots, counters, gram, column, _ = ring
    counters[Counter.GRADIENTS], counters[Counter.NEXT_GRADIENT] = 5, 2
    counters[Counter.ITERATES], counters[Counter.ANCHORED] = iterates, anchored
    column = torch.cat([column, torch.tensor([yy], dtype=torch.float64)])
    column[reference.free_slot(counters, slots)] = sy
    losses = torch.tensor(losses, dtype=torch.float64)
    _, *ours = common.pair_update(
        counters.tolist(), slots, column.tolist(), losses.tolist(), loss, 1e-4, max_increase,
        gram.flatten().tolist(),
    )  # fmt: skip
    w, anchor, total = torch.randn(3, 1, dtype=torch.float64)
    monitored = None if loss is None else torch.tensor(loss, dtype=torch.float64)
    reference.curvature_commit(
        [w], column, monitored, 1e-4, max_increase, gram, losses, anchor, total, counters
    )
    for mine, theirs in zip(ours, (gram, losses, counters), strict=True):
        mine = torch.tensor(mine, dtype=theirs.dtype)
        torch.testing.assert_close(mine, theirs.flatten(), rtol=0, atol=0, equal_nan=True)
