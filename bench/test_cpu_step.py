"""Cost of one step on the CPU, by size and history, against other optimizers and the byte floor.

    pytest bench/test_cpu_step.py --benchmark-json=cpu-step.json
    pytest bench/test_cpu_step.py -k "10-10000000"

The floor is the bytes that a step must move over the bandwidth of a copy measured in the same run:
12 m + 44 per scalar parameter (6 m + 44 with bfloat16 pairs) in the paper's setting, 16 more with
momentum and the cap on the direction, and 32 without pairs but with momentum.  It goes with every
result into the JSON file, as ``floor`` and ``ratio``, and into the table printed at the end.  All
sizes come in 20 tensors, and 30,000 parameters in 300, too, where the cost is that of the calls;
gradients are random, and the pairs are put into the state by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import pytest
import torch

from adaqn_cuda import PAPER, AdaQN
from adaqn_cuda.state.layout import Counter

TENSORS, MANY_TENSORS = 20, 300
SIZES = [10_000, 100_000, 1_000_000, 10_000_000]
HISTORIES = [5, 10, 20]
Step = Callable[[], object]


def parameters(d: int, tensors: int = TENSORS) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(d // tensors, generator=generator)) for _ in range(tensors)
    ]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def pairs(d: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (s, y) of a diagonal matrix."""
    generator = torch.Generator().manual_seed(1)
    s = torch.randn(count, d, generator=generator)
    return s, s * (0.5 + torch.rand(d, generator=generator))


def adaqn(d: int, m: int, **options) -> Step:
    """A step of the optimizer with a full history and no pair update in sight."""
    options = {"history_size": m, "fisher_size": 1, "update_interval": 10**9, **options}
    optimizer = AdaQN(parameters(d), **{**PAPER, "lr": 1e-6, **options})
    optimizer.step()
    state = optimizer._arena
    s, y = pairs(d, m + 1)
    state.s_ring.copy_(s)
    state.y_ring.copy_(y)
    state.gram[: m + 1] = (s @ y.T).double()
    state.gram[m + 1] = y.square().sum(1, dtype=torch.float64)
    state.counters[Counter.PAIRS] = m
    return optimizer.step


def lbfgs_direction(d: int, m: int) -> Step:
    """What torch.optim.LBFGS does for a direction, once it has its flat vectors."""
    s, y = (list(rows) for rows in pairs(d, m))
    rho = [1.0 / torch.dot(a, b) for a, b in zip(s, y, strict=True)]
    g = torch.randn(d, generator=torch.Generator().manual_seed(2))

    def direction() -> torch.Tensor:
        q, alphas = g.neg(), [None] * m
        for i in reversed(range(m)):
            alphas[i] = s[i].dot(q) * rho[i]
            q.add_(y[i], alpha=-alphas[i])
        r = q.mul(0.5)
        for i in range(m):
            beta = y[i].dot(r) * rho[i]
            r.add_(s[i], alpha=alphas[i] - beta)
        return r

    return direction


SAFEGUARDS = {"momentum": 0.9, "bias_correction": True, "max_direction": 1.0}
#: Bytes per scalar parameter that a step with m pairs must move.
FLOORS: dict[str, Callable[[int], int]] = {
    "adaqn": lambda m: 12 * m + 44,
    "adaqn bfloat16": lambda m: 6 * m + 44,
    "adaqn safeguards": lambda m: 12 * m + 60,
    "adaqn without pairs": lambda m: 32,
}

WITH_HISTORY: dict[str, Callable[[int, int], Step]] = {
    "adaqn": lambda d, m: adaqn(d, m, fused=True),
    "adaqn bfloat16": lambda d, m: adaqn(d, m, fused=True, history_dtype=torch.bfloat16),
    "adaqn safeguards": lambda d, m: adaqn(d, m, fused=True, **SAFEGUARDS),
    "adaqn reference": lambda d, m: adaqn(d, m, fused=False),
    "LBFGS direction": lbfgs_direction,
}
FIRST_ORDER: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "adaqn without pairs": lambda p: AdaQN(p, init="rmsprop", history_size=0, fused=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, foreach=True),
}


@pytest.fixture(scope="module")
def bandwidth() -> float:
    """Bytes per second of a copy between vectors that no cache holds, read and write counted."""
    source = torch.randn(50_000_000)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start = perf_counter()
        target.copy_(source)
        times.append(perf_counter() - start)
    return 2 * source.numel() * source.element_size() / median(times)


@pytest.fixture(scope="module")
def table(bandwidth):
    """Rows for the end of the run: (d, m, name, median, interquartile range, floor or None)."""
    rows: list[tuple[int, int | None, str, float, float, float | None]] = []
    yield rows
    print(f"\n\ncopy {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads\n")
    print("| d | m | step of | median ms | IQR ms | over the byte floor |")
    print("|---|---|---|---|---|---|")
    for d, m, name, seconds, iqr, floor in sorted(rows, key=lambda row: (row[0], row[1] or 0)):
        ratio = "" if floor is None else f"{seconds / floor:.2f}"
        times = f"{seconds * 1e3:.3f} | {iqr * 1e3:.3f}"
        print(f"| {d:.0e} | {m or ''} | {name} | {times} | {ratio} |")


def measure(benchmark, step: Step, d: int) -> tuple[float, float]:
    """Median and interquartile range of a step's seconds over many rounds."""
    rounds = max(9, min(1000, 20_000_000 // d))
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=3)
    return benchmark.stats.stats.median, benchmark.stats.stats.iqr


def floor_of(
    benchmark, bandwidth: float, name: str, seconds: float, d: int, m: int
) -> float | None:
    """Seconds that the bytes of a step take at the bandwidth of a copy, where they are counted."""
    if name not in FLOORS:
        return None
    floor = FLOORS[name](m) * d / bandwidth
    benchmark.extra_info.update(floor=floor, ratio=seconds / floor, bandwidth=bandwidth)
    return floor


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("m", HISTORIES)
@pytest.mark.parametrize("name", WITH_HISTORY)
def test_with_history(benchmark, bandwidth, table, name, m, d):
    seconds, iqr = measure(benchmark, WITH_HISTORY[name](d, m), d)
    table.append((d, m, name, seconds, iqr, floor_of(benchmark, bandwidth, name, seconds, d, m)))


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_order(benchmark, bandwidth, table, name, d):
    seconds, iqr = measure(benchmark, FIRST_ORDER[name](parameters(d)).step, d)
    table.append((d, None, name, seconds, iqr, floor_of(benchmark, bandwidth, name, seconds, d, 0)))


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_many_tensors(benchmark, table, name):
    d = 100 * MANY_TENSORS
    benchmark.extra_info.update(d=d, tensors=MANY_TENSORS)
    seconds, iqr = measure(benchmark, FIRST_ORDER[name](parameters(d, MANY_TENSORS)).step, d)
    table.append((d, None, f"{name}, {MANY_TENSORS} tensors", seconds, iqr, None))
