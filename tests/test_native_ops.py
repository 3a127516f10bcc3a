"""Every native operation against the reference, and against a float64 oracle."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from native_state import F64, State, native
from oracle import two_loop

from adaqn_cuda import ops, reference
from adaqn_cuda.layout import Counter, Flag
from adaqn_cuda.native import library_obstacle, obstacle

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.skipif(
    library_obstacle() is not None and os.environ.get("ADAQN_REQUIRE_EXT") != "1",
    reason="the native library is not built",
)


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
    "many tensors": State([(i % 7,) for i in range(3000)], [F32, BF16]),
    "nothing": State([(0,), (0, 3)]),
}  # fmt: skip


def prepared(name: str, state: State) -> State:
    """A copy of ``state`` as the operations before ``name`` leave it."""
    state = state.clone()
    if name in ("direction_pass2", "direction_pass3", "iterate_swap"):
        reference.direction_pass1(*state.arguments("direction_pass1"))
    if name == "direction_pass3":
        reference.direction_pass2(*state.arguments("direction_pass2"))
    return state


def assert_agrees(ours: State, theirs: State, tolerance: float | None = None) -> None:
    """Equal up to rounding of the least precise dtype; scratch only where it has a meaning."""
    for state in (ours, theirs):
        free = sorted(set(range(state.slots)) - set(state.rows()))
        state.projections[free] = state.images[free] = 0.0
    for (name, a), b in zip(ours.tensors().items(), theirs.tensors().values(), strict=True):
        coarse = a.dtype in (BF16, F16)
        precise = a.dtype in (F64, torch.int64) and ours.dtype == F64
        rtol = tolerance or (2**-7 if coarse else 1e-9 if precise else 1e-4)
        scale = b.double().nan_to_num(0.0).abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=rtol * scale, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_agrees_with_the_reference(name, case):
    ours = prepared(name, STATES[case])
    theirs = ours.clone()
    native(name, ours)
    getattr(reference, name)(*theirs.arguments(name))
    if name == "curvature_pass_b":  # products with rows that hold no pair have no meaning
        kept = [*theirs.rows(), (theirs.oldest + theirs.pairs) % theirs.slots, theirs.slots]
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


@pytest.mark.parametrize("outcome", ["reset", "skip", "first", "none", "no monitor"])
def test_outcomes_of_a_pair_update(outcome):
    changes = {}
    ours = STATES["many dtypes"].clone()
    if outcome == "reset":
        changes["monitored_loss"] = torch.tensor(2.0, dtype=F64)
    if outcome == "skip":
        ours.column[-1] = 1e9
    if outcome == "first":
        ours.counters[Counter.ANCHORED] = 0
    if outcome == "none":
        ours.counters[Counter.ITERATES] = 0
    if outcome == "no monitor":
        changes["monitored_loss"] = None
    theirs = ours.clone()
    reference.curvature_commit(*theirs.arguments("curvature_commit", **changes))
    assert_agrees(native("curvature_commit", ours, **changes), theirs, tolerance=1e-6)


@pytest.mark.parametrize("poison", ["iterate_sum", "fisher"])
@pytest.mark.parametrize("dtype", [None, BF16])
def test_a_candidate_that_is_not_finite_leaves_zeros(poison, dtype):
    state = State([(33000,)], history_dtype=dtype)
    getattr(state, poison).view(-1)[17] = torch.inf
    native("curvature_pass_b", state)
    assert not state.s_ring[3].any() and not state.y_ring[3].any() and not state.column.any()


def test_no_tensors_at_all():
    state = State([], pairs=0, gradients=0)
    state.counters.zero_()
    before = state.clone()
    for name in ops.SCHEMAS:
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


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The same tests with narrower vectors; where a machine lacks one, with what it has."""
    chosen = "halves or agrees and (direction_step or curvature_pass) or exact and 4097"
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
        native(name, plain)
        native(name, strided)
        for (label, a), b in zip(
            plain.tensors().items(), strided.tensors().values(), strict=True
        ):  # fmt: skip
            assert torch.equal(a, b), f"{name}: {label}"


def test_gradients_may_be_missing_expanded_or_of_another_dtype():
    ours = State([(40, 3), (5,), (6, 7)])
    ours.grads = [torch.tensor([1.0, 2.0, 3.0]).expand(40, 3), None, ours.grads[2].to(BF16)]
    theirs = ours.clone()
    theirs.grads = [ours.grads[0].clone(), torch.zeros(5), ours.grads[2].float()]
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


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, "found_inf"])
@pytest.mark.parametrize("case", ["many dtypes", "double", "bfloat16 rings", "scalar"])
def test_a_dropped_step_changes_one_counter(case, poison):
    state = STATES[case].clone()
    changes = {}
    if poison == "found_inf":
        changes["found_inf"] = torch.ones(1)
    else:
        state.grads[0].view(-1)[-1] = poison
    before = state.clone()
    native("direction_step", state, **changes)
    assert state.counters[Counter.STEPS_SKIPPED] == 1
    state.counters[Counter.STEPS_SKIPPED] = 0
    scratch = {"direction", "projections", "images"}
    for (name, a), b in zip(state.tensors().items(), before.tensors().values(), strict=True):
        assert name in scratch or torch.equal(a, b), name


def test_a_blank_step_changes_nothing():
    state = State([(40,)], pairs=0, gradients=0)
    state.counters.zero_()
    state.grads = [None]
    before = state.clone()
    native("direction_step", state)
    for name in ("counters", "params[0]", "accumulator", "fisher", "iterate_sum"):
        assert torch.equal(state.tensors()[name], before.tensors()[name])


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
            state = State([(70_000,), (100_000,)], [F32, BF16], oldest=4)
            native("direction_step", state)
            for name in ("curvature_pass_a", "curvature_pass_b", "curvature_commit"):
                native(name, state)
            results.append(state.tensors())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, results[0][name]), name


# ------------------------------------------------------------------------- what is refused


BAD = {
    "s_ring: expected shape": {"s_ring": torch.zeros(5, 32)},
    "s_ring: expected dtype": {"s_ring": torch.zeros(5, 31, dtype=F64)},
    "s_ring: expected a contiguous": {"s_ring": torch.zeros(31, 5).T},
    "s_ring: expected a matrix": {"s_ring": torch.zeros(31)},
    "y_ring: expected shape": {"y_ring": torch.zeros(5, 30)},
    "gram: expected shape (5, 4)": {"y_ring": torch.zeros(4, 31)},
    "gram: expected dtype float64": {"gram": torch.zeros(6, 5)},
    "gram: expected shape": {"gram": torch.zeros(5, 5, dtype=F64)},
    "accumulator: expected shape": {"accumulator": torch.zeros(30)},
    "fisher: expected": {"fisher": torch.zeros(0, 31)},
    "iterate_sum: expected dtype": {"iterate_sum": torch.zeros(31, dtype=BF16)},
    "direction: expected dtype": {"direction": torch.zeros(31, dtype=torch.int64)},
    "projections: expected shape": {"projections": torch.zeros(3, dtype=F64)},
    "images: expected shape": {"images": torch.zeros(3, dtype=F64)},
    "counters: expected dtype": {"counters": torch.zeros(len(Counter))},
    "counters: expected shape": {"counters": torch.zeros(3, dtype=torch.int64)},
    "pairs: expected 0..4, got 5": {"counters": torch.tensor([5] + [0] * 9)},
    "oldest pair: expected 0..4": {"counters": torch.tensor([0, -1] + [0] * 8)},
    "gradients: expected 0..3": {"counters": torch.tensor([0, 0, 4] + [0] * 7)},
    "next gradient: expected 0..2": {"counters": torch.tensor([0, 0, 0, 3] + [0] * 6)},
    "grads: expected one for each": {"grads": []},
    "grads[0]: expected 31 elements": {"grads": [torch.zeros(30)]},
    "grads[0]: expected float32": {"grads": [torch.zeros(31, dtype=torch.int32)]},
    "params[0]: expected float32": {"params": [torch.zeros(31, dtype=torch.complex64)]},
    "group_sizes: expected": {"group_sizes": [2]},
    "lr: expected 1 numbers": {"lr": [0.1, 0.2]},
    "weight_decay: expected 1 contiguous": {"weight_decay_tensor": torch.zeros(2)},
    "grad_scale: expected 1": {"grad_scale": torch.ones(2)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named_before_anything_is_written(message):
    state = State([(31,)])
    before = state.clone()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        native("direction_step", state, **BAD[message])
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before.tensors()[name]), name


# ------------------------------------------------------------------------- torch's own checks


@pytest.mark.parametrize("case", ["one", "double", "bfloat16 rings", "scalar"])
@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_opcheck(name, case):
    state = prepared(name, STATES[case])
    torch.library.opcheck(getattr(torch.ops.adaqn, name).default, state.arguments(name))
