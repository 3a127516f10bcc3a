"""docs/scaling.md: its tables are those of its script, and the script counts what happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from adaqn_cuda import AdaQN
from adaqn_cuda.distributed.sharding import Shards

DOCS = Path(__file__).parents[1] / "docs"
SHAPES = [(48, 20), (50,), (7, 9), (3,), (30, 2, 3)]


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import scaling

    return scaling


@pytest.fixture(params=[1, 3, 8])
def count(request):
    """The first of so many processes; the others are not there, and nothing is told."""
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def test_the_tables_are_those_of_the_script(scaling):
    assert scaling.PAGE.read_text() == scaling.page(), "run python docs/scaling.py"


def test_what_the_page_says_of_bytes_is_what_the_script_counts(scaling):
    pairs, text = scaling.OPTIONS["10 pairs"], " ".join(scaling.PAGE.read_text().split())
    sizes = [8 * sum(words) for words in (scaling.words({})[0], *scaling.words(pairs))]
    told = "one all-reduce of {} bytes in the default; with pairs three, of {} bytes together, and"
    assert told.format(*sizes) + f" at an update two of {sizes[2]}" in text
    vector = [(2**20,)]  # without factors
    each = [scaling.moved(vector, options) / 2**20 for options in ({}, pairs)]
    assert "{:.0f} bytes per parameter in the default, {:.0f} with 10 pairs".format(*each) in text


def test_the_model_has_as_many_parameters_as_is_known(scaling):
    assert scaling.numel(scaling.gemma_9b()) == 9_241_705_984


def with_divided_state(options):
    """An optimizer of whole parameters that have gradients."""
    params = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = AdaQN(params, state_sharding=dist.group.WORLD, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    return optimizer


@pytest.mark.parametrize("name", ["default", "10 pairs"])
def test_bytes_of_state_are_those_of_the_optimizer(name, count, scaling):
    options = scaling.OPTIONS[name]
    expected = with_divided_state(options).stats()["state_bytes"]
    assert scaling.state_bytes(SHAPES, count, options) == expected


@pytest.mark.parametrize("name", ["default", "10 pairs"])
def test_words_and_exchanged_bytes_are_those_of_a_step(name, count, scaling, monkeypatch):
    options = scaling.OPTIONS[name]
    sums, gathered = [], []
    monkeypatch.setattr(dist, "all_reduce", lambda words, group: sums.append(words.numel()))
    monkeypatch.setattr(
        dist, "all_gather", lambda found, sent, group: gathered.append(len(found) * sent.nbytes)
    )
    monkeypatch.setattr(Shards, "check_alike", lambda self, params, options: None)
    optimizer = with_divided_state(options)
    for _ in range(scaling.INTERVAL):
        optimizer.step()
    step, update = scaling.words(options)
    assert sums == step * scaling.INTERVAL + update
    assert len(sums) == pytest.approx(scaling.INTERVAL * scaling.sums(options))
    exchange = [scaling.exchanged(SHAPES, count)] if count > 1 else []
    assert gathered == exchange * scaling.INTERVAL
