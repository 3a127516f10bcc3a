"""L-BFGS for deterministic problems: torch's interface, the operations of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import capture, ops
from .distributed.sharded_search import search_of
from .distributed.sharding import Division, Shards, check_flat, check_not_copied, check_not_divided
from .interrupts import uninterrupted
from .options import choice, count, flag, number, optional, ring_dtype
from .precision import full_precision
from .search import Search, turns_of_factors
from .state.arena import held, real_shape
from .state.history import History
from .state.layout import Counter, Stop, Word
from .state.plan import Cut, Plan
from .state.saved import check_mapping, with_dtypes, with_names
from .watch import Watch, check_device, check_dtypes, check_memory, differ

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: The setting that pays most where loss and gradient are exact: physics-informed networks, fits.
DETERMINISTIC: dict[str, Any] = {
    "lr": 0.5,
    "history_size": 1000,
    "line_search_fn": "armijo",
    "init": "kronecker",
    "self_scaled": True,
    "min_curvature": 1e-12,
    "tolerance_grad": 0.0,
    "tolerance_change": 0.0,
}

#: Reasons after which the next step may end at once.
ENDS = (Stop.GRADIENT, Stop.STEP, Stop.LOSS, Stop.SLOPE, Stop.SEARCH, Stop.NONFINITE)
#: What the entry of the first parameter always has.
COUNTS = ("func_evals", "n_iter")
#: Evaluations that a step by Armijo's rule has beyond its iterations, at least.
ARMIJO_MORE = 10
INITS = ("scalar", "kronecker", "rmsprop")
#: What ``stats()`` says of :class:`layout.Stop`.
REASONS = {
    Stop.GRADIENT: "converged: no element of the gradient exceeds tolerance_grad",
    Stop.STEP: "converged: the step changed no parameter by more than tolerance_change",
    Stop.LOSS: "converged: the loss changed by less than tolerance_change",
    Stop.SLOPE: "converged: the slope along the direction is less than tolerance_change",
    Stop.SEARCH: "line search failed: no lower loss along the direction",
    Stop.NONFINITE: "loss or gradient is not finite",
    Stop.ITERATIONS: "max_iter",
    Stop.EVALUATIONS: "max_eval",
}


def _rate(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: Tensor {name} must be 1-element, got {tuple(value.shape)}")
        value = value.item()
    number(0.0, "a finite number >= 0")(name, value)


CHECKS: dict[str, Callable[[str, Any], None]] = {
    "lr": _rate,
    "max_iter": count(1),
    "max_eval": optional(count(1)),
    "tolerance_grad": number(-inf, "a number", infinite=True),
    "tolerance_change": number(-inf, "a number", infinite=True),
    "history_size": count(0),
    "line_search_fn": optional(choice("strong_wolfe", "armijo")),
    "init": choice(*INITS),
    "self_scaled": flag,
    "min_curvature": optional(number(0.0, "a number in [0, 1)", high=1.0)),
    "first_step": optional(number(0.0, "a finite number > 0", strict=True)),
    "decay": number(0.0, "a number in [0, 1)", high=1.0),
    "eps": number(0.0, "a finite number > 0", strict=True),
    "block_size": count(1),
    "factor_interval": count(1),
    "maximize": flag,
    "history_dtype": ring_dtype,
    "fused": optional(flag),
}
#: Options that give the state its shape.
STRUCTURAL = ("history_size", "init", "block_size", "history_dtype")


class LBFGS(Optimizer):
    r"""Implements L-BFGS for losses that are evaluated on all data, every time.

    A drop-in for :class:`torch.optim.LBFGS`: with the same arguments it makes the same evaluations
    and, to rounding, finds the same losses. The direction takes a few fused operations whatever the
    number of pairs, where torch takes several for each.

    The direction is :math:`p = -H g` with :math:`H` the inverse Hessian of the stored pairs
    :math:`s = w' - w`, :math:`y = g' - g` on an initial matrix :math:`\gamma K`,
    :math:`\gamma = s^\top y / y^\top K y` of the newest pair. Beyond torch's, all keyword-only:

    - :math:`K` may be the adaptive matrix of :class:`AdaQN`, which takes in the gradients of all
      iterates (``init="kronecker"`` or ``"rmsprop"``);
    - pairs may scale down what older ones say (``self_scaled``): with
      :math:`\tau = \min(1, y^\top s / s^\top B s)`, the update of :math:`H` starts from
      :math:`H / \tau` (Oren & Luenberger 1974; Al-Baali 1998);
    - Armijo's rule (``line_search_fn="armijo"``) needs one loss per trial, and takes its decisions
      on the device.

    ``LBFGS(params, **DETERMINISTIC)`` has all three, keeps up to 1000 pairs, and tries half a step
    first: the scaled matrix is too long for a whole one as often as not.

    A trial whose loss or gradient is not finite shortens the step, and never enters the history; if
    none is finite, the parameters go back to where they were.

    On a GPU, a step by Armijo's rule first reads what the one before has come to, and then waits
    for nothing until it has made ``max_iter`` evaluations; with ``max_eval`` no larger than that,
    it never does. A search that stops sooner changes nothing any more, but the evaluations go on to
    that number, once: the next step looks from its first evaluation on. The counts in the state
    follow at the next step, or with :meth:`stats`.

    Such a step can be captured in a CUDA graph, with its closure: call :meth:`reserve` and
    :meth:`step` before the capture. A replay makes ``max_eval`` evaluations; :meth:`stats` tells
    what it has come to. The graph keeps the options as they were, ``lr`` among them.

    The state takes ``2 history_size + 7`` numbers per parameter once all pairs are there, and grows
    as they come; ``init="kronecker"`` takes up to 5 more (see :class:`AdaQN`), ``"rmsprop"`` 1.
    It is float64 where a parameter is, and at least float32. In float32 a loss can be found to
    about seven digits, and with them its minimum to about 3e-4 in the parameters; take float64
    where that is not enough, as physics-informed networks mostly need.

    Processes that have the rows of each parameter that :func:`torch.distributed.fsdp.fully_shard`
    gives them, or ``state_sharding``, take each step together: the loss is averaged over them, what
    spans all parameters is added up, and all decide alike. A step is that of one process, with
    ``"kronecker"`` of one whose matrices are cut where the rows of a process end.
    :meth:`state_dict` has, for every parameter, the part of its vectors that is here, as
    ``DTensor``; it loads in as many processes, or made whole in any number, but for
    ``"kronecker"``.

    Args:
        params (iterable): parameters, or named parameters, or dicts that define parameter groups,
            which must agree on all options. Complex ones count as pairs of real numbers. All live
            on one device.
        lr (float, Tensor, optional): learning rate: the step that is tried first (default: 1).
        max_iter (int, optional): maximal number of iterations per optimization step (default: 20).
        max_eval (int, optional): maximal number of function evaluations per optimization step
            (default: ``max_iter * 1.25``; with ``"armijo"`` at least 10 more than ``max_iter``).
        tolerance_grad (float, optional): termination tolerance on first order optimality, the
            largest element of the gradient; a negative one never ends a step (default: 1e-7).
        tolerance_change (float, optional): termination tolerance on function value/parameter
            changes (default: 1e-9).
        history_size (int, optional): pairs kept, any number; 0 for none (default: 100).
        line_search_fn (str, optional): ``"strong_wolfe"``, ``"armijo"`` or ``None``
            (default: ``None``).
        init (str, optional): the initial matrix :math:`K`: ``"scalar"``, ``"kronecker"`` or
            ``"rmsprop"`` (default: ``"scalar"``).
        self_scaled (bool, optional): scale the matrix by :math:`1/\tau` at every pair
            (default: ``False``).
        min_curvature (float, optional): a pair is stored if :math:`s^\top y` exceeds this multiple
            of :math:`|s| |y|`. ``None`` asks for :math:`s^\top y > 10^{-10}`, as torch does, which
            ends the gain of curvature as a problem converges (default: ``None``).
        first_step (float, optional): length of the first step, before there are pairs, as a
            multiple of ``lr``. ``None`` for :math:`\min(1, 1 / \sum |g|)`, as torch has it, and
            1e-3 where ``init`` is no scalar. While there are no pairs, as with ``history_size=0``,
            the next search by Armijo's rule starts from twice the last step (default: ``None``).
        decay (float, optional): decay of the averages in :math:`K`, in [0, 1) (default: 0.98).
        eps (float, optional): added inside the root of :math:`K` (default: 1e-16).
        block_size (int, optional): longest piece of a matrix's side that has a factor in
            ``"kronecker"`` (default: 128).
        factor_interval (int, optional): iterations between two updates of an eigenbasis
            (default: 5).
        maximize (bool, optional): maximize the objective (default: ``False``).
        history_dtype (torch.dtype, optional): dtype of the pairs: ``None`` for the state's own, or
            ``torch.bfloat16`` (default: ``None``).
        fused (bool, optional): ``None`` takes native kernels where there are any, ``True`` insists
            on them, ``False`` takes the PyTorch reference (default: ``None``).
        state_sharding (ProcessGroup, optional): processes with the same whole parameters and
            gradients, as with ``DistributedDataParallel``. Each keeps the pairs of some rows of
            every parameter, and all take the same steps: parameters are the same to the bit, and
            the loss is the mean of what the closures return (default: ``None``).

    Raises:
        ValueError: an option is out of range, or differs between groups.
        TypeError: an option has the wrong type, or a parameter is not floating-point or complex.
        RuntimeError: ``fused=True`` without native kernels.

    Example:
        >>> optimizer = LBFGS(model.parameters(), max_iter=100, **DETERMINISTIC)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = loss_fn(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure)
        >>> optimizer.stats()["stopped"]
    """

    #: While a state_dict is loaded, the history that it describes, if it has one.
    _incoming: History | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        init: str = "scalar",
        self_scaled: bool = False,
        min_curvature: float | None = None,
        first_step: float | None = None,
        decay: float = 0.98,
        eps: float = 1e-16,
        block_size: int = 128,
        factor_interval: int = 5,
        maximize: bool = False,
        history_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        state_sharding: ProcessGroup | None = None,
    ) -> None:
        values = locals()
        defaults = {name: values[name] for name in CHECKS}
        _validate(defaults)
        check_not_divided(
            "L-BFGS has one direction for all of them; use LBFGS by itself, with state_sharding"
        )
        if max_eval is None:
            least = max_iter + ARMIJO_MORE if line_search_fn == "armijo" else 0
            defaults["max_eval"] = max(max_iter * 5 // 4, least)
        self._prepare()
        self._division = Division(state_sharding)
        super().__init__(params, defaults)
        if fused:
            ops.check_fused(self._parameters()[0].device)

    def _prepare(self) -> None:
        """What is neither option nor state."""
        self._history: History | None = None
        self._watch: Watch | None = None
        self._stopped = Stop.NOT
        self._uncounted = False
        self._captured = False

    # ------------------------------------------------------------------ parameters and options

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: an option differs from that of the others.
            TypeError: a parameter is neither floating-point nor complex.
            RuntimeError: there have been steps, and the pairs would not fit; or a parameter is
                divided among processes otherwise than by rows, or otherwise than the others.
        """
        if self._history is not None:
            raise RuntimeError(
                "params: a group cannot join once there are pairs; make a new optimizer"
            )
        super().add_param_group(param_group)
        try:
            check_dtypes(self.param_groups[-1]["params"])
            check_flat(self.param_groups[-1]["params"])
            self._shards()
            self._options()
        except Exception:
            self.param_groups.pop()
            raise

    def _parameters(self) -> list[Tensor]:
        """Each of them once."""
        return list(dict.fromkeys(p for group in self.param_groups for p in group["params"]))

    def _shards(self) -> Shards | None:
        """How the parameters are divided among processes, if they are."""
        return self._division.of(self._parameters())

    def _options(self) -> dict[str, Any]:
        """The options that all groups share, checked."""
        first, *others = self.param_groups
        for group in others:
            for name in CHECKS:
                if not _same(group[name], first[name]):
                    raise ValueError(
                        f"{name}: a parameter group has {group[name]!r}, and another "
                        f"{first[name]!r}; there is one direction for all parameters, so groups "
                        "must agree"
                    )
        _validate(first)
        history = self._history
        changed = [n for n in STRUCTURAL if history and first[n] != self._fixed[n]]
        if changed:
            raise RuntimeError(
                f"{changed[0]}: was {self._fixed[changed[0]]!r} when the state was made, and is "
                f"{first[changed[0]]!r} now; set it back, or make a new optimizer"
            )
        return first

    def _new_history(self, options: Mapping[str, Any]) -> History:
        params, shards = self._parameters(), self._shards()
        check_device(params)
        check_memory(params if shards is None else [shards.own(p) for p in params])
        with torch.inference_mode(False):
            plan = self._plan(params, options, shards)
            return History(params, options["history_size"], plan, options["history_dtype"], shards)

    @staticmethod
    def _plan(
        params: list[Tensor], options: Mapping[str, Any], shards: Shards | None
    ) -> Plan | None:
        if options["init"] == "scalar":
            return None
        size = options["block_size"] if options["init"] == "kronecker" else None
        shapes = [real_shape(p) for p in params]
        rows = [(shape[0] if shape else 1,) for shape in shapes]
        cuts = [Cut(own if shards is None else shards.cut(own), size) for own in rows]
        plan = Plan(shapes, cuts, options["block_size"])
        return plan if shards is None else plan.part(shards.ranges(shapes), shards.rank)

    def _bind(self, history: History) -> None:
        self._history = history
        self._counts()  # an entry without them is one that was emptied
        self._note_filed()
        ops.load_kernels(
            history.device, self.param_groups[0]["fused"], vectors=history.dtype,
            pairs=history.pair_dtype, fisher=history.dtype, search=True,
            kronecker=history.table is not None,
        )  # fmt: skip
        self._fixed = {name: self.param_groups[0][name] for name in STRUCTURAL}

    # ------------------------------------------------------------------ what is filed, or replaced

    # The state is filed only from when it was asked for until the next step, which would make it
    # stale.

    def _file(self) -> None:
        self._settle()
        self._count()
        if self._history is not None:
            self._file_entries(self._history)
            self._note_filed()

    def _file_entries(self, history: History) -> None:
        counts = {name: self._counts()[name] for name in COUNTS}
        first, *others = history.entries()
        for p, entry in zip(self._parameters(), [{**counts, **first}, *others], strict=True):
            if entry:
                self.state[p] = entry
            else:
                self.state.pop(p, None)

    def _take_back(self) -> None:
        """File the counts alone; a state_dict that was made of the entries keeps what it has."""
        first, *others = self._parameters()
        entry = self.state[first]
        if "d" in entry:
            self.state[first] = {name: entry[name] for name in COUNTS}
            for p in others:
                self.state.pop(p, None)
            self._note_filed()

    def _entries(self) -> list[dict[str, Any]]:
        """What is filed under each parameter."""
        return [self.state.get(p, {}) for p in self._parameters()]

    def _note_filed(self) -> None:
        self._watch = Watch(self._parameters(), list(map(_tensors, self._entries())))

    def _sees_change(self) -> bool:
        """Whether parameters, their layout or what is filed were replaced since they were noted."""
        params = self._parameters()
        filed = map(_tensors, self._entries())
        return held(self._watch).sees_change(params, dict(zip(params, filed, strict=True)))

    def _settle(self) -> None:
        """Go on from what is filed, where that was replaced, for the parameters as they are.

        Raises:
            RuntimeError: other parameters are there than when the state was made.
            ValueError: they have other shapes, or what is filed does not fit them.
        """
        if self._history is None:
            return
        if not any(self.state.values()):  # emptied, it begins anew, as torch's does
            self._prepare()
        elif self._sees_change():
            self._check_shapes(self._history.shapes)
            entries = self._entries()
            is_filed = "d" in entries[0]
            found = entries if is_filed else self._history.entries()
            history = self._restored(found, self._options())
            if is_filed:
                self._file_entries(history)
            self._bind(history)

    def _check_shapes(self, shapes: list[torch.Size]) -> None:
        params = self._parameters()
        if differ(params, held(self._watch).params):
            raise RuntimeError(
                "params: some were put in, taken out or replaced after the first step; make a new "
                "optimizer"
            )
        for index, (p, shape) in enumerate(zip(params, shapes, strict=True)):
            if real_shape(p) != shape:
                raise ValueError(
                    f"params: parameter {index} was of shape {tuple(shape)} when the state was "
                    f"made, and is of {tuple(real_shape(p))} now; make a new optimizer"
                )

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step: up to ``max_iter`` iterations.

        Args:
            closure (Callable): clears the gradients, computes the loss, calls ``backward()`` and
                returns the loss.

        Returns:
            What the closure returned first, at the parameters as they were.

        Raises:
            RuntimeError: there is no closure, it leaves no gradient, an option has changed that
                gives the state its shape, parameters overlap, or the step is captured in a CUDA
                graph that could not repeat it.
            TypeError: the closure does not return a loss.
            ValueError: the loss is not one real number, or is on another device.

        If the closure raises, the parameters are where the last iteration ended; with
        ``state_sharding``, when the next step begins.
        """
        if closure is None and self._is_blank_call():
            self._allocated(self._options())
            return None
        if not callable(closure):
            raise RuntimeError(
                f"closure: expected a function that evaluates loss and gradient, got {closure!r}; "
                "L-BFGS needs them at several points: pass optimizer.step(closure)"
            )
        options = self._options()
        captured = capture.is_captured(self._parameters()[0].device)
        if captured:
            self._check_capture(options)
            self._captured = True
        else:
            self._settle()
            self._count()
        history = self._allocated(options)
        self._take_back()
        counts = self._counts()
        backend = ops.select_backend(history.device, options["fused"])
        with full_precision(history.device), uninterrupted() as hold:
            search = search_of(
                history.shards, backend.ops, backend.name == "native", self._parameters(), history,
                options, closure, hold, counts["n_iter"] > 0, captured, self._stopped in ENDS,
            )  # fmt: skip
            try:
                self._run(search)
            except BaseException:
                search.give_up()
                raise
        return search.returned

    def _is_blank_call(self) -> bool:
        """A first call at lr 0 without a closure.

        It is how torch.distributed.checkpoint makes an optimizer allocate its state.
        """
        return self._history is None and all(group["lr"] == 0 for group in self.param_groups)

    def _run(self, search: Search) -> None:
        if search.is_armijo:
            self._uncounted = True
            words = search.run_armijo()
            if words is not None:
                self._count(words)
            return
        try:
            self._stopped = search.run()
        finally:
            counts = self._counts()
            counts["func_evals"] += search.evaluations
            counts["n_iter"] += search.iterations

    def _counts(self) -> dict[str, Any]:
        """Where torch has its counts."""
        state: dict[str, Any] = self.state[self._parameters()[0]]
        for name in COUNTS:
            state.setdefault(name, 0)
        return state

    def _count(self, words: list[float] | None = None) -> None:
        """Count what was decided on the device, which this waits for unless ``words`` are given.

        Graphs that hold a step may have been replayed at any time.
        """
        if not self._uncounted:
            return
        self._uncounted = self._captured
        history = held(self._history)
        words = words or history.words.tolist()
        history.words[Word.MADE :].zero_()
        counts = self._counts()
        counts["n_iter"] += int(words[Word.MADE])
        counts["func_evals"] += int(words[Word.JUDGED])
        if words[Word.JUDGED]:
            self._stopped = Stop(int(words[Word.STATUS])) or Stop.EVALUATIONS

    # ------------------------------------------------------------------ CUDA graphs

    def reserve(self) -> None:
        """Allocate the memory of all ``history_size`` pairs, which grows as they come otherwise.

        A CUDA graph that is to hold a step asks for it, before the capture: it would make the
        memory grow from the same pairs at every replay.

        Raises:
            RuntimeError: a CUDA graph is being captured; and as :meth:`step`.
        """
        if capture.is_captured(self._parameters()[0].device):
            raise RuntimeError(
                "reserve: a CUDA graph would allocate the memory at every replay; call it before "
                "the capture"
            )
        options = self._options()
        self._settle()
        history = self._allocated(options)
        history.reserve(history.history_size)

    def _allocated(self, options: Mapping[str, Any]) -> History:
        if self._history is None:
            shards = self._shards()
            if shards is not None:
                alike = {name: options[name] for name in CHECKS}
                shards.check_alike(self._parameters(), {**alike, "lr": float(options["lr"])})
            self._bind(self._new_history(options))
        return held(self._history)

    def _check_capture(self, options: Mapping[str, Any]) -> None:
        """Raise ``RuntimeError`` for a step that a CUDA graph would not repeat as it should."""
        history, search = self._history, options["line_search_fn"]
        if search != "armijo":
            raise RuntimeError(
                f"line_search_fn: {search!r} decides on the host, which a CUDA graph cannot; "
                'capture a step with "armijo"'
            )
        if history is None or not history.calls or not history.is_complete():
            raise RuntimeError(
                f"history_size: the memory of {options['history_size']} pairs would be allocated "
                "in the CUDA graph; call step(closure) and reserve() before the capture"
            )
        if self._sees_change():
            raise RuntimeError(
                "params: parameters or their state were replaced since the last step; call "
                "step(closure) before the capture"
            )
        turns = turns_of_factors(options["factor_interval"])
        if history.has_factors() and options["max_eval"] % turns:
            raise RuntimeError(
                f"max_eval: a captured step makes {options['max_eval']} evaluations, after which "
                f"not all factors have had their turns; give it a multiple of {turns}"
            )

    # ------------------------------------------------------------------ what users look at

    def stats(self) -> dict[str, Any]:
        """What has happened, and what the memory holds. Waits for the device.

        Returns:
            dict: ``stopped`` (why the last :meth:`step` ended, or the last replay of a captured
            one, in words; ``None`` before the first), ``iterations`` and ``evaluations`` (since the
            start; by Armijo's rule, those until it stopped), ``pairs`` (in memory now),
            ``stored`` and ``skipped`` (pairs that passed the curvature test, or failed it),
            ``resets`` (searches that failed, which drops all pairs), ``state_bytes``.
        """
        self._count()
        state, history = self.state.get(self._parameters()[0], {}), self._history
        words = [0] * len(Counter) if history is None else history.counters.tolist()
        names = ("pairs", "stored", "skipped", "resets")
        return {
            "stopped": REASONS.get(self._stopped),
            "iterations": state.get("n_iter", 0),
            "evaluations": state.get("func_evals", 0),
            **{name: words[Counter[name.upper()]] for name in names},
            "state_bytes": 0 if history is None else history.bytes(),
        }

    def __repr__(self) -> str:
        options = self.param_groups[0]
        backend = ops.select_backend(self._parameters()[0].device, options["fused"])
        return (
            super().__repr__().removesuffix(")") + f"Backend: {backend.name} ({backend.reason})\n)"
        )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer; see :meth:`torch.optim.Optimizer.state_dict`.

        It is filed under the first parameter with the names of :class:`torch.optim.LBFGS`, which
        can load it, and more. Of divided parameters, each has its part of the vectors.
        """
        self._file()
        return with_names(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer state, also one of :class:`torch.optim.LBFGS`.

        Training continues bit for bit as if it had not stopped; from torch's state, to rounding.

        Args:
            state_dict (dict): what :meth:`state_dict` returned.

        Raises:
            ValueError: it is no such state, an option in it is out of range, or it does not fit the
                parameters. Nothing has changed then.
            TypeError: an option in it has the wrong type. Nothing has changed then.
        """

        def read(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            final = self._completed(final)
            self._incoming = self._read(final)
            return final

        check_mapping(state_dict)
        # Registered last, it sees what other hooks made of the dict, before torch casts it.
        handle = self.register_load_state_dict_pre_hook(read)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_incoming", None)

    def _completed(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The same, with the options that its groups lack, such as torch's, as they are here."""
        groups = state_dict.get("param_groups")
        if "state" not in state_dict or not groups or "tolerance_change" not in groups[0]:
            raise ValueError(
                "state_dict: expected that of an L-BFGS, with its options, got "
                f"{sorted(map(str, state_dict))}; pass what LBFGS.state_dict() returned"
            )
        own = {name: self.param_groups[0][name] for name in CHECKS}
        full = [{**own, **with_dtypes(group)} for group in groups]
        for group in full:
            _validate(group)
        return {**state_dict, "param_groups": full}

    def _read(self, state_dict: Mapping[str, Any]) -> History | None:
        """The history that it describes, or ``None`` if it holds none."""
        groups, state = state_dict["param_groups"], state_dict["state"]
        entries = [state.get(i, {}) for i in dict.fromkeys(i for g in groups for i in g["params"])]
        matches = [len(g["params"]) for g in groups] == [
            len(g["params"]) for g in self.param_groups
        ]
        if not entries or "d" not in entries[0] or not matches:  # torch reports a mismatch
            return None
        return self._restored(entries, groups[0])

    def _restored(
        self, entries: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> History:
        history = self._new_history(options)
        try:
            history.adopt(entries)
        except KeyError as missing:
            raise ValueError(
                f"state_dict: it lacks {missing}; pass what LBFGS.state_dict() returned"
            ) from None
        return history

    def __getstate__(self) -> dict[str, Any]:
        self._file()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        entries = self._entries()
        if "_division" not in self.__dict__:  # unpickled or copied
            self._division = Division()
            check_not_copied(self._parameters(), entries)
        incoming = self.__dict__.get("_incoming")
        if incoming is None and "d" in entries[0]:
            incoming = self._restored(entries, self.param_groups[0])
        self._prepare()
        if incoming is not None:
            self._file_entries(incoming)
            self._bind(incoming)


def _validate(options: Mapping[str, Any]) -> None:
    for name, check in CHECKS.items():
        check(name, options[name])


def _tensors(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of an entry, with the rows of its lists."""
    rows = {
        f"{name} {index}": row
        for name, value in entry.items()
        if isinstance(value, list)
        for index, row in enumerate(value)
    }
    return {name: value for name, value in {**entry, **rows}.items() if isinstance(value, Tensor)}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other or float(one) == float(other)
    return bool(one == other)
