"""The registered operations: honest schemas, fakes, and the passes' part in the whole step."""

import pytest
import torch
from problems import random_parameters, set_gradients

from adaqn_cuda import AdaQN, ops


class Recorder:
    """Stands in for the operations' namespace and keeps the arguments of every call."""

    def __init__(self, namespace):
        self.namespace, self.calls = namespace, {}

    def __getattr__(self, name):
        op = getattr(self.namespace, name)

        def call(*args):
            self.calls[name] = copy_arguments(args)
            return op(*args)

        return call


def copy_arguments(args):
    def copy(x):
        if isinstance(x, torch.Tensor):
            return x.detach().clone()
        return [copy(y) for y in x] if isinstance(x, list) else x

    return tuple(copy(x) for x in args)


def recorded_calls(monkeypatch, init, history_dtype):
    """Arguments of one call of each operation, from a run with some history."""
    params = random_parameters([(3, 4), (5,), ()])
    optimizer = AdaQN(
        params, init=init, history_dtype=history_dtype, fisher_dtype=history_dtype,
        update_interval=3, history_size=3, monitor=lambda: 1.0,
    )  # fmt: skip
    recorder = Recorder(ops._DISPATCHED)
    backend = ops.Backend("recorder", "test", recorder)
    monkeypatch.setattr(ops, "select_backend", lambda *_: backend)
    for step in range(9):
        set_gradients(params, step)
        optimizer.step()
    return recorder.calls


@pytest.mark.parametrize("init", ["rmsprop", "scalar"])
@pytest.mark.parametrize("history_dtype", [None, torch.bfloat16])
def test_operations_pass_opcheck(monkeypatch, init, history_dtype):
    calls = recorded_calls(monkeypatch, init, history_dtype)
    assert calls.keys() == ops.SCHEMAS.keys()
    for name, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.adaqn, name).default, args)


def test_passes_make_the_step(monkeypatch):
    """direction_step does what the three passes do, to the bit."""
    args = recorded_calls(monkeypatch, "rmsprop", None)["direction_step"]
    (params, grads, s_ring, y_ring, gram, scale, found_inf, maximize, keep, add, eps, sizes, lr,
     decay, lr_tensor, decay_tensor, *state) = copy_arguments(args)  # fmt: skip
    accumulator, fisher, iterate_sum, direction, projections, images, counters = state
    torch.ops.adaqn.direction_step(*args)
    o = torch.ops.adaqn
    o.direction_pass1(params, grads, s_ring, counters, scale, found_inf, maximize, projections)
    o.direction_pass2(
        params, grads, y_ring, gram, counters, projections, scale, maximize, keep, add, eps,
        accumulator, fisher, direction, images,
    )  # fmt: skip
    o.direction_pass3(
        params, s_ring, gram, projections, images, direction, sizes, lr, decay, lr_tensor,
        decay_tensor, len(fisher), iterate_sum, counters,
    )  # fmt: skip
    for p, q in zip(params, args[0], strict=True):
        assert torch.equal(p, q)
    for mine, theirs in zip(state, args[-7:], strict=True):
        assert torch.equal(mine, theirs)


def test_reference_and_dispatched_backends():
    device = torch.device("cpu")
    assert ops.select_backend(device, False).name == "reference"
    assert ops.select_backend(device, None).reason
