"""Properties that the CUDA kernels must have, on whatever device runs them.

``test_cuda_emulated.py`` and ``test_cuda.py`` run the same functions over the same cases.
"""

from __future__ import annotations

import torch
from kernel_problems import BF16, F16, F32, F64, Case, Problem, arguments, bits, check, run

from adaqn_cuda import reference
from adaqn_cuda.layout import Counter, Flag, Loss

STEP = ("direction_pass1", "direction_pass2", "direction_pass3", "direction_step")
ITERATE = ("iterate_swap", "iterate_restore")
CURVATURE = ("curvature_pass_a", "curvature_pass_b", "curvature_commit")
ALL = STEP + ITERATE + CURVATURE

#: Small tensors, empty ones among them, of mixed types.
MIXED = Case(numels=(5, 0, 1, 700, 64, 0, 3), dtypes=(F32, BF16, F16), missing=4, groups=3)

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
    "3 000 tensors": Case(numels=(3, 1, 0) * 1000, dtypes=(F32, BF16), groups=5, missing=7),
}

#: What a kernel need not write: z of the fused step stays on the chip.
UNWRITTEN = {"direction_step": ("images",)}


def check_case(namespace, operation: str, case: Case, device: str) -> None:
    check(namespace, operation, Problem(case, device), UNWRITTEN.get(operation, ()))


def check_scaling(namespace, operation: str, device: str, maximize: bool) -> None:
    problem = Problem(MIXED, device)
    problem["grad_scale"] = torch.tensor([8.0])
    problem["found_inf"] = torch.tensor([0.0])
    problem["maximize"] = maximize
    check(namespace, operation, problem, UNWRITTEN.get(operation, ()))


def check_rate_tensors(namespace, operation: str, device: str) -> None:
    problem = Problem(CASES["300 tensors"], device)
    groups = problem.case.groups
    problem["lr_tensor"] = torch.linspace(0.1, 0.5, groups, dtype=F64)
    problem["weight_decay_tensor"] = torch.linspace(0, 0.2, groups, dtype=F64)
    problem["lr"] = problem["weight_decay"] = [0.0] * groups
    check(namespace, operation, problem, UNWRITTEN.get(operation, ()))


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


def check_dropped(namespace, device: str, reason: str, fused: bool, case: Case) -> None:
    """A dropped step leaves parameters and state alone, to the bit, and is counted once."""
    problem = Problem(case, device)
    problem.poison()
    drop(problem, reason)
    before, counters = problem.persistent(), problem["counters"].clone()
    for operation in ("direction_step",) if fused else STEP[:3]:
        run(namespace, operation, problem)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.persistent(), strict=True))
    counters[Counter.STEPS_SKIPPED] += reason != "blank"
    assert torch.equal(counters, problem["counters"])
    assert (problem["projections"][Flag.NONFINITE] == 0) == (reason == "blank")


def check_fused_is_separate(namespace, device: str, case: Case) -> None:
    """direction_step gives the bits of its three passes."""
    fused, separate = Problem(case, device), Problem(case, device)
    run(namespace, "direction_step", fused)
    for operation in STEP[:3]:
        run(namespace, operation, separate)
    assert all(
        torch.equal(a, b) for a, b in zip(fused.persistent(), separate.persistent(), strict=True)
    )
    for name in ("projections", "counters", "direction"):
        assert torch.equal(bits(fused[name]), bits(separate[name])), name


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
    "skip": (lambda p: p["column"][:-1].neg_(), Counter.SKIPPED),
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


def check_overflow_bars_the_pair(namespace, device: str) -> None:
    """A pair that is not finite leaves finite rows behind and cannot be stored."""
    problem = Problem(Case(), device)
    problem["anchor"][7] = torch.inf
    for operation in CURVATURE:
        run(namespace, operation, problem)
    assert problem["counters"][Counter.STORED] == 0
    assert problem["counters"][Counter.SKIPPED] == 1
    assert problem["s_ring"].isfinite().all() and problem["y_ring"].isfinite().all()
