"""Flat vectors of many parameters take as many operations as those of few."""

import pytest
import torch
from recording import Recording

from adaqn_cuda import AdaQN, reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KINDS = {"float32": (F32,), "bfloat16": (BF16,), "mixed": (BF16, F32, F16)}


def tensors(count: int, kinds: tuple[torch.dtype, ...]) -> list[torch.Tensor]:
    shapes = [(3, 4), (5,), (), (0, 2), (2, 1, 2)]
    return [torch.randn(shapes[i % 5]).to(kinds[i % len(kinds)]) for i in range(count)]


def operations(function, *arguments) -> int:
    with Recording() as recording:
        function(*arguments)
    return len(recording.calls)


def without_some(grads: list[torch.Tensor]) -> list[torch.Tensor | None]:
    return [None if i % 4 == 1 else g for i, g in enumerate(grads)]


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_flat_vectors_hold_what_the_tensors_do(kinds, dtype):
    params, grads = tensors(17, kinds), without_some(tensors(17, kinds))
    flat = torch.cat([p.to(dtype).reshape(-1) for p in params])
    assert torch.equal(reference.flatten(params, dtype), flat)

    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    g = reference.gradient_vector(params, grads, dtype, None, False)
    assert g.dtype == dtype
    assert torch.equal(g, torch.cat([x.to(dtype).reshape(-1) for x in filled]))
    here = reference.presence(params, grads)
    assert torch.equal(
        here,
        torch.cat(
            [torch.full((p.numel(),), g is not None) for p, g in zip(params, grads, strict=True)]
        ),
    )

    reference.write_back(params, flat + 1)
    expected = (flat + 1).split([p.numel() for p in params])
    for p, piece in zip(params, expected, strict=True):
        assert torch.equal(p, piece.view(p.shape).to(p.dtype))


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_operations_do_not_grow_with_the_number_of_tensors(kinds):
    def count(n: int) -> list[int]:
        params, grads = tensors(n, kinds), without_some(tensors(n, kinds))
        flat = reference.flatten(params, F32)
        return [
            operations(reference.flatten, params, F32),
            operations(reference.gradient_vector, params, grads, F32, None, True),
            operations(reference.presence, params, grads),
            operations(reference.write_back, params, flat),
        ]

    assert count(8) == count(60)


@pytest.mark.parametrize("curvature", ["fisher", "gradients"])
def test_a_step_takes_as_many_operations_for_many_parameters(curvature):
    def count(n: int) -> int:
        params = [torch.nn.Parameter(torch.randn(4, 3, dtype=BF16)) for _ in range(n)]
        optimizer = AdaQN(params, lr=0.1, init="rmsprop", curvature=curvature, update_interval=2)

        with Recording() as recording:
            for _ in range(6):
                for p in params:
                    p.grad = torch.ones(4, 3, dtype=BF16)
                optimizer.step()
        return len(recording.calls) - 6 * n

    assert count(5) == count(40)
