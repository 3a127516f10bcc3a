"""Arguments of operations that come by group, from one number for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def by_group(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values``, with averages by group where there are none, as all groups have the same.

    What has no averages at all, as L-BFGS, is as it was.
    """
    if "keep" not in values:
        return dict(values)
    numbers = {
        "betas": values.get("beta", 0.0),
        "keeps": values["keep"],
        "adds": values.get("add", 1 - values["keep"]),
        "epsilons": values["eps"],
    }
    groups = len(values["group_sizes"])
    lists = {name: [number] * groups for name, number in numbers.items()}
    return {"square_keep": values["keep"], **lists, **values}


def apart(groups: int) -> dict[str, list[float]]:
    """Averages that differ from group to group; one of them has no momentum, one sums."""
    return {
        "betas": [0.9 * (k % 3) / 2 for k in range(groups)],
        "keeps": [1.0 if k % 4 == 3 else 0.9 - 0.2 * (k % 3) for k in range(groups)],
        "adds": [1.0 if k % 4 == 3 else 0.1 + 0.2 * (k % 3) for k in range(groups)],
        "epsilons": [10.0 ** -(3 + k % 5) for k in range(groups)],
    }
