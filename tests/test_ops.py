"""The registered operations: honest schemas, fakes, and the passes' part in the whole step."""

import pytest
import torch
from by_group import by_group
from problems import plain_adaqn, random_parameters, set_gradients

from adaqn_cuda import ops


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


BEYOND_THE_PAPER = {
    "momentum": 0.9, "damping": 0.2, "max_direction": 0.5, "bias_correction": True,
    "max_grad_norm": 1.0,
}  # fmt: skip

RUNS = {
    "rmsprop": {},
    "scalar": {"init": "scalar"},
    "kronecker": {"init": "kronecker"},
    "no history": {"history_size": 0, "monitor": None},
    "kronecker alone": {"init": "kronecker", "history_size": 0, "monitor": None},
}


def recorded_calls(monkeypatch, **options):
    """Arguments of the last call of each operation, from a run with some history."""
    params = random_parameters([(3, 4), (5,), ()])
    options = {"history_size": 3, "update_interval": 3, "monitor": lambda: 1.0, **options}
    optimizer = plain_adaqn(params, **options)
    recorder = Recorder(ops._DISPATCHED)
    backend = ops.Backend("recorder", "test", recorder)
    monkeypatch.setattr(ops, "select_backend", lambda *_: backend)
    for step in range(9):
        set_gradients(params, step)
        optimizer.step()
    return recorder.calls


def test_these_runs_call_every_operation(monkeypatch):
    calls = [recorded_calls(monkeypatch, **options) for options in RUNS.values()]
    of_lbfgs = {name for name in ops.SCHEMAS if name.startswith("secant")}
    assert set().union(*calls) == ops.SCHEMAS.keys() - of_lbfgs


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("history_dtype", "beyond"), [(None, {}), (torch.bfloat16, BEYOND_THE_PAPER)]
)
def test_operations_pass_opcheck(monkeypatch, run, history_dtype, beyond):
    dtypes = {"history_dtype": history_dtype, "fisher_dtype": history_dtype}
    calls = recorded_calls(monkeypatch, **RUNS[run], **dtypes, **beyond)
    for name, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.adaqn, name).default, args)


def by_name(name, args):
    schema = getattr(torch.ops.adaqn, name).default._schema
    return dict(zip((argument.name for argument in schema.arguments), args, strict=True))


@pytest.mark.parametrize("beyond", [{}, BEYOND_THE_PAPER])
@pytest.mark.parametrize("init", ["rmsprop", "scalar"])
def test_passes_make_the_step(monkeypatch, init, beyond):
    """direction_step does what the three passes do, to the bit."""
    args = recorded_calls(monkeypatch, init=init, **beyond)["direction_step"]
    values = by_name("direction_step", copy_arguments(args))
    torch.ops.adaqn.direction_step(*args)
    known = by_group({**values, "identity": False, "fisher_size": len(values["fisher"])})
    for name in ("direction_pass1", "direction_pass2", "direction_pass3"):
        op = getattr(torch.ops.adaqn, name).default
        op(*(known[argument.name] for argument in op._schema.arguments))
    for name, whole in by_name("direction_step", args).items():
        torch.testing.assert_close(values[name], whole, rtol=0, atol=0, msg=name)


def test_reference_and_dispatched_backends():
    device = torch.device("cpu")
    assert ops.select_backend(device, False).name == "reference"
    assert ops.select_backend(device, None).reason
