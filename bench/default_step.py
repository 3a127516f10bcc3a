"""Cost of a step of the default on the CPU, without its gradient, beside its peers.

    python bench/default_step.py [--output FILE] [--rounds N] [--models REGEX]

The optimizers of a model take turns, a round of ten steps each, on gradients of the sizes that
training has.  Rounds of the first steps, which find the bases, do not count.  The JSON file has
median, quartiles, mean and worst of the single steps, in milliseconds, and every optimizer's mean
over that of the default.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from experiments.language import TransformerLM
from experiments.peers import SOAP
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from adaqn_cuda import AdaQN, rnn_blocks
from adaqn_cuda.demo.models import RecurrentLM

#: Steps of a round: whole turns of all schedules.
ROUND, WARM_UP = 10, 2

MODELS: dict[str, Callable[[], nn.Module]] = {
    "LSTM of 128, 65 symbols": partial(RecurrentLM, "lstm", 65, 128, 1),
    "transformer of width 64": partial(TransformerLM, 65, 64, 4, 2, 64),
    "four linear layers of 768": lambda: nn.Sequential(*(nn.Linear(768, 768) for _ in range(4))),
}

#: SOAP's own averages and interval, and a factor for every side that the models have.
_SOAP = dict(betas=(0.95, 0.95), interval=10, max_side=4096)


def soap(model: nn.Module) -> Optimizer:
    return SOAP(model.parameters(), **_SOAP, blocks=rnn_blocks(model))


def adaqn(model: nn.Module, **options) -> Optimizer:
    return AdaQN(model.parameters(), blocks=rnn_blocks(model), fused=True, **options)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "default": adaqn,
    "blocks of 64": partial(adaqn, block_size=64),
    "normalized": partial(adaqn, normalize=True),
    "no factors": partial(adaqn, init="rmsprop"),
    "SOAP": soap,
    "Adam(foreach)": lambda model: torch.optim.Adam(model.parameters(), foreach=True),
    "Adam(fused)": lambda model: torch.optim.Adam(model.parameters(), fused=True),
}


class Clock:
    """An optimizer on a model of its own, and the milliseconds of its steps."""

    def __init__(self, model: nn.Module, make: Callable[[nn.Module], Optimizer]) -> None:
        self.params = list(model.parameters())
        generator = torch.Generator().manual_seed(0)
        self.gradients = [
            [0.01 * torch.randn(p.shape, generator=generator) for p in self.params]
            for _ in range(ROUND)
        ]
        self.optimizer = make(model)
        self.times: list[float] = []

    def round(self) -> None:
        for gradients in self.gradients:
            for p, g in zip(self.params, gradients, strict=True):
                p.grad = g
            begun = perf_counter()
            self.optimizer.step()
            self.times.append(1e3 * (perf_counter() - begun))


def measure(name: str, rounds: int) -> list[dict]:
    clocks = {key: Clock(MODELS[name](), make) for key, make in OPTIMIZERS.items()}
    for _ in tqdm(range(WARM_UP + rounds), name):
        for clock in clocks.values():
            clock.round()
    times = {key: clock.times[WARM_UP * ROUND :] for key, clock in clocks.items()}
    default = statistics.mean(times["default"])
    return [
        {
            "model": name,
            "optimizer": key,
            "quartiles": [round(q, 4) for q in statistics.quantiles(own, n=4)],
            "mean": round(statistics.mean(own), 4),
            "worst": round(max(own), 4),
            "mean_over_default": round(statistics.mean(own) / default, 3),
        }
        for key, own in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=folder / "default-step.json")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--models", type=re.compile, default=re.compile(""), metavar="REGEX")
    options = parser.parse_args()
    chosen = [name for name in MODELS if options.models.search(name)]
    records = [record for name in chosen for record in measure(name, options.rounds)]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    result = {
        "command": f"python bench/default_step.py --rounds {options.rounds}",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit.stdout.strip(),
        "versions": {"torch": torch.__version__},
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "steps": records,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print("| model | optimizer | median ms | mean | worst | mean over the default's |")
    print("|---|---|---|---|---|---|")
    for r in records:
        figures = f"{r['quartiles'][1]:.3g} | {r['mean']:.3g} | {r['worst']:.3g}"
        print(f"| {r['model']} | {r['optimizer']} | {figures} | {r['mean_over_default']:.2f} |")


if __name__ == "__main__":
    main()
