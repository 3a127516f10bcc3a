"""Cost of an optimizer step on a GPU, against its byte floor and other optimizers.

    python bench/gpu_step.py [--output FILE] [--budget SECONDS] [--cases REGEX] [--optimizers REGEX]
    python bench/gpu_step.py --dry-run      # tiny sizes on the CPU: proves this script's logic

Writes one JSON file: device, versions, date and commit, the copy bandwidth measured in this run,
and a list of records.  A record's ``mode`` reads ``how/which step/which clock``:

* how: ``eager`` or ``graph`` (CUDA graph replay);
* which step: ``plain``, ``pair-update`` (every L-th), ``amortised`` over L steps, or ``period``:
  the average of as many successive ones as the schedule of factors repeats itself after, of which
  ``worst_to_median`` compares the dearest with the others;
* which clock: ``device`` (between two events, the queue filled beforehand) or ``wall``.

``floor_us`` is what the step's unavoidable bytes take at the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from adaqn_cuda import LBFGS, PAPER, AdaQN, __version__
from adaqn_cuda.demo.models import RecurrentLM, loss_of
from adaqn_cuda.reference import kronecker
from adaqn_cuda.state.layout import Counter

FISHER_SIZE, INTERVAL = 32, 10
RESULTS = Path(__file__).parent / "results"


# --------------------------------------------------------------------------- what is measured


def resnet50() -> list[tuple[int, ...]]:
    """Shapes of a ResNet-50: convolutions, their normalisations, a linear layer."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            kernels = [(width, width_in, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                kernels.append((4 * width, width_in, 1, 1))
            for kernel in kernels:
                shapes += [kernel, (kernel[0],), (kernel[0],)]
            width_in = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def vit_b() -> list[tuple[int, ...]]:
    """Shapes of a ViT-B/16."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,)]
    block += [(d, 4 * d), (d,)]
    return [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,), *block * 12, (d,), (d,), (1000, d)]


def shapes_of(model: torch.nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in model.parameters()]


def language_models() -> dict[str, tuple[Callable[[], RecurrentLM], int, int, int]]:
    """Models to train, with vocabulary, steps and batch."""
    return {
        "demo LSTM": (partial(RecurrentLM, "lstm", 128, 256, 1), 128, 32, 32),
        "Zaremba medium LSTM": (partial(RecurrentLM, "lstm", 10_000, 650, 2), 10_000, 35, 20),
    }


def cases(tiny: bool) -> dict[str, list[tuple[int, ...]]]:
    """Parameter shapes by name of the case."""
    if tiny:
        return {"5 tiny tensors": [(7, 2)] * 5}
    rows = {f"flat 1e{n}": [(10**n,)] for n in range(4, 9)}
    rows["1e6 in 64 tensors"] = [(15_625,)] * 64
    rows["1e7 in 300 tensors"] = [(128, 256), (128,)] * 150 + [(256, 128)] * 150
    rows.update((name, shapes_of(model())) for name, (model, *_) in language_models().items())
    return {**rows, "ResNet-50": resnet50(), "ViT-B": vit_b(), "3 000 tiny tensors": [(33,)] * 3000}


@dataclass
class Record:
    case: str
    optimizer: str
    d: int
    tensors: int
    history_size: int | None
    history_dtype: str | None
    mode: str
    us_median: float
    us_iqr: float
    floor_us: float
    ratio_to_floor: float
    launches: int | None
    host_syncs: int | None
    state_bytes: int
    worst_to_median: float | None = None


@dataclass
class Contender:
    """An optimizer to measure.

    Args:
        name: as in the records.
        make: optimizer for a list of parameters.
        bytes_of: bytes per element that a step of a kind ("plain", "pair-update") must move.
        history_size, history_dtype: for the records.
        prepare: fills the optimizer's memory, once.
        kinds: the steps to measure.
        warm_up: steps before that.
        graphs: whether to capture it, too.
        closure_for: the closure of a step on these parameters.
    """

    name: str
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    bytes_of: Callable[[str], float]
    history_size: int | None = None
    history_dtype: torch.dtype | None = None
    prepare: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None
    kinds: tuple[str, ...] = ("plain",)
    graphs: bool = False
    warm_up: int = 2
    closure_for: Callable[[list[torch.nn.Parameter]], Callable[[], torch.Tensor] | None] = (
        lambda params: None
    )


def adaqn_bytes(m: int, width: int, kind: str, momentum: bool = False, cap: bool = False) -> float:
    """Bytes per element, with pairs of ``width`` bytes: 12 m + 44 in float32, 6 m + 44 in bfloat16.

    Momentum is read and written once; with a cap on the direction, so is the direction once more.
    A pair update reads the gradients twice, w_sum and w_o twice, S and the momentum once; it writes
    s and y, moves the anchor and clears the sum.
    """
    plain = 3 * width * m + 44 + 8 * momentum + 8 * cap
    update = 2 * 4 * FISHER_SIZE + 16 + width * m + 2 * width + 12 + 4 * momentum
    return plain + (update if kind == "pair-update" else 0)


#: Without pairs: g read twice, v, m and w read and written once.
DIAGONAL_BYTES = 32
#: On the Kronecker matrix: g once more, for the factors; beside them and their bases.
KRONECKER_BYTES = 36


def fill_adaqn(optimizer: AdaQN) -> None:
    """A full history and Fisher ring, without the steps that would make them."""
    arena = optimizer._arena
    m = arena.sizes.history_size
    for ring in (arena.s_ring, arena.y_ring, arena.fisher):
        for row in ring:  # no temporary larger than a row
            row.copy_(torch.randn(row.shape, device=row.device) * max(row.numel(), 1) ** -0.5)
    arena.gram.copy_(torch.eye(m + 2, m + 1, dtype=torch.float64))
    arena.gram[m + 1] = 1.0
    arena.counters[Counter.PAIRS] = m
    arena.counters[Counter.GRADIENTS] = len(arena.fisher)
    arena.counters[Counter.ANCHORED] = 1


def fill_lbfgs(optimizer: torch.optim.LBFGS, m: int) -> None:
    state = optimizer.state[optimizer._params[0]]
    d = sum(p.numel() for p in optimizer._params)
    device = optimizer._params[0].device
    draw = partial(torch.randn, d, device=device)
    state["old_dirs"] = [draw() for _ in range(m)]
    state["old_stps"] = [draw() for _ in range(m)]
    state["ro"] = [torch.ones((), device=device) / d for _ in range(m)]
    state["al"] = [None] * m


def constant(loss: torch.Tensor, _: list[torch.nn.Parameter]) -> Callable[[], torch.Tensor]:
    """A closure that costs nothing."""
    return lambda: loss


def quadratic(params: list[torch.nn.Parameter]) -> Callable[[], torch.Tensor]:
    """A closure that costs two passes over the parameters, and of which steps yield pairs."""
    scales = [torch.rand_like(p) + 0.5 for p in params]

    @torch.no_grad()
    def closure() -> torch.Tensor:
        for p, g in zip(params, torch._foreach_mul(params, scales), strict=True):
            p.grad = g
        return sum((p * p.grad).sum() for p in params) / 2

    return closure


def contenders(device: str, histories: tuple[int, ...]) -> Iterator[Contender]:
    for m in histories:
        for dtype in (torch.float32, torch.bfloat16):
            options = {
                **PAPER, "lr": 1e-9, "history_size": m, "fisher_size": FISHER_SIZE,
                "update_interval": INTERVAL,
                "history_dtype": None if dtype == torch.float32 else dtype,
            }  # fmt: skip
            yield Contender(
                "AdaQN", partial(AdaQN, **options), partial(adaqn_bytes, m, dtype.itemsize), m,
                dtype, fill_adaqn, ("plain", "pair-update"), graphs=device == "cuda",
            )  # fmt: skip
    m = histories[len(histories) // 2]
    options = {**PAPER, "lr": 1e-9, "fisher_size": FISHER_SIZE, "update_interval": INTERVAL}
    options["history_size"] = m
    for name, more in (("momentum", {"momentum": 0.9}), ("cap", {"max_direction": 1.0})):
        yield Contender(
            f"AdaQN {name}", partial(AdaQN, **{**options, **more}),
            partial(adaqn_bytes, m, 4, **{name: True}), m, torch.float32, fill_adaqn,
            ("plain", "pair-update"), graphs=device == "cuda",
        )  # fmt: skip
    diagonal = {**options, "history_size": 0, "momentum": 0.9, "bias_correction": True}
    yield Contender(
        "AdaQN diagonal", partial(AdaQN, **diagonal), lambda _: DIAGONAL_BYTES, 0,
        graphs=device == "cuda",
    )  # fmt: skip
    defaults: dict[str, dict] = {
        "AdaQN default": {},
        "AdaQN, blocks of 64": {"block_size": 64},
        "AdaQN, normalized": {"normalize": True},
    }
    for name, changed in defaults.items():
        yield Contender(
            name, partial(AdaQN, lr=1e-9, **changed), lambda _: KRONECKER_BYTES, 0,
            kinds=("period",), graphs=device == "cuda",
        )  # fmt: skip
    yield Contender(
        "AdaQN reference", partial(AdaQN, fused=False, **options), partial(adaqn_bytes, m, 4), m,
        torch.float32, fill_adaqn, ("plain", "pair-update"),
    )  # fmt: skip
    o = torch.optim
    yield Contender("Adam foreach", partial(o.Adam, lr=1e-9, foreach=True), lambda _: 28)
    yield Contender("Adam fused", partial(o.Adam, lr=1e-9, fused=True), lambda _: 28)
    yield Contender("RMSprop", partial(o.RMSprop, lr=1e-9, foreach=True), lambda _: 20)
    yield Contender("Adagrad", partial(o.Adagrad, lr=1e-9, foreach=True), lambda _: 20)
    for m in histories:
        # The closure costs nothing; with these tolerances a step is one direction and one update.
        make = partial(
            o.LBFGS, lr=1e-12, max_iter=1, history_size=m, tolerance_grad=-1,
            tolerance_change=-1e30,
        )  # fmt: skip
        loss = torch.zeros((), device=device)
        yield Contender(
            "torch's LBFGS", make, lambda _, m=m: 40 * m, m, torch.float32,
            partial(fill_lbfgs, m=m), closure_for=partial(constant, loss),
        )  # fmt: skip
        # With the two evaluations of a step in it.
        yield Contender(
            "LBFGS", partial(LBFGS, lr=1e-3, max_iter=1, history_size=m),
            lambda _, m=m: 44 + 16 + 12 * m, m, torch.float32, closure_for=quadratic, warm_up=m + 2,
        )  # fmt: skip


# --------------------------------------------------------------------------- clocks


class Clock:
    """Times calls on a device, in microseconds per call."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def wall(self, call: Callable[[], object]) -> list[float]:
        call()
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        once = time.perf_counter() - start
        batch = max(1, min(50, int(self.seconds / 10 / max(once, 1e-7))))
        return [self._batch(call, batch) for _ in range(7)]

    def _batch(self, call: Callable[[], object], batch: int) -> float:
        start = time.perf_counter()
        for _ in range(batch):
            call()
        self.synchronize()
        return (time.perf_counter() - start) / batch * 1e6

    def on_device(self, call: Callable[[], object], wall_us: float) -> list[float]:
        """Between two events; the device sleeps until the host has queued the whole batch."""
        if self.device != "cuda":
            return self.wall(call)
        batch = max(1, min(50, int(self.seconds / 10 / (wall_us * 1e-6))))
        times = []
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(min(batch * wall_us * 2e-6, 0.1) * 2e9))  # at about 2 GHz
            start.record()
            for _ in range(batch):
                call()
            end.record()
            self.synchronize()
            times.append(start.elapsed_time(end) / batch * 1e3)
        return times

    def each(self, call: Callable[[], object], count: int) -> list[float]:
        """Times of ``count`` successive calls, medians over rounds of them."""
        rounds = []
        for _ in range(7):
            if self.device != "cuda":
                rounds.append([self._batch(call, 1) for _ in range(count)])
                continue
            events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            torch.cuda._sleep(int(0.05 * 2e9))  # until the host has queued them all
            events[0].record()
            for event in events[1:]:
                call()
                event.record()
            self.synchronize()
            pairs = zip(events[:-1], events[1:], strict=True)
            rounds.append([a.elapsed_time(b) * 1e3 for a, b in pairs])
        return [statistics.median(times) for times in zip(*rounds, strict=True)]


def copy_bandwidth(clock: Clock, tiny: bool) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    a = torch.empty(10**6 if tiny else 2**28, dtype=torch.float32, device=clock.device).normal_()
    b = torch.empty_like(a)
    wall = statistics.median(clock.wall(lambda: b.copy_(a)))
    us = statistics.median(clock.on_device(lambda: b.copy_(a), wall))
    return 2 * a.nbytes / us * 1e6


def launches_of(call: Callable[[], object], device: str) -> int | None:
    """Kernels, copies and fills that a call puts on the device."""
    if device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device for event in profiler.events())


def synchronisations_of(call: Callable[[], object], device: str) -> int | None:
    """How often a call waits for the device."""
    if device != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


# --------------------------------------------------------------------------- one cell


class Bench:
    def __init__(self, device: str, tiny: bool, budget: float) -> None:
        self.device, self.tiny = device, tiny
        self.clock = Clock(device, 0.002 if tiny else 0.15)
        self.deadline = time.monotonic() + budget
        self.bandwidth = copy_bandwidth(self.clock, tiny)
        self.records: list[Record] = []
        self.skipped: list[str] = []
        self.peak_bytes: dict[str, int] = {}

    def parameters(self, shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
        params = [torch.nn.Parameter(torch.randn(s, device=self.device)) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        return params

    def cell(self, case: str, shapes: list[tuple[int, ...]], contender: Contender) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        params = self.parameters(shapes)
        optimizer, closure = contender.make(params), contender.closure_for(params)
        turns, warm_up = 1, contender.warm_up
        if "period" in contender.kinds:
            turns = kronecker.turns(optimizer.param_groups[0]["factor_interval"])
            warm_up += kronecker.FIRST_CALLS
        for _ in range(warm_up):
            optimizer.step(closure)
        contender.prepare(optimizer)
        device_us, wall_us = {}, {}
        for kind in contender.kinds:
            step = partial(self.steps, optimizer, closure, kind, turns)
            device_us[kind], wall_us[kind] = self.both_clocks(step, turns)
            counts = launches_of(step, self.device), synchronisations_of(step, self.device)
            counts = tuple(n if n is None else round(n / turns) for n in counts)
            worst = self.worst(partial(optimizer.step, closure), turns) if turns > 1 else None
            for clock, times in (("device", device_us), ("wall", wall_us)):
                mode = f"eager/{kind}/{clock}"
                self.add(case, params, contender, optimizer, mode, times, counts, worst)
            if contender.graphs:
                self.graph(case, params, contender, optimizer, kind, step, turns)
        for clock, times in (("device", device_us), ("wall", wall_us)):
            if "pair-update" in times:
                self.add(case, params, contender, optimizer, f"eager/amortised/{clock}", times)
        if self.device == "cuda":
            name = f"{case}, {contender.name}, {contender.history_size}, {contender.history_dtype}"
            self.peak_bytes[name] = torch.cuda.max_memory_allocated()

    def both_clocks(
        self, steps: Callable[[], object], turns: int
    ) -> tuple[list[float], list[float]]:
        """Microseconds of one of the ``turns`` steps that a call makes."""
        wall = self.clock.wall(steps)
        device = self.clock.on_device(steps, statistics.median(wall))
        return [t / turns for t in device], [t / turns for t in wall]

    def worst(self, step: Callable[[], object], turns: int) -> float:
        """The dearest of ``turns`` successive steps, in medians of them."""
        times = self.clock.each(step, turns)
        return round(max(times) / statistics.median(times), 3)

    @staticmethod
    def steps(optimizer: torch.optim.Optimizer, closure, kind: str, turns: int) -> None:
        if isinstance(optimizer, AdaQN):
            optimizer.param_groups[0]["update_interval"] = 1 if kind == "pair-update" else 10**9
        for _ in range(turns):
            optimizer.step(closure)

    def graph(self, case, params, contender, optimizer, kind, step, turns) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        device, wall = self.both_clocks(graph.replay, turns)
        for clock, times in (("device", device), ("wall", wall)):
            mode = f"graph/{kind}/{clock}"
            self.add(case, params, contender, optimizer, mode, {kind: times}, (1, 0))

    def add(
        self, case, params, contender, optimizer, mode, times, counts=(None, None), worst=None
    ) -> None:
        _, kind, _ = mode.split("/")
        if kind == "amortised":
            pairs = zip(times["plain"], times["pair-update"], strict=True)
            samples = [((INTERVAL - 1) * a + b) / INTERVAL for a, b in pairs]
            plain, update = contender.bytes_of("plain"), contender.bytes_of("pair-update")
            size = ((INTERVAL - 1) * plain + update) / INTERVAL
        else:
            samples, size = times[kind], contender.bytes_of(kind)
        d = sum(p.numel() for p in params)
        quartiles = statistics.quantiles(samples, n=4)
        floor = d * size / self.bandwidth * 1e6
        median = statistics.median(samples)
        dtype = contender.history_dtype and str(contender.history_dtype).removeprefix("torch.")
        self.records.append(
            Record(
                case, contender.name, d, len(params), contender.history_size, dtype, mode,
                round(median, 3), round(quartiles[2] - quartiles[0], 3), round(floor, 3),
                round(median / floor, 3) if floor else 0.0, *counts, state_bytes(optimizer), worst,
            )
        )  # fmt: skip

    def run(self, rows: dict, columns: list[Contender]) -> None:
        total = len(rows) * len(columns)
        for index, (case, shapes) in enumerate(rows.items()):
            for offset, contender in enumerate(columns):
                label = f"{case}, {contender.name}"
                progress(index * len(columns) + offset, total, label)
                if time.monotonic() > self.deadline:
                    self.skipped.append(f"{label}: out of time")
                    continue
                try:
                    self.cell(case, shapes, contender)
                except torch.cuda.OutOfMemoryError:
                    self.skipped.append(f"{label}: does not fit into the device's memory")
        progress(total, total, "done")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    if isinstance(optimizer, (AdaQN, LBFGS)):
        return optimizer.stats()["state_bytes"]

    def tensors(value) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)

    return sum(t.nbytes for entry in optimizer.state.values() for t in tensors(entry))


def progress(done: int, total: int, label: str) -> None:
    if sys.stderr.isatty():
        bar = "#" * (30 * done // total)
        end = "\n" if done == total else ""
        print(f"\r[{bar:30}] {done}/{total} {label:50.50}", end=end, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------- training


def training_share(bench: Bench) -> list[dict]:
    """What part of a training step the optimizer takes, amortised over pair updates."""
    models = language_models()
    if bench.tiny:
        models = {"tiny LSTM": (partial(RecurrentLM, "lstm", 20, 8, 1), 20, 4, 2)}
    shares = []
    for name, (make, vocabulary, steps, batch) in models.items():
        model = make().to(bench.device)
        options = {**PAPER, "lr": 1e-6, "update_interval": INTERVAL}
        optimizer = AdaQN(model.parameters(), **options)
        symbols = torch.randint(vocabulary, (2, steps, batch), device=bench.device)

        def gradient(model=model, symbols=symbols) -> None:
            model.zero_grad()
            loss_of(model(symbols[0])[0], symbols[1]).backward()

        def interval(gradient=gradient, optimizer=optimizer) -> None:
            for _ in range(INTERVAL):
                gradient()
                optimizer.step()

        for _ in range(1 if bench.tiny else 12):  # a full history
            interval()
        without = statistics.median(bench.clock.wall(gradient))
        whole = statistics.median(bench.clock.wall(interval)) / INTERVAL
        shares.append({"model": name, "batch": batch, "step_us": whole, "gradient_us": without,
                       "optimizer_share": 1 - without / whole})  # fmt: skip
    return shares


# --------------------------------------------------------------------------- the report


def commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def report(bench: Bench, shares: list[dict]) -> dict:
    return {
        "device": device_name(bench.device),
        "versions": {"adaqn_cuda": __version__, "torch": torch.__version__,
                     "cuda": torch.version.cuda, "python": sys.version.split()[0]},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "dry_run": bench.tiny,
        "copy_bytes_per_second": round(bench.bandwidth),
        "fisher_size": FISHER_SIZE,
        "update_interval": INTERVAL,
        "records": [asdict(record) for record in bench.records],
        "training_share": shares,
        "peak_bytes": bench.peak_bytes,
        "skipped": bench.skipped,
    }  # fmt: skip


def table(bench: Bench) -> str:
    lines = [f"{'case':22}{'optimizer':17}{'m':>4} {'pairs':9}{'mode':28}{'us':>11}{'x floor':>9}"
             f"{'launches':>9}{'syncs':>6}"]  # fmt: skip
    for r in bench.records:
        if r.mode.endswith("/device") or "LBFGS" in r.optimizer:
            lines.append(
                f"{r.case:22}{r.optimizer:17}{r.history_size or '':>4} {r.history_dtype or '':9}"
                f"{r.mode:28}{r.us_median:11.1f}{r.ratio_to_floor:9.2f}"
                f"{'' if r.launches is None else r.launches:>9}"
                f"{'' if r.host_syncs is None else r.host_syncs:>6}"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--output", type=Path, help="default: bench/results/DEVICE-step.json")
    parser.add_argument("--budget", type=float, default=240, help="seconds (default: 240)")
    parser.add_argument("--cases", default="", help="only cases that match this regex")
    parser.add_argument("--optimizers", default="", help="only optimizers that match this regex")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run tries this script on the CPU")
    device = "cpu" if options.dry_run else "cuda"
    warnings.filterwarnings("ignore", message="AdaQN.step.. is being captured")
    bench = Bench(device, options.dry_run, options.budget)
    rows = {name: s for name, s in cases(bench.tiny).items() if re.search(options.cases, name)}
    columns = [
        c
        for c in contenders(device, (2,) if bench.tiny else (5, 10, 20))
        if re.search(options.optimizers, c.name)
    ]
    bench.run(rows, columns)
    result = report(bench, training_share(bench))
    print(table(bench))
    for share in result["training_share"]:
        print(f"{share['model']}: {share['optimizer_share']:.1%} of a training step")
    for line in bench.skipped:
        print("skipped:", line)
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = options.output or RESULTS / f"{slug.removeprefix('nvidia-')}-step.json"
    if options.dry_run and not options.output:
        print("dry run: nothing written")
        return 0
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
