"""The flat state: one buffer per kind, and each parameter's views of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Size, Tensor

from ..distributed.sharding import Shards, local, whole
from ..watch import check_numbers
from .layout import Counter, Loss, pair_slots, projections_size, state_dtype
from .plan import Plan

#: Buffers with one entry per scalar parameter; the rings have one row of them per slot.
VECTORS = (
    "accumulator", "momentum", "iterate_sum", "anchor", "gradient_sum", "anchor_gradient",
)  # fmt: skip
RINGS = ("s_ring", "y_ring", "fisher")
#: Buffers of Kronecker factors, of which a parameter has a part of another size.
FACTORED = ("factors", "bases")
#: What to do about a state that does not fit.
OTHER_PARAMETERS = (
    "load a state_dict saved by AdaQN for parameters of the same shapes in the same order"
)
OTHER_FACTORS = (
    "init, block_size, max_vector_dim or blocks were others when the state was made, or an older "
    "version made it: set them back, or begin with a new optimizer"
)
#: Rows of rings begin at multiples of so many bytes, which the CUDA kernels take at a time.
ROW_BYTES = 16
#: Buffers that belong to the optimizer as a whole.  Checkpoints hold these and views of the above.
SHARED = ("gram", "moments", "losses", "counters", "calls", "square")
#: Those that state may lack which is continued: momentum was zero, and has been raised since, or
#: the first parameter with factors has joined.  They begin at zero.
LATER = ("momentum", "square")


def real_view(tensor: Tensor) -> Tensor:
    """Complex tensors as real ones with a trailing dimension of 2; real tensors as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def real_shape(param: Tensor) -> Size:
    """The shape of a parameter, in all processes together, as :func:`real_view` sees its rows."""
    return Size((*(param.shape or (1,)), 2)) if param.is_complex() else param.shape


def own_part(param: Tensor, shards: Shards | None) -> Tensor:
    """What this process steps of a parameter, real and detached."""
    param = param.detach()
    return real_view(param if shards is None else shards.own(param))


def row_stride(columns: int, dtype: torch.dtype) -> int:
    """Elements from one row of a ring to the next."""
    step = ROW_BYTES // dtype.itemsize
    return -(-columns // step) * step


def ring(rows: int, columns: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Zeros of shape (rows, columns); nobody reads what lies between the rows."""
    stride = row_stride(columns, dtype)
    return torch.zeros(rows, stride, dtype=dtype, device=device)[:, :columns]


@dataclass(frozen=True)
class Sizes:
    """What determines the shape and dtype of every buffer.

    Args:
        numel: scalar parameters d, complex ones counted twice.
        dtype: dtype of the vectors.
        history_size: curvature pairs kept; without any, the state of a diagonal method remains.
        fisher_size: rows of the Fisher ring: gradients kept, or 1 for a y that is given.
        init: initial matrix.
        factors: numbers in Kronecker factors; ``None`` for another initial matrix.
        momentum: whether there is momentum.
        gradients: whether gradients are averaged as iterates are.
        in_passes: whether steps are made of passes, pairs or not.
        history_dtype: dtype of the pairs.
        fisher_dtype: dtype of the gradients.
    """

    numel: int
    dtype: torch.dtype
    history_size: int
    fisher_size: int
    init: str
    factors: int | None
    momentum: bool
    gradients: bool
    in_passes: bool
    history_dtype: torch.dtype
    fisher_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        params: Iterable[Tensor],
        options: Mapping[str, Any],
        plan: Plan | None,
        momentum: bool,
        shards: Shards | None = None,
    ) -> Sizes:
        """Sizes for ``params``, the optimizer's common ``options``, and the plan of factors."""
        real = [own_part(p, shards) for p in params]
        dtype = state_dtype(real)
        of_gradients = options["curvature"] == "fisher"
        return cls(
            numel=sum(p.numel() for p in real),
            dtype=dtype,
            history_size=options["history_size"],
            fisher_size=options["fisher_size"] if of_gradients else 1,
            init=options["init"],
            factors=None if plan is None else plan.factors,
            momentum=momentum,
            gradients=options["curvature"] == "gradients" and options["history_size"] > 0,
            in_passes=shards is not None or options["history_size"] > 0 or options["normalize"],
            history_dtype=options["history_dtype"] or dtype,
            fisher_dtype=(options["fisher_dtype"] if of_gradients else None) or dtype,
        )

    def vectors(self) -> list[str]:
        """Names of the buffers of one entry per scalar parameter."""
        pairs = self.history_size > 0
        wanted = {
            "accumulator": self.init != "scalar",
            "momentum": self.momentum,
            "iterate_sum": pairs,
            "anchor": pairs,
            "gradient_sum": self.gradients,
            "anchor_gradient": self.gradients,
            "direction": self.in_passes,
        }
        return [name for name, present in wanted.items() if present]

    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every buffer."""
        d, slots = self.numel, pair_slots(self.history_size)
        rows = self.fisher_size if slots else 0
        matrix = {} if self.factors is None else {
            "factors": ((self.factors,), self.dtype),
            "bases": ((self.factors,), self.dtype),
            "square": ((1,), torch.float64),
        }  # fmt: skip
        return {
            **{name: ((d,), self.dtype) for name in self.vectors()},
            **matrix,
            "s_ring": ((slots, d), self.history_dtype),
            "y_ring": ((slots, d), self.history_dtype),
            "fisher": ((rows, d), self.fisher_dtype),
            "gram": ((slots + 1, slots), torch.float64),
            "moments": ((slots,), torch.float64),
            "losses": ((len(Loss),), torch.float64),
            "counters": ((len(Counter),), torch.int64),
            "projections": ((projections_size(self.history_size),), torch.float64),
            "images": ((slots + 1,), torch.float64),
            "weights": ((rows + 1,), torch.float64),
            "column": ((slots + 2,), torch.float64),
        }

    def bytes(self) -> int:
        """Device memory that these buffers take."""
        buffers = self.allocate(torch.device("meta"))
        return sum(buffer.untyped_storage().nbytes() for buffer in buffers)

    def allocate(self, device: torch.device) -> list[Tensor]:
        """The buffers, zero, in the order of :meth:`buffers`."""
        return [
            ring(shape[0], shape[1], dtype, device)
            if name in RINGS
            else torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in self.buffers().items()
        ]


Part = TypeVar("Part")


def held(part: Part | None) -> Part:
    """What the method at hand has: with pairs there are averages, say."""
    assert part is not None
    return part


class Buffers:
    """The buffers of :meth:`Sizes.buffers`, by name, and the table of a plan of factors."""

    accumulator: Tensor | None = None
    momentum: Tensor | None = None
    iterate_sum: Tensor | None = None
    anchor: Tensor | None = None
    gradient_sum: Tensor | None = None
    anchor_gradient: Tensor | None = None
    direction: Tensor | None = None
    s_ring: Tensor
    y_ring: Tensor
    fisher: Tensor
    gram: Tensor
    moments: Tensor
    losses: Tensor
    counters: Tensor
    projections: Tensor
    images: Tensor
    weights: Tensor
    column: Tensor
    factors: Tensor | None = None
    bases: Tensor | None = None
    square: Tensor | None = None
    table: Tensor | None = None

    def __init__(self, dtype: torch.dtype, names: Iterable[str], tensors: Iterable[Tensor]) -> None:
        self.dtype = dtype
        for name, tensor in zip(names, tensors, strict=True):
            setattr(self, name, tensor)


class Arena(Buffers):
    """Buffers for ``params``, laid out one parameter after the other.

    ``calls`` is the number of counted calls of ``step()``, as a 0-d int64 tensor on the CPU.
    """

    def __init__(
        self, params: list[Tensor], sizes: Sizes, plan: Plan | None, shards: Shards | None = None
    ) -> None:
        self.sizes = sizes
        self.shards = shards
        self.plan = plan
        self.params = params
        self.device = params[0].device
        self.names = tuple(sizes.buffers())
        super().__init__(sizes.dtype, self.names, sizes.allocate(self.device))
        if plan is not None:
            self.table = plan.table
            plan.fill_identities(held(self.bases))
        self.losses.fill_(torch.nan)
        self.calls = torch.zeros((), dtype=torch.int64, device="cpu")

    def tensors(self) -> list[Tensor]:
        """All buffers, in the order of ``names``."""
        return [getattr(self, name) for name in self.names]

    def over(self, tensors: list[Tensor]) -> Buffers:
        """The same structure over other tensors, given in the order of :meth:`tensors`."""
        buffers = Buffers(self.dtype, self.names, tensors)
        buffers.table = self.table
        return buffers

    def views(self) -> list[dict[str, Tensor]]:
        """Per parameter, its part of every persistent buffer, shaped like the parameter.

        Where this process has but a part of the parameters, these are DTensors, divided likewise.
        Rings have a leading dimension over the slots, complex parameters a trailing one of size 2.
        Kronecker factors and their bases are one square after the other, in a row.  The shared
        words are the same tensors for all parameters.
        """
        shared = {name: getattr(self, name) for name in SHARED if getattr(self, name) is not None}
        entries, start = self._factors_of_each(), 0
        for entry, p in zip(entries, self.params, strict=True):
            shape = own_part(p, self.shards).shape
            end = start + shape.numel()
            for name in self._kinds():
                buffer = getattr(self, name)
                part = buffer[..., start:end].view((*buffer.shape[:-1], *shape))
                entry[name] = self._whole(part, p.shape[0] if p.dim() else 1, buffer.dim() - 1)
            entry.update(shared)
            start = end
        return entries

    def _factors_of_each(self) -> list[dict[str, Tensor]]:
        """Per parameter, its factors and their bases, if it has any."""
        if self.plan is None:
            return [{} for _ in self.params]
        return [
            {}
            if span.start == span.stop
            else {k: self._whole_factors(getattr(self, k)[span]) for k in FACTORED}
            for span in self.plan.spans
        ]

    def _own_part(self, tensor: Tensor, dim: int) -> Tensor:
        """What belongs here of a tensor that is divided along ``dim``, if any are."""
        if self.shards is not None:
            return self.shards.part(tensor, dim)
        return whole(tensor)

    def _whole_factors(self, part: Tensor) -> Tensor:
        """Those of all shards, one shard after the other."""
        return part if self.shards is None else self._whole(part, len(part) * self.shards.count, 0)

    def _whole(self, part: Tensor, rows: int, dim: int) -> Tensor:
        """The tensor of which this process has ``part``; see :meth:`Shards.of_all`."""
        return part if self.shards is None else self.shards.of_all(part, rows, dim)

    def _kinds(self) -> list[str]:
        """Buffers that have a part for each parameter, and any rows at all."""
        filled = [name for name in RINGS if len(getattr(self, name))]
        return [name for name in VECTORS if getattr(self, name) is not None] + filled

    def adopt(self, entries: list[dict[str, Tensor]]) -> None:
        """Copy per-parameter parts, as :meth:`views` gives them, into the buffers.

        A parameter whose entry is empty joins as if it had stood still so far: its pairs and
        gradients are zero, its average and anchor are where it is.  What its gradients were there
        is unknown, so averages of gradients begin anew.  Call :meth:`check` first.
        """
        views, start = self.views(), 0
        joining = any(not entry for entry in entries)
        first = next(entry for entry in entries if entry)
        for name in views[0].keys() & first.keys() & set(SHARED):
            views[0][name].copy_(first[name])
        if self.momentum is not None and not any("momentum" in entry for entry in entries):
            self.moments.zero_()
        for p, mine, theirs in zip(self.params, views, entries, strict=True):
            own = own_part(p, self.shards)
            end = start + own.numel()
            for name in mine.keys() - set(SHARED) if theirs else ():
                if name in theirs:
                    dim = 1 if name in RINGS else 0
                    local(mine[name]).copy_(self._own_part(theirs[name], dim))
            if not theirs and self.anchor is not None:
                w = own.reshape(-1).to(self.sizes.dtype)
                self.anchor[start:end] = w
                held(self.iterate_sum)[start:end] = w * self.counters[Counter.ITERATES]
            start = end
        if joining and self.gradient_sum is not None:
            self.forget_interval()

    def check(self, entries: list[dict[str, Tensor]], complete: bool) -> None:
        """Raise ``ValueError`` unless :meth:`adopt` will succeed, and, if asked to, be complete."""
        for index, (mine, theirs) in enumerate(zip(self.views(), entries, strict=True)):
            for name, tensor in mine.items() if theirs or complete else ():
                found = theirs.get(name)
                if name in LATER and found is None:
                    continue
                if not isinstance(found, Tensor) or found.shape != tensor.shape:
                    shape = tuple(found.shape) if isinstance(found, Tensor) else found
                    remedy = OTHER_FACTORS if name in FACTORED else OTHER_PARAMETERS
                    raise ValueError(
                        f"state of parameter {index}: expected {name!r} of shape "
                        f"{tuple(tensor.shape)}, got {shape}; {remedy}"
                    )
                check_numbers(name, found, tensor)
            if "factors" in theirs and "factors" not in mine:
                raise ValueError(
                    f"state of parameter {index}: expected no 'factors', got some; {OTHER_FACTORS}"
                )
        self._check_counters(next(entry for entry in entries if entry)["counters"])

    def _check_counters(self, words: Tensor) -> None:
        """Ring positions outside the rings would be read and written by the kernels."""
        last = max(pair_slots(self.sizes.history_size) - 1, 0)
        rows = max(len(self.fisher), 1)
        limits = {
            Counter.PAIRS: last,
            Counter.OLDEST_PAIR: last,
            Counter.GRADIENTS: rows,
            Counter.NEXT_GRADIENT: rows - 1,
        }
        values = words.tolist()
        for word, most in limits.items():
            if not 0 <= values[word] <= most:
                raise ValueError(
                    f"state: expected 'counters' whose {word.name} is in "
                    f"0..{most}, got {values[word]}; the state_dict was saved with another "
                    "history_size or fisher_size, or is damaged"
                )

    def forget_pairs(self) -> None:
        """Drop the pairs: their products were with a parameter that is gone."""
        self.counters[Counter.PAIRS] = self.counters[Counter.OLDEST_PAIR] = 0

    def forget_interval(self) -> None:
        """Start anew with averages: the next pair update sets the anchor, as the first one did."""
        held(self.iterate_sum).zero_()
        held(self.gradient_sum).zero_()
        self.counters[Counter.ITERATES] = self.counters[Counter.ANCHORED] = 0
