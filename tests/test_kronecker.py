"""The Kronecker-factored initial matrix, alone: its algebra, its bases, its layout, its safety."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_no_sync import NoReadBack
from torch import nn

from adaqn_cuda.blocks import check_blocks, rnn_blocks
from adaqn_cuda.kronecker import (
    DAMPING,
    FACTOR_DECAY,
    FIRST_ITERATIONS,
    Kronecker,
    orthonormal,
    schedule,
)

settings.register_profile("kronecker", deadline=None, max_examples=30)
settings.load_profile("kronecker")

DECAY, EPS, LONGEST = 0.99, 1e-16, 9
TRUE, FALSE, ONE = torch.tensor(True), torch.tensor(False), torch.tensor(1.0)
DTYPES = [torch.float32, torch.float64]

shape = st.lists(st.integers(0, 12), max_size=3).map(tuple)
shapes = st.lists(shape, min_size=1, max_size=5)
seeds = st.integers(0, 2**16)


def zeros(shapes, dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def state(
    shapes, blocks=None, dtype=torch.float64, longest=LONGEST, longest_vector=LONGEST
) -> Kronecker:
    blocks = blocks or [1] * len(shapes)
    return Kronecker(zeros(shapes, dtype), blocks, dtype, longest, longest_vector)


def noise(shapes, seed, dtype=torch.float64) -> list[torch.Tensor]:
    """Gradients with rows and columns of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for shape in shapes:
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        if g.dim() > 1:
            g = g * torch.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1)) ** 0.7
            g = g.cumsum(1)
        grads.append(g.to(dtype))
    return grads


def train(k: Kronecker, shapes, steps: int, *, seed=0, every=3, first=4) -> None:
    """The bases are refreshed at the first step and then at every ``every``-th."""
    for step in range(steps):
        grads = noise(shapes, 1000 * seed + step, k.accumulator.dtype)
        k.accumulate(grads, ONE, TRUE, DECAY, first if step == 0 else int(step % every == 0))


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def product(k: Kronecker, x: torch.Tensor, *, inverse=False, correction=1.0, eps=EPS):
    out = torch.full_like(x, torch.nan)
    (k.apply_inverse if inverse else k.apply)(x, correction, eps, out)
    return out


def saved(k: Kronecker) -> list[torch.Tensor]:
    return [t.clone() for t in k.tensors()]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


def worst_angle(k: Kronecker) -> float:
    """Largest entry of Q^T Q - I."""
    worst = 0.0
    for basis in k.bases.values():
        q = basis.double()
        worst = max(worst, (q.mT @ q - torch.eye(q.shape[-1])).abs().max().item())
    return worst


# --------------------------------------------------------------------------- oracle


class Block:
    """One block, by the book, in float64."""

    def __init__(self, a: int, b: int, longest: int = LONGEST) -> None:
        self.sides = [1 < side <= longest for side in (a, b)]
        self.factors = [torch.zeros(n, n, dtype=torch.float64) for n in (a, b)]
        self.bases = [torch.eye(n, dtype=torch.float64) for n in (a, b)]
        self.v = torch.zeros(a, b, dtype=torch.float64)

    def step(self, g: torch.Tensor, refresh: int) -> None:
        for side, covariance in enumerate((g @ g.T, g.T @ g)):
            if self.sides[side]:
                mixed = FACTOR_DECAY * self.factors[side] + (1 - FACTOR_DECAY) * covariance
                self.factors[side] = mixed
                for _ in range(refresh):
                    self.iterate(side)
        r = self.bases[0].T @ g @ self.bases[1]
        self.v = DECAY * self.v + (1 - DECAY) * r**2

    def iterate(self, side: int) -> None:
        factor, q = self.factors[side], self.bases[side]
        a = factor + DAMPING * factor.diagonal().mean() * torch.eye(len(factor))
        order = (q.T @ a @ q).diagonal().argsort(descending=True, stable=True)
        self.v = self.v.index_select(side, order)
        q, r = torch.linalg.qr(a @ q[:, order])
        self.bases[side] = q * r.diagonal().sign()

    def apply(self, x: torch.Tensor, correction: float, eps: float) -> torch.Tensor:
        left, right = self.bases
        return left @ ((left.T @ x @ right) / (correction * self.v + eps).sqrt()) @ right.T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matrix", [(5, 5), (7, 3), (3, 7), (1, 4), (4, 1), (8, 11), (11, 2)])
def test_matches_the_oracle_step_by_step(matrix, dtype):
    """Also with a side of length 1 and one longer than the longest factored."""
    k, block = state([matrix], dtype=dtype), Block(*matrix)
    tolerance = 1e-8 if dtype == torch.float64 else 2e-3
    for step in range(25):
        (g,) = noise([matrix], step, dtype)
        # Before the factors have full rank, the order within their kernels is up to rounding.
        refresh = (0 if step < 8 else 5) if step < 9 else int(step % 4 == 0)
        k.accumulate([g], ONE, TRUE, DECAY, refresh)
        block.step(g.double(), refresh)
        for correction, eps in ((1.0, EPS), (1.7, EPS), (1.0, 0.3)):
            x = noise([matrix], 999 + step)[0].to(dtype)
            ours = product(k, x.reshape(-1), correction=correction, eps=eps).double()
            theirs = block.apply(x.double(), correction, eps).reshape(-1)
            assert (ours - theirs).norm() <= tolerance * theirs.norm()
    (entry,) = k.views()
    torch.testing.assert_close(
        entry["accumulator"].double(), block.v, rtol=10 * tolerance, atol=tolerance
    )
    for name, side in (("left", 0), ("right", 1)):
        assert (name in entry) == (f"{name}_basis" in entry) == block.sides[side]
        if block.sides[side]:
            factor, basis = entry[name][0].double(), entry[f"{name}_basis"][0].double()
            torch.testing.assert_close(factor, block.factors[side], rtol=tolerance, atol=tolerance)
            assert (basis - block.bases[side]).abs().max() < 10 * tolerance


def test_first_step_from_the_identity_matches_the_oracle():
    k, block = state([(6, 6)]), Block(6, 6)
    (g,) = noise([(6, 6)], 0)
    k.accumulate([g], ONE, TRUE, DECAY, 8)
    block.step(g, 8)
    assert (k.bases[6][0] - block.bases[0]).abs().max() < 1e-7
    assert (k.bases[6][1] - block.bases[1]).abs().max() < 1e-7
    torch.testing.assert_close(k.accumulator.view(6, 6), block.v, rtol=1e-5, atol=1e-9)


# --------------------------------------------------------------------------- algebra


@given(shapes, seeds, st.integers(0, 12))
def test_symmetric_positive_definite(shapes, seed, steps):
    k = state(shapes)
    train(k, shapes, steps, seed=seed)
    d = k.accumulator.numel()
    x, y = torch.randn(2, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hx, hy = product(k, x, eps=1e-6), product(k, y, eps=1e-6)
    assert abs(y @ hx - x @ hy) <= 1e-10 * (hx.norm() * y.norm() + hy.norm() * x.norm())
    assert d == 0 or x @ hx > 0
    assert d == 0 or x @ product(k, x, inverse=True, eps=1e-6) > 0


@given(shapes, seeds, st.sampled_from(DTYPES))
def test_inverse_undoes(shapes, seed, dtype):
    k = state(shapes, dtype=dtype)
    train(k, shapes, 7, seed=seed)
    x = flat(noise(shapes, seed, dtype))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    options = {"correction": torch.tensor(1.3), "eps": 1e-3}
    for first in (True, False):
        back = product(k, product(k, x, inverse=first, **options), inverse=not first, **options)
        torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance * (1 + x.norm().item()))


@given(shapes, seeds)
def test_output_may_be_the_input(shapes, seed):
    k = state(shapes)
    train(k, shapes, 3)
    x = flat(noise(shapes, seed))
    expected = product(k, x)
    k.apply(x, 1.0, EPS, x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_too_long_and_numbers_take_the_diagonal_of_rmsprop(dtype):
    shapes = [(5,), (), (1, 1), (11, 13), (3,), (1,)]
    k = state(shapes, dtype=dtype, longest_vector=2)
    v = torch.zeros(k.accumulator.numel(), dtype=dtype)
    for step in range(5):
        grads = noise(shapes, step, dtype)
        k.accumulate(grads, ONE, TRUE, DECAY, 1)
        v = DECAY * v + (1 - DECAY) * flat(grads) ** 2
    x = flat(noise(shapes, 77, dtype))
    torch.testing.assert_close(product(k, x), x / (v + EPS).sqrt())
    assert [set(entry) for entry in k.views()] == [{"accumulator"}] * len(shapes)


def test_correction_scales_the_accumulator():
    shapes = [(4, 5), (3,)]
    k = state(shapes)
    train(k, shapes, 3)
    x = flat(noise(shapes, 5))
    c = 1 / (1 - DECAY**3)
    torch.testing.assert_close(product(k, x, correction=c), product(k, x, eps=EPS / c) / c**0.5)
    torch.testing.assert_close(
        product(k, x, correction=torch.tensor(c, dtype=torch.float64)), product(k, x, correction=c)
    )


# --------------------------------------------------------------------------- bases


@pytest.mark.parametrize("dtype", DTYPES)
def test_bases_stay_orthonormal(dtype):
    shapes = [(17, 33), (40, 17), (5, 3, 2), (64, 1)]
    k = state(shapes, [1, 2, 1, 1], dtype, longest=64)
    train(k, shapes, 200, every=2)
    assert worst_angle(k) < (1e-6 if dtype == torch.float32 else 1e-12)


def nasty(name: str, n: int, generator: torch.Generator) -> torch.Tensor:
    g = torch.randn(n, n, generator=generator)
    index = torch.arange(n)
    return {
        "zero": torch.zeros(n, n),
        "identity": torch.eye(n),
        "rank one": torch.outer(g[0], g[1]),
        "ones": torch.ones(n, n),
        "one row": g * (index == n // 2)[:, None],
        "dead units": g * (index % 3 > 0) * (index % 2 > 0)[:, None],
        "graded": g * 10.0 ** (-12 * index / n),
        "tiny": 1e-12 * g,
        "subnormal squares": 1e-21 * g,
        "vanishing squares": 1e-30 * g,
        "huge": 1e6 * g,
        "one huge row": torch.where(index[:, None] == 0, 1e12 * g, 1e-6 * g),
        "orthogonal": torch.linalg.qr(g)[0],
    }[name]


NASTY = (
    "zero", "identity", "rank one", "ones", "one row", "dead units", "graded", "tiny",
    "subnormal squares", "vanishing squares", "huge", "one huge row", "orthogonal",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NASTY)
def test_bases_survive_nasty_gradients(name, dtype):
    """First as the only gradient ever, then before and after others."""
    n = 37
    generator = torch.Generator().manual_seed(0)
    k = state([(n, n)], dtype=dtype, longest=n)
    for step in range(6):
        g = torch.randn(n, n, generator=generator) if step in (2, 4) else None
        g = nasty(name, n, generator) if g is None else g
        k.accumulate([g.to(dtype)], ONE, TRUE, DECAY, 8 if step == 0 else 1)
        assert worst_angle(k) < 1e-6
        assert all(t.isfinite().all() for t in k.tensors())
        assert product(k, torch.ones(n * n, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("name", ["rank one", "ones", "graded"])
def test_large_sides_from_the_identity(name):
    k = state([(600, 600)], dtype=torch.float32, longest=600)
    g = nasty(name, 600, torch.Generator().manual_seed(0))
    k.accumulate([g], ONE, TRUE, DECAY, 1)
    assert worst_angle(k) < 1e-4
    assert (k.bases[600][0] - torch.eye(600)).abs().max() > 0.1


@pytest.mark.parametrize("n", [2, 30, 300])
def test_orthonormal_knows_whether_it_succeeded(n):
    generator = torch.Generator().manual_seed(n)
    u, v = torch.linalg.qr(torch.randn(2, n, n, generator=generator, dtype=torch.float64))[0]
    for exponent in (0, 3, 5, 6):
        z = u * 10.0 ** -torch.linspace(0, exponent, n, dtype=torch.float64) @ v
        q, ok = orthonormal(z[None])
        assert ok.item()
        assert (q[0].mT @ q[0] - torch.eye(n)).norm() < 1e-15 * n**0.5 * 10 ** (2 * exponent)
        assert (q[0].mT @ z).tril(-1).norm() < 1e-4
    for bad in (torch.nan, torch.inf, 0.0):
        assert not orthonormal(torch.full((1, n, n), bad, dtype=torch.float64))[1].item()


def test_a_basis_that_cannot_be_refreshed_is_kept():
    """Factors with infinities, as from an overflow: the others of their size do not notice."""
    shapes = [(4, 4), (4, 4)]
    k = state(shapes)
    train(k, shapes, 2)
    x = flat(noise(shapes, 1))
    before = saved(k)
    spoiled, sound = product(k, x).split(16)
    k.factors[4][[0, 2], 1, 2] = torch.inf
    k.accumulate(noise(shapes, 9), ONE, TRUE, 1.0, 1)
    torch.testing.assert_close(product(k, x)[:16], spoiled)
    assert not torch.allclose(product(k, x)[16:], sound)
    moved = (k.bases[4].sort(-1).values != before[2].sort(-1).values).flatten(1).any(-1)
    assert moved.tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradients_the_bases_stay(dtype):
    k = state([(5, 7)], dtype=dtype)
    before = saved(k)
    k.accumulate([None], ONE, TRUE, DECAY, 8)
    assert same_bits(before, saved(k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bases_converge_to_the_eigenvectors(dtype):
    """Of a fixed factor with gaps between its eigenvalues, in their order."""
    n = 11
    q = torch.linalg.qr(noise([(n, n)], 3)[0])[0]
    g = (q * 2.0 ** -torch.arange(n)).to(dtype)
    k = state([(n, n)], dtype=dtype, longest=n)
    k.accumulate([g], ONE, TRUE, DECAY, 60)
    entry = k.views()[0]
    damped = entry["left"][0].double()
    damped = damped + DAMPING * damped.diagonal().mean() * torch.eye(n)
    _, vectors = torch.linalg.eigh(damped)
    overlaps = (vectors.flip(1).mT @ entry["left_basis"][0].double()).abs()
    # Below the damping, eigenvalues lie close to each other: those above it have converged.
    above = 6
    assert (overlaps[:above, :above] - torch.eye(above)).abs().max() < 1e-3


def test_sorting_takes_the_accumulator_along():
    """Bases that are eigenvectors in the wrong order: H0 changes by the damping's trace only."""
    k = state([(4, 4)])
    g = torch.diag(torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64))
    k.accumulate([g], ONE, TRUE, DECAY, 0)
    x = noise([(4, 4)], 1)[0].reshape(-1)
    before = product(k, x)
    k.accumulate([g], ONE, TRUE, 1.0, 1)
    torch.testing.assert_close(product(k, x), before)
    order = [2, 3, 1, 0]
    torch.testing.assert_close(k.bases[4][0], torch.eye(4, dtype=torch.float64)[:, order])


# --------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("refresh", [0, 1, 3])
@pytest.mark.parametrize("bad", [1.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("steps", [0, 5])
def test_a_rejected_gradient_leaves_every_bit(dtype, refresh, bad, steps):
    shapes = [(4, 6), (4, 6), (5,), (3, 2, 2), (12, 4)]
    k = state(shapes, dtype=dtype)
    train(k, shapes, steps)
    k.accumulator[0] = -0.0
    before = saved(k)
    grads = [bad * g for g in noise(shapes, 9, dtype)]
    k.accumulate(grads, ONE, FALSE, DECAY, refresh)
    assert same_bits(before, saved(k))
    k.accumulate(noise(shapes, 9, dtype), torch.tensor(torch.nan), FALSE, DECAY, refresh)
    assert same_bits(before, saved(k))
    k.accumulate(noise(shapes, 9, dtype), ONE, TRUE, DECAY, refresh)
    assert not same_bits(before, saved(k))


@given(shapes, seeds)
def test_what_belongs_to_a_parameter_without_gradient_keeps_every_bit(shapes, seed):
    k = state(shapes)
    train(k, shapes, 4)
    before, other = copy.deepcopy(k), copy.deepcopy(k)
    grads = noise(shapes, seed)
    missing = [None if i % 2 else g for i, g in enumerate(grads)]
    zero = [torch.zeros_like(g) if i % 2 else g for i, g in enumerate(grads)]
    k.accumulate(missing, ONE, TRUE, DECAY, 1)
    other.accumulate(zero, ONE, TRUE, DECAY, 1)
    for i, mine in enumerate(k.views()):
        theirs = (before if i % 2 else other).views()[i]
        parts = ([part.flatten() for part in entry.values()] for entry in (mine, theirs))
        assert same_bits(*parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_undoes_the_scale_of_the_loss(dtype):
    shapes = [(6, 5), (4,), (12, 3)]
    plain, scaled = state(shapes, dtype=dtype), state(shapes, dtype=dtype)
    for step in range(6):
        grads = noise(shapes, step, dtype)
        plain.accumulate(grads, ONE, TRUE, DECAY, 1)
        scaled.accumulate([1024 * g for g in grads], ONE / 1024, TRUE, DECAY, 1)
    assert same_bits(saved(plain), saved(scaled))


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
def test_direction_does_not_depend_on_the_scale_of_gradients(factor):
    shapes = [(6, 6), (5,), (4, 7)]
    directions = []
    for c in (1.0, factor):
        k = state(shapes)
        for step in range(9):
            grads = [c * g for g in noise(shapes, step)]
            k.accumulate(grads, ONE, TRUE, DECAY, 0 if step < 8 else 4)
        directions.append(product(k, flat(grads), eps=1e-40))
    torch.testing.assert_close(*directions, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_squared_in_the_dtype_of_the_state(kind):
    shapes = [(4, 5), (3,)]
    k, other = state(shapes, dtype=torch.float32), state(shapes, dtype=torch.float32)
    grads = [1e-3 * g.to(kind) for g in noise(shapes, 0)]
    k.accumulate(grads, torch.tensor(1e-3), TRUE, DECAY, 1)
    other.accumulate([g.float() for g in grads], torch.tensor(1e-3), TRUE, DECAY, 1)
    assert same_bits(saved(k), saved(other))
    assert k.accumulator.count_nonzero() == 23


def test_gradients_are_left_alone():
    for shapes in ([(4, 5)], [(4, 5), (3,)]):
        grads = noise(shapes, 0)
        before = [g.clone() for g in grads]
        state(shapes).accumulate(grads, ONE / 2, TRUE, DECAY, 1)
        assert same_bits(before, grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("refresh", [0, 2])
def test_a_gradient_that_the_factors_do_not_take_in_reaches_v(dtype, refresh):
    shapes = [(4, 6), (5,)]
    k = state(shapes, dtype=dtype)
    train(k, shapes, 5)
    before = {side: stack.clone() for side, stack in k.factors.items()}
    accumulator = k.accumulator.clone()
    k.accumulate(noise(shapes, 9, dtype), ONE, TRUE, DECAY, refresh, taken=False)
    assert all(torch.equal(k.factors[side], before[side]) for side in before)
    assert not torch.equal(k.accumulator, accumulator)


@pytest.mark.parametrize("interval", [1, 2, 3, 5, 12])
def test_schedule(interval):
    """Factors: ten calls, then every second.  Bases: sought once, then turned every interval."""
    taken, iterations = zip(*(schedule(calls, interval) for calls in range(1, 41)), strict=True)
    assert [call for call in range(1, 41) if not taken[call - 1]] == list(range(11, 41, 2))
    assert iterations[0] == FIRST_ITERATIONS
    assert list(iterations[1:]) == [int(call % interval == 0) for call in range(2, 41)]


def test_nothing_is_read_back():
    shapes = [(6, 5), (4,), (12, 3), (6, 5), (0, 3)]
    k = state(shapes, [2, 1, 4, 1, 1])
    x = flat(noise(shapes, 0))
    with NoReadBack():
        for step in range(4):
            grads = [None if i == step else g for i, g in enumerate(noise(shapes, step))]
            k.accumulate(grads, ONE, torch.tensor(step != 2), DECAY, 4 - step)
            k.apply(x, torch.tensor(1.1), EPS, x)
            k.apply_inverse(x, 1.1, EPS, x)


# --------------------------------------------------------------------------- layout


def assert_same_matrix(a: Kronecker, b: Kronecker, d: int) -> None:
    x = torch.randn(d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(product(a, x, eps=1e-6), product(b, x, eps=1e-6))


def test_row_blocks_are_parameters_of_their_own():
    whole, pieces = [(12, 5), (6, 7)], [(3, 5)] * 4 + [(2, 7)] * 3
    one, many = state(whole, [4, 3]), state(pieces)
    for step in range(8):
        grads = noise(whole, step)
        rows = [*grads[0].split(3), *grads[1].split(2)]
        refresh = 0 if step < 5 else 1
        one.accumulate(grads, ONE, TRUE, DECAY, refresh)
        many.accumulate(rows, ONE, TRUE, DECAY, refresh)
    assert_same_matrix(one, many, 102)
    unsplit = state(whole)
    train(unsplit, whole, 8)
    assert one.views()[0]["left"].shape == (4, 3, 3)
    assert unsplit.views()[0].keys() == {"accumulator", "right", "right_basis"}


def test_equal_shapes_together_are_as_each_alone():
    shapes = [(4, 6), (5,), (4, 6), (6, 4), (4, 6)]
    together = state(shapes)
    alone = [state([shape]) for shape in shapes]
    for step in range(9):
        grads = noise(shapes, step)
        refresh = 0 if step < 6 else 2
        together.accumulate(grads, ONE, TRUE, DECAY, refresh)
        for k, g in zip(alone, grads, strict=True):
            k.accumulate([g], ONE, TRUE, DECAY, refresh)
    xs = noise(shapes, 50)
    separate = flat([product(k, x.reshape(-1)) for k, x in zip(alone, xs, strict=True)])
    torch.testing.assert_close(product(together, flat(xs)), separate)


@given(st.permutations([(4, 6), (5,), (4, 6), (6, 4), (0, 3), (), (2, 3, 2)]))
def test_order_of_parameters_does_not_matter(shapes):
    original = [(4, 6), (5,), (4, 6), (6, 4), (0, 3), (), (2, 3, 2)]
    # The two of the same shape take their gradients in the order they come.
    grads_by_step = [dict(enumerate(noise(original, step))) for step in range(8)]
    left = list(range(len(original)))
    places = [left.pop(next(i for i, j in enumerate(left) if original[j] == s)) for s in shapes]
    a, b = state(original), state(shapes)
    for step, grads in enumerate(grads_by_step):
        refresh = 0 if step < 6 else 1
        a.accumulate(list(grads.values()), ONE, TRUE, DECAY, refresh)
        b.accumulate([grads[i] for i in places], ONE, TRUE, DECAY, refresh)
    xs = noise(original, 99)
    pieces = product(a, flat(xs)).split([x.numel() for x in xs])
    permuted = product(b, flat([xs[i] for i in places]))
    torch.testing.assert_close(permuted, flat([pieces[i] for i in places]))


def test_tensors_of_higher_order_are_matrices_of_their_first_dimension():
    shapes = [(5, 2, 2, 2)]
    conv, matrix = state(shapes), state([(5, 8)])
    for step in range(6):
        (g,) = noise(shapes, step)
        strided = g.to(memory_format=torch.channels_last)
        assert not strided.is_contiguous()
        conv.accumulate([strided], ONE, TRUE, DECAY, 1)
        matrix.accumulate([g.reshape(5, 8)], ONE, TRUE, DECAY, 1)
    assert same_bits(saved(conv), saved(matrix))
    assert conv.views()[0]["accumulator"].shape == (5, 2, 2, 2)


def test_a_vector_is_a_matrix_of_one_column():
    vectors, matrices = state([(5,), (4, 3)]), state([(5, 1), (4, 3)])
    for step in range(8):
        grads = noise([(5, 1), (4, 3)], step)
        matrices.accumulate(grads, ONE, TRUE, DECAY, step % 2)
        vectors.accumulate([grads[0][:, 0], grads[1]], ONE, TRUE, DECAY, step % 2)
    assert same_bits(saved(vectors), saved(matrices))
    assert vectors.views()[0]["left_basis"].shape == (1, 5, 5)
    assert vectors.views()[0]["accumulator"].shape == (5,)


@pytest.mark.parametrize(("longest", "longest_vector", "factored"), [(9, 5, 5), (4, 9, 4)])
def test_vectors_have_a_limit_of_their_own_below_that_of_matrices(
    longest, longest_vector, factored
):
    shapes = [(n,) for n in range(1, 9)]
    k = state(shapes, longest=longest, longest_vector=longest_vector)
    assert [len(entry) > 1 for entry in k.views()] == [1 < n <= factored for n in range(1, 9)]


def test_a_side_longer_than_the_longest_takes_the_identity():
    k = state([(LONGEST + 1, 4), (LONGEST, 4), (LONGEST, LONGEST + 1), (0, 4)])
    right, both, left, none = (set(entry) for entry in k.views())
    assert right == {"accumulator", "right", "right_basis"}
    assert left == {"accumulator", "left", "left_basis"}
    assert both == left | right
    assert none == {"accumulator"}


@given(shapes, st.integers(1, 3), seeds)
def test_views_write_through_and_cover(shapes, count, seed):
    """Filling all views with numbers of their own changes every entry of every buffer once."""
    shapes = [(count * s[0], *s[1:]) if len(s) > 1 else s for s in shapes]
    blocks = [count if len(s) > 1 else 1 for s in shapes]
    k = state(shapes, blocks)
    for t in k.tensors():
        t.fill_(torch.nan)
    total = 0
    for entry, shape in zip(k.views(), shapes, strict=True):
        assert entry["accumulator"].shape == shape
        for view in entry.values():
            view.copy_(torch.arange(total, total + view.numel()).view(view.shape))
            total += view.numel()
    assert torch.equal(flat(k.tensors()).sort().values, torch.arange(total, dtype=torch.float64))


def test_views_make_a_checkpoint():
    shapes = [(8, 5), (3,), (8, 5), (4, 20)]
    k, fresh = state(shapes, [2, 1, 1, 4]), state(shapes, [2, 1, 1, 4])
    train(k, shapes, 5)
    for mine, theirs in zip(fresh.views(), k.views(), strict=True):
        for name, view in mine.items():
            view.copy_(theirs[name])
    assert same_bits(saved(k), saved(fresh))


@given(shapes, st.sampled_from(DTYPES))
def test_bytes_are_known_beforehand(shapes, dtype):
    params, blocks = zeros(shapes, dtype), [1] * len(shapes)
    k = Kronecker(params, blocks, dtype, LONGEST, LONGEST - 2)
    assert [t.shape for t in k.tensors()] == [torch.Size(s) for s in k.plan.buffers()]
    expected = sum(t.nbytes for t in k.tensors())
    assert Kronecker.bytes(params, blocks, dtype, LONGEST, LONGEST - 2) == expected


def test_other_tensors_are_used_instead():
    shapes = [(4, 5), (3,)]
    k = state(shapes)
    train(k, shapes, 3)
    before = saved(k)
    other = k.with_tensors(saved(k))
    other.accumulate(noise(shapes, 9), ONE, TRUE, DECAY, 1)
    assert same_bits(before, saved(k))
    k.accumulate(noise(shapes, 9), ONE, TRUE, DECAY, 1)
    assert same_bits(saved(other), saved(k))


def test_a_copy_keeps_its_own_buffers():
    shapes = [(4, 5), (3,)]
    k = state(shapes)
    train(k, shapes, 3)
    other = copy.deepcopy(k)
    before = product(k, flat(noise(shapes, 0)))
    train(other, shapes, 3, seed=1)
    assert torch.equal(product(k, flat(noise(shapes, 0))), before)
    assert not torch.equal(product(other, flat(noise(shapes, 0))), before)


def test_chunks_of_factors_are_as_all_at_once(monkeypatch):
    shapes = [(4, 6), (4, 6), (6, 4)]
    k, other = state(shapes), state(shapes)
    train(k, shapes, 5)
    monkeypatch.setattr("adaqn_cuda.kronecker.CHUNK", 40)
    train(other, shapes, 5)
    for a, b in zip(k.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------- row blocks


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
        self.inner = nn.ModuleDict({"gru": nn.GRU(8, 5), "cell": nn.GRUCell(5, 2)})
        self.projected = nn.LSTM(2, 4, proj_size=3)
        self.plain = nn.RNN(3, 2)
        self.lstm_cell = nn.LSTMCell(2, 2)
        self.head = nn.Linear(2, 4)


def test_rnn_blocks_finds_the_gates():
    model = Model()
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: count for p, count in rnn_blocks(model).items()}
    expected = {
        f"lstm.weight_{kind}_l{layer}{direction}": 4
        for kind in ("ih", "hh")
        for layer in (0, 1)
        for direction in ("", "_reverse")
    }
    expected |= {f"inner.gru.weight_{kind}_l0": 3 for kind in ("ih", "hh")}
    expected |= {f"inner.cell.weight_{kind}": 3 for kind in ("ih", "hh")}
    expected |= {f"projected.weight_{kind}_l0": 4 for kind in ("ih", "hh")}
    expected |= {f"lstm_cell.weight_{kind}": 4 for kind in ("ih", "hh")}
    assert found == expected
    check_blocks(rnn_blocks(model), model.parameters())


P, Q, VECTOR = (nn.Parameter(torch.zeros(shape)) for shape in ((6, 2), (4, 2), (4,)))


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ([4], TypeError, r"blocks: expected a mapping .* got \[4\]; pass"),
        ({"weight": 4}, TypeError, r"blocks: expected parameters as keys, got 'weight'; use"),
        ({P: 2.0}, TypeError, r"blocks: expected an int >= 1 .*\(6, 2\), got 2.0; give"),
        ({P: True}, TypeError, r"got True; give"),
        ({P: 0}, ValueError, r"blocks: expected an int >= 1 .*\(6, 2\), got 0; give"),
        ({P: 4}, ValueError, r"blocks: got 4 .*\(6, 2\).* use a divisor of 6"),
        ({Q: 2}, ValueError, r"blocks: got 2 .*\(4, 2\) that is not among .*; pass"),
        ({VECTOR: 2}, ValueError, r"blocks: got 2 .*\(4,\), .*leave"),
    ],
)
def test_check_blocks_names_value_and_remedy(blocks, error, message):
    with pytest.raises(error, match=message):
        check_blocks(blocks, [P, VECTOR])


def test_check_blocks_accepts():
    for blocks in ({}, {P: 1}, {P: 3}, {P: 6}):
        check_blocks(blocks, iter([P, VECTOR]))
