"""Training by several processes, that goes on from its last checkpoint after a failure.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nproc-per-node 2 --max-restarts 3 examples/distributed.py --how fully_shard

What each process holds is up to ``--how``:

- ``replicas``: DistributedDataParallel; everything, and all take the same steps;
- ``divided_state``: the same, but some rows of the optimizer's state, for which it takes the step;
- ``fully_shard``: some rows of the parameters and of the state.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adaqn_cuda import AdaQN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = ("replicas", "divided_state", "fully_shard")
    parser.add_argument("--how", choices=ways, default="fully_shard")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", type=Path, default=Path("checkpoints"), metavar="FOLDER")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda" if on_gpu else "cpu")
    model = make_model(options.how, device)
    optimizer = make_optimizer(model, options.how)
    x, y = data(device)

    first = resume(model, optimizer, options.save)
    for step in range(first, options.steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if (step + 1) % options.save_every == 0:
            save(model, optimizer, options.save / str(step + 1))

    total = loss.detach().clone()
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(f"from step {first}, loss {total.item() / dist.get_world_size():.12f}")
        print(optimizer.stats())
    dist.destroy_process_group()


def make_model(how: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    model.append(nn.Linear(64, 1))
    model.to(device)
    if how != "fully_shard":
        return DistributedDataParallel(model)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def make_optimizer(model: nn.Module, how: str) -> AdaQN:
    group = dist.group.WORLD if how == "divided_state" else None
    return AdaQN(model.parameters(), lr=0.02, max_grad_norm=1.0, state_sharding=group)


def data(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The examples of this process."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    x = torch.randn(128, 16, generator=generator)
    return x.to(device), (x[:, :1] * x[:, 1:2]).to(device)


def save(model: nn.Module, optimizer: AdaQN, folder: Path) -> None:
    """Every process writes what it has."""
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)


def resume(model: nn.Module, optimizer: AdaQN, folder: Path) -> int:
    """Load the newest checkpoint that is complete; the steps that it has seen."""
    complete = [int(path.parent.name) for path in folder.glob("*/.metadata")]
    if not complete:
        return 0
    of_model, of_optimizer = get_state_dict(model, optimizer)
    states = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(states, checkpoint_id=folder / str(max(complete)))  # into what they hold
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    return max(complete)


if __name__ == "__main__":
    main()
