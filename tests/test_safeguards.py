"""Momentum, clipping, damping, the cap and bias correction: by the textbook, and one by one."""

from math import inf, nan

import pytest
import torch
from oracle import Oracle
from problems import (
    assert_same,
    both_backends,
    both_dtypes,
    flat,
    plain_adaqn,
    random_parameters,
    set_gradients,
    snapshot,
)
from torch import nn

from adaqn_cuda import AdaQN
from adaqn_cuda.options import DIFFERING
from adaqn_cuda.state.layout import Counter

SHAPES = [(3, 4), (5,), (), (0, 2)]
INITS = ["rmsprop", "adagrad", "scalar"]
PAIRS = dict(lr=0.05, history_size=3, fisher_size=4, update_interval=3, eps=0.3)

#: Each safeguard alone.
SAFEGUARDS = {
    "momentum": dict(momentum=0.8),
    "clipping": dict(max_grad_norm=0.9),
    "damping": dict(damping=0.9),
    "cap": dict(max_direction=1.05),
    "bias correction": dict(bias_correction=True),
}
EVERYTHING = {name: value for one in SAFEGUARDS.values() for name, value in one.items()}
COMBINATIONS = {"none": {}, **SAFEGUARDS, "everything": EVERYTHING}


# --------------------------------------------------------------------------- by the textbook


#: Monitored losses by pair update: resets while the ring fills, and after it has wrapped around.
LOSSES = [1.0, 0.9, 0.8, 7.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, nan, 0.2, 0.1, 0.09]
#: Pair updates whose curvature no pair could have.
SKIPPED = (6, 13)
#: Steps with a gradient that is not finite: a pair update is due at 5, and 27 to 29 are all of an
#: interval.
DROPPED = (4, 5, 27, 28, 29)


def follow_the_textbook(fused, dtype, tolerance, ring_dtype=None, **options):
    """Compares every step, from the same iterate, and every count; returns the oracle."""
    params = random_parameters(SHAPES, dtype)
    options = {**PAIRS, "weight_decay": 0.02, **options}
    optimizer = plain_adaqn(
        params, fused=fused, monitor=lambda: LOSSES[step // 3],
        history_dtype=ring_dtype, fisher_dtype=ring_dtype, **options,
    )  # fmt: skip
    oracle = Oracle(flat(params), monitor=lambda _: LOSSES[step // 3], **options)
    oracle.ring_dtype = ring_dtype or torch.float64
    for step in range(3 * len(LOSSES) + 2):
        oracle.min_curvature = 1e300 if step // 3 in SKIPPED else 0.0
        optimizer.param_groups[0]["min_curvature"] = oracle.min_curvature
        set_gradients(params, step)
        if step in DROPPED:
            params[1].grad[2] = nan
        before = flat(params).double()
        oracle.step(flat([p.grad for p in params]))
        optimizer.step()
        after = flat(params).double()
        assert (after - oracle.w).norm() <= tolerance * (oracle.w - before).norm(), step
        oracle.w = after
    stats = optimizer.stats()
    for word in ("stored", "skipped", "resets"):
        assert stats[word] == getattr(oracle, word), word
    assert (oracle.stored, oracle.skipped, oracle.resets) == (8, 2, 2)
    assert stats["steps_skipped"] == oracle.dropped == len(DROPPED)
    return oracle


@both_backends
@both_dtypes
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_safeguard_follows_the_textbook(name, init, dtype, fused):
    """Over stores, wrap-around, skips, resets and dropped steps."""
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    oracle = follow_the_textbook(fused, dtype, tolerance, init=init, **COMBINATIONS[name])
    for safeguard, count in (
        ("clipping", oracle.clipped), ("damping", oracle.damped), ("cap", oracle.capped),
    ):  # fmt: skip
        assert (count > 0) == (name in (safeguard, "everything")), safeguard


@both_backends
@pytest.mark.parametrize("init", INITS)
def test_safeguards_act_on_what_bfloat16_rings_hold(init, fused):
    follow_the_textbook(fused, torch.float64, 1e-9, torch.bfloat16, init=init, **EVERYTHING)


# --------------------------------------------------------------------------- one by one


def train(optimizer, steps, start=0):
    params = optimizer.param_groups[0]["params"]
    for step in range(start, start + steps):
        set_gradients(params, step)
        optimizer.step()


def twins(dtype, ours, theirs):
    """Two optimizers on equal parameters."""
    return tuple(plain_adaqn(random_parameters(SHAPES, dtype), **o) for o in (ours, theirs))


def both_step(a, b, step):
    """One step of two optimizers, with the gradients of the first."""
    ours, theirs = (o.param_groups[0]["params"] for o in (a, b))
    set_gradients(ours, step)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()
    a.step()
    b.step()


def assert_close(a, b, **tolerances):
    ours, theirs = (o.param_groups[0]["params"] for o in (a, b))
    torch.testing.assert_close(flat(ours), flat(theirs).to(ours[0].dtype), **tolerances)


def column(optimizer, name):
    """A state vector, parameter after parameter, in float64."""
    params = optimizer.param_groups[0]["params"]
    return flat([optimizer.state[p][name] for p in params]).double()


def newest_pair(optimizer):
    entries = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    counters, slots = entries[0]["counters"], len(entries[0]["s_ring"])
    newest = (counters[Counter.OLDEST_PAIR] + counters[Counter.PAIRS] - 1) % slots
    return tuple(flat([e[name][newest] for e in entries]).double() for name in ("s_ring", "y_ring"))


def root(optimizer, init):
    """1 / D of the latest step; the pairs are those of now."""
    if init == "scalar":
        if optimizer.stats()["pairs"] == 0:
            return 1.0
        s, y = newest_pair(optimizer)
        return torch.dot(y, y) / torch.dot(s, y)
    return torch.sqrt(column(optimizer, "accumulator") + PAIRS["eps"])


@both_backends
@both_dtypes
@pytest.mark.parametrize("init", INITS)
def test_direction_is_no_longer_than_the_cap(init, dtype, fused):
    """|p| <= max_direction |D q|, by what the parameters move; with equality where it cuts."""
    params = random_parameters(SHAPES, dtype)
    options = dict(PAIRS, lr=1 / 16, update_interval=1, momentum=0.5, max_direction=1.1)
    optimizer = plain_adaqn(params, init=init, fused=fused, **options)
    ratios = []
    for step in range(30):
        set_gradients(params, step)
        before = flat(params).double()
        if step and init == "scalar":
            scale = root(optimizer, init)  # of the pairs that this step will see
        optimizer.step()
        if init != "scalar":
            scale = root(optimizer, init)
        elif step == 0:
            scale = 1.0
        t = step + 1
        g, m = flat([p.grad for p in params]).double(), column(optimizer, "momentum")
        q = 0.5 * m / (1 - 0.5 ** (t + 1)) + 0.5 * g / (1 - 0.5**t)
        ratios.append(16 * (before - flat(params).double()).norm() / (q / scale).norm())
    ratios = torch.stack(ratios)
    slack = 1e-5 if dtype == torch.float32 else 1e-12
    assert (ratios <= 1.1 * (1 + slack)).all()
    cut = ratios >= 1.1 * (1 - slack)
    assert cut.any()
    assert not cut.all()


@both_backends
@both_dtypes
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("init", INITS)
def test_stored_pairs_are_damped(init, momentum, dtype, fused):
    """s.y >= damping s.B0 s, with equality where the y of the product is below that."""
    options = dict(PAIRS, init=init, momentum=momentum, fused=fused)
    damped, plain = twins(dtype, dict(options, damping=0.9), options)
    ratios, slack = [], 1e-5 if dtype == torch.float32 else 1e-11
    for step in range(36):
        stored, scale = damped.stats()["stored"], 1.0
        if init == "scalar" and stored:
            scale = root(damped, init)
        both_step(damped, plain, step)
        if damped.stats()["stored"] == stored:
            continue
        if init != "scalar":
            scale = root(damped, init)
        s, y = newest_pair(damped)
        ratios.append(torch.dot(s, y) / torch.dot(s, scale * s))
    ratios = torch.stack(ratios)
    assert (ratios >= 0.9 * (1 - slack)).all()
    equal = ratios <= 0.9 * (1 + slack)
    assert equal.any()
    assert not equal.all()


@both_backends
@both_dtypes
@pytest.mark.parametrize("history_size", [0, 3])
def test_clipping_is_that_of_torch(history_size, dtype, fused):
    """As if torch.nn.utils.clip_grad_norm_ had run before the step; it adds 1e-6 to the norm."""
    options = dict(PAIRS, history_size=history_size, momentum=0.5, fused=fused)
    ours, theirs = twins(dtype, dict(options, max_grad_norm=1.1), options)
    clipped = 0
    for step in range(24):
        p, q = (o.param_groups[0]["params"] for o in (ours, theirs))
        set_gradients(p, step)
        set_gradients(q, step)
        given = [x.grad.clone() for x in p]
        clipped += nn.utils.clip_grad_norm_(q, 1.1).item() > 1.1
        ours.step()
        theirs.step()
        assert all(torch.equal(x.grad, g) for x, g in zip(p, given, strict=True))
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert 0 < clipped < 24


@both_backends
@pytest.mark.parametrize("history_size", [0, 3])
@pytest.mark.parametrize("init", INITS)
def test_sign_and_scale_come_before_every_safeguard(init, history_size, fused):
    """Loss scaling by a power of two, and maximizing the negative, change no bit."""
    options = dict(EVERYTHING, **PAIRS, init=init, fused=fused)
    options["history_size"] = history_size
    a, b = twins(torch.float32, options, dict(options, maximize=True))
    b.grad_scale = torch.tensor(1024.0)
    ours, theirs = (o.param_groups[0]["params"] for o in (a, b))
    for step in range(20):
        set_gradients(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = -1024 * p.grad
        a.step()
        b.step()
        assert torch.equal(flat(ours), flat(theirs))


@both_backends
@both_dtypes
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    "never",
    [
        dict(max_grad_norm=1e30), dict(max_direction=1e30), dict(damping=1e-30),
        dict(momentum=1e-30), dict(decay=0.0, bias_correction=True),
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
def test_a_safeguard_that_never_acts_changes_no_bit(never, init, dtype, fused):
    """Off is the limit of what is on."""
    if init == "scalar" and "damping" in never:
        pytest.skip("damped pairs bound the growth of the scalar matrix, too")
    options = dict(PAIRS, init=init, fused=fused, decay=never.get("decay", 0.9))
    a, b = twins(dtype, options, {**options, **never})
    for step in range(24):
        both_step(a, b, step)
    assert a.stats()["stored"] == b.stats()["stored"] > 3
    assert_close(a, b, rtol=0, atol=0)


@both_backends
@both_dtypes
def test_reset_drops_the_momentum(dtype, fused):
    """Like pairs and gradients; v stays, and so do the exponents of the bias corrections."""
    params = random_parameters(SHAPES, dtype)
    optimizer = plain_adaqn(params, fused=fused, **{**EVERYTHING, **PAIRS})
    train(optimizer, 8)
    before = column(optimizer, "momentum")
    assert before.any()
    losses = iter([1e9])
    optimizer.state[params[0]]["losses"].fill_(1.0)
    optimizer.monitor = lambda: next(losses)
    train(optimizer, 1, start=8)
    assert optimizer.stats()["resets"] == 1
    assert not column(optimizer, "momentum").any()
    assert column(optimizer, "accumulator").any()
    assert optimizer.state[params[0]]["counters"][Counter.ACCEPTED] == 9


@both_backends
@both_dtypes
@pytest.mark.parametrize("history_size", [0, 3])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("poison", [nan, inf, -inf, "found_inf"])
def test_dropped_step_leaves_every_bit(poison, init, history_size, dtype, fused):
    """All that changes is the number of calls and of dropped steps."""
    params = random_parameters(SHAPES, dtype)
    options = {**EVERYTHING, **PAIRS, "history_size": history_size}
    optimizer = plain_adaqn(params, init=init, fused=fused, **options)
    train(optimizer, 13)
    expected = snapshot(optimizer)
    words = expected[1][0]  # shared between the parameters' entries, in the copy too
    words["calls"] += 1
    words["counters"][Counter.STEPS_SKIPPED] += 1
    set_gradients(params, 13)
    if poison == "found_inf":
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    else:
        params[1].grad[3] = poison
    optimizer.step()
    assert_same(snapshot(optimizer), expected)


# --------------------------------------------------------------------------- without pairs


@both_backends
@both_dtypes
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("beyond", [{}, EVERYTHING], ids=["plain", "everything"])
def test_no_history_is_a_history_that_never_comes(beyond, init, dtype, fused):
    options = dict(beyond, lr=0.05, init=init, weight_decay=0.02, fused=fused)
    a, b = twins(dtype, dict(options, history_size=0), dict(options, update_interval=10**9))
    for step in range(15):
        both_step(a, b, step)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert_close(a, b, rtol=tolerance, atol=tolerance)


@both_backends
@both_dtypes
@pytest.mark.parametrize(("init", "kept"), [("rmsprop", 1), ("adagrad", 1), ("scalar", 0)])
def test_no_history_takes_the_memory_of_the_first_order_method(init, kept, dtype, fused):
    """v, and m with momentum: what RMSprop and Adam take, and no more than some words beside."""
    for momentum, theirs in ((0.0, torch.optim.RMSprop), (0.9, torch.optim.Adam)):
        params = random_parameters([(1000,), (30, 7)], dtype)
        optimizer = plain_adaqn(
            params, history_size=0, init=init, momentum=momentum, fused=fused, damping=0.2,
            max_direction=1.0,
        )  # fmt: skip
        train(optimizer, 2)
        first_order = theirs(params)
        first_order.step()
        expected = sum(
            tensor.nbytes
            for entry in first_order.state.values()
            for name, tensor in entry.items()
            if name != "step"
        )
        expected -= (1 - kept) * 1210 * dtype.itemsize
        tensors = [t for t in vars(optimizer._arena).values() if isinstance(t, torch.Tensor)]
        assert 0 <= optimizer.stats()["state_bytes"] - expected < 300
        assert 0 <= sum(t.untyped_storage().nbytes() for t in tensors) - expected < 300


@both_backends
@both_dtypes
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        (
            dict(init="rmsprop", decay=0.9),
            lambda params: torch.optim.RMSprop(params, lr=0.01, alpha=0.9, eps=0),
        ),
        (dict(init="adagrad"), lambda params: torch.optim.Adagrad(params, lr=0.01, eps=0)),
        (
            dict(init="rmsprop", decay=0.9, bias_correction=True, momentum=0.8),
            lambda params: torch.optim.NAdam(
                params, lr=0.01, betas=(0.8, 0.9), eps=0, momentum_decay=1e9
            ),
        ),
        (dict(init="scalar"), lambda params: torch.optim.SGD(params, lr=0.01)),
    ],
    ids=["RMSprop", "Adagrad", "NAdam", "SGD"],
)
def test_no_history_is_the_first_order_method(options, theirs, dtype, fused):
    """Their eps sits outside the square root: none there, and one too small to matter here.

    NAdam's momentum has a schedule, which ends at once, and a product of them in float32.
    """
    params = random_parameters(SHAPES, dtype)
    a = plain_adaqn(params, lr=0.01, history_size=0, eps=1e-30, fused=fused, **options)
    b = theirs(random_parameters(SHAPES, dtype))
    for step in range(12):
        both_step(a, b, step)
    rough = dtype == torch.float32 or isinstance(b, torch.optim.NAdam)
    tolerance = 1e-5 if rough else 1e-12
    assert_close(a, b, rtol=tolerance, atol=tolerance)


HOOKS = {
    "monitor": dict(monitor=lambda: 1.0),
    "curvature_closure": dict(curvature_closure=lambda: torch.zeros(())),
    "curvature_product": dict(curvature=lambda s: s),
}


@pytest.mark.parametrize("name", HOOKS)
def test_nothing_is_called_at_pair_updates_that_do_not_come(name):
    """Neither at construction, nor assigned later; the message tells what to change."""
    remedy = f"{name}: .*history_size=0.*raise history_size"
    with pytest.raises(ValueError, match=remedy):
        plain_adaqn(random_parameters([(2,)]), history_size=0, **HOOKS[name])
    params = random_parameters([(2,)])
    optimizer = plain_adaqn(params, history_size=0)
    train(optimizer, 2)
    before = snapshot(optimizer)
    setattr(optimizer, name, lambda *_: torch.zeros(()))
    with pytest.raises(ValueError, match=remedy):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


# --------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *(("momentum", value, ValueError) for value in (1.0, -0.1, nan)),
        *(("damping", value, ValueError) for value in (1.0, -0.1, nan, inf)),
        *(("max_direction", value, ValueError) for value in (0.0, -1.0, nan)),
        *(("max_grad_norm", value, ValueError) for value in (0.0, -1.0, nan)),
        *((name, "a lot", TypeError) for name in ("momentum", "damping", "max_direction")),
        ("max_grad_norm", None, TypeError),
        ("momentum", torch.tensor(0.9), ValueError),
        ("bias_correction", 1, TypeError),
        *((n, 0, ValueError) for n in ("block_size", "max_vector_dim", "fisher_size")),
        ("factor_interval", 0, ValueError),
        *((n, 2.5, TypeError) for n in ("max_vector_dim", "factor_interval", "history_size")),
        ("init", "identity", ValueError),
        ("curvature", "exact", ValueError),
        ("curvature", None, ValueError),
        ("curvature_closure", 3.0, TypeError),
    ],
)
def test_bad_value_is_named(name, value, error):
    with pytest.raises(error, match=f"^{name}: expected "):
        AdaQN(random_parameters([(2,)]), **{name: value})


@pytest.mark.parametrize(
    "options",
    [
        dict(momentum=0), dict(damping=0), dict(max_direction=inf), dict(max_grad_norm=inf),
        dict(max_increase=inf), dict(block_size=1), dict(factor_interval=1),
        dict(max_direction=5e-324),
    ],
    ids=str,
)  # fmt: skip
def test_values_at_the_edge_are_accepted(options):
    train(AdaQN(random_parameters([(2, 3)]), **options), 2)


def test_safeguards_are_common_to_all_groups():
    a, b = random_parameters([(2,), (3,)])
    own = dict(max_vector_dim=3, factor_interval=3)
    for name, value in {**EVERYTHING, **own}.items():
        if name in DIFFERING:  # as the momentum does
            continue
        with pytest.raises(ValueError, match=f"{name}: a parameter group asks for"):
            plain_adaqn([{"params": [a]}, {"params": [b], name: value}])
