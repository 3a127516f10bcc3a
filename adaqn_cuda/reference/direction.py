"""The step with pairs: three passes over the d-vectors."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ..state.layout import Counter, state_dtype
from .acceptance import count_step, measure_gradient, step_is_accepted
from .averages import (
    Run,
    averages_of_each,
    blend,
    clip_factor,
    diagonal_root,
    look_ahead_from_old,
    old_and_new,
    runs_of,
)
from .descent import descend
from .flat import finite_or_zero, flatten, gradient_vector, presence
from .recursion import backward_coefficients, forward_coefficients, scalar_initial_matrix


def direction_step(
    params: list[Tensor],
    grads: list[Tensor | None],
    s_ring: Tensor,
    y_ring: Tensor,
    gram: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    maximize: bool,
    max_grad_norm: float,
    beta: float,
    keep: float,
    add: float,
    eps: float,
    correct_bias: bool,
    max_direction: float,
    group_sizes: list[int],
    lr: list[float],
    weight_decay: list[float],
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
    momentum: Tensor | None,
    accumulator: Tensor | None,
    fisher: Tensor,
    iterate_sum: Tensor | None,
    direction: Tensor,
    moments: Tensor,
    projections: Tensor,
    images: Tensor,
    counters: Tensor,
) -> None:
    """The three passes one after the other: a whole step on one device.

    All groups have the same averages.
    """
    direction_pass1(
        params, grads, s_ring, counters, grad_scale, found_inf, maximize, max_grad_norm, beta,
        moments, projections,
    )  # fmt: skip
    betas, keeps, adds, epsilons = ([x] * len(group_sizes) for x in (beta, keep, add, eps))
    direction_pass2(
        params, grads, y_ring, gram, counters, projections, grad_scale, maximize, max_grad_norm,
        betas, keeps, adds, epsilons, correct_bias, group_sizes, False, momentum, accumulator,
        fisher, direction, images,
    )  # fmt: skip
    rates = (group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor)
    direction_pass3(
        params, grads, s_ring, gram, projections, images, direction, beta, max_direction, *rates,
        max(len(fisher), 1), iterate_sum, moments, counters,
    )  # fmt: skip


def direction_pass1(
    params: list[Tensor],
    grads: list[Tensor | None],
    s_ring: Tensor,
    counters: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    maximize: bool,
    max_grad_norm: float,
    beta: float,
    moments: Tensor,
    projections: Tensor,
) -> None:
    """u_i = s_i.q for every slot; count what is not finite and what is not zero in g; |g|^2.

    The vectors S and g are all that is read: s_i.q comes from s_i.g and s_i.m, which is kept;
    where parameters stand still, ``moments`` are without what :func:`standing_moments` are.
    """
    g = gradient_vector(params, grads, state_dtype(params), grad_scale, maximize)
    measure_gradient(g, found_inf, projections)
    slots = s_ring.shape[0]
    of_m, of_g = old_and_new(counters, beta)
    s_g = (s_ring.to(g.dtype) @ g) * clip_factor(projections, max_grad_norm)
    projections[:slots] = of_m * moments + of_g * finite_or_zero(s_g)


def standing_moments(
    params: list[Tensor], grads: list[Tensor | None], s_ring: Tensor, momentum: Tensor
) -> Tensor:
    """s_i.m over the parameters that have no gradient."""
    still = [
        s.to(m.dtype) @ m
        for g, s, m in zip(
            grads, *(x.split([p.numel() for p in params], -1) for x in (s_ring, momentum)),
            strict=True,
        )
        if g is None
    ]  # fmt: skip
    return torch.stack(still).sum(0).double()


def projections_by_run(
    params: list[Tensor],
    grads: list[Tensor | None],
    s_ring: Tensor,
    counters: Tensor,
    grad_scale: Tensor | None,
    maximize: bool,
    max_grad_norm: float,
    runs: list[Run],
    momentum: Tensor,
    projections: Tensor,
) -> None:
    """u_i = s_i.q, where decays of the momentum differ and s_i.m does not tell; after pass 1."""
    g = gradient_vector(params, grads, momentum.dtype, grad_scale, maximize)
    g = g * clip_factor(projections, max_grad_norm)
    q = look_ahead_from_old(g, momentum, counters, runs, presence(params, grads))
    projections[: len(s_ring)] = finite_or_zero(s_ring.to(q.dtype) @ q)


def moments_anew(s_ring: Tensor, momentum: Tensor) -> Tensor:
    """s_i.m after such a step."""
    return (s_ring.to(momentum.dtype) @ momentum).double()


def direction_pass2(
    params: list[Tensor],
    grads: list[Tensor | None],
    y_ring: Tensor,
    gram: Tensor,
    counters: Tensor,
    projections: Tensor,
    grad_scale: Tensor | None,
    maximize: bool,
    max_grad_norm: float,
    betas: list[float],
    keeps: list[float],
    adds: list[float],
    epsilons: list[float],
    correct_bias: bool,
    group_sizes: list[int],
    identity: bool,
    momentum: Tensor | None,
    accumulator: Tensor | None,
    fisher: Tensor,
    direction: Tensor,
    images: Tensor,
) -> None:
    """r = D (q - sum_i a_i y_i);  z_i = y_i.r;  g enters v, m and the ring F.

    D = 1 / sqrt(v + eps), with the new v, or gamma where there is no accumulator.  With
    ``identity``, D = 1 and ``images`` are left to :func:`direction_images`: another initial matrix
    is applied in between.
    """
    accepted, here = step_is_accepted(projections, counters), presence(params, grads)
    g = gradient_vector(params, grads, direction.dtype, grad_scale, maximize)
    g = g * clip_factor(projections, max_grad_norm)
    y = y_ring.to(g.dtype)
    a = backward_coefficients(gram, counters, projections)
    runs = runs_of(params, averages_of_each(group_sizes, betas, keeps, adds, epsilons))
    q = blend(g, momentum, counters, runs, accepted, here)
    r = q - a.to(g.dtype) @ y
    if accumulator is not None:
        root = diagonal_root(g, accumulator, counters, runs, correct_bias, accepted, here)
        q, r = q / root, r / root
    elif not identity:
        gamma = scalar_initial_matrix(gram, counters)
        q, r = gamma * q, gamma * r
    direction.copy_(r)
    if not identity:
        images[:-1] = finite_or_zero(y @ r)
        images[-1] = q.double().square().sum()
    if len(fisher):
        slot = counters[Counter.NEXT_GRADIENT].reshape(1)
        row = torch.where(accepted, g.to(fisher.dtype), fisher.index_select(0, slot)[0])
        fisher.index_copy_(0, slot, row[None])


def direction_images(
    direction: Tensor, y_ring: Tensor, counters: Tensor, projections: Tensor, images: Tensor
) -> None:
    """z_i = y_i.r for every slot: the end of pass 2 where the initial matrix is no diagonal."""
    images[:-1] = finite_or_zero(y_ring.to(direction.dtype) @ direction)


def direction_pass3(
    params: list[Tensor],
    grads: list[Tensor | None],
    s_ring: Tensor,
    gram: Tensor,
    projections: Tensor,
    images: Tensor,
    direction: Tensor,
    beta: float,
    max_direction: float,
    group_sizes: list[int],
    lr: list[float],
    weight_decay: list[float],
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
    fisher_size: int,
    iterate_sum: Tensor | None,
    moments: Tensor,
    counters: Tensor,
) -> None:
    """w_sum += w;  w = (1 - lr weight_decay) w - lr p;  the counters move on.

    p = r + sum_i c_i s_i, scaled down where |p| > max_direction |H0 q|, to equality.  The next
    ``group_sizes[k]`` parameters take ``lr[k]`` and ``weight_decay[k]``; the tensors, where given,
    hold one value per group and take precedence.  Of the gradients it matters which are there.
    """
    accepted, here = step_is_accepted(projections, counters), presence(params, grads)
    c = forward_coefficients(gram, counters, projections, images)
    p = direction + c.to(direction.dtype) @ s_ring.to(direction.dtype)
    p = torch.where(here, p, 0.0) if isinstance(here, Tensor) else p
    if max_direction < inf:
        size = torch.linalg.vector_norm(p, dtype=torch.float64)
        p = p * cap_factor(size, images, max_direction)
    w = flatten(params, direction.dtype)
    if iterate_sum is not None:
        iterate_sum.copy_(torch.where(accepted, iterate_sum + w, iterate_sum))
    rates = (group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor)
    descend(params, w, p, accepted & here, *rates)
    count_moments(moments, projections, counters, beta, accepted)
    count_step(counters, projections, accepted, fisher_size)


def cap_factor(size: Tensor, images: Tensor, max_direction: float) -> Tensor:
    """min(1, max_direction |H0 q| / |p|), where ``size`` is |p|."""
    limit = max_direction * images[-1].sqrt()
    return torch.where(size > limit, limit / size, 1.0)


def count_moments(
    moments: Tensor, projections: Tensor, counters: Tensor, beta: float, accepted: Tensor
) -> None:
    """s_i.m moves as m does, with s_i.g taken out of u_i = s_i.q; before the step is counted."""
    of_m, of_g = old_and_new(counters, beta)
    s_g = (projections[: len(moments)] - of_m * moments) / of_g
    moments.copy_(torch.where(accepted, beta * moments + (1 - beta) * s_g, moments))
