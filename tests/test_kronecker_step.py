"""The optimizer on the Kronecker-factored initial matrix: whole steps, state and checkpoints."""

import copy
import io
import pickle
from functools import cache
from math import inf, nan
from typing import NamedTuple

import pytest
import torch
from oracle import Oracle
from problems import (
    assert_same,
    both_backends,
    both_dtypes,
    flat,
    plain_adaqn,
    random_parameters,
    set_gradients,
    snapshot,
)
from test_compile import run_pair
from test_no_sync import NoReadBack
from torch import nn

from adaqn_cuda import AdaQN, rnn_blocks
from adaqn_cuda.state.layout import Counter
from adaqn_cuda.state.plan import Column, pieces

#: Matrices of equal and of unequal shapes, a stack of two blocks, a tensor of third order, a
#: long and a short vector, a number and nothing; sides of one and sides longer than LONGEST.
SHAPES = [(3, 5), (6, 4), (3, 5), (2, 3, 2), (7,), (), (1, 4), (11, 2), (0, 3), (4,)]
BLOCKS = [1, 2, 1, 1, 1, 1, 1, 1, 1, 1]
LONGEST = 6
FACTORED = dict(
    init="kronecker", lr=0.05, block_size=LONGEST, factor_interval=4, decay=0.9, eps=0.3
)
#: The class's own way: no pairs, momentum, bias correction.
ALONE = dict(FACTORED, history_size=0, momentum=0.9, bias_correction=True, max_direction=1.0)
SAFEGUARDS = dict(
    momentum=0.7, damping=0.9, max_direction=1.05, bias_correction=True, max_grad_norm=0.7
)
PAIRS = dict(FACTORED, history_size=3, fisher_size=4, update_interval=3)
EVERYTHING = {**PAIRS, **SAFEGUARDS}
RUNS = {"alone": ALONE, "pairs": PAIRS, "everything": EVERYTHING}
all_runs = pytest.mark.parametrize("name", RUNS)


def parameters(dtype=torch.float32):
    return random_parameters(SHAPES, dtype)


def factored(params, **options):
    blocks = {p: n for p, n in zip(params, BLOCKS, strict=True) if n > 1}
    return plain_adaqn(params, blocks=blocks, **options)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def advance(optimizer, start, stop):
    """Steps with a dropped one among them, and a missing gradient."""
    params = parameters_of(optimizer)
    for step in range(start, stop):
        set_gradients(params, step)
        params[1].grad *= 3
        if step == 5:
            params[2].grad[1, 1] = nan
        if step % 7 == 3:
            params[0].grad = None
        optimizer.step()


class Matrix(NamedTuple):
    """One matrix of a parameter: lengths of its pieces, and the squares of its factors or bases."""

    rows: list[int]
    columns: list[int]
    left: list[torch.Tensor]
    right: list[torch.Tensor]


def matrices(optimizer, p, kind="bases"):
    """The matrices of a parameter, read from its state by the plan's table."""
    index = next(i for i, q in enumerate(parameters_of(optimizer)) if q is p)
    plan, found = optimizer._arena.plan, []
    numbers = optimizer.state[p].get(kind)

    def squares(place, lengths):
        for n in lengths if place >= 0 else ():
            first = place - plan.spans[index].start
            yield numbers[first : first + n * n].view(n, n)
            place += n * n

    for row in plan.table.tolist():
        if row[Column.PARAM] == index:
            rows = pieces(row[Column.ROWS], row[Column.ROW_PIECES])
            columns = pieces(row[Column.COLUMNS], row[Column.COLUMN_PIECES])
            left, right = squares(row[Column.LEFT], rows), squares(row[Column.RIGHT], columns)
            found.append(Matrix(rows, columns, list(left), list(right)))
    return found


# --------------------------------------------------------------------------- by the textbook


class DenseOracle(Oracle):
    """On a dense H0, made of the bases and the accumulator of the optimizer's state.

    The step must have been taken already; the factors and bases have an oracle of their own.
    """

    def __init__(self, optimizer, **options):
        super().__init__(flat(parameters_of(optimizer)), **options)
        self.optimizer = optimizer

    def blocks(self):
        """Per matrix, the dense Q (rows in C order) and v, on its floor."""
        for p in parameters_of(self.optimizer):
            v = self.optimizer.state[p]["accumulator"].detach().double().reshape(-1)
            for matrix in matrices(self.optimizer, p):
                rows, columns = matrix.rows, matrix.columns
                own, v = v.split([sum(rows) * sum(columns), v.numel() - sum(rows) * sum(columns)])
                own = own.view(sum(rows), sum(columns)).clone()
                if matrix.left or matrix.right:
                    for tile in (t for strip in own.split(rows) for t in strip.split(columns, 1)):
                        tile += self.floor() * tile.max()
                left, right = (
                    torch.block_diag(*squares).double() if squares else torch.eye(n).double()
                    for squares, n in ((matrix.left, sum(rows)), (matrix.right, sum(columns)))
                )
                yield torch.kron(left.contiguous(), right.contiguous()), own.reshape(-1)

    def floor(self):
        """A thousand roundings, and a part that fades."""
        noise = 1e3 * torch.finfo(parameters_of(self.optimizer)[0].dtype).eps
        return noise**2 + 9e-6 / self.accepted**4

    def dense(self, power):
        correction = 1 - self.decay**self.accepted if self.bias_correction else 1.0
        return torch.block_diag(
            *(q @ torch.diag((v / correction + self.eps) ** power) @ q.T for q, v in self.blocks())
        )

    def h0(self, x):
        return self.dense(-0.5) @ x

    def b0(self, x):
        return self.dense(0.5) @ x


@both_backends
@both_dtypes
@all_runs
def test_steps_follow_the_textbook(name, dtype, fused):
    """Two loops on a dense H0, over stores, a skip, a reset and dropped steps."""
    losses = [1.0, 0.9, 0.8, 7.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    params = parameters(dtype)
    options = dict(RUNS[name], weight_decay=0.02)
    optimizer = factored(params, fused=fused, **options)
    own = ("init", "block_size", "max_vector_dim", "factor_interval")
    options = {key: value for key, value in options.items() if key not in own}
    oracle = DenseOracle(optimizer, **options)
    if name != "alone":
        optimizer.monitor = lambda: losses[step // 3]
        oracle.monitor = lambda _: losses[step // 3]
    for step in range(33):
        oracle.min_curvature = 1e300 if step // 3 == 6 else 0.0
        optimizer.param_groups[0]["min_curvature"] = oracle.min_curvature
        set_gradients(params, step)
        if step in (8, 13):
            params[1].grad[1, 1] = nan
        before = flat(params).double()
        optimizer.step()
        oracle.step(flat([p.grad for p in params]))
        after = flat(params).double()
        assert (after - oracle.w).norm() <= tolerance * (oracle.w - before).norm(), step
        oracle.w = after
    stats = optimizer.stats()
    for word in ("stored", "skipped", "resets"):
        assert stats[word] == getattr(oracle, word), word
    assert stats["steps_skipped"] == 2
    if name != "alone":
        assert (oracle.stored, oracle.skipped, oracle.resets) == (7, 1, 1)
    if name == "everything":
        assert oracle.clipped and oracle.damped and oracle.capped


@both_backends
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_bases_are_refreshed_at_the_first_step_and_every_interval(momentum, fused):
    """The first step finds the eigenbases of its own gradient; decisions count calls."""
    params = parameters(torch.float64)
    optimizer = factored(params, **dict(ALONE, momentum=momentum, factor_interval=3), fused=fused)
    changed, basis = [], torch.eye(3)
    for step in range(9):
        before = basis.clone()
        set_gradients(params, step)
        if step == 4:
            params[0].grad[0, 0] = nan
        optimizer.step()
        basis = matrices(optimizer, params[0])[0].left[0]
        changed.append(not torch.equal(before, basis))
        if step == 0:
            g = params[0].grad[0:3]
            turned = basis.T @ g @ g.T @ basis
            turned.diagonal().zero_()
            assert turned.norm() < 1e-3 * g.norm() ** 2
    assert changed == [True, False, True, False, False, True, False, False, True]


@both_backends
@both_dtypes
def test_matrix_is_symmetric_positive_definite(dtype, fused):
    """g.p > 0 for any gradient, and a.Hb = b.Ha, with the pairs and bases that a run leaves."""
    optimizer = factored(parameters(dtype), fused=fused, **PAIRS)
    optimizer.param_groups[0]["eps"] = 1e-12
    advance(optimizer, 0, 16)
    assert optimizer.stats()["pairs"] == 3
    generator = torch.Generator().manual_seed(0)
    d = flat(parameters_of(optimizer)).numel()
    # A gradient that is small beside the accumulator leaves H as it is.
    vectors = 1e-9 * torch.randn(4, d, generator=generator, dtype=torch.float64)
    images = []
    for g in vectors:
        twin = factored(parameters(dtype), fused=fused, **PAIRS)
        twin.load_state_dict(optimizer.state_dict())
        twin.param_groups[0].update(lr=1.0, update_interval=10**9, decay=1 - 1e-12)
        params = parameters_of(twin)
        for p, piece in zip(params, g.split([p.numel() for p in params]), strict=True):
            p.data.zero_()
            p.grad = piece.view(p.shape).to(dtype)
        twin._calls = 4 * 10**6 + 1  # no refresh
        twin.step()
        images.append(-flat(params).double())
    products = vectors @ torch.stack(images).T
    assert (products.diagonal() > 0).all()
    slack = (1e-9 if dtype == torch.float64 else 1e-3) * products.diagonal().max()
    torch.testing.assert_close(products, products.T, rtol=0, atol=slack.item())


@both_backends
@both_dtypes
@pytest.mark.parametrize("beyond", [{}, SAFEGUARDS], ids=["plain", "everything"])
def test_no_history_is_a_history_that_never_comes(beyond, dtype, fused):
    """The safeguards of pairs do nothing where there are none."""
    params, twins = parameters(dtype), parameters(dtype)
    options = dict(FACTORED, fused=fused, **beyond)
    a = factored(params, **dict(options, history_size=0))
    b = factored(twins, **dict(options, history_size=3, update_interval=10**9))
    start = flat(params)
    advance(a, 0, 12)
    advance(b, 0, 12)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(flat(params), flat(twins), rtol=tolerance, atol=tolerance)
    assert (flat(params) - start).abs().max() > 0.1


@both_backends
def test_defaults_move_the_parameters(fused):
    """The class's own options, of which the cap on a direction without pairs must not make zero."""
    params = parameters()
    before = flat(params)
    optimizer = AdaQN(params, fused=fused)
    advance(optimizer, 0, 3)
    assert ((flat(params) - before).abs() > 1e-4).all()


@both_backends
def test_without_factors_it_is_rmsprop(fused):
    """Blocks of one element are none."""
    params, twins = parameters(torch.float64), parameters(torch.float64)
    options = dict(SAFEGUARDS, lr=0.05, decay=0.9, eps=1e-3, fused=fused, history_size=3)
    options.update(update_interval=3, fisher_size=4)
    a = plain_adaqn(params, init="kronecker", block_size=1, **options)
    b = plain_adaqn(twins, init="rmsprop", **options)
    for step in range(20):
        advance(a, step, step + 1)
        advance(b, step, step + 1)
        torch.testing.assert_close(flat(params), flat(twins), rtol=1e-9, atol=1e-9)
    assert a.stats()["stored"] == b.stats()["stored"] > 3


@both_backends
def test_blocks_are_parameters_of_their_own(fused):
    """A matrix in two blocks steps like two matrices."""
    (whole,) = random_parameters([(6, 4)], torch.float64)
    halves = [nn.Parameter(half.clone()) for half in whole.detach().split(3)]
    a = plain_adaqn([whole], blocks={whole: 2}, fused=fused, **EVERYTHING)
    b = plain_adaqn(halves, fused=fused, **EVERYTHING)
    for step in range(15):
        set_gradients([whole], step)
        for half, g in zip(halves, whole.grad.split(3), strict=True):
            half.grad = g.clone()
        a.step()
        b.step()
    assert a.stats()["stored"] > 3
    torch.testing.assert_close(whole.detach(), torch.cat([h.detach() for h in halves]))


# --------------------------------------------------------------------------- what a step may do


@all_runs
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_step_reads_nothing_back(tensor_lr, fused, name):
    """Refreshes, pair updates and dropped steps among them."""
    options = dict(RUNS[name], fused=fused)
    if tensor_lr:
        options["lr"] = torch.tensor(0.05)
    optimizer = factored(parameters(), **options)
    params = parameters_of(optimizer)
    for step in range(13):
        set_gradients(params, step)
        if step == 5:
            params[2].grad[1, 1] = nan
        with NoReadBack():
            optimizer.step()
    assert optimizer.stats()["steps_skipped"] == 1
    assert (optimizer.stats()["stored"] > 1) == (name != "alone")


@pytest.mark.parametrize("compiled_from", [0, 3])
@all_runs
def test_compiled_step_equals_eager(name, compiled_from):
    """In one graph, also across refreshes and a dropped step."""
    run_pair(9, compiled_from, **RUNS[name])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@both_backends
@both_dtypes
@all_runs
@pytest.mark.parametrize("poison", [nan, -inf, "found_inf"])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_dropped_step_leaves_every_bit(steps, poison, name, dtype, fused):
    """Also where a refresh is due, after 3 and 7 steps; two words count the call."""
    optimizer = factored(parameters(dtype), fused=fused, **RUNS[name])
    params = parameters_of(optimizer)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    optimizer.param_groups[0]["update_interval"] = 10**9
    expected = snapshot(optimizer)
    words = expected[1][0]  # shared between the parameters' entries, in the copy too
    words["calls"] += 1
    words["counters"][Counter.STEPS_SKIPPED] += 1
    set_gradients(params, steps)
    if poison == "found_inf":
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    else:
        params[1].grad[3, 1] = poison
    optimizer.step()
    assert_same(snapshot(optimizer), expected)


@all_runs
def test_overflow_under_grad_scaler_is_dropped(name):
    """Before, at and after it, the bits are those of a run on gradients that are not scaled."""
    a, b = (factored(parameters(), **RUNS[name]) for _ in range(2))
    ours, theirs = parameters_of(a), parameters_of(b)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(12):
        set_gradients(ours, step)
        scaler.scale(torch.zeros(()))  # creates the scale tensor
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad * scaler.get_scale()
        if step in (3, 6):
            ours[3].grad[1, 1, 1] = theirs[3].grad[1, 1, 1] = inf
        a.step()
        scaler.step(b)
        scaler.update()
        assert_same(snapshot(a), snapshot(b))
    assert b.stats()["steps_skipped"] == 2


@both_backends
@all_runs
def test_maximize_is_descent_on_the_negative(name, fused):
    a = factored(parameters(), fused=fused, **RUNS[name])
    b = factored(parameters(), fused=fused, maximize=True, **RUNS[name])
    for step in range(10):
        for optimizer, sign in ((a, 1), (b, -1)):
            set_gradients(parameters_of(optimizer), step)
            for p in parameters_of(optimizer):
                p.grad *= sign
            optimizer.step()
    assert_same(snapshot(a), snapshot(b))


@both_backends
@all_runs
def test_tensor_rate_equals_a_float(name, fused):
    a = factored(parameters(), fused=fused, **dict(RUNS[name], lr=0.125))
    b = factored(parameters(), fused=fused, **dict(RUNS[name], lr=torch.tensor(0.125)))
    advance(a, 0, 10)
    advance(b, 0, 10)
    assert_same(snapshot(a), snapshot(b))


@both_backends
@all_runs
def test_autocast_around_the_step_changes_no_bit(name, fused):
    a, b = (factored(parameters(), fused=fused, **RUNS[name]) for _ in range(2))
    advance(a, 0, 10)
    with torch.autocast("cpu", torch.bfloat16):
        advance(b, 0, 10)
    assert_same(snapshot(a), snapshot(b))


def test_autocast_around_a_compiled_step_changes_no_bit():
    a, b = (factored(parameters(), **EVERYTHING) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: b.step(), fullgraph=True, backend="aot_eager")
    for step in range(5):
        for optimizer in (a, b):
            set_gradients(parameters_of(optimizer), step)
        a.step()
        with torch.autocast("cpu", torch.bfloat16):
            compiled()
    assert_same(snapshot(a), snapshot(b))


@both_backends
@all_runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_float32_state(dtype, name, fused):
    """Each step rounds once: the same as a float32 step from the rounded parameters."""
    low = parameters(dtype)
    high = [nn.Parameter(p.detach().float()) for p in low]
    a, b = (factored(params, fused=fused, **RUNS[name]) for params in (low, high))
    for step in range(8):
        set_gradients(low, step)
        for p, q in zip(low, high, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
        for q in high:
            q.data.copy_(q.to(dtype))
    assert_same(([p.float() for p in snapshot(a)[0]], snapshot(a)[1]), snapshot(b))


@both_backends
@all_runs
def test_parameters_without_gradient_stand_still(name, fused):
    """With all that belongs to them but the sum of iterates, also under weight decay."""
    optimizer = factored(parameters(), fused=fused, weight_decay=0.1, **RUNS[name])
    params = parameters_of(optimizer)
    for step in range(12):
        set_gradients(params, step)
        standing = (0, 3, 4) if step % 3 else (1,)
        for index in standing if step > 3 else ():
            params[index].grad = None
        before = copy.deepcopy([(p.detach(), optimizer.state.get(p, {})) for p in params])
        optimizer.step()
        for index in standing if step > 3 else ():
            w, entry = before[index]
            assert torch.equal(params[index], w)
            now = optimizer.state[params[index]]
            for key in {"accumulator", "momentum", "factors", "bases"} & entry.keys():
                assert torch.equal(now[key], entry[key]), key


@both_backends
def test_complex_parameters_count_as_pairs_of_real_ones(fused):
    """A complex matrix is a real one with twice the columns."""
    (x,) = random_parameters([(6, 2, 2)], torch.float64)
    z = nn.Parameter(torch.view_as_complex(x.detach().clone()))
    a, b = (plain_adaqn([p], blocks={p: 3}, fused=fused, **EVERYTHING) for p in (x, z))
    for step in range(9):
        set_gradients([x], step)
        z.grad = torch.view_as_complex(x.grad.clone())
        a.step()
        b.step()
    assert [len(m.left[0]) for m in matrices(a, z if z in a.state else x)] == [2, 2, 2]
    assert a.stats()["stored"] > 1
    assert torch.equal(x.detach(), torch.view_as_real(z.detach()))


# --------------------------------------------------------------------------- state


@both_dtypes
@all_runs
def test_state_bytes_are_what_is_allocated(name, dtype):
    """Announced before the first step, and the sum over storages after it."""
    optimizer = factored(parameters(dtype), **RUNS[name])
    announced = optimizer.stats()["state_bytes"]
    assert f"{announced:,} bytes" in repr(optimizer)
    advance(optimizer, 0, 1)
    assert optimizer.stats()["state_bytes"] == announced
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in optimizer._arena.tensors()
        if tensor.numel()
    }
    assert sum(storages.values()) == announced
    filed = {
        tensor.untyped_storage().data_ptr()
        for entry in optimizer.state.values()
        for key, tensor in entry.items()
        if key != "calls" and tensor.numel()
    }
    assert filed <= storages.keys()


def test_state_holds_the_factors_as_views():
    params = parameters()
    optimizer = factored(params, **EVERYTHING)
    advance(optimizer, 0, 2)
    expected = {
        0: [([3], [5])],
        1: [([3], [4]), ([3], [4])],
        2: [([3], [5])],
        3: [([2], [6])],
        6: [([], [4])],
        7: [([6, 5], [2])],
        9: [([4], [])],
    }
    for index, p in enumerate(params):
        entry = optimizer.state[p]
        assert entry["accumulator"].shape == entry["momentum"].shape == p.shape
        assert ("factors" in entry) == ("bases" in entry) == (index in expected)
        for kind in ("factors", "bases") if index in expected else ():
            found = matrices(optimizer, p, kind)
            sides = [([len(q) for q in m.left], [len(q) for q in m.right]) for m in found]
            assert sides == expected[index]
            numel = sum(n * n for side in sides for lengths in side for n in lengths)
            assert entry[kind].shape == (numel,)
    # What is written into the state is what the next step sees.
    twin = factored(parameters(), **EVERYTHING)
    advance(twin, 0, 2)
    for p in params:
        p.grad = torch.ones_like(p)
    for q in parameters_of(twin):
        q.grad = torch.ones_like(q)
    optimizer.state[params[0]]["accumulator"].mul_(4)
    optimizer.step()
    twin.step()
    for index, (p, q) in enumerate(zip(params, parameters_of(twin), strict=True)):
        if p.numel():
            assert torch.equal(p, q) == (index != 0), index


def round_trip(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@cache
def straight_run(dtype, name, fused):
    optimizer = factored(parameters(dtype), fused=fused, **RUNS[name])
    advance(optimizer, 0, 17)
    return snapshot(optimizer)


@both_backends
@all_runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved_at", [0, 1, 5, 6, 9])
def test_resumed_run_continues_bit_for_bit(saved_at, dtype, name, fused):
    """Between refreshes, after one, after a dropped step; options and blocks are restored."""
    first = factored(parameters(dtype), fused=fused, **RUNS[name])
    advance(first, 0, saved_at)
    weights = round_trip([p.detach() for p in parameters_of(first)])
    second = AdaQN([nn.Parameter(w) for w in weights], lr=123.0)
    second.load_state_dict(round_trip(first.state_dict()))
    assert second.param_groups[0]["blocks"] == BLOCKS
    assert second.stats() == first.stats()
    advance(second, saved_at, 17)
    assert_same(snapshot(second), straight_run(dtype, name, fused))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("steps", [0, 7])
@all_runs
def test_copies_continue_on_their_own(name, steps, copier):
    original = factored(parameters(), **RUNS[name])
    advance(original, 0, steps)
    twin = copier(original)
    assert repr(twin) == repr(original)
    advance(original, steps, 15)
    advance(twin, steps, 15)
    for mine, theirs in zip(original.state.values(), twin.state.values(), strict=True):
        shared = {key for key in mine if mine[key].numel()}
        assert all(mine[key].data_ptr() != theirs[key].data_ptr() for key in shared)
    assert_same(snapshot(twin), snapshot(original))


def test_loading_other_blocks_changes_nothing():
    """What was saved comes with its blocks; factors that do not fit them are refused."""
    optimizer, other = factored(parameters(), **ALONE), plain_adaqn(parameters(), **ALONE)
    advance(optimizer, 0, 3)
    advance(other, 0, 3)
    before = snapshot(optimizer)
    bad = copy.deepcopy(other.state_dict())
    bad["param_groups"][0]["blocks"] = BLOCKS
    with pytest.raises(ValueError, match=r"parameter 1.*factors.*\(50,\).*\(52,\)"):
        optimizer.load_state_dict(bad)
    bad["param_groups"][0]["blocks"] = [1, 5, *BLOCKS[2:]]
    with pytest.raises(ValueError, match=r"blocks: got 5.*\(6, 4\)"):
        optimizer.load_state_dict(bad)
    assert_same(snapshot(optimizer), before)
    assert optimizer.param_groups[0]["blocks"] == BLOCKS
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["blocks"] == [1] * len(SHAPES)
    assert_same(([], snapshot(optimizer)[1]), ([], snapshot(other)[1]))


@all_runs
def test_distributed_checkpoint_round_trip(name):
    """torch.distributed.checkpoint's state-dict functions, which materialise state by a step."""
    from torch.distributed.checkpoint import state_dict as dcp

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def train(model, optimizer, steps):
        x = torch.linspace(-1, 1, 24).view(8, 3)
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            optimizer.step()
        optimizer.zero_grad()

    def optimizer_for(net):
        return plain_adaqn(net.parameters(), blocks={net[0].weight: 2}, **RUNS[name])

    net, fresh, looked_at = model(), model(), model()
    optimizer, untouched, seen = (optimizer_for(m) for m in (net, fresh, looked_at))
    dcp.get_optimizer_state_dict(looked_at, seen)
    train(fresh, untouched, 9)
    train(looked_at, seen, 9)
    assert_same(snapshot(untouched), snapshot(seen))

    train(net, optimizer, 9)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(net, optimizer))
    other = model()
    other.load_state_dict(net.state_dict())
    resumed = optimizer_for(other)
    dcp.set_optimizer_state_dict(other, resumed, saved)
    train(net, optimizer, 9)
    train(other, resumed, 9)
    assert_same(snapshot(optimizer), snapshot(resumed))


# --------------------------------------------------------------------------- groups and blocks


@both_backends
@all_runs
def test_group_added_during_training(name, fused):
    """The old parameters keep factors and bases; the new ones begin with the identity."""
    params = parameters()
    old, new = params[:2], params[2:4]
    optimizer = plain_adaqn(old, blocks={old[1]: 2}, fused=fused, **RUNS[name])
    for step in range(7):
        set_gradients(old, step)
        optimizer.step()
    before = [{key: t.clone() for key, t in optimizer.state[p].items()} for p in old]
    optimizer.add_param_group({"params": new, "lr": 0.01, "blocks": {new[0]: 3}})
    assert [group["blocks"] for group in optimizer.param_groups] == [[1, 2], [3, 1]]
    assert_same(([], [dict(optimizer.state[p]) for p in old]), ([], before))
    entry = {key: t.clone() for key, t in optimizer.state[new[0]].items()}
    assert torch.equal(entry["bases"], torch.eye(5).expand(3, 5, 5).reshape(-1))
    assert not entry["accumulator"].any() and not entry["factors"].any()
    for step in range(7, 16):
        set_gradients(old + new, step)
        optimizer.step()
    assert all(p.isfinite().all() for p in old + new)
    assert not torch.equal(entry["bases"], optimizer.state[new[0]]["bases"])


@both_backends
@pytest.mark.parametrize("init", ["kronecker", "rmsprop"])
def test_first_parameter_with_factors_joins_during_training(init, fused):
    """The average of |g|^2, which only factors need, begins with it."""
    (old,), (new,) = random_parameters([(100,)]), random_parameters([(4, 3)])
    optimizer = AdaQN([{"params": [old], "init": init}], fused=fused)
    set_gradients([old], 0)
    optimizer.step()
    assert "square" not in optimizer.state[old]
    optimizer.add_param_group({"params": [new], "init": "kronecker"})
    assert optimizer.state[new]["square"] == 0 and optimizer.state[old]["counters"].any()
    set_gradients([old, new], 1)
    optimizer.step()
    assert optimizer.state[new]["square"] > 0 and optimizer.state[new]["factors"].any()


def test_failed_add_param_group_changes_nothing():
    params = parameters()
    optimizer = factored(params, **ALONE)
    advance(optimizer, 0, 3)
    before = snapshot(optimizer)
    new = random_parameters([(4, 3), (4,)])
    for blocks, error in (
        ({new[0]: 3}, ValueError),
        ({new[1]: 3}, ValueError),
        ({params[1]: 2}, ValueError),
        ({new[0]: 2.0}, TypeError),
        ({"weight": 2}, TypeError),
        (2, TypeError),
    ):
        with pytest.raises(error, match="^blocks: "):
            optimizer.add_param_group({"params": new, "blocks": blocks})
        assert len(optimizer.param_groups) == 1
    assert_same(snapshot(optimizer), before)
    with pytest.raises(ValueError, match="^blocks: "):
        AdaQN(params, blocks={new[0]: 2})


def test_blocks_may_be_given_for_the_optimizer_or_for_a_group():
    a, b = random_parameters([(6, 4), (8, 3)])
    groups = AdaQN([{"params": [a], "blocks": {a: 2}}, {"params": [b]}]).param_groups
    assert [group["blocks"] for group in groups] == [[2], [1]]
    groups = AdaQN([{"params": [a]}, {"params": [b]}], blocks={b: 4}).param_groups
    assert [group["blocks"] for group in groups] == [[1], [4]]
    for more in ({b: 4}, {a: 3, b: 4}):  # what a group says comes first
        groups = [{"params": [a], "blocks": {a: 2}}, {"params": [b]}]
        groups = AdaQN(groups, blocks=more).param_groups
        assert [group["blocks"] for group in groups] == [[2], [4]]


@both_backends
def test_blocks_of_unequal_heights_are_parameters_of_their_own(fused):
    (whole,) = random_parameters([(7, 4)], torch.float64)
    parts = [nn.Parameter(part.clone()) for part in whole.detach().split([4, 1, 2])]
    a = plain_adaqn([whole], blocks={whole: (4, 1, 2)}, fused=fused, **ALONE)
    b = plain_adaqn(parts, fused=fused, **ALONE)
    assert a.param_groups[0]["blocks"] == [(4, 1, 2)]
    for step in range(15):
        set_gradients([whole], step)
        for part, g in zip(parts, whole.grad.split([4, 1, 2]), strict=True):
            part.grad = g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(whole.detach(), torch.cat([part.detach() for part in parts]))
    resumed = AdaQN([whole])
    resumed.load_state_dict(round_trip(a.state_dict()))
    assert resumed.param_groups[0]["blocks"] == [(4, 1, 2)]


# --------------------------------------------------------------------------- mixed groups


@both_backends
def test_groups_may_differ_in_their_initial_matrix(fused):
    """Each steps as an optimizer of its own, as long as no basis has had its turn."""
    shapes = [(3, 5), (8, 4), (6, 2), (4,)]
    options = dict(ALONE, fused=fused)
    del options["init"], options["block_size"]
    sizes = [dict(init="rmsprop"), dict(block_size=4), dict(block_size=3), dict(init="rmsprop")]
    together, alone = random_parameters(shapes), random_parameters(shapes)
    groups = [{"params": [p], **size} for p, size in zip(together, sizes, strict=True)]
    one = plain_adaqn(groups, **dict(options, init="kronecker"))
    many = [
        plain_adaqn([p], **{**options, "init": "kronecker", **size})
        for p, size in zip(alone, sizes, strict=True)
    ]
    for step in range(12):
        set_gradients(together, step)
        set_gradients(alone, step)
        for optimizer in (one, *many):
            optimizer.step()
        for p, q in list(zip(together, alone, strict=True))[:: 1 if step == 0 else 3]:
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert "factors" not in one.state[together[0]] and "factors" in one.state[together[1]]


def test_only_a_diagonal_mixes_with_factors():
    a, b = random_parameters([(2, 3), (3,)])
    for first, second in (("kronecker", "scalar"), ("scalar", "rmsprop"), ("adagrad", "scalar")):
        with pytest.raises(ValueError, match=f"init: .*'{second}'.*'{first}'.*may be mixed"):
            AdaQN([{"params": [a]}, {"params": [b], "init": second}], init=first)
    optimizer = AdaQN([{"params": [a], "init": "rmsprop"}])
    optimizer.add_param_group({"params": [b], "init": "kronecker"})
    assert [group["init"] for group in optimizer.param_groups] == ["rmsprop", "kronecker"]
    with pytest.raises(ValueError, match="init: .*may be mixed"):
        optimizer.add_param_group({"params": random_parameters([(2,)]), "init": "scalar"})


@pytest.mark.parametrize(("name", "value"), [("init", "rmsprop"), ("block_size", 2)])
def test_a_group_keeps_what_gives_its_state_the_shape(name, value):
    a, b = random_parameters([(4, 3), (3, 4)])
    optimizer = AdaQN([{"params": [a]}, {"params": [b]}])
    set_gradients([a, b], 0)
    optimizer.step()
    before, was = snapshot(optimizer), optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    with pytest.raises(RuntimeError, match=f"{name}: was {was!r}"):
        optimizer.step()
    optimizer.param_groups[1][name] = was
    assert_same(snapshot(optimizer), before)
    optimizer.step()


def test_the_old_name_of_block_size_is_deprecated():
    (p,) = random_parameters([(4, 3)])
    with pytest.warns(FutureWarning, match="pass block_size=5"):
        assert AdaQN([p], max_factor_dim=5).param_groups[0]["block_size"] == 5
    with pytest.warns(FutureWarning, match="pass block_size=6"):
        groups = AdaQN([{"params": [p], "max_factor_dim": 6}]).param_groups
    assert groups[0]["block_size"] == 6


@pytest.mark.parametrize("place", [0, 1])
def test_a_parameter_that_moves_to_another_group_takes_its_factors_or_is_refused(place):
    """v in eigenbases is no diagonal; and where blocks fit, so does a checkpoint."""
    a, b, c = random_parameters([(4, 3), (4, 3), (3, 3)])
    for other, honoured in (("kronecker", True), ("rmsprop", False)):
        optimizer = AdaQN([{"params": [a, b]}, {"params": [c], "init": other}], blocks={b: 2})
        set_gradients([a, b, c], 0)
        optimizer.step()
        one, two = optimizer.param_groups
        two["params"].insert(place, one["params"].pop())
        if honoured:
            optimizer.step()
            twin = copy.deepcopy(optimizer)
            assert [group["blocks"] for group in twin.param_groups] == [
                [1],
                [2, 1][:: 1 - 2 * place],
            ]
            optimizer.load_state_dict(round_trip(optimizer.state_dict()))
        else:
            with pytest.raises(ValueError, match="expected no 'factors'.*init.*set them back"):
                optimizer.step()


@pytest.mark.parametrize("blocks", [[2], None, [[2, 2], 1, 1]])
def test_a_state_dict_with_other_blocks_than_parameters_is_refused(blocks):
    params = random_parameters([(4, 3), (4, 3)])
    optimizer = AdaQN(params)
    bad = optimizer.state_dict()
    bad["param_groups"][0]["blocks"] = blocks
    with pytest.raises(ValueError, match="'blocks' for each of 2 parameters"):
        optimizer.load_state_dict(bad)


def test_repr_tells_how_much_has_factors():
    params = random_parameters([(10, 5), (1, 30), (100,)])
    text = repr(AdaQN(params, block_size=4))
    assert "Factors: on both sides of 27.8 % of them, on one of 0.0 %, on none of 72.2 %" in text
    assert "Factors: none" in repr(AdaQN(params, block_size=1))
    assert "Factors" not in repr(AdaQN(params, init="rmsprop"))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


@both_backends
@all_runs
def test_lstm_learns(name, fused):
    """To sum its inputs, with a factor for each gate."""
    torch.manual_seed(1)
    model = Tagger()
    inputs = torch.randn(32, 6, 3)
    targets = inputs.sum(2, keepdim=True).cumsum(1).tanh()
    options = dict(RUNS[name], lr=0.02, eps=1e-16, block_size=600, max_direction=1.0)
    optimizer = plain_adaqn(model.parameters(), blocks=rnn_blocks(model), fused=fused, **options)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gates = matrices(optimizer, model.rnn.weight_hh_l0)
    assert [(len(m.left[0]), len(m.right[0])) for m in gates] == [(8, 8)] * 4
    assert losses[-1] < 0.1 * losses[0]
