"""The command line: ``adaqn train``, ``compare``, ``fit`` and ``bench``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from ..diagnosis import report
from . import bench, checkpoint, fit
from .arguments import ADAQN_ONLY, ADAQN_OPTIONS, Options, flag, parser, rate
from .conflicts import refuse_conflicts, refuse_processes, refuse_shared_files
from .data import Corpus, DataError, load_corpus
from .interrupt import Interrupted, held_interrupts
from .optimizers import NAMES
from .plots import plot_bench, plot_comparison, plot_fit, plot_run
from .processes import Alone, Launch, joined
from .progress import Progress
from .report import (
    bench_table,
    draw,
    fit_table,
    introduce,
    introduce_bench,
    introduce_fit,
    table,
    write,
)
from .train import Config, Result, Run
from .verdict import failure


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(arguments, namespace=Options())
    if options.command is None:
        print(report())
        return 0
    command = "adaqn " + shlex.join(arguments)
    try:
        refuse_processes(options.command)
        commands = {"train": _train, "compare": _compare, "fit": _fit, "bench": _bench}
        return commands[options.command](options, command)
    except DataError as error:
        return _complain(options, str(error), 2)
    except OSError as error:  # a disk that is full by now, for example
        return _complain(options, str(error), 1)
    except KeyboardInterrupt:
        return _complain(options, "interrupted", 130)


def _complain(options: Options, message: str, code: int) -> int:
    launch = Launch.here()
    where = f" (process {launch.rank})" if launch and launch.rank else ""
    print(f"adaqn {options.command}{where}: {message}", file=sys.stderr)
    return code


def _config(options: Options, optimizer: str, lr: float | None) -> Config:
    adaqn_only = ADAQN_ONLY if optimizer != "adaqn" else ()
    given = {name: value for name, value in vars(options).items() if name not in adaqn_only}
    known = {field.name for field in fields(Config)}
    adaqn = {name: given[name] for name in ADAQN_OPTIONS if name in given}
    common = {name: value for name, value in given.items() if name in known}
    return Config(**{**common, "optimizer": optimizer, "lr": lr, "adaqn": adaqn})


# --------------------------------------------------------------------------- train


def _train(options: Options, command: str) -> int:
    refuse_conflicts(options, [options.optimizer])
    with joined(options.device) as processes:
        run = _prepared(options, processes)
        introduce(run)
        try:
            result = _trained(options, run)
        except Interrupted:
            return _interrupted(options, run)
        if processes.first:
            return _presented(options, command, result)
        return 0 if failure(result) is None else 1


def _prepared(options: Options, processes: Alone) -> Run:
    """A run that begins, or goes on, alike in all processes."""
    corpus = load_corpus(options.data, options.level, options.vocab)
    given = {flag(name): value for name, value in vars(options).items()}
    processes.check_alike({**given, "text": corpus.fingerprint})
    config = _config(options, options.optimizer, options.lr)
    run = Run(config, corpus, processes=processes)
    _resume(options, run)
    processes.check_alike({"step": run.step})
    return run


def _trained(options: Options, run: Run) -> Result:
    done = Progress(options.optimizer, run.config.steps, run.step, shown=run.processes.first)
    try:
        with held_interrupts(run.processes.any) as check:
            run.on_step = done.watcher(check)
            return run.train(options.save, options.save_every)
    finally:
        done.close()


def _presented(options: Options, command: str, result: Result) -> int:
    print(table([result]))
    write(options, command, [result])
    draw(lambda: plot_run(result, options.plot), options.plot)
    reason = failure(result)
    return 0 if reason is None else _complain(options, reason, 1)


def _resume(options: Options, run: Run) -> None:
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


def _interrupted(options: Options, run: Run) -> int:
    _warn(run, f"interrupted at step {run.step}")
    if options.save is not None:
        run.save(options.save)
        _warn(run, f"saved to {options.save}; continue with the same command and --resume")
    return 130


def _warn(run: Run, text: str) -> None:
    if run.processes.first:
        print(text, file=sys.stderr)


# --------------------------------------------------------------------------- compare


def _compare(options: Options, command: str) -> int:
    names = _optimizers(options.optimizers, NAMES)
    rates = _rates_by_name(options.lr or [], names)
    refuse_conflicts(options, names)
    corpus = load_corpus(options.data, options.level, options.vocab)
    configs = [_config(options, name, rates.get(name)) for name in names]
    introduce([Run(config, corpus) for config in configs][0])  # all are possible, or none starts
    results, interrupted = _run_all(configs, corpus)
    print(table(results))
    write(options, command, results)
    draw(lambda: plot_comparison(results, options.plot), options.plot)
    if interrupted:
        return _complain(options, "interrupted", 130)
    reasons = {r.config["optimizer"]: failure(r, named=True) for r in results}
    failed = {name: reason for name, reason in reasons.items() if reason is not None}
    for name, reason in failed.items():
        _complain(options, f"{name}: {reason}", 1)
    return 1 if failed else 0


def _run_all(configs: Sequence[Config], corpus: Corpus) -> tuple[list[Result], bool]:
    """Results up to the end or to Ctrl-C, that of the interrupted run included; which of both."""
    results: list[Result] = []
    with held_interrupts() as check:
        for config in configs:
            run, progress = Run(config, corpus), Progress(config.optimizer, config.steps)
            run.on_step = progress.watcher(check)
            try:
                results.append(run.train())
                check()
            except Interrupted:
                if run.result not in results:
                    results.append(run.finish())
                return results, True
            finally:
                progress.close()
    return results, False


def _optimizers(text: str, known: Iterable[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise DataError(
                f"--optimizers {text}: {name!r} is unknown; expected some of {', '.join(known)}"
            )
        if names.count(name) > 1:
            raise DataError(f"--optimizers {text}: {name} is there twice; name it once")
    return names


def _rates_by_name(words: list[str], names: list[str]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            lr = rate(value)
        except argparse.ArgumentTypeError:
            raise DataError(
                f"--lr {word}: expected NAME=LR with LR a finite number > 0, as in adam=0.005"
            ) from None
        if name not in names:
            raise DataError(
                f"--lr {word}: {name!r} is not among --optimizers {','.join(names)}; add it there "
                "or leave this out"
            )
        if name in rates:
            raise DataError(f"--lr {word}: {name} has --lr {name}={rates[name]:g}; give one")
        rates[name] = lr
    return rates


# --------------------------------------------------------------------------- fit


def _fit(options: Options, command: str) -> int:
    refuse_shared_files(options)
    runs = [fit.Fit(config) for config in _fit_configs(options)]
    introduce_fit(runs[0])
    results, interrupted = _fit_all(runs)
    print(fit_table(results))
    write(options, command, results)
    draw(lambda: plot_fit(runs[0].task, runs[0].network, results, options.plot), options.plot)
    return _complain(options, "interrupted", 130) if interrupted else 0


def _fit_configs(options: Options) -> list[fit.Config]:
    known = {field.name for field in fields(fit.Config)}
    common = {name: value for name, value in vars(options).items() if name in known}
    names = ["adaqn_cuda", options.against]
    return [fit.Config(**common, optimizer=name) for name in names if name != "none"]


def _fit_all(runs: Sequence[fit.Fit]) -> tuple[list[fit.Result], bool]:
    """Results up to the end or to Ctrl-C, that of the interrupted run included; which of both."""
    results: list[fit.Result] = []
    with held_interrupts() as check:
        for run in runs:
            progress = Progress(run.result.name, run.config.evaluations, unit="evaluation")
            run.on_step = progress.watcher(check)
            try:
                results.append(run.run())
            except Interrupted:
                return [*results, run.finish()], True
            finally:
                progress.close()
    return results, False


# --------------------------------------------------------------------------- bench


def _bench(options: Options, command: str) -> int:
    refuse_shared_files(options)
    run = bench.Bench(_bench_config(options))
    introduce_bench(run)
    interrupted = False
    progress = Progress("bench", run.total, unit="turn")
    try:
        with held_interrupts() as check:
            run.on_step = progress.watcher(check)
            run.run()
    except Interrupted:
        interrupted = True
    finally:
        progress.close()
    print(bench_table(run))
    write(options, command, [run])
    draw(lambda: plot_bench(run, options.plot), options.plot)
    return _complain(options, "interrupted", 130) if interrupted else 0


def _bench_config(options: Options) -> bench.Config:
    names = _optimizers(options.optimizers, bench.MAKERS)
    against = options.against if options.given("against") else _usual_rival(names)
    if against not in names:
        raise DataError(
            f"--against {against}: it is not among --optimizers {options.optimizers}; add it there"
        )
    known = {field.name for field in fields(bench.Config)}
    common = {name: value for name, value in vars(options).items() if name in known}
    return bench.Config(**{**common, "optimizers": tuple(names), "against": against})


def _usual_rival(names: list[str]) -> str:
    return bench.Config.against if bench.Config.against in names else names[-1]
