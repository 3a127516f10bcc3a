"""What libraries do to optimizers to move them: it goes on to the bit, or says why not.

Without a GPU, a copy stands for a tensor elsewhere, and one on ``meta`` for what was let go.
"""

from __future__ import annotations

import copy
import weakref
from functools import cache, partial

import pytest
import torch
from problems import every_device
from torch import nn

from adaqn_cuda import DETERMINISTIC, LBFGS, AdaQN
from adaqn_cuda import lbfgs as lbfgs_module

MAKES = {
    "AdaQN": AdaQN,
    "AdaQN with pairs": partial(AdaQN, history_size=3, update_interval=2),
    "LBFGS": partial(LBFGS, max_iter=2, line_search_fn="strong_wolfe"),
    "LBFGS with all": partial(LBFGS, max_iter=2, **{**DETERMINISTIC, "history_size": 6}),
}
every_optimizer = pytest.mark.parametrize("name", MAKES)


class Run:
    """A small network's fit to all data; its state may have been looked at after some steps."""

    def __init__(self, name, device="cpu", steps=5, looked_at=False):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(device)
        self.optimizer = MAKES[name](self.model.parameters())
        self.step(steps)
        if looked_at:
            self.optimizer.state_dict()

    @property
    def params(self):
        return list(self.model.parameters())

    @property
    def first_entry(self):
        return self.optimizer.state[self.params[0]]

    def closure(self):
        self.optimizer.zero_grad()
        x = torch.linspace(-1, 1, 24).view(8, 3).to(self.params[0])
        loss = (self.model(x) - x.prod(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    def step(self, times=4):
        loss = None
        for _ in range(times):
            loss = self.optimizer.step(self.closure)
        return loss

    def moved(self):
        return [p.detach().clone() for p in self.params]


@cache
def undisturbed(name, device="cpu"):
    """A run of as many steps, which nobody has touched."""
    run = Run(name, device)
    run.step()
    return run


def each_tensor(change, value):
    """The same, with every tensor changed, in lists too."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return [each_tensor(change, v) for v in value] if isinstance(value, list) else value


def replace(change):
    """``state[p][name] = change(state[p][name])``."""

    def idiom(run):
        for entry in run.optimizer.state.values():
            entry.update({k: each_tensor(change, v) for k, v in entry.items()})

    return idiom


def replace_data(change):
    """``state[p][name].data = change(state[p][name])``."""

    def idiom(run):
        for entry in run.optimizer.state.values():
            for value in entry.values():
                each_tensor(lambda t: setattr(t, "data", change(t)), value)

    return idiom


def there_and_back(run):
    replace(torch.Tensor.double)(run)
    replace(torch.Tensor.clone)(run)


def load_a_copy(run):
    saved = run.optimizer.state_dict()
    entries = {
        key: {k: each_tensor(torch.clone, v) for k, v in entry.items()}
        for key, entry in saved["state"].items()
    }
    run.optimizer.load_state_dict({**saved, "state": entries})


def let_go_and_load(run):
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.load_state_dict({**saved, "state": {}})
    run.optimizer.load_state_dict(saved)


def swap(run):
    for p in run.params:
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))


def assign_data(run):
    for p in run.params:
        p.data = p.data.clone()


def model_there_and_back(run):
    device = run.params[0].device
    run.model.cpu()
    run.optimizer.state_dict()
    run.model.to(device)


EXACT = {
    "replaced": replace(torch.clone),
    "data": replace_data(torch.clone),
    "there and back": there_and_back,
    "loaded": load_a_copy,
    "let go and loaded": let_go_and_load,
    "parameters swapped": swap,
    "parameters' data": assign_data,
}
if torch.cuda.is_available():  # on the CPU they do nothing
    EXACT |= {
        "left on the CPU": replace(torch.Tensor.cpu),
        "data on the CPU": replace_data(torch.Tensor.cpu),
        "model there and back": model_there_and_back,
    }


@pytest.mark.parametrize("idiom", EXACT)
@every_optimizer
@every_device
def test_what_is_moved_goes_on_to_the_bit(name, idiom, device):
    other = undisturbed(name, device)
    for looked_at in (False, True)[name.startswith("AdaQN") :]:  # whose state is always there
        run = Run(name, device, looked_at=looked_at)
        EXACT[idiom](run)
        run.step()
        assert all(map(torch.equal, run.moved(), other.moved()))
        assert run.optimizer.stats() == other.optimizer.stats()


@every_optimizer
def test_what_was_replaced_is_taken(name):
    """Or the test above would prove nothing: zeros change the run."""
    run = Run(name, looked_at=True)
    replace(torch.zeros_like)(run)
    run.step()
    assert not all(map(torch.equal, run.moved(), undisturbed(name).moved()))


@every_optimizer
def test_state_that_is_emptied_begins_anew(name):
    run, other = Run(name), Run(name, steps=0)
    run.optimizer.state.clear()
    other.model.load_state_dict(run.model.state_dict())
    run.step(), other.step()
    assert all(map(torch.equal, run.moved(), other.moved()))
    assert run.optimizer.stats() == other.optimizer.stats()


REFUSED = {
    "meta": (replace(lambda t: t.to("meta")), "is on the meta device, which holds no numbers"),
    "bfloat16": (replace(torch.Tensor.bfloat16), "'counters' counts, and torch.bfloat16 rounds it"),
    "empty": (replace_data(lambda t: t.new_empty(0)), "expected '.*' of shape"),
}


@pytest.mark.parametrize("idiom", REFUSED)
@every_optimizer
def test_state_that_has_lost_its_numbers_is_refused(name, idiom):
    run = Run(name, looked_at=True)
    kept, before = copy.deepcopy(run.optimizer.state_dict()), run.moved()
    change, message = REFUSED[idiom]
    change(run)
    for _ in range(2):  # it does not go away
        with pytest.raises(ValueError, match=message):
            run.step()
        with pytest.raises(ValueError, match=message):
            run.optimizer.state_dict()
    assert all(map(torch.equal, run.moved(), before))
    run.optimizer.load_state_dict(kept)
    run.step()
    assert all(map(torch.equal, run.moved(), undisturbed(name).moved()))


@pytest.mark.parametrize(("swaps", "looked_at"), [(False, True), (True, False)])
@pytest.mark.parametrize("name", ["AdaQN with pairs", "LBFGS with all"])
@every_device
def test_a_model_that_changes_its_dtype_takes_the_state_along(name, swaps, looked_at, device):
    run = Run(name, device, looked_at=looked_at)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        first = run.step()
        for dtype in (torch.float64, torch.float16, torch.float32):
            run.model.to(dtype)
            run.step(1)
            saved = run.optimizer.state_dict()["state"][0]
            own = torch.float64 if dtype == torch.float64 else torch.float32
            assert saved["d" if "d" in saved else "accumulator"].dtype == own
            if dtype == torch.float64:
                assert any((p.float() != p).any() for p in run.params)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert run.step() < first


def test_state_that_is_let_go_is_not_kept():
    for name in MAKES:
        run = Run(name, looked_at=True)
        saved = copy.deepcopy(run.optimizer.state_dict())
        places = [weakref.ref(t) for t in run.first_entry.values() if isinstance(t, torch.Tensor)]
        assert len(places) > 3
        run.optimizer.load_state_dict({**saved, "state": {}})
        assert not any(place() is not None for place in places), name


# --------------------------------------------------------------------------- of LBFGS alone

# AdaQN's are in test_robustness.py.


def test_an_entry_is_there_from_a_look_to_a_step():
    """Rings grow, and one that was filed would be kept beside the new one."""
    run = Run("LBFGS")
    assert run.first_entry.keys() == {"func_evals", "n_iter"}
    saved = run.optimizer.state_dict()
    kept = dict(saved["state"][0])
    assert run.first_entry["d"] is kept["d"]
    run.step()
    assert run.first_entry.keys() == {"func_evals", "n_iter"}
    assert saved["state"][0].keys() == kept.keys()
    assert saved["state"][0]["n_iter"] == kept["n_iter"] < run.first_entry["n_iter"]


def replace_parameter(run, index):
    group = run.optimizer.param_groups[0]
    group["params"][index] = nn.Parameter(group["params"][index].detach().clone())


def append_parameter(run, index):
    run.optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(3)))


def remove_parameter(run, index):
    del run.optimizer.param_groups[0]["params"][index]


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("change", [replace_parameter, append_parameter, remove_parameter])
def test_parameters_that_come_and_go_are_refused(change, index):
    run = Run("LBFGS with all")
    before = run.moved()
    change(run, index)
    for ask in (run.step, run.optimizer.state_dict, run.optimizer.reserve):
        with pytest.raises(RuntimeError, match="params: some were put in, taken out or replaced"):
            ask()
    assert all(map(torch.equal, run.moved(), before))


@every_optimizer
def test_data_of_another_shape_is_refused(name):
    run = Run(name)
    p = run.params[0]
    p.data = p.data.reshape(3, 4)
    p.grad = torch.ones(3, 4)
    run.closure = lambda: torch.zeros(())
    with pytest.raises(ValueError, match=r"parameter 0.*\(4, 3\)|parameter 0.*\(3, 4\)"):
        run.optimizer.step(run.closure)


def test_a_capture_begins_with_the_state_as_it_was_left(monkeypatch):
    run = Run("LBFGS with all")
    run.optimizer.param_groups[0]["max_eval"] = 70
    run.optimizer.reserve()
    monkeypatch.setattr(lbfgs_module.capture, "is_captured", lambda device: True)
    assign_data(run)
    run.optimizer.param_groups[0]["params"][0].data = run.params[0].data.double()
    with pytest.raises(RuntimeError, match="params: parameters or their state were replaced since"):
        run.step()


def test_what_is_reserved_before_the_first_step_stays():
    run = Run("LBFGS with all", steps=0)
    run.optimizer.reserve()
    history = run.optimizer._history
    run.step(1)
    assert run.optimizer._history is history
