"""Properties that the CUDA kernels must have, on whatever device runs them.

``test_cuda_emulated.py`` and ``test_cuda.py`` run the same functions over the same cases.
"""

from __future__ import annotations

from math import inf

import torch
from kernel_problems import BF16, F16, F32, F64, Case, Problem, arguments, bits, check, run

from adaqn_cuda import reference
from adaqn_cuda.state.layout import Counter, Flag, Loss

PASSES = ("direction_pass1", "direction_pass2", "direction_pass3")
STEP = (*PASSES, "direction_step", "diagonal_step")
ITERATE = ("iterate_swap", "iterate_restore")
CURVATURE = ("curvature_pass_a", "curvature_pass_b", "curvature_commit")
#: Those that take averages by group.
APART = ("direction_pass2", "diagonal_step")
ALL = STEP + ("direction_images",) + ITERATE + CURVATURE
#: The ways to take a step: operations that make a whole one.
WHOLE = {"fused": ("direction_step",), "passes": PASSES, "diagonal": ("diagonal_step",)}

#: Small tensors, empty ones among them, of mixed types.
MIXED = Case(numels=(5, 0, 1, 700, 64, 0, 3), dtypes=(F32, BF16, F16), missing=4, groups=3)

#: Everything beyond the paper's algorithm, switched on.
EVERYTHING = dict(
    beta=0.9, correct_bias=True, max_grad_norm=0.7, max_direction=0.5, damping=0.2, image_size=50.0
)

#: Long enough for a thread to take several packs at a time, aligned ones and others.
LONG = Case(
    numels=(8, 13_501, 13_500), dtypes=(F32, BF16, F16), history_size=1, pairs=1, oldest=1,
    fisher_size=1, gradients=1, beta=0.9,
)  # fmt: skip

CASES = {
    "plain": Case(),
    "empty": Case(numels=(0, 0)),
    "one": Case(numels=(1,)),
    "31": Case(numels=(31,)),
    "float64": Case(dtypes=(F64,)),
    "float64, bfloat16 rings": Case(dtypes=(F64,), pair_dtype=BF16, fisher_dtype=BF16),
    "bfloat16 rings": Case(pair_dtype=BF16, fisher_dtype=BF16),
    "bfloat16 pairs": Case(numels=(2048, 40), pair_dtype=BF16),
    "bfloat16 gradients": Case(numels=(2048, 40), fisher_dtype=BF16),
    "bfloat16 parameters": Case(dtypes=(BF16,)),
    "float16 parameters": Case(numels=(33, 2000), dtypes=(F16,)),
    "mixed": MIXED,
    "mixed with float64": MIXED.but(dtypes=(F32, F64, BF16, F16)),
    "unpadded rows": Case(row_padding=0),
    "unpadded rows in bfloat16": Case(row_padding=0, pair_dtype=BF16, fisher_dtype=BF16),
    "unaligned buffers": Case(numels=(300, 301), offset=1),
    "unaligned rows": Case(numels=(1024, 512), row_padding=3),
    "unaligned rows of gradients": Case(numels=(1028,), row_padding=4, fisher_dtype=BF16),
    "unaligned bfloat16": MIXED.but(offset=1, pair_dtype=BF16),
    "scalar initial matrix": Case(diagonal=False),
    "scalar initial matrix, no pairs": Case(diagonal=False, pairs=0),
    "no pairs": Case(pairs=0),
    "no gradients": Case(gradients=0),
    "full rings": Case(pairs=5, oldest=2, gradients=6),
    "history of one": Case(history_size=1, pairs=1, oldest=1, fisher_size=1, gradients=1),
    "history of 64": Case(numels=(2500,), history_size=64, pairs=64, oldest=40),
    "history of 64 in float64": Case(
        numels=(700,), dtypes=(F64,), history_size=64, pairs=63, oldest=9
    ),
    "fisher ring of 150": Case(numels=(1500,), fisher_size=150, gradients=133),
    "100 000": Case(numels=(99_991, 9)),
    "300 tensors": Case(numels=(7, 0, 16) * 100, groups=100),
    "1 650 tensors": Case(numels=(3, 1, 0) * 550, dtypes=(F32, BF16), groups=5, missing=7),
    "momentum": Case(beta=0.9),
    "momentum, first step": Case(beta=0.9, accepted=0),
    "momentum, after long": Case(beta=0.95, accepted=10**6),
    "clipped": Case(max_grad_norm=3.0),
    "clip out of reach": Case(max_grad_norm=1e3),
    "bias correction": Case(correct_bias=True),
    "bias correction, first step": Case(correct_bias=True, accepted=0),
    "capped": Case(max_direction=0.5),
    "cap out of reach": Case(max_direction=100.0),
    "capped, no pairs": Case(max_direction=0.5, pairs=0),
    "capped, scalar initial matrix": Case(max_direction=0.5, diagonal=False),
    "damped": Case(damping=0.2, image_size=50.0),
    "damping out of reach": Case(damping=0.2, image_size=0.02),
    "damped, no gradients": Case(damping=0.2, gradients=0),
    "damped, fisher ring of 150": Case(
        numels=(1500,), fisher_size=150, gradients=133, damping=0.2, image_size=50.0
    ),
    "given y": Case(explicit=True, fisher_size=1, gradients=1),
    "given y, damped": Case(explicit=True, fisher_size=1, gradients=1, damping=0.2),
    "given y, missing": Case(explicit=True, fisher_size=1, gradients=0, damping=0.2),
    "identity": Case(identity=True, diagonal=False, beta=0.9),
    "identity, bfloat16 rings": Case(
        identity=True, diagonal=False, pair_dtype=BF16, fisher_dtype=BF16
    ),
    "everything": Case(**EVERYTHING),
    "everything in float64": Case(dtypes=(F64,), **EVERYTHING),
    "everything in bfloat16 rings": Case(pair_dtype=BF16, fisher_dtype=BF16, **EVERYTHING),
    "everything, scalar initial matrix": Case(diagonal=False, **EVERYTHING),
    "everything, mixed": MIXED.but(**EVERYTHING),
    "everything, mixed with float64": MIXED.but(dtypes=(F32, F64, BF16, F16), **EVERYTHING),
    "everything, unaligned": MIXED.but(offset=1, pair_dtype=BF16, **EVERYTHING),
    "everything, unaligned rows": Case(numels=(1024, 512), row_padding=3, **EVERYTHING),
    "everything, history of 64": Case(
        numels=(2500,), history_size=64, pairs=64, oldest=40, **EVERYTHING
    ),
    "everything, 1 650 tensors": Case(
        numels=(3, 1, 0) * 550, dtypes=(F32, BF16), groups=5, missing=7, **EVERYTHING
    ),
    "everything, empty": Case(numels=(0, 0), **EVERYTHING),
    "apart": MIXED.but(**{**EVERYTHING, "groups": 6, "apart": True}),
    "apart in float64": MIXED.but(dtypes=(F64,), offset=1, apart=True, **EVERYTHING),
    "apart, 1 650 tensors": Case(
        numels=(3, 1, 0) * 550, groups=7, apart=True, missing=7, **EVERYTHING
    ),
    "long": LONG,
    "no history": Case().without_pairs(),
    "no history, long": LONG.without_pairs(),
    "no history, identity": Case(identity=True, diagonal=False, beta=0.9).without_pairs(),
    "no history, everything": MIXED.but(**EVERYTHING).without_pairs(),
}


def operations_for(case: Case) -> tuple[str, ...]:
    """Without pairs there is no sum of iterates, no pair update, and no scalar initial matrix."""
    if case.apart:
        return APART
    if case.history_size:
        return ALL
    return STEP if case.diagonal else (*PASSES, "diagonal_step")


#: Parameters without a gradient: which of four, and what the step is made of.
WHICH = {"first": (0,), "last": (-1,), "all but one": (0, 1, 3), "all": (0, 1, 2, 3)}
STANDING = {
    f"{which}, {kind}": Case(**{"numels": (31, 1, 4097, 64), "missing": missing, **options})
    for which, missing in WHICH.items()
    for kind, options in {
        "plain": {},
        "momentum": dict(beta=0.9),
        "scalar initial matrix": dict(diagonal=False, beta=0.9),
        "capped": dict(max_direction=0.5),
        "identity": dict(identity=True, diagonal=False, beta=0.9),
        "groups": dict(groups=3, dtypes=(F32, BF16, F16)),
        "unaligned": dict(offset=1, beta=0.9, pair_dtype=BF16, fisher_dtype=BF16),
        "everything": dict(groups=3, **EVERYTHING),
        "everything, scalar": dict(groups=3, diagonal=False, **EVERYTHING),
        "everything in float64": dict(groups=3, dtypes=(F64,), **EVERYTHING),
    }.items()
}
STANDING["one element"] = Case(numels=(1, 1), missing=(0,), **EVERYTHING)
STANDING["tables of groups"] = Case(numels=(3, 8) * 33, groups=66, missing=5, **EVERYTHING)
STANDING["tables of tensors"] = Case(numels=(3, 1, 0) * 550, missing=7, groups=5, **EVERYTHING)
#: The operations that a missing gradient concerns.
MOVING = ("direction_pass2", "direction_pass3", "direction_step", "diagonal_step")

CHECKED = [(operation, name) for name, case in CASES.items() for operation in operations_for(case)]


def unwritten(operation: str, case: Case) -> tuple[str, ...]:
    """What a kernel need not write, and scratch that it may: z of the fused step stays on the chip,
    and p waits for its norm in the direction's place."""
    on_chip = ("images",) if operation == "direction_step" else ()
    return on_chip + (("direction", "saved") if case.max_direction < inf else ())


def check_case(namespace, operation: str, case: Case, device: str) -> None:
    if operation == "diagonal_step":
        case = case.without_pairs()
    check(namespace, operation, Problem(case, device), unwritten(operation, case))


def check_scaling(namespace, operation: str, device: str, maximize: bool, case: Case) -> None:
    problem = Problem(case, device)
    problem["grad_scale"] = torch.tensor([8.0])
    problem["found_inf"] = torch.tensor([0.0])
    problem["maximize"] = maximize
    check(namespace, operation, problem, unwritten(operation, case))


def check_rate_tensors(namespace, operation: str, device: str, case: Case) -> None:
    problem = Problem(case, device)
    groups = problem.case.groups
    problem["lr_tensor"] = torch.linspace(0.1, 0.5, groups, dtype=F64)
    problem["weight_decay_tensor"] = torch.linspace(0, 0.2, groups, dtype=F64)
    problem["lr"] = problem["weight_decay"] = [0.0] * groups
    check(namespace, operation, problem, unwritten(operation, case))


def drop(problem: Problem, reason: str) -> None:
    """Give the problem's step a reason to be dropped."""
    if reason == "found_inf":
        problem["found_inf"] = torch.tensor([1.0])
    elif reason == "blank":
        for g in problem["grads"]:
            g.zero_()
        problem["counters"][Counter.GRADIENTS] = 0
        problem["counters"][Counter.ANCHORED] = 0
    else:
        problem["grads"][-1][-1] = float(reason)


def check_dropped(namespace, device: str, reason: str, way: str, case: Case) -> None:
    """A dropped step leaves parameters and state alone, to the bit, and is counted once."""
    problem = Problem(case.without_pairs() if way == "diagonal" else case, device)
    problem.poison()
    drop(problem, reason)
    before, counters = problem.persistent(), problem["counters"].clone()
    for operation in WHOLE[way]:
        run(namespace, operation, problem)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.persistent(), strict=True))
    counters[Counter.STEPS_SKIPPED] += reason != "blank"
    assert torch.equal(counters, problem["counters"])
    assert (problem["projections"][Flag.NONFINITE] == 0) == (reason == "blank")


def check_standing(namespace, operation: str, device: str, case: Case) -> None:
    """Without a gradient a parameter keeps w, m and v, to the bit, and has no part in F."""
    case = case.without_pairs() if operation == "diagonal_step" else case
    problem = Problem(case, device)
    before = problem.at_rest()
    check(namespace, operation, problem, unwritten(operation, case))
    assert all(torch.equal(a, b) for a, b in zip(before, problem.at_rest(), strict=True))
    if operation in ("direction_pass2", "direction_step"):
        parts = problem["fisher"][case.gradients].split(list(case.numels))
        assert not any(parts[i].any() for i in case.standing())


#: Sizes of gradients whose squares are no float32, what they are clipped to, and the size of s for
#: which s.g is one.
EXTREMES = {"huge": (3e38, 2.0**62, 2.0**-10), "tiny": (1e-30, 1e-30, 1.0)}
EXTREME = {
    "plain": Case(),
    "momentum": Case(beta=0.9),
    "capped": Case(max_direction=0.5),
    "capped, scalar initial matrix": Case(max_direction=0.5, diagonal=False),
    "mixed": Case(numels=(5, 1, 700, 64), dtypes=(F32, BF16), missing=3),
    "everything": Case(**EVERYTHING),
    "everything, scalar": Case(diagonal=False, **EVERYTHING),
}


def check_extreme_gradients(
    namespace, operation: str, device: str, extreme: str, scale: float, case: Case
) -> None:
    """|g|^2, and what is made of it, for every finite gradient."""
    size, max_norm, pair_size = EXTREMES[extreme]
    case = case.without_pairs() if operation == "diagonal_step" else case
    problem = Problem(case.but(max_grad_norm=max_norm), device)
    problem["grad_scale"] = torch.tensor([scale])
    problem["s_ring"].mul_(pair_size)
    grads = [g for g in problem["grads"] if g is not None]
    for g in grads:
        g.copy_(size * g.sign())
    square = sum(g.double().square().sum() for g in grads) / scale**2
    problem["projections"][Flag.SQUARE] = square  # what passes 2 and 3 find
    for w in problem["params"]:
        w.zero_()  # so that a tiny step shows
    check(namespace, operation, problem, unwritten(operation, case))
    torch.testing.assert_close(problem["projections"][Flag.SQUARE], square, rtol=1e-6, atol=0)


def check_extreme_direction(namespace, device: str, size: float) -> None:
    """|p|^2, where it is no float32."""
    problem = Problem(Case(max_direction=0.5), device)
    problem["direction"].mul_(size)
    for name in ("projections", "images"):
        problem[name][: len(problem["moments"])] *= size
    problem["images"][-1] = 0.01 * size**2
    for w in problem["params"]:
        w.zero_()
    check(namespace, "direction_pass3", problem, ("direction", "saved"))


def check_fused_is_separate(namespace, device: str, case: Case) -> None:
    """direction_step gives the bits of its three passes."""
    fused, separate = Problem(case, device), Problem(case, device)
    run(namespace, "direction_step", fused)
    for operation in PASSES:
        run(namespace, operation, separate)
    assert_same_bits(fused, separate)


def assert_same_bits(one: Problem, other: Problem) -> None:
    pairs = zip(one.persistent(), other.persistent(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for name in ("projections", "counters", "direction"):
        assert torch.equal(bits(one[name]), bits(other[name])), name


def check_direction_accuracy(namespace, device: str, case: Case) -> None:
    """The float32 direction is within 1e-6 of the one computed from the same data in float64."""
    problem = Problem(case.but(dtypes=(F32,)), device)
    problem["lr"], problem["weight_decay"] = [1.0], [0.0]
    for w in problem["params"]:
        w.zero_()  # so that the new parameters are the direction, unrounded
    exact = {name: as_double(value) for name, value in problem.for_reference().items()}
    reference.direction_step(*arguments("direction_step", exact))
    problem.poison()
    run(namespace, "direction_step", problem)
    mine, theirs = (torch.cat(p).double() for p in (problem["params"], exact["params"]))
    assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def as_double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return [as_double(x) for x in value] if isinstance(value, list) else value


def check_repeatable(namespace, device: str, case: Case) -> None:
    """The same arguments give the same bits."""
    results = []
    for _ in range(2):
        problem = Problem(case, device)
        for operation in ("direction_step", *CURVATURE):
            run(namespace, operation, problem)
        results.append([*problem.persistent(), bits(problem["column"])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_restore(namespace, device: str, case: Case) -> None:
    """iterate_restore undoes iterate_swap, to the bit."""
    problem = Problem(case, device)
    before = problem.persistent()
    for operation in ITERATE:
        run(namespace, operation, problem)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.persistent(), strict=True))


def check_swap_without_iterates(namespace, device: str) -> None:
    problem = Problem(MIXED, device)
    problem["counters"][Counter.ITERATES] = 0
    problem["projections"][Flag.NONFINITE] = 1
    check(namespace, "iterate_swap", problem)


#: Changes to the arguments of a commit, and the counter that shows what became of it.
OUTCOMES = {
    "store": (lambda p: None, Counter.STORED),
    "store under a monitor": (lambda p: p.__setitem__("monitored_loss", loss(0.9)), Counter.STORED),
    "skip": (lambda p: p["column"][:-2].neg_(), Counter.SKIPPED),
    "skip what overflowed": (lambda p: p["column"].fill_(torch.inf), Counter.SKIPPED),
    "reset": (lambda p: p.__setitem__("monitored_loss", loss(1.1)), Counter.RESETS),
    "reset at NaN": (lambda p: p.__setitem__("monitored_loss", loss(torch.nan)), Counter.RESETS),
    "first": (lambda p: p["counters"][Counter.ANCHORED].zero_(), Counter.ANCHORED),
    "none": (lambda p: p["counters"][Counter.ITERATES].zero_(), Counter.ANCHORED),
}


def loss(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=F64)


def check_outcome(namespace, device: str, outcome: str, case: Case) -> None:
    change, counter = OUTCOMES[outcome]
    problem = Problem(case, device)
    change(problem)
    before = int(problem["counters"][counter])
    check(namespace, "curvature_commit", problem)
    after = int(problem["counters"][counter])
    assert after == (before if outcome == "none" else 1)
    if outcome == "reset":
        assert problem["losses"][Loss.MONITORED] == 1.1


def check_dropped_pair_update(namespace, device: str, reason: str, case: Case) -> None:
    """After a dropped step a pair update leaves everything alone, whatever the monitor says."""
    for monitored in (None, loss(0.9), loss(1.1)):
        problem = Problem(case, device)
        problem["monitored_loss"] = monitored
        if reason == "blank":
            problem["projections"][Flag.NONZERO] = 0
            problem["counters"][Counter.GRADIENTS] = problem["counters"][Counter.ANCHORED] = 0
        else:
            problem["projections"][Flag.NONFINITE] = 1
        problem.poison()
        before = problem.everything()
        for operation in ("curvature_pass_b", "curvature_commit"):
            run(namespace, operation, problem)
            assert all(torch.equal(a, b) for a, b in zip(before, problem.everything(), strict=True))
        check(namespace, "curvature_commit", problem)


def check_growth(namespace, device: str, max_growth: float, pairs: int) -> None:
    """gamma grows from pair to pair by at most a factor; what is given of y.y does not shrink."""
    problem = Problem(Case(pairs=pairs), device)
    free = (problem.case.oldest + pairs) % len(problem["moments"])
    problem["column"][free], problem["column"][-2] = 6.0, 2.0
    problem["max_growth"] = max_growth
    before = float(reference.scalar_initial_matrix(problem["gram"], problem["counters"]))
    check(namespace, "curvature_commit", problem)
    after = float(reference.scalar_initial_matrix(problem["gram"], problem["counters"]))
    assert before <= 1
    limit = max_growth * before if pairs else inf
    assert abs(after - min(3.0, limit)) < 1e-12


def check_overflow_bars_the_pair(namespace, device: str) -> None:
    """A pair that is not finite leaves finite rows behind and cannot be stored."""
    problem = Problem(Case(), device)
    problem["anchor"][7] = torch.inf
    for operation in CURVATURE:
        run(namespace, operation, problem)
    assert problem["counters"][Counter.STORED] == 0
    assert problem["counters"][Counter.SKIPPED] == 1
    assert problem["s_ring"].isfinite().all() and problem["y_ring"].isfinite().all()
