"""Parametrizations and masks: elements without a gradient, which a constraint needs to stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from adaqn_cuda import DETERMINISTIC, LBFGS, AdaQN, parametrized_groups

WIDE, TALL, SQUARE = (6, 12), (12, 6), (8, 8)
#: Orthogonal maps, and shapes on which what they keep beside the gradient decides.
ORTHOGONAL = {
    "default, wide": (WIDE, {}),
    "default, tall": (TALL, {}),
    "householder, square": (SQUARE, {"orthogonal_map": "householder"}),
    "cayley, tall": (TALL, {"orthogonal_map": "cayley"}),
    "default, square": (SQUARE, {}),
    "no trivialization, wide": (WIDE, {"use_trivialization": False}),
}


def layer(shape=WIDE) -> nn.Linear:
    torch.manual_seed(0)
    rows, columns = shape
    return nn.Linear(columns, rows).double()


def closure_of(module: nn.Module, optimizer: torch.optim.Optimizer):
    """Evaluates a regression on one batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, module.in_features, generator=generator, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = (module(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    return closure


def train(module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """The last loss over the first."""
    closure = closure_of(module, optimizer)
    losses = [optimizer.step(closure).item() for _ in range(60)]
    return losses[-1] / losses[0]


def deviation(weight: torch.Tensor) -> float:
    """How far rows, or columns, are from orthonormal."""
    w = weight if weight.shape[0] <= weight.shape[1] else weight.mT
    return (w @ w.mT - torch.eye(len(w), dtype=w.dtype)).abs().max().item()


@pytest.mark.parametrize("fused", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("case", ORTHOGONAL)
def test_orthogonal_weights_stay_orthogonal(case, fused):
    shape, options = ORTHOGONAL[case]
    module = layer(shape)
    parametrizations.orthogonal(module, **options)
    optimizer = AdaQN(parametrized_groups(module), lr=0.03, fused=fused)
    assert train(module, optimizer) < 1
    assert deviation(module.weight) < 1e-12


def test_without_groups_the_diagonal_behind_an_orthogonal_weight_moves():
    """What the groups are for; if this fails, they are not needed any more."""
    module = layer()
    parametrizations.orthogonal(module)
    train(module, AdaQN(module.parameters(), lr=0.03))
    assert deviation(module.weight) > 0.5


def test_lbfgs_takes_a_diagonal_for_all():
    module = layer()
    parametrizations.orthogonal(module)
    optimizer = LBFGS(module.parameters(), max_iter=20, **{**DETERMINISTIC, "init": "rmsprop"})
    closure = closure_of(module, optimizer)
    assert optimizer.step(closure) > closure()
    assert deviation(module.weight) < 1e-12


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_norms_keep_their_factors(norm):
    module = layer()
    norm(module)
    [group] = parametrized_groups(module)
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
    assert train(module, AdaQN([group], lr=0.03)) < 1


MASKS = {
    "elements": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "twice": lambda module: [prune.random_unstructured(module, "weight", 0.3) for _ in range(2)],
    "rows": lambda module: prune.ln_structured(module, "weight", 0.5, n=2, dim=0),
    "columns": lambda module: prune.ln_structured(module, "weight", 0.5, n=2, dim=1),
}


@pytest.mark.parametrize("mask", MASKS)
def test_what_is_pruned_stays(mask):
    module = layer(TALL)
    MASKS[mask](module)
    hidden, before = module.weight_mask == 0, module.weight_orig.detach().clone()
    optimizer = AdaQN(parametrized_groups(module), lr=0.03)
    assert train(module, optimizer) < 1
    assert torch.equal(module.weight_orig[hidden], before[hidden])
    assert not torch.equal(module.weight_orig, before)


@pytest.mark.parametrize("mask", MASKS)
def test_with_factors_a_mask_holds_all_the_same(mask):
    """In the forward pass, and for good; behind it only whole rows and columns stay."""
    module = layer(TALL)
    MASKS[mask](module)
    hidden, before = module.weight_mask == 0, module.weight_orig.detach().clone()
    train(module, AdaQN(parametrized_groups(module, pruned=False), lr=0.03))
    stays = mask in ("rows", "columns")
    assert torch.equal(module.weight_orig[hidden], before[hidden]) == stays
    prune.remove(module, "weight")
    assert not module.weight[hidden].any()


@pytest.mark.parametrize("fused", [True, False], ids=["native", "reference"])
def test_the_padding_of_an_embedding_stays(fused):
    torch.manual_seed(0)
    embedding = nn.Embedding(40, 12, padding_idx=3)
    optimizer = AdaQN(embedding.parameters(), lr=0.03, fused=fused)
    for _ in range(30):
        optimizer.zero_grad()
        (embedding(torch.randint(0, 40, (64,))) - 1).square().mean().backward()
        optimizer.step()
    assert not embedding.weight[3].any() and embedding.weight[4].any()


class Triangle(nn.Module):
    """A parametrization of the user's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu()


def test_groups_hold_every_parameter_once():
    model = nn.Sequential(layer(SQUARE), layer(SQUARE), nn.Linear(8, 8), nn.LayerNorm(8))
    parametrize.register_parametrization(model[0], "weight", Triangle())
    model[1].weight = model[2].weight
    prune.l1_unstructured(model[2], "bias", 0.5)
    plain, diagonal = parametrized_groups(model)
    assert diagonal["init"] == "rmsprop" and "init" not in plain
    own = {id(p) for p in diagonal["params"]}
    assert own == {id(model[0].parametrizations.weight.original), id(model[2].bias_orig)}
    both = [id(p) for p in plain["params"] + diagonal["params"]]
    assert sorted(both) == sorted(id(p) for p in model.parameters())
    assert len(parametrized_groups(nn.Linear(2, 2))) == 1
