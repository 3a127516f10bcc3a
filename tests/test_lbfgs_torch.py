"""What torch's own tests ask of every optimizer and of L-BFGS, asked of LBFGS."""

from __future__ import annotations

import copy
import io
from math import inf

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from adaqn_cuda import LBFGS

#: The options that torch tests its own with.
INPUTS = {
    "default": {},
    "non-default lr": dict(lr=0.01),
    "Tensor lr": dict(lr=torch.tensor(0.001)),
    "tolerance_grad": dict(tolerance_grad=1e-6),
    "strong_wolfe": dict(line_search_fn="strong_wolfe"),
}
every_input = pytest.mark.parametrize("options", INPUTS.values(), ids=INPUTS)


class Line:
    """|W x + b|^2, as torch's tests have it."""

    def __init__(self, optimizer, options, dtype=torch.float32):
        draw = torch.Generator().manual_seed(0)
        self.weight = Parameter(torch.randn((10, 5), generator=draw, dtype=dtype))
        self.bias = Parameter(torch.randn(10, generator=draw, dtype=dtype))
        self.x = torch.randn(5, generator=draw, dtype=dtype)
        self.params = [self.weight, self.bias]
        self.optimizer = optimizer(self.params, **options)

    def closure(self):
        self.optimizer.zero_grad()
        loss = (self.weight.mv(self.x) + self.bias).abs().square().sum()
        loss.backward()
        return loss

    def step(self, times=1):
        for _ in range(times):
            self.optimizer.step(self.closure)
        return self

    def assert_close(self, other, **tolerance):
        for p, q in zip(self.params, other.params, strict=True):
            torch.testing.assert_close(p, q, **tolerance)


@every_input
def test_goes_in_the_right_direction_with_schedulers(options):
    line = Line(LBFGS, options)
    optimizer, first = line.optimizer, line.closure().item()
    schedulers = [
        torch.optim.lr_scheduler.StepLR(optimizer, gamma=0.99, step_size=10),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ]
    for _ in range(20):
        loss = optimizer.step(line.closure)
        schedulers[0].step()
        schedulers[1].step(loss.detach())
    assert line.closure().item() < first


@every_input
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_ends_where_torch_ends(options, dtype):
    tolerance = {} if dtype == torch.float64 else dict(rtol=1e-3, atol=1e-4)
    ours, theirs = Line(LBFGS, options, dtype), Line(torch.optim.LBFGS, options, dtype)
    ours.step(4).assert_close(theirs.step(4), **tolerance)


def test_a_tensor_for_lr_is_its_number():
    for shape in ((), (1,)):
        tensor = Line(LBFGS, dict(lr=torch.full(shape, 0.1))).step(3)
        number = Line(LBFGS, dict(lr=torch.tensor(0.1).item())).step(3)
        tensor.assert_close(number, rtol=0, atol=0)


@every_input
def test_nothing_moves_without_gradients(options):
    frozen = [torch.randn(2, 3) for _ in range(2)]
    zero = torch.randn(5, 1, requires_grad=True)
    zero.grad = torch.zeros_like(zero)
    for params in (frozen, [zero]):
        before = [p.detach().clone() for p in params]
        LBFGS(params, **options).step(lambda: torch.tensor([1]))
        assert all(map(torch.equal, before, params))


def test_returns_what_the_closure_returned():
    params = [torch.randn(10, 5), torch.randn(10)]
    for tolerance in (inf, -inf):
        loss = LBFGS(params, 0.01, tolerance_grad=tolerance).step(lambda: torch.tensor([10]))
        assert isinstance(loss, torch.Tensor) and loss.item() == 10


def test_bad_parameters_are_what_they_are_to_torch():
    p, q = Parameter(torch.randn(1, 1)), Parameter(torch.randn(1, 1))
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        LBFGS(p)
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        LBFGS([p, p])
    for params, message in (
        ([{"params": p}, {"params": p}], "some parameters appear in more than one"),
        ([("weight", p), q], "all optimizer params should be with/without names"),
        ([{"params": [p]}, {"params": [("weight", q)]}], "should be with/without names"),
        ([], "optimizer got an empty parameter list"),
    ):
        with pytest.raises(ValueError, match=message):
            LBFGS(params)


@every_input
def test_state_continues_in_a_copy_from_a_file_and_without_what_torch_added_later(options):
    line = Line(LBFGS, options).step(2)
    file = io.BytesIO()
    torch.save(line.optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twins = []
    for older in (False, True):
        twin = copy.deepcopy(line)
        twin.optimizer = LBFGS(twin.params, **options)
        state = copy.deepcopy(saved)
        for group in state["param_groups"] if older else []:
            for name in set(group) - {"params", "lr", "tolerance_change"}:
                del group[name]
        twin.optimizer.load_state_dict(state)
        twins.append(twin)
    twins.append(copy.deepcopy(line))
    line.step(2)
    for twin in twins:
        twin.step(2).assert_close(line, rtol=0, atol=0)


def test_names_of_parameters_come_with_the_state():
    model = nn.Linear(3, 2)
    named, plain = LBFGS(model.named_parameters()), LBFGS(model.parameters())
    named.load_state_dict(plain.state_dict())
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]
    plain.load_state_dict(named.state_dict())


def test_hooks_run_in_order():
    line, seen = Line(LBFGS, {}), []
    optimizer = line.optimizer
    for register, name in (
        (optimizer.register_step_pre_hook, "before the step"),
        (optimizer.register_step_post_hook, "after it"),
        (optimizer.register_state_dict_pre_hook, "before the state"),
        (optimizer.register_state_dict_post_hook, "after that"),
        (optimizer.register_load_state_dict_pre_hook, "before it is loaded"),
        (optimizer.register_load_state_dict_post_hook, "at last"),
    ):
        register(lambda *_, name=name: seen.append(name))
    line.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [
        "before the step", "after it", "before the state", "after that", "before it is loaded",
        "at last",
    ]  # fmt: skip


def test_it_can_be_printed():
    said = repr(LBFGS([Parameter(torch.zeros(2))], lr=0.25))
    assert said.startswith("LBFGS (") and "lr: 0.25" in said
