"""The demo's training by several processes: the run of one, divided."""

from __future__ import annotations

import random
import socket
from contextlib import nullcontext

import pytest
import torch
from demo_processes import MODES, in_two, small, train
from processes import in_processes
from sharded_cases import rows_of
from torch import distributed as dist

from adaqn_cuda import rnn_blocks
from adaqn_cuda.demo import cli, divided, optimizers
from adaqn_cuda.demo.data import DataError
from adaqn_cuda.demo.interrupt import Interrupted, held_interrupts
from adaqn_cuda.demo.models import RecurrentLM
from adaqn_cuda.demo.processes import Alone, joined, own_device

ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


# --------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Of 13 symbols, the unknown one among them, whose rows two processes share unevenly."""
    chooser, file = random.Random(0), tmp_path_factory.mktemp("text") / "text.txt"
    words = ["one", "two", "three", "four"]
    file.write_text("!\n".join(" ".join(chooser.choices(words, k=6)) for _ in range(200)))
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes leave their checkpoints."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def both(text, folder, tmp_path_factory):
    return in_processes(2, in_two, tmp_path_factory.mktemp("two"), text, str(folder))


@pytest.fixture
def as_they_do(monkeypatch):
    """In float64."""
    for name in ("write", "draw"):  # which train() replaces
        monkeypatch.setattr(cli, name, getattr(cli, name))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def blocks_of_halves(model):
    """Matrices that end where the rows of the first process do; between gates they do anyway."""
    return {**{p: rows_of(len(p), 2) for p in model.parameters()}, **rnn_blocks(model)}


def close_to(losses):
    return pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_processes_train_as_one_does(mode, both, text, as_they_do, monkeypatch):
    if mode != "replicas":
        monkeypatch.setattr(optimizers, "rnn_blocks", blocks_of_halves)
    alone, first = train(*small(text)), both[0][mode]["whole"]
    assert first.losses() == close_to(alone.losses())
    assert first.results[0].processes == 2 and "in 2 processes" in first.out


@pytest.mark.parametrize("mode", MODES)
def test_the_first_process_alone_shows_and_writes(mode, both):
    first, second = both[0][mode]["whole"], both[1][mode]["whole"]
    assert (first.code, len(first.results), first.plots) == (0, 1, 1)
    assert "bits per character" in first.out
    assert (second.code, second.out, second.results, second.plots) == (0, "", [], 0)


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupt_of_one_process_ends_all_after_the_same_step(mode, both):
    """And they go on from the checkpoint, to the bit."""
    first, second = both[0][mode], both[1][mode]
    assert first["interrupted"].code == second["interrupted"].code == 130
    assert "at step 3\nsaved" in first["interrupted"].err and second["interrupted"].err == ""
    assert "at step 3\n" in first["resumed"].out
    assert first["resumed"].losses() == first["whole"].losses()
    assert first["resumed"].results[0].stats == first["whole"].results[0].stats


def test_one_process_goes_on_from_a_checkpoint_of_replicas(both, text, folder, as_they_do):
    alone = train(*small(text), "--resume", folder / "replicas-interrupted.pt")
    assert alone.losses() == close_to(both[0]["replicas"]["whole"].losses())


@pytest.mark.parametrize("mode", ["state", "rows"])
def test_divided_checkpoints_are_for_as_many_processes(mode, both, folder):
    content = torch.load(folder / f"{mode}-interrupted.pt", weights_only=True)
    with pytest.raises(DataError, match="is of 2 processes, and there are 1; start as many"):
        divided.own_parts(content["optimizer"], RecurrentLM("tanh", 3, 4, 1), Alone())


# --------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--fsdp --shard-state", "leave --shard-state out"),
        ("--fsdp --optimizer lbfgs", "leave --fsdp out"),
        ("--batch 33", "--batch 33 cannot be divided evenly among 2 processes"),
        ("--device cuda:0", "--device cuda:0: under torchrun expected cpu or cuda"),
        ("--shard-state --optimizer adam", "--shard-state is for adaqn only"),
    ],
)
def test_what_processes_cannot_do_is_refused(words, complaint, monkeypatch, capsys):
    launch(monkeypatch, WORLD_SIZE=2)
    monkeypatch.setattr("adaqn_cuda.demo.arguments.own_device", lambda name: "cpu")
    assert cli.main(["train", *words.split()]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--fsdp", "--shard-state"])
def test_there_must_be_processes_to_divide_among(option, capsys):
    assert cli.main(["train", option]) == 2
    assert f"{option} is for several processes; start them by torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "fit", "bench"])
def test_commands_of_one_process_are_refused(command, monkeypatch, capsys):
    launch(monkeypatch, RANK=1, WORLD_SIZE=2)
    assert cli.main([command]) == 2
    assert f"adaqn {command} (process 1): WORLD_SIZE=2" in capsys.readouterr().err


def test_a_validation_text_has_a_stream_for_every_process(text, monkeypatch, capsys):
    class Many(Alone):
        count = 32

    monkeypatch.setattr(cli, "joined", lambda device: nullcontext(Many()))
    assert cli.main(["train", "--data", text, "--bptt", "8"]) == 2
    assert "too few for 32 processes; lower --bptt" in capsys.readouterr().err


def test_processes_that_differ_are_told_apart():
    class Two(Alone):
        def every(self, value):
            return [value, {**value, "--hidden": 4}]

    Two().check_alike({"--hidden": 4})
    with pytest.raises(DataError, match="process 1 has --hidden 4, and process 0 None"):
        Two().check_alike({"step": 3})


# --------------------------------------------------------------------------- joining


def launch(monkeypatch, **variables):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, **variables}.items():
        monkeypatch.setenv(name, str(value))


def test_a_group_is_joined_for_as_long_as_it_is_needed(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with joined("cpu") as processes:
        assert dist.is_initialized() and processes.group is dist.group.WORLD
        assert processes.any(True) and not processes.any(False)
    assert not dist.is_initialized()


def test_half_an_environment_is_explained(monkeypatch, text, capsys):
    launch(monkeypatch)
    assert cli.main(["train", "--data", text]) == 2
    said = capsys.readouterr().err
    assert "MASTER_ADDR" in said and "start with torchrun, or unset both" in said


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    assert own_device("cuda") == "cuda"
    launch(monkeypatch, RANK=11, LOCAL_RANK=3, WORLD_SIZE=16)
    assert [own_device(name) for name in ("cuda", "cpu")] == ["cuda:3", "cpu"]


def test_interrupts_are_agreed_upon():
    """Also where this process has seen none."""
    with held_interrupts(lambda pending: True) as check, pytest.raises(Interrupted):
        check()
