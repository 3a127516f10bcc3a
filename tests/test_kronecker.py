"""The Kronecker-factored initial matrix, alone: its algebra, its bases, its layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kronecker_problems import (
    DTYPES,
    EPS,
    H0,
    KEEP,
    LONGEST,
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

from adaqn_cuda.reference.kronecker import DAMPING, orthonormal
from adaqn_cuda.state.layout import Counter

# --------------------------------------------------------------------------- by the book


class Matrix:
    """One matrix, in float64: dense factors of the whole sides, of which the blocks are kept.

    Args:
        first: number of its first factor among all.
    """

    def __init__(self, rows: int, columns: int, block_size: int, first: int) -> None:
        self.shape, self.number = (rows, columns), first
        self.cuts = [self.cut(side, block_size) for side in self.shape]
        too_long = min(self.shape) == 1 and max(self.shape) > min(LONGEST, block_size)
        self.factored = [side > 1 and not too_long for side in self.shape]
        self.v = torch.zeros(rows, columns, dtype=torch.float64)
        self.numbers, self.factors, self.bases = [], [], []
        for cuts, factored in zip(self.cuts, self.factored, strict=True):
            self.numbers.append([first + k for k in range(len(cuts) * factored)])
            first += len(self.numbers[-1])
            self.factors.append([torch.zeros(len(c), len(c), dtype=torch.float64) for c in cuts])
            self.bases.append([torch.eye(len(c), dtype=torch.float64) for c in cuts])

    @staticmethod
    def cut(side: int, block_size: int) -> tuple[torch.Tensor, ...]:
        """Indices of each piece."""
        return torch.arange(side).tensor_split(-(-side // block_size))

    def step(self, g: torch.Tensor, call: int, interval: int) -> None:
        for side, rows in ((0, g), (1, g.T)):
            for k, number in enumerate(self.numbers[side]):
                piece = rows[self.cuts[side][k]]
                if call <= 10 or (call + number) % 2 == 0:
                    old = self.factors[side][k]
                    self.factors[side][k] = 0.95 * old + 0.05 * piece @ piece.T
                for _ in range(10 if call == 1 else (call + number) % interval == 0):
                    self.iterate(side, k)
        left, right = self.dense()
        self.v = KEEP * self.v + (1 - KEEP) * (left.T @ g @ right) ** 2

    def iterate(self, side: int, k: int) -> None:
        factor, q, piece = self.factors[side][k], self.bases[side][k], self.cuts[side][k]
        a = factor + 1e-3 * factor.diagonal().mean() * torch.eye(len(factor))
        order = (q.T @ a @ q).diagonal().argsort(descending=True, stable=True)
        self.v.index_copy_(side, piece, self.v.index_select(side, piece[order]))
        q, r = torch.linalg.qr(a @ q[:, order])
        self.bases[side][k] = q * r.diagonal().sign()

    def dense(self) -> list[torch.Tensor]:
        return [torch.block_diag(*bases) for bases in self.bases]

    def apply(self, x: torch.Tensor, floor: float, correction: float, eps: float) -> torch.Tensor:
        v = self.v.clone()
        for rows in self.cuts[0] if any(self.factored) else ():
            for columns in self.cuts[1]:
                v[rows[:, None], columns] += floor * v[rows[:, None], columns].max()
        left, right = self.dense()
        return left @ ((left.T @ x @ right) / (correction * v + eps).sqrt()) @ right.T


class Book:
    """All matrices, whose factors are numbered through."""

    def __init__(self, matrices, block_size: int) -> None:
        self.matrices, number = [], 0
        for matrix in matrices:
            self.matrices.append(Matrix(*matrix, block_size, number))
            number += sum(map(len, self.matrices[-1].numbers))

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = x.double().split([m.v.numel() for m in self.matrices])
        return [part.view(m.shape) for part, m in zip(parts, self.matrices, strict=True)]

    def step(self, g: torch.Tensor, call: int, interval: int) -> None:
        for matrix, part in zip(self.matrices, self.split(g), strict=True):
            matrix.step(part, call, interval)

    def apply(self, x: torch.Tensor, *options: float) -> torch.Tensor:
        parts = zip(self.matrices, self.split(x), strict=True)
        return flat([matrix.apply(part, *options) for matrix, part in parts])

    def squares(self, name: str) -> list[torch.Tensor]:
        pairs = ((m, side) for m in self.matrices for side in (0, 1) if m.factored[side])
        return [square for m, side in pairs for square in getattr(m, name)[side]]


#: Shapes, row blocks, and the matrices that they make.
SETS = {
    "square": ([(5, 5)], None, [(5, 5)]),
    "uneven rows": ([(7, 3)], None, [(7, 3)]),
    "uneven columns": ([(2, 8)], None, [(2, 8)]),
    "row": ([(1, 4)], None, [(1, 4)]),
    "column": ([(7, 1)], None, [(7, 1)]),
    "vector": ([(3,)], None, [(3, 1)]),
    "both uneven": ([(8, 11)], None, [(8, 11)]),
    "several": (
        [(7, 5), (3,), (6, 4), (7, 5), (2, 2, 2), (1, 1), (0, 3)], [1, 1, [1, 5], 1, 2, 1, 1],
        [(7, 5), (3, 1), (1, 4), (5, 4), (7, 5), (1, 4), (1, 4), (1, 1)],
    ),
}  # fmt: skip


def assert_follows(k: H0, book: Book, tolerance: float) -> None:
    assert (flat([m.v for m in book.matrices]) - k.accumulator).norm() <= 10 * tolerance * (
        k.accumulator.norm()
    )
    for ours, theirs in zip(k.squares("factors"), book.squares("factors"), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(k.squares("bases"), book.squares("bases"), strict=True):
        assert (ours - theirs).abs().max() < 10 * tolerance


@both_backends
@both_dtypes
@pytest.mark.parametrize("block_size", [3, 20])
@pytest.mark.parametrize("name", SETS)
def test_matches_the_oracle_step_by_step(name, block_size, dtype, backend):
    """Before the factors have full rank, the order within their kernels is up to rounding."""
    shapes, blocks, matrices = SETS[name]
    k = H0(shapes, backend, blocks=blocks, dtype=dtype, block_size=block_size)
    book = Book(matrices, block_size)
    tolerance = 1e-8 if dtype == torch.float64 else 2e-3
    for step in range(1, 27):
        grads = noise(shapes, step, dtype)
        schedule = TAKEN if step < 12 else SOUGHT if step == 12 else dict(call=step, interval=4)
        k.accumulate(grads, **schedule)
        book.step(flat(grads), **schedule)
        if step < 11:
            continue
        k.counters[Counter.ACCEPTED] = step - 1
        floor = (1e3 * torch.finfo(dtype).eps) ** 2 + 9e-6 / step**4
        x = flat(noise(shapes, 999 + step, dtype))
        corrected = 1 / (1 - KEEP**step)
        for eps, correction in ((EPS, corrected), (0.3, corrected), (EPS, 1.0)):
            ours = k.product(x, pending=1, eps=eps, correct_bias=correction != 1).double()
            theirs = book.apply(x, floor, correction, eps)
            assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert_follows(k, book, tolerance)


@both_backends
@pytest.mark.parametrize("matrix", [(6, 6), (7, 8)])
def test_first_step_from_the_identity_matches_the_oracle(matrix, backend):
    k, book = H0([matrix], backend, block_size=3), Book([matrix], 3)
    (g,) = noise([matrix], 0)
    k.accumulate([g], **SOUGHT)
    book.step(g.reshape(-1), **SOUGHT)
    assert_follows(k, book, 1e-7)


@both_backends
def test_factors_are_the_diagonal_blocks_of_those_of_the_whole(backend):
    """Seven rows with pieces of at most three: 3, 2, 2; and five columns: 3, 2."""
    k = H0([(7, 5)], backend, block_size=3)
    (g,) = noise([(7, 5)], 0)
    k.accumulate([g], **TAKEN)
    left, right = 0.05 * g @ g.T, 0.05 * g.T @ g
    parts = [left[s, s] for s in (slice(0, 3), slice(3, 5), slice(5, 7))]
    parts += [right[s, s] for s in (slice(0, 3), slice(3, 5))]
    for ours, theirs in zip(k.squares("factors"), parts, strict=True):
        torch.testing.assert_close(ours, theirs)


# --------------------------------------------------------------------------- algebra


@both_backends
@given(shapes=shapes, seed=seeds, steps=st.integers(0, 14))
def test_symmetric_positive_definite(backend, shapes, seed, steps):
    k = H0(shapes, backend)
    train(k, steps, seed=seed)
    d = k.accumulator.numel()
    x, y = torch.randn(2, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hx, hy = k.product(x, eps=1e-6), k.product(y, eps=1e-6)
    assert abs(y @ hx - x @ hy) <= 1e-10 * (hx.norm() * y.norm() + hy.norm() * x.norm())
    assert d == 0 or x @ hx > 0
    assert d == 0 or x @ k.product(x, inverse=True, eps=1e-6) > 0


@both_backends
@given(shapes=shapes, seed=seeds, dtype=st.sampled_from(DTYPES), pending=st.integers(0, 1))
def test_inverse_undoes(backend, shapes, seed, dtype, pending):
    k = H0(shapes, backend, dtype=dtype)
    train(k, 7, seed=seed)
    x = flat(noise(shapes, seed, dtype))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    options = dict(correct_bias=True, eps=1e-3, pending=pending)
    for first in (True, False):
        back = k.product(k.product(x, inverse=first, **options), inverse=not first, **options)
        torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance * (1 + x.norm().item()))


@both_backends
@both_dtypes
@pytest.mark.parametrize("block_size", [None, LONGEST])
def test_what_has_no_factors_takes_the_diagonal_of_rmsprop(block_size, dtype, backend):
    """Long vectors, numbers, and everything without a block size; in every call."""
    shapes = [(5,), (), (1, 1), (3,), (1,)] + [(11, 13), (2, 3, 2)] * (block_size is None)
    k = H0(shapes, backend, dtype=dtype, block_size=block_size, max_vector_dim=2, steps=0)
    v = torch.zeros_like(k.accumulator)
    for call in range(1, 15):
        grads = noise(shapes, call, dtype)
        k.accumulate(grads, call=call, interval=2)
        v = KEEP * v + (1 - KEEP) * flat(grads) ** 2
    x = flat(noise(shapes, 77, dtype))
    torch.testing.assert_close(k.product(x), x / (v + EPS).sqrt())
    torch.testing.assert_close(k.product(x, inverse=True), x * (v + EPS).sqrt())


@both_backends
@pytest.mark.parametrize("pending", [0, 1])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_correction_scales_the_accumulator(steps, pending, backend):
    """By the number of accepted steps, one of which may be pending, and at least one."""
    shapes = [(4, 5), (3,), (9,)]
    k = H0(shapes, backend, steps=steps)
    train(k, 3)
    x = flat(noise(shapes, 5))
    c = 1 / (1 - KEEP ** max(steps + pending, 1))
    expected = k.product(x, pending=pending, eps=EPS / c) / c**0.5
    torch.testing.assert_close(k.product(x, pending=pending, correct_bias=True), expected)


@both_backends
@both_dtypes
def test_the_floor_is_relative_to_the_largest_of_a_tile(dtype, backend):
    k = H0([(6, 4)], backend, dtype=dtype, block_size=3, steps=0)
    v = torch.zeros(6, 4, dtype=dtype)
    v[:3, 0], v[3:, 2:] = 4.0, 1e-6
    k.accumulator.copy_(v.view(-1))
    ones = torch.ones(24, dtype=dtype)
    for steps, fades in ((0, 9e-6), (1, 9e-6), (2, 9e-6 / 16), (10**6, 9e-30)):
        k.counters[Counter.ACCEPTED] = steps
        floor = (1e3 * torch.finfo(dtype).eps) ** 2 + fades
        expected = v.to(torch.float64, copy=True)
        expected[:3, :2] += 4 * floor
        expected[3:, 2:] += 1e-6 * floor
        root = k.product(ones, eps=1e-30, inverse=True).view(6, 4).double()
        torch.testing.assert_close(root, (expected + 1e-30).sqrt(), rtol=1e-5, atol=0)


# --------------------------------------------------------------------------- bases


def worst_angle(k: H0) -> float:
    """Largest entry of Q^T Q - I."""
    worst = 0.0
    for basis in k.squares("bases"):
        q = basis.double()
        worst = max(worst, (q.mT @ q - torch.eye(len(q))).abs().max().item())
    return worst


@both_backends
@both_dtypes
def test_bases_stay_orthonormal(dtype, backend):
    shapes = [(17, 33), (40, 17), (5, 3, 2), (64, 1), (30,)]
    k = H0(shapes, backend, blocks=[1, 2, 1, 1, 1], dtype=dtype, block_size=24, max_vector_dim=40)
    train(k, 200, interval=2)
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


@both_backends
@both_dtypes
@pytest.mark.parametrize("block_size", [37, 16])
@pytest.mark.parametrize("name", NASTY)
def test_bases_survive_nasty_gradients(name, block_size, dtype, backend):
    """First as the only gradient ever, then before and after others."""
    n = 37
    generator = torch.Generator().manual_seed(0)
    k = H0([(n, n)], backend, dtype=dtype, block_size=block_size)
    for step in range(6):
        g = torch.randn(n, n, generator=generator) if step in (2, 4) else None
        g = nasty(name, n, generator) if g is None else g
        k.accumulate([g.to(dtype)], **(TURNED if step else SOUGHT))
        assert worst_angle(k) < 1e-6
        assert all(buffer.isfinite().all() for buffer in k.buffers())
        assert k.product(torch.ones(n * n, dtype=dtype)).isfinite().all()


@both_backends
@pytest.mark.parametrize("name", ["rank one", "ones", "graded"])
def test_large_sides_from_the_identity(name, backend):
    k = H0([(600, 600)], backend, dtype=torch.float32, block_size=600)
    g = nasty(name, 600, torch.Generator().manual_seed(0))
    k.accumulate([g], **TURNED)
    assert worst_angle(k) < 1e-4
    assert (k.squares("bases")[0] - torch.eye(600)).abs().max() > 0.1


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


@both_backends
def test_a_basis_that_cannot_be_refreshed_is_kept(backend):
    """Factors with infinities, as from an overflow: the others of their size do not notice."""
    shapes = [(4, 4), (4, 4)]
    k = H0(shapes, backend)
    train(k, 2)
    x = flat(noise(shapes, 1))
    before = [basis.clone() for basis in k.squares("bases")]
    spoiled, sound = k.product(x).split(16)
    for factor in k.squares("factors")[:2]:
        factor[1, 2] = torch.inf
    k.accumulate(noise(shapes, 9), keep=1.0, **TURNED)
    torch.testing.assert_close(k.product(x)[:16], spoiled)
    assert not torch.allclose(k.product(x)[16:], sound)
    columns = [sorted(basis.T.tolist()) for basis in before]
    turned = [sorted(basis.T.tolist()) for basis in k.squares("bases")]
    assert [a != b for a, b in zip(columns, turned, strict=True)] == [False, False, True, True]


@both_backends
@both_dtypes
def test_zero_gradients_leave_the_bases(dtype, backend):
    """They count only after another gradient."""
    k = H0([(5, 7)], backend, dtype=dtype)
    k.accumulator.fill_(1)
    k.counters[Counter.GRADIENTS] = 0
    before = k.saved()
    k.accumulate(noise([(5, 7)], 0, dtype), accepted=False, **SOUGHT)
    k.accumulate([torch.zeros(5, 7, dtype=dtype)], **SOUGHT)
    assert same_bits(before, k.buffers())
    k.counters[Counter.GRADIENTS] = 1
    k.accumulate([torch.zeros(5, 7, dtype=dtype)], **SOUGHT)
    torch.testing.assert_close(k.accumulator, KEEP * torch.ones_like(k.accumulator))
    assert same_bits(before[1:], k.buffers()[1:])


@both_backends
@both_dtypes
def test_bases_converge_to_the_eigenvectors(dtype, backend):
    """Of a fixed factor with gaps between its eigenvalues, in their order."""
    n = 11
    q = torch.linalg.qr(noise([(n, n)], 3)[0])[0]
    g = (q * 2.0 ** -torch.arange(n)).to(dtype)
    k = H0([(n, n)], backend, dtype=dtype, block_size=n)
    for _ in range(6):
        k.accumulate([g], **SOUGHT)
    damped = k.squares("factors")[0].double()
    damped = damped + DAMPING * damped.diagonal().mean() * torch.eye(n)
    _, vectors = torch.linalg.eigh(damped)
    overlaps = (vectors.flip(1).mT @ k.squares("bases")[0].double()).abs()
    # Below the damping, eigenvalues lie close to each other: those above it have converged.
    above = 6
    assert (overlaps[:above, :above] - torch.eye(above)).abs().max() < 1e-3


@both_backends
def test_sorting_takes_the_accumulator_along(backend):
    """Bases that are eigenvectors in the wrong order: H0 stays as it is."""
    k = H0([(8, 4)], backend)
    upper = torch.diag(torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64))
    g = torch.cat([upper, upper.flip(0, 1)])
    k.accumulate([g], **TAKEN)
    x = noise([(8, 4)], 1)[0].reshape(-1)
    before = k.product(x)
    k.accumulate([g], keep=1.0, **TURNED)
    torch.testing.assert_close(k.product(x), before)
    orders = [[2, 3, 1, 0], [1, 0, 2, 3]]
    for basis, order in zip(k.squares("bases"), orders, strict=False):
        torch.testing.assert_close(basis, torch.eye(4, dtype=torch.float64)[:, order])


# --------------------------------------------------------------------------- layout


def settle(pairs, shapes) -> None:
    """Factors of full rank first: the order within kernels is up to rounding."""
    for step in range(14):
        schedule = TAKEN if step < 12 else SOUGHT if step == 12 else TURNED
        grads = noise(shapes, step)
        for k, own in pairs:
            k.accumulate(own(grads), **schedule)


def assert_same_matrix(a: H0, b: H0) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(a.accumulator), generator=generator, dtype=torch.float64)
    for inverse in (False, True):
        hx, hy = (k.product(x, eps=1e-6, inverse=inverse) for k in (a, b))
        torch.testing.assert_close(hx, hy, rtol=1e-6, atol=1e-6)


def as_given(grads):
    return grads


@both_backends
@pytest.mark.parametrize("heights_of_first", [4, [3, 3, 3, 3], [5, 1, 6]])
def test_row_blocks_are_parameters_of_their_own(heights_of_first, backend):
    rows = [3] * 4 if heights_of_first == 4 else heights_of_first
    whole, parts = [(12, 5), (6, 7)], [*((n, 5) for n in rows), *[(2, 7)] * 3]
    one = H0(whole, backend, blocks=[heights_of_first, 3])
    many, unsplit = H0(parts, backend), H0(whole, backend)

    def cut(grads):
        return [*grads[0].split(rows), *grads[1].split(2)]

    settle([(one, as_given), (many, cut), (unsplit, as_given)], whole)
    assert_same_matrix(one, many)
    assert list(one.plan.squares()) == list(many.plan.squares())
    assert not torch.allclose(one.accumulator, unsplit.accumulator)


@both_backends
def test_equal_shapes_together_are_as_each_alone(backend):
    shapes = [(4, 6), (3,), (4, 6), (6, 4), (4, 6)]
    together, alone = H0(shapes, backend), [H0([shape], backend) for shape in shapes]
    pairs = [(k, lambda grads, i=i: [grads[i]]) for i, k in enumerate(alone)]
    settle([(together, as_given), *pairs], shapes)
    xs = noise(shapes, 50)
    separate = flat([k.product(x.reshape(-1)) for k, x in zip(alone, xs, strict=True)])
    torch.testing.assert_close(together.product(flat(xs)), separate, rtol=1e-6, atol=1e-6)


@both_backends
@settings(max_examples=6)
@given(shapes=st.permutations([(4, 6), (3,), (4, 6), (6, 4), (0, 3), (), (2, 3, 2)]))
def test_order_of_parameters_does_not_matter(backend, shapes):
    original = [(4, 6), (3,), (4, 6), (6, 4), (0, 3), (), (2, 3, 2)]
    # The two of the same shape take their gradients in the order they come.
    left = list(range(len(original)))
    places = [left.pop(next(i for i, j in enumerate(left) if original[j] == s)) for s in shapes]
    a, b = H0(original, backend), H0(shapes, backend)
    settle([(a, as_given), (b, lambda grads: [grads[i] for i in places])], original)
    xs = noise(original, 99)
    parts = a.product(flat(xs)).split([x.numel() for x in xs])
    permuted = b.product(flat([xs[i] for i in places]))
    torch.testing.assert_close(permuted, flat([parts[i] for i in places]), rtol=1e-6, atol=1e-6)


@both_backends
def test_tensors_of_higher_order_are_matrices_of_their_first_dimension(backend):
    conv, matrix = H0([(5, 2, 2, 2)], backend), H0([(5, 8)], backend)

    def strided(grads):
        g = grads[0].to(memory_format=torch.channels_last)
        assert not g.is_contiguous()
        return [g]

    settle([(conv, strided), (matrix, lambda grads: [grads[0].reshape(5, 8)])], conv.shapes)
    assert_same_matrix(conv, matrix)
    assert torch.equal(conv.plan.table, matrix.plan.table)


@both_backends
def test_a_vector_is_a_matrix_of_one_column(backend):
    vectors = H0([(5,), (4, 3)], backend, block_size=9, max_vector_dim=5)
    matrices = H0([(5, 1), (4, 3)], backend, block_size=9, max_vector_dim=5)
    settle([(vectors, lambda grads: [grads[0][:, 0], grads[1]]), (matrices, as_given)],
           matrices.shapes)  # fmt: skip
    assert_same_matrix(vectors, matrices)
    assert torch.equal(vectors.plan.table, matrices.plan.table)


def test_chunks_of_factors_are_as_all_at_once(monkeypatch):
    shapes = [(4, 6), (4, 6), (6, 4)]
    k, other = H0(shapes), H0(shapes)
    settle([(k, as_given)], shapes)
    monkeypatch.setattr("adaqn_cuda.reference.kronecker.CHUNK", 40)
    settle([(other, as_given)], shapes)
    torch.testing.assert_close(k.buffers(), other.buffers())
