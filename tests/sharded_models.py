"""What processes do with models of fully_shard: training, checkpoints, and mistakes."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as dcp
from sharded_cases import CASES, PAIRS, divided, together, with_divided_state
from sharded_lbfgs import (
    SEARCHES,
    failure_in_one_process,
    goes_on_from_one_process,
    of_a_complex_number,
    of_a_single_row,
    searches,
    searches_of_replicas,
)
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_map

from adaqn_cuda import LBFGS, AdaQN, check_replicas

F32, BF16 = torch.float32, torch.bfloat16

OPTIONS = {
    "default": {},
    "pairs": {**PAIRS, "init": "rmsprop"},
    "pairs on factors": PAIRS,
}


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, 12, 6, dtype=torch.float64, generator=generator)


def loss_of(model, x):
    return (model(x) - x.repeat(1, 2).sin()).square().mean()


def network():
    """Rows that two and three processes share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 12)).double()


def strips(params):
    """Row blocks that end where shards end, for any number that divides the rows evenly."""
    return {p: [2] * (len(p) // 2) for p in params}


def fit(model, optimizer, steps, rows=slice(None)):
    for x in steps:
        optimizer.zero_grad()
        loss_of(model, x[rows]).backward()
        optimizer.step()


def sharded_network(mesh):
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def own_batch():
    """The examples of this process."""
    share = 12 // dist.get_world_size()
    return slice(share * dist.get_rank(), share * (dist.get_rank() + 1))


def copied(state):
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state)


def values_of(model):
    return [p.full_tensor().detach().clone() for p in model.parameters()]


def trained_and_saved(folder):
    """Ten steps, a checkpoint, and ten more."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    outcomes = {}
    for name, options in OPTIONS.items():
        model = sharded_network(mesh)
        optimizer = AdaQN(model.parameters(), blocks=strips(model.parameters()), **options)
        steps = batches(20)
        fit(model, optimizer, steps[:10], own_batch())
        dcp.save(state_of(model, optimizer), checkpoint_id=f"{folder}/{name}")
        everything = StateDictOptions(full_state_dict=True)
        full = copied(get_optimizer_state_dict(model, optimizer, options=everything))
        fit(model, optimizer, steps[10:], own_batch())
        outcomes[name] = values_of(model), full
    return outcomes


def loaded_and_trained(folder):
    """The ten steps after the checkpoint."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    outcomes = {}
    for name, options in OPTIONS.items():
        model = sharded_network(mesh)
        optimizer = AdaQN(model.parameters(), blocks=strips(model.parameters()), **options)
        load(model, optimizer, f"{folder}/{name}")
        fit(model, optimizer, batches(20)[10:], own_batch())
        outcomes[name] = values_of(model)
    return outcomes


def state_of(model, optimizer):
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def load(model, optimizer, folder):
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


# --------------------------------------------------------------------------- all of it


def in_two(folder):
    """What two processes do, which save checkpoints."""
    return {
        "cases": together(list(CASES)),
        "states": with_divided_state(STATES),
        "replicas": replicas(),
        "saved": trained_and_saved(folder),
        "loaded": loaded_and_trained(folder),
        "meshes": on_meshes(),
        "mistakes": mistakes(),
        "searches": searches(SEARCHES),
        "searches of replicas": searches_of_replicas(("strong Wolfe", "deterministic")),
        "from one process": goes_on_from_one_process("strong Wolfe"),
        "single row": of_a_single_row(),
        "failure": failure_in_one_process(),
        "drift": drift(),
        "complex": of_a_complex_number({"state_sharding": dist.group.WORLD}),
        "model": search_of_a_model(),
    }


#: Cases of three processes.
OF_THREE = ("default", "pairs", "pairs on factors", "missing", "pairs, not finite")


def in_three(folder):
    """What three processes do with the checkpoints of two."""
    return {
        "cases": together(OF_THREE),
        "loaded": loaded_and_trained(folder),
        "searches": searches(("strong Wolfe", "deterministic")),
    }


def search_of_a_model():
    """LBFGS on a model of fully_shard, and what goes on from its state by FQN."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    x = batches(1)[0]

    def step(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, x[own_batch()])
            loss.backward()
            return loss

        optimizer.step(closure)

    model = sharded_network(mesh)
    optimizer = LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=5)
    step(model, optimizer)
    state = copied(get_optimizer_state_dict(model, optimizer))
    other = sharded_network(mesh)
    other.load_state_dict(copied(model.state_dict()))
    step(model, optimizer)
    fresh = LBFGS(other.parameters(), line_search_fn="strong_wolfe", max_iter=5)
    set_optimizer_state_dict(other, fresh, state)
    step(other, fresh)
    return values_of(model), values_of(other)


# --------------------------------------------------------------------------- whole parameters

#: Cases in which the state alone is divided.
STATES = ("default", "pairs", "pairs, groups", "of the paper", "missing", "not finite")


def replicas():
    """DistributedDataParallel with a divided state: values after some steps, saved and loaded."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 12)).double()
    net.register_parameter("scale", nn.Parameter(torch.ones((), dtype=torch.float64)))
    net.register_parameter("phase", nn.Parameter(torch.ones(3, dtype=torch.complex128)))
    model = nn.parallel.DistributedDataParallel(net)
    options = dict(state_sharding=dist.group.WORLD, **PAIRS)
    optimizer = AdaQN(model.parameters(), **options)

    def steps(optimizer):
        for x in batches(6):
            optimizer.zero_grad()
            out = model(x[own_batch()]) * net.scale + net.phase.sum().abs()
            (out - 1).square().mean().backward()
            optimizer.step()

    steps(optimizer)
    before, state = [p.detach().clone() for p in model.parameters()], copied(optimizer.state_dict())
    steps(optimizer)
    after = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, value in zip(model.parameters(), before, strict=True):
            p.copy_(value)
    other = AdaQN(model.parameters(), **options)
    other.load_state_dict(state)
    steps(other)
    again = [p.detach().clone() for p in model.parameters()]
    return after, again, optimizer.stats()["state_bytes"]


def drift():
    """What is said of equal replicas, and of such that differ in two last places."""
    params = [nn.Parameter(torch.ones(300, 1000, dtype=dtype)) for dtype in (F32, BF16)]
    optimizer = AdaQN(params, history_size=2, update_interval=1)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    said = [message_of(lambda: check_replicas(optimizer))]
    last_place = dist.get_rank()
    optimizer.state[params[1]]["s_ring"].view(torch.int32)[0, :4, 7] += (
        torch.tensor([1, -1, -1, 1]) * last_place
    )
    said.append(message_of(lambda: check_replicas(optimizer)))
    params[0].data.view(torch.int32)[299, 996:] += torch.tensor([1, -1, -1, 1]) * last_place
    said.append(message_of(lambda: check_replicas(optimizer)))
    other = torch.optim.SGD(params[: 1 + dist.get_rank()])
    return [*said, message_of(lambda: check_replicas(other))]


# --------------------------------------------------------------------------- meshes


def on_meshes():
    """Replicas of shards: all there are of either, and the other way about."""
    outcomes = {}
    for shape in ((1, 2), (2, 1)):
        mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
        model = network()
        fully_shard(model, mesh=mesh)
        optimizer = AdaQN(model.parameters(), **PAIRS, init="rmsprop")
        kept = torch.tensor(float(dist.get_rank()), dtype=torch.float64)
        optimizer.monitor = lambda kept=kept: kept
        fit(model, optimizer, batches(12), own_batch())
        assert kept == dist.get_rank()
        outcomes[shape] = values_of(model), optimizer.stats()["monitored_loss"]
    return outcomes


# --------------------------------------------------------------------------- mistakes


def message_of(function):
    try:
        function()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def mistakes():
    """What is said in every process; no process waits for another."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()

    def step(values, **options):
        params = [nn.Parameter(divided(v, mesh)) for v in values]
        optimizer = AdaQN(params, **options)
        for p, v in zip(params, values, strict=True):
            p.grad = divided(v, mesh)
        optimizer.step()

    ones = torch.ones(4, 3)
    return {
        "shapes": message_of(lambda: step([torch.ones(4, 3 + rank)])),
        "number": message_of(lambda: step([ones] * (1 + rank))),
        "dtypes": message_of(lambda: step([ones.to([torch.float32, torch.float64][rank])])),
        "options": message_of(lambda: step([ones], history_size=rank)),
        "closures": message_of(
            lambda: step([ones], history_size=1, curvature="difference", curvature_closure=id)
        ),
    }
