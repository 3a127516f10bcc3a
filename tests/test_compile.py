"""A step inside torch.compile: the same bits as outside, in one graph."""

import pytest
import torch
from problems import plain_adaqn, random_parameters, set_gradients

from adaqn_cuda import ops


def run_pair(steps, compiled_from, monitor=None, fullgraph=True, **options):
    """The same run with and without torch.compile."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours, theirs = (random_parameters([(3, 4), (5,)]) for _ in range(2))
    a, b = plain_adaqn(ours, **options), plain_adaqn(theirs, **options)
    a.monitor, b.monitor = monitor and monitor(), monitor and monitor()
    compiled = torch.compile(lambda: a.step(), fullgraph=fullgraph, backend="aot_eager")
    for step in range(steps):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        if step == 6:
            ours[0].grad[0, 0] = theirs[0].grad[0, 0] = torch.nan
        (compiled if step >= compiled_from else a.step)()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
    assert a.stats() == b.stats()
    return a


@pytest.mark.parametrize("compiled_from", [0, 5])
@pytest.mark.parametrize("init", ["rmsprop", "scalar"])
def test_compiled_step_equals_eager(compiled_from, init):
    """From the first step on, or on a run that has begun; the schedule needs no recompilation."""
    optimizer = run_pair(14, compiled_from, init=init, update_interval=3, history_size=2)
    assert optimizer.stats()["stored"] > 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_compiled_step_with_tensor_rate():
    run_pair(9, 0, lr=torch.tensor(0.02), update_interval=3)


def test_monitor_breaks_the_graph_but_works():
    def monitor():
        losses = iter([1.0, 0.5, 9.0, 0.4])
        return lambda: next(losses)

    optimizer = run_pair(12, 0, monitor=monitor, fullgraph=False, update_interval=3)
    assert optimizer.stats()["resets"] == 1


def test_a_cuda_graph_does_not_hold_the_step():
    """It would repeat what the host has decided in one call."""
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch does not know of it")
    unsafe = {n for n in ("whole_step", *ops.SCHEMAS) if has_tag(n, torch.Tag.cudagraph_unsafe)}
    assert unsafe == {"whole_step"}  # all other operations do what their arguments say


def has_tag(name, tag):
    return tag in getattr(torch.ops.adaqn, name).default.tags
