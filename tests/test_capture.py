"""Steps in a CUDA graph: what a replay repeats, by recordings on the CPU, and the warning."""

import warnings

import pytest
import torch
from emulated import EmulatedOps
from problems import needs_library, plain_adaqn, random_parameters
from recording import Recorded, Recording

from adaqn_cuda import AdaQN, capture, ops

#: Optimizers, and the period of their schedules.
PERIODS = {
    "diagonal": (dict(history_size=0, momentum=0.9), 1),
    "pairs": (dict(update_interval=3, history_size=3), 3),
    "kronecker": (dict(history_size=0, init="kronecker", block_size=4, factor_interval=3), 6),
    "kronecker with pairs": (
        dict(init="kronecker", factor_interval=5, update_interval=4, history_size=2, damping=0.2),
        20,
    ),
}


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_library), "emulated"])
def fused(request, monkeypatch):
    """The option that takes a backend; of the last, the CUDA kernels run on the CPU."""
    if request.param == "emulated":
        backend = ops.Backend("emulated", "test", Recorded(EmulatedOps()))
        monkeypatch.setattr(ops, "select_backend", lambda *_: backend)
    return request.param == "native"


def make(options, fused):
    params = random_parameters([(6, 5), (4,), ()], torch.float64)
    for p in params:
        p.grad = torch.zeros_like(p)
    return params, plain_adaqn(params, fused=fused, **{"lr": 0.02, **options})


def set_gradients(params, step):
    """In place, where a graph finds them."""
    for index, p in enumerate(params):
        draw = torch.Generator().manual_seed(7919 * step + index)
        noise = torch.randn(p.shape, generator=draw, dtype=p.dtype)
        p.grad.copy_(0.3 * p.detach() + 0.2 * noise)


def path(options, fused, length, recorded=0, first=12):
    """Parameters after so many steps, from ``first`` on replays of ``recorded`` successive ones."""
    params, optimizer = make(options, fused)
    graphs = []
    for step in range(length):
        set_gradients(params, step)
        if not recorded or step < first:
            optimizer.step()
        elif step < first + recorded:
            graphs.append(Recording())
            with graphs[-1]:
                optimizer.step()
        else:
            graphs[(step - first) % recorded].replay()
    state = [t for name, t in vars(optimizer._arena).items() if isinstance(t, torch.Tensor)]
    return [p.detach() for p in params] + [t for t in state if t is not optimizer._arena.calls]


def same(a, b):
    return all(torch.allclose(x, y, 0, 0, equal_nan=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", PERIODS)
def test_a_replayed_period_is_what_as_many_steps_are(name, fused):
    options, period = PERIODS[name]
    length = 12 + 3 * period + 4
    assert same(path(options, fused, length), path(options, fused, length, recorded=period))


@pytest.mark.parametrize("name", [name for name, (_, period) in PERIODS.items() if period > 1])
def test_a_replayed_step_alone_is_not(name, fused):
    """What the warning says is true."""
    options, period = PERIODS[name]
    length = 12 + 2 * period
    assert not same(path(options, fused, length), path(options, fused, length, recorded=1))


@pytest.mark.parametrize("name", PERIODS)
def test_period(name):
    options, period = PERIODS[name]
    _, optimizer = make(options, None)
    factored = "kronecker" in name
    assert capture.period(optimizer.param_groups[0], factored) == period


# --------------------------------------------------------------------------- what is said


@pytest.fixture
def captured(monkeypatch):
    """From its call on, every step takes itself for a captured one."""
    return lambda: monkeypatch.setattr(capture, "is_captured", lambda device: True)


def test_capture_is_that_of_the_current_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert capture.is_captured(torch.device("cuda"))
    assert not capture.is_captured(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not capture.is_captured(torch.device("cuda"))


@pytest.mark.parametrize("name", PERIODS)
def test_capture_warns_once_where_calls_differ(captured, name):
    options, period = PERIODS[name]
    params, optimizer = make(options, None)
    optimizer.step()
    captured()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step()
    assert len(seen) == (period > 1)
    for warning in seen:
        text = str(warning.message)
        assert warning.filename == __file__
        assert f"Capture {period} successive calls" in text
        assert ("factors and bases" in text and "first 10" in text) == ("kronecker" in name)
        assert ("no replay will try a pair" in text) == ("pairs" in name)


def test_capture_of_a_pair_update_says_so(captured):
    params, optimizer = make(PERIODS["pairs"][0], None)
    for _ in range(2):
        optimizer.step()
    captured()
    with pytest.warns(RuntimeWarning, match="every replay will try a pair"):
        optimizer.step()


def test_the_default_warns(captured):
    w = torch.nn.Parameter(torch.ones(8, 8))
    w.grad = torch.ones_like(w)
    optimizer = AdaQN([w])
    optimizer.step()
    captured()
    with pytest.warns(RuntimeWarning, match="Capture 10 successive calls, after the first 10,"):
        optimizer.step()


def test_the_first_step_cannot_be_captured(captured):
    params, optimizer = make({}, None)
    before = [p.detach().clone() for p in params]
    captured()
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        optimizer.step()
    assert same(params, before) and not optimizer.state
