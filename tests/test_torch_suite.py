"""What torch's own suites ask of every optimizer, asked of AdaQN and LBFGS.

The behaviours are those of ``test_optim.py``, ``test_lrscheduler.py`` and ``test_swa_utils.py`` in
torch's repository, under the names that they have there; options come from ``optimizer_inputs.py``,
each alone and all in pairs.  What differs is in :data:`DIFFERENCES`, with its reason.
"""

from __future__ import annotations

import copy
import functools
import io
import warnings
from dataclasses import replace

import pytest
import torch
from optimizer_inputs import ADAQN, INPUTS, Subject, every_pair, optimizer_info
from problems import PLACES, every_device, every_place, needs_library
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from adaqn_cuda import LBFGS, AdaQN
from adaqn_cuda.options import COMMON

F32, F64, C64 = torch.float32, torch.float64, torch.complex64

#: What torch's suites ask and these optimizers do not do, and why; none of it is silent.
DIFFERENCES: dict[str, str] = {
    "rosenbrock_sparse": "AdaQN refuses sparse gradients: a factor needs all rows of its block.",
    "mixed_device_dtype": "All parameters live on one device, because the norm of the gradient, "
    "pairs and directions are of all of them; dtypes may differ.",
    "differentiable": "A step is not recorded by autograd.",
    "foreach": "It is accepted and changes nothing: the native step is one pass over all tensors.",
    "param_groups_lr of common options": "Options of the whole optimizer, such as history_size, "
    "cannot be given to one group of several. The error says which and why.",
    "param_groups_lr of LBFGS": "There is one direction for all parameters, so groups must agree.",
    "state_dict_deterministic of repeated groups": "A parameter in two groups would be stepped "
    "twice, with one state: refused by AdaQN. LBFGS counts it once, as torch's does.",
    "complex_2d of factors": "A complex vector is a matrix of two columns, and its factor the "
    "covariance of real and imaginary parts together; two real vectors have one each.",
    "complex_2d of normalize": "A complex parameter has one step, whose root mean square is of "
    "real and imaginary parts together; two real ones have one each.",
}
ASKED: set[str] = set()


def differs(name, raises):
    """A test as torch has it, which must fail for the reason that :data:`DIFFERENCES` has."""
    ASKED.add(name)
    return pytest.mark.xfail(reason=DIFFERENCES[name], raises=raises, strict=True)


#: Inputs that the slower reference gets; each option alone it gets where backends are compared.
BY_REFERENCE = ("default", "pairs", "init=kronecker", "line_search_fn")


def subjects(*makes, but=()):
    """Every optimizer with every input, and the reference with some, for a test to decorate."""
    found = []
    for make in makes or INPUTS:
        for name, options in INPUTS[make].items():
            places = [(None, "cpu", [needs_library])]
            if name.startswith(BY_REFERENCE):
                places.append((False, "cpu", []))
            if torch.cuda.is_available():
                places.append((None, "cuda", [pytest.mark.cuda]))
            for fused, device, marks in places:
                subject = Subject(make, name, options, fused, device)
                if not any(rule(subject) for rule in but):
                    found.append(pytest.param(subject, id=subject.id, marks=marks))
    return pytest.mark.parametrize("subject", found)


def by_reference(subject):
    return subject.fused is False


both_kinds = pytest.mark.parametrize(
    "subject",
    [
        pytest.param(
            Subject(make, "default", {}, *place.values),
            id=f"{make.__name__}-{place.id}",
            marks=place.marks,
        )
        for make in INPUTS
        for place in PLACES
    ],
)


class Line:
    """|W x + b|^2 of a matrix and a vector."""

    def __init__(self, subject, params=None, contiguous=True, **more):
        draw = torch.Generator().manual_seed(0)
        shapes = ((4, 3), (4,))
        if contiguous:
            values = [torch.randn(shape, generator=draw) for shape in shapes]
        else:
            values = [torch.randn((*shape, 2), generator=draw)[..., 0] for shape in shapes]
        self.params = [Parameter(v.to(subject.device)) for v in values]
        self.x = torch.randn(3, generator=draw).to(subject.device)
        self.subject = subject
        groups = self.params if params is None else params(self.params)
        self.optimizer = subject.on(groups, **more)

    def closure(self):
        self.optimizer.zero_grad()
        weight, bias = self.params
        loss = (weight.mv(self.x) + bias).square().sum()
        loss.backward()
        return loss

    def step(self, times=1):
        for _ in range(times):
            loss = advance(self.subject, self.optimizer, self.closure)
        return loss

    def assert_progress(self, first):
        last = self.closure().item()
        assert last > first if self.subject.maximizes else last < first


def advance(subject, optimizer, closure):
    """A step, in the way that the optimizer asks for."""
    if subject.needs_closure:
        return optimizer.step(closure)
    loss = closure()
    optimizer.step()
    return loss


def assert_params_equal(mine, theirs, **tolerance):
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


# --------------------------------------------------------------------------- the update


@subjects()
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_forloop_goes_right_direction(subject, contiguous):
    line = Line(subject, contiguous=contiguous)
    first = line.closure().item()
    line.step(8)
    line.assert_progress(first)


@subjects()
def test_forloop_goes_right_direction_with_schedulers(subject):
    line = Line(subject)
    optimizer, first = line.optimizer, line.closure().item()
    schedulers = [
        lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=3),
        lr_scheduler.ReduceLROnPlateau(optimizer),
    ]
    for _ in range(8):
        loss = line.step()
        schedulers[0].step()
        schedulers[1].step(loss.detach())
    line.assert_progress(first)


@needs_library
@every_device
def test_every_pair_of_options_goes_right_direction(device):
    """One by one and not all at once, as torch has them."""
    for options in every_pair(ADAQN):
        line = Line(Subject(AdaQN, "a pair", options, None, device))
        first = line.closure().item()
        line.step(4)
        line.assert_progress(first)


@every_place
def test_param_group_with_lrscheduler_goes_right_direction(fused, device):
    subject = Subject(AdaQN, "groups", {}, fused, device)
    line = Line(subject, lambda params: [{"params": params[0]}, {"params": params[1], "lr": 0.01}])
    scheduler = lr_scheduler.ExponentialLR(line.optimizer, 0.9)
    first = line.closure().item()
    for _ in range(8):
        line.step()
        scheduler.step()
    line.assert_progress(first)
    assert [g["lr"] for g in line.optimizer.param_groups] == pytest.approx([0.01 * 0.9**8] * 2)


@subjects(but=[by_reference, lambda s: "lr" in s.options])
@pytest.mark.parametrize("dimensions", [0, 1, 2])
def test_tensor_lr(subject, dimensions):
    rate = torch.tensor(0.02).reshape([1] * dimensions)
    tensor, number = Line(subject, lr=rate), Line(subject, lr=rate.item())
    for line in (tensor, number):
        line.step(4)
    assert_params_equal(tensor.params, number.params, rtol=0, atol=0)


def complex_twins(subject, shapes, seed=0):
    """The same numbers as complex parameters and as real ones, and an optimizer of each."""
    draw = torch.Generator().manual_seed(seed)
    mine = [torch.randn(s, generator=draw, dtype=t).to(subject.device) for s, t in shapes]
    mine = [p.requires_grad_() for p in mine]
    theirs = [torch.view_as_real(p) if p.is_complex() else p for p in mine]
    theirs = [q.detach().clone().requires_grad_() for q in theirs]
    return mine, theirs, subject.on(mine), subject.on(theirs)


@subjects()
def test_complex(subject):
    """Complex parameters are the real ones that torch.view_as_real makes of them."""
    shapes = [((4, 3), C64), ((5,), C64), ((4, 3), F32)]
    mine, theirs, complex_one, real_one = complex_twins(subject, shapes)
    noise = torch.Generator().manual_seed(1)
    for _ in range(3):
        grads = [torch.randn(q.shape, generator=noise).to(q.device) for q in theirs]

        def closure(params, grads=grads):
            for p, g in zip(params, grads, strict=True):
                p.grad = torch.view_as_complex(g.clone()) if p.is_complex() else g.clone()
            return torch.ones(())

        for params, optimizer in ((mine, complex_one), (theirs, real_one)):
            advance(subject, optimizer, functools.partial(closure, params))
    reals = [torch.view_as_real(p) if p.is_complex() else p for p in mine]
    assert_params_equal(reals, theirs, rtol=0, atol=0)


def rosenbrock(z):
    return ((1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2).abs()


def has_factors(subject):
    return subject.options.get("init", "kronecker" if subject.make is AdaQN else "") == "kronecker"


def is_normalized(subject):
    return subject.options.get("normalize", False)


def check_complex_2d(subject):
    """Real and imaginary part as two parameters: the same wherever nothing is kept of matrices."""
    draw = torch.Generator().manual_seed(2024)
    z = torch.randn(2, dtype=torch.complex128, generator=draw).to(subject.device).requires_grad_()
    real, imaginary = (part.detach().clone().requires_grad_() for part in (z.real, z.imag))
    one, two = subject.on([z]), subject.on([real, imaginary])

    def of_parts():
        two.zero_grad()
        loss = rosenbrock(torch.complex(real, imaginary))
        loss.backward()
        return loss

    def of_whole():
        one.zero_grad()
        loss = rosenbrock(z)
        loss.backward()
        return loss

    for _ in range(3):
        advance(subject, one, of_whole)
        advance(subject, two, of_parts)
        torch.testing.assert_close(torch.complex(real, imaginary), z)


@subjects(but=[has_factors, is_normalized])
def test_complex_2d(subject):
    check_complex_2d(subject)


@needs_library
@differs("complex_2d of factors", AssertionError)
@pytest.mark.parametrize("make", INPUTS)
def test_complex_2d_of_factors(make):
    check_complex_2d(Subject(make, "factors", {"init": "kronecker"}, None))


@needs_library
@differs("complex_2d of normalize", AssertionError)
def test_complex_2d_of_normalize():
    check_complex_2d(Subject(AdaQN, "normalize", {"init": "rmsprop", "normalize": True}, None))


@subjects(AdaQN, but=[by_reference])
def test_fused_matches_forloop(subject):
    """Native kernels and the reference, with a step without gradients and a frozen layer."""
    ends = []
    for fused in (None, False):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
        model.to(subject.device, F64)
        scalar = torch.zeros((), dtype=F64, device=subject.device, requires_grad=True)
        scalar.grad = torch.full_like(scalar, 0.3)
        optimizer = subject.on([*model.parameters(), scalar], fused=fused)
        x = torch.linspace(0.1, 0.6, 6, dtype=F64, device=subject.device).reshape(3, 2)
        for step in range(7):
            model[2].requires_grad_(step not in (3, 4))
            optimizer.zero_grad()
            if step != 2:
                model(x).sum().backward()
            optimizer.step()
        ends.append([scalar, *model.parameters()])
        state = [optimizer.state[p] for p in ends[-1]]
        ends[-1] += [entry[k] for entry in state for k in ("accumulator",) if k in entry]
    # Rings in bfloat16 and a float32 rate are rounded; ties may fall the other way.
    narrow = any(isinstance(v, torch.dtype | torch.Tensor) for v in subject.options.values())
    tolerance = 1e-3 if narrow else 1e-6
    assert_params_equal(*ends, rtol=tolerance, atol=tolerance)


@both_kinds
def test_fused_error_on_params_on_meta(subject):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1))
    optimizer = subject.make(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    with pytest.raises(RuntimeError, match="fused=True.*meta"):
        optimizer.step(lambda: torch.ones((), device="meta"))


@subjects(AdaQN)
@pytest.mark.parametrize("scaled", [False, True])
def test_fused_does_not_step_if_foundinf(subject, scaled):
    params = [torch.ones(1, device=subject.device) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = subject.on(params)
    optimizer.grad_scale = torch.ones(1, device=subject.device) if scaled else None
    optimizer.found_inf = torch.ones((), device=subject.device)
    optimizer.step()
    assert all(p.item() == 1 for p in params)
    assert optimizer.stats()["steps_skipped"] == 1


# --------------------------------------------------------------------------- parameter groups


@subjects(AdaQN)
def test_param_groups_weight_decay(subject):
    """All options come by the groups, and none by the constructor."""
    own = subject.own()
    line = Line(
        Subject(AdaQN, "groups", {"maximize": subject.maximizes}, subject.fused, subject.device),
        lambda ps: [{"params": [ps[0]], **own}, {"params": [ps[1]], **own, "weight_decay": 0.0}],
    )
    first = line.closure().item()
    line.step(8)
    line.assert_progress(first)


def is_common(subject):
    """Whether an option is one of the whole optimizer."""
    return "scalar" in subject.options.values() or any(name in COMMON for name in subject.options)


@subjects(AdaQN, but=[is_common])
def test_param_groups_lr(subject):
    """One group has the options; the other, at next to no rate, does not move."""
    still = Parameter(torch.randn(2, device=subject.device))
    before = still.detach().clone()
    own = {"lr": 1e-3, **subject.own()}
    line = Line(
        Subject(AdaQN, "groups", {}, subject.fused, subject.device),
        lambda params: [{"params": params, **own}, {"params": [still]}],
        lr=1e-28,
    )
    first = line.closure().item()
    for _ in range(8):
        line.closure()
        still.grad = torch.rand_like(still)
        line.optimizer.step()
    line.assert_progress(first)
    assert torch.equal(still, before)


@differs("param_groups_lr of common options", ValueError)
def test_param_groups_lr_of_common_options():
    params = [Parameter(torch.randn(2)), Parameter(torch.randn(2))]
    AdaQN([{"params": params[:1], "history_size": 3}, {"params": params[1:]}])


@differs("param_groups_lr of LBFGS", ValueError)
def test_param_groups_lr_of_lbfgs():
    params = [Parameter(torch.randn(2)), Parameter(torch.randn(2))]
    LBFGS([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}])


@differs("mixed_device_dtype", ValueError)
@pytest.mark.parametrize("make", INPUTS)
def test_mixed_device_dtype(make):
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2, device="meta"))]
    for p in params:
        p.grad = torch.ones_like(p)
    make(params).step(lambda: torch.ones(()))


def set_sparse_gradient(p):
    """Uncoalesced, as torch's suite has it."""
    p.grad = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (2,), check_invariants=True)
    return torch.ones(())


@differs("rosenbrock_sparse", RuntimeError)
def test_rosenbrock_sparse():
    p = Parameter(torch.tensor([1.5, 1.5]))
    set_sparse_gradient(p)
    AdaQN([p]).step()


def test_rosenbrock_sparse_of_lbfgs():
    """L-BFGS makes sparse gradients dense, as torch's does."""
    ends = []
    for make in (LBFGS, torch.optim.LBFGS):
        p = Parameter(torch.tensor([1.5, 1.5]))
        make([p], max_iter=1).step(lambda p=p: set_sparse_gradient(p))
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


@differs("differentiable", RuntimeError)
def test_differentiable():
    AdaQN([Parameter(torch.ones(2))], differentiable=True)


@differs("foreach", AssertionError)
def test_foreach():
    """Torch's suite looks for other code that foreach would choose."""
    lines = [Line(Subject(AdaQN, "foreach", {"foreach": f}, False)) for f in (False, True, None)]
    for line in lines:
        line.step(3)
    assert not all(torch.equal(lines[0].params[0], line.params[0]) for line in lines)


# --------------------------------------------------------------------------- no gradient, printing


@subjects()
def test_step_is_noop_when_params_have_no_grad(subject):
    params = [torch.randn(2, 3, device=subject.device) for _ in range(2)]
    before = [p.clone() for p in params]
    subject.on(params).step(lambda: torch.tensor([1]))
    assert_params_equal(params, before, rtol=0, atol=0)


@subjects(but=[lambda s: "weight_decay" in s.options])
def test_step_is_noop_for_zero_grads(subject):
    p = torch.randn((5, 1), device=subject.device, requires_grad=True)
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    subject.on([p]).step(lambda: torch.tensor([1]))
    assert torch.equal(p, before)


@subjects()
def test_optimizer_can_be_printed(subject):
    said = repr(subject.on([Parameter(torch.randn(2, 3, device=subject.device))]))
    assert said.startswith(f"{subject.make.__name__} (\nParameter Group 0\n")
    assert all(f"    {name}: " in said for name in subject.options)


@subjects()
def test_non_empty_state(subject):
    line = Line(subject)
    line.step()
    filed = [line.optimizer.state[p] for p in line.params[: 1 if subject.needs_closure else None]]
    assert all(filed)


# --------------------------------------------------------------------------- state dicts


def named(params, wanted):
    return [(f"name{k}", p) for k, p in enumerate(params)] if wanted else params


def without_names(state_dict):
    groups = [
        {k: v for k, v in g.items() if k != "param_names"} for g in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def assert_same_state(mine, theirs):
    """Nested dicts and lists of equal numbers; unknown losses, NaN, are equal."""
    assert type(mine) is type(theirs)
    if isinstance(mine, torch.Tensor):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_same_state(mine[key], theirs[key])
    elif isinstance(mine, list | tuple):
        for a, b in zip(mine, theirs, strict=True):
            assert_same_state(a, b)
    else:
        assert mine == theirs


@subjects()
def test_state_dict_deterministic(subject):
    line = Line(subject, lambda params: named(params, True))
    line.step(5)
    twin = Line(subject)
    with torch.no_grad():
        for p, q in zip(line.params, twin.params, strict=True):
            q.copy_(p)
    twin.optimizer.load_state_dict(copy.deepcopy(line.optimizer.state_dict()))
    for _ in range(4):
        line.step()
        twin.step()
        assert_params_equal(line.params, twin.params, rtol=0, atol=0)
    mine, theirs = (without_names(x.optimizer.state_dict()) for x in (line, twin))
    assert_same_state(mine, theirs)


@differs("state_dict_deterministic of repeated groups", RuntimeError)
def test_state_dict_deterministic_of_repeated_groups():
    line = Line(Subject(AdaQN, "default", {}, False))
    line.step()
    line.optimizer.param_groups.extend(line.optimizer.param_groups)
    line.optimizer.state_dict()


def test_repeated_groups_of_lbfgs():
    line = Line(Subject(LBFGS, "default", {}, False))
    line.step()
    before = line.optimizer.state_dict()["param_groups"]
    line.optimizer.param_groups.extend(line.optimizer.param_groups)
    assert line.optimizer.state_dict()["param_groups"][-1] == before[-1]


@subjects()
def test_can_load_older_state_dict(subject):
    """One that lacks what came to torch's optimizers later: it keeps what the optimizer has."""
    line = Line(subject)
    line.step(3)
    older = copy.deepcopy(line.optimizer.state_dict())
    for group in older["param_groups"]:
        for flag in ("maximize", "foreach", "fused", "differentiable", "capturable"):
            group.pop(flag, None)
    before = copy.deepcopy(line.optimizer.param_groups[0])
    line.optimizer.load_state_dict(older)
    after = line.optimizer.param_groups[0]
    assert {k: v for k, v in after.items() if k != "params"} == {
        k: v for k, v in before.items() if k != "params"
    }
    line.step()


@both_kinds
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_can_load_from_to_named_state_dict(subject, first, second):
    line = Line(subject, lambda params: named(params, first))
    line.step(3)
    twin = Line(subject, lambda params: named(params, second))
    twin.optimizer.load_state_dict(copy.deepcopy(line.optimizer.state_dict()))
    twin.step()
    if first or second:
        names = twin.optimizer.state_dict()["param_groups"][0]["param_names"]
        assert names == ["name0", "name1"]


@subjects()
def test_save_load_equality_with_weights_only(subject):
    line = Line(subject)
    line.step(3)
    saved = line.optimizer.state_dict()
    for weights_only in (False, True):
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        assert_same_state(torch.load(file, weights_only=weights_only), saved)


@subjects()
def test_deepcopy_copies_all_public_attrs(subject):
    line = Line(subject)
    line.step(3)
    public = [
        {name for name in vars(optimizer) if not name.startswith("_")}
        for optimizer in (line.optimizer, copy.deepcopy(line.optimizer))
    ]
    assert public[0] == public[1]


@both_kinds
def test_state_dict_hooks(subject):
    """What one before puts into the state, one behind finds in the dict, and may take out."""
    line = Line(subject)
    line.step()
    optimizer = line.optimizer

    def put(optimizer):
        optimizer.state["test"] = 1

    def take(optimizer, state_dict):
        return {**state_dict, "found": state_dict["state"].pop("test", None)}

    behind = optimizer.register_state_dict_post_hook(take)
    assert optimizer.state_dict()["found"] is None
    before = optimizer.register_state_dict_pre_hook(put)
    assert optimizer.state_dict()["found"] == 1
    behind.remove()
    assert optimizer.state_dict()["state"]["test"] == 1
    before.remove()
    line.step()


@both_kinds
@pytest.mark.parametrize("stepped", [False, True])
def test_load_state_dict_hooks(subject, stepped):
    """They may change the dict in place or give another, in the order asked for."""
    line = Line(subject)
    if stepped:
        line.step()
    optimizer = line.optimizer

    def in_place(optimizer, state_dict):
        state_dict["param_groups"][0]["lr"] = 0.002

    def another(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.003
        return state_dict

    def behind(optimizer):
        optimizer.state["lr"] = optimizer.param_groups[0]["lr"]

    optimizer.register_load_state_dict_post_hook(behind)
    handle = optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(another, prepend=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["lr"] == 0.002
    handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["lr"] == 0.003
    line.step()


@both_kinds
def test_step_hooks(subject):
    """Of one optimizer and of all of them, in order, and none once they are removed."""
    params, seen = [torch.tensor([1.0, 1.0], device=subject.device)], []
    mine, other = subject.on(params), SGD(params)

    def note(word):
        return lambda *_: seen.append(word)

    handles = [
        register_optimizer_step_pre_hook(note("all before")),
        register_optimizer_step_post_hook(note("all behind")),
    ]
    for optimizer in (mine, other):
        handles.append(optimizer.register_step_pre_hook(note("before")))
        handles.append(optimizer.register_step_post_hook(note("behind")))
    try:
        for optimizer in (mine, other, mine):
            optimizer.step(lambda: 1)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["all before", "before", "behind", "all behind"] * 3
    mine.step(lambda: 1)
    assert len(seen) == 12


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("name", ["default", "pairs 0"])
def test_state_dict_with_cuda_params(make, name):
    """A state that was made on the CPU continues on the device, and is not changed by that."""
    subject = Subject(make, name, INPUTS[make].get(name, {}), None)
    line = Line(subject)
    line.step(3)
    twin = Line(replace(subject, device="cuda"))
    with torch.no_grad():
        for p, q in zip(line.params, twin.params, strict=True):
            q.copy_(p)
    saved = line.optimizer.state_dict()
    given = copy.deepcopy(saved)
    twin.optimizer.load_state_dict(given)
    assert_same_state(given, saved)
    for _ in range(3):
        line.step()
        twin.step()
        cpu = [q.detach().cpu() for q in twin.params]
        assert_params_equal([p.detach() for p in line.params], cpu, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------- by torch's own code


@pytest.fixture(scope="module")
def suite():
    """What torch's tests of optimizers share; other tests may still set flags after it."""
    pytest.importorskip("expecttest")
    from torch.testing._internal import common_optimizers

    torch.backends.__allow_nonbracketed_mutation_flag = True
    return common_optimizers


@both_kinds
def test_errors(subject, suite):
    """Those that torch's suite has for all optimizers, in the same words."""
    info = optimizer_info(subject.make)
    errors = info.optim_error_inputs_func(device=subject.device, dtype=F32)
    assert len(errors) > 3
    for error in errors:
        given = error.optimizer_error_input
        warns = issubclass(error.error_type, Warning)
        expected = (pytest.warns if warns else pytest.raises)(
            error.error_type, match=error.error_regex
        )
        with expected:
            fresh = [Parameter(torch.ones(1, device=subject.device))]
            subject.make(fresh if given.params is None else given.params, **given.kwargs)


@needs_library
@every_device
@pytest.mark.parametrize("make", INPUTS)
def test_inputs_with_every_flag(make, device, suite):
    """As torch's suite enumerates them from an ``OptimizerInfo``."""
    enumerate_inputs = suite._get_optim_inputs_including_global_cliquey_kwargs
    found = enumerate_inputs(device, F32, optimizer_info(make), skip=("differentiable",))
    assert {given.kwargs["fused"] for given in found} == {False, True}
    for given in found:
        line = Line(Subject(make, given.desc, given.kwargs, None, device))
        first = line.closure().item()
        line.step(2)
        line.assert_progress(first)


# --------------------------------------------------------------------------- schedulers


def chained(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


def sequential(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(
        optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 5)], milestones=[3]
    )


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, 8, cycle_momentum=False),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda o: SWALR(o, 0.001, anneal_epochs=4),
}
CYCLES = {
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, 8),
}


def rates_of(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


@needs_library
@every_device
@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_follow_the_scheduler(make, rate, name, device):
    """A step takes the rate that the scheduler has left, and the state resumes with both."""
    subject = Subject(make, name, {"lr": rate}, None, device)
    rate = subject.own()["lr"]
    line, twin = Line(subject, lr=rate), Line(subject, lr=0.01)
    scheduler = SCHEDULERS[name](line.optimizer)
    for step in range(7):
        twin.optimizer.param_groups[0]["lr"] = rates_of(line.optimizer)[0]
        line.step()
        twin.step()
        if step < 6:
            scheduler.step()
    assert_params_equal(line.params, twin.params, rtol=1e-6, atol=1e-7)
    other = Line(subject, lr=0.01)
    resumed = SCHEDULERS[name](other.optimizer)
    other.optimizer.load_state_dict(line.optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for own, its in ((line, scheduler), (other, resumed)):
        own.step()
        its.step()
    assert rates_of(other.optimizer) == pytest.approx(rates_of(line.optimizer))


@every_place
@pytest.mark.parametrize("name", CYCLES)
def test_momentum_may_cycle(fused, device, name):
    """Schedulers that know ``momentum`` change it in every group, each its own."""
    line = Line(
        Subject(AdaQN, name, {}, fused, device),
        lambda params: [{"params": params[0]}, {"params": params[1], "momentum": 0.5}],
    )
    first = line.closure().item()
    scheduler = CYCLES[name](line.optimizer)
    seen = set()
    for _ in range(7):
        line.step()
        scheduler.step()
        seen.add(line.optimizer.param_groups[1]["momentum"])
    assert len(seen) > 4
    line.assert_progress(first)


@both_kinds
def test_scheduler_knows_of_the_step(subject):
    """Torch warns where a scheduler is ahead of its optimizer, and only there."""
    line = Line(subject)
    scheduler = lr_scheduler.StepLR(line.optimizer, 3)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    line = Line(subject)
    scheduler = lr_scheduler.StepLR(line.optimizer, 3)
    line.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


@both_kinds
def test_a_scheduler_begins_where_another_ended(subject):
    """``last_epoch`` needs the ``initial_lr`` that comes with the state dict."""
    line = Line(subject, lr=0.1)
    scheduler = lr_scheduler.StepLR(line.optimizer, 2, 0.1)
    for _ in range(3):
        line.step()
        scheduler.step()
    twin = Line(subject, lr=0.1)
    with pytest.raises(KeyError, match="initial_lr"):
        lr_scheduler.StepLR(twin.optimizer, 2, 0.1, last_epoch=2)
    twin.optimizer.load_state_dict(line.optimizer.state_dict())
    resumed = lr_scheduler.StepLR(twin.optimizer, 2, 0.1, last_epoch=2)
    for own, its in ((line, scheduler), (twin, resumed)):
        own.step()
        its.step()
    assert rates_of(line.optimizer) == pytest.approx(rates_of(twin.optimizer))


@both_kinds
def test_plateaus_lower_the_rate(subject):
    line = Line(subject)
    scheduler = lr_scheduler.ReduceLROnPlateau(line.optimizer, factor=0.5, patience=1)
    before = rates_of(line.optimizer)[0]
    for _ in range(3):
        line.step()
        scheduler.step(1.0)
    assert rates_of(line.optimizer)[0] == pytest.approx(before / 2)
    assert scheduler.get_last_lr() == rates_of(line.optimizer)


@every_place
def test_a_group_that_joins_gets_its_rate_from_schedulers_made_later(fused, device):
    line = Line(Subject(AdaQN, "groups", {}, fused, device))
    scheduler = lr_scheduler.ExponentialLR(line.optimizer, 0.5)
    line.step()
    scheduler.step()
    late = Parameter(torch.ones(3, device=device))
    line.optimizer.add_param_group({"params": [late], "lr": 0.1, "initial_lr": 0.1})
    late.grad = torch.ones(3, device=device)
    line.optimizer.step()
    later = lr_scheduler.ExponentialLR(line.optimizer, 0.5)
    later.step()
    assert rates_of(line.optimizer)[1] == pytest.approx(0.05)


# --------------------------------------------------------------------------- averaged weights


@both_kinds
@pytest.mark.parametrize("anneal", ["linear", "cos"])
def test_swa_rates_anneal_in_every_group(subject, anneal):
    line = Line(subject, lr=0.02)
    scheduler = SWALR(line.optimizer, swa_lr=0.001, anneal_epochs=3, anneal_strategy=anneal)
    for _ in range(5):
        line.step()
        scheduler.step()
    assert rates_of(line.optimizer) == pytest.approx([0.001])
    line.optimizer.load_state_dict(line.optimizer.state_dict())
    assert line.optimizer.param_groups[0]["swa_lr"] == 0.001


@both_kinds
@pytest.mark.parametrize("kind", ["mean", "decay"])
def test_averaged_model(subject, kind):
    """Averages of what the optimizer, which writes in place, has made of the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(subject.device)
    x, target = (torch.randn(16, n, device=subject.device) for n in (3, 2))
    how = dict(multi_avg_fn=get_ema_multi_avg_fn(0.5)) if kind == "decay" else {}
    average = AveragedModel(model, **how)
    optimizer = subject.on(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        return loss

    seen = []
    for _ in range(4):
        advance(subject, optimizer, closure)
        average.update_parameters(model)
        seen.append([p.detach().clone() for p in model.parameters()])
    for k, p in enumerate(average.parameters()):
        expected = seen[0][k]
        for step in seen[1:]:
            expected = (expected + step[k]) / 2
        if kind == "mean":
            expected = torch.stack([step[k] for step in seen]).mean(0)
        torch.testing.assert_close(p.detach(), expected)
    update_bn([x], average)
    assert copy.deepcopy(average)(x).isfinite().all()


def test_every_difference_is_asked_for():
    assert set(DIFFERENCES) == ASKED
