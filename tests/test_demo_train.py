"""The demo's training runs: every model and optimizer, checkpoints, kills, pictures, messages."""

import json
import math
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from adaqn_cuda.demo import cli
from adaqn_cuda.demo.data import load_corpus
from adaqn_cuda.demo.models import KINDS
from adaqn_cuda.demo.optimizers import NAMES
from adaqn_cuda.demo.train import Config, Diverged, Run

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


@pytest.mark.parametrize("optimizer", NAMES)
def test_every_optimizer_learns(text, optimizer):
    run = Run(Config(optimizer=optimizer, data=text, **SMALL), load_corpus(text, "char"))
    before = run.evaluate()
    result = run.train()
    assert result.valid < before - 0.1
    assert 0 < result.optimizer_share < 1


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


def test_divergence_stops_the_run(text):
    run = Run(Config(data=text, **{**SMALL, "steps": 200}), load_corpus(text, "char"))
    run.model.output.bias.data.fill_(torch.nan)
    with pytest.raises(Diverged, match="--lr"):
        run.train()


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
        (["train", "--optimizer", "adam", "--monitor", "4"], "--monitor"),
        (["train", "--monitor", "4"], "--preset pairs"),
        (["train", "--batch", "1000000"], "--batch"),
        (["compare", "--optimizers", "adaqn,magic"], "magic"),
        (["compare", "--lr", "adam:3"], "--lr"),
        (["compare", "--lr", "magic=3"], "--lr"),
        (["dance"], "dance"),
    ],
)
def test_bad_arguments_are_named(words, complaint, capsys):
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert complaint in capsys.readouterr().err


def test_without_a_command_it_prints_the_diagnosis(capsys):
    assert cli.main([]) == 0
    assert "Devices and backends" in capsys.readouterr().out


# --------------------------------------------------------------------------- checkpoints


def train_command(text, tmp_path, *more, steps):
    words = [sys.executable, "-m", "adaqn_cuda", "train"]
    words += arguments(text, "--plot", tmp_path / "x.png", "--json", tmp_path / "x.json", *more,
                       steps=steps)  # fmt: skip
    return words


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
    command = train_command(text, tmp_path, "--monitor", 2, "--preset", "pairs", steps=400)
    subprocess.run(command, check=True, timeout=120)
    expected = final_losses(tmp_path)
    command += ["--save", file, "--save-every", "7", "--resume"]
    for _ in range(2):
        kill_after_next_checkpoint(command, file)
    torch.load(file, weights_only=True)  # never a torn file
    subprocess.run(command, check=True, timeout=120)
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
        assert cli.main(["compare", *arguments(text, *plain)]) == 130
    assert cli.main(["train", *arguments(text, *save, "--resume")]) == 0
    assert "at step 7" in capsys.readouterr().out
    assert final_losses(tmp_path) == expected


def test_resuming_a_finished_run_changes_nothing(text, tmp_path):
    plain = ["--plot", tmp_path / "x.png", "--json", tmp_path / "x.json"]
    command = ["train", *arguments(text, "--save", tmp_path / "run.pt", "--resume", *plain)]
    assert cli.main(command) == 0
    expected = final_losses(tmp_path)
    assert cli.main(command) == 0
    assert final_losses(tmp_path) == expected


def test_what_is_no_checkpoint_is_named(text, tmp_path, capsys):
    garbage, alien = tmp_path / "garbage.pt", tmp_path / "alien.pt"
    garbage.write_text("hi\n")
    torch.save({"weights": 1}, alien)
    for file in (garbage, alien):
        assert cli.main(["train", *arguments(text, "--resume", file)]) == 2
        assert file.name in capsys.readouterr().err
