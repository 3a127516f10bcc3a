"""Parameters of which some elements never get a gradient, and must not move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

#: Parametrizations whose gradient has no zeros but by chance; others may leave out elements.
DENSE: tuple[type[nn.Module], ...] = (
    parametrizations._WeightNorm,
    parametrizations._SpectralNorm,
)


def parametrized_groups(module: nn.Module, *, pruned: bool = True) -> list[dict[str, Any]]:
    """Parameter groups of a module in which parametrized and pruned parameters have a diagonal.

    The Kronecker-factored matrix mixes the elements of a parameter, so it also moves those whose
    gradient is zero. Where these must stay, as the diagonal of what
    :func:`torch.nn.utils.parametrizations.orthogonal` keeps for a matrix that is not square, the
    parameter takes ``init="rmsprop"``, which moves nothing without a gradient. Neither weight decay
    nor pairs of another source than the gradients respect them.

    Args:
        module (nn.Module): what has the parameters, parametrized and pruned already.
        pruned (bool, optional): whether what :mod:`torch.nn.utils.prune` has masked counts. The
            mask is applied in every forward pass, so only what lies behind it would move
            (default: ``True``).

    Returns:
        list of dict: the parameters of ``module``, each once; the second group, if there is one,
        has ``"init": "rmsprop"``. Weight and spectral norms keep their factors.

    Example:
        >>> torch.nn.utils.parametrizations.orthogonal(model.proj)
        >>> optimizer = AdaQN(parametrized_groups(model), lr=0.01)
    """
    apart = {id(p) for p in _parametrized(module)}
    if pruned:
        apart |= {id(p) for p in _pruned(module)}
    plain = [p for p in module.parameters() if id(p) not in apart]
    diagonal = [p for p in module.parameters() if id(p) in apart]
    groups: list[dict[str, Any]] = [{"params": plain}, {"params": diagonal, "init": "rmsprop"}]
    return [group for group in groups if group["params"]]


def _parametrized(module: nn.Module) -> Iterator[Tensor]:
    """Originals of parametrizations that may leave elements out."""
    for owner in module.modules():
        if isinstance(owner, parametrize.ParametrizationList) and not all(
            isinstance(step, DENSE) for step in owner
        ):
            yield from owner.parameters(recurse=False)


def _pruned(module: nn.Module) -> Iterator[Tensor]:
    """Parameters behind a mask of :mod:`torch.nn.utils.prune`."""
    for owner in module.modules():
        for hook in owner._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                yield getattr(owner, f"{hook._tensor_name}_orig")
