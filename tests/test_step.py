"""What users of torch.optim expect: arguments, dtypes, closures, monitors, loss scaling."""

import copy

import pytest
import torch
from problems import (
    PLAIN,
    assert_same,
    both_backends,
    plain_adaqn,
    random_parameters,
    set_gradients,
    snapshot,
)
from torch import nn

from adaqn_cuda import PAPER, AdaQN
from adaqn_cuda.state.arena import Sizes
from adaqn_cuda.state.layout import Counter


def run(params, steps, start=0, **options):
    optimizer = options.pop("optimizer", None) or plain_adaqn(params, **options)
    for step in range(start, start + steps):
        set_gradients(params, step)
        optimizer.step()
    return optimizer


# --------------------------------------------------------------------------- options


def test_paper_settings():
    expected = dict(
        lr=0.01, history_size=10, fisher_size=100, update_interval=20, init="rmsprop", decay=0.9,
        eps=2**-26, min_curvature=1e-4, max_increase=1.01,
    )  # fmt: skip
    assert expected.items() <= PAPER.items()
    AdaQN(random_parameters([(2,)]), **PAPER)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("lr", torch.tensor([0.1, 0.2])),
        ("lr", torch.tensor(-0.1)),
        ("lr", "fast"),
        ("weight_decay", -0.1),
        ("weight_decay", float("nan")),
        ("history_size", -1),
        ("history_size", -1),
        ("history_size", 2.5),
        ("history_size", True),
        ("fisher_size", 0),
        ("update_interval", 0),
        ("update_interval", "often"),
        ("init", "identity"),
        ("init", None),
        ("decay", 1.0),
        ("decay", -0.1),
        ("decay", torch.tensor(0.9)),
        ("eps", 0.0),
        ("eps", -1e-8),
        ("min_curvature", -1e-4),
        ("min_curvature", float("nan")),
        ("max_increase", 0.99),
        ("max_increase", float("nan")),
        ("maximize", "yes"),
        ("history_dtype", torch.float16),
        ("fisher_dtype", torch.int8),
        ("monitor", 3.0),
        ("differentiable", True),
        ("fused", "maybe"),
    ],
)
def test_bad_option_is_named(name, value):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=name):
        plain_adaqn(random_parameters([(2,)]), **{name: value})


def test_options_of_groups_are_checked():
    a, b = random_parameters([(2,), (3,)])
    plain_adaqn([{"params": [a], "lr": 0.1, "weight_decay": 0.2}, {"params": [b], "decay": 0.5}])
    with pytest.raises(ValueError, match="decay: expected.*1.5"):
        plain_adaqn([{"params": [a]}, {"params": [b], "decay": 1.5}])
    with pytest.raises(ValueError, match="lr"):
        plain_adaqn([{"params": [a]}, {"params": [b], "lr": -1}])


def test_rejects_parameters_it_cannot_train():
    with pytest.raises(ValueError, match="empty"):
        plain_adaqn([])
    with pytest.raises(TypeError, match="params"):
        plain_adaqn(torch.zeros(3))
    with pytest.raises(TypeError, match="int64"):
        plain_adaqn([torch.zeros(3, dtype=torch.int64)])


def test_named_parameters_are_accepted():
    model = nn.Linear(3, 2)
    optimizer = plain_adaqn(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_fused_true_tells_what_is_missing():
    from adaqn_cuda.ops import native_obstacle

    if native_obstacle(torch.device("cpu")) is None:
        pytest.skip("native kernels are there")
    with pytest.raises(RuntimeError, match="fused"):
        plain_adaqn(random_parameters([(2,)]), fused=True)


# --------------------------------------------------------------------------- rates


def test_groups_take_their_own_rates():
    """Two groups of one vector equal two vectors stepped with their own rates."""
    a, b = random_parameters([(4,), (5,)], torch.float64)
    optimizer = plain_adaqn(
        [{"params": [a], "lr": 0.1}, {"params": [b], "weight_decay": 0.5}], lr=0.01, init="scalar"
    )
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    old_a, old_b = a.detach().clone(), b.detach().clone()
    optimizer.step()
    torch.testing.assert_close(a.detach(), old_a - 0.1)
    torch.testing.assert_close(b.detach(), old_b * (1 - 0.01 * 0.5) - 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_rates_equal_floats(dtype):
    ours, theirs = (random_parameters([(4,), (5,)], torch.float64) for _ in range(2))
    a = plain_adaqn(
        [{"params": ours[:1]}, {"params": ours[1:], "lr": torch.tensor([0.25], dtype=dtype)}],
        lr=0.125, weight_decay=torch.tensor(0.5, dtype=dtype), update_interval=2,
    )  # fmt: skip
    b = plain_adaqn(
        [{"params": theirs[:1]}, {"params": theirs[1:], "lr": 0.25}],
        lr=0.125, weight_decay=0.5, update_interval=2,
    )  # fmt: skip
    run(ours, 8, optimizer=a)
    run(theirs, 8, optimizer=b)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_scheduler_drives_lr():
    params = random_parameters([(4,)])
    optimizer = plain_adaqn(params, lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    run(params, 1, optimizer=optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_maximize_is_descent_on_the_negative():
    ours, theirs = (random_parameters([(6,)], torch.float64) for _ in range(2))
    a, b = (
        plain_adaqn(ours, maximize=True, update_interval=2),
        plain_adaqn(theirs, update_interval=2),
    )
    for step in range(9):
        set_gradients(theirs, step)
        ours[0].grad = -theirs[0].grad
        a.step()
        b.step()
    assert torch.equal(*ours, *theirs)


# --------------------------------------------------------------------------- gradients


@both_backends
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_parameters_without_gradient_stand_still(momentum, fused):
    """A step is P H P q on those that have one, H of the pairs with what all of them did."""
    params = random_parameters([(3,), (4,), (2,)], torch.float64)
    options = dict(history_size=3, update_interval=2, momentum=momentum, eps=0.1)
    optimizer = plain_adaqn(params, lr=0.1, weight_decay=0.1, fused=fused, **options)
    for step in range(24):
        set_gradients(params, step)
        standing = [] if step < 6 else [[1], [0, 2], [2]][step % 3]
        for index in standing:
            params[index].grad = None
        before = copy.deepcopy([(p.detach(), optimizer.state.get(p, {})) for p in params])
        optimizer.step()
        for index in standing:
            w, entry = before[index]
            assert torch.equal(params[index], w)
            for key in {"accumulator", "momentum"} & entry.keys():
                assert torch.equal(optimizer.state[params[index]][key], entry[key]), key
        state = optimizer.state[params[0]]
        if momentum:  # s_i.m is kept as numbers, whichever part of m has moved
            rows = [state_of["s_ring"].flatten(1) for state_of in map(optimizer.state.get, params)]
            m = [optimizer.state[p]["momentum"].flatten() for p in params]
            pairs = [
                (int(state["counters"][Counter.OLDEST_PAIR]) + i) % 4
                for i in range(optimizer.stats()["pairs"])
            ]
            expected = (torch.cat(rows, 1) @ torch.cat(m))[pairs]
            torch.testing.assert_close(state["moments"][pairs], expected, rtol=1e-9, atol=1e-12)
    assert optimizer.stats()["stored"] > 3


def test_step_without_any_gradient_changes_nothing():
    params = random_parameters([(3,)])
    before = params[0].detach().clone()
    plain_adaqn(params).step()
    assert torch.equal(params[0].detach(), before)


def test_sparse_gradient_is_refused_before_anything_changes():
    params = random_parameters([(3, 2), (4,)])
    optimizer = run(params, 5, update_interval=2)
    before = snapshot(optimizer)
    set_gradients(params, 5)
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_gradient_layout_does_not_matter():
    """Strided gradients and parameters equal contiguous ones."""
    (dense,) = random_parameters([(6, 4)], torch.float64)
    strided = nn.Parameter(dense.detach().t().contiguous().t())
    assert not strided.is_contiguous()
    a, b = plain_adaqn([dense], update_interval=2), plain_adaqn([strided], update_interval=2)
    for step in range(9):
        set_gradients([dense], step)
        strided.grad = dense.grad.clone(memory_format=torch.contiguous_format)
        a.step()
        b.step()
    assert torch.equal(dense.detach(), strided.detach())


# --------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_float32_state(dtype):
    """Each step rounds once: the same as a float32 step from the rounded parameters."""
    low = random_parameters([(5, 3), (7,)], dtype)
    high = [nn.Parameter(p.detach().float()) for p in low]
    a, b = plain_adaqn(low, update_interval=3), plain_adaqn(high, update_interval=3)
    for step in range(12):
        set_gradients(low, step)
        for p, q in zip(low, high, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
        for p, q in zip(low, high, strict=True):
            q.data.copy_(q.to(dtype))
            assert torch.equal(p.float(), q)
    assert {a.state[p]["accumulator"].dtype for p in low} == {torch.float32}


def test_complex_parameters_count_as_pairs_of_real_ones():
    z = nn.Parameter(torch.randn(5, 2, dtype=torch.complex128))
    x = nn.Parameter(torch.view_as_real(z.detach()).clone())
    a, b = plain_adaqn([z], update_interval=2), plain_adaqn([x], update_interval=2)
    for step in range(9):
        set_gradients([x], step)
        z.grad = torch.view_as_complex(x.grad.clone()).conj().resolve_conj().conj()
        a.step()
        b.step()
    assert torch.equal(torch.view_as_real(z.detach()), x.detach())


def test_mixed_dtypes_share_the_widest_state():
    params = random_parameters([(3,)], torch.float32) + random_parameters([(2,)], torch.float64)
    params += random_parameters([(4,)], torch.bfloat16) + random_parameters([(), (0, 3)])
    optimizer = run(params, 12, update_interval=3)
    assert {optimizer.state[p]["anchor"].dtype for p in params} == {torch.float64}
    assert all(p.isfinite().all() for p in params)


# --------------------------------------------------------------------------- closures and monitors


def test_closure_is_called_once_with_gradients():
    (w,) = random_parameters([(3,)])
    optimizer, calls = plain_adaqn([w]), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        return loss

    expected = (w.detach() ** 2).sum()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert torch.equal(loss.detach(), expected)


def test_monitor_sees_the_average_at_every_interval():
    (w,) = random_parameters([(3,)], torch.float64)
    seen, iterates = [], []

    def monitor():
        assert not torch.is_grad_enabled()
        seen.append(w.detach().clone())
        return 1.0

    optimizer = plain_adaqn([w], update_interval=4, monitor=monitor)
    for step in range(9):
        iterates.append(w.detach().clone())
        set_gradients([w], step)
        optimizer.step()
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], torch.stack(iterates[:4]).mean(0))
    torch.testing.assert_close(seen[1], torch.stack(iterates[4:8]).mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outcome", [KeyError("broken"), "not a loss", torch.ones(2), None])
def test_failing_monitor_leaves_no_trace(dtype, outcome):
    params = random_parameters([(3,), (2, 2)], dtype)
    optimizer = run(params, 7, update_interval=4)

    def monitor():
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    optimizer.monitor = monitor
    set_gradients(params, 7)
    before = snapshot(optimizer)
    with pytest.raises((KeyError, TypeError)):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    twin_params = random_parameters([(3,), (2, 2)], dtype)
    run(twin_params, 8, update_interval=4)
    optimizer.monitor = None
    optimizer.step()
    for p, q in zip(params, twin_params, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("wrap", [float, torch.tensor, lambda x: torch.tensor([x]).half()])
def test_growing_loss_resets_to_the_anchor(wrap):
    params = random_parameters([(3,)])
    losses = iter([1.0, 0.5, 2.0])
    optimizer = run(params, 5, update_interval=2, monitor=lambda: wrap(next(losses)))
    anchor = optimizer.state[params[0]]["anchor"].clone()
    run(params, 1, start=5, optimizer=optimizer)
    stats = optimizer.stats()
    assert (stats["resets"], stats["pairs"], stats["gradients"]) == (1, 0, 0)
    assert stats["monitored_loss"] == 2.0
    assert torch.equal(params[0].detach(), anchor)


def test_non_finite_monitored_loss_resets():
    params = random_parameters([(3,)])
    losses = iter([1.0, float("nan"), float("inf")])
    optimizer = run(params, 6, update_interval=2, monitor=lambda: next(losses))
    assert optimizer.stats()["resets"] == 2


def test_without_monitor_there_are_no_resets():
    params = random_parameters([(3,)])
    stats = run(params, 40, update_interval=2).stats()
    assert stats["resets"] == 0
    assert stats["stored"] + stats["skipped"] == 19
    assert stats["monitored_loss"] is None


# --------------------------------------------------------------------------- loss scaling


def test_scaled_gradients_are_unscaled_and_overflow_is_dropped():
    plain, scaled = (random_parameters([(4,)]) for _ in range(2))
    a, b = plain_adaqn(plain, update_interval=2), plain_adaqn(scaled, update_interval=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(10):
        set_gradients(plain, step)
        scaler.scale(torch.zeros(()))  # creates the scale tensor
        scaled[0].grad = plain[0].grad * scaler.get_scale()
        if step == 5:
            scaled[0].grad[1] = torch.inf
            plain[0].grad[1] = torch.inf
        a.step()
        scaler.step(b)
        scaler.update()
    assert torch.equal(plain[0], scaled[0])
    assert b.stats()["steps_skipped"] == 1


def test_closure_under_grad_scaler_is_refused():
    params = random_parameters([(4,)])
    optimizer = plain_adaqn(params)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="(?i)closure"):
        scaler.step(optimizer, lambda: torch.zeros(()))


# --------------------------------------------------------------------------- groups and stats


def test_group_added_during_training_joins_the_curvature():
    """Rows of the old parameters stay; the new ones start from zeros and keep the old dynamics."""
    old, new = random_parameters([(4,), (3,)], torch.float64)
    optimizer = run([old], 14, update_interval=3)  # two iterates into an interval
    before = {k: v.clone() for k, v in optimizer.state[old].items()}
    optimizer.add_param_group({"params": [new], "lr": 0.5})
    for name, tensor in optimizer.state[old].items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert not optimizer.state[new]["s_ring"].any()
    assert torch.equal(optimizer.state[new]["anchor"], new.detach())
    assert torch.equal(optimizer.state[new]["iterate_sum"], 2 * new.detach())
    run([old, new], 9, start=14, optimizer=optimizer)
    assert old.isfinite().all() and new.isfinite().all()


def test_failed_add_param_group_changes_nothing():
    (old,) = random_parameters([(4,)])
    optimizer = run([old], 5)
    before = snapshot(optimizer)
    for bad in (
        {"params": [torch.zeros(2, dtype=torch.int32)]},
        {"params": random_parameters([(2,)]), "init": "scalar"},
        {"params": [torch.zeros(2, device="meta")]},
        {"params": [old]},
    ):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == 1
    assert_same(snapshot(optimizer), before)


def test_parameters_on_several_devices_are_refused():
    params = [*random_parameters([(2,)]), nn.Parameter(torch.zeros(2, device="meta"))]
    optimizer = plain_adaqn(params)
    set_gradients(params[:1], 0)
    with pytest.raises(ValueError, match="cpu, meta"):
        optimizer.step()


def test_state_holds_views_and_tells_its_bytes():
    params = random_parameters([(4, 2), (3,)])
    optimizer = plain_adaqn(params, history_size=3, fisher_size=5)
    announced = optimizer.stats()["state_bytes"]
    assert f"{announced:,} bytes" in repr(optimizer)
    run(params, 2, optimizer=optimizer)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for p in params
        for name, t in optimizer.state[p].items()
        if name != "calls"
    }
    a = optimizer._arena
    scratch = (a.direction, a.projections, a.images, a.weights, a.column)
    assert announced == sum(storages.values()) + sum(t.nbytes for t in scratch)
    assert optimizer.state[params[0]]["s_ring"].shape == (4, 4, 2)
    assert optimizer.state[params[1]]["fisher"].shape == (5, 3)
    optimizer.state[params[1]]["anchor"].fill_(7)
    assert (a.anchor[8:] == 7).all()


@pytest.mark.parametrize("d", [1, 7, 8, 33, 4097])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_rows_of_rings_begin_at_16_bytes(dtype, d):
    """Whatever the number of parameters; else the CUDA kernels would take them one by one."""
    params = random_parameters([(d,)])
    optimizer = plain_adaqn(params, history_dtype=dtype, fisher_dtype=dtype)
    set_gradients(params, 0)
    optimizer.step()
    for name in ("s_ring", "y_ring", "fisher"):
        rows = getattr(optimizer._arena, name)
        assert rows.shape[1] == d and len(rows) > 1
        assert all((row.data_ptr() - rows.data_ptr()) % 16 == 0 for row in rows)


def test_bfloat16_rings_take_half_the_bytes():
    params = random_parameters([(1000,)])
    full = Sizes.of(params, PLAIN, None, False).bytes()
    halved = {**PLAIN, "history_dtype": torch.bfloat16, "fisher_dtype": torch.bfloat16}
    half = Sizes.of(params, halved, None, False).bytes()
    assert full - half == 1000 * 2 * (22 + 32)


def test_repr_lists_options_and_backend():
    text = repr(plain_adaqn(random_parameters([(2,)]), lr=0.125))
    assert "lr: 0.125" in text and "Backend: " in text and text.endswith(")")


def test_hooks_run():
    params = random_parameters([(2,)])
    optimizer, calls = plain_adaqn(params), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    run(params, 1, optimizer=optimizer)
    assert calls == ["pre", "post"]


def test_zero_grad():
    params = random_parameters([(2,)])
    optimizer = run(params, 1)
    optimizer.zero_grad()
    assert params[0].grad is None


def test_foreach_and_capturable_are_accepted():
    plain_adaqn(random_parameters([(2,)]), foreach=True, capturable=False)
