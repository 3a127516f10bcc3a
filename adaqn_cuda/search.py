"""What :class:`LBFGS` does with an evaluation: which operations, in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from . import reference
from .interrupts import Hold
from .reference.kronecker import FIRST_CALLS, turns
from .state.arena import real_view
from .state.history import History
from .state.layout import Counter, Stop, Turn, Word, largest_norm
from .wolfe import DECREASE, NOISE, StrongWolfe, Trial

#: Trials along one direction by Armijo's rule.
MAX_TRIALS = 20
#: Without a line search, what a step is multiplied with whose loss is not finite, and how often.
SHORTER, MAX_SHORTER = 0.1, 10


def turns_of_factors(interval: int) -> int:
    """Calls after which every factor and basis has had all its turns; see :meth:`Search._call`."""
    return interval if interval < FIRST_CALLS else turns(interval)


@dataclass
class Search:
    """One call of :meth:`LBFGS.step`.

    Args:
        op: namespace with the operations.
        native: whether they write behind autograd's back.
        owners: the parameters.
        h: the state.
        options: of all groups.
        closure: evaluates loss and gradient.
        hold: what keeps Ctrl-C away, but for the closure.
        begun: whether there have been iterations before this call.
        captured: whether this goes into a CUDA graph, so that the host can read nothing.
        ended: whether the call before has converged or failed, as this one may at once.
    """

    op: Any
    native: bool
    owners: list[Tensor]
    h: History
    options: Mapping[str, Any]
    closure: Callable[[], Any]
    hold: Hold
    begun: bool
    captured: bool
    ended: bool

    def __post_init__(self) -> None:
        self.params = [real_view(self._own(p.detach())) for p in self.owners]
        self.lr = float(self.options["lr"])
        self.returned: Any = None
        self.evaluations = 0
        self.iterations = 0
        self.moved = False
        #: The host reads what is on its own side as it pleases; elsewhere, once per evaluation.
        self.reads = self.h.device.type == "cpu"

    def _own(self, tensor: Tensor) -> Tensor:
        """What this process steps of a parameter, or has of its gradient."""
        return tensor

    # ------------------------------------------------------------------ an evaluation

    def _measure(self, gradient: Tensor) -> None:
        """Loss and gradient where the parameters are, into ``gradient`` and the words."""
        with self.hold.lifted(), torch.enable_grad():
            loss = self.closure()
        if self.evaluations == 0:
            self.returned = loss
        self.evaluations += 1
        value = self._loss(loss)
        self.noise = NOISE * torch.finfo(value.dtype).eps
        self.op.secant_measure(
            self.params, self._gradients(), value, self.options["maximize"], self.h.direction,
            gradient, self.h.words,
        )  # fmt: skip

    def _loss(self, loss: Any) -> Tensor:
        """What the closure returned, beside the state."""
        if isinstance(loss, Tensor):
            if loss.numel() != 1 or loss.is_complex():
                raise ValueError(
                    f"closure: expected a loss of one real number, got {loss.dtype} of shape "
                    f"{tuple(loss.shape)}; return its mean or sum"
                )
            if loss.device.type not in ("cpu", self.h.device.type):
                raise ValueError(
                    f"closure: the loss is on {loss.device}, the parameters on {self.h.device}; "
                    "move the loss to the parameters"
                )
            value: Tensor = loss.detach().reshape(())
            value = value if value.is_floating_point() else value.double()
            ahead = value.device.type == "cpu" and not self.reads
            return value.to(self.h.device, non_blocking=ahead)
        if isinstance(loss, bool) or not isinstance(loss, (int, float)):
            raise TypeError(
                f"closure: expected it to return the loss, got {loss!r}; end it with 'return loss'"
            )
        return torch.full((), loss, dtype=torch.float64, device=self.h.device)

    def _gradients(self) -> list[Tensor | None]:
        grads = [p.grad for p in self.owners]
        if all(g is None for g in grads) and any(p.requires_grad for p in self.owners):
            raise RuntimeError(
                "closure: no parameter has a gradient after it; call loss.backward() in it, on a "
                "loss that depends on the parameters"
            )
        return [None if g is None else real_view(self._dense(g)).resolve_neg() for g in grads]

    def _dense(self, gradient: Tensor) -> Tensor:
        own = self._own(gradient if gradient.layout == torch.strided else gradient.to_dense())
        return own.resolve_conj()

    def _evaluate(self, step: float | None = None) -> Trial:
        """The same on the host's side; at ``step`` along the direction, if it is given."""
        if step is not None:
            self._move(step)
        gradient = torch.empty_like(self.h.direction)
        self._measure(gradient)
        words = self._read()
        return Trial.of(
            0.0 if step is None else step, words[Word.TRIAL_LOSS], words[Word.TRIAL_SLOPE],
            inf if words[Word.TRIAL_NONFINITE] else words[Word.TRIAL_MAX],
            words[Word.TRIAL_SUM], gradient,
        )  # fmt: skip

    def _read(self) -> list[float]:
        words = self.h.words.tolist()
        self.slope, self.longest = words[Word.SLOPE], words[Word.DIRECTION_MAX]
        return words

    def _move(self, step: float | None) -> None:
        """The parameters to the iterate plus ``step`` times the direction."""
        h, limit = self.h, -self.options["tolerance_change"]
        limit = 0.0 if self.is_armijo else limit
        self.moved = True
        self.op.secant_move(self.params, h.origin, h.direction, step, limit, h.words)
        if self.native:
            torch.autograd.graph.increment_version([p for p in self.params if not p.is_inference()])

    @property
    def is_armijo(self) -> bool:
        """Whether trials are judged on the device."""
        return bool(self.options["line_search_fn"] == "armijo")

    def go_back(self) -> None:
        """The parameters to the iterate, and no pair from the step that was not made."""
        if self.moved:
            self._move(0.0)

    def give_up(self) -> None:
        """The same after an error."""
        self.go_back()

    # ------------------------------------------------------------------ the next direction

    def _turn(self, trial: Tensor) -> None:
        """The trial becomes the iterate if it was accepted; its pair, and a new direction."""
        h = self.h
        h.calls += 1
        self.op.secant_keep(self.params, h.words, h.origin)
        absolute, relative = 1e-10, 0.0
        if self.options["min_curvature"] is not None:
            absolute, relative = 0.0, self.options["min_curvature"]
        self._pair(trial, absolute, relative)
        if h.table is not None:
            self._take_in(trial)
        self._reduce()
        self._combine()

    def _pair(self, trial: Tensor, absolute: float, relative: float) -> None:
        h = self.h
        self.op.secant_pair(
            trial, h.direction, absolute, relative, self.options["self_scaled"], h.gradient,
            h.s_ring, h.y_ring, h.gram, h.scales, h.projections, h.counters, h.words,
        )  # fmt: skip

    def _reduce(self) -> None:
        """r = K (q - Y a), z = Y^T r."""
        h = self.h
        self._residual(h.table is not None)
        if h.table is not None:
            self._apply(h.residual)
            if h.history_size:
                self.op.direction_images(h.residual, h.y_ring, h.counters, h.projections, h.images)

    def _residual(self, identity: bool) -> None:
        h = self.h
        self.op.secant_residual(
            h.gradient, h.y_ring, h.gram, h.counters, h.projections, h.words, identity,
            h.residual, h.images,
        )  # fmt: skip

    def _combine(self) -> None:
        h = self.h
        self.op.secant_combine(
            h.gradient, h.s_ring, h.gram, h.scales, h.counters, h.projections, h.images,
            h.residual, self.lr, self._first(), h.direction, h.words,
        )  # fmt: skip

    def _first(self) -> float:
        """Length of a step without pairs, relative to ``lr``; 0: as long as the gradient allows."""
        first = self.options["first_step"]
        return first if first is not None else 0.0 if self.h.table is None else 1e-3

    def _take_in(self, trial: Tensor) -> None:
        """K takes in the gradient; gamma = s.y / y.K y of the newest pair."""
        h, options = self.h, self.options
        parts = [
            piece.view(p.shape)
            for piece, p in zip(
                trial.split([p.numel() for p in self.params]), self.params, strict=True
            )
        ]
        self.op.kronecker_accumulate(
            self.params, parts, h.table, h.projections, h.counters, None, False,
            largest_norm(h.dtype), [len(parts)], [options["decay"]], [1 - options["decay"]],
            options["decay"], self._call(), options["factor_interval"], h.accumulator, h.factors,
            h.bases, h.square,
        )  # fmt: skip
        newest = reference.newest_slot(h.counters, h.slots)
        y = h.y_ring.index_select(0, newest)[0].to(h.dtype)
        image = y.clone()
        self._apply(image)
        s_y = h.gram.index_select(1, newest)[:, 0].index_select(0, newest)[0]
        gamma = s_y / self._product(y, image)
        usable = (h.counters[Counter.PAIRS] > 0) & (gamma > 0) & gamma.isfinite()
        h.words[Word.GAMMA] = torch.where(usable, gamma, 1.0)

    def _product(self, x: Tensor, y: Tensor) -> Tensor:
        return reference.product(x, y)

    def _call(self) -> int:
        """Which call of the factors' schedule this is: one of the first, in which none sits out.

        Bases keep their turns, which a call gives by its remainder.  An interval too long for the
        first calls leaves the schedule as it is.
        """
        first, interval = FIRST_CALLS, self.options["factor_interval"]
        late = self.h.calls > first > interval
        return first - (first - self.h.calls) % interval if late else self.h.calls

    def _apply(self, x: Tensor) -> None:
        """x = K x."""
        h, options = self.h, self.options
        self.op.kronecker_apply(
            h.table, h.counters, h.accumulator, h.bases, [len(self.params)], [options["decay"]],
            [options["eps"]], True, 0, False, x,
        )  # fmt: skip

    # ------------------------------------------------------------------ decided on the device

    def run_armijo(self) -> list[float] | None:
        """Trial after trial; whether one is accepted, and what comes next, is not known here.

        Returns:
            The words after the last decision, if the host has seen them.
        """
        h, options = self.h, self.options
        h.words[: Word.TURN].zero_()
        self._keep_start()
        words: list[float] | None = None
        for _ in range(options["max_eval"]):
            self._measure(h.trial)
            h.reserve(1)
            self.op.secant_decide(
                DECREASE, self.noise, options["tolerance_grad"], options["tolerance_change"],
                MAX_TRIALS, options["max_iter"], h.counters, h.words,
            )  # fmt: skip
            words = self._read() if self._looks() else None
            if words is None or words[Word.TURN] != Turn.REFUSE:
                self._turn(h.trial)
            if words is not None and words[Word.STATUS] != Stop.NOT:
                break
            self._move(None)
        self.go_back()
        return words

    def _keep_start(self) -> None:
        """Where the parameters are now is gone back to, even if the loss there is not finite."""
        self.h.words[Word.TURN] = float(Turn.ACCEPT)
        self.op.secant_keep(self.params, self.h.words, self.h.origin)

    def _looks(self) -> bool:
        """Whether the host reads what has been decided, to end the call once it has stopped.

        Where that means to wait, only if the end may have come: all iterations may have been made.
        """
        if self.captured:
            return False
        return self.reads or self.ended or bool(self.evaluations > self.options["max_iter"])

    # ------------------------------------------------------------------ decided here

    def run(self) -> Stop:
        """As :class:`torch.optim.LBFGS` does it, with one read per evaluation."""
        self.h.words[Word.TURN] = float(Turn.ACCEPT)
        trial = self._evaluate()
        if not isfinite(trial.loss):
            return Stop.NONFINITE
        if trial.largest <= self.options["tolerance_grad"]:
            return Stop.GRADIENT
        while True:
            self.iterations += 1
            start = trial
            stop, trial = self._iterate(start)
            if stop is not Stop.NOT:
                self.h.words[Word.LOSS] = start.loss
                return stop

    def _iterate(self, start: Trial) -> tuple[Stop, Trial]:
        """From one iterate to the next, and whether that is the last one."""
        options = self.options
        self.h.reserve(1)
        self._turn(start.gradient)
        if self.reads:
            self._read()
            if not self.slope <= -options["tolerance_change"]:
                return Stop.SLOPE, start
        step, last = self._first_trial(start), self.iterations == options["max_iter"]
        if options["line_search_fn"] is None and last:
            self._move(step)
            return Stop.ITERATIONS, start
        trial = self._find(start, step)
        if not self.slope <= -options["tolerance_change"]:
            return Stop.SLOPE, start
        if not isfinite(trial.loss):
            self.go_back()
        return self._verdict(start, trial, last), trial

    def _first_trial(self, start: Trial) -> float:
        if self.begun or self.iterations > 1:
            return self.lr
        first = self._first() or (min(1.0, 1.0 / start.total) if start.total else 1.0)
        return first * self.lr

    def _find(self, start: Trial, step: float) -> Trial:
        """The trial to accept."""
        if self.options["line_search_fn"] is None:
            trial = self._evaluate(step)
            for _ in range(MAX_SHORTER):
                if isfinite(trial.loss):
                    break
                step *= SHORTER
                trial = self._evaluate(step)
            return trial
        left = self.options["max_eval"] - self.evaluations
        trial = self._evaluate(step)
        at_start = Trial(0.0, start.loss, self.slope, start.largest, start.total, start.gradient)
        tolerance, dtype = self.options["tolerance_change"], self.h.dtype
        wolfe = StrongWolfe(at_start, self._evaluate, self.longest, tolerance, left, dtype)
        accepted = wolfe.search(trial)
        self._move(accepted.step)
        return accepted

    def _verdict(self, start: Trial, trial: Trial, last: bool) -> Stop:
        options = self.options
        reasons = (
            (not isfinite(trial.loss), Stop.NONFINITE),
            (last, Stop.ITERATIONS),
            (self.evaluations >= options["max_eval"], Stop.EVALUATIONS),
            (trial.largest <= options["tolerance_grad"], Stop.GRADIENT),
            (trial.step == 0, Stop.SEARCH),
            (trial.step * self.longest <= options["tolerance_change"], Stop.STEP),
            (abs(trial.loss - start.loss) < options["tolerance_change"], Stop.LOSS),
        )
        return next((reason for applies, reason in reasons if applies), Stop.NOT)
