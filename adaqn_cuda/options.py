"""Hyper-parameters: what belongs to a group, what to the whole optimizer, and what is in range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .watch import differ

#: Initial matrices, and those of them that groups may mix: the scalar one is of all parameters.
INITS = ("adagrad", "rmsprop", "scalar", "kronecker")
MIXED = ("kronecker", "rmsprop", "adagrad")
#: Where y comes from; "product" is a callable that the user gives.
CURVATURES = ("fisher", "gradients", "difference", "product")

#: Options that may differ between parameter groups, and may be tensors.
PER_GROUP = ("lr", "weight_decay")


def number(
    low: float, rule: str, *, strict: bool = False, high: float = inf, infinite: bool = False
) -> Callable[[str, Any], None]:
    """A check that a real number is at least ``low`` (above it if ``strict``) and below ``high``.

    With ``infinite``, infinity is in range too.
    """

    def check(name: str, value: Any) -> None:
        real = value
        if isinstance(value, Tensor):
            _check_tensor(name, value)
            real = value.item()
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected {_kind(name)}, got {value!r}")
        above = real > low if strict else real >= low
        if not (above and (real < high or infinite)):
            raise ValueError(f"{name}: expected {rule}, got {value!r}")

    return check


def _check_tensor(name: str, value: Tensor) -> None:
    """Check what is known of a tensor without a look at its value."""
    if name not in PER_GROUP or value.numel() != 1 or value.is_complex():
        rule = f"; Tensor {name} must be 1-element and real" if name in PER_GROUP else ""
        raise ValueError(
            f"{name}: expected {_kind(name)}, got a tensor of shape {tuple(value.shape)}{rule}"
        )


def _kind(name: str) -> str:
    return "a number or a one-element real tensor" if name in PER_GROUP else "a number"


def count(least: int) -> Callable[[str, Any], None]:
    """A check that an integer is at least ``least``."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected an int >= {least}, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")

    return check


def choice(*words: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value not in words:
            raise ValueError(f"{name}: expected one of {', '.join(words)}, got {value!r}")

    return check


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def optional(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """The same check of what may be ``None``."""

    def checked(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return checked


def ring_dtype(name: str, value: Any) -> None:
    if value not in (None, torch.bfloat16):
        raise ValueError(f"{name}: expected None or torch.bfloat16, got {value!r}")


def _not_differentiable(name: str, value: Any) -> None:
    if value:
        raise RuntimeError(
            f"{name}={value!r} is not supported: the step is not recorded by autograd; "
            "leave it False"
        )


CHECKS: dict[str, Callable[[str, Any], None]] = {
    "lr": number(0.0, "a finite number >= 0"),
    "weight_decay": number(0.0, "a finite number >= 0"),
    "history_size": count(0),
    "fisher_size": count(1),
    "update_interval": count(1),
    "init": choice(*INITS),
    "curvature": choice(*CURVATURES),
    "decay": number(0.0, "a number in [0, 1)", high=1.0),
    "eps": number(0.0, "a finite number > 0", strict=True),
    "min_curvature": number(0.0, "a finite number >= 0"),
    "max_increase": number(1.0, "a number >= 1", infinite=True),
    "momentum": number(0.0, "a number in [0, 1)", high=1.0),
    "damping": number(0.0, "a number in [0, 1)", high=1.0),
    "max_direction": number(0.0, "a number > 0", strict=True, infinite=True),
    "bias_correction": flag,
    "max_grad_norm": number(0.0, "a number > 0", strict=True, infinite=True),
    "block_size": count(1),
    "max_vector_dim": count(1),
    "factor_interval": count(1),
    "normalize": flag,
    "maximize": flag,
    "history_dtype": ring_dtype,
    "fisher_dtype": ring_dtype,
    "fused": optional(flag),
    "foreach": optional(flag),
    "capturable": flag,
    "differentiable": _not_differentiable,
}


#: Options that may differ between parameter groups, and give the state its shape.
GROUPED = ("init", "block_size")
#: Those that may differ and say how a group's gradients are averaged.
AVERAGED = ("decay", "eps", "momentum")
#: All that may differ.
DIFFERING = (*PER_GROUP, *GROUPED, *AVERAGED)

_PAIRS = "curvature pairs are of all parameters together"
_CALLS = "one call steps all parameters"
#: Options that all groups share, and why.
COMMON = {
    "history_size": _PAIRS,
    "fisher_size": _PAIRS,
    "update_interval": _PAIRS,
    "curvature": _PAIRS,
    "min_curvature": _PAIRS,
    "max_increase": _PAIRS,
    "damping": _PAIRS,
    "max_direction": _PAIRS,
    "history_dtype": _PAIRS,
    "fisher_dtype": _PAIRS,
    "bias_correction": "steps are counted for all parameters together",
    "max_grad_norm": "the norm is that of the whole gradient",
    "max_vector_dim": "there is one plan of factors; init='rmsprop' leaves a group without any",
    "factor_interval": "factors of all parameters take turns",
    "normalize": "lr is the size of a step with it, and a multiple of one without",
    "maximize": "there is one objective",
    "fused": _CALLS,
    "foreach": _CALLS,
    "capturable": _CALLS,
    "differentiable": _CALLS,
}
#: Options that are looked at again only where they have changed.
WATCHED = (*COMMON, *GROUPED, *AVERAGED)


def common_options(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Options of the whole optimizer: one group with factors makes it one with factors."""
    first, *others = groups
    mixed = any(group.get("init") == "kronecker" for group in others)
    if mixed and first.get("init") != "kronecker":
        return {**first, "init": "kronecker"}
    return first


def agreed_options(params: list[Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options that all of these parameter groups give alike, and that ``defaults`` must follow.

    Those are the common ones, and an initial matrix that may not meet the default's.
    """
    if not params or not all(isinstance(group, dict) for group in params):
        return {}
    for group in params:
        validate(group)
    first, *others = params
    agreed = {
        name: value
        for name, value in first.items()
        if name in (*COMMON, "init")
        and all(name in group and group[name] == value for group in others)
    }
    if {agreed.get("init"), defaults["init"]}.issubset(MIXED):
        del agreed["init"]
    return agreed


def has_momentum(groups: list[dict[str, Any]]) -> bool:
    """Whether any of them has."""
    return any(group["momentum"] > 0 for group in groups)


def validate(options: dict[str, Any]) -> None:
    """Raise ``ValueError``, ``TypeError`` or ``RuntimeError`` naming the first bad option."""
    for name, check in CHECKS.items():
        if name in options:
            check(name, options[name])
    if options.get("normalize") and options.get("history_size"):
        raise ValueError(
            f"normalize: expected False where history_size is {options['history_size']!r}, got "
            "True; it would undo what curvature pairs say about the length of a step: pass "
            "history_size=0"
        )


def validate_group(group: dict[str, Any], common: dict[str, Any]) -> None:
    """Check one parameter group against the optimizer's ``common`` options."""
    validate(group)
    for name in COMMON:
        if name not in group or group[name] == common[name]:
            continue
        raise ValueError(
            f"{name}: a parameter group asks for {group[name]!r}, but the optimizer has "
            f"{common[name]!r}, and {COMMON[name]}; give all groups the same. Only "
            f"{', '.join(DIFFERING)} may differ"
        )
    found = {group.get("init", common["init"]), common["init"]}
    if len(found) > 1 and not found.issubset(MIXED):
        raise ValueError(
            f"init: a parameter group asks for {group['init']!r}, but the optimizer has "
            f"{common['init']!r}; only {', '.join(MIXED)} may be mixed"
        )


#: Common options that give the state its shape.
STRUCTURAL = (
    "history_size", "fisher_size", "curvature", "max_vector_dim", "normalize", "history_dtype",
    "fisher_dtype",
)  # fmt: skip


class LiveOptions:
    """Options in the groups, which schedulers and users change while the optimizer runs."""

    def __init__(self) -> None:
        self._seen: list[Any] = []
        self._fixed: list[tuple[dict[str, Any], str, Any]] = []

    def fix(self, groups: list[dict[str, Any]]) -> None:
        """From now on, the state has the shape that the options of these groups give it."""
        self._fixed = [(groups[0], name, groups[0][name]) for name in STRUCTURAL]
        self._fixed += [(group, name, group[name]) for group in groups for name in GROUPED]

    def check(self, groups: list[dict[str, Any]], allocated: bool) -> None:
        """Raise unless the options are in range, and fit each other and, if there is, the state.

        Only what differs from the last check is looked at again.
        """
        for group in groups:
            for name in PER_GROUP:
                value = group.get(name)
                if isinstance(value, Tensor):  # a step reads no value back, wherever it is
                    _check_tensor(name, value)
                else:
                    CHECKS[name](name, value)
        found = [group.get(name) for group in groups for name in WATCHED]
        # By identity: 1 is no True, and tensors do not compare.
        if differ(found, self._seen):
            for group in groups:
                validate_group({name: group.get(name) for name in WATCHED}, groups[0])
        for group, name, value in self._fixed if allocated else ():
            if group[name] != value:
                raise RuntimeError(
                    f"{name}: was {value!r} when the state was made, and is {group[name]!r} now, "
                    "which takes another state; set it back, or make a new optimizer"
                )
        self._seen = found


def check_callable(name: str, value: Any, history_size: int) -> None:
    """Check what is called at pair updates, of which there are none without a history."""
    if value is None:
        return
    if not callable(value):
        raise TypeError(f"{name}: expected a callable or None, got {value!r}")
    if history_size == 0:
        raise ValueError(
            f"{name}: is called when curvature pairs are tried, and history_size=0 tries none; "
            "raise history_size"
        )
