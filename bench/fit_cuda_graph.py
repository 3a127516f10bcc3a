"""Solve an equation by LBFGS, with every step replayed from a CUDA graph.

    python bench/fit_cuda_graph.py [--steps N] [--look N] [--device cpu]

What capture asks for:

* Armijo's rule, the only search that is decided on the device, and with factors as many evaluations
  as a multiple of ``factor_interval``;
* gradients that stay where they are: they are zeroed, not dropped;
* the memory of all pairs, by ``reserve()``, and a step or two on a side stream before the capture.

A step captured holds evaluations of loss and gradient and the iterations that follow from them, the
first one at the iterate itself.  Once the search has stopped, it changes nothing any more; the host
looks at that every so many replays.  Without a GPU the same step is called.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import drop_in
import torch
from torch import Tensor

from adaqn_cuda import DETERMINISTIC, LBFGS

EVALUATIONS = 4 * 5  # of a step; a factor's basis is updated every fifth


class Solver:
    """The network of ``drop_in`` on a device, and a step of its fit."""

    def __init__(self, device: str, pairs: int) -> None:
        with torch.device(device):
            params, self.loss_of = drop_in.poisson()
        limits = {"max_iter": EVALUATIONS, "max_eval": EVALUATIONS}
        options = {**DETERMINISTIC, "history_size": pairs, **limits}
        self.optimizer = LBFGS(params, **options)
        self.optimizer.reserve()
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=False)
        loss = self.loss_of()
        loss.backward()
        return loss

    def step(self) -> None:
        """What a graph holds."""
        self.loss.copy_(self.optimizer.step(self.closure).detach())

    def is_done(self) -> bool:
        """Whether the search has ended before its evaluations did; waits for the device."""
        return self.optimizer.stats()["stopped"] not in ("max_iter", "max_eval")


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """``step``, called once on a side stream, as a graph that does it again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--look", type=int, default=20, help="steps between two looks")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    solver = Solver(options.device, options.pairs)
    on_gpu = torch.device(options.device).type == "cuda"
    step = capture(solver.step) if on_gpu else solver.step
    started = time.perf_counter()
    for done in range(1, options.steps + 1):
        step()
        if done % options.look == 0:
            stopped, seconds = solver.is_done(), time.perf_counter() - started
            print(f"step {done}: loss {solver.loss.item():.3e} after {seconds:.1f} s", flush=True)
            if stopped:
                break
    print(solver.optimizer.stats())
    return 0


if __name__ == "__main__":
    sys.exit(main())
