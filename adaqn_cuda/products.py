"""Curvature of the loss itself: products of a matrix with ``s`` on a mini-batch.

All derivatives are taken in reverse mode, twice, by plain autograd on the model's own parameters:
whatever trains with ``backward()`` has its products, recurrent layers included, for whose kernels
forward mode does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .curvature import Product

Loss = Callable[[Any, Any], Tensor]
Batch = Sequence[Any]
Objective = Callable[[Tensor], Tensor]
Rule = Callable[[Tensor, Objective, list[Tensor], list[Tensor]], list[Tensor]]


def gauss_newton(model: nn.Module, loss: Loss, batch: Batch | Callable[[], Batch]) -> Product:
    r"""Returns a function that multiplies the generalised Gauss-Newton matrix by a vector.

    The product is :math:`y = J^\top H_\ell J s`, where :math:`J` is the Jacobian of the outputs
    with respect to the parameters and :math:`H_\ell` the Hessian of the loss with respect to the
    outputs, both at the parameters' present values. The matrix is positive semidefinite if the
    loss is convex in the outputs, whatever the model, and averages over the batch as the loss
    does.

    A product costs about as much as two gradients on the same batch, four with an LSTM, and holds
    the graph of a backward pass in memory meanwhile.

    The model runs in eval mode and is back in its own afterwards, so dropout is off, batch
    normalisation takes its running statistics, and neither these nor other buffers are written. If
    the model draws random numbers in eval mode too, every call multiplies by another matrix. No
    ``.grad`` is read or written, but hooks that were put on parameters do run: those that change
    gradients change the product.

    cuDNN is off for models with recurrent layers, whose cuDNN kernels cannot be differentiated
    twice; attention takes the math kernel and ``torch.compile`` stands aside, for the same reason.

    Args:
        model (nn.Module): called as ``model(inputs)``; returns the outputs, a floating-point
            tensor, or a tuple or list that begins with them, as recurrent models do.
            ``DistributedDataParallel`` does not average the product over the ranks: give all of
            them the same batch, or average it.
        loss (Callable): ``loss(outputs, targets)`` returns a one-element real tensor, convex in
            the outputs and twice differentiable.
        batch (tuple or Callable): a pair ``(inputs, targets)``, or a function without arguments
            that returns one; it is called once for every product.

    Returns:
        Callable: maps a dict ``{parameter: s}``, with ``s`` of the parameter's shape in any
        floating dtype, to a dict ``{parameter: y}`` of the same shapes and dtypes. Parameters of
        the model that are not in the argument count as constants, :math:`s = 0`; so do those
        that do not require gradients. Neither they nor parameters foreign to the model are in the
        result. Derivatives are taken in the parameters' dtypes.

    Raises:
        TypeError: an argument has the wrong type. The product raises it if ``batch``, the model
            or the loss returns something of the wrong type, or if a parameter is complex.
        ValueError: ``batch`` is not a pair. The product raises it also if the loss has more than
            one element, or if none of the parameters in its argument belongs to the model.

    Example:
        >>> loss_fn = nn.CrossEntropyLoss()
        >>> curvature = gauss_newton(model, loss_fn, lambda: next(batches))
        >>> optimizer = AdaQN(model.parameters(), curvature=curvature)
    """
    return _product(_gauss_newton_times, model, loss, batch)


def hessian(model: nn.Module, loss: Loss, batch: Batch | Callable[[], Batch]) -> Product:
    r"""Returns a function that multiplies the Hessian of the loss by a vector.

    The product is :math:`y = H s` at the parameters' present values. The matrix is symmetric, but
    not positive semidefinite unless the loss is convex in the parameters; where the model is
    linear in them it equals that of :func:`gauss_newton`. A product costs about as much as three
    gradients on the same batch, five or six with an LSTM.

    Everything else is as in :func:`gauss_newton`, except that the loss need not be convex.

    Args:
        model (nn.Module): see :func:`gauss_newton`.
        loss (Callable): ``loss(outputs, targets)`` returns a one-element real tensor, twice
            differentiable.
        batch (tuple or Callable): see :func:`gauss_newton`.

    Returns:
        Callable: maps a dict ``{parameter: s}`` to a dict ``{parameter: y}``, see
        :func:`gauss_newton`.

    Raises:
        TypeError, ValueError: see :func:`gauss_newton`.
    """
    return _product(_hessian_times, model, loss, batch)


def _product(
    rule: Rule, model: nn.Module, loss: Loss, batch: Batch | Callable[[], Batch]
) -> Product:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not callable(loss):
        raise TypeError(
            f"loss: expected a callable (outputs, targets) -> scalar, got {type(loss).__name__}"
        )
    if not callable(batch):
        _pair(batch)

    def product(s: Mapping[Tensor, Tensor]) -> Mapping[Tensor, Tensor]:
        params = _differentiated(model, s)
        if not params:
            return {}
        inputs, targets = _pair(batch() if callable(batch) else batch)
        vectors = [s[p].detach().to(p.dtype) for p in params]
        with _twice_differentiable(model), torch.enable_grad():
            outputs = _outputs(model, inputs)
            images = rule(outputs, partial(_scalar, loss, targets), params, vectors)
        return {p: y.to(s[p].dtype) for p, y in zip(params, images, strict=True)}

    return product


# --------------------------------------------------------------------------- products


def _hessian_times(
    outputs: Tensor, objective: Objective, params: list[Tensor], s: list[Tensor]
) -> list[Tensor]:
    """The derivative of the gradient's product with ``s``."""
    value = objective(outputs)
    gradient = _pull([value], params, [torch.ones_like(value)], create_graph=True)
    return _pull(gradient, params, s)


def _gauss_newton_times(
    outputs: Tensor, objective: Objective, params: list[Tensor], s: list[Tensor]
) -> list[Tensor]:
    """J^T (H_l (J s)), with J s as the transpose of u -> J^T u, which is linear in u."""
    u = torch.zeros_like(outputs, requires_grad=True)
    (js,) = _pull(_pull([outputs], params, [u], create_graph=True), [u], s)
    at = outputs.detach().requires_grad_()
    (hjs,) = _hessian_times(at, objective, [at], [js])
    return _pull([outputs], params, [hjs])


def _pull(
    outputs: list[Tensor], inputs: list[Tensor], vectors: list[Tensor], create_graph: bool = False
) -> list[Tensor]:
    """J^T v for the Jacobian of ``outputs`` by ``inputs``; zero where nothing depends on them."""
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(i, requires_grad=False) for i in inputs]
    reached, seeds = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(
            reached,
            inputs,
            seeds,
            create_graph=create_graph,
            materialize_grads=True,
        )
    )


# --------------------------------------------------------------------------- model, loss and batch


@contextmanager
def _twice_differentiable(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, on kernels whose backward pass can be differentiated again.

    Flags are set one by one, because train() may be overridden, and modules may differ.
    """
    modes = [(module, module.training) for module in model.modules()]
    recurrent = any(isinstance(module, nn.RNNBase) for module, _ in modes)
    cudnn = torch.backends.cudnn.enabled
    try:
        for module, _ in modes:
            module.training = False
        torch.backends.cudnn.enabled = cudnn and not recurrent
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        for module, training in modes:
            module.training = training


def _differentiated(model: nn.Module, s: Mapping[Tensor, Tensor]) -> list[Tensor]:
    """The parameters of the model, each once, that ``s`` moves and that require gradients."""
    params = [p for p in model.parameters() if p in s]
    if s and not params:
        raise ValueError(
            "model: none of the optimizer's parameters belongs to it; pass the model whose "
            "parameters the optimizer was given, not a copy"
        )
    for p in params:
        if p.is_complex():
            raise TypeError(
                f"model: complex parameters are not supported, got shape {tuple(p.shape)}; keep "
                "real and imaginary parts as real parameters"
            )
    return [p for p in params if p.requires_grad]


def _pair(batch: Any) -> Batch:
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            "batch: expected a pair (inputs, targets) or a callable that returns one, got "
            f"{type(batch).__name__}"
        )
    if len(batch) != 2:
        raise ValueError(
            f"batch: expected a pair (inputs, targets), got {len(batch)} entries; several inputs "
            "or targets go into one entry each"
        )
    return batch


def _outputs(model: nn.Module, inputs: Any) -> Tensor:
    """The model's outputs, while copies stand in for its buffers."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs = functional_call(model, buffers, (inputs,))
    if isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise TypeError(
            "model: expected it to return a floating-point tensor or a tuple that begins with "
            f"one, got {_kind(outputs)}; wrap it in a module that returns the outputs only"
        )
    return outputs


def _scalar(loss: Loss, targets: Any, outputs: Tensor) -> Tensor:
    value = loss(outputs, targets)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(
            f"loss: expected it to return a one-element real tensor, got {_kind(value)}; return "
            "the loss itself, not its item()"
        )
    if value.numel() != 1:
        raise ValueError(
            f"loss: expected it to return one element, got shape {tuple(value.shape)}; return "
            "the mean over the batch"
        )
    return value


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
