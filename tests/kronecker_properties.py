"""Properties that the CUDA kernels of the Kronecker matrix must have, on whatever device runs them.

``test_kronecker_cuda.py`` runs them by the emulation, ``test_cuda.py`` on a GPU.
"""

from __future__ import annotations

import torch
from kernel_problems import BF16, F16, F32, F64, arguments, assert_close, bits, check, run
from kronecker_arguments import Blocks, BlocksProblem

from adaqn_cuda import reference
from adaqn_cuda.state.layout import Counter, Flag

ACCUMULATE, APPLY, STEP = "kronecker_accumulate", "kronecker_apply", "kronecker_step"
OPERATIONS = (ACCUMULATE, APPLY, STEP)

#: Matrices, vectors, scalars, tensors of higher order and empty ones.
MANY = ((12, 10), (7,), (), (3, 5, 2), (0, 4), (30,), (1, 9), (8, 1))
EVERYTHING = dict(beta=0.9, correct_bias=True, max_grad_norm=2.0, groups=3)
MIXED = Blocks(shapes=MANY, block_size=4, dtypes=(F32, BF16, F16), missing=3, **EVERYTHING)

CASES = {
    "plain": Blocks(),
    "empty": Blocks(shapes=((0, 3),)),
    "float64": Blocks(dtypes=(F64,)),
    "blocks": Blocks(shapes=MANY, block_size=4),
    "blocks of one": Blocks(shapes=((3, 2),), block_size=1),
    "no factors": Blocks(shapes=MANY, block_size=None, beta=0.9),
    "row blocks": Blocks(shapes=((24, 10),), heights=((0, (6, 6, 5, 7)),), block_size=5),
    "mixed": MIXED,
    "mixed with float64": MIXED.but(dtypes=(F32, F64, BF16, F16)),
    "unaligned": MIXED.but(offset=1),
    "full tiles": Blocks(shapes=((70, 130), (64, 64))),
    "full tiles in float64": Blocks(shapes=((70, 130),), dtypes=(F64,), beta=0.9),
    "chunks": Blocks(shapes=((9001,),), beta=0.9),
    "wide": Blocks(shapes=((150, 70),), block_size=150),
    "wide in float64": Blocks(shapes=((131, 3),), block_size=150, dtypes=(F64,)),
    "long strips": Blocks(shapes=((3, 300), (300, 3)), block_size=3),
    "100 matrices": Blocks(shapes=((3, 2), (4,)) * 50, groups=100, missing=7),
    "300 matrices": Blocks(shapes=((3, 2), (), (4,)) * 100, groups=5, missing=7),
    "momentum, first step": Blocks(beta=0.9, accepted=0),
    "bias correction, first step": Blocks(correct_bias=True, accepted=0),
    "after long": Blocks(beta=0.95, correct_bias=True, accepted=10**6),
    "clipped": Blocks(max_grad_norm=3.0),
    "an outlier": Blocks(mean_square=1e-6, beta=0.9),
    "an outlier, clipped": Blocks(mean_square=1e-8, correct_bias=True, max_grad_norm=1e-2),
    "no average": Blocks(mean_square=0.0),
    "first call": Blocks(shapes=((12, 10), (7,)), call=1),
    "first call in float64": Blocks(shapes=((12, 10), (7,)), call=1, dtypes=(F64,)),
    "early call": Blocks(shapes=MANY, block_size=4, call=7),
    "growing tiles": Blocks(shapes=((7,), (3,), (12, 10))),
    "every call": Blocks(shapes=((12, 10), (20, 9)), block_size=7, interval=1),
    "apart": MIXED.but(apart=True),
    "apart, 300 matrices": Blocks(
        shapes=((3, 2), (), (4,)) * 100, apart=True, **{**EVERYTHING, "groups": 70}
    ),
    "everything": Blocks(**EVERYTHING),
    "everything in float64": Blocks(shapes=MANY, block_size=4, dtypes=(F64,), **EVERYTHING),
}

STANDING = {
    name: Blocks(shapes=((12, 10), (7,), (30,), (3, 9)), block_size=4, missing=missing, beta=0.9)
    for name, missing in {"first": (0,), "last": (3,), "all but one": (0, 1, 3)}.items()
}
STANDING["all"] = STANDING["first"].but(missing=(0, 1, 2, 3))


def check_kronecker_case(namespace, operation: str, case: Blocks, device: str) -> None:
    """At successive calls, of which each is another factor's turn."""
    for call in (case.call, case.call + 1) if case.call > 1 else (1,):
        check(namespace, operation, BlocksProblem(case.but(call=call), device))


def check_options_of_apply(namespace, case: Blocks, device: str) -> None:
    for pending in (0, 1):
        for inverse in (False, True):
            problem = BlocksProblem(case.but(pending=pending, inverse=inverse), device)
            check(namespace, APPLY, problem)


def check_with_pairs(namespace, device: str) -> None:
    """With pairs the flags come behind a word per slot."""
    case = Blocks(history_size=4, pairs=2, max_grad_norm=3.0)
    check(namespace, ACCUMULATE, BlocksProblem(case, device))


def check_kronecker_scaling(namespace, operation: str, maximize: bool, device: str) -> None:
    for mean_square in (100.0, 1e-8):
        problem = BlocksProblem(MIXED.but(mean_square=mean_square), device)
        problem["grad_scale"] = torch.tensor([8.0])
        problem["found_inf"] = torch.tensor([0.0])
        problem["maximize"] = maximize
        check(namespace, operation, problem)


def check_kronecker_rates(namespace, device: str) -> None:
    problem = BlocksProblem(CASES["100 matrices"], device)
    groups = problem.case.groups
    problem["lr_tensor"] = torch.linspace(0.1, 0.5, groups, dtype=F64)
    problem["weight_decay_tensor"] = torch.linspace(0, 0.2, groups, dtype=F64)
    problem["lr"] = problem["weight_decay"] = [0.0] * groups
    check(namespace, STEP, problem)


def check_dropped_step(namespace, reason: str, case: Blocks, device: str) -> None:
    """A dropped step leaves parameters and state alone, to the bit, and is counted once."""
    problem = BlocksProblem(case.but(missing=0), device)
    if reason == "found_inf":
        problem["found_inf"] = torch.tensor([1.0])
    elif reason == "blank":
        for g in problem["grads"]:
            g.zero_()
    else:
        problem["grads"][-1][-1] = float(reason)
    before, counters = problem.persistent(), problem["counters"].clone()
    if reason == "blank":
        problem["counters"][Counter.ANCHORED] = counters[Counter.ANCHORED] = 0
    run(namespace, STEP, problem)
    assert (problem["projections"][Flag.NONFINITE] == 0) == (reason == "blank")
    counters[Counter.STEPS_SKIPPED] += reason != "blank"
    assert torch.equal(counters, problem["counters"])
    run(namespace, ACCUMULATE, problem)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.persistent(), strict=True))


def check_kronecker_standing(namespace, operation: str, case: Blocks, device: str) -> None:
    """Without a gradient a parameter keeps w, m, v, factors and bases, to the bit."""
    problem = BlocksProblem(case.but(interval=1), device)
    before = problem.at_rest()
    check(namespace, operation, problem)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.at_rest(), strict=True))


def check_passes_are_the_step(namespace, case: Blocks, device: str) -> None:
    """accumulate leaves what the step leaves, to the bit."""
    step, alone = BlocksProblem(case, device), BlocksProblem(case, device)
    run(namespace, STEP, step)
    alone["projections"].copy_(step["projections"])
    run(namespace, ACCUMULATE, alone)
    for name in ("factors", "bases", "accumulator", "square"):
        assert torch.equal(bits(step[name]), bits(alone[name])), name


def check_inverse(namespace, case: Blocks, device: str) -> None:
    problem = BlocksProblem(case.but(dtypes=(F64,)), device)
    x = problem["x"].clone()
    run(namespace, APPLY, problem)
    assert (problem["x"] - x).norm() > 0.1 * x.norm()
    problem["inverse"] = True
    run(namespace, APPLY, problem)
    assert_close(problem["x"], x, "x", 1e-10)


# --------------------------------------------------------------------------- bases


def gradient_of_rank_one(problem: BlocksProblem) -> None:
    for g in problem["grads"]:
        g.copy_(torch.outer(problem.draw(12), problem.draw(10)).reshape(-1))


def deviation(basis: torch.Tensor) -> float:
    """From orthogonality."""
    q = basis.double()
    return float((q.mT @ q - torch.eye(len(q), device=q.device)).abs().max())


def check_bases(namespace, dtype: torch.dtype, rank: int, side: int, device: str) -> None:
    """Of factors of a low rank: orthogonal, and they find all that is there."""
    case = Blocks(shapes=((side, 5),), block_size=side, dtypes=(dtype,), call=1, max_grad_norm=1e-6)
    problem = BlocksProblem(case, device)

    def factor(n: int) -> torch.Tensor:
        columns = problem.draw(n, rank)
        return columns @ columns.mT

    problem.set_factors(factor)
    run(namespace, ACCUMULATE, problem)
    for own, basis in zip(problem.squares("factors"), problem.squares("bases"), strict=True):
        assert deviation(basis) <= (2e-6 if dtype == F32 else 1e-14) * len(basis) ** 0.5
        rotated = basis.double().mT @ own.double() @ basis.double()
        rest = rotated[rank:, rank:]
        assert rest.norm() <= (1e-5 if dtype == F32 else 1e-12) * rotated.norm()


def check_new_directions(namespace, dtype: torch.dtype, side: int, device: str) -> None:
    """One iteration from a basis that does not know of what dominates by now: all columns are
    close to a few, and yet orthonormal after it; as far as rounding lets them, they are the
    reference's."""
    case = Blocks(shapes=((side, 1),), longest_vector=side, block_size=side, dtypes=(dtype,))
    case = case.but(call=20, interval=1, max_grad_norm=1e-6)
    problem = BlocksProblem(case, device)

    def factor(n: int) -> torch.Tensor:
        columns = problem.draw(n, 9) * torch.logspace(0, -1, 9, dtype=F64, device=device)
        return columns @ columns.mT

    problem.set_factors(factor)
    theirs = problem.for_reference()
    reference.kronecker_accumulate(*arguments(ACCUMULATE, theirs))
    run(namespace, ACCUMULATE, problem)
    [basis] = problem.squares("bases")
    assert deviation(basis) <= (2e-6 if dtype == F32 else 1e-14) * side**0.5
    dominant = theirs["bases"].view(side, side)[:, :9]
    limit = 1e-3 if dtype == F32 else 1e-8
    assert_close(basis[:, :9].contiguous(), dominant.contiguous(), "bases", limit)


def check_hopeless_factors(namespace, value: float, device: str, shapes=((12, 10),)) -> None:
    """Zero, or not finite: the basis stays, and so does v."""
    problem = BlocksProblem(Blocks(shapes=shapes, call=21, interval=1, beta=0.9), device)
    problem.set_factors(lambda n: torch.full((n, n), value, dtype=F64))
    for g in problem["grads"]:
        g.zero_()
    v = problem["accumulator"].clone()
    run(namespace, ACCUMULATE, problem)
    for basis in problem.squares("bases"):
        assert torch.equal(basis, torch.eye(len(basis), dtype=basis.dtype, device=device))
    assert_close(problem["accumulator"], problem["keep"] * v, "accumulator")


def check_kronecker_repeatable(namespace, other, case: Blocks, device: str) -> None:
    """The same arguments give the same bits, wherever scratch lies."""
    results = []
    for own in (namespace, namespace, other):
        problem = BlocksProblem(case, device)
        for operation in (STEP, APPLY):
            run(own, operation, problem)
        results.append([*problem.persistent(), bits(problem["x"])])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


#: Sizes of gradients whose squares are no float32, and what they are clipped to.
EXTREMES = {"huge": (3e38, 2.0**62), "tiny": (1e-30, 1e-30)}


def check_extreme_gradient(namespace, extreme: str, device: str) -> None:
    size, max_norm = EXTREMES[extreme]
    problem = BlocksProblem(Blocks(max_grad_norm=max_norm, mean_square=0.0), device)
    for g in problem["grads"]:
        g.copy_(size * g.sign())
    run(namespace, STEP, problem)
    square = sum(g.double().square().sum() for g in problem["grads"])
    torch.testing.assert_close(problem["projections"][Flag.SQUARE], square, rtol=1e-6, atol=0)
    names = ("factors", "bases", "accumulator", "params")
    for tensor in (t for name in names for t in as_list(problem[name])):
        assert tensor.isfinite().all()


def as_list(value) -> list[torch.Tensor]:
    return value if isinstance(value, list) else [value]
