"""The door to the kernels: schemas, fake implementations, and the choice of a backend.

Every operation is registered under ``torch.ops.adaqn`` with :mod:`adaqn_cuda.reference` as its
implementation for all devices; a native library, once loaded, takes over the devices it serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from . import native, reference

SCHEMAS = {
    "direction_step": (
        "(Tensor(a!)[] params, Tensor?[] grads, Tensor s_ring, Tensor y_ring, Tensor gram, "
        "Tensor? grad_scale, Tensor? found_inf, bool maximize, float max_grad_norm, float beta, "
        "float keep, float add, float eps, bool correct_bias, float max_direction, "
        "int[] group_sizes, float[] lr, float[] weight_decay, Tensor? lr_tensor, "
        "Tensor? weight_decay_tensor, Tensor(b!)? momentum, Tensor(c!)? accumulator, "
        "Tensor(d!) fisher, Tensor(e!)? iterate_sum, Tensor(f!) direction, Tensor(g!) moments, "
        "Tensor(h!) projections, Tensor(i!) images, Tensor(j!) counters) -> ()"
    ),
    "direction_pass1": (
        "(Tensor[] params, Tensor?[] grads, Tensor s_ring, Tensor counters, Tensor? grad_scale, "
        "Tensor? found_inf, bool maximize, float max_grad_norm, float beta, Tensor moments, "
        "Tensor(a!) projections) -> ()"
    ),
    "direction_pass2": (
        "(Tensor[] params, Tensor?[] grads, Tensor y_ring, Tensor gram, Tensor counters, "
        "Tensor projections, Tensor? grad_scale, bool maximize, float max_grad_norm, "
        "float[] betas, float[] keeps, float[] adds, float[] epsilons, bool correct_bias, "
        "int[] group_sizes, bool identity, "
        "Tensor(a!)? momentum, Tensor(b!)? accumulator, Tensor(c!) fisher, Tensor(d!) direction, "
        "Tensor(e!) images) -> ()"
    ),
    "direction_images": (
        "(Tensor direction, Tensor y_ring, Tensor counters, Tensor projections, "
        "Tensor(a!) images) -> ()"
    ),
    "direction_pass3": (
        "(Tensor(a!)[] params, Tensor?[] grads, Tensor s_ring, Tensor gram, Tensor projections, "
        "Tensor images, Tensor(b!) direction, float beta, float max_direction, "
        "int[] group_sizes, float[] lr, float[] weight_decay, Tensor? lr_tensor, "
        "Tensor? weight_decay_tensor, int fisher_size, Tensor(c!)? iterate_sum, "
        "Tensor(d!) moments, Tensor(e!) counters) -> ()"
    ),
    "diagonal_step": (
        "(Tensor(a!)[] params, Tensor?[] grads, Tensor? grad_scale, Tensor? found_inf, "
        "bool maximize, float max_grad_norm, float[] betas, float[] keeps, float[] adds, "
        "float[] epsilons, bool correct_bias, int[] group_sizes, float[] lr, float[] weight_decay, "
        "Tensor? lr_tensor, Tensor? weight_decay_tensor, Tensor(b!)? momentum, "
        "Tensor(c!)? accumulator, Tensor(d!) projections, Tensor(e!) counters) -> ()"
    ),
    "kronecker_step": (
        "(Tensor(a!)[] params, Tensor?[] grads, Tensor table, Tensor? grad_scale, "
        "Tensor? found_inf, bool maximize, float max_grad_norm, float[] betas, float[] keeps, "
        "float[] adds, float[] epsilons, bool correct_bias, float square_keep, int call, "
        "int interval, int[] group_sizes, float[] lr, float[] weight_decay, Tensor? lr_tensor, "
        "Tensor? weight_decay_tensor, "
        "Tensor(b!)? momentum, Tensor(c!) accumulator, Tensor(d!) factors, Tensor(e!) bases, "
        "Tensor(f!) square, Tensor(g!) projections, Tensor(h!) counters) -> ()"
    ),
    "kronecker_accumulate": (
        "(Tensor[] params, Tensor?[] grads, Tensor table, Tensor projections, Tensor counters, "
        "Tensor? grad_scale, bool maximize, float max_grad_norm, int[] group_sizes, "
        "float[] keeps, float[] adds, float square_keep, int call, int interval, "
        "Tensor(a!) accumulator, Tensor(b!) factors, Tensor(c!) bases, Tensor(d!) square) -> ()"
    ),
    "kronecker_apply": (
        "(Tensor table, Tensor counters, Tensor accumulator, Tensor bases, int[] group_sizes, "
        "float[] keeps, float[] epsilons, bool correct_bias, int pending, bool inverse, "
        "Tensor(a!) x) -> ()"
    ),
    "iterate_swap": (
        "(Tensor(a!)[] params, Tensor iterate_sum, Tensor projections, Tensor counters, "
        "Tensor(b!) saved) -> ()"
    ),
    "iterate_restore": "(Tensor(a!)[] params, Tensor saved) -> ()",
    "curvature_pass_a": (
        "(Tensor fisher, Tensor iterate_sum, Tensor anchor, Tensor counters, bool explicit, "
        "float damping, Tensor? image, Tensor(a!) weights) -> ()"
    ),
    "curvature_pass_b": (
        "(Tensor fisher, Tensor iterate_sum, Tensor anchor, Tensor counters, Tensor projections, "
        "Tensor weights, Tensor? image, Tensor? momentum, Tensor(a!) s_ring, Tensor(b!) y_ring, "
        "Tensor(c!) column) -> ()"
    ),
    "curvature_commit": (
        "(Tensor(a!)[] params, Tensor column, Tensor projections, Tensor? monitored_loss, "
        "float min_curvature, float max_increase, float max_growth, Tensor(b!) gram, "
        "Tensor(c!) moments, Tensor(d!) losses, Tensor(e!) anchor, Tensor(f!) iterate_sum, "
        "Tensor(g!)? momentum, Tensor(h!) counters) -> ()"
    ),
    "secant_measure": (
        "(Tensor[] params, Tensor?[] grads, Tensor loss, bool maximize, Tensor direction, "
        "Tensor(a!) trial, Tensor(b!) words) -> ()"
    ),
    "secant_decide": (
        "(float decrease, float noise, float tolerance_grad, float tolerance_change, "
        "int max_trials, int max_iter, Tensor counters, Tensor(a!) words) -> ()"
    ),
    "secant_keep": "(Tensor[] params, Tensor words, Tensor(a!) origin) -> ()",
    "secant_pair": (
        "(Tensor trial, Tensor direction, float absolute, float relative, bool self_scaled, "
        "Tensor(a!) gradient, Tensor(b!) s_ring, Tensor(c!) y_ring, Tensor(d!) gram, "
        "Tensor(e!) scales, Tensor(f!) projections, Tensor(g!) counters, Tensor(h!) words) -> ()"
    ),
    "secant_residual": (
        "(Tensor gradient, Tensor y_ring, Tensor gram, Tensor counters, Tensor projections, "
        "Tensor words, bool identity, Tensor(a!) residual, Tensor(b!) images) -> ()"
    ),
    "secant_combine": (
        "(Tensor gradient, Tensor s_ring, Tensor gram, Tensor scales, Tensor counters, "
        "Tensor projections, Tensor images, Tensor residual, float lr, float first, "
        "Tensor(a!) direction, Tensor(b!) words) -> ()"
    ),
    "secant_move": (
        "(Tensor(a!)[] params, Tensor origin, Tensor direction, float? step, float limit, "
        "Tensor(b!) words) -> ()"
    ),
}

_library = torch.library.Library("adaqn", "DEF")


def _fake(*args: object, **kwargs: object) -> None:
    """No operation returns anything; all write into their arguments."""


def _register() -> None:
    for name, schema in SCHEMAS.items():
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"adaqn::{name}", _fake, lib=_library)


_register()


@dataclass(frozen=True)
class Backend:
    """Where the operations run.

    Args:
        name: ``"reference"`` or ``"native"``.
        reason: why this one, and how to get a better one, in one sentence.
        ops: namespace with a callable for each operation of :data:`SCHEMAS`.
    """

    name: str
    reason: str
    ops: SimpleNamespace


_REFERENCE = SimpleNamespace(**{name: getattr(reference, name) for name in SCHEMAS})
_DISPATCHED = SimpleNamespace(**{name: getattr(torch.ops.adaqn, name).default for name in SCHEMAS})


def native_obstacle(device: torch.device) -> str | None:
    """Why native kernels cannot serve ``device``, and the remedy; ``None`` if they can."""
    obstacle = native.obstacle(device.type)
    if obstacle is None and device.type == "cuda":
        obstacle = native.cuda_obstacle(_index(device))
    return obstacle


def _index(device: torch.device) -> int:
    """The number of a CUDA device."""
    return torch.cuda.current_device() if device.index is None else device.index


def load_kernels(device: torch.device, fused: bool | None, **kinds: Any) -> None:
    """Load CUDA kernels, as :func:`native.load_cuda_kernels` does, where they are to run."""
    if device.type == "cuda" and fused is not False and native_obstacle(device) is None:
        native.load_cuda_kernels(_index(device), **kinds)


def check_fused(device: torch.device) -> None:
    """For an optimizer whose ``fused`` is ``True``; parameters without data may get it yet.

    Raises:
        RuntimeError: there are no native kernels for ``device``.
    """
    if device.type != "meta":
        select_backend(device, True)


def select_backend(device: torch.device, fused: bool | None) -> Backend:
    """The backend for parameters on ``device``.

    Args:
        device: where the parameters live.
        fused: ``None`` for the best available, ``True`` to insist on native kernels, ``False``
            for the reference.

    Raises:
        RuntimeError: ``fused=True`` and there are no native kernels for ``device``.
    """
    if fused is False:
        return Backend("reference", "fused=False asks for the PyTorch reference", _REFERENCE)
    obstacle = native_obstacle(device)
    if obstacle is None:
        return Backend("native", f"native kernels serve {device.type}", _DISPATCHED)
    if fused:
        raise RuntimeError(f"fused=True, but {obstacle}; pass fused=None to use the reference")
    # Not dispatched: a library whose kernels do not run on this device has registered them.
    return Backend("reference", obstacle, _REFERENCE)
