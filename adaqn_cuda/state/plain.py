"""State dicts as plain tensors and one text, for files that hold no more, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..distributed.sharding import is_spread

#: Under which the text is in the metadata.
STRUCTURE = "adaqn_cuda.state_dict"


def flatten_state_dict(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Takes a state dict apart into contiguous tensors and one text, as safetensors has them.

    A tensor that is filed under several parameters is there once. Tensors that are contiguous are
    those of the state dict, and are changed by the next step; the others are copies.

    Args:
        state_dict (dict): what ``state_dict()`` of an optimizer has returned; of any optimizer.

    Returns:
        tuple: the tensors by name, such as ``"state.0.momentum"``, and metadata: a dict of text in
        JSON, which says where they were, and what the numbers beside them are.

    Raises:
        TypeError: there is something in it that is neither a tensor of one process nor a number, a
            text, ``None``, or a list or dict of them.

    Example:
        >>> tensors, metadata = flatten_state_dict(optimizer.state_dict())
        >>> safetensors.torch.save_file(tensors, "optimizer.safetensors", metadata)
    """
    tensors: dict[str, Tensor] = {}
    structure = _apart(state_dict, "", tensors, {})
    return tensors, {STRUCTURE: json.dumps(structure)}


def unflatten_state_dict(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> dict[str, Any]:
    """Puts together again what :func:`flatten_state_dict` took apart.

    Args:
        tensors (dict): the tensors by name.
        metadata (dict): the metadata; other entries of it are left alone.

    Raises:
        ValueError: the metadata is not that of :func:`flatten_state_dict`, or a tensor is missing.

    Example:
        >>> with safetensors.safe_open("optimizer.safetensors", "pt") as file:
        ...     tensors = {name: file.get_tensor(name) for name in file.keys()}
        ...     optimizer.load_state_dict(unflatten_state_dict(tensors, file.metadata()))
    """
    if not metadata or STRUCTURE not in metadata:
        raise ValueError(
            f"metadata: expected {STRUCTURE!r} in it, got {sorted(metadata or {})}; pass what "
            "flatten_state_dict() returned, which safetensors.safe_open(...).metadata() reads"
        )
    whole: dict[str, Any] = _together(json.loads(metadata[STRUCTURE]), tensors)
    return whole


def _apart(value: Any, name: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """What JSON has for ``value``, whose tensors go into ``tensors``; objects are of one key."""
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = _unused(name, tensors)
            tensors[names[id(value)]] = _contiguous(value, name)
        return {"tensor": names[id(value)]}
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping) and all(isinstance(key, (str, int)) for key in value):
        pairs = [[k, _apart(v, f"{prefix}{k}", tensors, names)] for k, v in value.items()]
        return {"dict": pairs}  # keys of JSON's own objects are texts
    if isinstance(value, (list, tuple)):
        return [_apart(v, f"{prefix}{i}", tensors, names) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"state_dict: expected tensors, numbers, texts, lists and dicts, got {value!r} as {name!r}"
    )


def _unused(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Keys with dots in them may make two names one."""
    while name in tensors:
        name += "_"
    return name


def _contiguous(tensor: Tensor, name: str) -> Tensor:
    if is_spread(tensor):
        raise TypeError(
            f"state_dict: {name!r} is a DTensor, of which this process has a part; gather it with "
            "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict and "
            "StateDictOptions(full_state_dict=True)"
        )
    return tensor.detach().contiguous()


def _together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_together(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {key: _together(v, tensors) for key, v in value["dict"]}
    name = value["tensor"]
    if name not in tensors:
        raise ValueError(
            f"tensors: expected {name!r} among them, got {len(tensors)} others; pass all that "
            "flatten_state_dict() returned"
        )
    return tensors[name]
