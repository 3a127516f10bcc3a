"""Saving, loading and copying: training goes on bit for bit."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from problems import every_device, plain_adaqn, random_parameters, set_gradients
from torch import nn

from adaqn_cuda import LBFGS, AdaQN

SHAPES = [(3, 4), (), (5,), (0, 2)]
OPTIONS = dict(update_interval=4, history_size=3, fisher_size=5)


class Monitor:
    """Losses that make the third pair update a reset, as a function of the state alone."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __call__(self):
        return 9.0 if self.optimizer._calls // 4 % 3 == 2 else 1.0


def advance(optimizer, start, stop):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.monitor = Monitor(optimizer)
    for step in range(start, stop):
        set_gradients(params, step)
        if step == 6:
            params[2].grad[1] = torch.nan
        optimizer.step()
    return [p.detach().clone() for p in params]


def round_trip(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["rmsprop", "scalar"])
@pytest.mark.parametrize("saved_at", [0, 1, 4, 6, 7, 12, 13, 17])
def test_resumed_run_continues_bit_for_bit(dtype, init, saved_at, device):
    """Before the first step, between pair updates, after a dropped step, after a reset (12)."""
    options = dict(OPTIONS, init=init, history_dtype=torch.bfloat16)
    straight = plain_adaqn(random_parameters(SHAPES, dtype, device=device), **options)
    expected = advance(straight, 0, 30)

    params = random_parameters(SHAPES, dtype, device=device)
    first = plain_adaqn(params, **options)
    advance(first, 0, saved_at)
    if saved_at == 12:
        assert first.stats()["resets"] == 1
    weights, state = round_trip([p.detach() for p in params]), round_trip(first.state_dict())

    params = [nn.Parameter(w) for w in weights]
    second = plain_adaqn(params, lr=123.0, history_size=7)  # options come from the checkpoint
    second.load_state_dict(state)
    assert second.stats() == first.stats() or saved_at == 0
    for p, q in zip(expected, advance(second, saved_at, 30), strict=True):
        assert torch.equal(p, q)


def test_loaded_state_keeps_its_dtype_and_its_own_memory():
    params = random_parameters(SHAPES, torch.bfloat16)
    first = plain_adaqn(params, **OPTIONS)
    advance(first, 0, 9)
    first.state[params[0]]["counters"][6] = 70001
    saved = first.state_dict()
    second = plain_adaqn(random_parameters(SHAPES, torch.bfloat16), **OPTIONS)
    second.load_state_dict(saved)
    for p, q in zip(params, second.param_groups[0]["params"], strict=True):
        for name, tensor in first.state[p].items():
            loaded = second.state[q][name]
            assert loaded.dtype == tensor.dtype, name
            torch.testing.assert_close(loaded, tensor, rtol=0, atol=0, equal_nan=True)
            assert loaded.numel() == 0 or loaded.data_ptr() != tensor.data_ptr()
    assert second.stats()["stored"] == 70001


@every_device
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("steps", [0, 9])
def test_copies_continue_on_their_own(copier, steps, device):
    params = random_parameters(SHAPES, device=device)
    original = plain_adaqn(params, **OPTIONS)
    advance(original, 0, steps)
    original.monitor = None
    twin = copier(original)
    assert twin.monitor is None
    assert repr(twin) == repr(original)
    a = advance(original, steps, 20)
    for p, q in zip(a, advance(twin, steps, 20), strict=True):
        assert torch.equal(p, q)


def test_loading_checks_before_it_changes_anything():
    params = random_parameters(SHAPES)
    optimizer = plain_adaqn(params, **OPTIONS)
    advance(optimizer, 0, 9)
    before = copy.deepcopy(optimizer.state_dict())
    other = plain_adaqn(random_parameters([(3, 4), (), (6,), (0, 2)]), **OPTIONS)
    advance_params = other.param_groups[0]["params"]
    set_gradients(advance_params, 0)
    other.step()
    with pytest.raises(ValueError, match="parameter 2.*accumulator.*\\(5,\\).*\\(6,\\)"):
        optimizer.load_state_dict(other.state_dict())
    broken = copy.deepcopy(before)
    del broken["state"][1]
    with pytest.raises(ValueError, match="parameter 1"):
        optimizer.load_state_dict(broken)
    with pytest.raises(ValueError, match="param"):
        optimizer.load_state_dict(plain_adaqn(random_parameters([(2,)])).state_dict())
    adam = torch.optim.Adam(random_parameters(SHAPES))
    for p in adam.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    adam.step()
    with pytest.raises(ValueError):
        optimizer.load_state_dict(adam.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        for name, tensor in entry.items():
            torch.testing.assert_close(
                after["state"][key][name], tensor, rtol=0, atol=0, equal_nan=True
            )


def test_loading_a_fresh_state_starts_afresh():
    fresh = plain_adaqn(random_parameters(SHAPES), **OPTIONS)
    used = plain_adaqn(random_parameters(SHAPES), **OPTIONS)
    advance(used, 0, 9)
    used.load_state_dict(fresh.state_dict())
    assert not used.state
    assert used.stats()["stored"] == 0


@pytest.mark.parametrize("kind", [AdaQN, LBFGS])
def test_numbers_of_other_libraries_are_saved_as_pythons(kind):
    (p,) = random_parameters([(6, 2)])
    blocks = {"blocks": {p: [np.int64(2), 4]}} if kind is AdaQN else {}
    optimizer = kind([p], lr=np.float64(0.1), history_size=np.int32(4), **blocks)
    group = round_trip(optimizer.state_dict())["param_groups"][0]
    assert (group["lr"], group["history_size"]) == (0.1, 4)
    assert kind is LBFGS or group["blocks"] == [(2, 4)]


def test_state_dict_hooks_see_and_change_the_dict():
    params = random_parameters(SHAPES)
    source = plain_adaqn(params, **OPTIONS)
    advance(source, 0, 9)
    target = plain_adaqn(random_parameters(SHAPES), **OPTIONS)
    seen = []

    def rename(_, state_dict):
        return {"state": state_dict["states"], "param_groups": state_dict["param_groups"]}

    target.register_load_state_dict_pre_hook(rename)
    target.register_load_state_dict_post_hook(lambda o: seen.append(o.stats()["gradients"]))
    saved = source.state_dict()
    target.load_state_dict({"states": saved["state"], "param_groups": saved["param_groups"]})
    assert seen == [source.stats()["gradients"]]


class TestDistributedCheckpoint:
    """torch.distributed.checkpoint's state-dict functions, which materialise state by a step."""

    @staticmethod
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    @staticmethod
    def train(model, optimizer, steps):
        x = torch.linspace(-1, 1, 24).view(8, 3)
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            optimizer.step()
        optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    def test_round_trip(self):
        from torch.distributed.checkpoint import state_dict as dcp

        model = self.model()
        optimizer = plain_adaqn(model.parameters(), **OPTIONS)
        self.train(model, optimizer, 10)
        weights = copy.deepcopy(model.state_dict())
        saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
        expected = self.train(model, optimizer, 10)

        other = self.model()
        other.load_state_dict(weights)
        resumed = plain_adaqn(other.parameters(), **OPTIONS)
        dcp.set_optimizer_state_dict(other, resumed, saved)
        for p, q in zip(expected, self.train(other, resumed, 10), strict=True):
            assert torch.equal(p, q)

    def test_looking_at_a_fresh_optimizer_disturbs_nothing(self):
        from torch.distributed.checkpoint import state_dict as dcp

        plain, looked_at = self.model(), self.model()
        a, b = (plain_adaqn(m.parameters(), **OPTIONS) for m in (plain, looked_at))
        dcp.get_optimizer_state_dict(looked_at, b)
        for p, q in zip(self.train(plain, a, 20), self.train(looked_at, b, 20), strict=True):
            assert torch.equal(p, q)
        assert a.stats() == b.stats()
