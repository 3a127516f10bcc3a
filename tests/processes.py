"""Processes that work on one problem together, each with some rows of the parameters."""

from __future__ import annotations

import torch
import torch.multiprocessing as mp
from torch import distributed as dist


def in_processes(count, function, folder, *arguments):
    """What ``function(*arguments)`` returns in each of ``count`` processes of one group."""
    mp.start_processes(
        _process, (count, function, str(folder), arguments), nprocs=count, start_method="spawn"
    )
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank, count, function, folder, arguments):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        torch.save(function(*arguments), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
