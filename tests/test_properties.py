"""Properties of the method (hypothesis): what must hold for every gradient, shape and history."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, two_loop
from problems import flat, plain_adaqn, random_parameters, set_gradients

from adaqn_cuda import AdaQN
from adaqn_cuda.state.layout import Counter

settings.register_profile("adaqn", deadline=None, max_examples=30)
settings.load_profile("adaqn")

shape = st.lists(st.integers(0, 7), max_size=3).map(tuple)
shapes = st.lists(shape, min_size=1, max_size=5)
seeds = st.integers(0, 2**16)
inits = st.sampled_from(["rmsprop", "adagrad", "scalar"])
history_dtypes = st.sampled_from([None, torch.bfloat16])


def trained(params, steps, **options) -> AdaQN:
    """An optimizer after ``steps`` steps, with stores, skips and resets on the way."""
    losses = iter([1.0, 0.5, 0.4, 9.0, 0.3, 0.2, float("nan")] * 100)
    optimizer = plain_adaqn(params, **options)
    if options.pop("monitor", None) is None:
        optimizer.monitor = lambda: next(losses)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return optimizer


def step_together(a, b, ours, theirs, step) -> None:
    """One step of each optimizer, with the same gradients."""
    set_gradients(ours, step)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()
    a.step()
    b.step()


def stored_pairs(optimizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs in memory, oldest first, flat and in float64."""
    entries = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    counters = entries[0]["counters"]
    slots = entries[0]["gram"].shape[1]
    s, y = (
        torch.cat([e[name].reshape(slots, -1) for e in entries], 1).double()
        for name in ("s_ring", "y_ring")
    )
    oldest, count = counters[Counter.OLDEST_PAIR].item(), counters[Counter.PAIRS].item()
    order = [(oldest + i) % slots for i in range(count)]
    return [(s[i], y[i]) for i in order]


def direction(optimizer, params, g: torch.Tensor) -> torch.Tensor:
    """H g for a flat ``g``: what the next step moves against, per unit of lr."""
    optimizer.param_groups[0].update(lr=1.0, update_interval=10**9)
    before = flat(params).clone()
    for p, piece in zip(params, g.split([p.numel() for p in params]), strict=True):
        p.grad = piece.view(p.shape).clone()
        p.data.zero_()
    optimizer.step()
    p = -flat(params)
    for parameter, piece in zip(params, before.split([p.numel() for p in params]), strict=True):
        parameter.data.copy_(piece.view(parameter.shape))
    return p


@given(shapes, seeds, inits, history_dtypes, st.integers(0, 40))
def test_direction_descends(shapes, seed, init, history_dtype, steps):
    """Property 1: g.p > 0 for every non-zero finite g, after any stores, skips and resets."""
    params = random_parameters(shapes, torch.float64, seed)
    optimizer = trained(
        params, steps, init=init, update_interval=3, history_size=4, history_dtype=history_dtype
    )
    d = flat(params).numel()
    g = torch.randn(d, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    if d == 0:
        return
    assert torch.dot(g, direction(optimizer, params, g)) > 0


@given(seeds, st.integers(1, 6), history_dtypes)
def test_direction_is_symmetric_and_matches_two_loop(seed, history_size, history_dtype):
    """Property 1: H is the symmetric L-BFGS matrix of what is stored, also when rounded."""
    params = random_parameters([(3, 4), (5,)], torch.float64, seed)
    optimizer = trained(
        params, 30, init="scalar", update_interval=2, history_size=history_size,
        history_dtype=history_dtype,
    )  # fmt: skip
    pairs = stored_pairs(optimizer)
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 17, generator=generator, dtype=torch.float64)
    gamma = 1.0
    if pairs:
        s, y = pairs[-1]
        gamma = torch.dot(s, y) / torch.dot(y, y)
    ha, hb = (direction(optimizer, params, x) for x in (a, b))
    torch.testing.assert_close(torch.dot(b, ha), torch.dot(a, hb), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ha, two_loop(a, pairs, gamma), rtol=1e-9, atol=1e-9)


@given(seeds, inits, st.integers(1, 5))
def test_newest_pair_satisfies_secant_equation(seed, init, history_size):
    """Property 2: H y_new = s_new."""
    params = random_parameters([(7,), (2, 5)], torch.float64, seed)
    optimizer = trained(params, 16, init=init, update_interval=2, history_size=history_size)
    pairs = stored_pairs(optimizer)
    if not pairs:
        return
    s, y = pairs[-1]
    torch.testing.assert_close(direction(optimizer, params, y), s, rtol=1e-7, atol=1e-9)


@given(shapes, seeds, st.sampled_from(["rmsprop", "adagrad"]))
def test_without_pairs_it_is_the_first_order_method(shapes, seed, init):
    """Property 3: with no pairs the step is RMSprop's or Adagrad's.

    Their eps sits outside the square root, so it is left out of both: the smallest positive one
    here and none there.
    """
    ours = random_parameters(shapes, torch.float64, seed)
    theirs = random_parameters(shapes, torch.float64, seed)
    a = plain_adaqn(ours, lr=0.01, init=init, eps=5e-324, update_interval=10**9)
    if init == "rmsprop":
        b = torch.optim.RMSprop(theirs, lr=0.01, alpha=0.9, eps=0)
    else:
        b = torch.optim.Adagrad(theirs, lr=0.01, eps=0)
    for step in range(8):
        step_together(a, b, ours, theirs, step)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_eps_sits_inside_the_square_root():
    (w,) = random_parameters([(5,)], torch.float64)
    before = w.detach().clone()
    w.grad = torch.full_like(w, 3.0)
    plain_adaqn([w], lr=1.0, init="adagrad", eps=16.0).step()
    torch.testing.assert_close(w.detach(), before - 3.0 / 5.0)


@given(seeds, inits, st.permutations(range(4)))
def test_permuting_parameters_permutes_the_result(seed, init, order):
    """Property 4."""
    options = dict(init=init, update_interval=2, history_size=3)
    shapes = [(3, 2), (), (5,), (1, 4)]
    ours = random_parameters(shapes, torch.float64, seed)
    theirs = random_parameters(shapes, torch.float64, seed)
    a = plain_adaqn(ours, **options)
    b = plain_adaqn([{"params": [theirs[i]]} for i in order], **options)
    for step in range(12):
        step_together(a, b, ours, theirs, step)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@given(seeds, inits, st.integers(0, 20))
def test_splitting_a_tensor_changes_nothing(seed, init, cut):
    """Property 4."""
    options = dict(init=init, update_interval=2, history_size=3)
    (whole,) = random_parameters([(20,)], torch.float64, seed)
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().split([cut, 20 - cut])]
    a, b = plain_adaqn([whole], **options), plain_adaqn(parts, **options)
    for step in range(12):
        set_gradients([whole], step)
        for part, g in zip(parts, whole.grad.split([cut, 20 - cut]), strict=True):
            part.grad = g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(whole.detach(), flat(parts), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("d", [1, 3, 8])
def test_exact_curvature_terminates_on_a_quadratic(d):
    """Property 5: d conjugate exact pairs on top of the identity make H the inverse Hessian.

    The pairs are written into the rings directly, as an exact line search would make them.
    """
    generator = torch.Generator().manual_seed(d)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    hessian = root @ root.T + torch.eye(d, dtype=torch.float64)
    w = torch.nn.Parameter(torch.randn(d, generator=generator, dtype=torch.float64))
    optimizer = plain_adaqn([w], lr=0.0, init="scalar", history_size=d, update_interval=10**9)
    w.grad = torch.ones_like(w)
    optimizer.step()
    conjugate = torch.linalg.eigh(hessian).eigenvectors.T
    state = optimizer.state[w]
    s, y = conjugate, conjugate @ hessian
    state["s_ring"][:d], state["y_ring"][:d] = s, y
    state["gram"][:d, :d], state["gram"][d + 1, :d] = s @ y.T, (y * y).sum(1)
    state["counters"][Counter.PAIRS] = d
    optimizer.param_groups[0]["lr"] = 1.0
    minimum = torch.randn(d, generator=generator, dtype=torch.float64)
    w.grad = hessian @ (w.detach() - minimum)
    optimizer.step()
    torch.testing.assert_close(w.detach(), minimum, rtol=1e-9, atol=1e-9)


@given(shapes, seeds, inits)
@settings(max_examples=10)
def test_repetition_gives_the_same_bits(shapes, seed, init):
    """Property 6."""
    runs = []
    for _ in range(2):
        params = random_parameters(shapes, torch.float32, seed)
        trained(params, 25, init=init, update_interval=3, history_size=4)
        runs.append(flat(params))
    assert torch.equal(*runs)


@given(seeds, inits, st.integers(0, 12), st.sampled_from([torch.inf, -torch.inf, torch.nan]))
def test_non_finite_gradient_leaves_no_trace(seed, init, steps, poison):
    """A dropped step changes two counters and nothing else, also when a pair update is due."""
    params = random_parameters([(3, 3), (4,)], torch.float32, seed)
    optimizer = trained(params, steps, init=init, update_interval=4, history_size=3)
    reference = [p.detach().clone() for p in params]
    kept = ("accumulator", "fisher", "s_ring", "y_ring", "iterate_sum", "anchor")
    before = {
        name: [optimizer.state[p][name].clone() for p in params]
        for name in kept
        if steps and name in optimizer.state[params[0]]
    }
    dropped = optimizer.stats()["steps_skipped"]
    set_gradients(params, steps)
    params[1].grad[2] = poison
    optimizer.step()
    assert optimizer.stats()["steps_skipped"] == dropped + 1
    for p, old in zip(params, reference, strict=True):
        assert torch.equal(p.detach(), old)
    for name, tensors in before.items():
        for p, old in zip(params, tensors, strict=True):
            assert torch.equal(optimizer.state[p][name], old), name


@given(seeds, inits, st.booleans())
def test_dropped_steps_follow_the_textbook_schedule(seed, init, monitored):
    """The schedule counts calls, the average counts iterates."""
    (w,) = random_parameters([(9,)], torch.float64, seed)
    monitor = (lambda x: float((x * x).sum())) if monitored else None
    options = dict(lr=0.05, init=init, update_interval=3, history_size=2, fisher_size=4)
    oracle = Oracle(w.detach(), monitor=monitor, **options)
    optimizer = plain_adaqn([w], monitor=(lambda: (w * w).sum()) if monitored else None, **options)
    generator = torch.Generator().manual_seed(seed)
    for step in range(24):
        set_gradients([w], step)
        if torch.rand((), generator=generator) < 0.4:
            w.grad[0] = torch.nan
        optimizer.step()
        oracle.step(w.grad)
        torch.testing.assert_close(w.detach(), oracle.w, rtol=1e-8, atol=1e-10)
        oracle.w = w.detach().clone()
    stats = optimizer.stats()
    assert stats["steps_skipped"] == oracle.dropped
    assert (stats["stored"], stats["resets"]) == (oracle.stored, oracle.resets)
