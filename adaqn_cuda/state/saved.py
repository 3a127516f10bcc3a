"""State dicts as they come: from other optimizers, from older versions, damaged."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch

from ..options import CHECKS
from .blocks import as_blocks

#: Options by which a group of AdaQN is known; older versions had them, others have none of them.
_OWN = ("history_size", "update_interval", "init", "fisher_size")
#: What all optimizers' groups hold.
_COMMON = ("params", "lr", "weight_decay", "maximize", "foreach", "capturable", "differentiable")

#: Options that are dtypes, of which a state_dict has the names: text, as all else beside tensors.
_DTYPES = ("history_dtype", "fisher_dtype")


def with_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict as torch has made it, with options as files have them, without other types.

    Numbers are Python's own, whatever library they came from, and dtypes are there by their names.
    """
    for group in state_dict.get("param_groups", ()):
        for name, value in group.items():
            group[name] = _plain(value)
        for name in _DTYPES:
            if isinstance(group.get(name), torch.dtype):
                group[name] = str(group[name]).removeprefix("torch.")
    return state_dict


def _plain(value: Any) -> Any:
    """Python's own number for any other, such as NumPy's; in lists and tuples, too."""
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def with_dtypes(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group, with the dtypes that :func:`with_names` has named."""
    dtypes = {name: torch.bfloat16 for name in _DTYPES if group.get(name) == "bfloat16"}
    return {**group, **dtypes}


def check_mapping(state_dict: Any) -> None:
    """Raise ``ValueError`` unless this is a dict of any kind."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"state_dict: expected a dict, got {type(state_dict).__name__}; pass what "
            "AdaQN.state_dict() returned"
        )


def check_state_dict(state_dict: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless an AdaQN saved this."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "state_dict: expected a dict with 'state' and 'param_groups', got "
            f"{sorted(map(str, state_dict))}; pass what AdaQN.state_dict() returned"
        )
    for index, group in enumerate(state_dict["param_groups"]):
        if "params" not in group:
            raise ValueError(
                f"state_dict: group {index} has no 'params'; pass what AdaQN.state_dict() returned"
            )
        foreign = sorted(name for name in group if name not in CHECKS and name not in _COMMON)
        if not any(name in group for name in _OWN):
            raise ValueError(
                f"state_dict: group {index} was saved by another optimizer, with options "
                f"{', '.join(foreign) or 'of none'}; expected those of AdaQN, such as "
                f"{', '.join(_OWN)}. State of other optimizers cannot be continued: start anew"
            )


def completed(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]], defaults: dict[str, Any]
) -> dict[str, Any]:
    """The same, with the options that its groups lack as they are in ``groups``."""
    found = state_dict["param_groups"]
    own = [*groups, *({} for _ in found[len(groups) :])]
    full = []
    for saved, mine in zip(found, own, strict=False):
        kept = {name: value for name, value in mine.items() if name in CHECKS}
        full.append({**defaults, **kept, **with_dtypes(saved), "blocks": _blocks(saved, mine)})
    return {**state_dict, "param_groups": full}


def _blocks(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> list[Any]:
    """The row blocks of a saved group, or else of the optimizer's own, if they fit."""
    count, own = len(saved["params"]), mine.get("blocks", [])
    given = saved.get("blocks", own if len(own) == count else [1] * count)
    if not isinstance(given, list) or len(given) != count:
        raise ValueError(
            f"state_dict: expected 'blocks' for each of {count} parameters of a group, got "
            f"{given!r}; pass what AdaQN.state_dict() returned"
        )
    return [as_blocks(blocks) for blocks in given]
