"""Options that differ between parameter groups, and what is said of those that may not."""

from __future__ import annotations

import copy
import io
from math import inf

import pytest
import torch
from emulated import EmulatedOps
from problems import assert_same, every_place, needs_library, random_parameters, set_gradients
from problems import snapshot as snapshot_of

from adaqn_cuda import LBFGS, AdaQN, ops
from adaqn_cuda.options import COMMON, DIFFERING

F64 = torch.float64
#: Five matrices, and so ten factors: as many as turns, so that the next group's begin as alone.
FIRST, SECOND = [(4, 3)] * 5, [(6, 5), (7,), ()]
PAIRS = dict(history_size=3, update_interval=2, fisher_size=3)
#: A little less than the default: what follows the groups' own decays does nearly the same.
NEARLY = 0.8 - 1e-12


def set_noise(params, step, missing=None):
    """Gradients that depend on the step and the parameters' places only."""
    noise = random_parameters(FIRST + SECOND, seed=step)
    for index, (p, g) in enumerate(zip(params, noise, strict=True)):
        p.grad = None if (step, index) == missing else g.detach().to(p)


def run(optimizer, params, steps, first=0, missing=None):
    for step in range(first, first + steps):
        set_noise(params, step, missing)
        optimizer.step()


def groups_of(params, mine, theirs):
    return [{"params": params[:5], **mine}, {"params": params[5:], **theirs}]


SPLITS = {
    "decay": (dict(decay=0.5), dict(decay=0.9)),
    "eps": (dict(eps=1e-2), {}),
    "momentum": ({}, dict(momentum=0.3)),
    "no momentum": (dict(momentum=0.0), dict(momentum=0.9)),
    "rmsprop": (dict(init="rmsprop", decay=0.9), dict(decay=0.5, eps=1e-3)),
    "adagrad": (dict(init="adagrad", momentum=0.0), {}),
    "diagonals": (dict(init="adagrad"), dict(init="rmsprop", eps=1e-4)),
    "block_size": (dict(block_size=2, momentum=0.5), dict(momentum=0.9)),
}


@every_place
@pytest.mark.parametrize("name", SPLITS)
def test_each_group_moves_as_under_an_optimizer_of_its_own(name, fused, device):
    """Without pairs nothing but the whole gradient's size goes from group to group."""
    mine, theirs = SPLITS[name]
    params = random_parameters(FIRST + SECOND, F64, device=device)
    alone = copy.deepcopy(params)
    both = AdaQN(groups_of(params, mine, theirs), fused=fused)
    each = [AdaQN(alone[:5], fused=fused, **mine), AdaQN(alone[5:], fused=fused, **theirs)]
    for step in range(14):
        set_noise(params, step)
        set_noise(alone, step)
        both.step()
        for optimizer in each:
            optimizer.step()
    tolerance = 1e-12 if device == "cpu" else 1e-9  # sums of groups may have another order there
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@every_place
@pytest.mark.parametrize(
    "options",
    [
        dict(init="kronecker"), dict(init="rmsprop"), dict(init="scalar"), dict(init="adagrad"),
        dict(init="rmsprop", curvature="gradients"), dict(init="rmsprop", max_direction=inf),
        dict(init="kronecker", damping=0.0, max_grad_norm=1.0),
        dict(init="kronecker", history_dtype=torch.bfloat16),
    ],
)  # fmt: skip
def test_pairs_know_the_momentum_of_every_group(options, fused, device):
    """s.q of momenta that decay apart is that of one momentum, where they nearly do not."""
    ends = []
    for theirs in ({}, dict(momentum=NEARLY)):
        params = random_parameters(FIRST + SECOND, F64, device=device)
        optimizer = AdaQN(groups_of(params, {}, theirs), fused=fused, **PAIRS, **options)
        run(optimizer, params, 16, missing=(9, 2))
        ends.append(torch.cat([p.detach().reshape(-1) for p in params]))
        stored = optimizer.stats()["stored"]
    assert stored > 0
    # Pairs in bfloat16 are rounded anew where they differ in the last place.
    tolerance = 1e-3 if "history_dtype" in options else 1e-7
    torch.testing.assert_close(*ends, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("init", ["kronecker", "rmsprop"])
def test_moments_stay_right_while_momenta_decay_apart(init):
    """And so they are when all decay alike again."""
    params = random_parameters(FIRST + SECOND, F64)
    optimizer = AdaQN(groups_of(params, {}, dict(momentum=0.3)), init=init, **PAIRS)
    run(optimizer, params, 9, missing=(7, 1))
    arena = optimizer._arena
    stored = [row for row in range(4) if arena.s_ring[row].any() and arena.moments[row]]
    assert stored
    exact = arena.s_ring[stored] @ arena.momentum
    torch.testing.assert_close(arena.moments[stored], exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pairs", [{}, PAIRS])
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_library), "emulated"])
def test_backends_agree(backend, name, pairs, monkeypatch):
    """The CUDA kernels among them, emulated."""
    ends, emulated = [], ops.Backend("native", "emulated", EmulatedOps())
    for fused in (False, None):
        if backend == "emulated" and fused is None:
            monkeypatch.setattr(ops, "select_backend", lambda *_: emulated)
        params = random_parameters(FIRST + SECOND, F64)
        optimizer = AdaQN(groups_of(params, *SPLITS[name]), fused=fused, **pairs)
        run(optimizer, params, 12, missing=(5, 4))
        ends.append(torch.cat([p.detach().reshape(-1) for p in params]))
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-8)


@every_place
@pytest.mark.parametrize("pairs", [{}, PAIRS])
def test_a_checkpoint_continues_to_the_bit(pairs, fused, device):
    mine, theirs = dict(decay=0.5, momentum=0.0), dict(init="rmsprop", eps=1e-3)
    params = random_parameters(FIRST + SECOND, device=device)
    optimizer = AdaQN(groups_of(params, mine, theirs), fused=fused, **pairs)
    run(optimizer, params, 7)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    twins = copy.deepcopy(params)
    twin = AdaQN(groups_of(twins, {}, dict(init="rmsprop")), fused=fused, **pairs)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert twin.param_groups[0]["decay"] == 0.5 and twin.param_groups[1]["decay"] == 0.98
    assert twin.param_groups[0]["momentum"] == 0.0
    for o, own in ((optimizer, params), (twin, twins)):
        run(o, own, 7, first=7)
    assert_same(snapshot_of(optimizer), snapshot_of(twin))


@pytest.mark.parametrize("lacking", ["momentum", "decay", "eps", "init", "block_size"])
def test_a_state_dict_that_lacks_an_option_leaves_each_group_its_own(lacking):
    """As one that was saved before there was such an option."""
    mine = dict(decay=0.5, momentum=0.2, eps=1e-3, block_size=3)
    params = random_parameters(FIRST + SECOND)
    optimizer = AdaQN(groups_of(params, mine, dict(init="rmsprop")))
    run(optimizer, params, 3)
    saved, before = optimizer.state_dict(), copy.deepcopy(optimizer.param_groups)
    for group in saved["param_groups"]:
        del group[lacking]
    optimizer.load_state_dict(saved)
    assert [g[lacking] for g in optimizer.param_groups] == [g[lacking] for g in before]
    run(optimizer, params, 2, first=3)


@every_place
def test_rates_of_averages_may_change_in_one_group_while_training(fused, device):
    """Momentum may come to one group late; the others go on as before."""
    params = random_parameters(FIRST + SECOND, device=device)
    optimizer = AdaQN(groups_of(params, {}, {}), fused=fused, momentum=0.0)
    twins = copy.deepcopy(params)
    twin = AdaQN(groups_of(twins, {}, {}), fused=fused, momentum=0.0)
    for o, own in ((optimizer, params), (twin, twins)):
        run(o, own, 4)
    optimizer.param_groups[1].update(momentum=0.9, decay=0.5, eps=1e-3)
    for o, own in ((optimizer, params), (twin, twins)):
        run(o, own, 4, first=4)
    for p, q in zip(params[:5], twins[:5], strict=True):
        assert torch.equal(p, q)
    for p, q in zip(params[5:], twins[5:], strict=True):
        assert not torch.equal(p, q)
    assert optimizer.state[params[-1]]["momentum"].any()


def test_a_compiled_step_is_the_eager_one():
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        params = random_parameters(FIRST + SECOND)
        optimizer = AdaQN(groups_of(params, dict(decay=0.5), dict(momentum=0.3)))
        step = optimizer.step
        if compiled:
            optimizer.step = torch.compile(lambda step=step: step(), backend="aot_eager")
        run(optimizer, params, 4)
        ends.append([p.detach() for p in params])
    assert all(map(torch.equal, *ends))


def test_a_group_that_joins_takes_the_options_of_the_constructor():
    """As with torch's optimizers; where all groups agree, a loaded state's count as those."""
    a, b, c = random_parameters([(3, 2), (4,), (2, 2)])
    optimizer = AdaQN([{"params": [a], "decay": 0.5}], momentum=0.3)
    optimizer.add_param_group({"params": [b], "eps": 1e-2})
    assert [g["decay"] for g in optimizer.param_groups] == [0.5, 0.98]
    assert [g["momentum"] for g in optimizer.param_groups] == [0.3, 0.3]
    fresh = AdaQN([{"params": [a]}, {"params": [b]}])
    fresh.load_state_dict(optimizer.state_dict())
    fresh.add_param_group({"params": [c]})
    assert fresh.param_groups[2]["momentum"] == 0.3
    assert fresh.param_groups[2]["decay"] == 0.98


# --------------------------------------------------------------------------- what is one


#: Another value than the default's for each common option.
OTHERS = {
    "history_size": 3, "fisher_size": 7, "update_interval": 4, "curvature": "gradients",
    "min_curvature": 0.5, "max_increase": 2.0, "damping": 0.5, "max_direction": 3.0,
    "history_dtype": torch.bfloat16, "fisher_dtype": torch.bfloat16, "bias_correction": False,
    "max_grad_norm": 1.0, "max_vector_dim": 3, "factor_interval": 3, "maximize": True,
    "normalize": True,
    "fused": False, "foreach": True, "capturable": False,
}  # fmt: skip


def test_every_option_is_one_or_the_other():
    assert not set(COMMON) & set(DIFFERING)
    assert set(OTHERS) == set(COMMON) - {"differentiable"}  # which has but one value


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_one_by_nature_says_so(name, place):
    """In the constructor, when a group joins, and at a step."""
    a, b = random_parameters([(3, 2), (4,)])
    groups = [{"params": [a]}, {"params": [b]}]
    groups[place][name] = OTHERS[name]
    with pytest.raises(ValueError, match=f"^{name}: .*, and {COMMON[name]}; give all groups"):
        AdaQN(groups)
    optimizer = AdaQN([{"params": [a]}])
    with pytest.raises(ValueError, match=f"^{name}: .* may differ"):
        optimizer.add_param_group({"params": [b], name: OTHERS[name]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [b]})
    optimizer.param_groups[place][name] = OTHERS[name]
    set_gradients([a, b], 0)
    before = snapshot_of(optimizer)
    with pytest.raises(ValueError, match=f"^{name}: .*{COMMON[name]}"):
        optimizer.step()
    assert_same(before, snapshot_of(optimizer))


@pytest.mark.parametrize("name", OTHERS)
def test_groups_that_agree_need_no_constructor(name):
    a, b, c = random_parameters([(3, 2), (4,), (2,)])
    given = [{"params": [p], name: OTHERS[name]} for p in (a, b)]
    optimizer = AdaQN(iter(given))
    assert [g[name] for g in optimizer.param_groups] == [OTHERS[name]] * 2
    optimizer.add_param_group({"params": [c]})
    assert optimizer.param_groups[2][name] == OTHERS[name]
    set_gradients([a, b, c], 0)
    optimizer.step()
    one = AdaQN(random_parameters([(3, 2), (4,), (2,)]), **{name: OTHERS[name]})
    assert optimizer.stats()["state_bytes"] == one.stats()["state_bytes"]


@pytest.mark.parametrize(("theirs", "default"), [("scalar", "kronecker"), ("rmsprop", "scalar")])
def test_groups_may_agree_on_an_initial_matrix_that_does_not_mix(theirs, default):
    a, b = random_parameters([(3, 2), (4,)])
    optimizer = AdaQN([{"params": [p], "init": theirs} for p in (a, b)], init=default)
    set_gradients([a, b], 0)
    optimizer.step()
    assert ("accumulator" in optimizer.state[a]) == (theirs != "scalar")


def test_an_initial_matrix_that_mixes_is_no_default():
    a, b = random_parameters([(3, 2), (4,)])
    optimizer = AdaQN([{"params": [a], "init": "rmsprop"}])
    optimizer.add_param_group({"params": [b]})
    assert optimizer.param_groups[1]["init"] == "kronecker"


@pytest.mark.parametrize("groups", [1, 2])
def test_what_groups_agree_on_is_checked(groups):
    params = random_parameters([(2,)] * groups)
    with pytest.raises(ValueError, match="history_size: expected an int >= 0, got -1"):
        AdaQN([{"params": [p], "history_size": -1} for p in params])


def test_a_monitor_goes_with_pairs_that_the_groups_ask_for():
    [p] = random_parameters([(2,)])
    AdaQN([{"params": [p], "history_size": 2}], monitor=lambda: 0.0)
    with pytest.raises(ValueError, match="monitor"):
        AdaQN([{"params": [p], "history_size": 0}], monitor=lambda: 0.0, history_size=2)


def test_groups_of_lbfgs_agree_without_the_constructor():
    a, b = random_parameters([(3, 2), (4,)])
    options = dict(history_size=7, max_iter=3, line_search_fn="armijo", init="kronecker")
    optimizer = LBFGS([{"params": [a], **options}, {"params": [b], **options}])
    assert optimizer.param_groups[1]["history_size"] == 7
    with pytest.raises(ValueError, match="one direction for all parameters, so groups must agree"):
        LBFGS([{"params": [a], "decay": 0.5}, {"params": [b]}])
