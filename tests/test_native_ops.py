"""Every native operation against the reference, and against a float64 oracle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from math import inf

import pytest
import torch
from by_group import apart
from native_state import F64, State, native
from oracle import two_loop

from adaqn_cuda import ops, reference
from adaqn_cuda.native import library_obstacle, obstacle
from adaqn_cuda.state.layout import Counter, Flag

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.skipif(
    library_obstacle() is not None and os.environ.get("ADAQN_REQUIRE_EXT") != "1",
    reason="the native library is not built",
)


#: Those of a Kronecker matrix and of L-BFGS have tests of their own: test_kronecker_native.py and
#: test_secant_native.py.
NAMES = [name for name in ops.SCHEMAS if not name.startswith(("kronecker", "secant"))]


def test_the_library_serves_the_cpu():
    assert obstacle("cpu") is None
    assert ops.select_backend(torch.device("cpu"), True).name == "native"


STATES = {
    "one": State([(31,)]),
    "empty history": State([(31,)], pairs=0, gradients=0),
    "full and wrapped": State([(50, 83), (947,)], pairs=4, oldest=3, gradients=3),
    "many dtypes": State(
        [(3, 5), (), (0,), (700,), (9, 1, 2)], [BF16, F32, F16], pairs=2, oldest=4
    ),
    "double": State([(3, 5), (), (0,), (4097,)], [F64, F32, BF16, F16], pairs=3, oldest=3),
    "bfloat16 rings": State([(4097,), (2,)], history_dtype=BF16, fisher_dtype=BF16, oldest=2),
    "bfloat16 pairs, double": State([(4097,)], [F64], history_dtype=BF16),
    "scalar": State([(40, 50)], scalar=True, oldest=4),
    "scalar without pairs": State([(40, 50)], scalar=True, pairs=0),
    "long history": State([(2500,)], history_size=64, pairs=64, oldest=60, fisher_size=70),
    "short history": State(
        [(33000,)], [F64], history_size=1, pairs=1, oldest=1, fisher_size=1, gradients=1
    ),
    "many tensors": State([(i % 7,) for i in range(600)], [F32, BF16]),
    "averaged": State([(4097,), (31,)], averaged=True, damped=True, pairs=4, oldest=3),
    "averaged, double": State(
        [(4097,), (1,)], [F64, F16], averaged=True, damped=True, scalar=True, oldest=2
    ),
    "averaged, bfloat16": State(
        [(33001,)], [BF16], averaged=True, damped=True, history_dtype=BF16, fisher_dtype=BF16
    ),
    "nothing": State([(0,), (0, 3)]),
}  # fmt: skip


def prepared(name: str, state: State) -> State:
    """A copy of ``state`` as the operations before ``name`` leave it."""
    if name == "diagonal_step":
        return state.without_history()
    state = state.clone()
    before = ["direction_pass1", "direction_pass2"]
    if name in ("direction_pass2", "iterate_swap"):
        del before[1:]
    elif name not in ("direction_images", "direction_pass3"):
        before.clear()
    for earlier in before:
        identity = name == "direction_images"
        getattr(reference, earlier)(*state.arguments(earlier, identity=identity))
    return state


def assert_agrees(
    ours: State, theirs: State, tolerance: float | None = None, capped: bool = False
) -> None:
    """Equal up to rounding of the least precise dtype; scratch only where it has a meaning."""
    for state in (ours, theirs):
        if capped:  # the kernel leaves p there
            state.direction.zero_()
        free = sorted(set(range(state.slots)) - set(state.rows()))
        state.projections[free] = state.images[free] = state.moments[free] = 0.0
    for (name, a), b in zip(ours.tensors().items(), theirs.tensors().values(), strict=True):
        coarse = a.dtype in (BF16, F16)
        precise = a.dtype in (F64, torch.int64) and ours.dtype == F64
        rtol = tolerance or (2**-7 if coarse else 1e-9 if precise else 1e-4)
        scale = b.double().nan_to_num(0.0).abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=rtol * scale, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_reference(name, case):
    ours = prepared(name, STATES[case])
    theirs = ours.clone()
    native(name, ours)
    getattr(reference, name)(*theirs.arguments(name))
    if name == "curvature_pass_b":  # products with rows that hold no pair have no meaning
        kept = [*theirs.rows(), (theirs.oldest + theirs.pairs) % theirs.slots, -2, -1]
        for state in (ours, theirs):
            column, state.column = state.column, torch.zeros_like(state.column)
            state.column[kept] = column[kept]
    assert_agrees(ours, theirs)
    if name in ("iterate_swap", "iterate_restore", "curvature_commit"):
        assert_agrees(ours, theirs, tolerance=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_scale": torch.tensor([512.0])},
        {"maximize": True, "found_inf": torch.zeros(())},
        {"keep": 1.0, "add": 1.0},
        {"group_sizes": [1, 2, 1], "lr": [0.1, 0.0, 0.3], "weight_decay": [0.0, 0.0, 0.5]},
        {
            "group_sizes": [0, 4], "lr": [0.0] * 2, "weight_decay": [0.0] * 2,
            "lr_tensor": torch.tensor([0.3, 0.2], dtype=F64),
            "weight_decay_tensor": torch.tensor([0.1, 0.2]),
        },
    ],
)  # fmt: skip
def test_options_of_a_step(changes):
    ours = STATES["double"].clone()
    theirs = ours.clone()
    reference.direction_step(*theirs.arguments("direction_step", **changes))
    assert_agrees(native("direction_step", ours, **changes), theirs)


AVERAGES = {
    "plain": State([(4097,), (3, 31)], pairs=4, oldest=3, gradients=3),
    "mixed": State(
        [(700,), (0,), (9, 1, 2)], [F32, BF16, F16], history_dtype=BF16, fisher_dtype=BF16
    ),
    "double": State([(3, 5), (), (0,), (4097,)], [F64, F32], pairs=2, oldest=4),
    "no pairs": State([(8193,)], pairs=0, gradients=0),
    "no history": State([(8193,), (5,)], history_size=0, pairs=0, gradients=0),
}  # fmt: skip


def combinations() -> list[dict]:
    """Every option beyond the paper: off, on without effect, on with effect; with one another."""
    return [
        {"max_grad_norm": clip, "correct_bias": correct, "max_direction": cap}
        for clip, correct, cap in product([inf, 1e9, 0.5], [False, True], [inf, 1e9, 0.05])
    ]


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("case", AVERAGES)
@pytest.mark.parametrize("name", ["direction_step", "diagonal_step"])
def test_every_combination_of_options(name, case, scalar, averaged):
    """Three steps, so that averages and their words are read as they were written."""
    if name == "direction_step" and case == "no history" and scalar:
        pytest.skip("there is no such step")
    start = replace(AVERAGES[case], scalar=scalar, averaged=averaged)
    for changes in combinations():
        ours = prepared(name, start)
        theirs = ours.clone()
        for _ in range(3):
            native(name, ours, **changes)
            getattr(reference, name)(*theirs.arguments(name, **changes))
        assert_agrees(ours, theirs, capped=changes["max_direction"] < inf)


def test_what_was_in_the_scratch_does_not_matter():
    """Words of slots without a pair are zero after a step."""
    clean = State([(4097,)], averaged=True, pairs=2, oldest=4)
    dirty = clean.clone()
    for scratch in (dirty.projections, dirty.images, dirty.direction):
        scratch.fill_(torch.nan)
    for (name, a), b in zip(
        native("direction_step", clean, **LIMITS).tensors().items(),
        native("direction_step", dirty, **LIMITS).tensors().values(),
        strict=True,
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("name", ["direction_pass2", "diagonal_step"])
def test_averages_by_group(name, averaged):
    """Blocks that several groups share, groups without parameters, and a parameter that stands."""
    shapes = [(1000,), (7,), (0,), (4097,), (64, 3), (33001,), (5,)]
    ours = State(shapes, averaged=averaged, oldest=3)
    ours = ours.without_history() if name == "diagonal_step" else prepared(name, ours)
    ours.grads[3] = None
    changes = {"group_sizes": [1, 1, 0, 2, 1, 2], "lr": [0.1] * 6, "weight_decay": [0.0] * 6}
    changes |= {**apart(6), "correct_bias": True}
    theirs = ours.clone()
    getattr(reference, name)(*theirs.arguments(name, **changes))
    assert_agrees(native(name, ours, **changes), theirs)


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("history_size", [0, 4])
def test_another_initial_matrix(history_size, diagonal, averaged):
    """Pass 2 leaves D q - sum a_i y_i and no images: they come once H0 has been applied."""
    ours = State([(33001,), (7,)], scalar=not diagonal, averaged=averaged, oldest=3)
    if history_size == 0:
        ours = ours.without_history()
        ours.iterate_sum = None
    theirs = ours.clone()
    changes = {"identity": True, "max_direction": 0.5, "max_grad_norm": 0.5, "correct_bias": True}
    for state, apply in [(ours, torch.ops.adaqn), (theirs, reference)]:
        state.images[:-1], state.images[-1] = 7.0, 2.0
        apply.direction_pass1(*state.arguments("direction_pass1", **changes))
        apply.direction_pass2(*state.arguments("direction_pass2", **changes))
        assert (state.images[:-1] == 7).all() and state.images[-1] == 2
        state.direction *= 0.3
        if history_size:
            apply.direction_images(*state.arguments("direction_images"))
        apply.direction_pass3(*state.arguments("direction_pass3", **changes))
        assert state.images[-1] == 2
    assert_agrees(ours, theirs, capped=True)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("history_dtype", [None, BF16])
def test_moments_follow_the_momentum(dtype, history_dtype):
    """Kept from step to step, they stay s_i.m of the stored s_i, without a pass over either."""
    state = State(
        [(50_000,)], [dtype], averaged=True, history_dtype=history_dtype, pairs=4, oldest=2
    )
    for step in range(30):
        state.grads = [state.randn(50_000).to(dtype)]
        native("direction_step", state, max_grad_norm=100.0 + 10 * step, lr=[0.0])
    rows = state.rows()
    exact = state.s_ring[rows].double() @ state.momentum.double()
    torch.testing.assert_close(state.moments[rows], exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("averaged", [False, True])
def test_the_direction_is_capped_to_equality(averaged):
    """|p| = max_direction |H0 q|, with the direction unchanged; no effect above its length."""
    free = State([(100_003,)], [F64], averaged=averaged, pairs=4)
    bound, loose = free.clone(), free.clone()
    still = {"lr": [1.0], "weight_decay": [0.0]}
    before = free.params[0].clone()
    moves = []
    for state, cap in [(free, inf), (bound, 0.25), (loose, 1e6)]:
        native("direction_step", state, max_direction=cap, **still)
        moves.append(before - state.params[0])
    size = free.images[-1].sqrt()
    assert moves[0].norm() > 0.25 * size
    torch.testing.assert_close(moves[1].norm(), 0.25 * size)
    torch.testing.assert_close(moves[1] / moves[1].norm(), moves[0] / moves[0].norm())
    torch.testing.assert_close(moves[2], moves[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_norms_of_float32_neither_vanish_nor_overflow(scale):
    """Squares that float32 cannot hold: the gradient is clipped to half its norm all the same."""
    state = State([(4097,)], scalar=True, pairs=0, gradients=0, fisher_size=1)
    state.grads = [scale * torch.ones(4097)]
    limit = 0.5 * scale * 4097**0.5
    native("direction_step", state, max_grad_norm=limit, max_direction=1.0)
    assert state.projections[Flag.SQUARE].sqrt().item() == pytest.approx(2 * limit, rel=1e-6)
    torch.testing.assert_close(state.fisher[0], torch.full((4097,), 0.5 * scale))
    assert state.images[-1].sqrt().item() == pytest.approx(limit, rel=1e-6)


# ------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("size", [0.0, 1e-6, 30.0])
@pytest.mark.parametrize("explicit", [None, 1.0, -1.0])
@pytest.mark.parametrize("case", ["plain", "mixed", "double"])
def test_damping_and_given_y(case, explicit, size):
    """B0 s of any size, a y from the gradients or given, of either sign of s.y."""
    rows = {} if explicit is None else {"fisher_size": 1, "gradients": 1}
    ours = replace(AVERAGES[case], averaged=True, damped=size > 0, **rows)
    free = (ours.oldest + ours.pairs) % ours.slots
    s = ours.iterate_sum / 3 - ours.anchor
    if explicit is not None:
        ours.fisher[0] = explicit * s
    if ours.damped:
        ours.image = size * s
    theirs = ours.clone()
    for name in ("curvature_pass_a", "curvature_pass_b"):
        changes = {"explicit": explicit is not None}
        native(name, ours, **changes)
        getattr(reference, name)(*theirs.arguments(name, **changes))
        unread = [*set(range(ours.slots)) - {*ours.rows(), free}]
        ours.column[unread] = theirs.column[unread] = 0.0
        assert_agrees(ours, theirs)
    stored, m = ours.s_ring[free].double(), ours.momentum.double()
    error = (ours.column[-1] - stored @ m).abs()
    assert error <= 1e-6 * stored.norm() * m.norm()
    if ours.damped and (size > 1 or explicit == -1):
        assert ours.weights[-1] > 0
        coarse = ours.s_ring.dtype == BF16
        s_y, bound = ours.column[free].to(s), 0.2 * (s @ ours.image)
        torch.testing.assert_close(s_y, bound, rtol=2**-7 if coarse else 1e-5, atol=0)
    else:
        assert ours.weights[-1] == 0


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("outcome", ["store", "reset", "skip", "first", "none", "no monitor"])
def test_outcomes_of_a_pair_update(outcome, averaged):
    changes = {}
    ours = replace(STATES["many dtypes"], averaged=averaged)
    if outcome == "reset":
        changes["monitored_loss"] = torch.tensor(2.0, dtype=F64)
    if outcome == "skip":
        ours.column[-2] = 1e9
    if outcome == "first":
        ours.counters[Counter.ANCHORED] = 0
    if outcome == "none":
        ours.counters[Counter.ITERATES] = 0
    if outcome == "no monitor":
        changes["monitored_loss"] = None
    theirs = ours.clone()
    reference.curvature_commit(*theirs.arguments("curvature_commit", **changes))
    native("curvature_commit", ours, **changes)
    assert torch.equal(ours.moments, theirs.moments)
    assert_agrees(ours, theirs, tolerance=1e-6)


@pytest.mark.parametrize("poison", ["iterate_sum", "fisher", "image"])
@pytest.mark.parametrize("dtype", [None, BF16])
def test_a_candidate_that_is_not_finite_leaves_zeros(poison, dtype):
    state = State([(33000,)], history_dtype=dtype, averaged=True, damped=True)
    torch.atleast_2d(getattr(state, poison))[0, 17] = torch.inf
    native("curvature_pass_b", state)
    assert not state.s_ring[3].any() and not state.y_ring[3].any() and not state.column.any()


def test_no_tensors_at_all():
    state = State([], pairs=0, gradients=0)
    state.counters.zero_()
    before = state.clone()
    for name in NAMES:
        native(name, state)
    assert torch.equal(state.counters, before.counters)


# ------------------------------------------------------------------------- directions


def direction_error(state: State) -> tuple[float, float]:
    """Relative errors of the kernel and of a sequential recursion in the state's dtype."""
    state = state.clone()
    state.params = [torch.zeros_like(p) for p in state.params]
    g = torch.cat([g.flatten() for g in state.grads]).to(state.dtype)
    rows = state.rows()

    def two_loop_in(dtype: torch.dtype) -> torch.Tensor:
        v = 0.9 * state.accumulator.to(dtype) + 0.1 * g.to(dtype) ** 2
        pairs = [(state.s_ring[i].to(dtype), state.y_ring[i].to(dtype)) for i in rows]
        return two_loop(g.to(dtype), pairs, 1 / torch.sqrt(v + 1e-8)).double()

    exact, sequential = two_loop_in(F64), two_loop_in(state.dtype)
    native("direction_step", state, lr=[1.0], weight_decay=[0.0])
    ours = -torch.cat([p.flatten() for p in state.params]).double()
    norm = exact.norm().clamp(min=1e-30)
    return ((ours - exact).norm() / norm).item(), ((sequential - exact).norm() / norm).item()


@pytest.mark.parametrize("history_dtype", [None, BF16])
@pytest.mark.parametrize(("history_size", "pairs"), [(1, 1), (5, 3), (10, 10), (20, 20), (64, 64)])
@pytest.mark.parametrize("size", [1, 31, 4097, 20_000])
def test_direction_is_as_exact_as_the_two_loops(size, history_size, pairs, history_dtype):
    pairs = min(pairs, size)  # more are linearly dependent, and no recursion is exact
    state = State(
        [(size,)], history_size=history_size, pairs=pairs, oldest=history_size,
        history_dtype=history_dtype, fisher_size=1, gradients=1, seed=size,
    )  # fmt: skip
    ours, sequential = direction_error(state)
    assert ours <= max(1e-6, 3 * sequential)


def test_direction_of_three_million():
    state = State(
        [(3_000_001,)], history_size=10, pairs=10, oldest=7, fisher_size=1, gradients=1
    )  # fmt: skip
    ours, sequential = direction_error(state)
    assert ours <= max(1e-6, 3 * sequential)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets(isa):
    """The same tests with narrower vectors; where a machine lacks them, with what it has."""
    chosen = (
        "halves or agrees and (direction_step or diagonal_step or curvature_pass)"
        " or combination and mixed-False-True or damping and mixed or exact and 4097"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            chosen,
            __file__,
        ],
        env={**os.environ, "ADAQN_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


# ------------------------------------------------------------------------- tensors of any layout


def scattered(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values in memory that is not contiguous."""
    if kind == "transposed":
        return tensor.mT.contiguous().mT
    if kind == "channels last":
        return tensor.contiguous(memory_format=torch.channels_last)
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
    view = wide[..., ::2]
    return view.copy_(tensor)


@pytest.mark.parametrize("kind", ["transposed", "channels last", "every second"])
@pytest.mark.parametrize("dtypes", [[F32], [BF16, F16], [F64]])
def test_layout_does_not_change_a_bit(kind, dtypes):
    plain = State([(3, 4, 5, 6), (2, 3, 40, 50)], dtypes)
    strided = plain.clone()
    strided.params = [scattered(p, kind) for p in plain.params]
    strided.grads = [scattered(g, kind) for g in plain.grads]
    assert not any(t.is_contiguous() for t in strided.params + strided.grads)
    for name in ("direction_step", "iterate_swap", "iterate_restore", "curvature_commit"):
        native(name, plain, max_direction=0.1)
        native(name, strided, max_direction=0.1)
        for (label, a), b in zip(
            plain.tensors().items(), strided.tensors().values(), strict=True
        ):  # fmt: skip
            assert torch.equal(a, b), f"{name}: {label}"


def test_gradients_may_be_missing_expanded_or_of_another_dtype():
    ours = State([(40, 3), (5,), (6, 7)])
    ours.grads = [torch.tensor([1.0, 2.0, 3.0]).expand(40, 3), None, ours.grads[2].to(BF16)]
    theirs = ours.clone()
    theirs.grads = [ours.grads[0].clone(), None, ours.grads[2].float()]
    native("direction_step", ours)
    native("direction_step", theirs)
    for a, b in zip(ours.tensors().values(), theirs.tensors().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_halves_round_as_in_torch(dtype):
    """Every half to float and back, and floats around every rounding boundary to half."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    w, saved = halves.clone(), torch.zeros(2**16)
    words = torch.zeros(6, dtype=F64)
    words[Flag.NONFINITE] = 1
    counters = torch.zeros(len(Counter), dtype=torch.int64)
    torch.ops.adaqn.iterate_swap([w], torch.zeros(2**16), words, counters, saved)
    same = saved.view(torch.int32) == halves.float().view(torch.int32)
    assert torch.equal(~same & ~halves.isnan(), torch.zeros_like(same))
    assert torch.equal(saved.isnan(), halves.isnan())

    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    near = (halves.float().view(torch.int32).repeat(3, 1) + torch.tensor([[-1], [0], [1]])).view(-1)
    middle = halves.float().view(torch.int32) + (1 << (12 if dtype == F16 else 15))
    floats = torch.cat([bits.to(torch.int32), near, middle, middle + 1, middle - 1]).view(F32)
    rounded = torch.zeros(len(floats), dtype=dtype)
    torch.ops.adaqn.iterate_restore([rounded], floats)
    expected = floats.to(dtype)
    assert torch.equal(rounded.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(
        rounded.view(torch.int16)[number], expected.view(torch.int16)[number]
    )  # fmt: skip


# ------------------------------------------------------------------------- invariants


SCRATCH = {"direction", "projections", "images"}
LIMITS = {"max_grad_norm": 0.5, "max_direction": 0.1, "correct_bias": True}


def assert_nothing_lasting_has_changed(after: State, before: State) -> None:
    for (name, a), b in zip(after.tensors().items(), before.tensors().values(), strict=True):
        same = torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))
        assert same or name in SCRATCH, name


@pytest.mark.parametrize("limits", [{}, LIMITS])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, "found_inf"])
@pytest.mark.parametrize("name", ["direction_step", "diagonal_step"])
@pytest.mark.parametrize(
    "case",
    ["many dtypes", "double", "bfloat16 rings", "scalar", "averaged", "averaged, bfloat16"],
)
def test_a_dropped_step_changes_one_counter(case, name, poison, limits):
    state = prepared(name, STATES[case])
    changes = dict(limits)
    if poison == "found_inf":
        changes["found_inf"] = torch.ones(1)
    else:
        state.grads[0].view(-1)[-1] = poison
    before = state.clone()
    native(name, state, **changes)
    assert state.counters[Counter.STEPS_SKIPPED] == 1
    state.counters[Counter.STEPS_SKIPPED] = 0
    assert_nothing_lasting_has_changed(state, before)


def test_a_dropped_step_with_another_initial_matrix_changes_one_counter():
    state = replace(STATES["averaged"], scalar=True)
    state.grads[1][:] = torch.nan
    before = state.clone()
    for name in ("direction_pass1", "direction_pass2", "direction_images", "direction_pass3"):
        native(name, state, identity=True, **LIMITS)
    assert state.counters[Counter.STEPS_SKIPPED] == 1
    state.counters[Counter.STEPS_SKIPPED] = 0
    assert_nothing_lasting_has_changed(state, before)


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("name", ["direction_step", "diagonal_step"])
def test_a_blank_step_changes_nothing(name, averaged):
    state = State([(40,)], pairs=0, gradients=0, averaged=averaged)
    if name == "diagonal_step":
        state = state.without_history()
    state.counters.zero_()
    state.grads = [None]
    before = state.clone()
    native(name, state)
    assert_nothing_lasting_has_changed(state, before)


@pytest.mark.parametrize("limits", [{}, LIMITS])
@pytest.mark.parametrize("case", ["double", "scalar", "averaged", "averaged, bfloat16"])
def test_passes_make_the_step(case, limits):
    """direction_step does what the three passes do, to the bit."""
    whole = STATES[case].clone()
    parts = whole.clone()
    native("direction_step", whole, **limits)
    for name in ("direction_pass1", "direction_pass2", "direction_pass3"):
        native(name, parts, **limits)
    for (name, a), b in zip(whole.tensors().items(), parts.tensors().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtypes", [[F32], [BF16, F16], [F64, F32]])
def test_swap_and_restore_are_inverse_to_the_bit(dtypes):
    state = prepared("iterate_swap", State([(4097,), (3, 3), ()], dtypes))
    before = [p.clone() for p in state.params]
    native("iterate_swap", state)
    assert not any(torch.equal(p, q) for p, q in zip(state.params, before, strict=True))
    native("iterate_restore", state)
    assert all(torch.equal(p, q) for p, q in zip(state.params, before, strict=True))


def test_swap_without_any_iterate_leaves_the_parameters():
    state = State([(40,)])
    state.counters[Counter.ITERATES] = 0
    state.projections[Flag.NONFINITE] = 1
    before = state.params[0].clone()
    native("iterate_swap", state)
    assert torch.equal(state.params[0], before) and torch.equal(state.direction, before)


def test_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            state = State(
                [(70_000,), (100_000,)], [F32, BF16], oldest=4, averaged=True, damped=True
            )
            native("direction_step", state, **LIMITS)
            for name in ("curvature_pass_a", "curvature_pass_b", "curvature_commit"):
                native(name, state)
            alone = state.without_history()
            native("diagonal_step", alone, **LIMITS)
            results.append(
                {**state.tensors(), **{f"{k} alone": v for k, v in alone.tensors().items()}}
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, results[0][name]), name


# ------------------------------------------------------------------------- what is refused


BAD = {
    "s_ring: expected shape": {"s_ring": torch.zeros(5, 32)},
    "s_ring: expected dtype": {"s_ring": torch.zeros(5, 31, dtype=F64)},
    "s_ring: expected contiguous rows": {"s_ring": torch.zeros(31, 5).T},
    "s_ring: expected a matrix": {"s_ring": torch.zeros(31)},
    "s_ring: expected no rows or at least 2": {"s_ring": torch.zeros(1, 31)},
    "y_ring: expected shape": {"y_ring": torch.zeros(5, 30)},
    "gram: expected shape (5, 4)": {"y_ring": torch.zeros(4, 31)},
    "gram: expected dtype float64": {"gram": torch.zeros(6, 5)},
    "gram: expected shape": {"gram": torch.zeros(5, 5, dtype=F64)},
    "accumulator: expected shape": {"accumulator": torch.zeros(30)},
    "momentum: expected shape": {"momentum": torch.zeros(30)},
    "momentum: expected dtype float32": {"momentum": torch.zeros(31, dtype=F64)},
    "moments: expected shape (5)": {"moments": torch.zeros(6, dtype=F64)},
    "moments: expected dtype float64": {"moments": torch.zeros(5)},
    "fisher: expected a matrix": {"fisher": torch.zeros(31)},
    "iterate_sum: expected dtype": {"iterate_sum": torch.zeros(31, dtype=BF16)},
    "direction: expected dtype": {"direction": torch.zeros(31, dtype=torch.int64)},
    "projections: expected shape": {"projections": torch.zeros(3, dtype=F64)},
    "images: expected shape (6)": {"images": torch.zeros(5, dtype=F64)},
    "counters: expected dtype": {"counters": torch.zeros(len(Counter))},
    "counters: expected shape": {"counters": torch.zeros(3, dtype=torch.int64)},
    "pairs: expected 0..4, got 5": {"counters": torch.tensor([5] + [0] * 10)},
    "oldest pair: expected 0..4": {"counters": torch.tensor([0, -1] + [0] * 9)},
    "gradients: expected 0..3": {"counters": torch.tensor([0, 0, 4] + [0] * 8)},
    "next gradient: expected 0..2": {"counters": torch.tensor([0, 0, 0, 3] + [0] * 7)},
    "grads: expected one for each": {"grads": []},
    "grads[0]: expected 31 elements": {"grads": [torch.zeros(30)]},
    "grads[0]: expected float32": {"grads": [torch.zeros(31, dtype=torch.int32)]},
    "params[0]: expected float32": {"params": [torch.zeros(31, dtype=torch.complex64)]},
    "group_sizes: expected": {"group_sizes": [2]},
    "lr: expected 1 numbers": {"lr": [0.1, 0.2]},
    "weight_decay: expected 1 contiguous": {"weight_decay_tensor": torch.zeros(2)},
    "grad_scale: expected 1": {"grad_scale": torch.ones(2)},
}


BAD_BY_OPERATION = {
    "direction_pass1": {"moments: expected shape (5)": {"moments": torch.zeros(6, dtype=F64)}},
    "direction_pass2": {
        "group_sizes: expected sizes that sum to 1": {"group_sizes": [2]},
        "group_sizes: expected sizes of at least 0, got -1": {"group_sizes": [-1]},
        "keeps: expected 1 numbers, got 2": {"keeps": [0.9, 0.8]},
        "momentum: expected shape": {"momentum": torch.zeros(30)},
        "images: expected shape (6)": {"images": torch.zeros(5, dtype=F64)},
    },
    "direction_images": {
        "y_ring: expected shape": {"y_ring": torch.zeros(5, 30)},
        "direction: expected dtype": {"direction": torch.zeros(31, dtype=torch.int64)},
        "projections: expected shape (8)": {"projections": torch.zeros(7, dtype=F64)},
        "images: expected shape (6)": {"images": torch.zeros(5, dtype=F64)},
        "pairs: expected 0..4, got 5": {"counters": torch.tensor([5] + [0] * 10)},
    },
    "direction_pass3": {
        "moments: expected shape (5)": {"moments": torch.zeros(6, dtype=F64)},
        "fisher_size: expected at least 1": {"fisher_size": 0},
        "iterate_sum: expected shape": {"iterate_sum": torch.zeros(30)},
    },
    "diagonal_step": {
        "params[0]: expected float32": {"params": [torch.zeros(31, dtype=torch.complex64)]},
        "grads: expected one for each": {"grads": []},
        "lr: expected 1 numbers": {"lr": [0.1, 0.2]},
        "betas: expected 1 numbers, got 0": {"betas": []},
        "adds: expected 1 numbers, got 2": {"adds": [0.1, 0.2]},
        "epsilons: expected 1 numbers, got 3": {"epsilons": [1e-8] * 3},
        "accumulator: expected shape": {"accumulator": torch.zeros(30)},
        "momentum: expected dtype float32": {"momentum": torch.zeros(31, dtype=F64)},
        "found_inf: expected 1": {"found_inf": torch.zeros(2)},
        "counters: expected shape": {"counters": torch.zeros(3, dtype=torch.int64)},
        "gradients: expected 0..1": {"counters": torch.tensor([0, 0, 2] + [0] * 8)},
    },
    "curvature_pass_a": {
        "fisher: expected 1 row": {"explicit": True},
        "fisher: expected a matrix of at least 1": {"fisher": torch.zeros(0, 31)},
        "image: expected shape": {"image": torch.zeros(30)},
        "weights: expected shape (4)": {"weights": torch.zeros(3, dtype=F64)},
    },
    "curvature_pass_b": {
        "s_ring: expected a matrix of at least 2": {"s_ring": torch.zeros(0, 31)},
        "y_ring: expected dtype": {"y_ring": torch.zeros(5, 31, dtype=BF16)},
        "image: expected dtype float32": {"image": torch.zeros(31, dtype=F64)},
        "momentum: expected shape": {"momentum": torch.zeros(30)},
        "weights: expected shape (4)": {"weights": torch.zeros(3, dtype=F64)},
        "column: expected shape (7)": {"column": torch.zeros(6, dtype=F64)},
    },
    "curvature_commit": {
        "column: expected shape (7)": {"column": torch.zeros(6, dtype=F64)},
        "moments: expected shape (5)": {"moments": torch.zeros(6, dtype=F64)},
        "momentum: expected shape": {"momentum": torch.zeros(30)},
        "gram: expected a matrix of at least 3": {"gram": torch.zeros(2, 1, dtype=F64)},
    },
}


@pytest.mark.parametrize(
    ("name", "message", "changes"),
    [("direction_step", *bad) for bad in BAD.items()]
    + [(name, *bad) for name, table in BAD_BY_OPERATION.items() for bad in table.items()],
)
def test_bad_arguments_are_named_before_anything_is_written(name, message, changes):
    state = State([(31,)])
    if name == "diagonal_step":
        state = state.without_history()
    before = state.clone()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        native(name, state, **changes)
    for label, tensor in state.tensors().items():
        assert torch.equal(tensor, before.tensors()[label]), label


# ------------------------------------------------------------------------- torch's own checks


@pytest.mark.parametrize(
    ("case", "limits"),
    [("one", {}), ("double", LIMITS), ("bfloat16 rings", {}), ("scalar", LIMITS), ("averaged", {})],
)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, case, limits):
    state = prepared(name, STATES[case])
    torch.library.opcheck(getattr(torch.ops.adaqn, name).default, state.arguments(name, **limits))
