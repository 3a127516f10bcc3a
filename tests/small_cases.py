"""A few small cases of every CUDA kernel, run by the emulation: tails, several warps and blocks.

For what takes long: ``races.py`` runs them under ThreadSanitizer, ``barriers.py`` without each
barrier once.  Pytest collects this file only where it is named.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from emulated import EmulatedOps, copy_strided
from kernel_problems import BF16, F32, F64
from kernel_properties import CASES, check_case, operations_for
from kronecker_properties import CASES as KRONECKER
from kronecker_properties import OPERATIONS as KRONECKER_OPERATIONS
from kronecker_properties import check_bases, check_hopeless_factors, check_kronecker_case
from secant_arguments import OPERATIONS as SECANT_OPERATIONS
from secant_arguments import check_search
from secant_properties import CASES as SECANT

#: Grids of two blocks, whose threads run in either order.
FORWARD, REVERSE = EmulatedOps(1), EmulatedOps(1, reverse_order=True)
#: Buffers of most tiles and bases lie in global memory.
LITTLE_MEMORY = EmulatedOps(1, shared_kib=28)

STEPS = (
    *("everything", "plain", "everything, mixed", "everything in float64", "full rings"),
    *("identity", "no history", "no history, everything", "damped, fisher ring of 150"),
)
SEARCHES = (
    *("65 pairs", "plain", "unpadded rows", "bfloat16 rings", "mixed", "refused", "forgotten"),
)
MATRICES = (
    *("everything", "plain", "growing tiles", "every call", "blocks", "everything in float64"),
)
#: Type and side of a factor of rank one, whose basis takes several rounds; the largest is more than
#: one panel.
BASES = ((F32, 5), (F64, 5), (F32, 70))


def step_cases(device: EmulatedOps, case: str) -> dict[str, Callable[[], None]]:
    return {
        f"{operation}, {case}": partial(check_case, device, operation, CASES[case], "cpu")
        for operation in operations_for(CASES[case])
    }


def search_cases(device: EmulatedOps, case: str) -> dict[str, Callable[[], None]]:
    return {
        f"{operation}, {case}": partial(check_search, device, operation, SECANT[case])
        for operation in SECANT_OPERATIONS
    }


def matrix_cases(device: EmulatedOps, case: str) -> dict[str, Callable[[], None]]:
    return {
        f"{operation}, {case}": partial(
            check_kronecker_case, device, operation, KRONECKER[case], "cpu"
        )
        for operation in KRONECKER_OPERATIONS
    }


def basis_cases(device: EmulatedOps, kind: tuple) -> dict[str, Callable[[], None]]:
    dtype, side = kind
    return {f"basis of {side}, {dtype}": partial(check_bases, device, dtype, 1, side, "cpu")}


def hopeless_case(device: EmulatedOps) -> dict[str, Callable[[], None]]:
    """A block has a basis that fails, and then a larger one."""
    check = partial(check_hopeless_factors, device, 0.0, "cpu", ((5, 12), (20, 12)))
    return {"hopeless factors": check}


def many_pairs_case(device: EmulatedOps) -> dict[str, Callable[[], None]]:
    """More coefficients than a warp has lanes: threads read what others have written."""
    name = "everything, history of 64"
    return {name: partial(check_case, device, "direction_pass3", CASES[name], "cpu")}


def check_strided() -> None:
    """Tensors of several blocks' elements, of every size that an element has."""
    strided = [torch.randn(30, 40, dtype=dtype).mT for dtype in (F32, F64, BF16)]
    dense = [torch.zeros(t.shape, dtype=t.dtype) for t in strided]
    assert copy_strided(strided, dense, True)
    back = [torch.zeros_like(t) for t in strided]
    assert copy_strided(back, dense, False)
    assert all(map(torch.equal, strided, dense)) and all(map(torch.equal, strided, back))


def all_cases() -> dict[str, Callable[[], None]]:
    """Checks by name, each a run of one operation; some of every kind come first."""
    families = ((step_cases, STEPS), (search_cases, SEARCHES), (matrix_cases, MATRICES))
    cases = {}
    for make, names in families:
        cases.update(make(FORWARD, names[0]))
    for kind in BASES:
        cases.update(basis_cases(LITTLE_MEMORY, kind))
    cases.update(hopeless_case(FORWARD))
    cases.update(many_pairs_case(FORWARD))
    cases["tensors that are not contiguous"] = check_strided
    for make, names in families:
        for name in names[1:]:
            cases.update(make(FORWARD, name))
        cases.update({f"{x}, reverse": check for x, check in make(REVERSE, names[0]).items()})
    return cases


SMALL_CASES = all_cases()


@pytest.mark.parametrize("name", SMALL_CASES)
def test_small_case(name):
    SMALL_CASES[name]()
