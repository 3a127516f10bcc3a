"""The optimizer class: what users hold in their hands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Number, Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import ops
from .arena import Arena, Buffers, Sizes, real_view
from .compiled import register
from .layout import Counter, Loss
from .options import CHECKS, PER_GROUP, check_monitor, validate, validate_group

Monitor = Callable[[], "Tensor | float"]


class AdaQN(Optimizer):
    r"""Implements adaQN, a stochastic quasi-Newton method with an adaptive diagonal.

    The step is :math:`w \leftarrow w - \alpha H g`, where :math:`H` is the L-BFGS inverse Hessian
    of the stored curvature pairs :math:`(s_i, y_i)` on top of the diagonal
    :math:`H^0 = \mathrm{diag}(v + \epsilon)^{-1/2}` of Adagrad or RMSprop. Every
    ``update_interval`` steps a new pair is tried: :math:`s` is the difference of two averaged
    iterates and :math:`y = \frac{1}{|F|} \sum_i F_i (F_i^\top s)` the product of the accumulated
    empirical Fisher matrix with it. If a monitored loss has grown by more than ``max_increase``,
    all pairs and gradients are dropped and the parameters go back to the last averaged iterate
    that was accepted. See `adaQN: An Adaptive Quasi-Newton Algorithm for Training RNNs`_,
    Algorithm 1.

    The state takes :math:`4 + 2 (\text{history\_size} + 1) + \text{fisher\_size}` numbers per
    parameter, in float32 (float64 if a parameter is): 232 bytes with the defaults, of which
    ``fisher_size`` takes 4 bytes a gradient and ``history_size`` 8 bytes a pair. With
    ``init="scalar"`` it is one number less.

    Args:
        params (iterable): parameters, or named parameters, or dicts that define parameter groups.
            float16 and bfloat16 parameters keep float32 state; complex ones count as pairs of real
            numbers. All parameters live on one device.
        lr (float, Tensor, optional): step length :math:`\alpha` (default: 1e-2).
        history_size (int, optional): curvature pairs kept, :math:`m_L` (default: 10).
        fisher_size (int, optional): recent gradients kept for the Fisher product, :math:`m_F`
            (default: 32).
        update_interval (int, optional): calls of :meth:`step` between two pair updates, :math:`L`
            (default: 10).
        init (str, optional): initial inverse Hessian: ``"adagrad"`` sums squared gradients,
            ``"rmsprop"`` averages them, ``"scalar"`` is :math:`s^\top y / y^\top y` of the newest
            pair (default: ``"rmsprop"``).
        decay (float, optional): decay of the RMSprop average, in [0, 1) (default: 0.9).
        eps (float, optional): added to :math:`v` inside the square root (default: 2**-26).
        min_curvature (float, optional): a pair is stored only if
            :math:`s^\top y / y^\top y` exceeds it (default: 1e-4).
        max_increase (float, optional): ratio of monitored losses, at least 1, beyond which the
            memory is reset, :math:`\gamma` (default: 1.01).
        monitor (Callable, optional): returns the loss on a fixed monitoring batch, as a float or
            one-element tensor. Called without gradients at every pair update, with the
            parameters holding the averaged iterate; should be deterministic. ``None`` turns
            resets off. Can be assigned later; not copied or pickled (default: ``None``).
        weight_decay (float, Tensor, optional): decoupled weight decay, as in AdamW (default: 0).
        maximize (bool, optional): maximize the objective (default: ``False``).
        history_dtype (torch.dtype, optional): dtype in which the pairs are kept: ``None`` for the
            state's own, or ``torch.bfloat16``, which halves their memory and traffic. The
            curvature test is taken on the rounded pairs (default: ``None``).
        fisher_dtype (torch.dtype, optional): the same for the gradients (default: ``None``).
        fused (bool, optional): ``None`` takes native kernels where there are any, ``True``
            insists on them, ``False`` takes the PyTorch reference (default: ``None``).
        foreach (bool, optional): accepted for compatibility; has no effect (default: ``None``).
        capturable (bool, optional): accepted for compatibility; every step is free of host
            synchronisation (default: ``True``).
        differentiable (bool, optional): must be ``False``.

    ``lr`` and ``weight_decay`` may differ between parameter groups; everything else is common to
    all, because the curvature is one matrix. Parameters without a gradient count as having a zero
    gradient.

    A step whose gradient holds an infinity or a NaN (or overflowed under
    :class:`torch.amp.GradScaler`) changes nothing but ``stats()["steps_skipped"]``. If the
    gradient, the closure or the monitor raises, nothing has changed either.

    Raises:
        ValueError: an option is out of range, or a common option differs between groups.
        TypeError: an option has the wrong type, or a parameter is not floating-point or complex.
        RuntimeError: ``fused=True`` without native kernels, or ``differentiable=True``.

    Example:
        >>> optimizer = AdaQN(model.parameters(), lr=0.01)
        >>> optimizer.monitor = lambda: loss_fn(model(held_x), held_y)  # optional
        >>> optimizer.zero_grad()
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()

    .. _adaQN\: An Adaptive Quasi-Newton Algorithm for Training RNNs:
        https://arxiv.org/abs/1511.01169
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        history_size: int = 10,
        fisher_size: int = 32,
        update_interval: int = 10,
        init: str = "rmsprop",
        decay: float = 0.9,
        eps: float = 2**-26,
        min_curvature: float = 1e-4,
        max_increase: float = 1.01,
        monitor: Monitor | None = None,
        weight_decay: float | Tensor = 0.0,
        maximize: bool = False,
        history_dtype: torch.dtype | None = None,
        fisher_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        foreach: bool | None = None,
        capturable: bool = True,
        differentiable: bool = False,
    ) -> None:
        values = locals()
        defaults = {name: values[name] for name in CHECKS}
        validate(defaults)
        check_monitor(monitor)
        self.monitor = monitor
        self._arena: Arena | None = None
        self._calls = 0
        self._fresh = False
        self._handle = register(self)
        super().__init__(params, defaults)
        if fused:
            ops.select_backend(self._parameters()[0].device, fused)

    # ------------------------------------------------------------------ parameters and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see :meth:`torch.optim.Optimizer.add_param_group`.

        Parameters added during training join the stored pairs and gradients with zeros.

        Raises:
            ValueError: an option other than ``lr`` and ``weight_decay`` differs from the
                optimizer's, or a parameter lives on another device than the state.
            TypeError: a parameter is neither floating-point nor complex.
        """
        if isinstance(param_group, dict):
            validate_group(param_group, self._common())
        super().add_param_group(param_group)
        try:
            _check_dtypes(self.param_groups[-1]["params"])
            if self._arena is not None:
                self._bind(self._arena.grown(*self._layout()), self._calls)
        except Exception:
            self.param_groups.pop()
            raise

    def _common(self) -> dict[str, Any]:
        """The options that all groups share."""
        return self.param_groups[0] if self.param_groups else self.defaults

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _sizes(self, common: dict[str, Any]) -> Sizes:
        return Sizes.of(
            self._parameters(),
            history_size=common["history_size"],
            fisher_size=common["fisher_size"],
            diagonal=common["init"] != "scalar",
            history_dtype=common["history_dtype"],
            fisher_dtype=common["fisher_dtype"],
        )

    def _layout(self, common: dict[str, Any] | None = None) -> tuple[list[Tensor], Sizes]:
        """Arguments of an :class:`Arena` for all parameters."""
        params = self._parameters()
        devices = {p.device for p in params}
        if len(devices) > 1:
            names = ", ".join(sorted(str(device) for device in devices))
            raise ValueError(
                f"params: expected all on one device, got {names}; give each device an optimizer "
                "of its own"
            )
        return params, self._sizes(common or self._common())

    def _bind(self, arena: Arena | None, calls: int) -> None:
        """Make ``arena``, after ``calls`` steps, the state; file its views under the parameters."""
        self._arena, self._calls, self._fresh = arena, calls, False
        for p in self._parameters():
            self.state.pop(p, None)
        if arena is not None:
            self.state.update(zip(arena.params, arena.views(), strict=True))

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure (Callable, optional): reevaluates the model and returns the loss. Called once,
                with gradients enabled.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            RuntimeError: a gradient is sparse, or a closure is used under
                :class:`torch.amp.GradScaler`. Nothing has changed then.
            TypeError: the monitor returned something else than a real number. Nothing has
                changed then.
        """
        loss = None
        if closure is not None:
            if any(hasattr(self, name) for name in ("grad_scale", "found_inf")):
                raise RuntimeError(
                    "closure: not supported under torch.amp.GradScaler; call backward() before "
                    "scaler.step(optimizer) instead"
                )
            with torch.enable_grad():
                loss = closure()

        grads = self._gradients()
        self._init_group()
        params = [real_view(p) for p in self._arena.params]
        if not torch.compiler.is_compiling():
            self._advance(params, grads, self._arena)
        elif self.monitor is None:
            torch.ops.adaqn.whole_step(self._handle, params, grads, self._arena.tensors())
        else:
            self._advance_outside_graph(params, grads)
        return loss

    def _init_group(self) -> None:
        """Allocate the state if there is none.

        ``torch.compile`` runs a method of this name instead of tracing it.
        """
        if self._arena is None:
            self._bind(Arena(*self._layout()), calls=0)
            self._fresh = True

    @torch.compiler.disable
    def _advance_outside_graph(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """A compiled step with a monitor: Python that no graph can hold."""
        self._advance(params, grads, self._arena)

    def _gradients(self) -> list[Tensor | None]:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        for index, g in enumerate(grads):
            if g is None:
                continue
            if g.layout != torch.strided:
                raise RuntimeError(
                    f"gradient of parameter {index}: AdaQN does not support sparse gradients "
                    f"({g.layout}); make the layer dense, e.g. nn.Embedding(sparse=False)"
                )
            if g.is_complex():
                grads[index] = torch.view_as_real(g.resolve_conj())
        return grads

    def _advance(self, params: list[Tensor], grads: list[Tensor | None], state: Buffers) -> None:
        """One call of the schedule: a step and, every ``update_interval`` calls, a pair update."""
        common = self._common()
        # A first call with lr 0 is how torch.distributed.checkpoint materialises state.
        counted = not self._fresh or any(
            not isinstance(group["lr"], Number) or group["lr"] != 0 for group in self.param_groups
        )
        calls = self._calls + counted
        due = counted and calls % common["update_interval"] == 0
        op = ops.select_backend(self._arena.device, common["fused"]).ops
        # The dispatcher does so for lists of tensors, but not where some may be missing.
        grads = [None if g is None else g.resolve_neg() for g in grads]
        loss = self._move(op, params, grads, state, common, monitored=due)
        if due:
            self._update_pairs(op, params, state, common, loss)
        # Native kernels write behind autograd's back; a graph that saved a parameter must know.
        torch.autograd.graph.increment_version(params)
        self._calls, self._fresh = calls, False
        self._arena.calls.fill_(calls)

    def _move(
        self,
        op: Any,
        params: list[Tensor],
        grads: list[Tensor | None],
        a: Buffers,
        common: dict[str, Any],
        monitored: bool,
    ) -> Tensor | None:
        """The three passes of a step; with a monitor and ``monitored``, its loss at the average."""
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        maximize, diagonal = common["maximize"], (*_accumulation(common), common["eps"])
        rates = ([len(group["params"]) for group in self.param_groups], *self._rates())
        if self.monitor is None or not monitored:
            op.direction_step(
                params, grads, a.s_ring, a.y_ring, a.gram, grad_scale, found_inf, maximize,
                *diagonal, *rates, a.accumulator, a.fisher, a.iterate_sum, a.direction,
                a.projections, a.images, a.counters,
            )  # fmt: skip
            return None
        op.direction_pass1(
            params, grads, a.s_ring, a.counters, grad_scale, found_inf, maximize, a.projections
        )
        # Before anything that lasts is written: a monitor that raises leaves no trace.
        loss = self._monitored_loss(op, params, a)
        op.direction_pass2(
            params, grads, a.y_ring, a.gram, a.counters, a.projections, grad_scale, maximize,
            *diagonal, a.accumulator, a.fisher, a.direction, a.images,
        )  # fmt: skip
        op.direction_pass3(
            params, a.s_ring, a.gram, a.projections, a.images, a.direction, *rates,
            len(a.fisher), a.iterate_sum, a.counters,
        )  # fmt: skip
        return loss

    def _rates(self) -> tuple[list[float], list[float], Tensor | None, Tensor | None]:
        """Per group, ``lr`` and ``weight_decay`` by value, and as tensors where one is a tensor."""
        values, tensors = [], []
        for name in PER_GROUP:
            options = [group[name] for group in self.param_groups]
            if any(isinstance(option, Tensor) for option in options):
                values.append([0.0] * len(options))
                tensors.append(torch.stack([self._on_device(option) for option in options]))
            else:
                values.append([float(option) for option in options])
                tensors.append(None)
        return *values, *tensors

    def _on_device(self, number: float | Tensor) -> Tensor:
        """A 0-d float64 tensor beside the state; the host does not wait for it."""
        device = self._arena.device
        if isinstance(number, Tensor):
            number = number.detach().reshape(())
            return number.to(device, torch.float64, non_blocking=True)
        return torch.full((), number, dtype=torch.float64, device=device)

    def _monitored_loss(self, op: Any, params: list[Tensor], a: Buffers) -> Tensor:
        """The monitor's loss at the averaged iterate; the parameters are as before afterwards."""
        saved = a.direction
        op.iterate_swap(params, a.iterate_sum, a.projections, a.counters, saved)
        try:
            loss = self.monitor()
        finally:
            op.iterate_restore(params, saved)
        scalar = isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex()
        if not scalar and (isinstance(loss, bool) or not isinstance(loss, Real)):
            raise TypeError(
                f"monitor: expected a float or a one-element real tensor, got {loss!r}; return the "
                "mean loss on the monitoring batch"
            )
        return self._on_device(loss)

    def _update_pairs(
        self,
        op: Any,
        params: list[Tensor],
        a: Buffers,
        common: dict[str, Any],
        loss: Tensor | None,
    ) -> None:
        op.curvature_pass_a(a.fisher, a.iterate_sum, a.anchor, a.counters, a.weights)
        op.curvature_pass_b(
            a.fisher, a.iterate_sum, a.anchor, a.counters, a.weights, a.s_ring, a.y_ring, a.column
        )
        op.curvature_commit(
            params, a.column, loss, common["min_curvature"], common["max_increase"], a.gram,
            a.losses, a.anchor, a.iterate_sum, a.counters,
        )  # fmt: skip

    # ------------------------------------------------------------------ what users look at

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and what the memory holds now. Waits for the device.

        Returns:
            dict: ``stored``, ``skipped`` and ``resets`` (outcomes of pair updates),
            ``steps_skipped`` (steps dropped for a non-finite gradient), ``pairs`` and
            ``gradients`` (in memory now), ``monitored_loss`` (the latest; ``None`` before the
            first), ``state_bytes`` (device memory of the state, once it is allocated).
        """
        words = [0] * len(Counter) if self._arena is None else self._arena.counters.tolist()
        loss = torch.nan if self._arena is None else self._arena.losses[Loss.MONITORED].item()
        names = ("stored", "skipped", "resets", "steps_skipped", "pairs", "gradients")
        return {
            **{name: words[Counter[name.upper()]] for name in names},
            "monitored_loss": None if loss != loss else loss,
            "state_bytes": self._sizes(self._common()).bytes(),
        }

    def __repr__(self) -> str:
        sizes = self._sizes(self._common())
        backend = ops.select_backend(self._parameters()[0].device, self._common()["fused"])
        per_parameter = f"{sizes.bytes() / max(sizes.numel, 1):.1f} bytes per parameter"
        return (
            super().__repr__().removesuffix(")")
            + f"State: {sizes.bytes():,} bytes for {sizes.numel:,} parameters ({per_parameter})\n"
            f"Backend: {backend.name} ({backend.reason})\n)"
        )

    # ------------------------------------------------------------------ checkpoints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer state; training continues bit for bit as if it had not stopped.

        Options come from ``state_dict``, as for all torch optimizers; the state keeps its own
        dtype, whatever the parameters'. The monitor is not part of it.

        Args:
            state_dict (dict): what :meth:`state_dict` returned.

        Raises:
            ValueError: the state does not fit the parameters. Nothing has changed then.
        """

        def read(_: Optimizer, final: dict[str, Any]) -> None:
            self._incoming = self._read(final)

        # Registered last, it sees what other hooks made of the dict, before torch casts it.
        handle = self.register_load_state_dict_pre_hook(read)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_incoming", None)

    def _read(self, state_dict: dict[str, Any]) -> Arena | None:
        """The arena that ``state_dict`` describes, or ``None`` if it holds no state."""
        groups, entries = state_dict["param_groups"], state_dict["state"]
        sizes_match = [len(group["params"]) for group in groups] == [
            len(group["params"]) for group in self.param_groups
        ]
        if not entries or not sizes_match:  # torch reports a mismatch
            return None
        common = {**self.defaults, **groups[0]}
        for group in groups:
            validate_group({k: v for k, v in group.items() if k != "params"}, common)
        keys = [key for group in groups for key in group["params"]]
        return self._assemble([entries.get(key, {}) for key in keys], common)

    def _assemble(self, entries: list[dict[str, Any]], common: dict[str, Any]) -> Arena:
        arena = Arena(*self._layout(common))
        arena.check(entries)
        arena.load(entries)
        return arena

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_handle" not in self.__dict__:  # unpickled or copied
            self._handle, self.monitor = register(self), None
        if "_incoming" in self.__dict__:
            arena = self._incoming
        else:
            entries = [self.state[p] for p in self._parameters() if p in self.state]
            arena = self._assemble(entries, self._common()) if entries else None
        self._bind(arena, 0 if arena is None else int(arena.calls))


def _accumulation(common: dict[str, Any]) -> tuple[float, float]:
    """Weights of the old accumulator and of the squared gradient in the new one."""
    decay = common["decay"]
    return (1.0, 1.0) if common["init"] == "adagrad" else (decay, 1.0 - decay)


def _check_dtypes(params: list[Tensor]) -> None:
    for p in params:
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(
                f"params: expected floating-point or complex parameters, got {p.dtype} of shape "
                f"{tuple(p.shape)}"
            )
