"""The command line: ``adaqn train`` and ``adaqn compare``."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..diagnosis import report
from ..options import INITS
from ..version import __version__
from . import checkpoint
from .data import DataError, load_corpus
from .interrupt import Interrupted, held_interrupts
from .models import KINDS
from .numbers import write_json
from .optimizers import NAMES, PRESETS
from .plots import PlotUnavailable, plot_comparison, plot_run
from .progress import Progress
from .train import Config, Diverged, Result, Run


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        print(report())
        return 0
    command = "adaqn " + shlex.join(arguments)
    try:
        return {"train": _train, "compare": _compare}[options.command](options, command)
    except DataError as error:
        print(f"adaqn {options.command}: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"adaqn {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"adaqn {options.command}: interrupted", file=sys.stderr)
        return 130


# --------------------------------------------------------------------------- arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {text}")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not (0 <= value < math.inf):
        raise argparse.ArgumentTypeError(f"expected a finite number >= 0, got {text}")
    return value


def _device(text: str) -> str:
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {reason}") from None
    return text


def _output(text: str) -> Path:
    path = Path(text)
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}: name a file in a writable folder")
    return path


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="adaqn", description="Train recurrent language models with adaQN and others."
    )
    parser.add_argument("--version", action="version", version=f"adaqn_cuda {__version__}")
    commands = parser.add_subparsers(dest="command")
    train = commands.add_parser("train", help="train one model", formatter_class=formatter)
    train.add_argument("--optimizer", choices=NAMES, default=Config.optimizer)
    train.add_argument("--lr", type=_rate, help="peak lr; default: one that suits the optimizer")
    train.add_argument("--plot", type=_output, default="adaqn-train.png", metavar="FILE.png")
    _add_task(train)
    group = train.add_argument_group("checkpoints")
    group.add_argument("--save", type=_output, metavar="FILE", help="write checkpoints here")
    group.add_argument("--save-every", type=_positive, default=100, metavar="STEPS")
    group.add_argument(
        "--resume", nargs="?", const="", metavar="FILE",
        help="continue from FILE, or from --save's file if it is there",
    )  # fmt: skip
    compare = commands.add_parser(
        "compare", help="several optimizers on the same seed and data", formatter_class=formatter
    )
    compare.add_argument("--optimizers", default="adaqn,adam,rmsprop,adagrad", metavar="A,B,...")
    compare.add_argument(
        "--lr", action="append", default=[], metavar="NAME=LR", help="peak lr of one optimizer"
    )
    compare.add_argument("--plot", type=_output, default="adaqn-compare.png", metavar="FILE.png")
    _add_task(compare)
    return parser


def _add_task(parser: argparse.ArgumentParser) -> None:
    task = parser.add_argument_group("task")
    task.add_argument("--model", choices=KINDS, default=Config.model)
    task.add_argument("--level", choices=("char", "word"), default=Config.level)
    task.add_argument(
        "--data", metavar="PATH",
        help="text file, or folder with train/valid/test files; default: Python's own sources",
    )  # fmt: skip
    for name in ("vocab", "steps", "batch", "bptt", "hidden", "layers"):
        task.add_argument(f"--{name}", type=_positive, default=getattr(Config, name))
    task.add_argument("--seed", type=_natural, default=Config.seed)
    task.add_argument("--device", type=_device, default=Config.device)
    rates = parser.add_argument_group("step length")
    rates.add_argument(
        "--schedule", choices=("constant", "linear", "cosine"), default=Config.schedule
    )
    rates.add_argument("--warmup", type=_natural, default=Config.warmup, metavar="STEPS")
    rates.add_argument("--clip", type=_rate, default=Config.clip, help="gradient norm; 0: off")
    adaqn = parser.add_argument_group("adaqn only")
    adaqn.add_argument("--preset", choices=tuple(PRESETS), default=Config.preset)
    adaqn.add_argument("--monitor", type=_natural, default=0, metavar="N",
                       help="monitor the loss on N fixed sequences; 0: off")  # fmt: skip
    adaqn.add_argument("--history-size", type=_natural, default=argparse.SUPPRESS)
    for name in ("fisher-size", "update-interval"):
        adaqn.add_argument(f"--{name}", type=_positive, default=argparse.SUPPRESS)
    adaqn.add_argument("--init", choices=INITS, default=argparse.SUPPRESS)
    adaqn.add_argument("--fused", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                       help="insist on native kernels, or on the reference")  # fmt: skip
    parser.add_argument("--json", type=_output, metavar="FILE", help="write the numbers here")


def _config(options: argparse.Namespace, **changes: Any) -> Config:
    names = ("history_size", "fisher_size", "update_interval", "init", "fused")
    adaqn = {name: getattr(options, name) for name in names if hasattr(options, name)}
    given = {f.name: getattr(options, f.name) for f in fields(Config) if hasattr(options, f.name)}
    return Config(**{**given, "adaqn": adaqn, **changes})


# --------------------------------------------------------------------------- commands


def _train(options: argparse.Namespace, command: str) -> int:
    corpus = load_corpus(options.data, options.level, options.vocab)
    run = Run(_config(options), corpus)
    _resume(options, run)
    _introduce(run)
    progress = Progress(options.optimizer, run.config.steps, run.step)
    try:
        with held_interrupts() as check:
            run.on_step = lambda run: (progress.update(run), check())
            result = run.train(options.save, options.save_every)
    except Interrupted:
        return _interrupted(options, run)
    finally:
        progress.close()
    print(_table([result]))
    _write(options, command, [result])
    _draw(lambda: plot_run(result, options.plot), options.plot)
    return 0


def _resume(options: argparse.Namespace, run: Run) -> None:
    if options.resume is None:
        return
    if options.resume == "" and options.save is None:
        raise DataError("--resume: name the checkpoint, or give --save as in the first run")
    path = Path(options.resume or options.save)
    if path.is_file():
        run.load_state_dict(checkpoint.load(path, run.device))
        print(f"resumed from {path} at step {run.step}")
    elif options.resume:
        raise DataError(f"--resume {path}: there is no such checkpoint")
    else:
        print(f"no checkpoint at {path} yet: starting afresh")


def _interrupted(options: argparse.Namespace, run: Run) -> int:
    print(f"interrupted at step {run.step}", file=sys.stderr)
    if options.save is not None:
        checkpoint.save(options.save, run.state_dict())
        print(
            f"saved to {options.save}; continue with the same command and --resume",
            file=sys.stderr,
        )
    return 130


def _compare(options: argparse.Namespace, command: str) -> int:
    names = options.optimizers.split(",")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise DataError(f"--optimizers: {', '.join(unknown)}: expected some of {', '.join(NAMES)}")
    rates = _rates_by_name(options.lr)
    corpus = load_corpus(options.data, options.level, options.vocab)
    results = []
    for name in names:
        monitor = options.monitor if name == "adaqn" else 0
        run = Run(_config(options, optimizer=name, lr=rates.get(name), monitor=monitor), corpus)
        if not results:
            _introduce(run)
        progress = Progress(name, run.config.steps)
        run.on_step = progress.update
        try:
            results.append(run.train())
        except Diverged as error:
            print(f"{name}: {error}", file=sys.stderr)
            results.append(run.result)
        progress.close()
    print(_table(results))
    _write(options, command, results)
    _draw(lambda: plot_comparison(results, options.plot), options.plot)
    return 0


def _rates_by_name(words: list[str]) -> dict[str, float]:
    rates = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            rates[name] = _rate(value)
        except (ValueError, argparse.ArgumentTypeError):
            raise DataError(f"--lr {word}: expected NAME=LR, as in adam=0.005") from None
        if name not in NAMES:
            raise DataError(f"--lr {word}: expected one of {', '.join(NAMES)}")
    return rates


# --------------------------------------------------------------------------- what people see


def _introduce(run: Run) -> None:
    corpus, result = run.corpus, run.result
    sizes = " / ".join(f"{len(part):,}" for part in (corpus.train, corpus.valid, corpus.test))
    print(
        f"data   {corpus.name}: {sizes} {corpus.level}s to train / validate / test, "
        f"vocabulary {result.vocabulary}, guessing is {math.log(result.vocabulary):.3f} nats"
    )
    print(f"model  {run.config.model}, {result.parameters:,} parameters, on {run.config.device}")


def _table(results: list[Result]) -> str:
    unit = next(iter(results[0].summary())).replace("_", " ")
    columns = f"{'train':>7} {'valid':>7} {unit:>18} {'time':>7} {'opt.':>5}"
    head = f"{'optimizer':10} {'lr':>8} {columns}"
    lines = [head, "-" * len(head)]
    for r in results:
        config = Config(**r.config)
        (value,) = r.summary().values()
        lines.append(
            f"{config.optimizer:10} {config.rate:8.4g} {r.train:7.3f} {r.valid:7.3f} {value:18.3f} "
            f"{r.seconds:6.1f}s {r.optimizer_share:5.0%}"
        )
        if r.stats:
            words = ("stored", "skipped", "resets", "steps_skipped", "state_bytes")
            lines.append("  " + ", ".join(f"{w.replace('_', ' ')} {r.stats[w]:,}" for w in words))
    return "\n".join(lines)


def _write(options: argparse.Namespace, command: str, results: list[Result]) -> None:
    if options.json is None:
        return
    versions = {"adaqn_cuda": __version__, "torch": torch.__version__}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    runs = [{**asdict(result), **result.summary()} for result in results]
    content = {"command": command, "date": date, "versions": versions, "runs": runs}
    write_json(options.json, content)


def _draw(draw: Any, path: Path) -> None:
    try:
        draw()
        print(f"picture {path}")
    except PlotUnavailable as error:
        print(error, file=sys.stderr)
