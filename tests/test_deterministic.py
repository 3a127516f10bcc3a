"""``bench/deterministic.py``: its problems, its methods and what its runs count."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
SMALL = {
    "burgers": dict(points=30, edge=5, weight=10.0, width=5, layers=2),
    "allen-cahn": dict(points=30, edge=8, weight=100.0, width=5, layers=2),
    "helmholtz": dict(points=30, edge=4, weight=100.0, width=5, layers=2, a=1, b=2, k=1.0),
    "poisson": dict(points=30, edge=4, weight=100.0, width=5, layers=2, a=1, b=2, k=0.0),
    "field": dict(side=8, waves=4, frequency=2.0, width=6, layers=2),
}


@pytest.fixture(scope="module", autouse=True)
def importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield
    for name in [n for n in sys.modules if n.split(".")[0] == "experiments"]:
        del sys.modules[name]


def small(name, steps=40):
    from experiments.exact.tasks import TASKS

    task = TASKS[name]
    return replace(task, options=SMALL.get(name, task.options), steps=steps)


def run(method, lr=1.0, task="poisson", steps=40, seed=1):
    from experiments.exact.methods import METHODS
    from experiments.exact.runs import execute
    from experiments.training import Run

    return execute(Run(small(task, steps), METHODS[method], lr, seed))


# ---------------------------------------------------------------------- derivatives


def test_a_jet_is_what_autograd_finds():
    from experiments.exact.jets import Network, coordinates

    network = Network([2, 6, 5, 1], seed=0)
    points = torch.rand(7, 2, dtype=torch.float64).requires_grad_()
    u = network(points)[:, 0]
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    second = [
        torch.autograd.grad(first[:, k].sum(), points, create_graph=True)[0][:, k] for k in (0, 1)
    ]
    found = network.jet(coordinates(points.detach(), 2)).features()
    torch.testing.assert_close(list(found), [u, *first.unbind(1), *second])


def test_gradients_of_a_jet_of_tanh():
    from experiments.exact.jets import JetOfTanh

    generator = torch.Generator().manual_seed(0)
    jet = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 2), (2, 3, 2), (1, 3, 2))
    ]
    assert torch.autograd.gradcheck(JetOfTanh.apply, jet)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_the_losses(name):
    problem = small(name).build(seed=0)
    names = [n for n, _ in problem.model.named_parameters()]

    def loss(*values):
        with torch.no_grad():
            for p, value in zip(problem.model.parameters(), values, strict=True):
                p.copy_(value)
        return problem.loss()

    start = [p.detach().clone() for p in problem.model.parameters()]
    loss(*start).backward()
    for number, (p, first) in enumerate(zip(problem.model.parameters(), start, strict=True)):
        step = torch.randn(first.shape, generator=torch.Generator().manual_seed(1)).double()
        ends = []
        for sign in (-1e-6, 1e-6):
            moved = [w + sign * step if i == number else w for i, w in enumerate(start)]
            ends.append(float(loss(*moved).detach()))
        slope = float((p.grad * step).sum())
        assert (ends[1] - ends[0]) / 2e-6 == pytest.approx(slope, rel=1e-5), names[number]


# ---------------------------------------------------------------------- solutions


def central(u, axis, h):
    return (u.roll(-1, axis) - u.roll(1, axis)) / (2 * h)


def second(u, axis, h):
    return (u.roll(-1, axis) - 2 * u + u.roll(1, axis)) / h**2


def test_burgers_solution_solves_the_equation_and_begins_right():
    from experiments.exact.equations import Burgers, burgers, grid, line

    h, inside = 1e-4, (slice(1, -1), slice(1, -1))
    for x0, t0 in ((-0.7, 0.2), (0.4, 0.5), (0.02, 0.9)):
        axes = (line(x0 - 2 * h, x0 + 2 * h, 5), line(t0 - 2 * h, t0 + 2 * h, 5))
        u = burgers(grid(*axes)).view(5, 5)
        terms = central(u, 1, h), u * central(u, 0, h), Burgers.viscosity * second(u, 0, h)
        left = (terms[0] + terms[1] - terms[2])[inside].abs().max()
        assert left < 1e-3 * max(1.0, *(term[inside].abs().max() for term in terms))
    start = grid(line(-1, 1, 9), torch.zeros(1).double())
    torch.testing.assert_close(burgers(start), -torch.sin(math.pi * start[:, 0]))
    middle = grid(line(-0.9, 0.9, 20), line(0.1, 1, 4))
    torch.testing.assert_close(burgers(middle, 200), burgers(middle, 300), rtol=0, atol=1e-6)


def test_allen_cahn_solution_does_not_depend_on_the_resolution():
    from experiments.exact.equations import AllenCahn, allen_cahn

    x, t, u = allen_cahn(modes=256, steps=200, times=4, every=2)
    finer = allen_cahn(modes=512, steps=400, times=4, every=4)
    torch.testing.assert_close((x, t), finer[:2])
    torch.testing.assert_close(u, finer[2], rtol=0, atol=1e-3)
    assert (u - finer[2]).norm() < 1e-4 * u.norm()
    assert u.abs().max() <= 1 + 1e-9 and AllenCahn.rate == 5.0


@pytest.mark.parametrize("k", [0.0, 2.0])
def test_the_right_side_of_helmholtz_belongs_to_its_solution(k):
    from experiments.exact.equations import Helmholtz

    problem = Helmholtz({**SMALL["helmholtz"], "k": k}, seed=0)
    points = problem.points.requires_grad_()
    u = problem.exact(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    twice = [torch.autograd.grad(first[:, i].sum(), points, create_graph=True)[0][:, i]
             for i in (0, 1)]  # fmt: skip
    assert problem.residual(u, *first.unbind(1), *twice).abs().max() < 1e-10
    assert problem.exact(problem.edges).abs().max() < 1e-14


def test_a_network_that_is_given_the_solution_has_no_error(monkeypatch):
    problem = small("helmholtz").build(seed=0)
    assert problem.error() > 0.5
    monkeypatch.setattr(problem, "value", problem.exact)
    assert problem.error() < 1e-15


def test_allen_cahn_networks_are_periodic():
    problem = small("allen-cahn").build(seed=0)
    ends = torch.tensor([[-1.0, 0.3], [1.0, 0.3]], dtype=torch.float64)
    values = problem.value(ends)
    assert float((values[0] - values[1]).detach()) == pytest.approx(0, abs=1e-14)


def test_newton_finds_the_best_classification():
    pytest.importorskip("sklearn")
    problem = small("classification").build(seed=0)
    with torch.no_grad():
        problem.model.weight.copy_(problem.solution)
    problem.loss().backward()
    assert problem.model.weight.grad.abs().max() < 1e-13
    assert problem.metric() <= 1e-15 and problem.error() == 0


def test_the_autoencoder_has_digits_that_it_is_not_fitted_to():
    pytest.importorskip("sklearn")
    problem = small("autoencoder").build(seed=0)
    assert len(problem.seen) == 1000 and len(problem.unseen) == 797
    assert problem.metric() < 1 and problem.error() < 2


# ---------------------------------------------------------------------- dense peers


@pytest.mark.parametrize("formula", ["bfgs", "ss-bfgs", "ss-broyden"])
def test_a_dense_method_minimizes_a_quadratic(formula):
    from experiments.peers import Dense

    scales = torch.logspace(0, 3, 12, dtype=torch.float64)
    w = torch.nn.Parameter(torch.ones(12, dtype=torch.float64))
    optimizer = Dense([w], formula=formula)

    def closure():
        w.grad = scales * w.detach()
        return 0.5 * (scales * w.detach().square()).sum()

    for _ in range(20):
        optimizer.step(closure)
    # The newest pair is honoured: H y = s.
    now, before = optimizer.now.gradient, w.detach().clone()
    optimizer.step(closure)
    s, y = w.detach() - before, optimizer.now.gradient - now
    torch.testing.assert_close(optimizer.inverse @ y, s, rtol=1e-6, atol=1e-12)
    for _ in range(130):
        if w.detach().abs().max() < 1e-6:
            return
        optimizer.step(closure)
    pytest.fail(f"{w.detach().abs().max()} is left")


def test_theta_of_zero_makes_bfgs_of_ss_broyden():
    """b = 1: the member of the family is the one whose inverse update is BFGS's, unscaled."""
    from experiments.peers.dense import ss_broyden

    phi, tau = ss_broyden(1.0, 1.5, 100)
    assert phi == pytest.approx(1.0) and tau == pytest.approx(1.0)
    phi, tau = ss_broyden(0.5, 3.0, 100)  # theta is positive here
    assert phi < 1 and 0 < tau <= 1


# ---------------------------------------------------------------------- runs


def names():
    sys.path.insert(0, str(BENCH))
    try:
        from experiments.exact.methods import METHODS

        return [(m.name, m.lr) for m in METHODS.values()]
    finally:
        sys.path.remove(str(BENCH))
        for name in [n for n in sys.modules if n.split(".")[0] == "experiments"]:
            del sys.modules[name]


@pytest.mark.parametrize(("method", "lr"), names())
def test_every_method_makes_the_loss_fall_within_its_budget(method, lr):
    result = run(method, 0.01 if lr is None else lr)
    assert result["evaluations"] <= 40 and result["loss"] < result["curve"][0][1]
    assert result["curve"][0][0] == 1 and result["curve"][-1][1] == result["loss"]
    assert math.isfinite(result["error"]) and result["stopped_at"] is None


def test_the_scalar_matrix_does_what_torch_does():
    ours, torchs = run("scalar, wolfe, 100 pairs", steps=25), run("lbfgs-100", steps=25)
    # The curvature test is another one, which no pair of these fails.
    losses = [[p[1] for p in result["curve"]] for result in (ours, torchs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_counts_is_the_best_point():
    from experiments.exact.runs import Meter, Spent

    problem = small("poisson").build(seed=0)
    meter = Meter(problem, budget=2)
    start = [p.detach().clone() for p in problem.model.parameters()]
    meter()
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(10.0)
    assert float(meter()) > meter.best == meter.first
    with pytest.raises(Spent):
        meter()
    meter.go_to_best()
    torch.testing.assert_close([p.detach() for p in problem.model.parameters()], start)


def test_a_search_that_is_stuck_ends(monkeypatch):
    from experiments.exact.runs import Meter, search

    problem = small("poisson").build(seed=0)
    meter = Meter(problem, budget=100)

    class Idle:
        def step(self, closure):
            closure()

    assert search(Idle(), meter, None) and meter.done <= 5


def test_a_report_says_who_is_ahead_and_what_is_missing(tmp_path):
    from experiments.exact import report, timing
    from experiments.exact.methods import METHODS
    from experiments.exact.tasks import TASKS
    from experiments.ledger import Ledger
    from experiments.protocol import Plain

    ledger, task = Ledger(tmp_path / "work.jsonl"), replace(TASKS["poisson"], steps=20)
    for name, loss in (("k-ss", 1e-3), ("lbfgs-100", 4e-3), ("adam", 1.0)):
        study = Plain(task, METHODS[name], None)
        while missing := study.missing(ledger):
            made = missing[0]
            last = loss * made.seed if made.seed else abs(math.log(made.lr / 0.01)) + 1
            ledger.add(
                {
                    "kind": "run", "definition": made.definition(None), "loss": last,
                    "error": 0.5, "stopped_at": None, "evaluations": 20, "state_bytes": 8,
                    "curve": [[1, 9.0, 0.1, 0.1], [20, last, 2.0, 2.0]], "stats": None,
                    "processor_seconds": 0.2, "seconds": 0.4,
                }
            )  # fmt: skip
    seeds = [r["definition"]["seed"] for r in ledger.runs()]
    assert seeds[:6] == [1, 2, 3, 1, 2, 3] and seeds[6:] == [0, 0, 0, 1, 2, 3]
    written = report.write(ledger, tmp_path / "results")
    assert [path.name for path in written] == [
        "deterministic.json", "deterministic.md", "deterministic-20.png",
    ]  # fmt: skip
    text = written[1].read_text()
    assert "`k-ss` is ahead; `lbfgs-100`, the best of the others, ends 4 times higher." in text
    assert "| **k-ss** | – | 1.0e-03 | 2.0e-03 | 3.0e-03 | 5.0e-01 | – | (10) |" in text
    assert "| adam | 0.01 | " in text and "Not finished: `lbfgs-10`" in text

    timing.measure([Plain(task, METHODS["k-ss"], None)], ledger)
    timing.measure([Plain(task, METHODS["k-ss"], None)], ledger)
    assert [r["evaluations"] for r in ledger.timings()] == [20]
    report.write(ledger, tmp_path / "results")
    row = next(x for x in written[1].read_text().splitlines() if "1.0e-03 | 2.0e-03" in x)
    assert row.endswith(" |") and not row.endswith(") |")


@pytest.mark.parametrize("name", ["physics-informed network", "picture", "logistic regression"])
def test_swapping_the_import_gives_the_same_losses(name):
    import drop_in

    from adaqn_cuda import LBFGS

    theirs = drop_in.run(torch.optim.LBFGS, name, max_iter=8)
    ours = drop_in.run(LBFGS, name, max_iter=8)
    assert len(ours.losses) == len(theirs.losses)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-8)
