"""LBFGS on parameters that are divided among processes, and the same in one process."""

from __future__ import annotations

import io
from unittest.mock import patch

import torch
from sharded_cases import Problem, assembled, divided, rows_of
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from adaqn_cuda import DETERMINISTIC, LBFGS
from adaqn_cuda.state.plan import Cut, Plan

SEARCHES = {
    "strong Wolfe": dict(line_search_fn="strong_wolfe", max_iter=8),
    "without a search": dict(lr=0.3, max_iter=8),
    "reference": dict(line_search_fn="armijo", max_iter=8, fused=False),
    "deterministic": dict(DETERMINISTIC, max_iter=8, history_size=5),
    "without pairs": dict(DETERMINISTIC, max_iter=8, history_size=0, maximize=True),
    "on a diagonal, not finite": dict(DETERMINISTIC, max_iter=8, init="rmsprop"),
    "not finite, strong Wolfe": dict(line_search_fn="strong_wolfe", max_iter=8),
}


class Closure:
    """The whole gradient; the loss differs between processes, and is right on the average."""

    def __init__(self, name, optimizer, params, whole, part, rank, count):
        self.name, self.optimizer, self.params = name, optimizer, params
        self.whole, self.part = whole, part
        self.share = 0.25 * (2 * rank - count + 1)
        self.problem, self.evaluations, self.spoilt = Problem(), 0, (3, 8)

    def __call__(self):
        self.evaluations += 1
        values = [v.detach().requires_grad_() for v in self.whole(self.params)]
        loss = self.problem.loss(values)
        sign = -1 if self.optimizer.param_groups[0]["maximize"] else 1
        grads = [sign * g for g in torch.autograd.grad(loss, values)]
        if "not finite" in self.name and self.evaluations in self.spoilt:
            grads[0][1, 2] = torch.nan
        for p, g in zip(self.params, grads, strict=True):
            p.grad = self.part(g)
        return sign * loss.detach() + self.share


def outcome(optimizer, params, whole):
    stats = optimizer.stats()
    stats.pop("state_bytes")
    return [w.detach().clone() for w in whole(params)], stats


def itself(x):
    return x


def plan_in_strips(count):
    """What makes the plan of one process whose matrices are cut where ``count`` shards end."""

    def plan(params, options, shards):
        size = options["block_size"] if options["init"] == "kronecker" else None
        cuts = [Cut(tuple(rows_of(len(p), count)), size) for p in params]
        is_scalar = options["init"] == "scalar"
        return None if is_scalar else Plan([p.shape for p in params], cuts, options["block_size"])

    return patch.object(LBFGS, "_plan", staticmethod(plan))


def searched_alone(name, count, steps=3, state=None, values=None):
    """What one process comes to."""
    params = [nn.Parameter(v.clone()) for v in values or Problem().start]
    with plan_in_strips(count):
        optimizer = LBFGS(params, **SEARCHES[name])
        if state is not None:
            optimizer.load_state_dict(state)
        closure = Closure(name, optimizer, params, itself, itself, 0, 1)
        closure.spoilt = closure.spoilt if state is None else ()
        for _ in range(steps):
            optimizer.step(closure)
    return *outcome(optimizer, params, itself), optimizer


def searched_together(values, name, options, whole, divide, state=None):
    """What this process comes to with the others: after two steps, and after a third."""
    params = [nn.Parameter(divide(v)) for v in values]
    optimizer = LBFGS(params, **SEARCHES[name], **options)
    if state is not None:
        optimizer.load_state_dict(state)
    rank, count = dist.get_rank(), dist.get_world_size()
    closure = Closure(name, optimizer, params, whole, divide, rank, count)
    closure.spoilt = closure.spoilt if state is None else ()
    for _ in range(2 if state is None else 0):
        optimizer.step(closure)
    between = outcome(optimizer, params, whole), saved(optimizer.state_dict())
    optimizer.step(closure)
    return between, outcome(optimizer, params, whole)


def saved(state):
    """What was written to a file, and read again."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def made_whole(state):
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, state)


#: Of these, what shards save is gathered.
WHOLE = ("strong Wolfe", "on a diagonal, not finite")


def searches(names):
    """By name: what shards come to, what goes on from what they saved, and that."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    outcomes = {}
    for name in names:
        args = name, {}, assembled, lambda v: divided(v, mesh)
        (between, state), after = searched_together(Problem().start, *args)
        _, again = searched_together(between[0], *args, state=state)
        outcomes[name] = after, again, between[0], made_whole(state) if name in WHOLE else None
    return outcomes


def searches_of_replicas(names):
    """The same with whole parameters, of which the state is divided."""
    outcomes = {}
    for name in names:
        args = name, {"state_sharding": dist.group.WORLD}, itself, torch.clone
        (between, state), after = searched_together(Problem().start, *args)
        _, again = searched_together(between[0], *args, state=state)
        outcomes[name] = after, again
    return outcomes


def goes_on_from_one_process(name):
    """Two steps in one process, whose state is loaded by several, and another step."""
    values, _, optimizer = searched_alone(name, 1, steps=2)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    args = name, {}, assembled, lambda v: divided(v, mesh)
    return searched_together(values, *args, state=saved(optimizer.state_dict()))[1]


def of_a_single_row():
    """A parameter of which but one process has anything; its state goes on in one, too."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    target = torch.arange(3.0, dtype=torch.float64)[None]
    p = nn.Parameter(divided(torch.zeros_like(target), mesh))
    optimizer = LBFGS([p], line_search_fn="armijo")

    def closure():
        difference = p.detach().full_tensor() - target
        p.grad = divided(2 * difference, mesh)
        return difference.square().sum()

    optimizer.step(closure)
    alone = LBFGS([nn.Parameter(torch.zeros_like(target))], line_search_fn="armijo")
    alone.load_state_dict(made_whole(optimizer.state_dict()))
    alone.load_state_dict(alone.state_dict())
    return p.detach().full_tensor() - target, alone.stats()["pairs"] == optimizer.stats()["pairs"]


def of_a_complex_number(options):
    """Whole parameters, of which one is a single complex number."""
    params = [
        nn.Parameter(torch.ones((), dtype=torch.complex128)),
        nn.Parameter(torch.ones(5, dtype=torch.float64)),
    ]
    optimizer = LBFGS(params, line_search_fn="strong_wolfe", max_iter=4, **options)

    def closure():
        optimizer.zero_grad()
        z, x = params
        loss = (z - (2 - 3j)).abs().pow(4) + (x * z.imag).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return [p.detach().clone() for p in params]


def failure_in_one_process():
    """A closure that fails in one process leaves none waiting; the next step goes on."""
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = LBFGS([p], lr=0.25, max_iter=4, state_sharding=dist.group.WORLD)
    evaluations = 0

    def closure():
        nonlocal evaluations
        evaluations += 1
        if evaluations == 3:
            raise ArithmeticError(dist.get_rank())
        p.grad = 2 * p.detach()
        return p.detach().square().sum()

    try:
        optimizer.step(closure)
    except ArithmeticError:
        optimizer.step(closure)
    return p.detach().clone(), evaluations
