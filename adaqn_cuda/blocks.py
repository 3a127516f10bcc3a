"""Row blocks: weight matrices that are several matrices on top of each other."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping as MappingABC
from numbers import Integral
from typing import Any

from torch import Tensor, nn
from torch.nn import Module, Parameter

#: Gates whose matrices a recurrent layer stacks along the rows of ``weight_ih`` and ``weight_hh``.
GATES: dict[type[Module], int] = {nn.LSTM: 4, nn.GRU: 3, nn.LSTMCell: 4, nn.GRUCell: 3}


def rnn_blocks(module: Module) -> dict[Parameter, int]:
    """Number of row blocks (gates) of every weight matrix of the LSTM and GRU layers in ``module``.

    Layers of any depth and direction, and cells, are found anywhere in the module tree.  The
    projections ``weight_hr`` of an LSTM, biases and all other parameters count as one block and are
    left out.

    Example:
        >>> rnn_blocks(nn.LSTM(3, 5)).values()
        dict_values([4, 4])
    """
    return {
        parameter: gates
        for layer in module.modules()
        for kind, gates in GATES.items()
        if isinstance(layer, kind)
        for name, parameter in layer.named_parameters(recurse=False)
        if name.startswith(("weight_ih", "weight_hh"))
    }


def check_blocks(blocks: Any, params: Iterable[Tensor]) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``blocks`` cuts some of ``params`` into rows."""
    if not isinstance(blocks, MappingABC):
        raise TypeError(
            f"blocks: expected a mapping from parameters to ints, got {blocks!r}; pass e.g. "
            "rnn_blocks(model)"
        )
    known = {id(p) for p in params}
    for parameter, count in blocks.items():
        _check_count(parameter, count)
        _check_parameter(parameter, count, known)


def _check_count(parameter: Any, count: Any) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(
            f"blocks: expected parameters as keys, got {parameter!r}; use the parameter itself, "
            "not its name"
        )
    rule = f"blocks: expected an int >= 1 for the parameter of shape {tuple(parameter.shape)}"
    remedy = "give the number of matrices stacked along its rows"
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise TypeError(f"{rule}, got {count!r}; {remedy}")
    if count < 1:
        raise ValueError(f"{rule}, got {count!r}; {remedy}")


def _check_parameter(parameter: Tensor, count: int, known: set[int]) -> None:
    shape = tuple(parameter.shape)
    if id(parameter) not in known:
        raise ValueError(
            f"blocks: got {count} for a parameter of shape {shape} that is not among the "
            "optimizer's; pass that parameter to the optimizer too, or leave it out of blocks"
        )
    if parameter.dim() < 2:
        raise ValueError(
            f"blocks: got {count} for a parameter of shape {shape}, which has no rows to cut; only "
            "parameters of at least 2 dimensions have, leave the others out"
        )
    if shape[0] % count:
        raise ValueError(
            f"blocks: got {count} for a parameter of shape {shape}, but {shape[0]} rows cannot be "
            f"cut into {count} blocks of equal height; use a divisor of {shape[0]}"
        )
