"""Optimizers on parameters that are divided among processes, and the same in one process.

A process computes the gradient of all parameters, and takes its rows of it: so that both runs see
the same numbers, whatever the collectives of a model do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from adaqn_cuda import PAPER, AdaQN

#: Steps of some cases; of the others there are 24.
STEPS = {"default": 200, "pairs": 200, "of the paper": 50, "outlier": 50, "pairs, outlier": 50}
PAIRS = dict(history_size=4, fisher_size=5, update_interval=3)


@dataclass(frozen=True)
class Case:
    """An optimizer, and what its gradients are like.

    Args:
        options: of the optimizer.
        spoil: called with the number of the step and the gradients, which it may change.
        monitored: whether there is a monitored loss.
        last: options of the last three parameters, which are a group of their own.
    """

    options: dict = field(default_factory=dict)
    spoil: Callable | None = None
    monitored: bool = False
    last: dict = field(default_factory=dict)

    def optimizer(self, params, **more):
        groups = [{"params": params[:3]}, {"params": params[3:], **self.last}]
        return AdaQN(groups, **self.options, **more)


def one_is_not_finite(step, grads):
    if step in (10, 11, 20):
        grads[0][1, 2] = torch.nan


def some_are_missing(step, grads):
    if step % 7 == 3:
        grads[2] = grads[3] = None


def one_is_an_outlier(step, grads):
    if step == 40:
        for g in grads:
            g *= 1e6


def some_lead_astray(step, grads):
    if step // 25 % 2:
        for g in grads:
            g *= -1


CASES = {
    "default": Case(),
    "reference": Case(dict(fused=False)),
    "clipped": Case(dict(max_grad_norm=0.05, weight_decay=0.1)),
    "diagonal": Case(dict(init="rmsprop", momentum=0.0)),
    "sum of squares": Case(dict(init="adagrad", maximize=True, lr=1e-3)),
    "normalized": Case(
        dict(normalize=True, lr=2e-3, max_grad_norm=0.5), last={"lr": 1e-3, "weight_decay": 0.1}
    ),
    "normalized, scalar, reference": Case(
        dict(normalize=True, lr=2e-3, init="scalar", fused=False), some_are_missing
    ),
    "pairs": Case({**PAIRS, "init": "rmsprop"}),
    "pairs, reference": Case({**PAIRS, "init": "rmsprop", "fused": False}),
    "pairs on factors": Case({**PAIRS, "max_grad_norm": 0.5}),
    "pairs without a cap": Case({**PAIRS, "init": "rmsprop", "max_direction": float("inf")}),
    "pairs on a scalar": Case({**PAIRS, "init": "scalar", "lr": 0.1}),
    "of gradients": Case({**PAIRS, "init": "rmsprop", "curvature": "gradients"}),
    "of the paper": Case(
        {**PAPER, **PAIRS, "lr": 0.02, "max_increase": 1.001}, some_lead_astray, monitored=True
    ),
    "groups": Case({"max_grad_norm": 0.5}, last={"momentum": 0.5, "decay": 0.9, "lr": 0.1}),
    "pairs, groups": Case(
        {**PAIRS, "init": "rmsprop"}, last={"init": "adagrad", "momentum": 0.0, "lr": 0.1}
    ),
    "not finite": Case({}, one_is_not_finite),
    "pairs, not finite": Case({**PAIRS, "init": "rmsprop"}, one_is_not_finite),
    "outlier": Case({}, one_is_an_outlier),
    "pairs, outlier": Case(PAIRS, one_is_an_outlier),
    "missing": Case({}, some_are_missing),
    "pairs, missing": Case({**PAIRS, "init": "rmsprop"}, some_are_missing),
}  # fmt: skip


class Problem:
    """A small network, whose layers have fewer rows than there are processes, or uneven ones."""

    def __init__(self, device="cpu"):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 1)
        )
        self.model.to(device, torch.float64)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.start = [p.detach().clone() for p in self.model.parameters()]
        x = torch.randn(64, 6, dtype=torch.float64)
        y = (x[:, :1] * x[:, 1:2]).sin() + 0.1 * torch.randn(64, 1, dtype=torch.float64)
        self.data = x.to(device), y.to(device)

    def loss(self, values, rows=slice(None)):
        x, y = self.data
        out = torch.func.functional_call(
            self.model, dict(zip(self.names, values, strict=True)), (x[rows],)
        )
        return (out - y[rows]).square().mean()

    def gradients(self, values, step):
        values = [v.detach().requires_grad_() for v in values]
        first = 16 * (step % 4)
        return list(torch.autograd.grad(self.loss(values, slice(first, first + 16)), values))


@dataclass
class Outcome:
    """What a run leaves: the parameters as they are in the end, and the words of the state."""

    params: list
    words: dict
    stats: dict


def train(problem, optimizer, params, case, steps, whole, part):
    """Steps with the same gradients, however the parameters are divided.

    Args:
        whole: makes whole tensors of parameters.
        part: makes of a whole tensor what the optimizer takes.
    """
    if case.monitored:
        optimizer.monitor = lambda: problem.loss(whole(params))
    for step in steps:
        grads = problem.gradients(whole(params), step)
        if case.spoil is not None:
            case.spoil(step, grads)
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else part(g)
        optimizer.step()
    entry = next(iter(optimizer.state.values()))
    words = {k: entry[k].clone() for k in ("gram", "moments", "losses", "counters")}
    stats = optimizer.stats()
    stats.pop("state_bytes")
    return Outcome([w.clone() for w in whole(params)], words, stats)


def rows_of(n, count):
    """Rows of each shard that has any."""
    return [len(part) for part in torch.arange(n).chunk(count)]


def steps_of(name):
    return range(STEPS.get(name, 24))


def alone(name, count, device="cpu"):
    """The run of one process, whose matrices are cut as ``count`` shards cut them."""
    problem, case = Problem(device), CASES[name]
    params = [nn.Parameter(v.clone()) for v in problem.start]
    blocks = {p: rows_of(len(p), count) for p in params}
    optimizer = case.optimizer(params, blocks=blocks)
    return train(
        problem, optimizer, params, case, steps_of(name), lambda ps: [p.detach() for p in ps],
        lambda g: g,
    )  # fmt: skip


def with_divided_state(names):
    """The same, of processes that have whole parameters and some rows of the state."""
    outcomes = {}
    for name in names:
        problem, case = Problem(), CASES[name]
        params = [nn.Parameter(v.clone()) for v in problem.start]
        optimizer = case.optimizer(params, state_sharding=dist.group.WORLD)
        outcomes[name] = train(
            problem, optimizer, params, case, steps_of(name), lambda ps: [p.detach() for p in ps],
            lambda g: g,
        )  # fmt: skip
    return outcomes


def own_rows(whole):
    """The rows that this process has."""
    parts = whole.chunk(dist.get_world_size())
    return parts[dist.get_rank()] if dist.get_rank() < len(parts) else whole[:0]


def divided(whole, mesh):
    """A DTensor of which this process holds its rows."""
    return DTensor.from_local(
        own_rows(whole).clone(), mesh, [Shard(0)], run_check=False, shape=whole.shape,
        stride=whole.stride(),
    )  # fmt: skip


def assembled(params):
    """Whole tensors of divided ones, by one collective."""
    count = dist.get_world_size()
    rows = [[*map(len, torch.empty(p.shape).chunk(count)), *[0] * count][:count] for p in params]
    widths = [p.shape[1:].numel() for p in params]
    sizes = [[r[rank] * w for r, w in zip(rows, widths, strict=True)] for rank in range(count)]
    own = torch.zeros(max(map(sum, sizes)), dtype=torch.float64, device=params[0].device)
    flat = torch.cat([p.detach().to_local().flatten() for p in params])
    own[: len(flat)] = flat
    found = [torch.empty_like(own) for _ in range(count)]
    dist.all_gather(found, own)
    pieces = [f[: sum(s)].split(s) for f, s in zip(found, sizes, strict=True)]
    return [torch.cat(parts).view(p.shape) for p, *parts in zip(params, *pieces, strict=True)]


def together(names, device="cpu"):
    """The runs of cases by the processes of the default group."""
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
    outcomes = {}
    for name in names:
        problem, case = Problem(device), CASES[name]
        params = [nn.Parameter(divided(v, mesh)) for v in problem.start]
        optimizer = case.optimizer(params)
        outcomes[name] = train(
            problem, optimizer, params, case, steps_of(name), assembled,
            lambda g: divided(g, mesh),
        )  # fmt: skip
    return outcomes
