"""``normalize=True``: steps of every parameter have a root mean square of lr."""

import pytest
import torch
from problems import (
    assert_same,
    both_backends,
    every_place,
    random_parameters,
    set_gradients,
    snapshot,
)
from torch import nn

from adaqn_cuda import AdaQN, reference

INITS = ["kronecker", "rmsprop", "adagrad", "scalar"]
SHAPES = [(40, 30), (7,), (), (0, 3), (3, 4, 5), (129, 2)]


def normalized(params, **options):
    return AdaQN(params, **{"lr": 0.1, "normalize": True, **options})


def rms(x):
    return (torch.view_as_real(x) if x.is_complex() else x).square().mean().sqrt()


@every_place
@pytest.mark.parametrize("init", INITS)
def test_the_root_mean_square_of_a_step_is_lr(init, fused, device):
    """Whatever the gradients' size, and of complex and half-precision parameters, too."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape, dtype):
        return torch.randn(shape, dtype=dtype, generator=generator).to(device)

    params = random_parameters(SHAPES, device=device)
    params += [nn.Parameter(normal((6, 4), torch.complex64))]
    params += [nn.Parameter(normal((9, 8), torch.bfloat16))]
    optimizer = normalized(params, init=init, fused=fused)
    for step in range(12):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = normal(p.shape, p.dtype) * 10.0 ** (step - 5)
        optimizer.step()
        for p, w in zip(params, before, strict=True):
            if p.numel():
                tolerance = 0.01 if p.dtype == torch.bfloat16 else 1e-5
                torch.testing.assert_close(float(rms(p.detach() - w)), 0.1, rtol=tolerance, atol=0)


@both_backends
@pytest.mark.parametrize("init", INITS)
def test_a_step_is_the_plain_one_of_another_length(init, fused):
    shapes = [(12, 9), (5,), (31, 4)]
    params, others = (random_parameters(shapes, torch.float64) for _ in range(2))
    options = dict(init=init, fused=fused, weight_decay=0.0)
    optimizer, plain = normalized(params, **options), AdaQN(others, lr=0.1, **options)
    for step in range(15):
        before = [p.detach().clone() for p in params]
        start = [p.detach().clone() for p in others]
        set_gradients(params, step)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
        for p, w, q, v in zip(params, before, others, start, strict=True):
            expected = 0.1 * (q - v) / rms(q - v)
            torch.testing.assert_close(p - w, expected, rtol=1e-6, atol=1e-9)


@both_backends
def test_rates_are_those_of_the_groups(fused):
    """By value or as tensors; weight decay does not depend on the direction's length."""
    a, b = random_parameters([(4, 5), (6,)], torch.float64)
    groups = [
        {"params": [a], "lr": torch.tensor(0.3), "weight_decay": 0.2},
        {"params": [b], "lr": 0.05, "weight_decay": torch.tensor(0.1)},
    ]
    optimizer = normalized(groups, fused=fused)
    for step in range(3):
        before = [a.detach().clone(), b.detach().clone()]
        set_gradients([a, b], step)
        optimizer.step()
        for p, w, lr, decay in zip((a, b), before, (0.3, 0.05), (0.2, 0.1), strict=True):
            moved = p.detach() - (1 - lr * decay) * w
            torch.testing.assert_close(float(rms(moved)), lr, rtol=1e-6, atol=0)


@both_backends
@pytest.mark.parametrize("init", ["kronecker", "rmsprop"])
def test_a_parameter_whose_gradient_has_vanished_comes_to_rest(init, fused):
    """Its momentum decays, and is not blown up for ever."""
    params = random_parameters([(4, 3), (5,)])
    optimizer = normalized(params, init=init, fused=fused)
    for step in range(120):
        set_gradients(params, step)
        if step > 5:
            params[0].grad.zero_()
        before = params[0].detach().clone()
        optimizer.step()
    assert rms(params[0].detach() - before) < 1e-6


@both_backends
def test_parameters_without_a_gradient_and_dropped_steps(fused):
    params = random_parameters([(4, 3), (5,), (2, 2)])
    optimizer = normalized(params, fused=fused, weight_decay=0.1)
    for step in range(4):
        set_gradients(params, step)
        optimizer.step()
    before = snapshot(optimizer)
    set_gradients(params, 4)
    params[1].grad[2] = torch.nan
    optimizer.step()
    after = snapshot(optimizer)
    for entry, other in zip(before[1], after[1], strict=True):
        for name in ("counters", "calls"):
            entry.pop(name), other.pop(name)
    assert_same(before, after)
    set_gradients(params, 5)
    params[1].grad = None
    before = [p.detach().clone() for p in params]
    optimizer.step()
    moved = [not torch.equal(p, w) for p, w in zip(params, before, strict=True)]
    assert moved == [True, False, True]


@both_backends
def test_a_checkpoint_continues_to_the_bit(fused):
    params = random_parameters([(8, 6), (5,)])
    optimizer = normalized(params, fused=fused)
    for step in range(30):
        if step == 12:
            copies = [nn.Parameter(p.detach().clone()) for p in params]
            resumed = AdaQN(copies)
            resumed.load_state_dict(optimizer.state_dict())
            assert resumed.param_groups[0]["normalize"] is True
        set_gradients(params, step)
        optimizer.step()
        if step >= 12:
            set_gradients(copies, step)
            resumed.step()
    assert_same(snapshot(optimizer), snapshot(resumed))


def test_a_state_without_the_option_keeps_the_optimizers_own():
    params = random_parameters([(3, 2)])
    optimizer = normalized(params)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["normalize"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["normalize"] is True


PAIRS_REFUSED = "^normalize: expected False where history_size is 3, got True"


def test_pairs_are_refused():
    with pytest.raises(ValueError, match=PAIRS_REFUSED):
        normalized(random_parameters([(3, 2)]), history_size=3)
    pairs, steps = {"history_size": 3}, {"normalize": True}
    for of_group, of_all in ((pairs, steps), (steps, pairs)):
        with pytest.raises(ValueError, match=PAIRS_REFUSED):
            AdaQN([{"params": random_parameters([(3, 2)]), **of_group}], **of_all)
    params = random_parameters([(3, 2)])
    optimizer = AdaQN(params, history_size=3)
    set_gradients(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0]["normalize"] = True
    with pytest.raises(ValueError, match=PAIRS_REFUSED):
        optimizer.step()
    assert_same(before, snapshot(optimizer))


def test_it_cannot_be_switched_on_later():
    params = random_parameters([(3, 2)])
    optimizer = AdaQN(params)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["normalize"] = True
    with pytest.raises(RuntimeError, match="^normalize: was False when the state was made"):
        optimizer.step()


def test_a_scalar_matrix_without_pairs_is_one():
    empty, counters = torch.zeros(1, 0, dtype=torch.float64), torch.zeros(16, dtype=torch.int64)
    assert float(reference.scalar_initial_matrix(empty, counters)) == 1
