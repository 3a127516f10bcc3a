"""The flat state: one buffer per kind, and each parameter's views of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kronecker import Kronecker
from .layout import Counter, Loss, pair_slots, projections_size, state_dtype

#: Buffers with one entry per scalar parameter; the rings have one row of them per slot.
VECTORS = (
    "accumulator", "momentum", "iterate_sum", "anchor", "gradient_sum", "anchor_gradient",
)  # fmt: skip
RINGS = ("s_ring", "y_ring", "fisher")
#: Rows of rings begin at multiples of so many bytes, which the CUDA kernels take at a time.
ROW_BYTES = 16
#: Buffers that belong to the optimizer as a whole.  Checkpoints hold these and views of the above.
SHARED = ("gram", "moments", "losses", "counters", "calls")


def real_view(tensor: Tensor) -> Tensor:
    """Complex tensors as real ones with a trailing dimension of 2; real tensors as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


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
        momentum: whether there is momentum.
        gradients: whether gradients are averaged as iterates are.
        history_dtype: dtype of the pairs.
        fisher_dtype: dtype of the gradients.
    """

    numel: int
    dtype: torch.dtype
    history_size: int
    fisher_size: int
    init: str
    momentum: bool
    gradients: bool
    history_dtype: torch.dtype
    fisher_dtype: torch.dtype

    @classmethod
    def of(cls, params: Iterable[Tensor], options: Mapping[str, Any]) -> Sizes:
        """Sizes for ``params`` and the optimizer's common ``options``."""
        real = [real_view(p.detach()) for p in params]
        dtype = state_dtype(real)
        of_gradients = options["curvature"] == "fisher"
        return cls(
            numel=sum(p.numel() for p in real),
            dtype=dtype,
            history_size=options["history_size"],
            fisher_size=options["fisher_size"] if of_gradients else 1,
            init=options["init"],
            momentum=options["momentum"] > 0,
            gradients=options["curvature"] == "gradients" and options["history_size"] > 0,
            history_dtype=options["history_dtype"] or dtype,
            fisher_dtype=(options["fisher_dtype"] if of_gradients else None) or dtype,
        )

    def vectors(self) -> list[str]:
        """Names of the buffers of one entry per scalar parameter."""
        pairs, kronecker = self.history_size > 0, self.init == "kronecker"
        wanted = {
            "accumulator": self.init in ("adagrad", "rmsprop"),
            "momentum": self.momentum,
            "iterate_sum": pairs,
            "anchor": pairs,
            "gradient_sum": self.gradients,
            "anchor_gradient": self.gradients,
            "direction": pairs or kronecker,
        }
        return [name for name, present in wanted.items() if present]

    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every buffer, those of a Kronecker initial matrix apart."""
        d, slots = self.numel, pair_slots(self.history_size)
        rows = self.fisher_size if slots else 0
        return {
            **{name: ((d,), self.dtype) for name in self.vectors()},
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
            ring(*shape, dtype, device)
            if name in RINGS
            else torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in self.buffers().items()
        ]


class Buffers:
    """The buffers of :meth:`Sizes.buffers`, by name, and those of a Kronecker initial matrix."""

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
    kronecker: Kronecker | None = None

    def __init__(self, names: Iterable[str], tensors: Iterable[Tensor]) -> None:
        for name, tensor in zip(names, tensors, strict=True):
            setattr(self, name, tensor)


class Arena(Buffers):
    """Buffers for ``params``, laid out one parameter after the other.

    ``calls`` is the number of counted calls of ``step()``, as a 0-d int64 tensor on the CPU.
    """

    def __init__(
        self, params: list[Tensor], sizes: Sizes, kronecker: Kronecker | None = None
    ) -> None:
        self.sizes = sizes
        self.params = params
        self.device = params[0].device
        self.names = tuple(sizes.buffers())
        super().__init__(self.names, sizes.allocate(self.device))
        self.kronecker = kronecker
        self.losses.fill_(torch.nan)
        self.calls = torch.zeros((), dtype=torch.int64)

    def tensors(self) -> list[Tensor]:
        """All buffers: in the order of ``names``, then those of the Kronecker initial matrix."""
        own = [getattr(self, name) for name in self.names]
        return own if self.kronecker is None else own + self.kronecker.tensors()

    def over(self, tensors: list[Tensor]) -> Buffers:
        """The same structure over other tensors, given in the order of :meth:`tensors`."""
        count = len(self.names)
        buffers = Buffers(self.names, tensors[:count])
        if self.kronecker is not None:
            buffers.kronecker = self.kronecker.with_tensors(tensors[count:])
        return buffers

    def views(self) -> list[dict[str, Tensor]]:
        """Per parameter, its part of every persistent buffer, shaped like the parameter.

        Rings have a leading dimension over the slots, complex parameters a trailing one of size 2.
        The shared words are the same tensors for all parameters.
        """
        shared = {name: getattr(self, name) for name in SHARED}
        entries, start = self._own_views(), 0
        for entry, p in zip(entries, self.params, strict=True):
            shape = real_view(p.detach()).shape
            end = start + shape.numel()
            for name in self._kinds():
                buffer = getattr(self, name)
                entry[name] = buffer[..., start:end].view((*buffer.shape[:-1], *shape))
            entry.update(shared)
            start = end
        return entries

    def _own_views(self) -> list[dict[str, Tensor]]:
        """Per parameter, what belongs to the Kronecker initial matrix."""
        return [{} for _ in self.params] if self.kronecker is None else self.kronecker.views()

    def _kinds(self) -> list[str]:
        """Buffers that have a part for each parameter, and any rows at all."""
        filled = [name for name in RINGS if len(getattr(self, name))]
        return [name for name in VECTORS if getattr(self, name) is not None] + filled

    def load(self, entries: list[dict[str, Tensor]]) -> None:
        """Copy per-parameter views, as :meth:`views` gives them, into the buffers."""
        own = self.views()
        for mine, theirs in zip(own, entries, strict=True):
            for name in mine.keys() - set(SHARED):
                mine[name].copy_(theirs[name])
        for name in SHARED:
            own[0][name].copy_(entries[0][name])

    def check(self, entries: list[dict[str, Tensor]]) -> None:
        """Raise ``ValueError`` unless :meth:`load` will succeed."""
        for index, (mine, theirs) in enumerate(zip(self.views(), entries, strict=True)):
            for name, tensor in mine.items():
                found = theirs.get(name)
                if not isinstance(found, Tensor) or found.shape != tensor.shape:
                    shape = tuple(found.shape) if isinstance(found, Tensor) else found
                    raise ValueError(
                        f"state of parameter {index}: expected {name!r} of shape "
                        f"{tuple(tensor.shape)}, got {shape}; load a state_dict saved by AdaQN for "
                        "parameters of the same shapes in the same order"
                    )

    def grown(self, arena: Arena) -> Arena:
        """Fill ``arena``, of whose parameters the first are this one's, with this one's state.

        Added parameters join as if they had stood still so far: their pairs and gradients are zero,
        their average and anchor are where they are.  What their gradients were there is unknown, so
        averages of gradients begin anew.
        """
        old = self.sizes.numel
        for mine, theirs in zip(self._own_views(), arena._own_views(), strict=False):
            for name, part in mine.items():
                theirs[name].copy_(part)
        for name in self._kinds():
            getattr(arena, name)[..., :old].copy_(getattr(self, name))
        for name in SHARED:
            getattr(arena, name).copy_(getattr(self, name))
        if self.anchor is not None:
            added = [real_view(p.detach()) for p in arena.params[len(self.params) :]]
            w = torch.cat([p.reshape(-1).to(arena.sizes.dtype) for p in added])
            arena.anchor[old:] = w
            arena.iterate_sum[old:] = w * self.counters[Counter.ITERATES]
        if self.gradient_sum is not None:
            arena.forget_interval()
        return arena

    def forget_interval(self) -> None:
        """Start anew with averages: the next pair update sets the anchor, as the first one did."""
        self.iterate_sum.zero_()
        self.gradient_sum.zero_()
        self.counters[Counter.ITERATES] = self.counters[Counter.ANCHORED] = 0
