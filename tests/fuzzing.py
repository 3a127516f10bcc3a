"""A model of what a user may do to an optimizer, and what must hold after each of it.

A program is a list of actions, ``((rule, *details), seed)``; :class:`Machine` runs one on tiny
parameters.  What a step has to do is known from three sides: from a :class:`Mirror`, a second
optimizer that was loaded from a state_dict and makes the same step undisturbed (to the bit) or on
the reference (to a tolerance); from :func:`textbook_step`, which writes first-order methods out;
and from what a step may not change.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
import signal
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, nan
from typing import Any

import torch
from torch import Tensor, nn

from adaqn_cuda import AdaQN, ops
from adaqn_cuda.options import AVERAGED
from adaqn_cuda.state.arena import SHARED, real_view
from adaqn_cuda.state.layout import Counter, largest_norm, state_dtype

# --------------------------------------------------------------------------- what programs draw

#: Shapes and dtypes of the parameters; ``None`` for that of the program.
LAYOUTS = {
    "matrix": [((2, 3), None)],
    "plain": [((2, 3), None), ((3,), None), ((), None)],
    "empty": [((0, 2), None), ((3,), None)],
    "complex": [((2, 2), None), ((2,), torch.complex64)],
    "bfloat16": [((2, 2), torch.bfloat16), ((3,), None)],
}

#: Gradients, by the kind of all of them, or of one parameter's.
STANDING = ("none", "missing")
POISONED = ("nan", "inf")
EXTREME = ("huge", "largest", "astronomical")
GRADIENTS = ("normal", "zero", "small", "denormal", *STANDING, *POISONED, *EXTREME)

#: Values that an option may be given between two steps.
LEGAL: dict[str, list[Any]] = {
    "lr": [0.0, 0.01, 0.1, torch.tensor(0.05), torch.tensor(0.0)],
    "weight_decay": [0.0, 0.1, torch.tensor(0.2)],
    "momentum": [0.0, 0.5, 0.8],
    "decay": [0.9, 0.98, 0.5, 0.0],
    "eps": [1e-16, 1e-3],
    "damping": [0.0, 0.2, 0.9],
    "max_direction": [inf, 1.0, 0.3],
    "max_grad_norm": [inf, 0.5],
    "min_curvature": [1e-4, 1.0],
    "max_increase": [1.01, inf],
    "update_interval": [1, 2, 3],
    "factor_interval": [1, 2, 5],
    "bias_correction": [True, False],
    "maximize": [False, True],
    "fused": [None, False],
}

#: Values that no option may have.
ILLEGAL: list[tuple[str, Any]] = [
    ("lr", -1.0), ("lr", nan), ("lr", "a lot"), ("lr", torch.ones(2)),
    ("lr", None), ("weight_decay", -0.1), ("weight_decay", torch.ones(2)), ("momentum", 1.0),
    ("momentum", torch.tensor(0.5)), ("momentum", torch.ones(2)), ("decay", 1.5), ("decay", nan),
    ("eps", 0.0),
    ("damping", 1.0), ("max_direction", 0.0), ("max_grad_norm", -1.0), ("min_curvature", -1.0),
    ("max_increase", 0.5), ("update_interval", 0), ("update_interval", 2.5),
    ("factor_interval", 0), ("bias_correction", 1), ("maximize", None), ("fused", "yes"),
    ("init", "identity"), ("curvature", "exact"), ("history_dtype", torch.float16),
    ("history_size", -1), ("fisher_size", 0), ("block_size", 0), ("differentiable", True),
]  # fmt: skip

#: Values of options that give the state its shape; one of two differs from what it has.
STRUCTURAL: dict[str, tuple[Any, Any]] = {
    "history_size": (1, 4),
    "fisher_size": (1, 7),
    "init": ("rmsprop", "kronecker"),
    "curvature": ("fisher", "gradients"),
    "block_size": (1, 2),
    "max_vector_dim": (1, 2),
    "normalize": (False, True),
    "history_dtype": (None, torch.bfloat16),
    "fisher_dtype": (None, torch.bfloat16),
}

#: What functions of the user's do when they are called at a pair update.
MOODS = ("fine", "worse", "nan", "raises", "bad type", "interrupted")

#: Ways to make a step; see :meth:`Machine.step`.
WAYS = ("alone", "closure", "twin", "reference", "interrupted before", "interrupted after", "fails")


class Disturbance(RuntimeError):
    """Raised on purpose."""


# --------------------------------------------------------------------------- bits


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit, NaN and signs of zeros included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (x.detach().reshape(-1).view(torch.uint8) for x in (real_view(a), real_view(b)))
    return torch.equal(a, b)


def parameters(optimizer: AdaQN) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def group_sizes(optimizer: AdaQN) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


@dataclass
class Snapshot:
    """Copies of parameters and of their state, by name, and the groups' options."""

    params: list[Tensor]
    entries: list[dict[str, Tensor]]
    options: list[dict[str, Any]]

    @classmethod
    def of(cls, optimizer: AdaQN) -> Snapshot:
        params, copies = parameters(optimizer), {}
        entries = [
            {name: copies.setdefault(id(t), t.clone()) for name, t in state.items()}
            for state in (optimizer.state.get(p, {}) for p in params)
        ]
        groups = [options_of(group) for group in optimizer.param_groups]
        return cls([p.detach().clone() for p in params], entries, groups)

    def counter(self, word: Counter) -> int:
        """A word of the control block; 0 without state."""
        entry = next((entry for entry in self.entries if entry), None)
        return int(entry["counters"][word]) if entry else 0

    def calls(self) -> int:
        entry = next((entry for entry in self.entries if entry), None)
        return int(entry["calls"]) if entry else 0


def with_momentum(entry: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """Momentum that has been raised from zero is allocated sooner or later, and zero at first."""
    if entry and "momentum" in other:
        return {"momentum": torch.zeros_like(other["momentum"]), **entry}
    return entry


def assert_same(a: Snapshot, b: Snapshot, what: str, but: tuple[str, ...] = ()) -> None:
    """Two snapshots are the same to the bit, ``but`` for some state."""
    assert_same_parameters(a, b, what)
    for index, (x, y) in enumerate(zip(a.entries, b.entries, strict=True)):
        # Without momentum, s.m is not used; it is put in order when the momentum comes.
        skipped = {*but, "moments"} if ("momentum" in x) != ("momentum" in y) else {*but}
        x, y = with_momentum(x, y), with_momentum(y, x)
        assert x.keys() == y.keys(), f"{what}: state of parameter {index}: {x.keys()}, {y.keys()}"
        for name in x.keys() - skipped:
            assert bits_equal(x[name], y[name]), f"{what}: {name!r} of parameter {index} differs"


def assert_same_parameters(a: Snapshot, b: Snapshot, what: str) -> None:
    for index, (p, q) in enumerate(zip(a.params, b.params, strict=True)):
        assert bits_equal(p, q), f"{what}: parameter {index} differs"


# --------------------------------------------------------------------------- disturbances


@contextmanager
def disturbed(at: int | None, when: str):
    """Count the operations of a step, and disturb the one numbered ``at``.

    Either SIGINT arrives before or after it, or it raises before it does anything.
    """
    count, originals = [0], []

    def wrapped(function):
        def call(*args):
            number, count[0] = count[0], count[0] + 1
            if number == at and when == "fails":
                raise Disturbance("an operation failed")
            if number == at and when == "interrupted before":
                signal.raise_signal(signal.SIGINT)
            function(*args)
            if number == at and when == "interrupted after":
                signal.raise_signal(signal.SIGINT)

        return call

    for namespace in (ops._DISPATCHED, ops._REFERENCE):
        for name, function in list(vars(namespace).items()):
            originals.append((namespace, name, function))
            setattr(namespace, name, wrapped(function))
    try:
        yield count
    finally:
        for namespace, name, function in originals:
            setattr(namespace, name, function)


class Hooks:
    """The user's functions; ``mood`` says what they do."""

    def __init__(self, monitored: bool) -> None:
        self.mood, self.monitored, self.owner = "fine", monitored, None

    def bind(self, optimizer: AdaQN) -> None:
        """They belong to no copy and no checkpoint, so a new optimizer gets them anew."""
        self.owner = optimizer
        curvature = optimizer.param_groups[0]["curvature"]
        optimizer.monitor = self.monitor if self.monitored else None
        optimizer.curvature_closure = self.loss if curvature == "difference" else None
        optimizer.curvature_product = self.product if curvature == "product" else None

    def _disturb(self) -> None:
        assert all(p.isfinite().all() for p in parameters(self.owner)), "a hook saw no number"
        if self.mood == "raises":
            raise Disturbance("a hook failed")
        if self.mood == "interrupted":
            signal.raise_signal(signal.SIGINT)

    def loss(self) -> Tensor:
        self._disturb()
        if self.mood == "bad type":
            return "no loss"
        square = [(real_view(p).double() ** 2).sum() for p in parameters(self.owner)]
        loss = torch.stack(square).sum()
        return loss * nan if self.mood == "nan" else loss

    def monitor(self) -> Tensor | float:
        """A sum of squares, until it is ``worse``."""
        loss = self.loss()
        return 1e300 if self.mood == "worse" else loss

    def product(self, s):
        self._disturb()
        if self.mood == "bad type":
            return [2 * part for part in s.values()]
        factor = {"nan": nan, "worse": -1.0}.get(self.mood, 2.0)
        return {p: factor * part for p, part in s.items()}


# --------------------------------------------------------------------------- the mirror


class Mirror:
    """A second optimizer, loaded from the state_dict of the first, that goes through a step alone.

    While no tensor of the first has been replaced, it is brought up to date by copies into its own.
    """

    def __init__(self, optimizer: AdaQN, hooks: Hooks) -> None:
        self.first = optimizer
        self.second = loaded(optimizer, hooks)

    def update(self) -> AdaQN:
        """Make both equal, and return the second."""
        second = self.second
        for group, mine in zip(self.first.param_groups, second.param_groups, strict=True):
            mine.update(copy.copy(options_of(group)))
        for p, q in zip(parameters(self.first), parameters(second), strict=True):
            q.data.copy_(p.detach())
            q.requires_grad_(p.requires_grad)
            q.grad = None if p.grad is None else p.grad.clone()
            for name, tensor in self.first.state.get(p, {}).items():
                second.state[q][name].copy_(tensor)
        entry = second.state.get(parameters(second)[0])
        second._calls = int(entry["calls"]) if entry else 0
        return second

    def fits(self, optimizer: AdaQN) -> bool:
        """Whether copies are enough to make both equal."""
        ours, theirs = parameters(optimizer), parameters(self.second)
        return (
            optimizer is self.first
            and group_sizes(optimizer) == group_sizes(self.second)
            and any(optimizer.state.values()) == any(self.second.state.values())
            and all(
                p.shape == q.shape
                and p.dtype == q.dtype
                and p.stride() == q.stride()
                and optimizer.state.get(p, {}).keys() == self.second.state.get(q, {}).keys()
                for p, q in zip(ours, theirs, strict=True)
            )
        )


def clones(optimizer: AdaQN) -> list[dict[str, Any]]:
    """Groups of equal parameters, with default options."""
    groups = []
    for group in optimizer.param_groups:
        params = [nn.Parameter(p.detach().clone(), p.requires_grad) for p in group["params"]]
        for p, q in zip(group["params"], params, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        groups.append({"params": params})
    return groups


def loaded(optimizer: AdaQN, hooks: Hooks, state_dict: dict[str, Any] | None = None) -> AdaQN:
    """A fresh optimizer on copies of the parameters that has loaded the state."""
    fresh = AdaQN(clones(optimizer))
    fresh.load_state_dict(optimizer.state_dict() if state_dict is None else state_dict)
    hooks_of(fresh, hooks)
    return fresh


def hooks_of(optimizer: AdaQN, hooks: Hooks) -> None:
    """Give a second optimizer functions of its own in the same mood, which ``hooks`` decides."""
    own = copy.copy(hooks)
    own.bind(optimizer)
    optimizer.test_hooks = own


# --------------------------------------------------------------------------- the textbook


def textbook_step(before: Snapshot, grads: list[Tensor | None], groups: list[int]) -> list[Tensor]:
    """The parameters after a step without pairs and without a Kronecker matrix, in float64."""
    common, t = before.options[0], before.counter(Counter.ACCEPTED) + 1
    sign = -1.0 if common["maximize"] else 1.0
    real = [None if g is None else real_view(g).double() for g in grads]
    norm = torch.stack([g.square().sum() for g in real if g is not None]).sum().sqrt().item()
    limit = min(common["max_grad_norm"], largest_norm(state_dtype(
        [real_view(p) for p in before.params])))  # fmt: skip
    factor = sign * min(1.0, limit / norm) if norm else sign
    expected = []
    for p, g, entry, k in zip(before.params, real, before.entries, groups, strict=True):
        w = real_view(p).double()
        if g is not None:
            g, options = factor * g, before.options[k]
            beta, keep = options["momentum"], options["decay"]
            adagrad = options["init"] == "adagrad"
            q, m = g, entry.get("momentum", torch.zeros_like(w)).double()
            if "momentum" in entry or beta:
                m = beta * m + (1 - beta) * g
                q = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
            if options["init"] != "scalar":
                v = entry.get("accumulator", torch.zeros_like(w)).double()
                v = v + g * g if adagrad else keep * v + (1 - keep) * g * g
                corrected = common["bias_correction"] and not adagrad
                q = q / (v / (1 - keep**t if corrected else 1) + options["eps"]).sqrt()
            lr, decay = float(options["lr"]), float(options["weight_decay"])
            w = (1 - lr * decay) * w - lr * q
        expected.append(w)
    return expected


def epsilon(*tensors: Tensor) -> float:
    return max(torch.finfo(t.dtype).eps for t in tensors)


def has_textbook(options: dict[str, Any]) -> bool:
    plain = options["history_size"] == 0 and not options["normalize"]
    return plain and options["init"] != "kronecker"


# --------------------------------------------------------------------------- the machine


class Machine:
    """An optimizer, and the rules by which a program handles it.

    Args:
        layout: of the parameters, a key of :data:`LAYOUTS`.
        dtype: of parameters that the layout leaves open.
        groups: number of parameter groups; a group more than parameters is left out.
        monitored: whether there is a monitor, where there are pairs.
        options: of the optimizer.
    """

    def __init__(
        self, layout: str, dtype: torch.dtype, groups: int, monitored: bool, **options: Any
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        params = [
            nn.Parameter(torch.randn(shape, dtype=own or dtype, generator=generator))
            for shape, own in LAYOUTS[layout]
        ]
        split = len(params) // 2 if groups > 1 else 0
        parts = [part for part in (params[:split], params[split:]) if part]
        self.hooks = Hooks(monitored and options["history_size"] > 0)
        if options["history_size"] == 0:
            options["curvature"] = "fisher"
        else:
            options["normalize"] = False
        if options["curvature"] == "product":
            options["curvature"] = self.hooks.product
        self.optimizer = AdaQN([{"params": part} for part in parts], **options)
        self.hooks.bind(self.optimizer)
        self.mirror: Mirror | None = None
        # Parameters came or went, or lost their state: the next step rebuilds the state.
        self.unsettled = False
        # One of them held pairs: the next step drops all.
        self.vanished = False
        # Gradients were huge: intermediate results may overflow, in one backend before the other.
        self.wild = False

    def run(self, program: list[tuple[tuple[str, ...], int]]) -> None:
        for (rule, *details), seed in program:
            getattr(self, rule)(*details, random.Random(seed))
            if self.has_diverged():
                return
            self.check_standing()

    def has_diverged(self) -> bool:
        """Undamped, a pair whose y is of small gradients may throw the parameters anywhere.

        So may a huge momentum over a v that has been forgotten.
        """
        common = self.optimizer.param_groups[0]
        undamped = common["history_size"] > 0 and common["damping"] == 0
        params = [real_view(p) for p in parameters(self.optimizer)]
        assert undamped or not any(p.isnan().any() for p in params), "a parameter is no number"
        return (undamped or self.wild) and any(not (p.abs() < 1e6).all() for p in params)

    def check_standing(self) -> None:
        """What holds between any two actions."""
        for p in parameters(self.optimizer):
            assert p.isfinite().all(), "a parameter is not finite"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    # ------------------------------------------------------------------ gradients

    def set_gradients(self, kind: str, r: random.Random) -> list[Tensor | None]:
        """Gradients of ``kind``; kinds other than these few are of one parameter only."""
        params = parameters(self.optimizer)
        generator = torch.Generator().manual_seed(r.randrange(2**31))
        chosen = r.randrange(len(params))
        everywhere = kind in ("normal", "zero", "small", "none", "denormal") or r.random() < 0.3
        for index, p in enumerate(params):
            here = kind if everywhere or index == chosen else "normal"
            p.grad = self._gradient(p, here, generator) if p.requires_grad else None
        return [p.grad for p in params]

    @staticmethod
    def _gradient(p: Tensor, kind: str, generator: torch.Generator) -> Tensor | None:
        if kind in STANDING:
            return None
        noise = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        limits = torch.finfo(p.dtype)
        if kind in POISONED:
            noise.view(-1)[:1] = float(kind)
        elif kind == "normal":
            noise = (
                noise + 0.5 * p.detach().nan_to_num().clamp(-1e3, 1e3)
                if (not p.is_complex())
                else noise + 0.5 * p.detach()
            )
        else:
            astronomical = 1e307 if limits.max > 1e300 else 3e38
            scale = {"zero": 0.0, "small": 1e-6, "denormal": limits.tiny / 16, "huge": 1e20}
            wide = {"largest": 3e38, "astronomical": astronomical}
            noise = scale[kind] * noise if kind in scale else wide[kind] * noise.sgn()
        return noise

    # ------------------------------------------------------------------ steps

    def step(self, kind: str, way: str, r: random.Random) -> None:
        """One step in one of these ways.

        ``alone`` and with a ``closure``: only what the step alone tells is looked at.  ``twin``:
        what was loaded from a state_dict makes the same step to the bit.  ``reference``: so does
        the reference, up to rounding.  ``interrupted``, ``fails``: SIGINT arrives at an operation,
        or it raises.
        """
        grads = self.set_gradients(kind, r)
        if self.unsettled and way not in ("alone", "closure"):
            way = "alone"
        if way not in ("alone", "closure"):
            self.optimizer.state_dict()  # uncounts a first call that changed nothing at lr 0
        before = Snapshot.of(self.optimizer)
        if kind in EXTREME and any(g is not None for g in grads):
            self.wild = True
        if way in ("alone", "closure"):
            raised = self._try_step(way == "closure")
        elif way == "twin":
            raised = self._step_with_twin()
        elif way == "reference":
            raised = self._step_with_reference(before)
        else:
            raised = self._step_disturbed(way, before, r)
        self._judge(before, Snapshot.of(self.optimizer), grads, raised)

    def _try_step(self, with_closure: bool = False) -> BaseException | None:
        """A step; what it raised on our demand."""
        return attempt(self.optimizer, self.hooks.mood, with_closure)

    def _twin(self) -> AdaQN:
        """An equal optimizer, apart from this one."""
        if self.mirror is not None and self.mirror.fits(self.optimizer):
            second = self.mirror.update()
        else:
            self.mirror = Mirror(self.optimizer, self.hooks)
            second = self.mirror.second
        second.test_hooks.mood = self.hooks.mood
        return second

    def _step_with_twin(self) -> BaseException | None:
        twin = self._twin()
        theirs, ours = attempt(twin, self.hooks.mood), self._try_step()
        assert type(theirs) is type(ours), f"resumed: {theirs!r}, original: {ours!r}"
        assert_same(Snapshot.of(self.optimizer), Snapshot.of(twin), "resumed")
        return ours

    def _step_with_reference(self, before: Snapshot) -> BaseException | None:
        twin = self._twin()
        for group in twin.param_groups:
            group["fused"] = False
        theirs, ours = attempt(twin, self.hooks.mood), self._try_step()
        assert type(theirs) is type(ours), f"reference: {theirs!r}, native: {ours!r}"
        if ours is None and comparable(self, before):
            assert_close(before, Snapshot.of(self.optimizer), Snapshot.of(twin))
        return ours

    def _step_disturbed(self, way: str, before: Snapshot, r: random.Random) -> BaseException | None:
        """Old state or new state entirely; what failed halfway refuses to go on."""
        twin = self._twin()
        with disturbed(None, way) as count:
            undisturbed = attempt(twin, self.hooks.mood)
        if count[0] == 0:
            return self._try_step()
        at, raised = r.randrange(count[0]), None
        with disturbed(at, way):
            try:
                self.optimizer.step()
            except (Disturbance, KeyboardInterrupt, TypeError) as error:
                raised = error
        if self.optimizer._halfway:
            by_reference = self.optimizer.param_groups[0]["fused"] is False
            assert way == "fails" and (at > 0 or by_reference)
            self._recover(before)
            return raised
        now = Snapshot.of(self.optimizer)
        if undisturbed is None:
            assert isinstance(raised, Disturbance if way == "fails" else KeyboardInterrupt)
        if way != "fails" and undisturbed is None and now.calls() > before.calls():
            assert_same(now, Snapshot.of(twin), "interrupted, new")
            return None
        assert_unchanged(before, now, way)
        return raised

    def _recover(self, before: Snapshot) -> None:
        """What has failed halfway says so, until a state of before is loaded."""
        for refused in (self.optimizer.step, self.optimizer.state_dict):
            assert "load a state_dict" in str(raised_by(refused, RuntimeError))
        twin_dict = loaded_dict(before, self.optimizer)
        for p, old in zip(parameters(self.optimizer), before.params, strict=True):
            p.data.copy_(old)
        self.optimizer.load_state_dict(twin_dict)

    def _judge(
        self, before: Snapshot, after: Snapshot, grads: list[Tensor | None], raised: Any
    ) -> None:
        """What one step may change."""
        given = [g for g in grads if g is not None]
        if raised is not None or not given:
            what = f"{raised!r}" if raised else "without gradients"
            assert_unchanged(before, after, what, self.vanished)
            return
        fresh, self.unsettled = self.unsettled or before.calls() == 0, False
        vanished, self.vanished = self.vanished, False
        if vanished:
            stored = after.counter(Counter.STORED) - before.counter(Counter.STORED)
            assert after.counter(Counter.PAIRS) <= max(stored, 0), "pairs with what has gone"
        known = set(parameters(self.optimizer))
        assert all(p in known for p in self.optimizer.state), "state of a parameter that has gone"
        moved = after.counter(Counter.ACCEPTED) - before.counter(Counter.ACCEPTED)
        if not all(real_view(g).isfinite().all() for g in given):
            assert_dropped(before, after, fresh)
            return
        if not fresh:
            assert after.calls() == before.calls() + 1
            skipped = (x.counter(Counter.STEPS_SKIPPED) for x in (before, after))
            dropped = len(set(skipped)) > 1
            assert self.wild or not dropped, "a finite gradient was dropped"
            assert moved in (0, 1) and (moved or dropped or not any(g.any() for g in given))
        if after.counter(Counter.RESETS) == before.counter(Counter.RESETS):
            assert_others_stand(before, after, grads)
            if not self.wild and not fresh and moved:
                self._check_textbook(before, after, grads)

    def _check_textbook(self, before: Snapshot, after: Snapshot, grads: list) -> None:
        if not has_textbook(before.options[0]):
            return
        sizes = enumerate(group_sizes(self.optimizer))
        groups = [k for k, size in sizes for _ in range(size)]
        for old, p, w in zip(
            before.params, after.params, textbook_step(before, grads, groups), strict=True
        ):
            p, old = real_view(p), real_view(old).double()
            slack = 100 * epsilon(p, *map(real_view, before.params))
            bound = slack * ((w - old).abs() + old.abs() + w.abs()) + torch.finfo(p.dtype).tiny
            assert ((p.double() - w).abs() <= bound).all(), "not the first-order method's step"

    # ------------------------------------------------------------------ options and hooks

    def option(self, name: str, r: random.Random) -> None:
        value = r.choice(LEGAL[name])
        groups = self.optimizer.param_groups
        own = name in ("lr", "weight_decay") or (name in AVERAGED and r.random() < 0.5)
        for group in [r.choice(groups)] if own else groups:
            group[name] = value

    def illegal(self, r: random.Random) -> None:
        """Whatever no option may be is refused by name, and forgotten when it is set back."""
        name, value = r.choice(ILLEGAL)
        self._refused(name, value, r)

    def structural(self, name: str, r: random.Random) -> None:
        if not any(self.optimizer.state.values()) or self.unsettled:
            return
        one, other = STRUCTURAL[name]
        now = self.optimizer.param_groups[0][name]
        self._refused(name, other if now == one else one, r)

    def _refused(self, name: str, value: Any, r: random.Random) -> None:
        self.set_gradients("normal", r)
        if all(p.grad is None for p in parameters(self.optimizer)):
            return
        before = Snapshot.of(self.optimizer)
        groups = self.optimizer.param_groups
        changed = groups if r.random() < 0.7 else [r.choice(groups)]
        old = [(group, group[name]) for group in changed]
        for group in changed:
            group[name] = value
        error = raised_by(self.optimizer.step, (ValueError, TypeError, RuntimeError))
        assert error is not None and name in str(error), f"{name}={value!r}: {error!r}"
        for group, was in old:
            group[name] = was
        assert_unchanged(before, Snapshot.of(self.optimizer), f"{name}={value!r}")

    def mood(self, mood: str, r: random.Random) -> None:
        self.hooks.mood = mood

    def freeze(self, r: random.Random) -> None:
        """Or unfreeze."""
        p = r.choice(parameters(self.optimizer))
        p.requires_grad_(not p.requires_grad)

    # ------------------------------------------------------------------ parameters

    def _place(self, r: random.Random) -> tuple[list[Tensor], int]:
        params = r.choice(self.optimizer.param_groups)["params"]
        return params, r.randrange(len(params))

    def _new_parameter(self, r: random.Random) -> nn.Parameter:
        dtype = next(
            (p.dtype for p in parameters(self.optimizer) if not p.is_complex()), torch.float32
        )
        shape = r.choice([(2, 3), (3,), ()])
        generator = torch.Generator().manual_seed(r.randrange(99))
        return nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator))

    def replace(self, r: random.Random) -> None:
        params, index = self._place(r)
        self.vanished |= bool(self.optimizer.state.get(params[index]))
        params[index] = self._new_parameter(r)
        self.unsettled = True

    def append(self, r: random.Random) -> None:
        params, _ = self._place(r)
        if len(parameters(self.optimizer)) < 6:
            params.append(self._new_parameter(r))
            self.unsettled = True

    def remove(self, r: random.Random) -> None:
        params, index = self._place(r)
        if len(params) > 1:
            self.vanished |= bool(self.optimizer.state.get(params[index]))
            del params[index]
            self.unsettled = True

    def add_group(self, r: random.Random) -> None:
        """Honoured at once."""
        if len(parameters(self.optimizer)) >= 6:
            return
        group = {"params": [self._new_parameter(r)], "lr": 0.05, "weight_decay": 0.01}
        self.optimizer.add_param_group(group)
        if any(self.optimizer.state.values()):
            known = set(parameters(self.optimizer))
            assert known == set(self.optimizer.state)
            self.unsettled = self.vanished = False

    def bad_group(self, r: random.Random) -> None:
        """Refused entirely."""
        before = Snapshot.of(self.optimizer)
        name, value = r.choice([("max_increase", 1.5), ("lr", -1.0), ("init", "identity")])
        group = {"params": [self._new_parameter(r)], name: value}
        assert name in str(raised_by(lambda: self.optimizer.add_param_group(group), ValueError))
        assert_same(before, Snapshot.of(self.optimizer), "bad group")

    def storage(self, r: random.Random) -> None:
        """Other memory, or another order in it, same values."""
        params, index = self._place(r)
        p = params[index]
        turned = p.dim() == 2 and r.random() < 0.5
        p.data = (
            p.data.t().clone(memory_format=torch.contiguous_format).t()
            if turned
            else (p.data.clone())
        )

    def shape(self, r: random.Random) -> None:
        """Another shape of equal size is refused, if there is state of the old one."""
        params, index = self._place(r)
        p = params[index]
        old = p.data
        p.data = old.reshape(old.shape[::-1] if old.dim() > 1 else (*old.shape, 1))
        self._refused_or_honoured(lambda: setattr(p, "data", old), "state_dict", r)

    def expanded(self, r: random.Random) -> None:
        """Memory that several elements share cannot be written to."""
        params, index = self._place(r)
        p = params[index]
        if p.numel() < 2:
            return
        old = p.data
        p.data = old.reshape(-1)[:1].clone().expand(old.numel()).view(old.shape)
        self._refused_or_honoured(lambda: setattr(p, "data", old), "clone", r, honoured=False)

    def _refused_or_honoured(self, undo, remedy: str, r: random.Random, honoured=True) -> None:
        """A step after a change goes, or an error names the ``remedy`` and nothing has changed."""
        before = Snapshot.of(self.optimizer)
        self.set_gradients("normal", r)
        if all(p.grad is None for p in parameters(self.optimizer)) or self.hooks.mood != "fine":
            undo()
            self._drop_gradients()
            return
        error = raised_by(self.optimizer.step, (ValueError, RuntimeError))
        if error is not None:
            assert remedy in str(error), f"{error!r}"
            assert_unchanged(before, Snapshot.of(self.optimizer), repr(error))
            undo()
        else:
            assert honoured
            self.unsettled = self.vanished = False
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for p in parameters(self.optimizer):
            p.grad = None

    # ------------------------------------------------------------------ state

    def _entry(self, r: random.Random) -> tuple[int, dict[str, Tensor], str] | None:
        """A parameter's number, its state, and a name in there."""
        entries = enumerate(map(self.optimizer.state.get, parameters(self.optimizer)))
        entries = [(index, entry) for index, entry in entries if entry]
        if not entries:
            return None
        index, entry = r.choice(entries)
        return index, entry, r.choice(sorted(entry))

    def clone_entry(self, r: random.Random) -> None:
        """state[p][name] = equal tensor."""
        place = self._entry(r)
        if place is not None:
            _, entry, name = place
            entry[name] = entry[name].clone()

    def clone_data(self, r: random.Random) -> None:
        """state[p][name].data = equal tensor."""
        place = self._entry(r)
        if place is not None:
            _, entry, name = place
            entry[name].data = entry[name].data.clone()

    def zero_entry(self, r: random.Random) -> None:
        """Another value, written into the state or put into its place: the same step follows."""
        place = self._entry(r)
        if place is None or self.unsettled:
            return
        index, _, name = place
        if name in SHARED or "basis" in name:
            return
        twin = self._twin()
        twin.state[parameters(twin)[index]][name].zero_()
        entry = self.optimizer.state[parameters(self.optimizer)[index]]  # a save may renew it
        entry[name] = torch.zeros_like(entry[name])
        self.set_gradients("normal", r)
        for p, q in zip(parameters(self.optimizer), parameters(twin), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        theirs, ours = attempt(twin, self.hooks.mood), self._try_step()
        assert type(theirs) is type(ours)
        self.wild = True  # pairs no longer fit their products
        if ours is None and any(p.grad is not None for p in parameters(self.optimizer)):
            assert_same(Snapshot.of(self.optimizer), Snapshot.of(twin), f"{name} replaced")

    def peek(self, r: random.Random) -> None:
        """Reading an entry that is not there makes an empty one: torch's state is a defaultdict."""
        assert isinstance(self.optimizer.state[r.choice(parameters(self.optimizer))], dict)

    def look(self, r: random.Random) -> None:
        """Users look at any time."""
        assert self.optimizer.stats()["state_bytes"] > 0
        assert "State: " in repr(self.optimizer)

    def forget_state(self, r: random.Random) -> None:
        self.optimizer.state = defaultdict(dict)
        self.unsettled = True

    def forget_entry(self, r: random.Random) -> None:
        if self.optimizer.state.pop(r.choice(parameters(self.optimizer)), None):
            self.unsettled = self.vanished = True

    # ------------------------------------------------------------------ checkpoints and copies

    def resume(self, how: str, r: random.Random) -> None:
        """Go on with a copy, after a step in which both did the same."""
        if self.unsettled and how != "deepcopy":
            return
        other = self._copied(how)
        if not self.unsettled:
            assert_same(Snapshot.of(self.optimizer), Snapshot.of(other), how)
        self.set_gradients("normal", r)
        for p, q in zip(parameters(self.optimizer), parameters(other), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        given = any(p.grad is not None for p in parameters(self.optimizer))
        theirs, ours = attempt(other, self.hooks.mood), self._try_step()
        assert type(theirs) is type(ours), f"{how}: {theirs!r}, original: {ours!r}"
        if given and ours is None:
            self.unsettled = self.vanished = False
        if not self.unsettled:
            assert_same(Snapshot.of(self.optimizer), Snapshot.of(other), f"{how}, a step later")
        self.optimizer, self.mirror = other, None
        self.hooks.bind(other)

    def _copied(self, how: str) -> AdaQN:
        if how == "load":
            return loaded(self.optimizer, self.hooks)
        if how == "save":
            file = io.BytesIO()
            torch.save(self.optimizer.state_dict(), file)
            file.seek(0)
            return loaded(self.optimizer, self.hooks, torch.load(file, weights_only=True))
        other = (
            copy.deepcopy(self.optimizer) if how == "deepcopy"
            else pickle.loads(pickle.dumps(self.optimizer))
        )  # fmt: skip
        hooks_of(other, self.hooks)
        return other


# --------------------------------------------------------------------------- verdicts


def raised_by(function, kinds) -> BaseException | None:
    try:
        function()
    except kinds as error:
        return error
    return None


def attempt(optimizer: AdaQN, mood: str, with_closure: bool = False) -> BaseException | None:
    """A step; the error that functions of the user's in this mood raise."""
    expected = {
        "raises": Disturbance,
        "interrupted": KeyboardInterrupt,
        "bad type": TypeError,
    }.get(mood, ())

    def closure():
        assert torch.is_grad_enabled()
        return 7.0

    try:
        result = optimizer.step(closure) if with_closure else optimizer.step()
    except expected as error:
        return error
    assert result == (7.0 if with_closure else None)
    return None


def loaded_dict(before: Snapshot, optimizer: AdaQN) -> dict[str, Any]:
    """A state_dict of a snapshot."""
    groups, start = [], 0
    for options, group in zip(before.options, optimizer.param_groups, strict=True):
        end = start + len(group["params"])
        groups.append({**options, "params": list(range(start, end))})
        start = end
    state = {index: entry for index, entry in enumerate(before.entries) if entry}
    return {"state": state, "param_groups": groups}


def assert_unchanged(before: Snapshot, after: Snapshot, what: str, vanished: bool = False) -> None:
    """Not a bit has changed; but zeros may have been allocated, and for new parameters too.

    Where a parameter has ``vanished``, its pairs may have been dropped.
    """
    assert_same_parameters(before, after, what)
    pairs = zip(before.entries, after.entries, strict=True)
    if not vanished and all(bool(x) == bool(y) for x, y in pairs):
        assert_same(before, after, what)
    else:
        assert after.calls() == before.calls(), what
        for word in (Counter.ACCEPTED, Counter.STEPS_SKIPPED, Counter.STORED):
            assert after.counter(word) == before.counter(word), what


def assert_dropped(before: Snapshot, after: Snapshot, fresh: bool) -> None:
    """A step with a gradient that is not finite changes two counts."""
    assert_same_parameters(before, after, "dropped")
    if fresh:
        return
    assert_same(before, after, "dropped", but=("calls", "counters"))
    expected = before.entries[0]["counters"].clone()
    expected[Counter.STEPS_SKIPPED] += 1
    assert torch.equal(after.entries[0]["counters"], expected), "dropped: counters"
    assert after.calls() == before.calls() + 1


#: State of a parameter that moves with the average of iterates, or with pairs, and not with it.
OF_PAIRS = ("iterate_sum", "anchor", "gradient_sum", "anchor_gradient", "s_ring", "y_ring")


def assert_others_stand(before: Snapshot, after: Snapshot, grads: list[Tensor | None]) -> None:
    """Parameters without a gradient, their averages and their factors keep every bit.

    But where the dtype of the state is another, because a parameter came or went.
    """
    moving = {*OF_PAIRS, "fisher", *SHARED}
    for index, g in enumerate(grads):
        if g is not None:
            continue
        assert bits_equal(before.params[index], after.params[index]), f"{index} moved alone"
        x, y = before.entries[index], after.entries[index]
        for name in (x.keys() & y.keys()) - moving:
            same_dtype = x[name].dtype == y[name].dtype
            assert not same_dtype or bits_equal(x[name], y[name]), (
                f"{name!r} of {index} moved alone"
            )


def comparable(machine: Machine, before: Snapshot) -> bool:
    """Whether both backends must come to nearly the same.

    The eigenbases of factors that lack rank depend on rounding without bound; they come out of the
    same code, so they are the same as long as the gradient that enters them is, to the bit.  It is
    unless it was clipped or found an outlier, where the factor is rounded.
    """
    grads = [real_view(p.grad) for p in parameters(machine.optimizer) if p.grad is not None]
    if machine.wild or not all(g.isfinite().all() for g in grads):
        return False
    if before.options[0]["init"] != "kronecker":
        return True
    size = sum(float(g.double().square().sum()) for g in grads) ** 0.5
    return size < 0.99 * before.options[0]["max_grad_norm"]


def assert_close(before: Snapshot, ours: Snapshot, theirs: Snapshot) -> None:
    """Two steps from ``before`` agree, relative to their length and to the parameters."""
    rings = before.options[0]["history_dtype"] or before.options[0]["fisher_dtype"]
    words = [word for word in Counter if word is not Counter.OLDEST_PAIR]
    double = all(real_view(p).dtype == torch.float64 for p in before.params)
    flat = [
        torch.cat([real_view(p).double().reshape(-1) for p in x.params])
        for x in (before, ours, theirs)
    ]
    length = (flat[2] - flat[0]).norm()
    rounding = epsilon(*map(real_view, before.params)) * 4 * flat[0].norm()
    relative = 1e-7 if double else 2e-2
    error = (flat[1] - flat[2]).norm()
    assert error <= relative * length + rounding, (
        f"native and reference: {error:.2e} apart after a step of {length:.2e}"
    )
    if double and not rings:
        for word in words:
            assert ours.counter(word) == theirs.counter(word), f"native and reference: {word!r}"
