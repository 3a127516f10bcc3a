"""Where the y of a curvature pair comes from, if not from the accumulated Fisher product.

Whatever the source, y is one flat vector, and the pair goes the same way from there on: damping,
rounding, the curvature test.  See :class:`adaqn_cuda.AdaQN`, argument ``curvature``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import reference
from .state.arena import Buffers, held, real_view
from .state.layout import Counter

Product = Callable[[Mapping[Tensor, Tensor]], Mapping[Tensor, Tensor]]

# --------------------------------------------------------------------------- a callable


def flat_of(params: list[Tensor], parts: Mapping[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """One vector of what belongs to each parameter; zero where nothing does."""
    pieces = [parts[p] if p in parts else torch.zeros_like(p) for p in params]
    return reference.flatten([real_view(piece.resolve_conj()) for piece in pieces], dtype)


def parts_of(params: list[Tensor], flat: Tensor) -> dict[Tensor, Tensor]:
    """What belongs to each parameter, in its shape; complex where it is."""
    parts, start = {}, 0
    for p in params:
        shape = real_view(p.detach()).shape
        part = flat[start : start + shape.numel()].view(shape)
        # A copy, because complex numbers begin at even places only.
        parts[p] = torch.view_as_complex(part.clone()) if p.is_complex() else part
        start += shape.numel()
    return parts


def given_product(params: list[Tensor], product: Product, s: Tensor) -> Tensor:
    """y = product(s)."""
    with torch.enable_grad():
        y = product(parts_of(params, s))
    if not isinstance(y, Mapping):
        raise TypeError(
            f"curvature: expected the callable to return a mapping from parameters to y, got {y!r}"
        )
    for p, part in y.items():
        if not isinstance(p, Tensor):
            raise TypeError(
                f"curvature: expected y with parameters as keys, got {p!r}; use the keys of s"
            )
        if not isinstance(part, Tensor) or part.shape != p.shape:
            raise TypeError(
                f"curvature: expected y of shape {tuple(p.shape)} for the parameter of that shape, "
                f"got {tuple(part.shape) if isinstance(part, Tensor) else part!r}"
            )
    return flat_of(params, y, s.dtype)


def pending_displacement(params: list[Tensor], a: Buffers) -> Tensor:
    """s = w_n - w_o between passes 1 and 2, where the current iterate is not in the sum yet.

    Zero where there is no w_o yet, or no w_n, and so no pair will be tried.  The parameters hold
    w_n, rounded to their dtype; ``direction`` holds the current iterate.
    """
    accepted = reference.step_is_accepted(a.projections, a.counters)
    count = a.counters[Counter.ITERATES] + accepted.long()
    before = held(a.iterate_sum)
    total = torch.where(accepted, before + held(a.direction), before)
    s = reference.average(total, count) - held(a.anchor)
    return torch.where((count > 0) & (a.counters[Counter.ANCHORED] > 0), s, 0.0)


# --------------------------------------------------------------------------- two gradients


def closure_gradient(
    params: list[Tensor], closure: Callable[[], Tensor], dtype: torch.dtype
) -> Tensor:
    """The gradient of ``closure()`` where the parameters are; ``.grad`` stays as it is."""
    with torch.enable_grad():
        loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TypeError(
                f"curvature_closure: expected a one-element tensor with a graph, got {loss!r}; "
                "return the loss on the current batch, without backward()"
            )
        trained = [p for p in params if p.requires_grad]
        grads = torch.autograd.grad(loss.reshape(()), trained, allow_unused=True)
    found = {p: g for p, g in zip(trained, grads, strict=True) if g is not None}
    return flat_of(params, found, dtype)


def closure_difference(
    params: list[Tensor], closure: Callable[[], Tensor], views: list[Tensor], a: Buffers
) -> Tensor:
    """y = gradient at w_n - gradient at w_o, of the same loss.

    The parameters hold w_n at the beginning and w_o at the end, or w_n still while there is no
    w_o: a model may be undefined where all parameters are zero.  ``views`` are the real ones.
    """
    w_o = held(a.anchor)
    at_average = closure_gradient(params, closure, w_o.dtype)
    w_n = reference.flatten(views, w_o.dtype)
    reference.write_back(views, torch.where(a.counters[Counter.ANCHORED] > 0, w_o, w_n))
    return at_average - closure_gradient(params, closure, w_o.dtype)


# --------------------------------------------------------------------------- the steps' gradients


def sum_gradients(
    params: list[Tensor],
    grads: list[Tensor | None],
    grad_scale: Tensor | None,
    maximize: bool,
    a: Buffers,
) -> None:
    """gradient_sum += g, if the step is accepted; after pass 1."""
    total = held(a.gradient_sum)
    g = reference.gradient_vector(params, grads, total.dtype, grad_scale, maximize)
    accepted = reference.step_is_accepted(a.projections, a.counters)
    total.copy_(torch.where(accepted, total + g, total))


def begin_interval_anew(a: Buffers) -> None:
    """Forget sums and anchor, if the step is accepted; after pass 1.

    Averaged gradients must be of the same parameters at both ends of a pair: where one had none,
    its part of y would be all of its gradient.
    """
    kept = ~reference.step_is_accepted(a.projections, a.counters)
    for total in (held(a.iterate_sum), held(a.gradient_sum)):
        total.copy_(torch.where(kept, total, 0.0))
    for word in (Counter.ITERATES, Counter.ANCHORED):
        a.counters[word] *= kept.long()


def average_gradient(a: Buffers) -> Tensor:
    """The average of the gradients at the iterates in the sum, counted by pass 3."""
    return reference.average(held(a.gradient_sum), a.counters[Counter.ITERATES])


def move_anchor_gradient(a: Buffers, average: Tensor, before: Tensor) -> None:
    """The anchor's gradient follows the anchor; ``before`` are the counters before the commit."""
    stored = a.counters[Counter.STORED] > before[Counter.STORED]
    first = a.counters[Counter.ANCHORED] > before[Counter.ANCHORED]
    at_anchor, total = held(a.anchor_gradient), held(a.gradient_sum)
    at_anchor.copy_(torch.where(stored | first, average, at_anchor))
    total.copy_(torch.where(a.counters[Counter.ITERATES] > 0, total, 0.0))
