"""What a gradient does to the Kronecker-factored matrix: what is accepted, whose turn it is."""

from math import inf, nan

import pytest
import torch
from hypothesis import given
from kronecker_problems import (
    EPS,
    H0,
    KEEP,
    SOUGHT,
    TAKEN,
    TURNED,
    both_backends,
    both_dtypes,
    noise,
    same_bits,
    seeds,
    shapes,
    train,
)
from problems import flat
from test_no_sync import NoReadBack

from adaqn_cuda.reference.kronecker import FIRST_CALLS, FIRST_ITERATIONS, iterations, takes_in
from adaqn_cuda.state.layout import Counter, Flag

# --------------------------------------------------------------------------- what is accepted


@both_backends
@both_dtypes
@pytest.mark.parametrize("schedule", [SOUGHT, TAKEN, TURNED])
@pytest.mark.parametrize("bad", [1.0, nan, inf, -inf])
@pytest.mark.parametrize("steps", [0, 5])
def test_a_rejected_gradient_leaves_every_bit(steps, bad, schedule, dtype, backend):
    shapes = [(4, 6), (4, 6), (5,), (3, 2, 2), (12, 4), (3,)]
    k = H0(shapes, backend, dtype=dtype)
    train(k, steps)
    k.accumulator[0] = -0.0
    before = k.saved()
    k.accumulate([bad * g for g in noise(shapes, 9, dtype)], accepted=False, **schedule)
    assert same_bits(before, k.buffers())
    k.accumulate(noise(shapes, 9, dtype), scale=nan, **schedule)
    assert same_bits(before, k.buffers())
    k.accumulate(noise(shapes, 9, dtype), **schedule)
    assert not same_bits(before, k.buffers())


@both_backends
@given(shapes=shapes, seed=seeds)
def test_what_belongs_to_a_parameter_without_gradient_keeps_every_bit(backend, shapes, seed):
    """To the others it is as if that gradient was zero."""
    k, other = H0(shapes, backend), H0(shapes, backend)
    for schedule in (TAKEN, SOUGHT):
        train(k, 3)
        other.become(k)
        before = [[part.clone() for part in k.parts(i)] for i in range(len(shapes))]
        grads = noise(shapes, seed)
        k.accumulate([None if i % 2 else g for i, g in enumerate(grads)], **schedule)
        other.accumulate([g * (i % 2 == 0) for i, g in enumerate(grads)], **TAKEN)
        for i in range(len(shapes)):
            if i % 2:
                assert same_bits(k.parts(i), before[i])
            elif schedule is TAKEN:
                torch.testing.assert_close(k.parts(i), other.parts(i))
            else:
                torch.testing.assert_close(k.parts(i)[1], other.parts(i)[1])
        torch.testing.assert_close(k.square, other.square)


@both_backends
def test_without_any_gradient_every_bit_stays(backend):
    k = H0([(5, 7), (3,)], backend)
    before = k.saved()
    k.accumulate([None, None], **SOUGHT)
    assert same_bits(before, k.buffers())


@both_backends
@both_dtypes
def test_square_is_the_sum_of_v(dtype, backend):
    """It averages |g|^2 as v averages r^2; the norm is the clipped one."""
    shapes = [(6, 5), (4,), (9, 3), (7,)]
    k, expected = H0(shapes, backend, dtype=dtype), 0.0
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for call in range(1, 16):
        grads = noise(shapes, call, dtype)
        norm = min(float(flat(grads).double().norm()) / 3, 8.0)
        k.accumulate(grads, call=call, interval=2, scale=3.0, max_grad_norm=8.0)
        expected = KEEP * expected + (1 - KEEP) * norm**2
        assert float(k.square) == pytest.approx(expected, rel=1e-12)
        assert float(k.accumulator.double().sum()) == pytest.approx(expected, rel=tolerance)
    assert norm == 8.0
    k.accumulate([None, *noise(shapes, 1, dtype)[1:]], **TAKEN)
    assert float(k.square) > KEEP * expected


@both_backends
@both_dtypes
def test_scale_undoes_the_scale_of_the_loss(dtype, backend):
    shapes = [(6, 5), (4,), (12, 3)]
    plain, scaled = H0(shapes, backend, dtype=dtype), H0(shapes, backend, dtype=dtype)
    for call in range(1, 7):
        grads = noise(shapes, call, dtype)
        plain.accumulate(grads, call=call, interval=1)
        scaled.accumulate([1024 * g for g in grads], call=call, interval=1, scale=1024)
    assert same_bits(plain.buffers(), scaled.buffers())


@both_backends
def test_a_long_gradient_is_shortened(backend):
    """The sign of it does not matter."""
    shapes = [(6, 5), (4,), (9,)]
    clipped, short = H0(shapes, backend), H0(shapes, backend)
    for step in range(9):
        grads = noise(shapes, step)
        norm, schedule = float(flat(grads).norm()), TURNED if step == 8 else TAKEN
        clipped.accumulate(grads, max_grad_norm=norm / 4, maximize=True, **schedule)
        short.accumulate([g / 4 for g in grads], max_grad_norm=norm, **schedule)
    torch.testing.assert_close(clipped.buffers(), short.buffers())


@both_backends
@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
def test_direction_does_not_depend_on_the_scale_of_gradients(factor, backend):
    shapes = [(6, 6), (3,), (4, 7)]
    directions = []
    for c in (1.0, factor):
        k = H0(shapes, backend)
        for step in range(9):
            grads = [c * g for g in noise(shapes, step)]
            k.accumulate(grads, **(TAKEN if step < 8 else SOUGHT))
        directions.append(k.product(flat(grads), eps=1e-40))
    torch.testing.assert_close(*directions, rtol=1e-6, atol=1e-8)


@both_backends
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_squared_in_the_dtype_of_the_state(kind, backend):
    shapes = [(4, 5), (3,)]
    k = H0(shapes, backend, dtype=torch.float32, kind=kind)
    other = H0(shapes, backend, dtype=torch.float32)
    grads = [1e-3 * g.to(kind) for g in noise(shapes, 0)]
    k.accumulate(grads, scale=1e3, **TURNED)
    other.accumulate([g.float() for g in grads], scale=1e3, **TURNED)
    assert same_bits(k.buffers(), other.buffers())
    assert k.accumulator.count_nonzero() == 23


@both_backends
def test_gradients_and_parameters_are_left_alone(backend):
    shapes = [(4, 5), (3,), (9,)]
    k, grads = H0(shapes, backend), noise(shapes, 0)
    given = [*grads, *k.params, k.counters, k.plan.table]
    before = [t.clone() for t in given]
    k.accumulate(grads, scale=2.0, **SOUGHT)
    assert same_bits(before, given)


# --------------------------------------------------------------------------- factors take turns


def changed(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[int]:
    """Places in two lists of what is not the same."""
    return [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not torch.equal(x, y)]


@pytest.mark.parametrize("interval", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("factor", range(4))
def test_schedule(factor, interval):
    """Factors: ten calls, then every second.  Bases: sought once, then turned every interval."""
    calls = range(1, 41)
    taken = [call for call in calls if takes_in(call, factor)]
    assert taken == [call for call in calls if call <= FIRST_CALLS or (call + factor) % 2 == 0]
    steps = [iterations(call, factor, interval) for call in calls]
    assert steps == [FIRST_ITERATIONS] + [int((c + factor) % interval == 0) for c in calls[1:]]


@both_backends
@both_dtypes
@pytest.mark.parametrize("interval", [1, 3, 5])
def test_factors_take_turns(interval, dtype, backend):
    """By their number among all, which a parameter without a gradient does not change."""
    shapes, absent = [(7, 6), (3,), (8, 4), (7, 6)], 1
    k = H0(shapes, backend, dtype=dtype)
    owners = [0] * 4 + [absent] + [2] * 3 + [3] * 4
    for call in range(1, 31):
        grads = [None if i == absent else g for i, g in enumerate(noise(shapes, call, dtype))]
        if call == 1:
            grads = noise(shapes, call, dtype)
        before = H0(shapes, dtype=dtype)
        before.become(k)
        k.accumulate(grads, call=call, interval=interval)
        here = [f for f, owner in enumerate(owners) if grads[owner] is not None]
        taken = [f for f in here if call <= 10 or (call + f) % 2 == 0]
        turned = [f for f in here if call == 1 or (call + f) % interval == 0]
        assert changed(before.squares("factors"), k.squares("factors")) == taken
        assert changed(before.squares("bases"), k.squares("bases")) == turned
        reached = [i for i, g in enumerate(grads) if g is not None]
        assert changed(before.diagonals(), k.diagonals()) == reached


def test_nothing_is_read_back():
    shapes = [(6, 5), (4,), (12, 3), (6, 5), (0, 3)]
    k = H0(shapes, blocks=[[2, 4], 1, 4, 1, 1])
    x = flat(noise(shapes, 0))
    buffers = [k.plan.table, k.projections, k.counters]
    for call in range(1, 15):
        grads = [None if i == call else g for i, g in enumerate(noise(shapes, call))]
        k.measure(grads, None, accepted=call != 3)
        with NoReadBack():
            k.ops.kronecker_accumulate(
                k.params, grads, *buffers, None, False, 5.0, [len(shapes)], [KEEP], [1 - KEEP],
                KEEP, call, 3, *k.buffers(),
            )  # fmt: skip
            k.product(x, correct_bias=True)
            k.product(x, inverse=True, pending=1)


# --------------------------------------------------------------------------- the whole step


BETA, LR, DECAYS = 0.8, [0.1, 0.03], [0.2, 0.0]
SHAPES, SIZES = [(7, 5), (3,), (6, 4), (9,), (), (0, 3)], [2, 4]


class Training(H0):
    """Parameters that move, with momentum: in one operation, or pass by pass."""

    def __init__(self, backend, dtype, averaged: bool, longest: float) -> None:
        self.longest = longest
        super().__init__(SHAPES, backend, blocks=[1, 1, [1, 5], 1, 1, 1], dtype=dtype, steps=0)
        self.counters.zero_()
        self.params = noise(SHAPES, 777, dtype)
        self.momentum = torch.zeros_like(self.accumulator) if averaged else None

    def step(
        self, grads, *, call, interval, scale=None, found_inf=None, maximize=False, tensors=False
    ) -> None:
        rates = [torch.tensor(x, dtype=torch.float64) if tensors else None for x in (LR, DECAYS)]
        scale, found_inf = (None if x is None else torch.tensor(x) for x in (scale, found_inf))
        beta = 0.0 if self.momentum is None else BETA
        self.ops.kronecker_step(
            self.params, grads, self.plan.table, scale, found_inf, maximize, self.longest,
            *([x] * len(SIZES) for x in (beta, KEEP, 1 - KEEP, EPS)), True, KEEP, call, interval,
            SIZES, LR, DECAYS, *rates, self.momentum, *self.buffers(), self.projections,
            self.counters,
        )  # fmt: skip

    def pass_by_pass(
        self, grads, *, call, interval, scale=None, found_inf=0.0, maximize=False
    ) -> None:
        excess = self.surplus(grads, scale)
        self.accumulate(
            grads, call=call, interval=interval, accepted=not found_inf, scale=scale,
            maximize=maximize, max_grad_norm=self.longest, surplus=excess,
        )  # fmt: skip
        if self.projections[Flag.NONFINITE] > 0 or self.is_blank():
            self.counters[Counter.STEPS_SKIPPED] += self.projections[Flag.NONFINITE] > 0
            return
        t = int(self.counters[Counter.ACCEPTED]) + 1
        pairs = list(zip(self.params, grads, strict=True))
        zeros = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        g = flat(zeros) / ((scale or 1) * torch.tensor(excess))
        norm = float(self.projections[Flag.SQUARE].sqrt())
        g = g * min(1.0, self.longest / norm) * (-1) ** maximize
        here = flat([torch.full_like(p, g is not None) for p, g in pairs]).bool()
        q = g
        if self.momentum is not None:
            m = torch.where(here, BETA * self.momentum + (1 - BETA) * g, self.momentum)
            self.momentum.copy_(m)
            q = BETA * m / (1 - BETA ** (t + 1)) + (1 - BETA) * g / (1 - BETA**t)
        p = self.product(torch.where(here, q, 0.0), pending=1, correct_bias=True)
        self.move(p, grads)
        self.counters[[Counter.ITERATES, Counter.ACCEPTED]] += 1
        self.counters[Counter.GRADIENTS] = 1

    def surplus(self, grads, scale) -> float:
        """What makes a gradient a thousand times as long as they are on average."""
        self.measure(grads, scale, accepted=True)
        t = max(int(self.counters[Counter.ACCEPTED]), 1)
        limit = 1e3 * (float(self.square) / (1 - KEEP**t)) ** 0.5
        norm = float(self.projections[Flag.SQUARE].sqrt())
        return norm / limit if 0 < limit < norm < inf else 1.0

    def is_blank(self) -> bool:
        return bool(self.counters[Counter.GRADIENTS] == 0 and self.projections[Flag.NONZERO] == 0)

    def move(self, p, grads) -> None:
        parts = p.split([w.numel() for w in self.params])
        for i, (w, part) in enumerate(zip(self.params, parts, strict=True)):
            if grads[i] is not None:
                k = int(i >= SIZES[0])
                w.copy_((1 - LR[k] * DECAYS[k]) * w - LR[k] * part.view(w.shape))


@both_backends
@both_dtypes
@pytest.mark.parametrize(("averaged", "longest"), [(True, 25.0), (False, 25.0), (True, inf)])
@pytest.mark.parametrize("options", [{}, {"scale": 8.0}, {"maximize": True}, {"tensors": True}])
def test_a_step_is_its_passes(options, averaged, longest, dtype, backend):
    """Over clipped gradients, an outlier, dropped ones, blank ones and missing ones."""
    whole, passes = (Training(backend, dtype, averaged, longest) for _ in range(2))
    other = {name: value for name, value in options.items() if name != "tensors"}
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for call in range(1, 26):
        grads = noise(SHAPES, call, dtype)
        grads = [g * {1: 0.0, 12: 1e7}.get(call, 1.0) for g in grads]
        if call % 5 == 4:
            grads[call % 3] = None
        if call == 8:
            grads[2][0, 0] = nan
        # Before the factors have full rank, the order within their kernels is up to rounding.
        schedule = dict(call=call, interval=2**40 if call < 9 else 3, found_inf=float(call == 14))
        whole.step(grads, **schedule, **options)
        passes.pass_by_pass(grads, **schedule, **other)
        for ours, theirs in zip(whole.params, passes.params, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert torch.equal(whole.counters, passes.counters)
        torch.testing.assert_close(whole.square, passes.square, rtol=1e-5, atol=0)
    torch.testing.assert_close(whole.factors, passes.factors, rtol=tolerance, atol=tolerance)
    assert whole.counters[Counter.STEPS_SKIPPED] == 2
    assert whole.counters[Counter.ACCEPTED] == 22
