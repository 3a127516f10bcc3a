"""A few small cases of every CUDA kernel, run by the emulation: tails, several warps and blocks.

For what takes long: ``races.py`` runs them under ThreadSanitizer, ``barriers.py`` without each
barrier once.  Pytest collects this file only where it is named.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from emulated import EmulatedOps
from kernel_problems import F32, F64
from kernel_properties import CASES, check_case, operations_for
from kronecker_properties import CASES as KRONECKER
from kronecker_properties import OPERATIONS as KRONECKER_OPERATIONS
from kronecker_properties import check_bases, check_kronecker_case
from secant_arguments import OPERATIONS as SECANT_OPERATIONS
from secant_arguments import check_search
from secant_properties import CASES as SECANT

#: Grids of two blocks, whose threads run in either order.
DEVICES = {"forward": EmulatedOps(1), "reverse": EmulatedOps(1, reverse_order=True)}
#: Where buffers of a tile and a basis lie in global memory.
LITTLE_MEMORY = EmulatedOps(1, shared_kib=28)

STEPS = (
    *("everything", "plain", "everything, mixed", "everything in float64", "full rings"),
    *("identity", "no history", "no history, everything", "damped, fisher ring of 150"),
)
SEARCHES = ("plain", "65 pairs", "bfloat16 rings", "mixed", "refused")
MATRICES = ("everything", "plain", "blocks", "everything in float64")
#: Type and side of a factor of rank one, whose basis takes several rounds; the largest is more than
#: one panel.
BASES = ((F32, 5), (F64, 5), (F32, 70))


def all_cases() -> dict[str, Callable[[], None]]:
    """Checks by name, each a run of one operation, quick ones first."""
    cases = {}
    for name, device in DEVICES.items():
        for case in STEPS:
            for operation in operations_for(CASES[case]):
                check = partial(check_case, device, operation, CASES[case], "cpu")
                cases[f"{operation}, {case}, {name}"] = check
        for case in SEARCHES:
            for operation in SECANT_OPERATIONS:
                check = partial(check_search, device, operation, SECANT[case])
                cases[f"{operation}, {case}, {name}"] = check
        for case in MATRICES:
            for operation in KRONECKER_OPERATIONS:
                check = partial(check_kronecker_case, device, operation, KRONECKER[case], "cpu")
                cases[f"{operation}, {case}, {name}"] = check
    for dtype, side in BASES:
        check = partial(check_bases, LITTLE_MEMORY, dtype, 1, side, "cpu")
        cases[f"basis of {side} columns in {dtype}"] = check
    return cases


SMALL_CASES = all_cases()


@pytest.mark.parametrize("name", SMALL_CASES)
def test_small_case(name):
    SMALL_CASES[name]()
