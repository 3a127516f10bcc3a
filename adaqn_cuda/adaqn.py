"""The optimizer class: what users hold in their hands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import capture, ops
from .compiled import outside_graphs, register
from .curvature import Product
from .distributed.sharded import call_of
from .distributed.sharding import (
    Division,
    Shards,
    check_flat,
    check_not_copied,
    check_not_divided,
    is_spread,
    local,
)
from .interrupts import uninterrupted
from .options import (
    AVERAGED,
    CHECKS,
    COMMON,
    GROUPED,
    LiveOptions,
    agreed_options,
    check_callable,
    common_options,
    has_momentum,
    validate,
    validate_group,
)
from .precision import full_precision
from .state.arena import Arena, Buffers, Sizes, held, own_part, real_shape, real_view
from .state.blocks import Blocks, GivenBlocks, as_blocks, check_blocks, heights
from .state.layout import Counter, Loss
from .state.plan import Cut, Plan
from .state.saved import check_mapping, check_state_dict, completed, with_names
from .step import Hooks, Monitor, Settings, is_hookless
from .watch import Watch, check_device, check_dtypes, check_memory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AdaQN(Optimizer):
    r"""Implements adaQN, a stochastic quasi-Newton method on an adaptive initial matrix.

    The step is :math:`w \leftarrow w - \alpha H q`, where :math:`q` is the gradient, or its
    momentum, and :math:`H` the L-BFGS inverse Hessian of the stored curvature pairs
    :math:`(s_i, y_i)` on top of an initial matrix :math:`H^0`. Without pairs, which is the default,
    :math:`H = H^0`.

    With ``history_size`` pairs, every ``update_interval`` steps a new one is tried: :math:`s` is
    the difference of two averaged iterates, and :math:`y` is what ``curvature`` says, by default
    :math:`y = \frac{1}{|F|} \sum_i F_i (F_i^\top s)`, the product of the accumulated empirical
    Fisher matrix with it. If a monitored loss has grown by more than ``max_increase``, all pairs
    and gradients are dropped and the parameters go back to the last averaged iterate that was
    accepted. See `adaQN: An Adaptive Quasi-Newton Algorithm for Training RNNs`_, Algorithm 1;
    ``AdaQN(params, **PAPER)`` is its setting; :mod:`adaqn_cuda.presets` has those of SQN and online
    L-BFGS, too.

    :math:`H^0` is one of

    - ``"kronecker"``: for a matrix :math:`G` of the gradient, :math:`H^0 X = Q_L [(Q_L^\top X
      Q_R) / \sqrt{v + c^2 \max v + \epsilon}] Q_R^\top` with the eigenbases :math:`Q_L, Q_R` of the
      averages of :math:`G G^\top` and :math:`G^\top G`, of which diagonal blocks of at most
      ``block_size`` are kept, and :math:`v` the average of :math:`(Q_L^\top G Q_R)^2`, close to
      `SOAP`_. A tensor is the matrix (first dimension, rest), a short vector one column. The floor
      keeps rounding out of the step: :math:`c` is 3e-3 at first and falls as :math:`1/t^2` to a
      thousand times the rounding error, 1.2e-4 in float32;
    - ``"rmsprop"``, ``"adagrad"``: :math:`\mathrm{diag}(v + \epsilon)^{-1/2}` with :math:`v` the
      average, or the sum, of :math:`g^2`;
    - ``"scalar"``: :math:`s^\top y / y^\top y` of the newest pair, 1 while there is none; of
      damped Fisher pairs, the least that was seen since a reset.

    The state takes, in numbers of 4 bytes per parameter (8 if a parameter is float64): 1 for
    :math:`v`, 1 for the momentum, and with pairs :math:`3 + 2 (\text{history\_size} + 1) +
    \text{fisher\_size}` more (1 for the latter where :math:`y` does not come from the Fisher
    product, and 2 more with ``curvature="gradients"``). ``"kronecker"`` adds
    :math:`2 (\min(b, m)/n + \min(b, n)/m)` for a matrix of m x n and blocks of b: 0.7 for 768 x
    768, and at most 4 unless a side is shorter than b and than the other one: 64 for 768 x 4, 128
    for a vector of 64. ``repr(optimizer)`` tells the bytes, and how much of the model has factors,
    before they are allocated.

    Args:
        params (iterable): parameters, or named parameters, or dicts that define parameter groups.
            float16 and bfloat16 parameters keep float32 state; complex ones count as pairs of real
            numbers. All parameters live on one device.
        lr (float, Tensor, optional): step length :math:`\alpha` (default: 1e-2).
        history_size (int, optional): curvature pairs kept, :math:`m_L`; 0 for none (default: 0).
        fisher_size (int, optional): recent gradients kept for the Fisher product, :math:`m_F`
            (default: 16).
        update_interval (int, optional): calls of :meth:`step` between two pair updates, :math:`L`
            (default: 10).
        init (str, optional): initial inverse Hessian: ``"kronecker"``, ``"rmsprop"``,
            ``"adagrad"`` or ``"scalar"`` (default: ``"kronecker"``).
        decay (float, optional): decay of the average :math:`v`, in [0, 1) (default: 0.98).
        eps (float, optional): added to :math:`v` inside the square root (default: 1e-16).
        min_curvature (float, optional): a pair is stored only if
            :math:`s^\top y / y^\top y` exceeds it (default: 1e-4).
        max_increase (float, optional): ratio of monitored losses, at least 1, beyond which the
            memory is reset, :math:`\gamma` (default: 1.01).
        curvature (str or Callable, optional): where :math:`y` comes from. ``"fisher"``: the
            paper's Fisher product. ``"gradients"``: the change of the averaged gradient that the
            steps saw; right where every step sees the same batch (full-batch training).
            ``"difference"``: the difference of the gradients of ``curvature_closure`` at the two
            averaged iterates. A callable: called with the parameters holding the averaged iterate
            and with a dict from each parameter to its part of :math:`s`, returns a mapping from
            parameters to their parts of :math:`y`; see :func:`adaqn_cuda.gauss_newton` and
            :func:`adaqn_cuda.hessian`. Not copied or pickled: assign ``curvature_product`` anew
            then. With data parallelism, what the closure and the callable compute must be averaged
            over the ranks by themselves, as only gradients are (default: ``"fisher"``).
        curvature_closure (Callable, optional): returns the loss on the current batch, with its
            graph and without calling backward. Can be assigned later, e.g. anew in every step; not
            copied or pickled (default: ``None``).
        momentum (float, optional): decay :math:`\beta` of the averaged gradient, in [0, 1);
            bias-corrected, with Nesterov's look-ahead: :math:`m_t = \beta m_{t-1} + (1-\beta) g`,
            :math:`q = \beta m_t / (1-\beta^{t+1}) + (1-\beta) g / (1-\beta^t)` (default: 0.8).
        damping (float, optional): :math:`\delta` of Powell's damping, in [0, 1): :math:`y` is mixed
            with :math:`(H^0)^{-1} s` such that :math:`s^\top y \ge \delta s^\top (H^0)^{-1} s`
            (default: 0.2).
        max_direction (float, optional): the direction is scaled down to at most this multiple of
            :math:`|H^0 q|`; infinity turns it off (default: 1.0).
        bias_correction (bool, optional): divide :math:`v` by :math:`1 - \text{decay}^t`
            (default: ``True``).
        max_grad_norm (float, optional): the gradient is clipped to this norm, as by
            :func:`torch.nn.utils.clip_grad_norm_`; infinity turns it off (default: inf).
        block_size (int, optional): sides of a matrix longer than this are cut into even pieces in
            ``"kronecker"``, each with a factor of its own. Larger is closer to the whole factors,
            and dearer: a step takes about 7 ``block_size`` multiply-adds per parameter
            (default: 128).
        max_vector_dim (int, optional): vectors, and matrices of one row or column, have their whole
            covariance as a factor, but none if they are longer than this or than ``block_size``. A
            complex vector counts as a matrix of two columns (default: 64).
        factor_interval (int, optional): calls of :meth:`step` between two updates of an eigenbasis.
            Bases take their turns, so that all calls but the first cost alike (default: 5).
        blocks (Mapping[Tensor, int or list of int], optional): parameters that are several matrices
            (or vectors) on top of each other, such as gates or fused projections, and how many, or
            the rows of each: they get factors of their own. ``rnn_blocks(model)`` gives it for LSTM
            and GRU layers. In a group's dict, for that group, and before what is given here
            (default: ``None``).
        monitor (Callable, optional): returns the loss on a fixed monitoring batch, as a float or
            one-element tensor. Called without gradients or autocast at every pair update, with the
            parameters holding the averaged iterate; should be deterministic, and the same on all
            ranks. ``None`` turns resets off. Can be assigned later; not copied or pickled
            (default: ``None``).
        weight_decay (float, Tensor, optional): decoupled weight decay, as in AdamW (default: 0).
        normalize (bool, optional): scale every parameter's step to a root mean square of ``lr``,
            but lengthen none more than 1,000 times unless ``init="scalar"``, so that one ``lr``
            suits parameters and models of unlike size; only without pairs. Costs 4 bytes per
            parameter and more passes over memory (default: ``False``).
        maximize (bool, optional): maximize the objective (default: ``False``).
        history_dtype (torch.dtype, optional): dtype in which the pairs are kept: ``None`` for the
            state's own, or ``torch.bfloat16``, which halves their memory and traffic. The
            curvature test is taken on the rounded pairs (default: ``None``).
        fisher_dtype (torch.dtype, optional): the same for the gradients (default: ``None``).
        fused (bool, optional): ``None`` takes native kernels where there are any, ``True``
            insists on them, ``False`` takes the PyTorch reference (default: ``None``).
        foreach (bool, optional): accepted for compatibility; has no effect (default: ``None``).
        capturable (bool, optional): accepted for compatibility; every step is free of host
            synchronisation. What is captured in a graph repeats the turns that pairs and factors
            had in the captured calls: capture as many successive ones, after the tenth, as the
            least common multiple of ``update_interval``, if there are pairs, and of 2 and
            ``factor_interval``, if there are factors, and replay them in their order; where that is
            more than one, the first captured step warns. A step must have been taken before
            (default: ``True``).
        differentiable (bool, optional): must be ``False``.
        state_sharding (ProcessGroup, optional): processes with the same whole parameters and
            gradients, as with ``DistributedDataParallel``. Each keeps the state of some rows of
            every parameter, takes the step for them, and sends them to the others, whose
            parameters are the same to the bit then (default: ``None``).
        max_factor_dim (int, optional): deprecated name of ``block_size``.

    ``lr``, ``weight_decay``, ``momentum``, ``decay``, ``eps``, ``init``, ``block_size`` and
    ``blocks`` may differ between parameter groups; ``init="scalar"`` is for all or for none. The
    other options are one for all groups, because pairs, the norm of the gradient, the count of
    steps and the turns of factors are; a group that asks for another value is refused with the
    reason. Groups that all give the same value of such an option need not repeat it in the
    constructor. With pairs, momenta that differ cost two more passes over :math:`s` in every step;
    on a GPU, neighbouring groups whose averages differ are stepped by launches of their own.

    Options may be changed while training, but for those that give the state its shape; a change
    that cannot be honoured raises at the next step. Parameters without a gradient stand still: no
    decay, no momentum, no direction. A step without any gradient does nothing and is not counted.
    Averages count the steps of all: a parameter that gets its first gradient late begins with
    longer steps, up to ten times, for some tens of steps; warm its ``lr`` up where that matters.

    The norm of the gradient is clipped to 2^62 in any case (2^510 in float64), so that its square
    is finite (in float64, one that is infinite itself makes it a gradient of zero), and
    ``"kronecker"``, where anything has factors, divides a gradient that is more than 1,000 times as
    long as the root of the average :math:`|g|^2` down to that; it is of all parameters, and decays
    by the largest ``decay`` of the groups.

    A step whose gradient holds an infinity or a NaN (or overflowed under
    :class:`torch.amp.GradScaler`) changes nothing but ``stats()["steps_skipped"]`` and the number
    of calls; if pairs were due, they are when they are due again. If the gradient, the closure, the
    monitor or ``curvature`` raises, nothing has changed either. Ctrl-C waits until a step is whole,
    or reaches a function of yours at once.

    Processes have whole parameters, as with ``DistributedDataParallel``, or the same rows of each
    that :func:`torch.distributed.fsdp.fully_shard` gives them. In the latter case, and with
    ``state_sharding``, each steps its rows; what spans all of them is added up over the processes,
    so that a step is that of one process whose ``blocks`` end where the rows of a process do. The
    monitored loss is averaged over them, and ``curvature`` is ``"fisher"`` or ``"gradients"``. A
    checkpoint loads in any number of processes, with ``"kronecker"`` if rows are divided evenly and
    ``blocks`` end where they do. ``ZeroRedundancyOptimizer`` serves where there are neither pairs
    nor ``max_grad_norm``; every process then looks for infinities and outliers among its own
    parameters.

    Parameters, and tensors in ``state``, may be replaced, and parameters put into a group or taken
    out of it by hand: the next step goes on with what it finds. New parameters begin without state;
    pairs are dropped where a parameter has gone.

    Raises:
        ValueError: an option is out of range, one that is for all groups differs between them, or
            something is to be called at pair updates and there are none.
        TypeError: an option has the wrong type, or a parameter is not floating-point or complex.
        RuntimeError: ``fused=True`` without native kernels, ``differentiable=True``, or a parameter
            is divided among processes otherwise than by rows, or otherwise than another one.

    :meth:`step` raises these, too, for options that have been changed since.

    Example:
        >>> optimizer = AdaQN(model.parameters(), lr=0.01, blocks=rnn_blocks(model))
        >>> optimizer.zero_grad()
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()

    .. _adaQN\: An Adaptive Quasi-Newton Algorithm for Training RNNs:
        https://arxiv.org/abs/1511.01169
    .. _SOAP:
        https://arxiv.org/abs/2409.11321
    """

    _step_supports_amp_scaling = True
    #: While a state_dict is loaded, the arena that it describes, if it has state.
    _incoming: Arena | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        history_size: int = 0,
        fisher_size: int = 16,
        update_interval: int = 10,
        init: str = "kronecker",
        decay: float = 0.98,
        eps: float = 1e-16,
        min_curvature: float = 1e-4,
        max_increase: float = 1.01,
        curvature: str | Product = "fisher",
        curvature_closure: Callable[[], Tensor] | None = None,
        momentum: float = 0.8,
        damping: float = 0.2,
        max_direction: float = 1.0,
        bias_correction: bool = True,
        max_grad_norm: float = inf,
        block_size: int = 128,
        max_vector_dim: int = 64,
        factor_interval: int = 5,
        blocks: GivenBlocks | None = None,
        monitor: Monitor | None = None,
        weight_decay: float | Tensor = 0.0,
        normalize: bool = False,
        maximize: bool = False,
        history_dtype: torch.dtype | None = None,
        fisher_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        foreach: bool | None = None,
        capturable: bool = True,
        differentiable: bool = False,
        state_sharding: ProcessGroup | None = None,
        max_factor_dim: int | None = None,
    ) -> None:
        if max_factor_dim is not None:
            block_size = _renamed(max_factor_dim)
        values = locals()
        product = curvature if callable(curvature) else None
        if callable(curvature):
            values = {**values, "curvature": "product"}
        defaults = {name: values[name] for name in CHECKS}
        validate(defaults)
        if not isinstance(params, (Tensor, dict)):  # which torch refuses
            params = list(params)
            defaults.update(agreed_options(params, defaults))
            validate(defaults)  # what groups and the constructor say may not go together
        if defaults["history_size"] > 0 or defaults["max_grad_norm"] < inf:
            check_not_divided(
                "curvature pairs and max_grad_norm are of all of them; pass history_size=0 and "
                "max_grad_norm=inf, or use AdaQN by itself"
            )
        self._hooks = Hooks(monitor, curvature_closure, product)
        self._check_hooks(defaults)
        self._arena: Arena | None = None
        self._calls = 0
        self._prepare()
        self._division = Division(state_sharding)
        super().__init__(params, defaults)
        if blocks is not None:
            check_blocks(blocks, self._parameters())
            for group in self.param_groups:
                own = zip(group["params"], group["blocks"], strict=True)
                group["blocks"] = [as_blocks(blocks.get(p, 1)) if n == 1 else n for p, n in own]
            self._note_blocks()
        if fused:
            ops.check_fused(self._parameters()[0].device)

    # ------------------------------------------------------------------ functions of the user's

    # They lie in one object, so that a wrapper which shows what the optimizer has, as Lightning's
    # does, sets them here and not in itself.

    @property
    def monitor(self) -> Monitor | None:
        """The function of the monitored loss; may be assigned at any time."""
        return self._hooks.monitor

    @monitor.setter
    def monitor(self, function: Monitor | None) -> None:
        self._hooks.monitor = function

    @property
    def curvature_closure(self) -> Callable[[], Tensor] | None:
        """The function of the loss on the current batch; may be assigned at any time."""
        return self._hooks.curvature_closure

    @curvature_closure.setter
    def curvature_closure(self, function: Callable[[], Tensor] | None) -> None:
        self._hooks.curvature_closure = function

    @property
    def curvature_product(self) -> Product | None:
        """The callable that was given as ``curvature``; may be assigned at any time."""
        return self._hooks.curvature_product

    @curvature_product.setter
    def curvature_product(self, function: Product | None) -> None:
        self._hooks.curvature_product = function

    # ------------------------------------------------------------------ parameters and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see :meth:`torch.optim.Optimizer.add_param_group`.

        Parameters added during training join the stored pairs and gradients with zeros. Options
        that may differ between groups default to the constructor's, as with torch's optimizers, or
        to those of a loaded state on which all groups agree; the others are as they are now.

        Raises:
            ValueError: an option differs from the optimizer's that is one for all groups, or a
                parameter lives on another device than the state.
            TypeError: a parameter is neither floating-point nor complex.
            RuntimeError: a parameter is divided among processes otherwise than by rows, or
                otherwise than the others.
        """
        if isinstance(param_group, dict):
            if "max_factor_dim" in param_group:
                param_group["block_size"] = _renamed(param_group.pop("max_factor_dim"))
            common = self._common()
            validate_group(param_group, common)
            for name in COMMON:  # as they are now, whatever they were at first
                param_group.setdefault(name, common[name])
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            _drop_duplicates(group)
            check_dtypes(group["params"])
            check_flat(group["params"])
            self._shards()
            given = group.get("blocks", {})
            check_blocks(given, group["params"])
            group["blocks"] = [as_blocks(given.get(p, 1)) for p in group["params"]]
            self._known_blocks.update(zip(group["params"], group["blocks"], strict=True))
            if self._arena is not None:
                self._refit()
        except Exception:
            self.param_groups.pop()
            raise

    def _common(self) -> dict[str, Any]:
        """The options that all groups share."""
        return common_options(self.param_groups or [self.defaults])

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _check_hooks(self, common: dict[str, Any]) -> None:
        """What is called at pair updates must be callable, and there."""
        for name, hook in vars(self._hooks).items():
            check_callable(name, hook, common["history_size"])

    def _plan(self, groups: list[dict[str, Any]]) -> Plan | None:
        """The Kronecker factors under the options of ``groups``, if there are to be any."""
        common = common_options(groups)
        if common["init"] != "kronecker":
            return None
        shapes = [real_shape(p) for p in self._parameters()]
        blocks = [n for group in groups for n in group["blocks"]]
        sizes = [
            group["block_size"] if group["init"] == "kronecker" else None
            for group in groups
            for _ in group["blocks"]
        ]
        shards = self._shards()
        cuts = [
            Cut(_rows(shape, own, shards), size)
            for shape, own, size in zip(shapes, blocks, sizes, strict=True)
        ]
        plan = Plan(shapes, cuts, common["max_vector_dim"])
        if shards is not None:
            plan = plan.part(shards.ranges(shapes), shards.rank)
        return plan if plan.factors else None

    def _shards(self) -> Shards | None:
        """How the parameters are divided among processes, if they are."""
        return self._division.of(self._parameters())

    def _prepare(self) -> None:
        """What is neither option nor state, and so not copied or pickled."""
        self._handle = register(self)
        self._live = LiveOptions()
        self._watch: Watch | None = None
        self._first_rates: list[float | Tensor] = []
        self._known_blocks: dict[Tensor, Blocks] = {}
        self._seen_blocks: list[list[Blocks]] = []
        self._seen_sizes: list[int] = []
        self._halfway = False
        self._warned_of_turns = False
        self._division = Division()

    def _new_arena(self, groups: list[dict[str, Any]], momentum: bool = False) -> Arena:
        """Buffers for all parameters under the options of ``groups``.

        With ``momentum``, there is room for it even where it is zero in all of them now.
        """
        params, shards = self._parameters(), self._shards()
        check_device(params)
        check_memory(params if shards is None else [shards.own(p) for p in params])
        with torch.inference_mode(False):  # the state outlives the mode
            blocks = [n for group in groups for n in group["blocks"]]
            check_blocks({p: n for p, n in zip(params, blocks, strict=True) if n != 1}, params)
            plan = self._plan(groups)
            momentum = momentum or has_momentum(groups)
            sizes = Sizes.of(params, common_options(groups), plan, momentum, shards)
            return Arena(params, sizes, plan, shards)

    def _bind(self, arena: Arena | None, calls: int) -> None:
        """Make ``arena``, after ``calls`` steps, the state; file its views under the parameters."""
        self._arena, self._calls, self._halfway = arena, calls, False
        self._watch = None  # it has the tensors of the state before
        for p in [key for key in self.state if isinstance(key, Tensor)]:  # gone ones, too
            del self.state[p]
        if arena is not None:
            entries = arena.views()
            self.state.update(zip(arena.params, entries, strict=True))
            self._watch = Watch(arena.params, entries)
            self._seen_sizes = [len(group["params"]) for group in self.param_groups]
            self._live.fix(self.param_groups)
            sizes = arena.sizes
            ops.load_kernels(
                arena.device, self._common()["fused"], vectors=sizes.dtype,
                pairs=sizes.history_dtype, fisher=sizes.fisher_dtype,
                has_pairs=sizes.in_passes, kronecker=arena.plan is not None,
            )  # fmt: skip

    def _reconcile(self) -> None:
        """Honour what has been replaced since the last call, or raise; nothing is written before.

        Raises:
            RuntimeError: an option that gives the state its shape has changed, or parameters
                overlap.
            ValueError: an option is out of range, or the state does not fit the parameters.
        """
        self._live.check(self.param_groups, self._arena is not None)
        if self._arena is None or self._blocks_differ():
            self._match_blocks()
        if self._arena is None:
            return
        if has_momentum(self.param_groups) and self._arena.momentum is None:
            self._refit()
        else:
            self._settle()

    def _settle(self) -> None:
        """Make the state that of the parameters as they are, before it is written or saved."""
        if self._arena is None:
            return
        moved = [len(group["params"]) for group in self.param_groups] != self._seen_sizes
        if moved or held(self._watch).sees_change(self._parameters(), self.state):
            self._refit()

    def _match_blocks(self) -> None:
        """Blocks follow their parameters where these were moved, put in or taken out by hand.

        Raises:
            RuntimeError: the blocks themselves have changed.
        """
        for group in self.param_groups:
            blocks = [self._known_blocks.get(p, 1) for p in group["params"]]
            given = group.get("blocks", blocks)
            members = isinstance(given, list) and len(given) == len(blocks)
            same = members and all(p in self._known_blocks for p in group["params"])
            if not isinstance(given, list) or (same and _sorted(given) != _sorted(blocks)):
                raise RuntimeError(
                    f"blocks: a group had {blocks}, and has {given} now; set them back, or make a "
                    "new optimizer"
                )
            group["blocks"] = blocks
        self._note_blocks()

    def _note_blocks(self) -> None:
        """Make the groups' blocks those that :meth:`_match_blocks` goes by."""
        self._known_blocks = {
            p: n
            for group in self.param_groups
            for p, n in zip(group["params"], group["blocks"], strict=True)
        }
        self._seen_blocks = [list(group["blocks"]) for group in self.param_groups]

    def _blocks_differ(self) -> bool:
        return [group.get("blocks") for group in self.param_groups] != self._seen_blocks

    def _refit(self) -> None:
        """New buffers for the parameters as they are, from the state that is filed under them.

        Parameters without state join as if they had stood still so far.  Pairs are dropped if a
        parameter has gone, or its state has: they hold products with it.
        """
        self._match_blocks()
        params = self._parameters()
        check_dtypes(params)
        entries = [self.state.get(p, {}) for p in params]
        if not any(entries):
            self._bind(None, 0)
            return
        arena = self._assemble(entries, self.param_groups)
        kept = {p for p, entry in zip(params, entries, strict=True) if entry}
        if not kept.issuperset(held(self._arena).params):
            arena.forget_pairs()
        self._bind(arena, int(arena.calls))

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
            RuntimeError: a gradient is sparse, a closure is used under
                :class:`torch.amp.GradScaler`, an option has changed that gives the state its shape,
                or elements of a parameter overlap. Nothing has changed then. Or: the step before
                failed halfway.
            ValueError: an option is out of range, or parameters have changed their shapes. Nothing
                has changed then.
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

        self._check_hooks(self._common())
        self._check_curvature(self._common())
        grads = self._gradients()
        if all(g is None for g in grads):
            return loss
        self._init_group()
        arena = held(self._arena)
        if arena.shards is not None:
            self._advance_shard()  # pyright: ignore
            return loss
        params = [real_view(p) for p in arena.params]
        if not torch.compiler.is_compiling():
            self._advance(params, grads, arena)
        elif is_hookless(self._hooks, self._common()):
            torch.ops.adaqn.whole_step(self._handle, params, grads, arena.tensors())
        else:
            self._advance_outside_graph(params, grads)  # pyright: ignore
        return loss

    def _init_group(self) -> None:
        """Look at what the user may have changed, and allocate the state if there is none.

        ``torch.compile`` runs a method of this name instead of tracing it.
        """
        self._check_whole()
        self._reconcile()
        if self._arena is None:
            capture.check_uncaptured(self._parameters()[0].device)
            self._check_shards()
            self._bind(self._new_arena(self.param_groups), calls=0)

    def _check_shards(self) -> None:
        """Raise ``RuntimeError`` for what shards cannot do, and where processes do not agree."""
        shards, common = self._shards(), self._common()
        if shards is None:
            return
        if common["curvature"] in ("difference", "product"):
            raise RuntimeError(
                f"curvature: {common['curvature']!r} takes gradients of whole parameters, of which "
                "every process steps a part; use 'fisher' or 'gradients'"
            )
        shards.check_alike(self._parameters(), {name: common[name] for name in COMMON})

    def _check_whole(self) -> None:
        if self._halfway:
            raise RuntimeError(
                "the last step failed halfway, after it had changed some of the state; load a "
                "state_dict of before into the model and the optimizer"
            )

    def _advance_compiled(
        self, params: list[Tensor], grads: list[Tensor | None], state: list[Tensor]
    ) -> None:
        """A step that was traced, with what :meth:`_init_group` does for the others.

        The graph holds the buffers that it was traced with.
        """
        self._check_whole()
        self._live.check(self.param_groups, allocated=True)
        if held(self._watch).sees_change(self._parameters(), self.state):
            raise RuntimeError(
                "parameters or state were replaced after the step had been compiled; call "
                "torch.compiler.reset() and compile it anew"
            )
        self._advance(params, grads, held(self._arena).over(state))

    @outside_graphs
    def _advance_outside_graph(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """A compiled step that calls the user's functions: Python that no graph can hold."""
        self._advance(params, grads, held(self._arena))

    @outside_graphs
    def _advance_shard(self) -> None:
        """A step with the rows of this process, outside any graph: it has collectives."""
        arena = held(self._arena)
        own = held(arena.shards).own
        grads = [None if p.grad is None else own(p.grad).resolve_conj() for p in arena.params]
        self._advance(
            [real_view(own(p)) for p in arena.params],
            [None if g is None else real_view(g) for g in grads],
            arena,
        )

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
            if g.is_complex() and not is_spread(g):
                grads[index] = torch.view_as_real(g.resolve_conj())
        return grads

    def _check_curvature(self, common: dict[str, Any]) -> None:
        if common["curvature"] == "difference" and self.curvature_closure is None:
            raise RuntimeError(
                "curvature='difference' needs a curvature_closure that returns the loss on the "
                "current batch; assign one, or use curvature='gradients' if every step sees the "
                "same batch"
            )
        if common["curvature"] == "product" and self.curvature_product is None:
            raise RuntimeError(
                "curvature: there is no callable, which presets, copies and checkpoints leave out; "
                "assign it to curvature_product"
            )

    def _advance(self, params: list[Tensor], grads: list[Tensor | None], state: Buffers) -> None:
        """One call of the schedule: a step and, every ``update_interval`` calls, a pair update."""
        arena = held(self._arena)
        device = arena.device
        if not self._warned_of_turns and capture.is_captured(device):
            capture.warn_of_turns(self._common(), arena.plan is not None, self._calls + 1)
            self._warned_of_turns = True
        scaling = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        scaling = (None if number is None else local(number) for number in scaling)
        settings = Settings.of(self.param_groups, device, *scaling)
        if self._calls == 0:
            rates = [group["lr"] for group in self.param_groups]
            self._first_rates = [r.detach().clone() if isinstance(r, Tensor) else r for r in rates]
        # The dispatcher does so for lists of tensors, but not where some may be missing.
        grads = [None if g is None else g.resolve_neg() for g in grads]
        backend = ops.select_backend(device, self._common()["fused"])
        owners, hooks, number = arena.params, self._hooks, self._calls + 1
        standing = [g is None for g in grads]
        before = [flag for group in self.param_groups for flag in group.get("standing", ())]
        anew = bool(before) and standing != before
        atomic = backend.name == "native"
        call = call_of(
            arena.shards, backend.ops, owners, params, grads, state, settings, hooks, number, anew,
            atomic,
        )  # fmt: skip
        by_torch = not atomic or call.has_pairs

        def finish() -> None:
            # Native kernels write behind autograd's back; a graph that saved a parameter must know.
            tracked = [p for p in params if not p.is_inference()]
            torch.autograd.graph.increment_version(tracked)
            self._calls = call.number
            if state.gradient_sum is not None:
                self._note_standing(standing)
            arena.calls.fill_(call.number)

        with full_precision(device) if by_torch else nullcontext(), uninterrupted() as hold:
            try:
                call.run(hold, finish)
            finally:
                self._halfway = call.halfway

    def _note_standing(self, standing: list[bool]) -> None:
        """File which parameters had no gradient with the groups, and so with checkpoints."""
        flags = iter(standing)
        for group in self.param_groups:
            group["standing"] = [next(flags) for _ in group["params"]]

    def _uncount_blank_call(self) -> None:
        """Undo the count of a first call that changed nothing at lr 0.

        It is how torch.distributed.checkpoint makes an optimizer allocate its state; a warm-up that
        begins at 0 has gradients.  To tell them apart takes a look at the device, which a step must
        not wait for.
        """
        rates = self._first_rates  # none after a load: the call was made by another
        if self._arena is None or self._calls != 1 or not rates or any(r != 0 for r in rates):
            return
        words = self._arena.counters.tolist()
        if not (words[Counter.ACCEPTED] or words[Counter.STEPS_SKIPPED]):
            self._calls = 0
            self._arena.calls.fill_(0)

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
            "state_bytes": self._foreseen()[0].bytes(),
        }

    def _foreseen(self) -> tuple[Sizes, Plan | None]:
        """What the state takes, allocated or not, and the factors in it."""
        self._match_blocks()
        plan = self._plan(self.param_groups)
        momentum = has_momentum(self.param_groups)
        return Sizes.of(self._parameters(), self._common(), plan, momentum, self._shards()), plan

    def __repr__(self) -> str:
        sizes, plan = self._foreseen()
        state, numel = sizes.bytes(), sizes.numel
        backend = ops.select_backend(self._parameters()[0].device, self._common()["fused"])
        per_parameter = f"{state / max(numel, 1):.1f} bytes per parameter"
        return (
            super().__repr__().removesuffix(")")
            + f"State: {state:,} bytes for {numel:,} parameters ({per_parameter})\n"
            + self._factored_shares(plan)
            + f"Backend: {backend.name} ({backend.reason})\n)"
        )

    def _factored_shares(self, plan: Plan | None) -> str:
        """A line on how many of the parameters have Kronecker factors."""
        if plan is None:
            return "Factors: none\n" if self._common()["init"] == "kronecker" else ""
        counts, shards = [0, 0, 0], self._shards()
        for p, sides in zip(self._parameters(), plan.sides, strict=True):
            counts[sides] += own_part(p, shards).numel()
        none, one, both = (f"{100 * n / max(sum(counts), 1):.1f} %" for n in counts)
        return f"Factors: on both sides of {both} of them, on one of {one}, on none of {none}\n"

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer; see :meth:`torch.optim.Optimizer.state_dict`.

        Beside tensors there are numbers, texts, ``None``, and lists of them; dtypes by their names.
        Tensors are parts of larger ones; see :func:`adaqn_cuda.flatten_state_dict`.

        Raises:
            RuntimeError: the last step failed halfway.
            ValueError: parameters were replaced, and the state does not fit the new ones.
        """
        self._check_whole()
        self._settle()
        self._uncount_blank_call()
        return with_names(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer state; training continues bit for bit as if it had not stopped.

        Options come from ``state_dict``, as for all torch optimizers; those that it lacks, because
        an older version saved it, stay as they are. The state keeps its own dtype, whatever the
        parameters'. The monitor is not part of it.

        Args:
            state_dict (dict): what :meth:`state_dict` returned.

        Raises:
            ValueError: it is no state of AdaQN, an option in it is out of range, or the state does
                not fit the parameters. Nothing has changed then.
            TypeError: an option in it has the wrong type. Nothing has changed then.
        """

        def read(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            check_state_dict(final)
            final = completed(final, self.param_groups, self.defaults)
            self._incoming = self._read(final)
            return final

        check_mapping(state_dict)  # which torch takes for granted
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
        for group in groups:
            validate_group({k: v for k, v in group.items() if k != "params"}, groups[0])
        sizes_match = [len(group["params"]) for group in groups] == [
            len(group["params"]) for group in self.param_groups
        ]
        keys = [key for group in groups for key in group["params"]]
        # Hooks file what they like, under names that no parameter has.
        own = set(keys)
        filed = [e for key, e in entries.items() if key in own or not isinstance(key, str)]
        if not any(filed) or not sizes_match:  # torch reports a mismatch
            return None
        return self._assemble([entries.get(key, {}) for key in keys], groups, complete=True)

    def _assemble(
        self, entries: list[dict[str, Any]], groups: list[dict[str, Any]], complete: bool = False
    ) -> Arena:
        """An arena for the parameters under the options of ``groups``, filled with ``entries``."""
        momentum = any("momentum" in entry for entry in entries)
        arena = self._new_arena(groups, momentum)
        arena.check(entries, complete)
        arena.adopt(entries)
        return arena

    def __getstate__(self) -> dict[str, Any]:
        self._check_whole()
        if self._arena is None:
            self._match_blocks()
        self._settle()
        self._uncount_blank_call()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_handle" not in self.__dict__:  # unpickled or copied
            self._prepare()
            self._arena = None
            self._hooks = Hooks(None, None, None)
            params = self._parameters()
            check_not_copied(params, [self.state.get(p, {}) for p in params])
        for group in self.param_groups:
            group.setdefault("blocks", [1] * len(group["params"]))
        for name in (*GROUPED, *AVERAGED):  # groups that are added take what is loaded, too
            if len({group[name] for group in self.param_groups}) == 1:
                self.defaults[name] = self.param_groups[0][name]
        self._note_blocks()
        if "_incoming" in self.__dict__:
            arena = self._incoming
        else:
            entries = [self.state.get(p, {}) for p in self._parameters()]
            arena = None
            if any(entries):
                arena = self._assemble(entries, self.param_groups)
        self._bind(arena, 0 if arena is None else int(arena.calls))


def _renamed(max_factor_dim: Any) -> Any:
    """The ``block_size`` that an option of the old name stands for."""
    warnings.warn(
        "max_factor_dim is deprecated, and longer sides get factors now, by pieces; pass "
        f"block_size={max_factor_dim!r}",
        FutureWarning,
        stacklevel=3,
    )
    return max_factor_dim


def _rows(shape: torch.Size, blocks: Blocks, shards: Shards | None) -> tuple[int, ...]:
    """Rows of the matrices that a parameter is made of; each lies in one shard."""
    rows = heights(shape, blocks)
    return rows if shards is None else shards.cut(rows)


def _sorted(blocks: list[Blocks]) -> list[Blocks]:
    return sorted(blocks, key=repr)


def _drop_duplicates(group: dict[str, Any]) -> None:
    """A parameter that is given twice, of which torch has warned, is stepped once."""
    params = group["params"]
    first = sorted({id(p): i for i, p in reversed(list(enumerate(params)))}.values())
    if len(first) < len(params):
        for name in ("params", "param_names"):
            if name in group:
                group[name] = [group[name][i] for i in first]
