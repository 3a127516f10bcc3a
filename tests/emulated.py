"""The CUDA kernels on the CPU: builds the emulation, and offers it as the operations' namespace."""

from __future__ import annotations

import os
from functools import cache
from itertools import chain, count, repeat
from pathlib import Path
from types import ModuleType

import torch
from cmake_module import ROOT, build_module, import_module
from torch import Tensor

from adaqn_cuda.state.layout import Flag, state_dtype
from adaqn_cuda.state.plan import Column

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


SOURCE, NAME = ROOT / "tests" / "emulation", "adaqn_cuda_emulated"


@cache
def build() -> ModuleType:
    """The extension module at ``ADAQN_EMULATED``, or ours, rebuilt where sources have changed."""
    if "ADAQN_EMULATED" in os.environ:
        return import_module(NAME, Path(os.environ["ADAQN_EMULATED"]))
    return build_module(SOURCE, NAME)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def of_each(by_group, group_sizes) -> list:
    """Per parameter, what its group has."""
    return list(chain.from_iterable(map(repeat, by_group, group_sizes)))


def rows(params, grads=None, group_sizes=None, kinds=None) -> list[tuple]:
    """Tensors as the bindings take them."""
    groups = of_each(count(), group_sizes or [len(params)])
    kinds = kinds or [0] * len(params)
    result = []
    for p, g, group, kind in zip(params, grads or [None] * len(params), groups, kinds, strict=True):
        assert p.is_contiguous() and (g is None or g.is_contiguous())
        types = (TYPES[p.dtype], TYPES[p.dtype if g is None else g.dtype])
        result.append((address(p), address(g), p.numel(), group, kind, *types))
    return result


def kinds_of(each: list[tuple]) -> tuple[list[tuple], list[int]]:
    """Averages by kind, and the kind of each, as the native library counts them."""
    by_kind, kinds = [], []
    for own in each:
        if not by_kind or by_kind[-1] != own:
            by_kind.append(own)
        kinds.append(len(by_kind) - 1)
    return by_kind or [(0.0, 0.0, 0.0, 0.0, False)], kinds  # an empty table is launched, too


def averages(group_sizes, betas, keeps, adds, epsilons, correct_bias) -> list[tuple]:
    """Per parameter, as the bindings take them."""
    groups = zip(betas, keeps, adds, epsilons, repeat(correct_bias, len(betas)), strict=True)
    return of_each(groups, group_sizes)


def dense(*lists) -> list[list[Tensor | None]]:
    """Contiguous tensors in the place of others, as the native library has them."""
    return [[t if t is None else t.contiguous() for t in tensors] for tensors in lists]


def copy_strided(strided: list[Tensor], dense: list[Tensor], to_dense: bool) -> bool:
    """Copies tensors to contiguous ones of the same shapes, or back; whether all could be."""
    rows = [
        (s.data_ptr(), d.data_ptr(), s.element_size(), list(s.shape), list(s.stride()))
        for s, d in zip(strided, dense, strict=True)
    ]
    return build().copy_strided(rows, to_dense)


def state(vector_type: torch.dtype, numel: int, **buffers: Tensor | None) -> dict[str, int]:
    """Buffers of :class:`adaqn_cuda.state.arena.Sizes` by name, as the bindings take them."""
    result = {"numel": numel, "slots": 0, "fisher_size": 1, "type": TYPES[vector_type]}
    result.update(pair_type=TYPES[vector_type], fisher_type=TYPES[vector_type])
    for name, buffer in buffers.items():
        result[name] = address(buffer)
        if name in ("s_ring", "y_ring", "fisher"):
            result[name + "_stride"] = buffer.stride(0)
    for name in ("s_ring", "y_ring"):
        if name in buffers:
            result["pair_type"] = TYPES[buffers[name].dtype]
            result["slots"] = len(buffers[name])
    if "gram" in buffers:
        result["slots"] = buffers["gram"].shape[1]
    if "fisher" in buffers:
        result["fisher_type"] = TYPES[buffers["fisher"].dtype]
        result["fisher_size"] = max(len(buffers["fisher"]), 1)
        if not len(buffers["fisher"]):
            result["fisher"] = 0
    return result


def rates(lr, weight_decay, lr_tensor, weight_decay_tensor) -> tuple:
    return lr, weight_decay, address(lr_tensor), address(weight_decay_tensor)


def kronecker(table, factors, bases, square, square_keep, call, interval, each) -> tuple:
    """The matrix as the bindings take it, and averages by kind from those of ``each`` parameter."""
    by_kind, kinds = kinds_of([each[param] for param in table[:, Column.PARAM].tolist()])
    addresses = map(address, (factors, bases, square))
    row = (address(table), len(table), *addresses, square_keep, call, interval, kinds)
    return row, by_kind


class EmulatedOps:
    """The operations of :data:`adaqn_cuda.ops.SCHEMAS`, by the emulated CUDA kernels."""

    def __init__(self, multiprocessors=2, blocks=2, shared_kib=227, reverse_order=False):
        self.device = (multiprocessors, blocks, shared_kib << 10, reverse_order)

    def _module(self) -> ModuleType:
        module = build()
        module.configure(*self.device)
        return module

    def direction_step(
        self, params, grads, s_ring, y_ring, gram, grad_scale, found_inf, maximize, max_grad_norm,
        beta, keep, add, eps, correct_bias, max_direction, group_sizes, lr, weight_decay, lr_tensor,
        weight_decay_tensor, momentum, accumulator, fisher, iterate_sum, direction, moments,
        projections, images, counters,
    ):  # fmt: skip
        self._module().direction_step(
            rows(params, grads, group_sizes),
            state(
                direction.dtype, direction.numel(), s_ring=s_ring, y_ring=y_ring, gram=gram,
                momentum=momentum, accumulator=accumulator, fisher=fisher,
                iterate_sum=iterate_sum, direction=direction, moments=moments,
                projections=projections, images=images, counters=counters,
            ),
            (address(grad_scale), address(found_inf), maximize, max_grad_norm),
            (beta, keep, add, eps, correct_bias), max_direction,
            rates(lr, weight_decay, lr_tensor, weight_decay_tensor),
        )  # fmt: skip

    def direction_pass1(
        self, params, grads, s_ring, counters, grad_scale, found_inf, maximize, max_grad_norm,
        beta, moments, projections,
    ):  # fmt: skip
        self._module().direction_pass1(
            rows(params, grads),
            state(
                state_dtype(params), s_ring.shape[1], s_ring=s_ring, moments=moments,
                projections=projections, counters=counters,
            ),
            (address(grad_scale), address(found_inf), maximize, max_grad_norm), beta,
        )  # fmt: skip

    def direction_pass2(
        self, params, grads, y_ring, gram, counters, projections, grad_scale, maximize,
        max_grad_norm, betas, keeps, adds, epsilons, correct_bias, group_sizes, identity, momentum,
        accumulator, fisher, direction, images,
    ):  # fmt: skip
        each = averages(group_sizes, betas, keeps, adds, epsilons, correct_bias)
        by_kind, kinds = kinds_of(each)
        self._module().direction_pass2(
            rows(params, grads, kinds=kinds),
            state(
                direction.dtype, direction.numel(), y_ring=y_ring, gram=gram, momentum=momentum,
                accumulator=accumulator, fisher=fisher, direction=direction,
                projections=projections, images=images, counters=counters,
            ),
            (address(grad_scale), 0, maximize, max_grad_norm), by_kind, identity,
        )  # fmt: skip

    def direction_images(self, direction, y_ring, counters, projections, images):
        self._module().direction_images(
            state(
                direction.dtype, direction.numel(), y_ring=y_ring, direction=direction,
                projections=projections, images=images, counters=counters,
            )
        )  # fmt: skip

    def direction_pass3(
        self, params, grads, s_ring, gram, projections, images, direction, beta, max_direction,
        group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor, fisher_size, iterate_sum,
        moments, counters,
    ):  # fmt: skip
        words = state(
            direction.dtype, direction.numel(), s_ring=s_ring, gram=gram, iterate_sum=iterate_sum,
            direction=direction, moments=moments, projections=projections, images=images,
            counters=counters,
        )  # fmt: skip
        self._module().direction_pass3(
            rows(params, grads, group_sizes), {**words, "fisher_size": fisher_size}, beta,
            max_direction, rates(lr, weight_decay, lr_tensor, weight_decay_tensor),
        )  # fmt: skip

    def diagonal_step(
        self, params, grads, grad_scale, found_inf, maximize, max_grad_norm, betas, keeps, adds,
        epsilons, correct_bias, group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor,
        momentum, accumulator, projections, counters,
    ):  # fmt: skip
        each = averages(group_sizes, betas, keeps, adds, epsilons, correct_bias)
        by_kind, kinds = kinds_of(each)
        self._module().diagonal_step(
            rows(params, grads, group_sizes, kinds),
            state(
                state_dtype(params), sum(p.numel() for p in params), momentum=momentum,
                accumulator=accumulator, projections=projections, counters=counters,
            ),
            (address(grad_scale), address(found_inf), maximize, max_grad_norm), by_kind,
            rates(lr, weight_decay, lr_tensor, weight_decay_tensor),
        )  # fmt: skip

    def kronecker_accumulate(
        self, params, grads, table, projections, counters, grad_scale, maximize, max_grad_norm,
        group_sizes, keeps, adds, square_keep, call, interval, accumulator, factors, bases, square,
    ):  # fmt: skip
        zeros = [0.0] * len(group_sizes)
        each = averages(group_sizes, zeros, keeps, adds, zeros, False)
        matrix, by_kind = kronecker(
            table, factors, bases, square, square_keep, call, interval, each
        )
        words = state(
            accumulator.dtype, accumulator.numel(), accumulator=accumulator,
            projections=projections, counters=counters,
        )  # fmt: skip
        self._module().kronecker_accumulate(
            rows(params, grads), {**words, "slots": len(projections) - len(Flag)}, matrix,
            (address(grad_scale), 0, maximize, max_grad_norm), by_kind,
        )  # fmt: skip

    def kronecker_apply(
        self, table, counters, accumulator, bases, group_sizes, keeps, epsilons, correct_bias,
        pending, inverse, x,
    ):  # fmt: skip
        zeros = [0.0] * len(group_sizes)
        each = averages(group_sizes, zeros, keeps, zeros, epsilons, correct_bias)
        matrix, by_kind = kronecker(table, None, bases, None, 0.0, 1, 1, each)
        self._module().kronecker_apply(
            state(x.dtype, x.numel(), accumulator=accumulator, counters=counters, direction=x),
            matrix, by_kind, pending, inverse,
        )  # fmt: skip

    def kronecker_step(
        self, params, grads, table, grad_scale, found_inf, maximize, max_grad_norm, betas, keeps,
        adds, epsilons, correct_bias, square_keep, call, interval, group_sizes, lr, weight_decay,
        lr_tensor, weight_decay_tensor, momentum, accumulator, factors, bases, square, projections,
        counters,
    ):  # fmt: skip
        each = averages(group_sizes, betas, keeps, adds, epsilons, correct_bias)
        matrix, by_kind = kronecker(
            table, factors, bases, square, square_keep, call, interval, each
        )
        self._module().kronecker_step(
            rows(params, grads, group_sizes),
            state(
                accumulator.dtype, accumulator.numel(), momentum=momentum, accumulator=accumulator,
                projections=projections, counters=counters,
            ),
            matrix, (address(grad_scale), address(found_inf), maximize, max_grad_norm), by_kind,
            rates(lr, weight_decay, lr_tensor, weight_decay_tensor),
        )  # fmt: skip

    def iterate_swap(self, params, iterate_sum, projections, counters, saved):
        words = state(
            saved.dtype, saved.numel(), iterate_sum=iterate_sum, projections=projections,
            counters=counters, direction=saved,
        )  # fmt: skip
        slots = len(projections) - len(Flag)
        self._module().iterate_swap(rows(params), {**words, "slots": slots})

    def iterate_restore(self, params, saved):
        words = state(saved.dtype, saved.numel(), direction=saved)
        self._module().iterate_restore(rows(params), words)

    def curvature_pass_a(
        self, fisher, iterate_sum, anchor, counters, explicit, damping, image, weights
    ):
        words = state(
            iterate_sum.dtype, iterate_sum.numel(), fisher=fisher, iterate_sum=iterate_sum,
            anchor=anchor, counters=counters, image=image, weights=weights,
        )  # fmt: skip
        self._module().curvature_pass_a(words, explicit, damping)

    def curvature_pass_b(
        self, fisher, iterate_sum, anchor, counters, projections, weights, image, momentum, s_ring,
        y_ring, column,
    ):  # fmt: skip
        self._module().curvature_pass_b(
            state(
                iterate_sum.dtype, iterate_sum.numel(), fisher=fisher, iterate_sum=iterate_sum,
                anchor=anchor, counters=counters, projections=projections, weights=weights,
                image=image, momentum=momentum, s_ring=s_ring, y_ring=y_ring, column=column,
            )
        )  # fmt: skip

    def curvature_commit(
        self, params, column, projections, monitored_loss, min_curvature, max_increase, max_growth,
        gram, moments, losses, anchor, iterate_sum, momentum, counters,
    ):  # fmt: skip
        words = state(
            anchor.dtype, anchor.numel(), column=column, projections=projections, gram=gram,
            moments=moments, losses=losses, anchor=anchor, iterate_sum=iterate_sum,
            momentum=momentum, counters=counters,
        )  # fmt: skip
        self._module().curvature_commit(
            rows(params), words, address(monitored_loss), min_curvature, max_increase, max_growth
        )

    def secant_measure(self, params, grads, loss, maximize, direction, trial, words):
        tensors = state(direction.dtype, len(direction), direction=direction, trial=trial)
        params, grads = dense(params, grads)
        self._module().secant_measure(
            rows(params, grads), {**tensors, "words": address(words)},
            address(loss), TYPES[loss.dtype], maximize,
        )  # fmt: skip

    def secant_decide(
        self, decrease, noise, tolerance_grad, tolerance_change, max_trials, max_iter, counters,
        words,
    ):  # fmt: skip
        self._module().secant_decide(
            state(torch.float64, 0, counters=counters, words=words), decrease, noise,
            tolerance_grad, tolerance_change, max_trials, max_iter,
        )  # fmt: skip

    def secant_keep(self, params, words, origin):
        words = state(origin.dtype, len(origin), words=words, origin=origin)
        [copies] = dense(params)
        self._module().secant_keep(rows(copies), words)

    def secant_pair(
        self, trial, direction, absolute, relative, self_scaled, gradient, s_ring, y_ring, gram,
        scales, projections, counters, words,
    ):  # fmt: skip
        self._module().secant_pair(
            state(
                trial.dtype, len(trial), trial=trial, direction=direction, gradient=gradient,
                s_ring=s_ring, y_ring=y_ring, gram=gram, scales=scales, projections=projections,
                counters=counters, words=words,
            ),
            absolute, relative, self_scaled,
        )  # fmt: skip

    def secant_residual(
        self, gradient, y_ring, gram, counters, projections, words, identity, residual, images
    ):
        self._module().secant_residual(
            state(
                gradient.dtype, len(gradient), gradient=gradient, y_ring=y_ring, gram=gram,
                counters=counters, projections=projections, words=words, residual=residual,
                images=images,
            ),
            identity,
        )  # fmt: skip

    def secant_combine(
        self, gradient, s_ring, gram, scales, counters, projections, images, residual, lr, first,
        direction, words,
    ):  # fmt: skip
        self._module().secant_combine(
            state(
                gradient.dtype, len(gradient), gradient=gradient, s_ring=s_ring, gram=gram,
                scales=scales, counters=counters, projections=projections, images=images,
                residual=residual, direction=direction, words=words,
            ),
            lr, first,
        )  # fmt: skip

    def secant_move(self, params, origin, direction, step, limit, words):
        words = state(origin.dtype, len(origin), origin=origin, direction=direction, words=words)
        [copies] = dense(params)
        self._module().secant_move(rows(copies), words, step, limit)
        for p, own in zip(params, copies, strict=True):
            if p is not own:
                p.copy_(own)
