"""Options of AdaQN and LBFGS, alone and in pairs, as torch's tests take those of its optimizers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from math import inf
from typing import Any

import torch
from torch.optim import Optimizer

from adaqn_cuda import LBFGS, AdaQN
from adaqn_cuda.lbfgs import CHECKS as LBFGS_OPTIONS
from adaqn_cuda.options import CHECKS as ADAQN_OPTIONS

#: Values other than the defaults' of every option that changes what a step does.
ADAQN: dict[str, list[Any]] = {
    "lr": [0.02, torch.tensor(0.02)],
    "weight_decay": [0.1, torch.tensor(0.1)],
    "maximize": [True],
    "momentum": [0.0],
    "decay": [0.9],
    "eps": [1e-8],
    "bias_correction": [False],
    "max_grad_norm": [1.0],
    "normalize": [True],
    "init": ["rmsprop", "adagrad", "scalar"],
    "block_size": [3],
    "max_vector_dim": [4],
    "factor_interval": [1],
    "history_size": [3],
    "update_interval": [2],
    "fisher_size": [4],
    "curvature": ["gradients"],
    "min_curvature": [1e-6],
    "max_increase": [2.0],
    "damping": [0.0],
    "max_direction": [inf],
    "history_dtype": [torch.bfloat16],
    "fisher_dtype": [torch.bfloat16],
    "capturable": [False],
}
#: The same; line searches see few evaluations.
LBFGS_ALONE: dict[str, list[Any]] = {
    "lr": [0.5, torch.tensor(0.5)],
    "max_iter": [2],
    "max_eval": [3],
    "tolerance_grad": [1e-3],
    "tolerance_change": [1e-4],
    "history_size": [2],
    "line_search_fn": ["strong_wolfe", "armijo"],
    "init": ["kronecker", "rmsprop"],
    "self_scaled": [True],
    "min_curvature": [1e-8],
    "first_step": [0.01],
    "decay": [0.9],
    "eps": [1e-8],
    "block_size": [3],
    "factor_interval": [1],
    "maximize": [True],
    "history_dtype": [torch.bfloat16],
}
#: Curvature pairs, and the options that say something of them alone.
PAIRS = dict(history_size=3, update_interval=2)
OF_PAIRS = (
    "update_interval", "fisher_size", "curvature", "min_curvature", "max_increase", "damping",
    "max_direction", "history_dtype", "fisher_dtype",
)  # fmt: skip
#: Options of one kind go with none of the other.
OPPOSED = {"normalize"}, {"history_size", *OF_PAIRS}
#: Flags of which the suite sets one at a time by itself.
FLAGS = ("foreach", "fused", "differentiable")
assert set(ADAQN) == set(ADAQN_OPTIONS) - set(FLAGS)
assert set(LBFGS_ALONE) == set(LBFGS_OPTIONS) - set(FLAGS)


def text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor({value.item():g})"
    return str(value).removeprefix("torch.")


def alone(options: dict[str, list[Any]], **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """No option, and each value alone, with what ``more`` has for its option."""
    inputs: dict[str, dict[str, Any]] = {"default": {}}
    for name, values in options.items():
        for value in values:
            inputs[f"{name}={text(value)}"] = {**more.get(name, {}), name: value}
    return inputs


def every_pair(options: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Any two options that go together, with any of their values."""
    for one, other in combinations(options, 2):
        if all({one, other} & kind for kind in OPPOSED):
            continue
        for value, another in product(options[one], options[other]):
            yield {one: value, other: another}


def in_pairs(options: dict[str, list[Any]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Few inputs, with all options that go together, such that any two values meet in one."""
    draw, inputs = random.Random(seed), {}
    missing = {frozenset(p.items()) for p in every_pair(_places(options))}
    while missing:
        rows = [_drawn(options, draw) for _ in range(20)]
        met = [set(map(frozenset, combinations(row.items(), 2))) for row in rows]
        best = max(range(len(rows)), key=lambda k: len(met[k] & missing))
        missing -= met[best]
        inputs[f"pairs {len(inputs)}"] = {n: options[n][k] for n, k in rows[best].items()}
    return inputs


def _drawn(options: dict[str, list[Any]], draw: random.Random) -> dict[str, int]:
    """The place of a value for every option, but those of one kind."""
    without = draw.choice(OPPOSED)
    return {name: draw.randrange(len(own)) for name, own in options.items() if name not in without}


def _places(options: dict[str, list[Any]]) -> dict[str, list[int]]:
    return {name: list(range(len(own))) for name, own in options.items()}


@dataclass(frozen=True)
class Subject:
    """An optimizer under test.

    Args:
        make: its class.
        name: of its options.
        options: by name.
        fused: as of the optimizer.
        device: where the parameters are.
    """

    make: Callable[..., Optimizer]
    name: str
    options: dict[str, Any]
    fused: bool | None
    device: str = "cpu"

    @property
    def id(self) -> str:
        where = self.device if self.fused is None else "reference"
        return f"{self.make.__name__}-{self.name}-{where}"

    @property
    def needs_closure(self) -> bool:
        return self.make is LBFGS

    @property
    def maximizes(self) -> bool:
        return self.options.get("maximize", False)

    def own(self) -> dict[str, Any]:
        """The options; tensors among them are copies, which schedulers may change."""
        options = {**(dict(max_iter=4) if self.needs_closure else {}), **self.options}
        return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}

    def on(self, params: Any, **more: Any) -> Optimizer:
        return self.make(params, **{"fused": self.fused, **self.own(), **more})


INPUTS: dict[Callable[..., Optimizer], dict[str, dict[str, Any]]] = {
    AdaQN: {**alone(ADAQN, **dict.fromkeys(OF_PAIRS, PAIRS)), **in_pairs(ADAQN)},
    LBFGS: alone(LBFGS_ALONE),
}


def optimizer_info(make: Callable[..., Optimizer]) -> Any:
    """What torch's suite needs to know of an optimizer; takes seconds to import."""
    from torch.testing._internal import common_optimizers as suite

    def inputs(device: Any, dtype: Any = None) -> list[Any]:
        subjects = [Subject(make, name, own, None) for name, own in INPUTS[make].items()]
        return [
            suite.OptimizerInput(params=None, kwargs=subject.own(), desc=subject.name)
            for subject in subjects
        ]

    return suite.OptimizerInfo(
        make,
        optim_inputs_func=inputs,
        optim_error_inputs_func=suite.get_error_inputs_for_all_optims,
        supported_impls=("foreach", "fused") if make is AdaQN else ("fused",),
        supports_fused_on=("cpu", "cuda"),
        has_capturable_arg=make is AdaQN,
        step_requires_closure=make is LBFGS,
        supports_param_groups=make is AdaQN,
        supports_multiple_devices=False,
    )
