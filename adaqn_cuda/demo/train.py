"""The training loop, callable from Python: :class:`Config` in, :class:`Result` out."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import AdaQN
from . import checkpoint, divided
from .data import Batches, Corpus, DataError
from .models import STATELESS, Hidden, RecurrentLM, detach, loss_of, map_hidden
from .optimizers import PRESETS, default_lr, make_optimizer
from .processes import Alone, own_device

#: Symbols of the validation text that an evaluation looks at.
VALID_SYMBOLS = 50_000
#: Warm-up in parts of the steps.
WARMUP_SHARE = 0.05
#: Training stops when the loss has not been finite for this many steps on end.
PATIENCE = 50


@dataclass(frozen=True)
class Config:
    """Everything that determines a run, apart from the data and where results go."""

    model: str = "lstm"
    optimizer: str = "adaqn"
    level: str = "char"
    data: str | None = None
    vocab: int = 10_000
    steps: int = 1500
    batch: int = 32
    bptt: int = 32
    hidden: int = 256
    layers: int = 1
    lr: float | None = None
    schedule: str = "linear"
    warmup: int | None = None
    clip: float = 1.0
    seed: int = 0
    device: str = "cpu"
    preset: str = "default"
    monitor: int = 0
    adaqn: dict[str, Any] = field(default_factory=dict)
    fsdp: bool = False
    shard_state: bool = False

    @property
    def rate(self) -> float:
        """Peak lr."""
        return default_lr(self.optimizer, self.model) if self.lr is None else self.lr

    @property
    def divided(self) -> bool:
        """Whether every process has a part of the optimizer's state only."""
        return self.fsdp or self.shard_state

    @property
    def warmup_steps(self) -> int:
        """Steps until lr is at its peak."""
        return math.ceil(WARMUP_SHARE * self.steps) if self.warmup is None else self.warmup


@dataclass
class Result:
    """What a run leaves behind.

    Args:
        config: what was run.
        data: name of the corpus.
        vocabulary: its number of symbols.
        parameters: scalars in the model.
        curve: one record per evaluation: step, seconds, train and valid loss in nats.
        train, valid: final losses, nats per symbol.
        seconds: wall time of the training steps.
        optimizer_share: part of it spent in the optimizer's step.
        stats: the optimizer's own, for adaqn.
        processes: how many shared the work.
    """

    config: dict[str, Any]
    data: str
    vocabulary: int
    parameters: int
    curve: list[dict[str, float]] = field(default_factory=list)
    train: float = math.nan
    valid: float = math.nan
    seconds: float = 0.0
    optimizer_share: float = 0.0
    stats: dict[str, Any] = field(default_factory=dict)
    processes: int = 1

    def summary(self) -> dict[str, float]:
        """The validation loss as people quote it."""
        if self.config["level"] == "char":
            return {"bits_per_character": self.valid / math.log(2)}
        return {"perplexity": math.exp(min(self.valid, 700))}

    def record(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {**asdict(self), **self.summary()}


class Run:
    """A training run that can be stopped and resumed between any two steps.

    Args:
        config: what to run.
        corpus: the data.
        on_step: called after every step with the run, for progress bars.
        processes: those that make the run together; with the same batches, the losses are those of
            one process up to rounding, and up to where matrices are cut that are divided.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        on_step: Callable[[Run], None] | None = None,
        processes: Alone | None = None,
    ) -> None:
        self.config, self.corpus, self.on_step = config, corpus, on_step
        self.processes = processes or Alone()
        self.device = torch.device(own_device(config.device))
        torch.manual_seed(config.seed)
        vocabulary = len(corpus.vocabulary)
        self.model = self._make_model(vocabulary)
        self.parallel = self.processes.parallel(self.model, config.fsdp)
        self.batches = Batches(corpus.train, config.batch, config.bptt, "training text")
        valid_streams = min(config.batch, max(1, len(corpus.valid) // (4 * config.bptt)))
        self.valid = Batches(
            corpus.valid, valid_streams, config.bptt, "validation text", "lower --bptt"
        )
        if valid_streams < self.processes.count:
            raise DataError(
                f"the validation text has {len(corpus.valid):,} symbols, too few for "
                f"{self.processes.count} processes; lower --bptt, or start fewer"
            )
        self.optimizer = self._make_optimizer()
        if config.monitor:
            self._watch(config.monitor)
        self.hidden: Hidden = None
        self.step, self.train_loss, self.seconds, self.optimizer_seconds = 0, math.nan, 0.0, 0.0
        self.recent: deque[float] = deque(maxlen=100)
        numel = sum(p.numel() for p in self.model.parameters())
        self.result = Result(
            asdict(config), corpus.name, vocabulary, numel, processes=self.processes.count
        )

    def _make_model(self, vocabulary: int) -> RecurrentLM:
        config = self.config
        try:
            model = RecurrentLM(config.model, vocabulary, config.hidden, config.layers)
            return model.to(self.device)
        except (RuntimeError, MemoryError, TypeError) as error:  # sizes that nothing can hold
            reason = str(error).splitlines()[0]
            raise DataError(
                f"--hidden {config.hidden}, --layers {config.layers}: no room for such a model; "
                f"lower one of them ({reason})"
            ) from error

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        options = {**PRESETS[config.preset], **config.adaqn}
        if config.shard_state:
            options["state_sharding"] = self.processes.group
        try:
            return make_optimizer(config.optimizer, self.model, config.rate, options)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"--optimizer {config.optimizer}: {error}") from error

    # ------------------------------------------------------------------ training

    def train(
        self, save: Path | None = None, save_every: int = 100, evaluate_every: int | None = None
    ) -> Result:
        """Run to the last step, or until the loss has not been finite for :data:`PATIENCE` steps.

        Args:
            save: checkpoint file, written every ``save_every`` steps and at the end.
            save_every: steps between two checkpoints.
            evaluate_every: steps between two looks at the validation loss; a fifteenth of the run
                if ``None``.
        """
        every = evaluate_every or max(1, self.config.steps // 15)
        bad = 0
        if self.step == 0:
            self._record()
        while self.step < self.config.steps:
            self._step()
            bad = 0 if math.isfinite(self.train_loss) else bad + 1
            if bad >= PATIENCE:
                return self.finish()
            if self.step % every == 0 and self.step < self.config.steps:
                self._record()
            if save is not None and self.step % save_every == 0:
                self.save(save)
            if self.on_step is not None:
                self.on_step(self)
        self.finish()
        if save is not None:
            self.save(save)
        return self.result

    def _step(self) -> None:
        began = time.perf_counter()
        if self.batches.at_start():
            self.hidden = None
        inputs, targets = self._next_of(self.batches)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate * self._schedule()
        if self.config.optimizer == "lbfgs":
            loss, spent = self._step_with_closure(inputs, targets)
        else:
            loss, spent = self._step_once(inputs, targets)
        self.train_loss = float(loss)
        self.recent.append(self.train_loss)
        self.step += 1
        self.seconds += time.perf_counter() - began
        self.optimizer_seconds += spent

    def _next_of(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this process."""
        inputs, targets = (self.processes.own(t).to(self.device) for t in batches.next())
        return inputs, targets

    def _schedule(self) -> float:
        """Factor on the lr of the next step: warm-up, then constant or down to zero."""
        config, done = self.config, self.step
        warm = min(1.0, (done + 1) / max(1, config.warmup_steps))
        left = 1 - done / config.steps
        shape = {
            "constant": 1.0,
            "linear": left,
            "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))),
        }
        return warm * shape[config.schedule]

    def _backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        logits, hidden = self.parallel(inputs, self.hidden)
        loss = loss_of(logits, targets)
        loss.backward()
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self._next_hidden = self._carried(hidden)
        return self.processes.total(loss.detach() / self.processes.count)

    def _carried(self, hidden: Hidden) -> Hidden:
        """The state that the next stretch of text starts from."""
        return None if self.config.model in STATELESS else detach(hidden)

    def _step_once(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        loss = self._backward(inputs, targets)
        spent = self._timed(self.optimizer.step)
        self.hidden = self._next_hidden
        return loss, spent

    def _step_with_closure(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        """L-BFGS evaluates the closure itself; its share leaves those evaluations out."""
        spent, losses = 0.0, []

        def closure() -> Tensor:
            nonlocal spent
            began = time.perf_counter()
            losses.append(self._backward(inputs, targets))
            spent += time.perf_counter() - began
            return losses[-1]

        # torch says that closures return floats, and takes tensors.
        optimizer: Any = self.optimizer
        total = self._timed(lambda: optimizer.step(closure))
        self.hidden = self._next_hidden
        return losses[0], total - spent

    def _timed(self, call: Callable[[], Any]) -> float:
        """Seconds of ``call`` on the device.

        On a GPU one call in 50 is timed, with synchronisation, and stands for all of them; not the
        first, which warms up.
        """
        sampled = self.device.type == "cpu" or self.step % 50 == 25
        if not sampled:
            call()
            return 0.0
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        began = time.perf_counter()
        call()
        if self.device.type == "cpu":
            return time.perf_counter() - began
        torch.accelerator.synchronize(self.device)
        return 50 * (time.perf_counter() - began)

    def status(self) -> str:
        """For progress bars."""
        share = self.optimizer_seconds / max(self.seconds, 1e-9)
        parts = [f"loss {self.train_loss:.3f}", f"optimizer {share:.0%}"]
        if isinstance(self.optimizer, AdaQN):
            stats = self.optimizer.stats()
            counts = "/".join(str(stats[name]) for name in ("stored", "skipped", "resets"))
            parts.append(f"stored/skipped/resets {counts}")
        return ", ".join(parts)

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self) -> float:
        """Validation loss, nats per symbol, over :data:`VALID_SYMBOLS` symbols from the start."""
        self.model.eval()
        self.valid.position, hidden, total = 0, None, 0.0
        per_batch = self.valid.bptt * self.valid.inputs.shape[1]
        count = max(1, min(len(self.valid), VALID_SYMBOLS // per_batch))
        for _ in range(count):
            inputs, targets = self._next_of(self.valid)
            logits, hidden = self.model(inputs, self._carried(hidden))
            total += float(loss_of(logits, targets))
        self.model.train()
        share = inputs.shape[1] / self.valid.inputs.shape[1]
        return float(sum(self.processes.every(total * share))) / count

    def _watch(self, sequences: int) -> None:
        """Hold ``sequences`` stretches of the training text fixed and monitor the loss on them."""
        if not isinstance(self.optimizer, AdaQN):
            raise DataError("--monitor is for --optimizer adaqn only")
        if self.optimizer.defaults["history_size"] == 0:
            raise DataError(
                "--monitor is looked at when curvature pairs are tried; add --preset pairs, "
                "--preset paper or --history-size"
            )
        fixed = Batches(
            self.corpus.train,
            sequences,
            self.config.bptt,
            "training text",
            "lower --monitor or --bptt",
        ).next()
        inputs, targets = (t.to(self.device) for t in fixed)

        def monitor() -> Tensor:
            self.model.eval()
            loss = loss_of(self.model(inputs)[0], targets)
            self.model.train()
            return loss

        self.optimizer.monitor = monitor

    def _record(self) -> None:
        self.result.curve.append(
            {
                "step": self.step,
                "seconds": self.seconds,
                "train": self._recent_loss(),
                "valid": self.evaluate(),
            }
        )

    def _recent_loss(self) -> float:
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    def finish(self) -> Result:
        """The result as of this step, be it the last one or not."""
        result = self.result
        if not result.curve or result.curve[-1]["step"] != self.step:
            self._record()  # a finished run, resumed, has this record already
        result.train, result.valid = (result.curve[-1][name] for name in ("train", "valid"))
        result.seconds = self.seconds
        result.optimizer_share = self.optimizer_seconds / max(self.seconds, 1e-9)
        if isinstance(self.optimizer, AdaQN):
            result.stats = self.optimizer.stats()
        return result

    # ------------------------------------------------------------------ checkpoints

    def save(self, path: Path) -> None:
        """Write a checkpoint, for which all processes tell the first one what they have."""
        content = self.state_dict()
        if self.processes.first:
            checkpoint.save(path, content)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, in all processes."""
        optimizer: Any = self.optimizer.state_dict()
        if self.config.divided:
            optimizer = divided.parts_of_all(optimizer, self.processes)
        return {
            "config": asdict(self.config),
            "fingerprint": self.corpus.fingerprint,
            "model": divided.whole_parameters(self.model),
            "optimizer": optimizer,
            "hidden": map_hidden(self.processes.all_streams, self.hidden),
            "step": self.step,
            "position": self.batches.position,
            "recent": list(self.recent),
            "curve": self.result.curve,
            "seconds": [self.seconds, self.optimizer_seconds],
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            DataError: it was saved by another configuration or with other data.
        """
        mine = asdict(self.config)
        del mine["data"]  # the fingerprint tells, also when the file has moved
        differing = sorted(k for k in mine if mine[k] != saved["config"].get(k))
        if differing:
            told = ", ".join(f"{k}: {saved['config'].get(k)} -> {mine[k]}" for k in differing)
            raise DataError(f"--resume: the checkpoint was made with other options ({told})")
        if saved["fingerprint"] != self.corpus.fingerprint:
            raise DataError("--resume: the checkpoint was made with other data")
        optimizer = saved["optimizer"]
        if self.config.divided:
            optimizer = divided.own_parts(optimizer, self.model, self.processes)
        divided.load_parameters(self.model, saved["model"])
        self.optimizer.load_state_dict(optimizer)
        self.hidden = map_hidden(self.processes.own, saved["hidden"])
        self.step = saved["step"]
        self.batches.position = saved["position"]
        self.recent.extend(saved["recent"])
        self.result.curve = saved["curve"]
        self.seconds, self.optimizer_seconds = saved["seconds"]
        torch.set_rng_state(saved["random"].cpu())
