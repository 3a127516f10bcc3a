"""step() never waits for the device: no operation that reads a value back is ever called."""

import pytest
import torch
from every_option import EVERY_OPTION, make_every
from problems import plain_adaqn, random_parameters, set_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from adaqn_cuda import reference

#: Operations that make the host wait for a device value or a data-dependent shape.
READ_BACK = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
}


class NoReadBack(TorchDispatchMode):
    """Raises on an operation that reads back, also inside our own operations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in READ_BACK or f"{name}.{func._overloadname}" in READ_BACK:
            raise AssertionError(f"{name} reads a device value on the host")
        if any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for argument in (args[1:2] if name in ("aten::index", "aten::index_put_") else ())
            for index in argument
        ):
            raise AssertionError(f"{name} with a mask has a data-dependent shape")
        if func.namespace == "adaqn":
            with self:  # look inside
                return getattr(reference, name.removeprefix("adaqn::"))(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_the_watch_barks():
    with NoReadBack(), pytest.raises(AssertionError, match="reads a device value"):
        torch.ones(()).item()
    with NoReadBack(), pytest.raises(AssertionError, match="mask"):
        torch.ones(3)[torch.ones(3, dtype=torch.bool)]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("init", ["rmsprop", "scalar"])
@pytest.mark.parametrize("tensor_rates", [False, True])
def test_step_reads_nothing_back(fused, init, tensor_rates):
    """Over plain steps, pair updates, resets, skips and dropped steps."""
    params = random_parameters([(3, 4), (5,), ()])
    losses = iter([torch.tensor(x) for x in (1.0, 0.5, 9.0, 0.4, torch.nan, 0.3, 0.2)])
    optimizer = plain_adaqn(
        params,
        lr=torch.tensor(0.01) if tensor_rates else 0.01,
        weight_decay=torch.tensor(0.1) if tensor_rates else 0.1,
        init=init,
        update_interval=3,
        min_curvature=3.0,
        monitor=lambda: next(losses),
        fused=fused,
    )
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for step in range(20):
        set_gradients(params, step)
        if step in (4, 11):
            params[1].grad[0] = torch.inf
        with NoReadBack():
            optimizer.step()
    stats = optimizer.stats()
    assert stats["steps_skipped"] == 2
    assert stats["resets"] == 2
    assert stats["stored"] + stats["skipped"] == 2


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", EVERY_OPTION)
def test_no_option_reads_anything_back(name, fused):
    """Over pair updates, refreshes of bases and dropped steps."""
    params = random_parameters([(20, 9), (5,), ()])
    optimizer = make_every(name, params, fused=fused)
    for step in range(14):
        set_gradients(params, step)
        if step == 6:
            params[1].grad[0] = torch.inf
        with NoReadBack():
            optimizer.step()
    stats = optimizer.stats()
    assert stats["steps_skipped"] == 1
    assert (stats["stored"] > 0) == ("history_size" in EVERY_OPTION[name])
