"""The demo's training runs: every model and optimizer, checkpoints, kills, pictures, messages."""

import dataclasses
import json
import math
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from adaqn_cuda.demo import cli
from adaqn_cuda.demo.data import load_corpus
from adaqn_cuda.demo.models import KINDS
from adaqn_cuda.demo.optimizers import NAMES, PRESETS
from adaqn_cuda.demo.train import PATIENCE, Config, Run
from adaqn_cuda.demo.verdict import failure

SMALL = dict(batch=4, bptt=8, hidden=12, steps=30, warmup=0, schedule="constant")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of a simple language."""
    chooser = random.Random(0)
    words = ["one", "two", "three", "four"]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(" ".join(chooser.choices(words, k=6)) for _ in range(400)))
    return str(file)


def arguments(text, *more, steps=30):
    small = f"--data {text} --steps {steps} --batch 4 --bptt 8 --hidden 12 --warmup 0"
    return [*small.split(), *map(str, more)]


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("level", ["char", "word"])
@pytest.mark.parametrize("preset", ["default", "pairs"])
def test_every_model_learns(text, model, level, preset):
    config = Config(model=model, level=level, preset=preset, data=text, **SMALL)
    run = Run(config, load_corpus(text, level))
    before = run.evaluate()
    result = run.train()
    assert result.valid < before - 0.15
    pairs = {"default": 0, "pairs": 2}[preset]  # the first update sets the anchor
    assert result.stats["stored"] + result.stats["skipped"] == pairs


METHODS = [("adaqn", preset) for preset in PRESETS]
METHODS += [(name, "default") for name in NAMES if name != "adaqn"]


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize(("optimizer", "preset"), METHODS)
def test_default_rates_train_every_model(text, model, optimizer, preset):
    config = Config(model=model, optimizer=optimizer, preset=preset, batch=4, bptt=8, hidden=32)
    run = Run(dataclasses.replace(config, data=text, steps=40), load_corpus(text, "char"))
    result = run.train()
    assert failure(result) is None
    assert 0 < result.optimizer_share < 1


@pytest.mark.parametrize("optimizer", ["adaqn", "sgd"])
def test_default_rates_keep_the_irnn_together(text, tmp_path, optimizer):
    """Over streams long enough for an unstable recurrence to blow up the state."""
    file = tmp_path / "long.txt"
    with open(text) as part:
        file.write_text(20 * part.read())
    config = Config(model="irnn", optimizer=optimizer, hidden=128, batch=4, bptt=16, steps=60)
    result = Run(config, load_corpus(str(file), "char")).train(evaluate_every=60)
    assert failure(result) is None


def test_monitor_is_held_fixed(text):
    run = Run(Config(data=text, monitor=3, preset="pairs", **SMALL), load_corpus(text, "char"))
    assert run.optimizer.monitor() == run.optimizer.monitor()
    run.train()
    assert math.isfinite(run.result.stats["monitored_loss"])


def test_schedules_warm_up_and_end_at_zero(text):
    corpus = load_corpus(text, "char")
    for schedule, last in (("constant", 1.0), ("linear", 1 / 30), ("cosine", 0.00274)):
        run = Run(Config(data=text, **{**SMALL, "schedule": schedule, "warmup": 10}), corpus)
        factors = []
        for run.step in range(30):
            factors.append(run._schedule())
        assert factors[0] == pytest.approx(0.1)
        assert factors[-1] == pytest.approx(last, rel=1e-2)


def test_numbers_that_no_longer_fit_are_named(text, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    more = ["--plot", tmp_path / "x.png", "--json", tmp_path / "x.json"]
    assert cli.main(["train", *arguments(text, *more, steps=10)]) == 1
    said = capsys.readouterr()
    assert "bits per character" in said.out
    assert "x.json: No space left on device" in said.err and "--json" in said.err


def test_warmup_is_a_share_of_the_steps_by_default():
    assert [Config(steps=n).warmup_steps for n in (1500, 3000)] == [75, 150]
    assert Config(steps=1500, warmup=7).warmup_steps == 7
    assert Config(steps=1500, warmup=0).warmup_steps == 0


def test_divergence_stops_the_run(text):
    run = Run(Config(data=text, **{**SMALL, "steps": 200}), load_corpus(text, "char"))
    run.model.output.bias.data.fill_(torch.nan)
    run.train()
    assert run.step == PATIENCE
    assert "--lr 0.0025" in failure(run.result)


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 300), ("adaqn", 30), ("adam", 30)])
def test_the_advice_after_divergence_helps(text, tmp_path, capsys, optimizer, rate):
    """The run fails with its numbers written, and the same run with the advised lr succeeds."""
    numbers = tmp_path / "x.json"
    command = ["train", *arguments(text, "--optimizer", optimizer, "--plot", tmp_path / "x.png")]
    assert cli.main([*command, "--lr", str(rate), "--json", str(numbers)]) == 1
    said = capsys.readouterr()
    assert "bits per character" in said.out and numbers.exists()
    assert (tmp_path / "x.png").exists()
    advised = re.search(r"try --lr (\S+)", said.err).group(1)
    assert cli.main([*command, "--lr", advised]) == 0


def test_too_few_steps_are_told_from_divergence(text, tmp_path, capsys):
    command = ["train", *arguments(text, "--plot", tmp_path / "x.png", "--lr", "1e-9")]
    assert cli.main(command) == 1
    assert "raise --steps above 30" in capsys.readouterr().err


def test_compare_fails_with_one_that_diverges_and_shows_all(text, tmp_path, capsys):
    numbers = tmp_path / "x.json"
    more = ["--optimizers", "sgd,adam", "--lr", "sgd=300", "--plot", tmp_path / "x.png"]
    assert cli.main(["compare", *arguments(text, *more, "--json", numbers)]) == 1
    said = capsys.readouterr()
    assert "sgd: diverged" in said.err and "try --lr sgd=1" in said.err
    assert "compare: adam:" not in said.err
    runs = json.loads(numbers.read_text())["runs"]
    assert [run["config"]["optimizer"] for run in runs] == ["sgd", "adam"]
    assert runs[1]["valid"] < math.log(runs[1]["vocabulary"])


def test_train_writes_numbers_and_picture(text, tmp_path, capsys):
    picture, numbers = tmp_path / "run.png", tmp_path / "run.json"
    assert cli.main(["train", *arguments(text, "--plot", picture, "--json", numbers)]) == 0
    assert "bits per character" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(numbers.read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert content["command"].startswith("adaqn train --data")
    (run,) = content["runs"]
    assert run["bits_per_character"] == pytest.approx(run["valid"] / math.log(2))
    assert [record["step"] for record in run["curve"]] == list(range(0, 31, 2))


def test_compare_shares_seed_and_data(text, tmp_path, capsys):
    picture, numbers = tmp_path / "compare.png", tmp_path / "compare.json"
    more = ["--optimizers", "adaqn,sgd", "--lr", "sgd=0.25", "--plot", picture, "--json", numbers]
    assert cli.main(["compare", *arguments(text, *more)]) == 0
    assert picture.exists()
    runs = json.loads(numbers.read_text())["runs"]
    assert [run["config"]["optimizer"] for run in runs] == ["adaqn", "sgd"]
    assert runs[0]["curve"][0]["valid"] == runs[1]["curve"][0]["valid"]
    assert runs[1]["config"]["lr"] == 0.25
    assert "sgd" in capsys.readouterr().out


def test_missing_matplotlib_still_prints_the_numbers(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["train", *arguments(text, "--plot", tmp_path / "x.png", steps=3)]) == 0
    captured = capsys.readouterr()
    assert "bits per character" in captured.out and "pip install" in captured.err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["train", "--steps", "0"], "--steps"),
        (["train", "--lr", "-1"], "--lr"),
        (["train", "--lr", "nan"], "--lr"),
        (["train", "--model", "transformer"], "--model"),
        (["train", "--data", "/no/such/file"], "--data"),
        (["train", "--device", "abacus"], "--device"),
        (["train", "--plot", "/no/such/folder/x.png"], "--plot"),
        (["train", "--save", "/"], "--save"),
        (["train", "--resume"], "--resume"),
        (["train", "--monitor", "4"], "--preset pairs"),
        (["train", "--fisher-size", "4"], "--preset pairs"),
        (
            ["train", "--preset", "pairs", "--history-size", "0", "--update-interval", "4"],
            "--history-size 0",
        ),
        (["train", "--preset", "pairs", "--monitor", "1000000"], "lower --monitor"),
        (["train", "--batch", "1000000"], "--batch"),
        (["train", "--bptt", "1000000"], "--bptt"),
        (["train", "--hidden", "2000000000"], "--hidden"),
        (["train", "--seed", str(10**30)], "--seed: expected a whole number from 0"),
        (["train", "--seed", "-1"], "--seed: expected a whole number from 0"),
        (["train", "--steps", "ten"], "--steps: expected a whole number from 1"),
        (["train", "--hidden", str(10**30)], "--hidden: expected a whole number from 1"),
        (["train", "--warmup", "1.5"], "--warmup: expected a whole number from 0"),
        (["train", "--lr", "0"], "--lr: expected a finite number > 0"),
        (["train", "--lr", "fast"], "--lr: expected a finite number > 0"),
        (["train", "--clip", "inf"], "--clip: expected a finite number >= 0"),
        (["train", "--vocab", "1", "--level", "word"], "--vocab: expected a whole number from 2"),
        (["train", "--vocab", "50"], "--level char"),
        (["train", "--save-every", "50"], "--save"),
        (["train", "--warmup", "60", "--steps", "50"], "--steps 50"),
        (["train", "--plot", "x.xyz"], "--plot: 'x.xyz'"),
        (["train", "--plot", "x"], "--plot: 'x'"),
        (["train", "--plot", "n" * 300 + ".png"], "--plot: cannot write"),
        (["train", "--json", "/no/such/folder/x"], "--json: cannot write"),
        (["train", "--plot", "x.png", "--json", "./x.png"], "--plot and --json"),
        (["compare", "--optimizers", "adaqn,magic"], "magic"),
        (["compare", "--optimizers", "adam,adam"], "twice"),
        (["compare", "--optimizers", "adam,sgd", "--preset", "paper"], "--optimizers adam,sgd"),
        (["compare", "--lr", "adam:3"], "--lr"),
        (["compare", "--lr", "magic=3"], "--lr"),
        (["compare", "--lr", "sgd=3"], "not among --optimizers adaqn,adam,rmsprop,adagrad"),
        (["compare", "--lr", "adam=1", "--lr", "adam=2"], "give one"),
        (["dance"], "dance"),
    ],
)
def test_bad_arguments_are_named(words, complaint, capsys, monkeypatch):
    refuses(words, complaint, capsys, monkeypatch)


ADAQN_WORDS = [
    "--preset default", "--monitor 4", "--history-size 3", "--fisher-size 3",
    "--update-interval 3", "--init adagrad", "--fused", "--no-fused",
]  # fmt: skip


@pytest.mark.parametrize("words", ADAQN_WORDS)
def test_options_of_adaqn_are_refused_with_others(words, capsys, monkeypatch):
    complaint = words.split()[0].replace("--no-", "--") + " is for adaqn only"
    command = ["train", "--optimizer", "adam", *words.split()]
    refuses(command, complaint, capsys, monkeypatch)


def refuses(words, complaint, capsys, monkeypatch):
    """Exit code 2 before the first step, with a message of the option and not of its parser."""
    monkeypatch.setattr(Run, "train", lambda *_, **__: pytest.fail("trained before refusing"))
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert "invalid" not in said or "invalid choice" in said


def test_files_in_the_way_are_named_before_training(text, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        for option in ("--plot", "--json", "--save"):
            refuses(["train", option, str(tmp_path / "x.png")], option, capsys, patch)
    refuses(["train", "--data", text, "--json", text], "--data and --json", capsys, monkeypatch)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_shows_every_default(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    options = re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    assert len(options) > 20
    for option in options:
        assert option.startswith("-h") or "default:" in option
        assert "None" not in option and "SUPPRESS" not in option


def test_without_a_command_it_prints_the_diagnosis(capsys):
    assert cli.main([]) == 0
    assert "Devices and backends" in capsys.readouterr().out


# --------------------------------------------------------------------------- checkpoints


def final_losses(tmp_path):
    (run,) = json.loads((tmp_path / "x.json").read_text())["runs"]
    return run["train"], run["valid"], [(r["step"], r["train"], r["valid"]) for r in run["curve"]]


def kill_after_next_checkpoint(command, file):
    """Start ``command`` and SIGKILL it at a random moment after it has written ``file``."""
    written = file.stat().st_mtime_ns if file.exists() else None
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            if file.exists() and file.stat().st_mtime_ns != written:
                break
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)


def test_killed_run_resumes_bit_for_bit(text, tmp_path):
    """SIGKILL at two random moments, then to the end: the losses of the uninterrupted run."""
    file = tmp_path / "run.pt"
    plain = ["--plot", tmp_path / "x.png", "--json", tmp_path / "x.json"]
    command = ["train", *arguments(text, *plain, "--monitor", 2, "--preset", "pairs", steps=400)]
    assert cli.main(command) == 0
    expected = final_losses(tmp_path)
    command += ["--save", str(file), "--save-every", "7", "--resume"]
    for _ in range(2):
        kill_after_next_checkpoint([sys.executable, "-m", "adaqn_cuda", *command], file)
    torch.load(file, weights_only=True)  # never a torn file
    assert cli.main(command) == 0
    assert final_losses(tmp_path) == expected


def test_resume_refuses_another_run(text, tmp_path, capsys):
    save = ["--save", tmp_path / "run.pt", "--plot", tmp_path / "x.png"]
    assert cli.main(["train", *arguments(text, *save, steps=3)]) == 0
    assert cli.main(["train", *arguments(text, *save, "--resume", "--seed", "5", steps=3)]) == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text("something else " * 400)
    assert cli.main(["train", *arguments(other, *save, "--resume", steps=3)]) == 2
    assert "other data" in capsys.readouterr().err
    assert cli.main(["train", *arguments(text, "--resume", tmp_path / "none.pt")]) == 2


def test_resume_without_a_checkpoint_starts_afresh(text, tmp_path, capsys):
    save = ["--save", tmp_path / "run.pt", "--plot", tmp_path / "x.png", "--resume"]
    assert cli.main(["train", *arguments(text, *save, steps=3)]) == 0
    assert "starting afresh" in capsys.readouterr().out
    assert cli.main(["train", *arguments(text, *save, steps=3)]) == 0
    assert "at step 3" in capsys.readouterr().out


def test_interrupt_says_how_to_go_on(text, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the middle of step 7 lets the step end, saves, and the run resumes to the bit."""
    plain = ["--plot", tmp_path / "x.png", "--json", tmp_path / "x.json"]
    assert cli.main(["train", *arguments(text, *plain)]) == 0
    expected = final_losses(tmp_path)
    whole_step = Run._step

    def interrupted_step(run):
        if run.step == 6:
            signal.raise_signal(signal.SIGINT)
        whole_step(run)

    save = ["--save", tmp_path / "run.pt", *plain]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", interrupted_step)
        assert cli.main(["train", *arguments(text, *save)]) == 130
        assert "--resume" in capsys.readouterr().err
    assert cli.main(["train", *arguments(text, *save, "--resume")]) == 0
    assert "at step 7" in capsys.readouterr().out
    assert final_losses(tmp_path) == expected


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_interrupted_compare_keeps_what_there_is(text, tmp_path, capsys, monkeypatch, method):
    """Ctrl-C in the middle of step 7 of either method: the table, the numbers and the picture."""
    whole_step = Run._step

    def interrupted_step(run):
        if run.step == 6 and run.config.optimizer == method:
            signal.raise_signal(signal.SIGINT)
        whole_step(run)

    monkeypatch.setattr(Run, "_step", interrupted_step)
    plain = ["--plot", tmp_path / "x.png", "--json", tmp_path / "x.json"]
    assert cli.main(["compare", *arguments(text, "--optimizers", "sgd,adam", *plain)]) == 130
    runs = json.loads((tmp_path / "x.json").read_text())["runs"]
    ends = {run["config"]["optimizer"]: run["curve"][-1]["step"] for run in runs}
    assert ends == ({"sgd": 7} if method == "sgd" else {"sgd": 30, "adam": 7})
    assert all(math.isfinite(run["valid"]) for run in runs)
    assert "after step 7 of 30" in capsys.readouterr().out
    assert (tmp_path / "x.png").exists()


def test_resuming_a_finished_run_changes_nothing(text, tmp_path):
    plain = ["--plot", tmp_path / "x.png", "--json", tmp_path / "x.json"]
    command = ["train", *arguments(text, "--save", tmp_path / "run.pt", "--resume", *plain)]
    assert cli.main(command) == 0
    expected = final_losses(tmp_path)
    assert cli.main(command) == 0
    assert final_losses(tmp_path) == expected


def test_what_is_no_checkpoint_is_named(text, tmp_path, capsys):
    garbage, alien, part = (tmp_path / name for name in ("garbage.pt", "alien.pt", "part.pt"))
    garbage.write_text("hi\n")
    torch.save({"weights": 1}, alien)
    torch.save({"fingerprint": "0" * 16}, part)
    for file in (garbage, alien, part):
        assert cli.main(["train", *arguments(text, "--resume", file)]) == 2
        assert file.name in capsys.readouterr().err
