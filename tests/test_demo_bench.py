"""``adaqn bench``: what it measures, how often, what it shows, messages."""

import json
import signal
import statistics

import pytest
import torch
from torch import nn

from adaqn_cuda.demo import bench, cli
from adaqn_cuda.demo.bench import MAKERS, Bench, Config, Row

SMALL = dict(sizes=((6, 4), (5,)), rounds=2)


def tiny():
    """A model of the user's."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[1].bias.requires_grad_(False)
    return model


def nothing():
    return nn.ReLU()


def number():
    return 3


def broken():
    raise OSError("no weights")


def test_all_have_their_turn_in_every_round():
    run, turns = Bench(Config(optimizers=tuple(MAKERS), **SMALL)), []
    run.on_step = lambda run: turns.append(run.step)
    rows = run.run()
    assert [row.name for row in rows] == list(MAKERS)
    assert turns == list(range(1, run.total + 1))
    for row in rows:
        assert len(row.rounds) == len(row.longest) == 2 and min(row.rounds) > 0
        assert row.steps % 10 == 0 and row.median <= row.worst * 1e3
    by_name = {row.name: row for row in rows}
    numel = 6 * 4 + 5
    assert by_name["sgd"].state == pytest.approx(4.0)
    assert by_name["adam"].state == pytest.approx(8 + 8 / numel)  # two counts of 4 bytes
    assert by_name["adaqn-pairs"].state > by_name["adaqn"].state > by_name["adaqn-rmsprop"].state


def test_a_round_is_a_whole_period():
    """Pair updates and refreshes are in it as often as in the long run."""
    params = [nn.Parameter(torch.ones(2))]
    for options, steps in (({}, 10), ({"factor_interval": 7}, 70), ({"history_size": 2}, 10)):
        optimizer = bench.AdaQN(params, **options)
        assert bench._period(optimizer) == steps
    assert bench._period(torch.optim.SGD(params)) == 10


def test_ratios_are_those_within_a_round():
    """Noise that comes and goes touches both of a round."""
    ours = Row("ours", 10, 4.0, [2.0, 20.0, 4.0])
    theirs = Row("theirs", 10, 4.0, [1.0, 10.0, 2.0])
    assert ours.ratio_to(theirs) == 2.0
    assert ours.median == statistics.median(ours.rounds) and ours.spread == (3.0, 12.0)


@pytest.mark.parametrize("model, shapes", [
    ("test_demo_bench:tiny", [(2, 3), (2,), (1, 2)]),
    ("lstm", [(128, 5), (20, 5), (20, 5), (20,), (20,), (128, 5), (128,)]),
])  # fmt: skip
def test_models(model, shapes):
    run = Bench(Config(model=model, hidden=5, optimizers=("adaqn", "adam"), rounds=1))
    assert sorted(run.shapes) == sorted(shapes)
    run.run()


def test_gates_have_factors_of_their_own():
    run = Bench(Config(model="lstm", hidden=5, optimizers=("adaqn",), rounds=1))
    ((_, optimizer),) = run._turns
    assert sorted(map(str, optimizer.param_groups[0]["blocks"])) == ["1"] * 5 + ["4"] * 2


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["bench", "--sizes", "6x4,5", "--rounds", "2", "--optimizers", "adaqn,adam,sgd"]
    assert cli.main([*command, "--json", "bench.json"]) == 0
    out = capsys.readouterr().out
    assert "29 parameters in 2 tensors of --sizes, float32, on cpu" in out
    assert "x adam" in out and "picture adaqn-bench.png" in out
    assert (tmp_path / "adaqn-bench.png").stat().st_size > 5000
    (run,) = json.loads((tmp_path / "bench.json").read_text())["runs"]
    assert [row["name"] for row in run["rows"]] == ["adaqn", "adam", "sgd"]
    assert run["parameters"] == 29 and run["rows"][1]["median"] > 0
    assert cli.main([*command, "--against", "sgd"]) == 0
    assert "x sgd" in capsys.readouterr().out


def test_ctrl_c_shows_what_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    measure = Bench._measure

    def interrupted(self, row, optimizer):
        measure(self, row, optimizer)
        if row.name == "adam":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bench, "_measure", interrupted)
    command = ["bench", "--sizes", "6x4", "--optimizers", "adaqn,adam,sgd"]
    assert cli.main(command) == 130
    out, err = capsys.readouterr()
    assert "\nadam " in out and "\nsgd " not in out and "bench: interrupted" in err


@pytest.mark.parametrize("arguments, message", [
    (["--sizes", "3x"], "expected shapes of whole numbers"),
    (["--sizes", "0x3"], "expected shapes of whole numbers"),
    (["--model", "nonsense"], "--model nonsense: expected one of lstm"),
    (["--model", "no_such_module:f"], "no_such_module:f: ModuleNotFoundError"),
    (["--model", "test_demo_bench:broken"], "broken: OSError: no weights"),
    (["--model", "test_demo_bench:nothing"], "no parameters to train"),
    (["--model", "test_demo_bench:number"], "expected it to return a module, got 3"),
    (["--optimizers", "adam,lion"], "'lion' is unknown; expected some of adaqn"),
    (["--optimizers", "adam", "--against", "sgd"], "--against sgd: it is not among"),
    (["--json", "a.png", "--plot", "a.png"], "both name a.png"),
])  # fmt: skip
def test_messages(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(["bench", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
