"""Steps inside a CUDA graph: what a replay repeats, and what is said about it at capture.

The schedule counts calls on the host, which a replay does not: a graph repeats the turns that
factors and pairs had in the captured calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import lcm
from typing import Any

import torch

from .reference.kronecker import FIRST_CALLS, turns


def is_captured(device: torch.device) -> bool:
    """Whether what is put on the current stream goes into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_uncaptured(device: torch.device) -> None:
    """For a step that allocates the state.

    Raises:
        RuntimeError: it is being captured, and the graph would clear the state at every replay.
    """
    if is_captured(device):
        raise RuntimeError(
            "step: the first one allocates the state, which a graph would clear at every replay; "
            "take a step before the capture"
        )


def period(common: Mapping[str, Any], factored: bool) -> int:
    """Calls after which the schedule repeats itself, from the first ones with factors on.

    Args:
        common: options of the whole optimizer.
        factored: whether anything has Kronecker factors.
    """
    of_factors = turns(common["factor_interval"]) if factored else 1
    of_pairs = common["update_interval"] if common["history_size"] > 0 else 1
    return lcm(of_factors, of_pairs)


def warn_of_turns(common: Mapping[str, Any], factored: bool, call: int) -> None:
    """Warn if replays of a call alone would not be what as many calls are.

    Args:
        common, factored: as for :func:`period`.
        call: its number, from 1 on.
    """
    steps = period(common, factored)
    if steps == 1:
        return
    frozen = []
    if factored:
        frozen.append("factors and bases whose turn it is not will never change again")
    if common["history_size"] > 0:
        due = call % common["update_interval"] == 0
        frozen.append(f"{'every' if due else 'no'} replay will try a pair")
    after = f", after the first {FIRST_CALLS}," if factored else ""
    warnings.warn(
        f"AdaQN.step() is being captured in a graph, which repeats this call of its schedule: "
        f"{', and '.join(frozen)}. Capture {steps} successive calls{after} and replay them in "
        "their order. If that is what you do, filter this warning.",
        RuntimeWarning,
        stacklevel=6,  # the caller of step(), which torch wraps twice
    )
