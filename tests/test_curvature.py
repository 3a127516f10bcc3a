"""Where y comes from: the steps' gradients, a closure at two points, or a callable."""

import copy
import io
import pickle
from math import nan

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
    snapshot,
)
from test_compile import run_pair
from test_no_sync import NoReadBack
from torch import nn

from adaqn_cuda import gauss_newton, hessian
from adaqn_cuda.state.layout import Counter

SHAPES = [(2, 3), (), (4,), (0, 2)]
SAFEGUARDS = dict(
    momentum=0.7, damping=0.9, max_direction=0.9, bias_correction=True, max_grad_norm=2.0
)


class Quadratic:
    """1/2 (w - b)^T A (w - b) over parameters of SHAPES, with eigenvalues from 1 to 10."""

    def __init__(self, dtype=torch.float64):
        self.params = random_parameters(SHAPES, dtype)
        d = flat(self.params).numel()
        generator = torch.Generator().manual_seed(5)
        basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
        self.matrix = basis @ torch.diag(torch.linspace(1, 10, d, dtype=torch.float64)) @ basis.T
        self.minimum = torch.randn(d, generator=generator, dtype=torch.float64)

    def difference(self):
        w = torch.cat([p.reshape(-1) for p in self.params]).double()
        return w - self.minimum

    def loss(self):
        return 0.5 * self.difference() @ self.matrix @ self.difference()

    def parts(self, vector):
        pieces = vector.split([p.numel() for p in self.params])
        pairs = zip(self.params, pieces, strict=True)
        return {p: piece.view(p.shape).to(p.dtype) for p, piece in pairs}

    def product(self, s):
        return self.parts(self.matrix @ flat([s[p] for p in self.params]).double())

    def set_gradients(self, scale=1.0):
        gradient = self.matrix @ self.difference().detach()
        for p, g in self.parts(scale * gradient).items():
            p.grad = g

    def sources(self):
        """Options for each source of y; the matrix is the same."""
        return {
            "gradients": dict(curvature="gradients"),
            "difference": dict(curvature="difference", curvature_closure=self.loss),
            "product": dict(curvature=self.product),
        }


SOURCES = sorted(Quadratic().sources())
NEEDS_HOOK = ["difference", "product"]


def optimizer_on(problem, source, **options):
    options = {"init": "scalar", "lr": 0.02, "history_size": 3, "update_interval": 3, **options}
    return plain_adaqn(problem.params, **{**problem.sources()[source], **options})


def train(optimizer, problem, steps, scale=1.0):
    for _ in range(steps):
        problem.set_gradients(scale)
        optimizer.step()


def pairs(optimizer):
    """The stored pairs, flat and in float64, oldest first."""
    entries = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    counters, slots = entries[0]["counters"].tolist(), len(entries[0]["s_ring"])
    order = [(counters[Counter.OLDEST_PAIR] + i) % slots for i in range(counters[Counter.PAIRS])]
    return [
        tuple(flat([e[name][slot] for e in entries]).double() for name in ("s_ring", "y_ring"))
        for slot in order
    ]


def assert_secant(optimizer, problem, tolerance=1e-10):
    """y = A s for every stored pair."""
    assert pairs(optimizer)
    for s, y in pairs(optimizer):
        expected = problem.matrix @ s
        assert (y - expected).norm() <= tolerance * expected.norm()


# --------------------------------------------------------------------------- every source


@both_backends
@both_dtypes
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("source", SOURCES)
def test_y_is_the_hessian_times_s(source, interval, dtype, fused):
    """On a quadratic gradients are affine, so that averages of them are those at the averages."""
    problem = Quadratic(dtype)
    optimizer = optimizer_on(problem, source, update_interval=interval, fused=fused)
    train(optimizer, problem, 6 * interval)
    assert optimizer.stats()["stored"] == 5
    assert_secant(optimizer, problem, 1e-10 if dtype == torch.float64 else 1e-4)


@both_backends
@pytest.mark.parametrize("source", SOURCES)
def test_exact_pairs_find_the_minimum(source, fused):
    """With a pair from every step and room for all of them, it is BFGS."""
    problem = Quadratic()
    optimizer = optimizer_on(
        problem, source, lr=1.0, update_interval=1, history_size=12, fused=fused,
        min_curvature=0.0,
    )  # fmt: skip
    train(optimizer, problem, 60)
    assert problem.difference().norm() < 1e-9
    plain = Quadratic()
    train(optimizer_on(plain, source, lr=0.1, update_interval=10**9), plain, 60)
    assert plain.difference().norm() > 1e-4


@both_backends
@pytest.mark.parametrize("init", ["rmsprop", "scalar"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_follows_the_textbook(source, init, fused):
    """With every safeguard on, over stores, skips, resets and dropped steps."""
    problem = Quadratic()
    losses = [1.0, 0.9, 0.8, 0.7, 7.0, 0.7, 0.6, 0.5, 0.4, 0.3, nan, 0.3, 0.2, 0.1]
    options = dict(SAFEGUARDS, lr=0.03, init=init, update_interval=3, history_size=3, eps=30.0)
    optimizer = optimizer_on(problem, source, fused=fused, **options)
    optimizer.monitor = lambda: losses[step // 3]
    oracle = Oracle(
        flat(problem.params), monitor=lambda _: losses[step // 3],
        product=lambda s: problem.matrix @ s, **options,
    )  # fmt: skip
    for step in range(3 * len(losses)):
        oracle.min_curvature = 1e300 if step // 3 == 7 else 0.0
        optimizer.param_groups[0]["min_curvature"] = oracle.min_curvature
        problem.set_gradients()
        if step in (4, 8, 24, 25, 26):
            problem.params[2].grad[1] = nan
        before = flat(problem.params)
        oracle.step(flat([p.grad for p in problem.params]))
        optimizer.step()
        after = flat(problem.params)
        assert (after - oracle.w).norm() <= 1e-8 * (oracle.w - before).norm(), step
        oracle.w = after
    stats = optimizer.stats()
    for word, expected in (("stored", 8), ("skipped", 1), ("resets", 2)):
        assert stats[word] == getattr(oracle, word) == expected, word
    assert oracle.clipped and oracle.capped and oracle.damped


@both_backends
@pytest.mark.parametrize("source", SOURCES)
def test_maximizing_negates_y(source, fused):
    """Maximizing the negative changes no bit."""
    ours, theirs = Quadratic(), Quadratic()
    negative = {
        "gradients": {},
        "difference": dict(curvature_closure=lambda: -theirs.loss()),
        "product": dict(curvature=lambda s: {p: -y for p, y in theirs.product(s).items()}),
    }
    a = optimizer_on(ours, source, momentum=0.5, fused=fused)
    b = optimizer_on(theirs, source, momentum=0.5, fused=fused, maximize=True, **negative[source])
    train(a, ours, 15)
    train(b, theirs, 15, scale=-1.0)
    assert a.stats()["stored"] == b.stats()["stored"] == 4
    assert torch.equal(flat(ours.params), flat(theirs.params))


@both_backends
@pytest.mark.parametrize("source", SOURCES)
def test_clipping_and_loss_scale_stay_out_of_y(source, fused):
    problem = Quadratic()
    optimizer = optimizer_on(problem, source, max_grad_norm=0.5, fused=fused)
    optimizer.grad_scale = torch.tensor(64.0)
    train(optimizer, problem, 12, scale=64.0)
    assert optimizer.stats()["stored"] == 3
    assert_secant(optimizer, problem)


@both_backends
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dropped", [[4], [3, 5], [3, 4, 5], [0, 1, 2]])
def test_dropped_steps_leave_the_averages_right(dropped, source, fused):
    """Also where a pair update is due, and where all of an interval is dropped."""
    problem = Quadratic()
    optimizer = optimizer_on(problem, source, fused=fused)
    for step in range(15):
        problem.set_gradients()
        if step in dropped:
            problem.params[0].grad[1, 1] = nan
        optimizer.step()
    assert optimizer.stats()["stored"] == (4 if dropped == [4] else 3)
    assert_secant(optimizer, problem)


@both_backends
@pytest.mark.parametrize("source", SOURCES)
def test_s_starts_where_the_last_stored_pair_ended(source, fused):
    """A skipped pair moves neither the anchor nor its gradient: the next s is longer."""
    problem = Quadratic()
    optimizer = optimizer_on(problem, source, fused=fused)
    averages = []
    for step in range(12):
        if step % 3 == 0:
            averages.append(torch.zeros(11, dtype=torch.float64))
        averages[-1] += flat(problem.params) / 3
        optimizer.param_groups[0]["min_curvature"] = 1e300 if step == 8 else 1e-4
        train(optimizer, problem, 1)
    stats = optimizer.stats()
    assert (stats["stored"], stats["skipped"]) == (2, 1)
    assert_secant(optimizer, problem)
    s, _ = pairs(optimizer)[-1]
    torch.testing.assert_close(s, averages[3] - averages[1])


@pytest.mark.parametrize("source", SOURCES)
def test_no_value_is_read_back(source):
    problem = Quadratic()
    optimizer = optimizer_on(problem, source, damping=0.5, max_direction=1.0, momentum=0.9)
    for step in range(10):
        problem.set_gradients()
        if step == 4:
            problem.params[0].grad[1, 1] = nan
        with NoReadBack():
            optimizer.step()
    assert optimizer.stats()["stored"] == 2


@pytest.mark.parametrize(
    ("curvature", "fullgraph"), [("gradients", True), (lambda s: s, False)], ids=["sum", "callable"]
)
def test_compiled_step_equals_eager(curvature, fullgraph):
    optimizer = run_pair(14, 0, fullgraph=fullgraph, curvature=curvature, update_interval=3)
    assert optimizer.stats()["stored"] > 2


# --------------------------------------------------------------------------- parameters' dtypes


@both_backends
@pytest.mark.parametrize("source", SOURCES)
def test_complex_parameters_count_as_pairs_of_real_ones(source, fused):
    """Behind real ones of odd size, so that they begin at odd places in flat vectors."""

    def loss(x, z):
        return (z - 1).pow(2).sum() + (x * x).sum() + 3 * x[0] * z[0, 0]

    x, z = random_parameters([(3,), (4, 2)], torch.float64)
    u, v = random_parameters([(3,), (4, 2)], torch.float64)
    v = nn.Parameter(torch.view_as_complex(v.detach()))
    options = dict(init="scalar", update_interval=2, history_size=3, fused=fused)
    seen = []

    def twice(s):
        seen.append(s)
        return {p: 2 * part for p, part in s.items()}

    a, b = (
        plain_adaqn(
            params, **options,
            **{
                "gradients": dict(curvature="gradients"),
                "difference": dict(curvature="difference", curvature_closure=closure),
                "product": dict(curvature=twice),
            }[source],
        )
        for params, closure in (
            ([x, z], lambda: loss(x, z)),
            ([u, v], lambda: loss(u, torch.view_as_real(v))),
        )
    )  # fmt: skip
    for _ in range(9):
        for optimizer, value in ((a, loss(x, z)), (b, loss(u, torch.view_as_real(v)))):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert a.stats()["stored"] == b.stats()["stored"] == 3
    assert torch.equal(x, u)
    assert torch.equal(z, torch.view_as_real(v.detach()))
    if source == "product":
        assert [part.dtype for part in seen[-1].values()] == [torch.float64, torch.complex128]
        assert torch.equal(seen[-2][z], torch.view_as_real(seen[-1][v]))


@both_backends
@pytest.mark.parametrize("source", SOURCES)
def test_low_precision_parameters_keep_float32_pairs(source, fused):
    """s and y are float32; closures see the parameters in their own dtype."""
    problem = Quadratic(torch.bfloat16)
    optimizer = optimizer_on(problem, source, fused=fused)
    train(optimizer, problem, 15)
    assert optimizer.stats()["stored"] > 1
    entry = optimizer.state[problem.params[0]]
    assert {entry[name].dtype for name in ("s_ring", "y_ring", "anchor")} == {torch.float32}
    for s, y in pairs(optimizer):
        assert torch.dot(y, problem.matrix @ s) > 0.5 * y.norm() * (problem.matrix @ s).norm()


# --------------------------------------------------------------------------- what is called when


class Watched:
    """Keeps what ``problem``'s functions see when a pair update calls them."""

    def __init__(self, problem):
        self.problem, self.seen, self.displacements = problem, [], []

    def look(self):
        assert torch.is_grad_enabled()
        self.seen.append(flat(self.problem.params))

    def closure(self):
        self.look()
        return self.problem.loss()

    def product(self, s):
        self.look()
        self.displacements.append(s)
        return self.problem.product(s)


@both_backends
@both_dtypes
def test_closure_is_called_at_both_averaged_iterates(dtype, fused):
    """At w_n and then at w_o; at w_n again, not at zero, while there is no w_o."""
    problem = Quadratic(dtype)
    watched = Watched(problem)
    optimizer = optimizer_on(problem, "difference", fused=fused, curvature_closure=watched.closure)
    averages = []
    for step in range(9):
        if step % 3 == 0:
            averages.append(0)
        averages[-1] += flat(problem.params) / 3
        train(optimizer, problem, 1)
    assert len(watched.seen) == 6
    for index, average in enumerate([0, 0, 1, 0, 2, 1]):
        torch.testing.assert_close(watched.seen[index], averages[average])


@both_backends
@both_dtypes
def test_callable_gets_s_at_the_averaged_iterate(dtype, fused):
    """Zero, while there is no w_o."""
    problem = Quadratic(dtype)
    watched = Watched(problem)
    optimizer = optimizer_on(problem, "product", fused=fused, curvature=watched.product)
    anchors = [torch.zeros(11)]
    for _ in range(3):
        train(optimizer, problem, 3)
        anchors.append(flat([optimizer.state[p]["anchor"] for p in problem.params]))
    assert len(watched.seen) == 3
    for index, s in enumerate(watched.displacements):
        assert list(s) == problem.params
        assert [part.shape for part in s.values()] == [p.shape for p in problem.params]
        torch.testing.assert_close(watched.seen[index], anchors[index + 1])
        expected = anchors[index + 1] - anchors[index] if index else torch.zeros(11, dtype=dtype)
        torch.testing.assert_close(flat(s.values()), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pairs(optimizer)[-1][0], flat(s.values()).double())


@both_backends
@pytest.mark.parametrize("source", NEEDS_HOOK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_parameters_come_back_to_the_bit(dtype, source, fused):
    """A step of length zero changes no parameter, whatever was evaluated elsewhere meanwhile."""
    problem = Quadratic(dtype)
    optimizer = optimizer_on(problem, source, fused=fused)
    train(optimizer, problem, 8)
    optimizer.param_groups[0]["lr"] = 0.0
    problem.set_gradients()
    grads = [p.grad for p in problem.params]
    before = flat(problem.params), flat(grads)
    optimizer.step()
    assert optimizer.stats()["stored"] == 2
    assert torch.equal(flat(problem.params), before[0])
    assert all(p.grad is g for p, g in zip(problem.params, grads, strict=True))
    assert torch.equal(flat(grads), before[1])


def failing(outcome, good_calls=0):
    """A function that gives a good answer some times and then raises, or returns ``outcome``."""
    calls = iter(range(100))

    def function(*arguments):
        if next(calls) < good_calls:
            return 2 * torch.ones((), requires_grad=True)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome(*arguments) if callable(outcome) else outcome

    return function


BROKEN = KeyError("broken")
#: Source, what its function returns or raises, after how many good calls, and the message.
FAILURES = {
    "closure raises": ("difference", BROKEN, 0, "broken"),
    "closure raises at the second point": ("difference", BROKEN, 1, "broken"),
    "closure returns a number": ("difference", 1.0, 0, "^curvature_closure: .*without backward"),
    "closure returns no graph": ("difference", torch.ones(()), 0, "^curvature_closure: "),
    "closure returns a vector": (
        "difference", torch.ones(2, requires_grad=True), 0, "^curvature_closure: ",
    ),
    "callable raises": ("product", BROKEN, 0, "broken"),
    "callable returns a tensor": ("product", torch.ones(11), 0, "^curvature: .*mapping"),
    "callable returns nothing": ("product", None, 0, "^curvature: .*mapping"),
    "keys are names": ("product", {"weight": torch.ones(2, 3)}, 0, "^curvature: .*'weight'"),
    "shapes differ": (
        "product", lambda s: {p: y.reshape(-1) for p, y in s.items()}, 0,
        r"^curvature: .*\(2, 3\).*\(6,\)",
    ),
    "values are numbers": ("product", lambda s: dict.fromkeys(s, 2.0), 0, "^curvature: .*2.0"),
}  # fmt: skip


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAILURES)
def test_failing_function_leaves_no_trace(name, dtype, fused):
    """Neither in the parameters nor in the state; with a good one the run goes on."""
    source, outcome, good_calls, message = FAILURES[name]
    problem, twin = Quadratic(dtype), Quadratic(dtype)
    options = dict(momentum=0.5, damping=0.5, fused=fused)
    optimizer, undisturbed = (optimizer_on(p, source, **options) for p in (problem, twin))
    train(optimizer, problem, 8)
    before = snapshot(optimizer)
    attribute = "curvature_closure" if source == "difference" else "curvature_product"
    good = getattr(optimizer, attribute)
    setattr(optimizer, attribute, failing(outcome, good_calls))
    with pytest.raises((KeyError, TypeError), match=message):
        train(optimizer, problem, 1)
    assert_same(snapshot(optimizer), before)
    setattr(optimizer, attribute, good)
    train(optimizer, problem, 4)
    train(undisturbed, twin, 12)
    assert_same(snapshot(optimizer), snapshot(undisturbed))


@pytest.mark.parametrize(
    ("source", "attribute", "message"),
    [
        ("difference", "curvature_closure", "needs a curvature_closure.*assign one"),
        ("product", "curvature_product", "assign it to curvature_product"),
    ],
)
def test_missing_function_is_asked_for_at_every_step(source, attribute, message):
    """Before anything has changed, not only when it would be called."""
    problem = Quadratic()
    optimizer = optimizer_on(problem, source)
    train(optimizer, problem, 6)
    setattr(optimizer, attribute, None)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=message):
        train(optimizer, problem, 1)
    assert_same(snapshot(optimizer), before)
    setattr(optimizer, attribute, 3.0)
    with pytest.raises(TypeError, match=f"^{attribute}: expected a callable"):
        train(optimizer, problem, 1)
    assert_same(snapshot(optimizer), before)


def test_parameters_left_out_of_y_have_none():
    """As with a closure whose loss some parameters have no part in, or that are frozen."""
    problem, twin = Quadratic(), Quadratic()
    (
        first,
        *_,
    ) = problem.params
    optimizer = optimizer_on(problem, "product", curvature=lambda s: {first: 2 * s[first]})
    other = optimizer_on(twin, "difference", curvature_closure=lambda: twin.params[0].pow(2).sum())
    twin.params[2].requires_grad_(False)
    for _ in range(6):
        problem.set_gradients()
        twin.set_gradients()
        optimizer.step()
        other.step()
    for run in (optimizer, other):
        ((s, y),) = pairs(run)
        torch.testing.assert_close(y[:6], 2 * s[:6])
        assert s[6:].all() and not y[6:].any()


# --------------------------------------------------------------------------- copies and groups


def reloaded(optimizer, twin):
    """``twin`` with the state of ``optimizer``, by way of a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


def give_function(optimizer, problem, source):
    """What copies and checkpoints leave out."""
    if source == "difference":
        optimizer.curvature_closure = problem.loss
    if source == "product":
        optimizer.curvature_product = problem.product


@both_backends
@pytest.mark.parametrize("steps", [0, 7, 9])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_continue_to_the_bit(way, source, steps, fused):
    """Within an interval and after a pair update; functions of the user's are assigned anew."""
    problem, other = Quadratic(), Quadratic()
    optimizer = optimizer_on(problem, source, momentum=0.5, fused=fused)
    train(optimizer, problem, steps)
    if way == "state_dict":
        twin = reloaded(optimizer, optimizer_on(other, source, lr=7.0))
    else:
        functions = optimizer.curvature_closure, optimizer.curvature_product
        optimizer.curvature_closure = optimizer.curvature_product = None
        copier = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o))}
        twin = copier[way](optimizer)
        optimizer.curvature_closure, optimizer.curvature_product = functions
        assert twin.curvature_closure is None and twin.curvature_product is None
        other.params = twin.param_groups[0]["params"]
    for p, q in zip(problem.params, other.params, strict=True):
        q.data.copy_(p.data)
    give_function(twin, other, source)
    train(optimizer, problem, 10)
    train(twin, other, 10)
    assert_same(snapshot(twin), snapshot(optimizer))


@pytest.mark.parametrize("source", NEEDS_HOOK)
def test_functions_are_left_out_of_copies(source):
    """They may hold the model, or be lambdas, which cannot be pickled."""
    optimizer = optimizer_on(Quadratic(), source)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.curvature_closure is None and twin.curvature_product is None
        with pytest.raises(RuntimeError, match="assign"):
            twin.step()


@both_backends
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("joins_at", [3, 7])
def test_group_added_during_training_spoils_no_pair(joins_at, source, fused):
    """The gradient of the added parameters at the anchor is not known, so there is a new one."""
    problem = Quadratic()
    first, *rest = problem.params
    options = dict(init="scalar", lr=0.02, history_size=8, update_interval=3, fused=fused)
    options.update(problem.sources()[source])
    if source == "product":
        options["curvature"] = product_of(problem)
    optimizer = plain_adaqn([first], **options)
    train(optimizer, problem, joins_at)
    optimizer.add_param_group({"params": rest})
    old = optimizer.stats()["stored"]
    train(optimizer, problem, 14)
    assert optimizer.stats()["skipped"] == 0
    entries = [optimizer.state[p] for p in problem.params]
    for slot in range(old, optimizer.stats()["stored"]):
        s, y = (flat([e[name][slot] for e in entries]) for name in ("s_ring", "y_ring"))
        torch.testing.assert_close(y, problem.matrix @ s)


def product_of(problem):
    """A s, where parameters that s leaves out stand still."""

    def product(s):
        full = {p: s.get(p, torch.zeros_like(p)) for p in problem.params}
        return {p: y for p, y in problem.product(full).items() if p in s}

    return product


# --------------------------------------------------------------------------- on models


def regression(model, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        targets = model(inputs) + 0.3 * torch.randn(len(inputs), 1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return targets


@pytest.mark.parametrize("helper", [hessian, gauss_newton])
def test_products_of_a_model_solve_an_ill_conditioned_problem(helper):
    """Least squares with a condition number of 1e4: pairs beat every rate without them."""

    def final_loss(lr, history_size):
        torch.manual_seed(3)
        scales = torch.logspace(0, -2, 8)
        inputs = torch.randn(64, 8) * scales
        model = nn.Linear(8, 1)
        targets = regression(model, inputs)
        loss = nn.MSELoss()
        curvature = helper(model, loss, (inputs, targets)) if history_size else "fisher"
        optimizer = plain_adaqn(
            model.parameters(), lr=lr, init="scalar", history_size=history_size,
            update_interval=2, curvature=curvature, min_curvature=0.0,
        )  # fmt: skip
        for _ in range(150):
            optimizer.zero_grad()
            value = loss(model(inputs), targets)
            value.backward()
            optimizer.step()
        solution = torch.linalg.lstsq(
            torch.cat([inputs, torch.ones(64, 1)], 1).double(), targets.double()
        ).solution
        best = (torch.cat([inputs, torch.ones(64, 1)], 1).double() @ solution - targets).pow(2)
        return value.item() - best.mean().item()

    without = min(final_loss(lr, 0) for lr in (0.1, 0.3, 0.9))
    with_pairs = min(final_loss(lr, 10) for lr in (0.3, 1.0))
    assert with_pairs < 0.1 * without


@pytest.mark.parametrize("helper", [hessian, gauss_newton])
def test_products_of_a_recurrent_model_train_it(helper):
    """On mini-batches of its own, in float32."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(2, 6, batch_first=True), nn.Linear(6, 1)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    model, loss = Model(), nn.MSELoss()
    inputs = torch.randn(40, 5, 2)
    targets = inputs.sum((1, 2), keepdim=False)[:, None].tanh()
    draw = torch.Generator().manual_seed(1)

    def batch():
        rows = torch.randint(40, (16,), generator=draw)
        return inputs[rows], targets[rows]

    optimizer = plain_adaqn(
        model.parameters(), lr=0.01, history_size=5, update_interval=5, damping=0.2,
        max_direction=1.0, momentum=0.9, bias_correction=True, curvature=helper(model, loss, batch),
    )  # fmt: skip
    first = loss(model(inputs), targets).item()
    for _ in range(60):
        x, y = batch()
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    assert optimizer.stats()["stored"] >= 10
    assert loss(model(inputs), targets).item() < 0.3 * first
