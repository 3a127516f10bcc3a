"""Row blocks: weight matrices that are several matrices on top of each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Size, Tensor, nn
from torch.nn import Module, Parameter

#: Gates whose matrices a recurrent layer stacks along the rows of ``weight_ih`` and ``weight_hh``.
GATES: dict[type[Module], int] = {nn.LSTM: 4, nn.GRU: 3, nn.LSTMCell: 4, nn.GRUCell: 3}


def rnn_blocks(module: Module) -> dict[Tensor, int]:
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


#: Row blocks of a parameter: how many of equal height, or the height of each.
Blocks = int | tuple[int, ...]
#: What users give: by parameter.  The keys of a mapping are invariant, so both types are named.
GivenBlocks = Mapping[Tensor, int | Sequence[int]] | Mapping[Parameter, int | Sequence[int]]


def as_blocks(given: Any) -> Blocks:
    """What ``blocks`` has for a parameter, in the form that is kept and saved."""
    return tuple(given) if isinstance(given, Sequence) else given


def heights(shape: Size, blocks: Blocks) -> tuple[int, ...]:
    """Rows of each row block."""
    if isinstance(blocks, tuple):
        return blocks
    rows = shape[0] if len(shape) else 1
    return (rows // blocks,) * blocks


def check_blocks(blocks: Any, params: Iterable[Tensor]) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``blocks`` cuts some of ``params`` into rows."""
    if not isinstance(blocks, Mapping):
        raise TypeError(
            f"blocks: expected a mapping from parameters to ints or lists of ints, got {blocks!r}; "
            "pass e.g. rnn_blocks(model)"
        )
    known = {id(p) for p in params}
    for parameter, given in blocks.items():
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"blocks: expected parameters as keys, got {parameter!r}; use the parameter "
                "itself, not its name"
            )
        _check_numbers(parameter, given)
        _check_parameter(parameter, given, known)


def _check_numbers(parameter: Tensor, given: Any) -> None:
    rule = (
        "blocks: expected an int >= 1, or a list of them, for the parameter of shape "
        f"{tuple(parameter.shape)}"
    )
    remedy = "give the number of matrices stacked along its rows, or the rows of each"
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    numbers: list[Any] = list(given) if listed else [given]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, Integral) for n in numbers):
        raise TypeError(f"{rule}, got {given!r}; {remedy}")
    if any(n < 1 for n in numbers):
        raise ValueError(f"{rule}, got {given!r}; {remedy}")


def _check_parameter(parameter: Tensor, given: Any, known: set[int]) -> None:
    shape = tuple(parameter.shape)
    if id(parameter) not in known:
        raise ValueError(
            f"blocks: got {given} for a parameter of shape {shape} that is not among the "
            "optimizer's; pass that parameter to the optimizer too, or leave it out of blocks"
        )
    if parameter.dim() < 1:
        raise ValueError(
            f"blocks: got {given} for a parameter without dimensions, which has no rows to cut; "
            "leave it out"
        )
    if isinstance(given, Integral):
        if shape[0] % given:
            raise ValueError(
                f"blocks: got {given} for a parameter of shape {shape}, but {shape[0]} rows cannot "
                f"be cut into {given} blocks of equal height; use a divisor of {shape[0]}, or list "
                "the rows of each block"
            )
    elif sum(given) != shape[0]:
        raise ValueError(
            f"blocks: got {given} for a parameter of shape {shape}: blocks of {sum(given)} rows in "
            f"all, but it has {shape[0]}; list the rows of each block"
        )
