"""State dicts hold plain values, and go through files that hold tensors and text alone."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from typing import Any

import pytest
import torch
from optimizer_inputs import INPUTS
from problems import every_device, random_parameters, set_gradients

from adaqn_cuda import LBFGS, AdaQN, flatten_state_dict, unflatten_state_dict
from adaqn_cuda.state.plain import STRUCTURE

SHAPES = [(3, 4), (), (5,), (0, 2)]
#: How inputs begin that the state tells apart; in "pairs" any two options of AdaQN meet.
IN_STATE = {
    AdaQN: ("default", "pairs", "history_size"),
    LBFGS: ("default", "lr=tensor", "history_size", "history_dtype", "line_search", "init"),
}
SUBJECTS = [
    pytest.param(make, name, id=f"{make.__name__}-{name}")
    for make, begins in IN_STATE.items()
    for name in INPUTS[make]
    if name.startswith(begins)
]
PLAIN = (torch.Tensor, bool, int, float, str, type(None))


def make_optimizer(make, name, params):
    """AdaQN on parameters with names, and in one case with blocks of rows."""
    own = INPUTS[make][name]
    own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in own.items()}
    if make is LBFGS:
        return LBFGS(params, **{"max_iter": 3, **own})
    blocks = {params[0]: [1, 2]} if name == "history_size=3" else None
    return AdaQN([(f"layer.{i}", p) for i, p in enumerate(params)], **own, blocks=blocks)


def train(optimizer, params, start, stop):
    def closure(step):
        set_gradients(params, step)
        return sum(p.detach().square().sum() for p in params)

    for step in range(start, stop):
        optimizer.step(partial(closure, step))


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


def through_file(tensors, metadata, path):
    """Or, without safetensors, what any format keeps: tensors by name, in any order, and text."""
    if importlib.util.find_spec("safetensors") is None:
        assert all(t.is_contiguous() for t in tensors.values())
        return {name: tensors[name].clone() for name in sorted(tensors)}, dict(metadata)
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata()


@every_device
@pytest.mark.parametrize(("make", "name"), SUBJECTS)
def test_a_run_goes_on_to_the_bit(make, name, tmp_path, device):
    """The tensors come back on the CPU, wherever they were."""
    params = random_parameters(SHAPES, device=device)
    first = make_optimizer(make, name, params)
    train(first, params, 0, 7)
    saved = first.state_dict()
    assert all(type(leaf) in PLAIN for leaf in leaves(saved))

    tensors, metadata = through_file(*flatten_state_dict(saved), tmp_path / "file")
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    second = make(twins)
    second.load_state_dict(unflatten_state_dict(tensors, metadata))
    for optimizer, own in ((first, params), (second, twins)):
        train(optimizer, own, 7, 12)
    assert all(map(torch.equal, params, twins))
    assert first.stats() == second.stats()
    groups = [optimizer.param_groups[0] for optimizer in (first, second)]
    for option in ("history_dtype", "fisher_dtype", "param_names", "blocks"):
        assert groups[0].get(option) == groups[1].get(option), option


def test_nothing_is_there_twice_or_copied_without_need():
    params = random_parameters(SHAPES)
    optimizer = AdaQN(params, history_size=3, update_interval=2)
    train(optimizer, params, 0, 7)
    saved = optimizer.state_dict()
    tensors, metadata = flatten_state_dict(saved)
    assert len([name for name in tensors if name.endswith("counters")]) == 1
    ends = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors.values()]
    ends = sorted(end for end in ends if end[0] < end[1])
    assert all(one[1] <= other[0] for one, other in zip(ends, ends[1:], strict=False))
    assert tensors["state.0.momentum"] is not saved["state"][0]["momentum"]
    assert tensors["state.0.momentum"].data_ptr() == saved["state"][0]["momentum"].data_ptr()
    again = unflatten_state_dict(tensors, {**metadata, "epoch": "3"})
    assert again["state"][0]["counters"] is again["state"][1]["counters"]


def test_keys_keep_their_types_and_their_dots():
    one, other = torch.ones(2), torch.zeros(2)
    given = {
        "a": {"b": one, 1: None},
        "a.b": other,
        "1": [True, 2, 0.1, "x", (other, float("inf"))],
    }
    tensors, metadata = flatten_state_dict(given)
    assert len(tensors) == 2
    again = unflatten_state_dict(tensors, metadata)
    assert torch.equal(again["a"]["b"], one) and torch.equal(again["a.b"], other)
    assert again["a"][1] is None and again["1"][:4] == given["1"][:4]
    assert again["1"][4][0] is again["a.b"] and again["1"][4][1] == float("inf")


def test_state_of_other_optimizers_goes_through_too():
    params = random_parameters(SHAPES)
    optimizer = torch.optim.Adam(params)
    train(optimizer, params, 0, 3)
    saved = optimizer.state_dict()
    again = unflatten_state_dict(*flatten_state_dict(saved))
    assert again["param_groups"] == [{**g, "betas": [0.9, 0.999]} for g in saved["param_groups"]]
    assert torch.equal(again["state"][2]["exp_avg"], saved["state"][2]["exp_avg"])


def test_what_cannot_be_taken_apart_is_named():
    with pytest.raises(TypeError, match="got torch.float32 as 'state.0.kind'"):
        flatten_state_dict({"state": {0: {"kind": torch.float32}}})
    with pytest.raises(TypeError, match="got {None: 1} as 'state'"):
        flatten_state_dict({"state": {None: 1}})


def test_a_part_of_a_tensor_is_refused(monkeypatch):
    monkeypatch.setattr("adaqn_cuda.state.plain.is_spread", lambda tensor: True)
    with pytest.raises(TypeError, match="'state.0' is a DTensor.*full_state_dict=True"):
        flatten_state_dict({"state": [torch.zeros(2)]})


def test_what_does_not_belong_together_is_refused():
    tensors, metadata = flatten_state_dict({"state": {0: {"momentum": torch.zeros(2)}}})
    for other in (None, {}, {"format": "pt"}):
        with pytest.raises(ValueError, match=f"metadata: expected '{STRUCTURE}' in it"):
            unflatten_state_dict(tensors, other)
    with pytest.raises(ValueError, match="tensors: expected 'state.0.momentum' among them, got 0"):
        unflatten_state_dict({}, metadata)
    assert json.loads(metadata[STRUCTURE])
