"""What a step holds, moves and sends on many GPUs, and a floor of its time.

    python docs/scaling.py

writes the tables into ``scaling.md``.  They are projections: bytes that the optimizer tells, over
rates that manufacturers publish.  Nothing in them was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import log2
from pathlib import Path
from typing import Any

import torch
from memory import FLOAT, Shapes, adaqn_bytes, gpt2_small

PAGE = Path(__file__).with_name("scaling.md")

GPUS, GPUS_OF_A_NODE = (8, 64, 1024), 8
#: Bytes per second: of a GPU's memory, of its NVLink in one direction, of its network adapter.
MEMORY = {"H100": 3.35e12, "H200": 4.8e12}
NVLINK, NETWORK = 450e9, 50e9
#: Seconds, as NCCL estimates them, to begin, and of a hop by NVLink and by the network: of a tree
#: with the protocol for the smallest messages, and of a ring with that for large ones.
TREE, RING = (6.8e-6, 0.6e-6, 5.0e-6), (8.4e-6, 3.4e-6, 14.0e-6)

PAIRS, FISHER, INTERVAL = 10, 16, 10
OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "10 pairs": {"history_size": PAIRS}}


def gemma_9b() -> Shapes:
    d, inner, queries, keys = 3584, 14336, 4096, 2048
    attention = [(queries, d), (keys, d), (keys, d), (d, queries)]
    block = [*attention, (inner, d), (inner, d), (d, inner), *4 * [(d,)]]
    return [(256_000, d), *42 * block, (d,)]


MODELS = {"GPT-2 small, 1.2e8": gpt2_small(), "Gemma 2 9B, 9.2e9": gemma_9b()}


# ------------------------------------------------------------------------------ bytes


def local(shapes: Shapes, shards: int) -> Shapes:
    """Those of the first shard, which has the most rows."""
    return [(-(-shape[0] // shards), *shape[1:]) for shape in shapes]


def numel(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def state_bytes(shapes: Shapes, shards: int, options: dict[str, Any]) -> int:
    """State of the first shard; a step of shards keeps its direction, with pairs or without."""
    own = local(shapes, shards)
    direction = 0 if options.get("history_size", 0) else FLOAT * numel(own)
    return told(own, options) + direction


def factor_bytes(shapes: Shapes) -> int:
    """Factors and their bases."""
    return told(shapes, {}) - told(shapes, {"init": "rmsprop"})


def told(shapes: Shapes, options: dict[str, Any]) -> int:
    """Bytes of state, by the optimizer itself, which is asked once."""
    return _told(tuple(shapes), tuple(options.items()))


@cache
def _told(shapes: tuple[tuple[int, ...], ...], options: tuple[tuple[str, Any], ...]) -> int:
    return adaqn_bytes(list(shapes), dict(options))


def moved(shapes: Shapes, options: dict[str, Any]) -> float:
    """What a step must read and write at least, by the notes on the CUDA kernels.

    Bases are read, and half of the factors is read and written: as much as they take together.
    """
    if not options:
        return 36 * numel(shapes) + factor_bytes(shapes)
    step = 4 * FLOAT * PAIRS + 40 + 8 + 8 + 8  # momentum, cap, v
    update = 8 * FISHER + 28 + FLOAT * (PAIRS + 2) + 4 + 8  # momentum, damping
    return (step + update / INTERVAL) * numel(shapes) + factor_bytes(shapes)


# ------------------------------------------------------------------------------ collectives


def words(options: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Numbers of float64 that are added up in a step, and beside them at a pair update."""
    if not options:
        return [3], []
    return [PAIRS + 4, PAIRS + 2, 1], [FISHER + 1, PAIRS + 3]


def sums(options: dict[str, Any]) -> float:
    """Collectives of a step, on average."""
    step, update = words(options)
    return len(step) + len(update) / INTERVAL


def nodes(gpus: int) -> int:
    return gpus // GPUS_OF_A_NODE


def tree(gpus: int) -> float:
    """Seconds of an all-reduce of a few words."""
    begin, nvlink, network = TREE
    return begin + 2 * ((GPUS_OF_A_NODE - 1) * nvlink + log2(nodes(gpus)) * network)


def ring(gpus: int) -> float:
    """Seconds of an all-gather, beside those for its bytes."""
    begin, nvlink, network = RING
    return begin + (gpus - nodes(gpus)) * nvlink + (nodes(gpus) - 1) * network


def gather(size: float, gpus: int) -> float:
    """Seconds for the bytes of an all-gather, or a reduce-scatter, of ``size`` bytes in all.

    All that a node lacks comes through its adapters; all that a GPU lacks, by NVLink.
    """
    by_network = size * (1 - 1 / nodes(gpus)) / (GPUS_OF_A_NODE * NETWORK)
    return max(by_network, size * (1 - 1 / gpus) / NVLINK)


def exchanged(shapes: Shapes, gpus: int) -> int:
    """Bytes that ``state_sharding`` gathers: as many of each process as the first has."""
    return FLOAT * gpus * numel(local(shapes, gpus))


# ------------------------------------------------------------------------------ tables


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2g}" if seconds < 1e-3 else f"{1e3 * seconds:.3g}"


def table(names: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(names) + " |"
    yield "|---" * len(names) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def memory() -> Iterator[str]:
    names = ["model", "GPUs", "replicas", "`state_sharding`", "`fully_shard`", "the same, 10 pairs"]
    rows = []
    for name, shapes in MODELS.items():
        whole = 2 * FLOAT * numel(shapes)
        for gpus in GPUS:
            own = 2 * FLOAT * numel(local(shapes, gpus))
            state, pairs = (state_bytes(shapes, gpus, options) for options in OPTIONS.values())
            sizes = [
                whole + told(shapes, {}),
                whole + state + exchanged(shapes, gpus) * (1 + 1 / gpus),
                own + state,
                own + pairs,
            ]
            rows.append([name, f"{gpus:,}", *map(gigabytes, sizes)])
    return table(names, rows)


def factors() -> Iterator[str]:
    names = ["model", "1 GPU", *(f"{gpus:,} GPUs" for gpus in GPUS)]
    rows = []
    for name, shapes in MODELS.items():
        parts = [local(shapes, gpus) for gpus in (1, *GPUS)]
        rows.append([name, *(f"{factor_bytes(own) / numel(own):.1f}" for own in parts)])
    return table(names, rows)


def steps() -> Iterator[str]:
    names = ["model", "GPUs", "mode", "GB moved", "H100", "H200", "words", "parameters"]
    names.append("in all, H100")
    rows = []
    for name, shapes in MODELS.items():
        for gpus in GPUS:
            own = local(shapes, gpus)
            exchange = gather(exchanged(shapes, gpus), gpus) + ring(gpus)
            modes = {
                "replicas": (moved(shapes, {}), 0.0, 0.0),
                "`state_sharding`": (moved(own, {}), sums({}) * tree(gpus), exchange),
                "`fully_shard`": (moved(own, {}), sums({}) * tree(gpus), 0.0),
                "the same, 10 pairs": (
                    moved(own, OPTIONS["10 pairs"]), sums(OPTIONS["10 pairs"]) * tree(gpus), 0.0,
                ),
            }  # fmt: skip
            for mode, (size, summed, sent) in modes.items():
                device = [size / rate for rate in MEMORY.values()]
                times = [*device, summed, sent, device[0] + summed + sent]
                cells = [milliseconds(t) if t else "" for t in times]
                rows.append([name, f"{gpus:,}", mode, gigabytes(size), *cells])
    return table(names, rows)


def training() -> Iterator[str]:
    names = ["model", "GPUs", "GB of parameters", "`DistributedDataParallel`", "`fully_shard`"]
    rows = []
    for name, shapes in MODELS.items():
        size = FLOAT * numel(shapes)
        for gpus in GPUS:
            once = gather(size, gpus)
            cells = [gigabytes(size), milliseconds(2 * once), milliseconds(3 * once)]
            rows.append([name, f"{gpus:,}", *cells])
    return table(names, rows)


def page() -> str:
    """The page with the tables as they are now."""
    text = PAGE.read_text()
    for make in (memory, factors, steps, training):
        begin, end = f"<!-- begin: {make.__name__} -->\n", "<!-- end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end, 1)
        text = before + begin + "\n" + "\n".join(make()) + "\n\n" + end + after
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
