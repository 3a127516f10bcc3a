"""Nothing silent: rounding, huge gradients, and what users change behind the optimizer's back."""

import copy
import pickle
import signal
from collections import defaultdict
from math import inf, prod

import pytest
import torch
from problems import assert_same, both_backends, plain_adaqn, random_parameters, set_gradients
from problems import snapshot as snapshot_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adaqn_cuda import AdaQN, ops
from adaqn_cuda.state.layout import Counter
from adaqn_cuda.watch import check_memory

F32, F64 = torch.float32, torch.float64
PAIRS = dict(init="rmsprop", history_size=3, update_interval=2, fisher_size=3)


def gradient(shape, rank, scale, seed, dtype=F64):
    """Of norm ``scale`` and, as a matrix, of at most ``rank``."""
    draw = torch.Generator().manual_seed(seed)
    rows = shape[0] if shape else 1
    columns = prod(shape[1:]) if len(shape) > 1 else 1
    left = torch.randn(rows, min(rank, rows, columns), generator=draw, dtype=F64)
    right = torch.randn(left.shape[1], columns, generator=draw, dtype=F64)
    g = (left @ right).reshape(shape)
    return (g * (scale / g.norm())).float().to(dtype)


def step_of(g, steps=1, **options):
    """What so many steps with this gradient move, over lr, and in float64."""
    p = nn.Parameter(torch.zeros_like(g))
    optimizer = AdaQN([p], lr=0.01, **options)
    for _ in range(steps):
        p.grad = g.clone()
        optimizer.step()
    return p.detach().double() / 0.01


def difference(mine, theirs):
    return ((mine - theirs).norm() / theirs.norm()).item()


# --------------------------------------------------------------------------- rounding

MATRICES = [(1, 7), (7, 1), (8, 6), (6, 8), (4, 3, 3, 3), (5,), (64,), (65,), (30, 30), (3, 700)]


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e-3, 1.0, 1e3, 1e10, 1e20, 1e37])
@pytest.mark.parametrize("rank", [1, 2, 30])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_the_first_step_is_the_same_in_float32_and_float64(shape, rank, scale):
    single, double = (step_of(gradient(shape, rank, scale, 1, dtype)) for dtype in (F32, F64))
    assert difference(single, double) < 1e-3


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e10])
@pytest.mark.parametrize("rank", [1, 2, 30])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_a_small_change_of_the_gradient_is_a_small_change_of_the_step(shape, rank, scale, dtype):
    g = gradient(shape, rank, scale, 1, dtype)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    disturbed = (g.double() + 1e-7 * scale * noise / noise.norm()).to(dtype)
    small = 1.5e-4 if dtype == F32 else 1e-4  # float32 rounds by about as much again
    assert difference(step_of(disturbed), step_of(g)) < small


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_constant_gradient_of_rank_one_moves_along_itself(scale, dtype):
    left, right = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    g = scale * torch.outer(left / left.norm(), right[:6] / right[:6].norm())
    moved, along = step_of(g.to(dtype), steps=300).flatten(), g.flatten() / g.norm()
    length = moved @ along
    assert length < -290
    small = 3e-3 if dtype == F32 else 1e-6  # where float32 has rounded g, it does move
    assert (moved - length * along).norm() < small * length.abs()


def test_the_loss_of_a_small_regression_does_not_rise_after_the_first_step():
    risen = 0
    for seed in range(60):
        torch.manual_seed(seed)
        x = torch.randn(32, 8)
        y = 100 * (x.sum(1, keepdim=True) + 3)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        optimizer = AdaQN(model.parameters(), lr=0.01)
        before = nn.functional.mse_loss(model(x), y)
        before.backward()
        optimizer.step()
        risen += nn.functional.mse_loss(model(x), y).item() > before.item()
    assert risen == 0


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_in_full_precision_whatever_torch_is_set_to(precision):
    g = gradient((30, 20), 3, 1.0, 1, F32)
    expected = step_of(g, steps=7)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(step_of(g, steps=7), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


# --------------------------------------------------------------------------- huge gradients

INITS = {
    "kronecker": {},
    "rmsprop": dict(init="rmsprop"),
    "no memory": dict(init="rmsprop", decay=0.0),
    "adagrad": dict(init="adagrad"),
    "pairs": PAIRS,
    "scalar": dict(PAIRS, init="scalar"),
    "both": dict(history_size=3, update_interval=2),
}


@both_backends
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("spike", [1e10, 2e19, 3e38])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("name", INITS)
def test_huge_finite_gradients_leave_parameters_finite(name, everywhere, spike, dtype, fused):
    p = nn.Parameter(torch.zeros(8, 6, dtype=dtype))
    optimizer = AdaQN([p], lr=0.01, fused=fused, **INITS[name])
    draw = torch.Generator().manual_seed(1)
    for step in range(20):
        p.grad = torch.randn(8, 6, generator=draw).to(dtype)
        if step in (6, 13):
            p.grad[(slice(None), slice(None)) if everywhere else (0, 0)] = spike
        optimizer.step()
        assert p.isfinite().all(), step
    assert optimizer.stats()["steps_skipped"] == 0


@pytest.mark.parametrize("spike", [1e10, 1e18, 1e25, 1e38])
def test_one_huge_entry_does_not_freeze_a_factored_block(spike):
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = AdaQN([p], lr=0.01)
    draw = torch.Generator().manual_seed(1)
    for step in range(200):
        p.grad = torch.randn(8, 6, generator=draw)
        if step == 12:
            p.grad[0, 0] = spike
        before = p.detach().clone()
        optimizer.step()
    assert ((p - before).abs() > 1e-5).all()


# --------------------------------------------------------------------------- no gradient


@both_backends
@pytest.mark.parametrize("name", INITS)
def test_steps_without_any_gradient_change_nothing(name, fused):
    params = random_parameters([(4, 3), (5,)])
    optimizer = AdaQN(params, weight_decay=0.1, fused=fused, **INITS[name])
    for step in range(5):
        set_gradients(params, step)
        optimizer.step()
    before = snapshot_of(optimizer)
    optimizer.zero_grad()
    for _ in range(4):
        optimizer.step()
    assert_same(snapshot_of(optimizer), before)


@both_backends
@pytest.mark.parametrize("name", INITS)
def test_frozen_parameters_stay_where_they_are(name, fused):
    params = random_parameters([(4, 3), (5,), (3, 3)])
    options = {**INITS[name], "update_interval": 3}  # an average of three equal numbers rounds
    optimizer = AdaQN(params, weight_decay=0.1, fused=fused, **options)
    if optimizer.defaults["history_size"]:
        losses = iter([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 9.0, 0.4, 0.3, 9.0])
        optimizer.monitor = lambda: next(losses, 0.1)
    for step in range(40):
        set_gradients(params, step)
        if step >= 8:
            params[0].grad = None
        if step == 8:
            frozen = params[0].detach().clone()
        optimizer.step()
    assert torch.equal(params[0].detach(), frozen)
    assert optimizer.monitor is None or optimizer.stats()["resets"] == 2


# --------------------------------------------------------------------------- dropped steps


@both_backends
@pytest.mark.parametrize("source", ["fisher", "gradients", "product", "difference"])
@pytest.mark.parametrize("init", ["rmsprop", "scalar", "kronecker"])
def test_a_dropped_step_on_which_pairs_are_due_changes_nothing(init, source, fused):
    (p,) = params = random_parameters([(4, 3)], F64)
    curvature = (lambda s: {p: 2 * s[p]}) if source == "product" else source
    losses = iter([1.0, 0.9, 0.8, 7.0])
    optimizer = AdaQN(
        params, init=init, history_size=3, update_interval=2, curvature=curvature, fused=fused,
        curvature_closure=lambda: p.square().sum(), monitor=lambda: next(losses, 0.1),
    )  # fmt: skip
    for step in range(7):
        set_gradients(params, step)
        optimizer.step()
    before = snapshot_of(optimizer)
    set_gradients(params, 7)
    p.grad[1, 1] = inf
    optimizer.step()
    after = snapshot_of(optimizer)
    assert optimizer.stats()["steps_skipped"] == 1 and optimizer.stats()["resets"] == 0
    for _, (entry,) in (before, after):
        del entry["calls"]
        entry["counters"][Counter.STEPS_SKIPPED] = 0
    assert_same(before, after)


@pytest.mark.parametrize(
    ("noise", "update_interval", "eigenvalues"),
    [
        (noise, interval, eigenvalues)
        for noise, eigenvalues in ((0.0, [0.01, 0.1, 1, 10]), (0.1, [1.0, 2, 3, 4]))
        for interval in (2, 10, 50)
    ],
)
def test_scalar_matrix_with_fisher_pairs_stays_finite(eigenvalues, update_interval, noise):
    """s.y / y.y grows without bound as the gradients vanish."""
    matrix = torch.tensor(eigenvalues)
    grown = 1.0
    draw = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(4, generator=draw))
    optimizer = AdaQN([p], lr=0.01, init="scalar", history_size=10, update_interval=update_interval)
    for _ in range(1500):
        p.grad = matrix * p.detach() + noise * torch.randn(4, generator=draw)
        optimizer.step()
        grown = max(grown, p.detach().norm().item())
    assert p.isfinite().all() and grown < 10


# --------------------------------------------------------------------------- replaced tensors


def train(optimizer, params, start, stop):
    for step in range(start, stop):
        set_gradients(params, step)
        optimizer.step()


def clone_state(optimizer, change):
    for entry in optimizer.state.values():
        for key, value in entry.items():
            change(entry, key, value)


CHANGES = {
    "item": lambda entry, key, value: entry.update({key: value.clone()}),
    "data": lambda entry, key, value: setattr(value, "data", value.clone()),
    "dtype": lambda entry, key, value: entry.update({key: value.double()}),
}


@both_backends
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", INITS)
def test_replaced_state_goes_into_steps_and_checkpoints(name, change, fused):
    mine, theirs = (random_parameters([(4, 3), (5,)]) for _ in range(2))
    a, b = (AdaQN(params, fused=fused, **INITS[name]) for params in (mine, theirs))
    for optimizer, params in ((a, mine), (b, theirs)):
        train(optimizer, params, 0, 5)
    clone_state(a, CHANGES[change])
    for optimizer, params in ((a, mine), (b, theirs)):
        train(optimizer, params, 5, 12)
    assert_same(snapshot_of(a), snapshot_of(b))
    resumed = AdaQN(theirs, fused=fused, **INITS[name])
    resumed.load_state_dict(a.state_dict())
    assert resumed._calls == 12


@both_backends
def test_state_that_is_emptied_begins_anew(fused):
    mine, theirs = (random_parameters([(4, 3), (5,)]) for _ in range(2))
    a = AdaQN(mine, fused=fused, **PAIRS)
    train(a, mine, 0, 5)
    a.state = defaultdict(dict)
    for p, q in zip(mine, theirs, strict=True):
        q.data = p.detach().clone()
    b = AdaQN(theirs, fused=fused, **PAIRS)
    for optimizer, params in ((a, mine), (b, theirs)):
        train(optimizer, params, 0, 5)
    assert_same(snapshot_of(a), snapshot_of(b))


@both_backends
@pytest.mark.parametrize("name", INITS)
def test_a_replaced_parameter_is_stepped_and_the_old_one_is_not(name, fused):
    params = random_parameters([(4, 3), (5,)])
    optimizer = AdaQN(params, fused=fused, **INITS[name])
    train(optimizer, params, 0, 9)
    old, new = params[0], nn.Parameter(torch.ones(2, 3))
    kept = old.detach().clone()
    optimizer.param_groups[0]["params"][0] = params[0] = new
    train(optimizer, params, 9, 20)
    assert torch.equal(old, kept) and not torch.equal(new, torch.ones(2, 3))
    assert old not in optimizer.state and optimizer.state[new]
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())


@both_backends
def test_parameters_put_in_and_taken_out_by_hand(fused):
    params = random_parameters([(4, 3), (5,)])
    optimizer = AdaQN(params, fused=fused, **INITS["both"])
    train(optimizer, params, 0, 6)
    params.append(nn.Parameter(torch.zeros(2)))
    optimizer.param_groups[0]["params"].append(params[2])
    train(optimizer, params, 6, 12)
    assert params[2].abs().min() > 0
    del params[0], optimizer.param_groups[0]["params"][0]
    train(optimizer, params, 12, 18)
    assert len(optimizer.state) == 2


@both_backends
def test_data_of_another_shape_is_refused(fused):
    params = random_parameters([(4, 3), (5,)])
    optimizer = AdaQN(params, fused=fused)
    train(optimizer, params, 0, 3)
    params[0].data = params[0].data.reshape(3, 4)
    set_gradients(params, 3)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="parameter 0"):
        optimizer.step()
    assert all(map(torch.equal, before, params))


@both_backends
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_given_twice_is_stepped_once(fused):
    ours, theirs = (random_parameters([(4, 3), (5,)]) for _ in range(2))
    a = AdaQN([ours[0], ours[1], ours[0]], fused=fused)
    b = AdaQN(theirs, fused=fused)
    for optimizer, params in ((a, ours), (b, theirs)):
        train(optimizer, params, 0, 4)
    assert_same(snapshot_of(a), snapshot_of(b))


@both_backends
def test_expanded_parameters_are_refused(fused):
    p = nn.Parameter(torch.zeros(1).expand(4))
    p.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="clone"):
        AdaQN([p], fused=fused).step()


@both_backends
def test_parameters_that_overlap_are_refused_and_others_of_one_storage_are_not(fused):
    base = torch.zeros(4, 6)
    for views, overlap in (((base[:3], base[2:]), True), ((base[:, ::2], base[:, 1::2]), False)):
        params = [nn.Parameter(view) for view in views]
        for p in params:
            p.grad = torch.ones_like(p)
        if overlap:
            with pytest.raises(RuntimeError, match="parameters 0, 1 share places in memory"):
                AdaQN(params, fused=fused).step()
            assert not base.any()
        else:
            AdaQN(params, fused=fused).step()
            assert base.all()


def test_a_part_of_a_tensor_needs_no_look_at_its_elements():
    """Which would take long where there are many, and is not possible without memory."""
    with FakeTensorMode():
        a, b, c = (torch.zeros(6, 10, 4) for _ in range(3))
        check_memory([nn.Parameter(p) for p in (a[:, :3], b[1:4, :, :2].mT, c[:, ::2, 1:])])


@both_backends
@pytest.mark.parametrize("name", INITS)
def test_a_module_may_change_its_dtype(name, fused):
    module = nn.Linear(3, 4)
    optimizer = AdaQN(module.parameters(), fused=fused, **INITS[name])
    params = list(module.parameters())
    train(optimizer, params, 0, 5)
    for change in (module.double, module.bfloat16, module.float):
        change()
        for p in params:
            p.grad = None
        train(optimizer, params, 5, 9)
        assert all(p.isfinite().all() for p in params)
    assert optimizer.state[params[0]]["counters"].dtype == torch.int64


# --------------------------------------------------------------------------- options


@both_backends
@pytest.mark.parametrize("name", ["rmsprop", "pairs", "both", "kronecker"])
def test_momentum_may_be_raised_from_zero(name, fused):
    """OneCycleLR and CyclicLR do."""
    params = random_parameters([(4, 3), (5,)])
    optimizer = AdaQN(params, fused=fused, **{**INITS[name], "momentum": 0.0})
    train(optimizer, params, 0, 6)
    optimizer.param_groups[0]["momentum"] = 0.9
    train(optimizer, params, 6, 12)
    assert optimizer.state[params[0]]["momentum"].abs().max() > 0
    saved = copy.deepcopy(optimizer.state_dict())
    twins = random_parameters([(4, 3), (5,)])
    for p, q in zip(params, twins, strict=True):
        q.data = p.detach().clone()
    resumed = AdaQN(twins, fused=fused, **{**INITS[name], "momentum": 0.0})
    resumed.load_state_dict(saved)
    for o, own in ((optimizer, params), (resumed, twins)):
        train(o, own, 12, 15)
        o.param_groups[0]["momentum"] = 0.0
        train(o, own, 15, 18)
        o.param_groups[0]["momentum"] = 0.5
        train(o, own, 18, 20)
    assert_same(snapshot_of(optimizer), snapshot_of(resumed))


STRUCTURAL = dict(
    history_size=5, fisher_size=7, init="adagrad", curvature="gradients", block_size=3,
    max_vector_dim=2, history_dtype=torch.bfloat16, fisher_dtype=torch.bfloat16,
)  # fmt: skip


@both_backends
@pytest.mark.parametrize("option", [*STRUCTURAL, "decay", "lr", "eps"])
def test_options_that_cannot_change_are_refused_before_anything_is_written(option, fused):
    params = random_parameters([(4, 3), (5,)])
    optimizer = AdaQN(params, fused=fused, **PAIRS)
    train(optimizer, params, 0, 5)
    before = snapshot_of(optimizer)
    good = optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = STRUCTURAL.get(option, -1.0)
    set_gradients(params, 5)
    with pytest.raises((RuntimeError, ValueError), match=option):
        optimizer.step()
    optimizer.param_groups[0][option] = good
    assert_same(snapshot_of(optimizer), before)
    optimizer.step()


@both_backends
def test_a_common_option_changed_in_one_group_only_is_refused(fused):
    params = random_parameters([(4, 3), (5,)])
    optimizer = AdaQN([{"params": [p]} for p in params], fused=fused)
    train(optimizer, params, 0, 2)
    optimizer.param_groups[1]["max_grad_norm"] = 0.5
    set_gradients(params, 2)
    with pytest.raises(ValueError, match="max_grad_norm"):
        optimizer.step()


@both_backends
@pytest.mark.parametrize("name", INITS)
def test_a_warm_up_from_zero_counts_the_same_by_value_and_as_a_tensor(name, fused):
    ends = []
    for lr in (0.01, torch.tensor(0.01, dtype=F64)):
        params = random_parameters([(4, 3), (5,)])
        optimizer = AdaQN(params, lr=lr, fused=fused, **INITS[name])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(t / 5, 1))
        for step in range(12):
            set_gradients(params, step)
            optimizer.step()
            schedule.step()
            optimizer.state_dict()  # a look at the state is none at the schedule
        ends.append(snapshot_of(optimizer))
        assert optimizer._calls == 12
    assert_same(*ends)


# --------------------------------------------------------------------------- loading


def test_state_dicts_of_other_optimizers_are_refused_with_what_was_found():
    params = random_parameters([(4, 3)])
    adam = torch.optim.Adam(params)
    for _ in range(2):
        with pytest.raises(ValueError, match="another optimizer.*betas.*expected.*history_size"):
            AdaQN(params).load_state_dict(adam.state_dict())
        set_gradients(params, 0)
        adam.step()
    for broken in ({}, {"state": {}}, None, {"state": {}, "param_groups": [{}]}):
        with pytest.raises(ValueError, match="state_dict"):
            AdaQN(params).load_state_dict(broken)


@pytest.mark.parametrize("option", sorted(AdaQN([torch.zeros(1)]).defaults) + ["blocks"])
def test_an_option_that_an_older_version_did_not_save_is_filled_in(option):
    params = random_parameters([(4, 3)])
    optimizer = AdaQN(params, **PAIRS)
    train(optimizer, params, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0][option]
    other = AdaQN(params, **PAIRS)
    other.load_state_dict(saved)
    assert other.param_groups[0][option] == optimizer.param_groups[0][option]
    train(other, params, 3, 5)


@pytest.mark.parametrize("stepped", [False, True])
def test_options_in_a_state_dict_are_checked(stepped):
    params = random_parameters([(4, 3)])
    optimizer = AdaQN(params)
    train(optimizer, params, 0, 2 * stepped)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["momentum"] = 7.0
    with pytest.raises(ValueError, match="momentum"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["momentum"] == 0.8


def test_counters_that_point_outside_the_rings_are_refused():
    params = random_parameters([(4, 3)])
    optimizer = AdaQN(params, **PAIRS)
    train(optimizer, params, 0, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["counters"][1] = 99
    with pytest.raises(ValueError, match="OLDEST_PAIR"):
        AdaQN(params, **PAIRS).load_state_dict(saved)


# --------------------------------------------------------------------------- interrupts


def interrupting(monkeypatch, name, when, action):
    """Let ``action`` happen before or after the operation ``name``."""
    for namespace in (ops._DISPATCHED, ops._REFERENCE):
        operation = getattr(namespace, name)

        def wrapped(*arguments, operation=operation):
            if when == "before":
                action()
            operation(*arguments)
            if when == "after":
                action()

        monkeypatch.setattr(namespace, name, wrapped)


@both_backends
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", [n for n in ops.SCHEMAS if not n.startswith("secant")])
@pytest.mark.parametrize("name", ["kronecker", "rmsprop", "scalar", "both"])
def test_an_interrupt_waits_until_the_step_is_whole(name, operation, when, fused, monkeypatch):
    """Or, where a function of the user's is about to be called, until nothing has changed yet."""
    params, twins = (random_parameters([(4, 3), (5,)]) for _ in range(2))
    a, b = (AdaQN(ps, fused=fused, **INITS[name]) for ps in (params, twins))
    if a.defaults["history_size"]:
        a.monitor = b.monitor = lambda: 1.0
    for optimizer, ps in ((a, params), (b, twins)):
        train(optimizer, ps, 0, 5)
        set_gradients(ps, 5)
    before = snapshot_of(a)
    b.step()
    hits = []

    def action():
        hits.append(operation)
        signal.raise_signal(signal.SIGINT)

    interrupting(monkeypatch, operation, when, action)
    try:
        a.step()
        assert not hits
    except KeyboardInterrupt:
        assert hits
    observing = a.monitor is not None and operation in ("direction_pass1", "iterate_swap")
    assert_same(snapshot_of(a), before if observing else snapshot_of(b))


@both_backends
def test_an_exception_after_the_swap_leaves_no_average(fused, monkeypatch):
    params = random_parameters([(4, 3)])
    optimizer = plain_adaqn(params, update_interval=3, fused=fused)
    optimizer.monitor = lambda: 1.0
    train(optimizer, params, 0, 5)
    before = snapshot_of(optimizer)
    set_gradients(params, 5)

    def raising():
        raise KeyboardInterrupt

    interrupting(monkeypatch, "iterate_swap", "after", raising)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert_same(snapshot_of(optimizer), before)


@both_backends
def test_an_interrupt_reaches_a_monitor_at_once(fused):
    params = random_parameters([(4, 3)])
    optimizer = plain_adaqn(params, update_interval=3, fused=fused)
    reached = []

    def monitor():
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
        return 1.0

    optimizer.monitor = monitor
    train(optimizer, params, 0, 2)
    before = snapshot_of(optimizer)
    set_gradients(params, 2)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert not reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(snapshot_of(optimizer), before)


@both_backends
def test_a_step_that_failed_halfway_says_so(fused, monkeypatch):
    params = random_parameters([(4, 3)])
    optimizer = AdaQN(params, history_size=2, fused=fused)
    train(optimizer, params, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())

    def raising():
        raise MemoryError

    with monkeypatch.context() as patch:
        interrupting(patch, "direction_pass3", "before", raising)
        set_gradients(params, 2)
        with pytest.raises(MemoryError):
            optimizer.step()
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="halfway.*load"):
            call()
    optimizer.load_state_dict(saved)
    optimizer.step()


# --------------------------------------------------------------------------- where one steps


@pytest.mark.parametrize("name", INITS)
def test_a_step_under_a_default_device_and_in_inference_mode(name):
    ends = []
    for context in (None, torch.device("meta"), torch.inference_mode()):
        params = random_parameters([(4, 3), (5,)])
        optimizer = AdaQN(params, **INITS[name])
        for step in range(6):
            set_gradients(params, step)
            if context is None or step % 2:
                optimizer.step()
            else:
                with context:
                    optimizer.step()
        ends.append(snapshot_of(optimizer))
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


@pytest.mark.parametrize("name", INITS)
def test_meta_parameters_tell_their_bytes_and_step(name):
    shapes = [(40, 30), (5,)]
    meta = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer = AdaQN(meta, **INITS[name])
    real = AdaQN(random_parameters(shapes), **INITS[name])
    assert optimizer.stats()["state_bytes"] == real.stats()["state_bytes"]
    assert "bytes per parameter" in repr(optimizer)
    for p in meta:
        p.grad = torch.empty_like(p)
    optimizer.step()


# --------------------------------------------------------------------------- found by programs


def continued(optimizer, fresh_params):
    """What a fresh optimizer that has loaded the state makes of the next steps."""
    copies = [nn.Parameter(p.detach().clone()) for p in fresh_params]
    fresh = AdaQN(copies)
    fresh.load_state_dict(optimizer.state_dict())
    train(fresh, copies, 40, 46)
    return copies


@both_backends
def test_an_entry_that_was_only_looked_at_is_no_state(fused):
    """Torch's state is a defaultdict."""
    params = random_parameters([(2, 3), (3,)])
    optimizer = AdaQN(params, fused=fused)
    assert optimizer.state[params[1]] == {}
    expected = continued(optimizer, params)
    train(optimizer, params, 40, 46)
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0), ("lr", float("nan")), ("lr", torch.ones(2)),
        ("weight_decay", torch.ones(2)), ("momentum", torch.ones(2)), ("bias_correction", 1),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name_whenever_it_comes(name, value):
    params = random_parameters([(2, 3)])
    optimizer = AdaQN(params)
    train(optimizer, params, 0, 3)
    before = snapshot_of(optimizer)
    old, optimizer.param_groups[0][name] = optimizer.param_groups[0][name], value
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected "):
        train(optimizer, params, 3, 4)
    assert_same(snapshot_of(optimizer), before)
    optimizer.param_groups[0][name] = old
    train(optimizer, params, 3, 4)


@pytest.mark.parametrize("stepped", [False, True])
def test_a_group_that_joins_has_the_options_of_now(stepped):
    params = random_parameters([(2, 3), (3,)])
    optimizer = AdaQN(params[:1], max_grad_norm=0.5)
    train(optimizer, params[:1], 0, 3 * stepped)
    optimizer.param_groups[0]["max_grad_norm"] = 0.3
    optimizer.add_param_group({"params": params[1:]})
    train(optimizer, params, 3, 6)
    assert optimizer.param_groups[1]["max_grad_norm"] == 0.3


def replace(optimizer, params):
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3, 2))


def append(optimizer, params):
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(3, 2)))


def remove(optimizer, params):
    del optimizer.param_groups[0]["params"][0]


def forget(optimizer, params):
    del optimizer.state[params[1]]


@both_backends
@pytest.mark.parametrize("change", [replace, append, remove, forget])
@pytest.mark.parametrize("init", ["rmsprop", "kronecker"])
def test_copies_and_checkpoints_know_what_was_replaced(init, change, fused):
    """As soon as it was, before any step."""
    params = random_parameters([(2, 3), (3,)])
    optimizer = AdaQN(params, **{**PAIRS, "init": init}, fused=fused)
    train(optimizer, params, 0, 8)
    assert optimizer.stats()["pairs"]
    change(optimizer, params)
    assert "State: " in repr(optimizer)
    twin = copy.deepcopy(optimizer)
    now, theirs = (o.param_groups[0]["params"] for o in (optimizer, twin))
    expected = continued(optimizer, now)
    train(optimizer, now, 40, 46)
    train(twin, theirs, 40, 46)
    for p, q, r in zip(now, theirs, expected, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


@both_backends
def test_a_group_may_join_after_a_parameter_was_put_in_by_hand(fused):
    params = random_parameters([(2, 3), (3,)])
    optimizer = AdaQN(params[:1], fused=fused)
    train(optimizer, params[:1], 0, 3)
    append(optimizer, params)
    optimizer.add_param_group({"params": params[1:]})
    train(optimizer, [p for g in optimizer.param_groups for p in g["params"]], 3, 6)


@both_backends
@pytest.mark.parametrize("history_size", [0, 3])
@pytest.mark.parametrize("init", ["rmsprop", "kronecker"])
def test_a_gradient_whose_square_overflows_gives_no_nan(init, history_size, fused):
    params = random_parameters([(2, 3), (3,)], F64)
    optimizer = AdaQN(params, **{**PAIRS, "init": init, "history_size": history_size}, fused=fused)
    train(optimizer, params, 0, 6)
    for p in params:
        p.grad = torch.full_like(p, 1e307)
    optimizer.step()
    train(optimizer, params, 6, 9)
    assert all(p.isfinite().all() for p in params)


def test_an_entry_of_a_parameter_that_has_gone_goes_too():
    params = random_parameters([(2, 3), (3,)])
    optimizer = AdaQN(params)
    assert optimizer.state[params[0]] == {}
    replace(optimizer, params)
    now = optimizer.param_groups[0]["params"]
    train(optimizer, now, 0, 1)
    assert set(optimizer.state) == set(now)
    optimizer.state_dict()


# --------------------------------------------------------------------------- what readers found


def test_gradients_that_have_grown_beyond_all_measure_are_followed():
    """The divisor of an outlier must not overflow, which would make zeros of all that follow."""
    draw = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(3, 3))
    optimizer = AdaQN([p], lr=1.0)
    for step in range(30):
        p.grad = torch.randn(3, 3, generator=draw) * (1e-18 if step < 5 else 1e32)
        before = p.detach().clone()
        optimizer.step()
    assert (p - before).norm() > 0.1


@both_backends
def test_a_parameter_that_is_unfrozen_makes_no_false_pair(fused):
    """The change of its averaged gradient is from nothing, that of its iterate is none."""
    a, b = params = [nn.Parameter(torch.tensor([x], dtype=F64)) for x in (3.0, 5.0)]
    optimizer = plain_adaqn(
        params, init="scalar", curvature="gradients", update_interval=1, history_size=3,
        min_curvature=0.0, lr=0.1, fused=fused,
    )  # fmt: skip
    for step in range(15):
        a.grad = a.detach().clone()
        b.grad = b.detach().clone() if step >= 4 else None
        optimizer.step()
    assert 0 < b.item() < 3


def test_blocks_follow_their_parameters():
    a, b, c = random_parameters([(8, 3), (6, 3), (6, 3)])
    optimizer = AdaQN([a, b], blocks={a: 4})
    train(optimizer, [a, b], 0, 2)
    optimizer.param_groups[0]["params"] = [b, a]
    train(optimizer, [b, a], 2, 4)
    assert optimizer.param_groups[0]["blocks"] == [1, 4]
    optimizer.param_groups[0]["params"] = [c, a]
    train(optimizer, [c, a], 4, 6)
    assert optimizer.state[a]["factors"].shape == (4 * (2 * 2 + 3 * 3),)
    for changed in ([1, 2], {a: 2}):
        optimizer.param_groups[0]["blocks"] = changed
        with pytest.raises(RuntimeError, match="blocks"):
            train(optimizer, [c, a], 6, 7)


def test_an_inherited_precision_stays_inherited():
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    try:
        step_of(gradient((5, 4), 2, 1.0, 0, F32))
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


def test_a_look_at_a_loaded_state_does_not_change_its_count():
    (p,) = random_parameters([(4, 3)])
    optimizer = AdaQN([p])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["state"][0]["calls"] == 1
    other = AdaQN([p])
    other.load_state_dict(saved)
    assert other.state_dict()["state"][0]["calls"] == 1


def test_options_that_a_state_dict_lacks_stay_as_they_are():
    (p,) = random_parameters([(4, 3)])
    optimizer = AdaQN([p], blocks={p: 2})
    saved = optimizer.state_dict()
    for option in ("decay", "blocks"):
        del saved["param_groups"][0][option]
    optimizer.param_groups[0]["decay"] = 0.9
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["decay"] == 0.9
    assert optimizer.param_groups[0]["blocks"] == [2]


def test_a_handler_that_a_monitor_installs_stays():
    params = random_parameters([(4, 3)])
    optimizer = plain_adaqn(params, update_interval=1)

    def handler(*_):
        raise AssertionError

    optimizer.monitor = lambda: float(signal.signal(signal.SIGINT, handler) is not None)
    try:
        train(optimizer, params, 0, 1)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_group_without_options_is_refused_by_name():
    params = random_parameters([(4, 3), (5,)])
    optimizer = AdaQN(params[:1])
    train(optimizer, params[:1], 0, 1)
    optimizer.param_groups.append({"params": params[1:], "lr": 0.1})
    set_gradients(params, 1)
    with pytest.raises((TypeError, ValueError), match="weight_decay"):
        optimizer.step()


def test_a_parameter_put_in_before_the_first_step_is_copied_and_saved():
    first, second = random_parameters([(4, 3), (5, 2)])
    optimizer = AdaQN([first])
    optimizer.param_groups[0]["params"].append(second)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert len(other.param_groups[0]["blocks"]) == 2
