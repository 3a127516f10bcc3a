"""Products in full precision, whatever the surroundings ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


def _switches(device: torch.device) -> Any:
    """Where torch keeps the precision of float32 products on such a device, if it does."""
    backends: Any = torch.backends
    places = {"cuda": backends.cuda, "cpu": backends.mkldnn}
    return places[device.type].matmul if device.type in places else None


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 nor bfloat16 in products of float32 matrices.

    Rounding to 10 bits would leave noise of 5e-4 where a rotated gradient is zero, a thousand times
    what the floor under its squares is made for.
    """
    switches = _switches(device)
    before = getattr(switches, "fp32_precision", "none")
    lowered = before not in ("none", "ieee")
    available = torch.amp.is_autocast_available(device.type)
    autocast = available and torch.is_autocast_enabled(device.type)
    if lowered:
        switches.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            yield
    finally:
        if lowered:
            switches.fp32_precision = "none"  # inherits; if that was it, it stays so
            if switches.fp32_precision != before:
                switches.fp32_precision = before
