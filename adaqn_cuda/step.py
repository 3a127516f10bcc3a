"""One call of the schedule: which operations make a step and a pair update, in which order.

A step is ``w = (1 - lr weight_decay) w - lr p``.  Without pairs ``p = H0 q``, with ``q`` the
gradient's momentum and ``H0`` a diagonal or a Kronecker-factored matrix: one operation, which is
all that the default needs.

With pairs ``(s_i, y_i)``, the rows of S and Y, p is what the two-loop recursion of L-BFGS makes of
q.  That takes three passes over the vectors; the loops lie between them, on one number per pair:

1. pass 1 looks at the gradient: is it finite, ``|g|^2``, ``u = S q``.  The first loop makes
   coefficients a of u;
2. pass 2 takes the gradient into momentum, H0 and the Fisher ring F, and leaves
   ``r = H0 (q - Y^T a)`` and ``z = Y r``.  The second loop makes coefficients c of z;
3. pass 3 moves the parameters along ``p = r + S^T c``, shortened to what ``max_direction`` allows.

One operation makes all three as well, unless something happens between them (a Kronecker-factored
H0 is applied in the middle of pass 2, functions of the user's are called before it, processes add
up their sums) or groups average their gradients differently: then every pass is an operation of its
own.  So it is without pairs with ``normalize``, which must know p before anything moves along it,
and where each process has a part of the parameters.

Every ``update_interval``-th call tries a pair.  ``s = w_n - w_o``, from the averaged iterate at
which the last pair ended to the average of the iterates since the last try, and y comes from F,
from averaged gradients, or from a function of the user's.  That one, and the monitor, look at w_n
between passes 1 and 2, before anything that lasts has been written.  After the step:

1. pass A finds the weight of every row of F in y, from ``F s``, and that of ``B0 s = H0^-1 s``,
   which damping adds; a y from elsewhere is the only row of F;
2. pass B makes s and y, and their products with the stored ones;
3. the commit stores the pair, or skips it, or makes w_n the first w_o, or, where the monitored loss
   has grown too much, drops pairs, F and momentum, and the parameters go back to w_o.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import reference
from .curvature import (
    Product,
    average_gradient,
    begin_interval_anew,
    closure_difference,
    given_product,
    move_anchor_gradient,
    pending_displacement,
    sum_gradients,
)
from .interrupts import Hold
from .options import PER_GROUP, common_options
from .state.arena import Buffers, held, real_shape
from .state.layout import largest_norm

Monitor = Callable[[], "Tensor | float"]


@dataclass
class Hooks:
    """Functions of the user's that are called at pair updates."""

    monitor: Monitor | None
    curvature_closure: Callable[[], Tensor] | None
    curvature_product: Product | None


@dataclass(frozen=True)
class Settings:
    """What a call takes from the parameter groups and from :class:`torch.amp.GradScaler`.

    Args:
        common: options of the whole optimizer.
        rates: sizes of the groups, then per group ``lr`` and ``weight_decay`` by value, then both
            as tensors, where one is a tensor.
        averages: per group, how its gradients are averaged.
        square_keep: decay of the average of the whole |g|^2: the slowest of the groups'.
        grad_scale: what the gradients have been multiplied with.
        found_inf: whether they overflowed.
    """

    common: Mapping[str, Any]
    rates: tuple[Any, ...]
    averages: tuple[reference.Averages, ...]
    square_keep: float
    grad_scale: Tensor | None
    found_inf: Tensor | None

    @classmethod
    def of(
        cls,
        groups: list[dict[str, Any]],
        device: torch.device,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Settings:
        values: list[list[float]] = []
        tensors: list[Tensor | None] = []
        for name in PER_GROUP:
            options = [group[name] for group in groups]
            if any(isinstance(option, Tensor) for option in options):
                values.append([0.0] * len(options))
                tensors.append(torch.stack([on_device(option, device) for option in options]))
            else:
                values.append([float(option) for option in options])
                tensors.append(None)
        sizes = [len(group["params"]) for group in groups]
        averages = tuple(map(averages_of, groups))
        rates = (sizes, *values, *tensors)
        square_keep = max(group["decay"] for group in groups)
        return cls(common_options(groups), rates, averages, square_keep, grad_scale, found_inf)

    @property
    def group_sizes(self) -> list[int]:
        """Parameters of each group."""
        sizes: list[int] = self.rates[0]
        return sizes

    @property
    def betas(self) -> list[float]:
        """Decays of the groups' momentum."""
        return [own.beta for own in self.averages]

    @property
    def keeps(self) -> list[float]:
        """Weights of the old v in the new one."""
        return [own.keep for own in self.averages]

    @property
    def adds(self) -> list[float]:
        """Weights of g^2 in v."""
        return [own.add for own in self.averages]

    @property
    def epsilons(self) -> list[float]:
        """What is added to v."""
        return [own.eps for own in self.averages]

    @property
    def correct_bias(self) -> bool:
        """Of v."""
        return bool(self.common["bias_correction"])

    def averages_agree(self) -> bool:
        """Whether all groups have the same."""
        return len(set(self.averages)) == 1

    def momenta_agree(self) -> bool:
        """Whether those of the momentum are the same."""
        return len(set(self.betas)) == 1

    def max_grad_norm(self, dtype: torch.dtype) -> float:
        """Beyond this norm gradients are clipped: their squares must stay finite."""
        return min(float(self.common["max_grad_norm"]), largest_norm(dtype))

    def max_growth(self) -> float:
        """Bound on the growth of the scalar initial matrix from pair to pair.

        As y of the Fisher product vanishes with the gradient, s.y / y.y grows without bound where
        a method converges, whatever the curvature.  So with damped pairs the least that was seen
        counts, as the damping has it for the pairs themselves.
        """
        fisher = self.common["curvature"] == "fisher"
        return 1.0 if fisher and self.common["damping"] > 0 else inf


@dataclass
class Call:
    """One call of the schedule.

    Args:
        op: namespace with the operations.
        owners: the parameters as the user has them.
        params: the same, complex ones as real views.
        grads: their gradients likewise; ``None`` where there is none.
        a: the state.
        settings: of this call.
        hooks: functions of the user's.
        number: of the call, from 1 on.
        anew: whether other parameters have a gradient than in the call before.
        atomic: whether an operation that raises has written nothing.
        halfway: whether something that lasts has been written, and something is still to be.
    """

    op: Any
    owners: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor | None]
    a: Buffers
    settings: Settings
    hooks: Hooks
    number: int
    anew: bool
    atomic: bool
    halfway: bool = False

    def __post_init__(self) -> None:
        self.common = self.settings.common
        self.grad_scale = self.settings.grad_scale
        self.has_pairs = len(self.a.s_ring) > 0
        self.kronecker = self.a.table is not None
        self.normalized: bool = self.common["normalize"]
        self.due = self.has_pairs and self.number % self.common["update_interval"] == 0
        #: Whether momenta decay apart, so that s_i.m does not tell s_i.q.
        self.apart = (
            self.has_pairs and self.a.momentum is not None and not self.settings.momenta_agree()
        )

    def run(self, hold: Hold, finish: Callable[[], None]) -> None:
        """Step, update the pairs if it is time, then ``finish``.

        The moments s_i.m are kept from step to step: with them, passes take s_i.q from s_i.g.
        Where some parameters stand still, the step has those of the others, and what it changes in
        them is added to the whole.

        Args:
            hold: keeps Ctrl-C waiting, but while it is lifted for functions of the user's.
            finish: notes that the step is whole.
        """
        moments = before = self.a.moments
        if self._some_moments_stand():
            moments = self._moving_moments()
            before = moments.clone()
        loss, y = self._move(hold, moments)
        self.halfway = True
        if moments is not before:
            self.a.moments.add_(moments - before)
        if self.due:
            self._update_pairs(loss, y)
        finish()
        self.halfway = False

    def _some_moments_stand(self) -> bool:
        """Whether s_i.m has a part that this step must not change."""
        standing = any(g is None for g in self.grads)
        return standing and self.has_pairs and self.a.momentum is not None and not self.apart

    def _moving_moments(self) -> Tensor:
        """s_i.m over the parameters that have a gradient."""
        a = self.a
        return a.moments - reference.standing_moments(
            self.params, self.grads, a.s_ring, held(a.momentum)
        )

    # ------------------------------------------------------------------ the step

    def _move(self, hold: Hold, moments: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The step.

        Returns:
            The monitored loss and y, both at the averaged iterate, if it is time for them.
        """
        observed = self.due and not is_hookless(self.hooks, self.common)
        if self._needs_passes(observed):
            return self._move_in_passes(hold, moments, observed)
        self.halfway = not self.atomic
        if self.has_pairs:
            self._move_at_once(moments)
        elif self.kronecker:
            self._move_in_eigenbases()
        else:
            self._move_along_diagonal()
        return None, None

    def _needs_passes(self, observed: bool) -> bool:
        """Whether something happens between the passes, or they differ from group to group."""
        if not self.has_pairs:
            return self.normalized
        between = self.kronecker or observed or self.a.gradient_sum is not None
        return between or not self.settings.averages_agree()

    def _gradient_options(self) -> tuple[bool, float]:
        """maximize, and the largest norm."""
        return self.common["maximize"], self.settings.max_grad_norm(self.a.dtype)

    def _averages(self) -> tuple[Any, ...]:
        """By group: of m, of v, and what is added to v; and whether bias is corrected."""
        own = self.settings
        return own.betas, own.keeps, own.adds, own.epsilons, own.correct_bias

    def _runs(self) -> list[reference.Run]:
        """The averages along the flat vectors."""
        own = self.settings
        each = reference.averages_of_each(
            own.group_sizes, own.betas, own.keeps, own.adds, own.epsilons
        )
        return reference.runs_of(self.params, each)

    def _cap(self) -> float:
        """Without pairs p = H0 q, which needs no cap."""
        return self.common["max_direction"] if self.has_pairs else inf

    def _move_along_diagonal(self) -> None:
        a, settings = self.a, self.settings
        self.op.diagonal_step(
            self.params, self.grads, self.grad_scale, settings.found_inf,
            *self._gradient_options(), *self._averages(), *settings.rates, a.momentum,
            a.accumulator, a.projections, a.counters,
        )  # fmt: skip

    def _move_in_eigenbases(self) -> None:
        a, settings = self.a, self.settings
        self.op.kronecker_step(
            self.params, self.grads, a.table, self.grad_scale, settings.found_inf,
            *self._gradient_options(), *self._averages(), settings.square_keep, *self._turn(),
            *settings.rates, a.momentum, a.accumulator, a.factors, a.bases, a.square,
            a.projections, a.counters,
        )  # fmt: skip

    def _turn(self) -> tuple[int, int]:
        """Which call this is, and in how many of them every basis has its turn."""
        return self.number, self.common["factor_interval"]

    def _move_at_once(self, moments: Tensor) -> None:
        a, settings = self.a, self.settings
        self.op.direction_step(
            self.params, self.grads, a.s_ring, a.y_ring, a.gram, self.grad_scale,
            settings.found_inf, *self._gradient_options(), *settings.averages[0],
            settings.correct_bias, self._cap(), *settings.rates, a.momentum, a.accumulator,
            a.fisher, a.iterate_sum, a.direction, moments, a.projections, a.images, a.counters,
        )  # fmt: skip

    def _move_in_passes(
        self, hold: Hold, moments: Tensor, observed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The three passes; nothing that lasts is written before all that may fail is done."""
        op, a, settings = self.op, self.a, self.settings
        params, grads = self.params, self.grads
        maximize, limit = self._gradient_options()
        self._measure(moments)
        if self.kronecker:
            self.grad_scale = reference.shorten_outlier(
                held(a.square), settings.square_keep, settings.correct_bias, settings.betas[0],
                limit, self.grad_scale, moments, a.projections, a.counters,
            )  # fmt: skip
        if self.apart:
            self._project_by_run()
        loss, y = self._observe(hold) if observed else (None, None)
        self.halfway = True
        op.direction_pass2(
            params, grads, a.y_ring, a.gram, a.counters, a.projections, self.grad_scale, maximize,
            limit, *self._averages(), settings.group_sizes, self.kronecker, a.momentum,
            None if self.kronecker else a.accumulator, a.fisher, a.direction, a.images,
        )  # fmt: skip
        if a.gradient_sum is not None:
            if self.anew:
                begin_interval_anew(a)
            sum_gradients(params, grads, self.grad_scale, maximize, a)
        if self.kronecker:
            self._precondition()
        self._descend(moments)
        if self.apart:
            accepted = reference.step_is_accepted(a.projections, a.counters)
            a.moments.copy_(torch.where(accepted, self._moments_anew(), a.moments))
        return loss, y

    def _measure(self, moments: Tensor) -> None:
        """Pass 1: what the gradient is like, and u = S q."""
        a, own = self.a, self.settings
        self.op.direction_pass1(
            self.params, self.grads, a.s_ring, a.counters, self.grad_scale, own.found_inf,
            *self._gradient_options(), own.betas[0], moments, a.projections,
        )  # fmt: skip

    def _project_by_run(self) -> None:
        """u = S q where momenta decay apart."""
        a = self.a
        reference.projections_by_run(
            self.params, self.grads, a.s_ring, a.counters, self.grad_scale,
            *self._gradient_options(), self._runs(), held(a.momentum), a.projections,
        )  # fmt: skip

    def _rates(self) -> tuple[Any, ...]:
        """Those of the groups, or those by which every parameter's step has an rms of lr."""
        rates = self.settings.rates
        if not self.normalized:
            return rates
        adaptive = self.a.accumulator is not None
        return reference.normalized_rates(rates, self._mean_squares(), adaptive)

    def _mean_squares(self) -> Tensor:
        """Of every parameter's part of p, which is r without pairs."""
        counts = [real_shape(p).numel() for p in self.owners]
        return reference.mean_squares(self.params, counts, held(self.a.direction))

    def _descend(self, moments: Tensor) -> None:
        """Pass 3: p = r + S^T c, and the parameters go along it."""
        a, own = self.a, self.settings
        self.op.direction_pass3(
            self.params, self.grads, a.s_ring, a.gram, a.projections, a.images, a.direction,
            own.betas[0], self._cap(), *self._rates(), max(len(a.fisher), 1), a.iterate_sum,
            moments, a.counters,
        )  # fmt: skip

    def _moments_anew(self) -> Tensor:
        """s_i.m of the new m, where momenta decay apart."""
        return reference.moments_anew(self.a.s_ring, held(self.a.momentum))

    # ------------------------------------------------------------------ the Kronecker matrix

    def _precondition(self) -> None:
        """r = H0 (q - Y^T a) with the Kronecker-factored H0, between the halves of pass 2.

        And ``|H0 q|^2``, if the cap asks for it.
        """
        op, a, own = self.op, self.a, self.settings
        op.kronecker_accumulate(
            self.params, self.grads, a.table, a.projections, a.counters, self.grad_scale,
            *self._gradient_options(), own.group_sizes, own.keeps, own.adds, own.square_keep,
            *self._turn(), a.accumulator, a.factors, a.bases, a.square,
        )  # fmt: skip
        self._apply(held(a.direction), pending=1)
        op.direction_images(a.direction, a.y_ring, a.counters, a.projections, a.images)
        if self._cap() < inf:
            q = self._look_ahead()
            self._apply(q, pending=1)
            a.images[-1] = q.double().square().sum()

    def _apply(self, x: Tensor, pending: int, inverse: bool = False) -> None:
        """x = H0 x, or x = B0 x."""
        a, own = self.a, self.settings
        self.op.kronecker_apply(
            a.table, a.counters, a.accumulator, a.bases, own.group_sizes, own.keeps, own.epsilons,
            own.correct_bias, pending, inverse, x,
        )  # fmt: skip

    def _look_ahead(self) -> Tensor:
        """q anew: of the one before, pass 2 has left q - Y^T a."""
        a, (maximize, limit) = self.a, self._gradient_options()
        g = reference.gradient_vector(
            self.params, self.grads, a.dtype, self.grad_scale, maximize
        ) * reference.clip_factor(a.projections, limit)
        here = reference.presence(self.params, self.grads)
        return reference.look_ahead_from_new(g, a.momentum, a.counters, self._runs(), here)

    # ------------------------------------------------------------------ at the averaged iterate

    def _observe(self, hold: Hold) -> tuple[Tensor | None, Tensor | None]:
        """The monitored loss and y at the averaged iterate; the parameters are as before then."""
        saved = held(self.a.direction)
        saved.copy_(reference.flatten(self.params, saved.dtype))
        try:
            self._look_from(saved)
            with hold.lifted():
                loss = None if self.hooks.monitor is None else self._monitored_loss()
                y = self._evaluate_curvature()
        finally:
            self._restore(saved)
        return loss, -y if y is not None and self.common["maximize"] else y

    def _look_from(self, saved: Tensor) -> None:
        """The averaged iterate takes the place of the parameters, which are in ``saved``."""
        a = self.a
        self.op.iterate_swap(self.params, a.iterate_sum, a.projections, a.counters, saved)

    def _restore(self, saved: Tensor) -> None:
        """Whatever arrives meanwhile, the parameters do not stay at the average."""
        try:
            self.op.iterate_restore(self.params, saved)
        except BaseException:
            self.op.iterate_restore(self.params, saved)
            raise

    def _monitored_loss(self) -> Tensor:
        loss = held(self.hooks.monitor)()
        scalar = isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex()
        if not scalar and (isinstance(loss, bool) or not isinstance(loss, Real)):
            raise TypeError(
                f"monitor: expected a float or a one-element real tensor, got {loss!r}; return the "
                "mean loss on the monitoring batch"
            )
        return on_device(loss, self.a.counters.device)

    def _evaluate_curvature(self) -> Tensor | None:
        """y by the user's functions, with the parameters at the averaged iterate."""
        if self.common["curvature"] == "product":
            s = pending_displacement(self.params, self.a)
            return given_product(self.owners, held(self.hooks.curvature_product), s)
        if self.common["curvature"] == "difference":
            closure = held(self.hooks.curvature_closure)
            return closure_difference(self.owners, closure, self.params, self.a)
        return None

    # ------------------------------------------------------------------ the pair update

    def _update_pairs(self, loss: Tensor | None, y: Tensor | None) -> None:
        """Try a pair: passes A and B, and the commit."""
        op, a, common = self.op, self.a, self.common
        of_interval = None
        if a.gradient_sum is not None:
            of_interval = average_gradient(a), a.counters.clone()
            y = of_interval[0] - held(a.anchor_gradient)
        if y is not None:
            accepted = reference.step_is_accepted(a.projections, a.counters)
            a.fisher[0].copy_(torch.where(accepted, y.to(a.fisher.dtype), a.fisher[0]))
        image = self._initial_product() if common["damping"] > 0 else None
        self._weigh(y is not None, image)
        self._make_pair(image)
        standing = self._standing_if_reset(loss)
        op.curvature_commit(
            self.params, a.column, a.projections, loss, common["min_curvature"],
            common["max_increase"], self.settings.max_growth(), a.gram, a.moments, a.losses,
            a.anchor, a.iterate_sum, a.momentum, a.counters,
        )  # fmt: skip
        for p, w in standing:
            p.copy_(w)
        if of_interval is not None:
            move_anchor_gradient(a, *of_interval)

    def _weigh(self, explicit: bool, image: Tensor | None) -> None:
        """Pass A: weights of the gradients, and of B0 s, in y."""
        a, damping = self.a, self.common["damping"]
        self.op.curvature_pass_a(
            a.fisher, a.iterate_sum, a.anchor, a.counters, explicit, damping, image, a.weights
        )

    def _make_pair(self, image: Tensor | None) -> None:
        """Pass B: s and y, and their products with what is stored."""
        a = self.a
        self.op.curvature_pass_b(
            a.fisher, a.iterate_sum, a.anchor, a.counters, a.projections, a.weights, image,
            a.momentum, a.s_ring, a.y_ring, a.column,
        )  # fmt: skip

    def _standing_if_reset(self, loss: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Parameters that a reset, which moves all, must leave alone, and where they are."""
        if loss is None:
            return []
        pairs = zip(self.params, self.grads, strict=True)
        return [(p, p.clone()) for p, g in pairs if g is None]

    def _initial_product(self) -> Tensor:
        """B0 s of the candidate, in the scratch that a step has done with."""
        a, image = self.a, held(self.a.direction)
        iterate_sum, anchor = held(a.iterate_sum), held(a.anchor)
        if self.kronecker:
            image.copy_(reference.displacement(iterate_sum, anchor, a.counters))
            self._apply(image, pending=0, inverse=True)
        else:
            reference.initial_product(
                iterate_sum, anchor, a.gram, a.counters, self._runs(), self.settings.correct_bias,
                a.accumulator, image,
            )  # fmt: skip
        return image


def averages_of(group: Mapping[str, Any]) -> reference.Averages:
    """How the gradients of a parameter group are averaged."""
    decay = group["decay"]
    keep, add = (1.0, 1.0) if group["init"] == "adagrad" else (decay, 1.0 - decay)
    return reference.Averages(group["momentum"], keep, add, group["eps"])


def is_hookless(hooks: Hooks, common: Mapping[str, Any]) -> bool:
    """Whether no function of the user's is called in a step."""
    return hooks.monitor is None and common["curvature"] in ("fisher", "gradients")


def on_device(number: float | Tensor, device: torch.device) -> Tensor:
    """A 0-d float64 tensor beside the state; the host does not wait for it."""
    if isinstance(number, Tensor):
        ahead = device.type != "cpu"  # the host reads what is on its own side
        return number.detach().reshape(()).to(device, torch.float64, non_blocking=ahead)
    return torch.full((), number, dtype=torch.float64, device=device)
