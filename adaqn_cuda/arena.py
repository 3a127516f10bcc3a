"""The flat state: one contiguous buffer per kind, and each parameter's views of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .layout import Counter, Loss, pair_slots, projections_size, state_dtype

#: Buffers with one entry per scalar parameter; the rings have one row of them per slot.
VECTORS = ("accumulator", "iterate_sum", "anchor")
RINGS = ("s_ring", "y_ring", "fisher")
#: Buffers that belong to the optimizer as a whole.  Checkpoints hold these and views of the above.
SHARED = ("gram", "losses", "counters", "calls")


def real_view(tensor: Tensor) -> Tensor:
    """Complex tensors as real ones with a trailing dimension of 2; real tensors as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@dataclass(frozen=True)
class Sizes:
    """What determines the shape and dtype of every buffer.

    Args:
        numel: scalar parameters d, complex ones counted twice.
        dtype: dtype of the vectors.
        history_size: curvature pairs kept.
        fisher_size: gradients kept.
        diagonal: whether the initial matrix needs an accumulator.
        history_dtype: dtype of the pairs.
        fisher_dtype: dtype of the gradients.
    """

    numel: int
    dtype: torch.dtype
    history_size: int
    fisher_size: int
    diagonal: bool
    history_dtype: torch.dtype
    fisher_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        params: Iterable[Tensor],
        *,
        history_size: int,
        fisher_size: int,
        diagonal: bool,
        history_dtype: torch.dtype | None = None,
        fisher_dtype: torch.dtype | None = None,
    ) -> Sizes:
        """Sizes for ``params``; a dtype of ``None`` is that of the vectors."""
        real = [real_view(p.detach()) for p in params]
        dtype = state_dtype(real)
        return cls(
            sum(p.numel() for p in real),
            dtype,
            history_size,
            fisher_size,
            diagonal,
            history_dtype or dtype,
            fisher_dtype or dtype,
        )

    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every buffer."""
        d, slots = self.numel, pair_slots(self.history_size)
        shapes = {
            "accumulator": ((d,), self.dtype),
            "iterate_sum": ((d,), self.dtype),
            "anchor": ((d,), self.dtype),
            "direction": ((d,), self.dtype),
            "s_ring": ((slots, d), self.history_dtype),
            "y_ring": ((slots, d), self.history_dtype),
            "fisher": ((self.fisher_size, d), self.fisher_dtype),
            "gram": ((slots + 1, slots), torch.float64),
            "losses": ((len(Loss),), torch.float64),
            "counters": ((len(Counter),), torch.int64),
            "projections": ((projections_size(self.history_size),), torch.float64),
            "images": ((slots,), torch.float64),
            "weights": ((self.fisher_size,), torch.float64),
            "column": ((slots + 1,), torch.float64),
        }
        if not self.diagonal:
            del shapes["accumulator"]
        return shapes

    def bytes(self) -> int:
        """Device memory that the buffers take."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.buffers().values())


class Buffers:
    """The buffers of :meth:`Sizes.buffers`, by name."""

    accumulator: Tensor | None = None
    iterate_sum: Tensor
    anchor: Tensor
    direction: Tensor
    s_ring: Tensor
    y_ring: Tensor
    fisher: Tensor
    gram: Tensor
    losses: Tensor
    counters: Tensor
    projections: Tensor
    images: Tensor
    weights: Tensor
    column: Tensor

    def __init__(self, names: Iterable[str], tensors: Iterable[Tensor]) -> None:
        for name, tensor in zip(names, tensors, strict=True):
            setattr(self, name, tensor)


class Arena(Buffers):
    """Buffers for ``params``, laid out one parameter after the other.

    ``calls`` is the number of counted calls of ``step()``, as a 0-d int64 tensor on the CPU.
    """

    def __init__(self, params: list[Tensor], sizes: Sizes) -> None:
        self.sizes = sizes
        self.params = params
        self.device = params[0].device
        self.names = tuple(sizes.buffers())
        tensors = (torch.zeros(s, dtype=t, device=self.device) for s, t in sizes.buffers().values())
        super().__init__(self.names, tensors)
        self.losses.fill_(torch.nan)
        self.calls = torch.zeros((), dtype=torch.int64)

    def tensors(self) -> list[Tensor]:
        """All buffers, in the order of ``names``."""
        return [getattr(self, name) for name in self.names]

    def views(self) -> list[dict[str, Tensor]]:
        """Per parameter, its part of every persistent buffer, shaped like the parameter.

        Rings have a leading dimension over the slots, complex parameters a trailing one of size 2.
        The shared words are the same tensors for all parameters.
        """
        shared = {name: getattr(self, name) for name in SHARED}
        kinds = [name for name in VECTORS + RINGS if getattr(self, name) is not None]
        entries, start = [], 0
        for p in self.params:
            shape = real_view(p.detach()).shape
            end = start + shape.numel()
            parts = {
                name: buffer[..., start:end].view((*buffer.shape[:-1], *shape))
                for name in kinds
                for buffer in (getattr(self, name),)
            }
            entries.append({**parts, **shared})
            start = end
        return entries

    def load(self, entries: list[dict[str, Tensor]]) -> None:
        """Copy per-parameter views, as :meth:`views` gives them, into the buffers."""
        own = self.views()
        for mine, theirs in zip(own, entries, strict=True):
            for name in VECTORS + RINGS:
                if name in mine:
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

    def grown(self, params: list[Tensor], sizes: Sizes) -> Arena:
        """An arena for ``params``, of which the first are this one's, with its state kept.

        Added parameters join as if they had stood still so far: their pairs and gradients are zero,
        their average and anchor are where they are.
        """
        arena = Arena(params, sizes)
        old = self.sizes.numel
        for name in VECTORS + RINGS:
            source = getattr(self, name)
            if source is not None:
                getattr(arena, name)[..., :old].copy_(source)
        for name in SHARED:
            getattr(arena, name).copy_(getattr(self, name))
        added = [real_view(p.detach()) for p in params[len(self.params) :]]
        w = torch.cat([p.reshape(-1).to(sizes.dtype) for p in added])
        arena.anchor[old:] = w
        arena.iterate_sum[old:] = w * self.counters[Counter.ITERATES]
        return arena
