"""``adaqn fit``: the equations, both optimizers on the same evaluations, pictures, messages."""

import json
import re
import signal

import pytest
import torch

from adaqn_cuda.demo import cli
from adaqn_cuda.demo.equations import EQUATIONS, Collocation, Network
from adaqn_cuda.demo.fit import METHODS, Config, Fit

SMALL = dict(points=60, evaluations=40)


def laplacian_of(function, points):
    """By differentiating twice."""
    points = points.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(function(points).sum(), points, create_graph=True)
    seconds = [torch.autograd.grad(s.sum(), points, retain_graph=True)[0] for s in slopes.unbind(1)]
    return seconds[0][:, 0] + seconds[1][:, 1]


@pytest.fixture
def task():
    equation, device = EQUATIONS["helmholtz"], torch.device("cpu")
    return Collocation(equation, 200, torch.Generator().manual_seed(0), device)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_exact_solution_leaves_no_residual(name, task):
    equation, inside = EQUATIONS[name], task.inside
    laplacian = laplacian_of(equation.exact, inside)
    residual = equation.residual(inside, equation.exact(inside), laplacian)
    assert residual.abs().max() < 1e-11 * equation.forcing(inside).abs().max()
    assert equation.exact(task.boundary).abs().max() < 1e-14


def test_the_network_carries_its_laplacian(task):
    torch.manual_seed(0)
    network = Network()
    for p in network.parameters():
        torch.nn.init.normal_(p)
    values, laplacian = network.with_laplacian(task.inside)
    torch.testing.assert_close(values, network(task.inside))
    torch.testing.assert_close(laplacian, laplacian_of(network, task.inside))


def test_points_lie_in_the_square_and_on_its_sides(task):
    assert task.inside.shape == (200, 2) and task.inside.abs().max() <= 1
    x, y = task.boundary.T
    for side in (x == -1, x == 1, y == -1, y == 1):
        assert side.sum() == 10


@pytest.mark.parametrize("problem", EQUATIONS)
@pytest.mark.parametrize("optimizer", METHODS)
def test_every_evaluation_counts_and_the_loss_falls(problem, optimizer):
    run = Fit(Config(problem=problem, optimizer=optimizer, **SMALL))
    losses = []
    run.on_step = lambda run: losses.append(run.task.loss(run.network).item())
    result = run.run()
    assert len(losses) == result.evaluations == 40
    assert result.loss == pytest.approx(min(losses)) and result.loss < 0.95 * losses[0]
    assert run.task.loss(run.network).item() == pytest.approx(result.loss)
    assert result.relative_error == run.task.relative_error(run.network) > 0
    assert [record["evaluation"] for record in result.curve] == list(range(1, 41))


def test_the_start_depends_on_the_seed_only():
    first, second = (Fit(Config(optimizer=name, **SMALL)) for name in METHODS)
    other = Fit(Config(seed=1, **SMALL))
    assert first.task.loss(first.network) == second.task.loss(second.network)
    assert first.task.loss(first.network) != other.task.loss(other.network)


def test_the_solution_is_found():
    config = Config(problem="poisson", points=200, evaluations=400)
    assert Fit(config).run().relative_error < 0.5


def test_a_run_ends_where_no_lower_loss_is_found(monkeypatch):
    run = Fit(Config(**SMALL))
    monkeypatch.setattr(run.optimizer, "step", lambda closure: closure())
    assert run.run().evaluations == 2


def fit(tmp_path, *more):
    files = ["--plot", tmp_path / "x.png", "--json", tmp_path / "x.json"]
    words = ["fit", "--points", 60, "--evaluations", 20, *files, *more]
    return cli.main([str(word) for word in words])


def test_numbers_and_picture_are_written(tmp_path, capsys):
    assert fit(tmp_path) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert content["command"].startswith("adaqn fit --points 60")
    ours, torchs = content["runs"]
    assert [run["config"]["optimizer"] for run in (ours, torchs)] == ["adaqn_cuda", "torch"]
    assert ours["evaluations"] == torchs["evaluations"] == 20
    assert ours["curve"][0]["loss"] == pytest.approx(torchs["curve"][0]["loss"])
    assert ours["stats"]["evaluations"] <= 21
    said = capsys.readouterr().out
    assert "adaqn_cuda.LBFGS" in said and "torch.optim.LBFGS" in said


def test_it_runs_alone(tmp_path, capsys):
    assert fit(tmp_path, "--against", "none") == 0
    assert "torch.optim.LBFGS" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "x.json").read_text())["runs"]) == 1


@pytest.mark.parametrize("optimizer", METHODS)
def test_interrupted_it_shows_what_there_is(tmp_path, capsys, monkeypatch, optimizer):
    whole = Collocation.loss
    count = iter(range(1000))
    last = {"adaqn_cuda": 6, "torch": 26}[optimizer]

    def interrupted(task, network):
        if next(count) == last:
            signal.raise_signal(signal.SIGINT)
        return whole(task, network)

    monkeypatch.setattr(Collocation, "loss", interrupted)
    assert fit(tmp_path) == 130
    said = capsys.readouterr()
    assert "after evaluation 7 of 20" in said.out and "interrupted" in said.err
    runs = json.loads((tmp_path / "x.json").read_text())["runs"]
    evaluations = {run["config"]["optimizer"]: run["evaluations"] for run in runs}
    alone = optimizer == "adaqn_cuda"
    assert evaluations == ({"adaqn_cuda": 7} if alone else {"adaqn_cuda": 20, "torch": 7})
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--problem heat", "--problem: invalid choice"),
        ("--evaluations 0", "--evaluations: expected a whole number from 1"),
        ("--points 0", "--points: expected a whole number from 1 to 1000000"),
        ("--points 2000000", "--points: expected a whole number from 1 to 1000000"),
        ("--against adam", "--against: invalid choice"),
        ("--seed -1", "--seed: expected a whole number from 0"),
        ("--device abacus", "--device"),
        ("--plot x.xyz", "--plot: 'x.xyz'"),
        ("--json /no/such/folder/x", "--json: cannot write"),
        ("--plot x.png --json ./x.png", "--plot and --json"),
    ],
)
def test_bad_arguments_are_named(words, complaint, capsys, monkeypatch):
    monkeypatch.setattr(Fit, "run", lambda _: pytest.fail("ran before refusing"))
    try:
        code = cli.main(["fit", *words.split()])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert complaint in capsys.readouterr().err


def test_a_device_without_float64_is_named(monkeypatch):
    def refuse(*_):
        raise TypeError("no float64")

    monkeypatch.setattr(Network, "to", refuse)
    with pytest.raises(cli.DataError, match="--device cpu"):
        Fit(Config(**SMALL))


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    options = re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    assert len(options) == 9
    assert all(option.startswith("-h") or "default:" in option for option in options)
