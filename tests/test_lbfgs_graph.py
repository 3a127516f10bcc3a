"""LBFGS in CUDA graphs, as far as a CPU can tell: what a graph would hold, done again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from problems import BACKENDS, needs_library
from recording import Recording
from torch.utils._pytree import tree_leaves, tree_map_only

from adaqn_cuda import DETERMINISTIC, LBFGS, capture
from adaqn_cuda.state.history import FIRST_ROWS

BENCH = Path(__file__).parent.parent / "bench"
SETTINGS = {
    "armijo": dict(line_search_fn="armijo", history_size=8),
    "without pairs": dict(line_search_fn="armijo", history_size=0),
    "deterministic": dict(DETERMINISTIC, history_size=12),
    "diagonal": dict(DETERMINISTIC, history_size=3, init="rmsprop"),
}
#: The reference takes long.
ways = pytest.mark.parametrize(
    ("setting", "fused"),
    [("armijo", False), *(pytest.param(s, None, marks=needs_library) for s in SETTINGS)],
)


class Graph(Recording):
    """What a CUDA graph holds."""

    def written(self):
        """Names and arguments; of tensors, where they lie, or which operation has made them.

        Of numbers that Python made tensors of, their value.
        """
        made, lines = {}, []

        def place(tensor):
            storage = tensor.untyped_storage()
            at = storage.data_ptr()
            if at not in made and storage.nbytes() == tensor.element_size():
                return tensor.item()
            return (made.get(at, at), tensor.storage_offset(), tensor.shape, tensor.stride())

        for number, (function, args, kwargs, outcome) in enumerate(self.calls):
            lines.append((str(function), tree_map_only(torch.Tensor, place, (args, kwargs))))
            for tensor in tree_leaves(outcome):
                if isinstance(tensor, torch.Tensor):
                    made.setdefault(tensor.untyped_storage().data_ptr(), f"made by {number}")
        return lines


class Run:
    """A network's fit, ten evaluations a step."""

    def __init__(self, **options):
        draw = torch.Generator().manual_seed(3)
        shapes = ((8, 1), (8,), (1, 8), (1,))
        self.params = [
            torch.nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64)) for s in shapes
        ]
        self.x = torch.linspace(-1, 1, 32, dtype=torch.float64)[:, None]
        self.optimizer = LBFGS(self.params, **{"max_iter": 10, "max_eval": 10, **options})

    def closure(self):
        self.optimizer.zero_grad(set_to_none=False)
        w, b, v, c = self.params
        loss = ((torch.tanh(self.x @ w.T + b) @ v.T + c - torch.sin(3 * self.x)) ** 2).mean()
        loss.backward()
        return loss

    def step(self, times=1):
        for _ in range(times):
            self.loss = self.optimizer.step(self.closure)
        return self

    def record(self):
        with Graph() as graph:
            self.step()
        return graph


@pytest.fixture
def captured(monkeypatch):
    """Records a step of a run as a graph would."""

    def record(run):
        with monkeypatch.context() as patch:
            patch.setattr(capture, "is_captured", lambda device: True)
            return run.record()

    return record


@ways
def test_replayed_steps_are_eager_ones(setting, fused, captured, device_decides):
    options = dict(SETTINGS[setting], fused=fused)
    eager, run = Run(**options).step(5), Run(**options).step(2)
    run.optimizer.reserve()
    graph = captured(run)
    for _ in range(2):
        graph.replay()
    assert torch.equal(run.loss, eager.loss)
    for p, q in zip(run.params, eager.params, strict=True):
        assert torch.equal(p, q)
    ours, theirs = run.optimizer.stats(), eager.optimizer.stats()
    assert ours == theirs | {"state_bytes": ours["state_bytes"]}
    assert ours["evaluations"] == 50 and 15 < ours["iterations"] < 50
    assert ours["pairs"] == min(options["history_size"], ours["stored"])
    run.step(), eager.step()
    assert torch.equal(run.loss, eager.loss)


@ways
def test_steps_are_the_same_operations_on_the_same_memory(setting, fused, device_decides):
    run = Run(**SETTINGS[setting], fused=fused).step(2)
    run.optimizer.reserve()
    run.step()  # the counts of the step before are read here
    graphs = []
    for _ in range(2):
        run.optimizer._uncounted = False
        graphs.append(run.record())
    one, other = (graph.written() for graph in graphs)
    assert one == other and len(one) > 100
    reads = [name for name, _ in one if "local_scalar" in name or "nonzero" in name]
    assert not reads


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("steps", [0, 2])
def test_start_that_is_not_finite_changes_nothing(setting, steps, fused, device_decides):
    """Nor are parameters that were moved by hand put back to the iterate before."""
    run = Run(**SETTINGS[setting], fused=fused).step(steps)
    with torch.no_grad():
        run.params[0].add_(1.0)
    before, run.x = [p.detach().clone() for p in run.params], run.x * torch.nan
    run.step()
    assert all(map(torch.equal, before, run.params))
    assert run.optimizer.stats()["stopped"] == "loss or gradient is not finite"


def test_memory_that_a_graph_would_allocate_is_refused(captured, monkeypatch):
    run = Run(line_search_fn="armijo", history_size=100)
    for _ in range(2):  # neither before the first step, nor after it
        with pytest.raises(RuntimeError, match=r"history_size: the memory of 100 pairs .*reserve"):
            captured(run)
        run.step()
    monkeypatch.setattr(capture, "is_captured", lambda device: True)
    with pytest.raises(RuntimeError, match="reserve: .* before the capture"):
        run.optimizer.reserve()
    monkeypatch.undo()
    run.optimizer.reserve()
    before = run.optimizer.stats()
    captured(run)
    assert run.optimizer.stats()["state_bytes"] == before["state_bytes"]


def test_steps_that_a_graph_cannot_repeat_are_refused(captured):
    run = Run(line_search_fn="strong_wolfe").step()
    with pytest.raises(RuntimeError, match="line_search_fn: 'strong_wolfe' decides on the host"):
        captured(run)
    run = Run(**DETERMINISTIC).step()
    run.optimizer.reserve()
    before = [p.clone() for p in run.params]
    for interval, evaluations, turns in ((5, 12, 5), (11, 11, 22)):
        group = run.optimizer.param_groups[0]
        group["factor_interval"], group["max_eval"] = interval, evaluations
        with pytest.raises(RuntimeError, match=rf"makes {evaluations} .* multiple of {turns}"):
            captured(run)
    assert all(map(torch.equal, before, run.params))


def test_memory_reserved_before_the_first_step_holds_the_same_pairs():
    options = dict(line_search_fn="strong_wolfe", history_size=40, max_iter=5)
    run, other = Run(**options), Run(**options)
    run.optimizer.reserve()
    size = run.optimizer.stats()["state_bytes"]
    run.step(4), other.step(4)
    assert run.optimizer.stats()["state_bytes"] == size
    assert run.optimizer.stats()["stored"] > FIRST_ROWS
    assert run.loss.item() == pytest.approx(other.loss.item(), rel=1e-6)


def test_the_program_that_replays_steps(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCH)
    import fit_cuda_graph

    for name in ("fit_cuda_graph", "drop_in"):
        monkeypatch.delitem(sys.modules, name)
    fit_cuda_graph.main(["--device", "cpu", "--steps", "6", "--look", "2"])
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()[:3]]
    assert losses[2] < losses[1] < losses[0] < 100
