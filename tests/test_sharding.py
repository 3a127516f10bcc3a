"""Parameters that are spread over processes: refused where a step would be silently wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor

from adaqn_cuda import LBFGS, AdaQN


@pytest.fixture(autouse=True)
def one_process():
    """A process group of this process alone: what matters is what wrappers make of parameters."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def sharded_by_rows():
    model = nn.Linear(3, 4)
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    return model


def flat_shards():
    return FullyShardedDataParallel(nn.Linear(3, 4), device_id=torch.device("cpu"))


def flat_shards_under_old_names():
    return FullyShardedDataParallel(
        nn.Linear(3, 4), device_id=torch.device("cpu"), use_orig_params=True
    )


def sharded_by_columns():
    model = nn.Linear(3, 4, bias=False)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(1)]))
    return model


@pytest.mark.parametrize(
    "optimizer, make, word",
    [
        (AdaQN, sharded_by_columns, r"Shard\(dim=1\).*fully_shard"),
        (AdaQN, flat_shards, "FullyShardedDataParallel.*DistributedData"),
        (AdaQN, flat_shards_under_old_names, "FullyShardedDataParallel.*DistributedData"),
        (LBFGS, sharded_by_columns, r"Shard\(dim=1\).*fully_shard"),
        (LBFGS, flat_shards, "FullyShardedDataParallel.*DistributedData"),
    ],
)
def test_shards_are_refused(optimizer, make, word):
    model = make()
    with pytest.raises(RuntimeError, match=rf"params: parameter 0.*{word}"):
        optimizer(model.parameters())
    whole = optimizer(nn.Linear(2, 2).parameters())
    with pytest.raises(RuntimeError, match=word):
        whole.add_param_group({"params": list(model.parameters())})
    assert len(whole.param_groups) == 1


def test_parameters_are_divided_all_or_none():
    shards = list(sharded_by_rows().parameters())
    whole = list(nn.Linear(2, 2).parameters())
    with pytest.raises(RuntimeError, match="params: parameter 2.*otherwise than parameter 0"):
        AdaQN(shards + whole)
    optimizer = AdaQN(shards)
    with pytest.raises(RuntimeError, match="params: parameter 2.*otherwise than parameter 0"):
        optimizer.add_param_group({"params": whole})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(RuntimeError, match="state_sharding.*leave it out"):
        AdaQN(shards, state_sharding=torch.distributed.group.WORLD)


@pytest.mark.parametrize(
    "options, step, update",
    [
        ({}, [3], []),
        ({"init": "rmsprop"}, [3], []),
        ({"history_size": 3, "init": "rmsprop"}, [7, 5, 1], [17, 6]),
        ({"history_size": 3}, [7, 5, 1], [17, 6]),
        ({"history_size": 3, "max_direction": float("inf")}, [7, 5], [17, 6]),
        ({"history_size": 3, "curvature": "gradients"}, [7, 5, 1], [2, 6]),
    ],
)
def test_what_processes_tell_each_other(options, step, update, monkeypatch):
    """Numbers of float64 in each collective, whatever the size of the model."""
    model = sharded_by_rows()
    optimizer = AdaQN(model.parameters(), update_interval=2, **options)
    sent = []
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda words, group: sent.append(words.numel())
    )
    for expected in (step, step + update if options.get("history_size") else step) * 3:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert sent == expected
        sent.clear()


@pytest.mark.parametrize("options", [{"history_size": 3}, {"max_grad_norm": 1.0}])
def test_what_spans_all_parameters_is_refused_under_zero(options):
    params = nn.Linear(3, 4).parameters()
    with pytest.raises(RuntimeError, match="ZeroRedundancyOptimizer.*history_size=0"):
        ZeroRedundancyOptimizer(params, AdaQN, **options)


def test_lbfgs_is_refused_under_zero():
    with pytest.raises(RuntimeError, match="ZeroRedundancyOptimizer.*direction"):
        ZeroRedundancyOptimizer(nn.Linear(3, 4).parameters(), LBFGS)


def test_default_under_zero_is_that_without():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    twin = nn.Linear(3, 4)
    twin.load_state_dict(model.state_dict())
    ours = ZeroRedundancyOptimizer(model.parameters(), AdaQN, lr=0.1)
    alone = AdaQN(twin.parameters(), lr=0.1)
    for _ in range(5):
        x = torch.randn(8, 3)
        for net, optimizer in ((model, ours), (twin, alone)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("history_size", [0, 3])
def test_data_parallel_is_accepted(history_size):
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 4))
    optimizer = AdaQN(model.parameters(), history_size=history_size, update_interval=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
    assert optimizer.stats()["steps_skipped"] == 0
