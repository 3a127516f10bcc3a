"""How much of ordinary models has factors by default, and what their state takes."""

import pytest
import torch
from torch import nn

from adaqn_cuda import AdaQN, rnn_blocks


def gpt2_small():
    layer = [(768, 2304), (2304,), (768, 768), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *(layer + [(768,)] * 4) * 12, (768,), (768,)]


def vit_base():
    layer = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    ends = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,), (1000, 768), (1000,)]
    return [*ends, *(layer + [(768,)] * 4) * 12, (768,), (768,)]


def resnet_50():
    shapes, channels = [(64, 3, 7, 7), (64,), (64,)], 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(count):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(width,)] * 4 + [(4 * width,)] * 2
            shapes += [(4 * width, channels, 1, 1)] if index == 0 else []
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def llama_1b():
    attention = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048)]
    layer = [*attention, (8192, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,)]
    return [(128256, 2048), *layer * 16, (2048,)]


def lstm_2_650():
    with torch.device("meta"):
        layers = [nn.Embedding(10000, 650), nn.LSTM(650, 650, 2), nn.Linear(650, 10000)]
    return nn.ModuleList(layers)


MODELS = {f.__name__: f for f in (gpt2_small, vit_base, resnet_50, llama_1b, lstm_2_650)}


@pytest.mark.parametrize("name", MODELS)
def test_both_sides_of_nearly_every_matrix_have_factors(name):
    found = MODELS[name]()
    blocks = None
    if isinstance(found, nn.Module):
        params, blocks = list(found.parameters()), rnn_blocks(found)
    else:
        params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in found]
    optimizer = AdaQN(params, blocks=blocks)
    sides = optimizer._plan(optimizer.param_groups).sides
    matrices = [(p.numel(), n) for p, n in zip(params, sides, strict=True) if p.dim() > 1]
    both = sum(numel for numel, n in matrices if n == 2)
    assert both >= 0.99 * sum(numel for numel, _ in matrices)
    numel = sum(p.numel() for p in params)
    assert optimizer.stats()["state_bytes"] <= 12 * numel
