"""LBFGS against torch's, against dense matrices, and what users may do to it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from itertools import chain, repeat

import pytest
import torch
from problems import BACKENDS, needs_library
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from adaqn_cuda import DETERMINISTIC, LBFGS, ops, reference
from adaqn_cuda.search import Search
from adaqn_cuda.state.layout import Counter, Word

F32, F64 = torch.float32, torch.float64


# ------------------------------------------------------------------ problems


def rosenbrock(p):
    x = p[0]
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def problem(name, dtype=F64):
    """Starting points and a loss of them."""
    draw = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=F64).to(dtype)

    if name == "rosenbrock of 2":
        return [torch.tensor([-1.2, 1.0], dtype=dtype)], rosenbrock
    if name == "rosenbrock of 20":
        return [torch.linspace(-1, 1, 20, dtype=dtype)], rosenbrock
    if name == "least squares":
        a, b = random(50, 30), random(50)
        return [torch.zeros(30, dtype=dtype)], lambda p: ((a @ p[0] - b) ** 2).mean()
    if name == "logistic regression":
        x = random(200, 10)
        y = (x[:, 0] > 0).to(dtype)
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        return [
            torch.zeros(10, dtype=dtype),
            torch.zeros((), dtype=dtype),
        ], lambda p: loss(x @ p[0] + p[1], y) + 1e-3 * (p[0] ** 2).sum()
    if name == "network":
        x = torch.linspace(-1, 1, 64, dtype=dtype)[:, None]
        start = [random(16, 1), random(16), random(1, 16) / 4, random(1)]
        return start, lambda p: (
            (torch.tanh(x @ p[0].T + p[1]) @ p[2].T + p[3] - torch.sin(3 * x)) ** 2
        ).mean()
    if name == "quartic":
        start = [torch.full((7,), 3.0, dtype=dtype)]
        return start, lambda p: (p[0] ** 4).sum() + (p[0].sum() - 1) ** 2
    if name == "factorisation":
        m = random(12, 12)
        return [random(12, 3), random(12, 3)], lambda p: ((p[0] @ p[1].T - m) ** 2).mean()
    if name == "chain":
        return (
            [torch.zeros(40, dtype=dtype)],
            lambda p: (
                ((p[0] - 1) ** 2).sum()
                + 50 * ((p[0][1:] - p[0][:-1]) ** 2).sum()
                + (p[0] ** 4).mean()
            ),
        )
    raise AssertionError(name)


PROBLEMS = [
    "rosenbrock of 2", "rosenbrock of 20", "least squares", "logistic regression", "network",
    "quartic", "factorisation", "chain",
]  # fmt: skip
#: Step lengths with which they do not diverge without a line search.
SHORT = {"rosenbrock of 2": 1e-3, "rosenbrock of 20": 1e-3, "quartic": 1e-2, "factorisation": 0.1}


class Run:
    """An optimizer on a problem, and the losses of all its evaluations."""

    def __init__(self, optimizer, start, loss, **options):
        self.params = [Parameter(x.clone()) for x in start]
        self.loss = loss
        self.optimizer = optimizer(self.params, **options)
        self.losses = []

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.loss(self.params)
        loss.backward()
        self.losses.append(loss.item())
        return loss

    def step(self, times=1):
        for _ in range(times):
            self.returned = self.optimizer.step(self.closure)
        return self

    @property
    def state(self):
        return self.optimizer.state[self.params[0]]

    def flat(self):
        return torch.cat([p.detach().reshape(-1) for p in self.params])


def relative(a, b):
    return max(abs(x - y) / max(abs(x), 1e-300) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------ a drop-in


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("history_size", [3, 100])
@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_same_evaluations_and_losses_as_torch(name, line_search_fn, history_size, fused):
    start, loss = problem(name)
    options = dict(
        lr=SHORT.get(name, 1.0) if line_search_fn is None else 1.0,
        line_search_fn=line_search_fn,
        history_size=history_size,
        max_iter=10,
    )
    theirs = Run(torch.optim.LBFGS, start, loss, **options).step(2)
    ours = Run(LBFGS, start, loss, fused=fused, **options).step(2)
    assert len(ours.losses) == len(theirs.losses)
    assert relative(theirs.losses, ours.losses) <= 1e-9
    for key in ("n_iter", "func_evals"):
        assert ours.state[key] == theirs.state[key], key
    assert ours.returned.item() == pytest.approx(theirs.returned.item(), rel=1e-9)


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("name", ["rosenbrock of 2", "logistic regression", "quartic"])
def test_float32_follows_torch_to_rounding(name, fused):
    start, loss = problem(name, F32)
    options = dict(line_search_fn="strong_wolfe", max_iter=10)
    theirs = Run(torch.optim.LBFGS, start, loss, **options).step()
    ours = Run(LBFGS, start, loss, fused=fused, **options).step()
    assert len(ours.losses) == len(theirs.losses)
    assert relative(theirs.losses, ours.losses) <= 2e-3


@pytest.mark.parametrize("line_search_fn", ["strong_wolfe", "armijo"])
def test_float32_does_not_stagnate(line_search_fn):
    """Losses that are equal up to rounding do not end the search: the slopes tell."""
    start, loss = problem("logistic regression", F32)
    run = Run(LBFGS, start, loss, line_search_fn=line_search_fn, tolerance_change=0.0)
    run.step(5)
    assert max(p.grad.abs().max().item() for p in run.params) < 1e-6


@pytest.mark.parametrize("tolerance", [dict(max_eval=7), dict(tolerance_grad=1e-2)])
@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_stops_where_torch_stops(line_search_fn, tolerance):
    start, loss = problem("logistic regression")
    options = dict(line_search_fn=line_search_fn, **tolerance)
    theirs = Run(torch.optim.LBFGS, start, loss, **options).step(3)
    ours = Run(LBFGS, start, loss, **options).step(3)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)
    assert ours.state["n_iter"] == theirs.state["n_iter"]


def test_reasons_for_stopping():
    start, loss = problem("logistic regression")

    def stopped(**options):
        options = {"line_search_fn": "strong_wolfe", **options}
        return Run(LBFGS, start, loss, **options).step(options.pop("times", 1)).optimizer.stats()

    assert Run(LBFGS, start, loss).optimizer.stats()["stopped"] is None
    assert stopped(max_iter=3, max_eval=30)["stopped"] == "max_iter"
    assert stopped(max_iter=30, max_eval=4)["stopped"] == "max_eval"
    for search in ("strong_wolfe", "armijo"):
        more = dict(line_search_fn=search, max_iter=90)
        assert "tolerance_grad" in stopped(tolerance_grad=1e-3, **more)["stopped"]
        assert "loss changed" in stopped(tolerance_change=1e-4, **more)["stopped"]
    assert stopped(line_search_fn="armijo", max_iter=2, max_eval=30)["stopped"] == "max_iter"


# ------------------------------------------------------------------ against dense matrices


def dense_direction(pairs, gradient, matrix, self_scaled):
    """-H g with H by n updates of a dense matrix."""
    eye = torch.eye(len(gradient), dtype=F64)
    h = matrix
    for s, y, tau in pairs:
        rho = 1 / (s @ y)
        v = eye - rho * torch.outer(y, s)
        h = v.T @ h @ v / (tau if self_scaled else 1.0) + rho * torch.outer(s, s)
    return -h @ gradient


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("init", ["scalar", "kronecker", "rmsprop"])
@pytest.mark.parametrize("self_scaled", [False, True])
def test_direction_is_that_of_the_dense_matrix(init, self_scaled, fused):
    start, loss = problem("network")
    options = dict(line_search_fn="armijo", init=init, self_scaled=self_scaled, min_curvature=0.0)
    run = Run(LBFGS, start, loss, max_iter=1, fused=fused, **options)
    pairs, before = [], 0
    for _ in range(12):
        run.step()
        history = run.optimizer._history
        stored = int(history.counters[Counter.STORED])
        if stored > before:
            newest = history.counters[Counter.PAIRS] - 1
            s, y = history.s_ring[newest].clone(), history.y_ring[newest].clone()
            pairs.append((s, y, 1 / history.scales[newest].item()))
        before = stored
    matrix = torch.eye(len(run.flat()), dtype=F64)
    if init != "scalar":
        operations = torch.ops.adaqn if fused is None else reference
        for row in matrix:
            operations.kronecker_apply(
                history.table, history.counters, history.accumulator, history.bases,
                [len(run.params)], [0.98], [1e-16], True, 0, False, row,
            )  # fmt: skip
    s, y, _ = pairs[-1]
    matrix *= (s @ y) / (y @ matrix @ y)
    expected = dense_direction(pairs, history.gradient, matrix, self_scaled)
    assert len(pairs) == history.counters[Counter.PAIRS]
    assert (history.direction - expected).norm() <= 1e-8 * expected.norm()


def test_preset_beats_torch_on_a_network():
    start, loss = problem("network")
    theirs = Run(torch.optim.LBFGS, start, loss, line_search_fn="strong_wolfe", max_iter=300)
    ours = Run(LBFGS, start, loss, max_iter=300, **DETERMINISTIC)
    assert min(ours.step().losses) < min(theirs.step().losses) / 5


@pytest.mark.parametrize("fused", BACKENDS)
def test_without_pairs_a_search_starts_from_twice_the_last_step(fused):
    start, loss = problem("chain")
    options = dict(line_search_fn="armijo", history_size=0, lr=1e-6, max_iter=1, max_eval=30)
    run = Run(LBFGS, start, loss, first_step=0.5, fused=fused, **options)
    steps = [run.step().optimizer._history.words[Word.TAKEN].item() for _ in range(6)]
    assert steps == [0.5e-6 * 2**k for k in range(6)]
    factors = chain([1.0], repeat(torch.nan))  # no trial is finite
    run.loss = lambda p: loss(p) * next(factors)
    assert "line search failed" in run.step().optimizer.stats()["stopped"]
    run.loss = loss
    assert run.step().optimizer._history.words[Word.TAKEN] == 0.5e-6  # from the beginning


# ------------------------------------------------------------------ checkpoints


SETTINGS = {
    "none": dict(lr=0.5),
    "wolfe": dict(line_search_fn="strong_wolfe", history_size=4),
    "armijo": dict(line_search_fn="armijo", history_size=4),
    "deterministic": dict(DETERMINISTIC),
    "diagonal": dict(DETERMINISTIC, init="rmsprop", history_size=3),
    "without pairs": dict(line_search_fn="armijo", history_size=0),
    "bfloat16": dict(line_search_fn="strong_wolfe", history_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("max_eval", [1, 2, 7])
def test_resumes_bit_for_bit_after_any_evaluation(setting, max_eval, fused):
    start, loss = problem("network")
    options = dict(SETTINGS[setting], max_iter=5, max_eval=max_eval, fused=fused)
    whole = Run(LBFGS, start, loss, **options).step(9)
    file = io.BytesIO()
    torch.save(whole.optimizer.state_dict(), file)
    file.seek(0)
    other = Run(LBFGS, [p.detach() for p in whole.params], loss, **options)
    other.optimizer.load_state_dict(torch.load(file))
    whole.losses.clear()
    whole.step(8), other.step(8)
    assert whole.losses == other.losses
    assert torch.equal(whole.flat(), other.flat())
    assert whole.optimizer.stats() == other.optimizer.stats()


def test_a_state_of_before_there_were_more_words_is_taken():
    start, loss = problem("network")
    whole = Run(LBFGS, start, loss, line_search_fn="armijo", max_iter=5).step(3)
    saved = copy.deepcopy(whole.optimizer.state_dict())
    saved["state"][0]["words"] = saved["state"][0]["words"][: Word.TAKEN]
    other = Run(LBFGS, [p.detach() for p in whole.params], loss, line_search_fn="armijo")
    other.optimizer.load_state_dict(saved)
    whole.step(2), other.step(2)
    assert torch.equal(whole.flat(), other.flat())
    saved["state"][0]["words"] = saved["state"][0]["words"][:-1]
    with pytest.raises(ValueError, match=r"'words' of shape \(21,\), got \(17,\)"):
        other.optimizer.load_state_dict(saved)


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_state_goes_to_torch_and_comes_from_it(line_search_fn):
    start, loss = problem("chain")
    options = dict(line_search_fn=line_search_fn, history_size=5, max_iter=7, lr=0.9)
    for source, target in ((torch.optim.LBFGS, LBFGS), (LBFGS, torch.optim.LBFGS)):
        first = Run(source, start, loss, **options).step(2)
        second = Run(target, [p.detach() for p in first.params], loss, **options)
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        first.losses.clear()
        first.step(2), second.step(2)
        assert len(first.losses) == len(second.losses)
        assert relative(first.losses, second.losses) <= 1e-9


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_their_own_way(duplicate):
    start, loss = problem("chain")
    run = Run(LBFGS, start, loss, **DETERMINISTIC).step()
    optimizer = duplicate(run.optimizer)
    twin = Run(LBFGS, start, loss)
    twin.optimizer, twin.params = optimizer, optimizer.param_groups[0]["params"]
    run.losses.clear()
    run.step(), twin.step()
    assert run.losses == twin.losses
    run.step()
    assert not torch.equal(run.flat(), twin.flat())


def test_foreign_state_is_refused_and_changes_nothing():
    start, loss = problem("chain")
    run = Run(LBFGS, start, loss, history_size=3).step()
    before = run.optimizer.state_dict()
    adam = torch.optim.Adam(run.params).state_dict()
    with pytest.raises(ValueError, match="expected that of an L-BFGS"):
        run.optimizer.load_state_dict(adam)
    longer = Run(LBFGS, [torch.zeros(41, dtype=F64)], loss).step().optimizer.state_dict()
    with pytest.raises(ValueError, match="expected 'direction' of shape"):
        run.optimizer.load_state_dict(longer)
    after = run.optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert torch.equal(before["state"][0]["d"], after["state"][0]["d"])


# ------------------------------------------------------------------ parameters


def test_groups_names_and_mixed_dtypes():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model[0].to(torch.bfloat16)
    x, y = torch.randn(30, 4), torch.randn(30, 1)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = LBFGS(groups, line_search_fn="strong_wolfe")
    losses = []

    def closure():
        optimizer.zero_grad()
        hidden = torch.tanh(model[0](x.bfloat16())).float()
        loss = ((model[2](hidden) - y) ** 2).mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    assert min(losses) < 0.6 * losses[0]
    assert optimizer._history.direction.dtype == F32
    named = LBFGS(torch.nn.Linear(2, 2).named_parameters())
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]


def test_complex_parameters_count_as_two_reals():
    target = torch.tensor([1 + 2j, -3j, 0.5], dtype=torch.complex128)
    options = dict(line_search_fn="strong_wolfe", max_iter=8)
    weights = torch.tensor([1.0, 10.0, 100.0], dtype=F64)

    def of_complex(p):
        return (weights * (p[0] - target).abs() ** 2).sum()

    def of_reals(p):
        return (weights[:, None] * (p[0] - torch.view_as_real(target)) ** 2).sum()

    one = Run(LBFGS, [torch.zeros(3, dtype=torch.complex128)], of_complex, **options).step()
    two = Run(LBFGS, [torch.zeros(3, 2, dtype=F64)], of_reals, **options).step()
    assert one.losses == pytest.approx(two.losses, rel=1e-9, abs=1e-20)


def test_maximize_is_minimizing_the_negative():
    start, loss = problem("chain")
    for search in (None, "strong_wolfe", "armijo"):
        options = dict(line_search_fn=search, max_iter=6, lr=0.5)
        down = Run(LBFGS, start, loss, **options).step(2)
        up = Run(LBFGS, start, lambda p: -loss(p), maximize=True, **options).step(2)
        assert torch.equal(down.flat(), up.flat())


def test_missing_gradients_count_as_zero():
    start, loss = problem("chain")
    alone = Run(LBFGS, start, loss).step()
    joined = Run(LBFGS, [*start, torch.ones(3, dtype=F64)], loss).step()
    assert joined.losses == pytest.approx(alone.losses, rel=1e-12)
    assert torch.equal(joined.params[1].detach(), torch.ones(3, dtype=F64))


@pytest.mark.parametrize("fused", BACKENDS)
def test_parameters_that_share_memory_are_refused(fused):
    base = torch.zeros(12, dtype=F64)
    views = {
        "several elements of parameter 1, .* clone": [torch.zeros(2), torch.zeros(1).expand(4)],
        "several elements of parameter 0": [base.as_strided((3, 3), (2, 1))],
        "elements of parameters 0, 1 share places": [base[:6], base[5:]],
    }
    for message, params in views.items():
        optimizer = LBFGS([p.requires_grad_() for p in params], fused=fused)
        with pytest.raises(RuntimeError, match=f"params: {message}"):
            optimizer.step(lambda params=params: sum(p.sum() for p in params))


@pytest.mark.parametrize("fused", BACKENDS)
def test_views_that_lie_between_each_other_are_parameters(fused):
    base = torch.ones(6, 2, dtype=F64)
    start = [torch.ones(6, dtype=F64)] * 2
    loss = lambda p: (p[0] ** 2).sum() + ((p[1] - p[0]) ** 4).sum() + (p[1] ** 2).sum()  # noqa: E731
    apart = Run(LBFGS, start, loss, fused=fused).step()
    together = Run(LBFGS, start, loss)
    together.params = [base[:, 0].requires_grad_(), base[:, 1].requires_grad_()]
    together.optimizer = LBFGS(together.params, fused=fused)
    assert together.step().losses == apart.losses


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_given_twice_is_stepped_once():
    start, loss = problem("network")
    once, twice = Run(LBFGS, start, loss), Run(LBFGS, start, loss)
    twice.optimizer = LBFGS([*twice.params, twice.params[1]])
    assert twice.step().losses == once.step().losses


def test_history_grows_as_it_fills():
    start, loss = problem("rosenbrock of 20")
    run = Run(LBFGS, start, loss, history_size=1000, line_search_fn="strong_wolfe", max_iter=5)
    sizes = [run.step().optimizer.stats()["state_bytes"] for _ in range(8)]
    assert sizes[0] < 60 * 20 * 8 * 2
    assert sizes == sorted(sizes) and sizes[-1] > sizes[0]
    small = Run(LBFGS, start, loss, history_size=40, line_search_fn="strong_wolfe", max_iter=5)
    assert small.step(8).losses == run.losses


# ------------------------------------------------------------------ what goes wrong


def test_trial_that_is_not_finite_shortens_the_step():
    """The logarithm ends at zero; torch's goes there and never comes back."""
    start = [torch.full((4,), 0.01, dtype=F64)]

    def loss(p):
        return (p[0] - torch.log(p[0])).sum()

    for search in (None, "strong_wolfe", "armijo"):
        run = Run(LBFGS, start, loss, lr=50.0, line_search_fn=search, max_iter=40).step(3)
        assert any(x != x or abs(x) == torch.inf for x in run.losses), search
        assert torch.isfinite(run.flat()).all()
        if search is not None:
            assert loss(run.params).item() == pytest.approx(4.0, abs=0.05), search


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe", "armijo"])
def test_start_that_is_not_finite_changes_nothing(line_search_fn):
    start, loss = problem("chain")
    run = Run(LBFGS, start, loss, line_search_fn=line_search_fn).step()
    before, good = run.flat(), run.loss
    run.loss = lambda p: good(p) * torch.nan
    run.step()
    assert torch.equal(run.flat(), before)
    assert run.optimizer.stats()["stopped"] == "loss or gradient is not finite"
    run.loss = good
    run.losses.clear()
    assert run.step().losses[-1] < run.losses[0] + 1e-12


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe", "armijo"])
@pytest.mark.parametrize("when", [1, 2, 5])
def test_closure_that_raises_leaves_the_last_iterate(line_search_fn, when):
    start, loss = problem("rosenbrock of 20")
    options = dict(line_search_fn=line_search_fn, lr=1e-3 if line_search_fn is None else 1.0)
    run = Run(LBFGS, start, loss, **options).step()
    seen, calls = [], 0

    def closure():
        nonlocal calls
        calls += 1
        seen.append(run.flat())
        if calls == when:
            raise KeyboardInterrupt
        return run.closure()

    with pytest.raises(KeyboardInterrupt):
        run.optimizer.step(closure)
    assert any(torch.equal(run.flat(), x) for x in seen[: max(when - 1, 1)])
    run.losses.clear()
    run.step()
    assert run.losses[-1] <= run.losses[0]


def test_bad_closures_and_options_are_named():
    start, loss = problem("chain")
    run = Run(LBFGS, start, loss)
    before = run.flat()

    def graphless():
        run.optimizer.zero_grad()
        return loss(run.params).detach()

    def elsewhere():
        run.closure()
        return torch.zeros((), device="meta")

    def vector():
        return run.closure() * torch.ones(2)

    def nothing():
        run.closure()

    for closure, error, message in (
        (None, RuntimeError, "closure: expected a function"),
        (graphless, RuntimeError, "no parameter has a gradient"),
        (nothing, TypeError, "expected it to return the loss, got None"),
        (vector, ValueError, "expected a loss of one real number"),
        (elsewhere, ValueError, "the loss is on meta"),
    ):
        with pytest.raises(error, match=message):
            run.optimizer.step(closure)
        assert torch.equal(run.flat(), before)
    for options, message in (
        (dict(line_search_fn="wolfe"), "line_search_fn: expected one of"),
        (dict(history_size=-1), "history_size"),
        (dict(max_iter=0), "max_iter"),
        (dict(init="adagrad"), "init"),
        (dict(lr=-1.0), "lr"),
        (dict(lr=torch.ones(2)), "Tensor lr must be 1-element"),
    ):
        with pytest.raises(ValueError, match=message):
            LBFGS(run.params, **options)
    groups = [
        {"params": [p], "lr": 1.0 + i} for i, p in enumerate([Parameter(x) for x in 2 * start])
    ]
    with pytest.raises(ValueError, match="lr: a parameter group has"):
        LBFGS(groups)
    with pytest.raises(TypeError, match="expected floating-point"):
        LBFGS([torch.zeros(3, dtype=torch.int64)])
    run.step()
    run.optimizer.param_groups[0]["history_size"] = 7
    with pytest.raises(RuntimeError, match="history_size: was 100"):
        run.step()


# ------------------------------------------------------------------ what it costs


class Operations(TorchDispatchMode):
    """Names of the operations that are called, but for those of the loss."""

    def __init__(self):
        super().__init__()
        self.names, self.counting = [], True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.counting and not function.is_view and str(function) != "aten.detach.default":
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operations_of(line_search_fn, iterations, monkeypatch):
    """Operations of a step beside the closure, and how often the host reads, as on a GPU."""
    start, loss = problem("rosenbrock of 20")
    limits = dict(max_iter=iterations)
    if line_search_fn == "armijo":
        limits["max_eval"] = iterations
    run = Run(LBFGS, start, loss, line_search_fn=line_search_fn, lr=1e-2, **limits)
    run.step()
    reads, read = 0, Search._read

    def counted(self):
        nonlocal reads
        reads += 1
        return read(self)

    monkeypatch.setattr(Search, "_read", counted)
    run.losses.clear()

    def closure():
        mode.counting = False
        loss = run.closure()
        mode.counting = True
        return loss

    with Operations() as mode:
        run.optimizer.step(closure)
    return mode.names, reads, len(run.losses)


@needs_library
@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe", "armijo"])
def test_operations_and_reads_of_an_iteration(line_search_fn, monkeypatch, device_decides):
    with monkeypatch.context() as patch:
        short, _, few = operations_of(line_search_fn, 5, patch)
    long, reads, many = operations_of(line_search_fn, 15, monkeypatch)
    assert (len(long) - len(short)) / max(many - few, 10) <= 12
    assert reads == (0 if line_search_fn == "armijo" else many)
    synchronising = [name for name in long if "local_scalar" in name or "nonzero" in name]
    assert not synchronising


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe", "armijo"])
def test_one_read_per_evaluation_finds_the_same(line_search_fn, request):
    start, loss = problem("rosenbrock of 20")
    options = dict(line_search_fn=line_search_fn, lr=1e-3 if line_search_fn is None else 1.0)
    host = Run(LBFGS, start, loss, **options).step(3)
    request.getfixturevalue("device_decides")
    device = Run(LBFGS, start, loss, **options).step(3)
    assert torch.equal(host.flat(), device.flat())
    assert host.optimizer.stats() == device.optimizer.stats()


def test_evaluations_end_soon_after_the_search(device_decides):
    """Without a look, a call makes as many evaluations as there may be iterations; one that follows
    on the end looks at once."""
    start, loss = problem("logistic regression")
    options = dict(line_search_fn="armijo", tolerance_grad=1e-5, tolerance_change=0.0, max_iter=100)
    run = Run(LBFGS, start, loss, **options).step()
    assert len(run.losses) == 101
    stats = run.optimizer.stats()
    assert "tolerance_grad" in stats["stopped"] and stats["evaluations"] < 60
    run.step()
    assert len(run.losses) == 102
    assert run.returned.item() == loss(run.params).item() == min(run.losses)
    run.optimizer.param_groups[0]["tolerance_grad"] = 1e-9
    run.step()  # looks at once, and finds that there is more to do
    assert 104 < len(run.losses) < 160
    assert run.optimizer.stats()["evaluations"] == stats["evaluations"] + len(run.losses) - 101


@pytest.mark.parametrize("max_eval", [None, 7, 30])
def test_a_step_that_all_trials_pass_ends_with_its_iterations(max_eval, device_decides):
    start, loss = problem("chain")
    options = dict(line_search_fn="armijo", history_size=0, lr=1e-6, first_step=1.0)
    run = Run(LBFGS, start, loss, max_iter=7, max_eval=max_eval, **options).step()
    assert len(run.losses) == (7 if max_eval == 7 else 8)


@pytest.mark.parametrize("interval", [1, 4, 5, 9, 10, 25])
def test_factors_take_in_every_gradient_and_bases_keep_their_turns(interval, monkeypatch):
    from adaqn_cuda.reference.kronecker import iterations, takes_in

    start, loss = problem("network")
    run = Run(LBFGS, start, loss, fused=False, **{**DETERMINISTIC, "factor_interval": interval})
    calls, accumulate = [], reference.kronecker_accumulate
    place = list(inspect.signature(accumulate).parameters).index("call")

    def noted(*args):
        calls.append((run.optimizer._history.calls, args[place]))
        accumulate(*args)

    monkeypatch.setattr(ops._REFERENCE, "kronecker_accumulate", noted)
    run.step(3)
    assert len(calls) > 40
    for factor in range(2 * interval):
        assert interval > 9 or all(takes_in(call, factor) for _, call in calls)
        for number, call in calls:
            turns = iterations(number, factor, interval)
            assert iterations(call, factor, interval) == turns
