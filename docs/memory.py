"""Bytes of optimizer state per parameter, from the shapes of well-known models.

    python docs/memory.py

writes the table into ``memory.md``.  Parameters lie on the meta device: nothing is allocated, and
nothing downloaded.  AdaQN tells its own bytes; those of Adam and SOAP follow from what they keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaqn_cuda import PAPER, AdaQN

PAGE = Path(__file__).with_name("memory.md")
BEGIN, END = "<!-- begin: docs/memory.py -->\n", "<!-- end -->"
#: Bytes of a number.
FLOAT = 4
#: The longest side for which SOAP keeps a factor, as published.
SOAP_SIDE = 10_000

Shapes = list[tuple[int, ...]]


def linear(rows: int, columns: int) -> Shapes:
    return [(rows, columns), (rows,)]


def gpt2_small() -> Shapes:
    d = 768
    block = [*linear(3 * d, d), *linear(d, d), *linear(4 * d, d), *linear(d, 4 * d), *4 * [(d,)]]
    return [(50257, d), (1024, d), *12 * block, (d,), (d,)]


def vit_b() -> Shapes:
    d = 768
    block = [*linear(3 * d, d), *linear(d, d), *linear(4 * d, d), *linear(d, 4 * d), *4 * [(d,)]]
    return [
        (1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,), *12 * block, (d,), (d,), *linear(1000, d)
    ]  # fmt: skip


def resnet50() -> Shapes:
    def convolution(out: int, into: int, side: int) -> Shapes:
        return [(out, into, side, side), (out,), (out,)]

    shapes, into = convolution(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, into, 1) + convolution(width, width, 3)
            shapes += convolution(4 * width, width, 1)
            shapes += convolution(4 * width, into, 1) if block == 0 else []
            into = 4 * width
    return shapes + linear(1000, into)


def llama_1b() -> Shapes:
    d, inner, keys = 2048, 8192, 512
    attention = [(d, d), (keys, d), (keys, d), (d, d)]
    block = [*attention, (inner, d), (inner, d), (d, inner), (d,), (d,)]
    return [(128256, d), *16 * block, (d,)]


def lstm() -> Shapes:
    d, words = 650, 10_000
    layer = [(4 * d, d), (4 * d, d), (4 * d,), (4 * d,)]
    return [(words, d), *2 * layer, *linear(words, d)]


MODELS = {
    "GPT-2 small": gpt2_small,
    "ViT-B/16": vit_b,
    "ResNet-50": resnet50,
    "Llama 3.2 1B": llama_1b,
    "LSTM, 2 x 650, 10,000 words": lstm,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "`block_size=64`": {"block_size": 64},
    '`init="rmsprop"`': {"init": "rmsprop"},
    "default, 10 pairs": {"history_size": 10},
    "`PAPER`": PAPER,
}


def meta(shapes: Shapes) -> list[Tensor]:
    return [torch.empty(shape, device="meta") for shape in shapes]


def adaqn_bytes(shapes: Shapes, options: dict[str, Any]) -> int:
    return int(AdaQN(meta(shapes), **options).stats()["state_bytes"])


def adam_bytes(shapes: Shapes) -> int:
    """Averages of the gradient and of its square."""
    return 2 * FLOAT * sum(torch.Size(shape).numel() for shape in shapes)


def soap_bytes(shapes: Shapes) -> int:
    """The same, and of every matrix (first dimension, rest) the factors and their bases."""
    sides = [side for shape in shapes for side in matrix(shape) if 1 < side <= SOAP_SIDE]
    return adam_bytes(shapes) + 2 * FLOAT * sum(side**2 for side in sides)


def matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], torch.Size(shape[1:]).numel()) if len(shape) > 1 else ()


def factored(shapes: Shapes) -> str:
    """Share of the parameters with factors on both sides, in the default."""
    [line] = [x for x in repr(AdaQN(meta(shapes))).splitlines() if x.startswith("Factors")]
    return line.removeprefix("Factors: on both sides of ").split(" of ")[0]


def lines() -> Iterator[str]:
    names = ["model", "parameters", "Adam", *SETTINGS, "SOAP", "with two factors"]
    yield "| " + " | ".join(names) + " |"
    yield "|---" * len(names) + "|"
    for name, model in MODELS.items():
        shapes = model()
        count = sum(torch.Size(shape).numel() for shape in shapes)
        own = [adaqn_bytes(shapes, options) for options in SETTINGS.values()]
        sizes = [adam_bytes(shapes), *own, soap_bytes(shapes)]
        cells = [f"{size / count:.1f}" for size in sizes]
        yield f"| {name} | {count:,} | {' | '.join(cells)} | {factored(shapes)} |"


def page() -> str:
    """The page with the table as it is now."""
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + "\n" + "\n".join(lines()) + "\n\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page())
