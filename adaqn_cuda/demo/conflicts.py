"""Options that would do nothing, or harm, together with others: refused before any work."""

from __future__ import annotations

from pathlib import Path

from .arguments import ADAQN_ONLY, Options, flag
from .data import DataError
from .optimizers import PRESETS
from .processes import BACKENDS, Launch


def refuse_conflicts(options: Options, optimizers: list[str]) -> None:
    """Raise for the first option that the others leave without effect.

    Raises:
        DataError: the message names both, and what to change.
    """
    chosen = f"--optimizer{'s' if options.command == 'compare' else ''} {','.join(optimizers)}"
    for name in ADAQN_ONLY:
        if options.given(name) and "adaqn" not in optimizers:
            raise DataError(f"{flag(name)} is for adaqn only, not for {chosen}; leave it out")
    if "adaqn" in optimizers:
        _refuse_without_pairs(options)
    if options.given("vocab") and options.level == "char":
        raise DataError("--vocab does nothing with --level char; add --level word or leave it out")
    if options.given("save_every") and options.save is None:
        raise DataError("--save-every does nothing without --save; name a file with --save")
    if options.warmup is not None and options.warmup > options.steps:
        raise DataError(
            f"--warmup {options.warmup} does not end within --steps {options.steps}; lower "
            "--warmup or raise --steps"
        )
    refuse_shared_files(options)
    if options.command == "train":
        _refuse_division(options)


def refuse_processes(command: str) -> None:
    """Raise for a command that several processes would each run for itself, into one file.

    Raises:
        DataError: the message says how to start it.
    """
    launch = Launch.here()
    if launch is not None and launch.count > 1 and command != "train":
        raise DataError(
            f"WORLD_SIZE={launch.count}: several processes do adaqn train only; start this one "
            "without torchrun"
        )


def _refuse_division(options: Options) -> None:
    """What processes cannot divide, and what there is nobody to divide among."""
    launch = Launch.here()
    if options.fsdp and options.shard_state:
        raise DataError("--fsdp divides the state, too; leave --shard-state out")
    for name in ("fsdp", "shard_state"):
        if options.given(name) and launch is None:
            raise DataError(
                f"{flag(name)} is for several processes; start them by torchrun "
                f"--nproc-per-node N -m adaqn_cuda train {flag(name)} ..."
            )
    if options.fsdp and options.optimizer == "lbfgs":
        raise DataError("--fsdp: --optimizer lbfgs takes whole parameters; leave --fsdp out")
    if launch is None:
        return
    if options.device not in BACKENDS:
        raise DataError(
            f"--device {options.device}: under torchrun expected {' or '.join(BACKENDS)}; with "
            "cuda, every process takes a GPU of its own"
        )
    if options.batch % launch.count:
        raise DataError(
            f"--batch {options.batch} cannot be divided evenly among {launch.count} processes; "
            f"give a multiple of {launch.count}"
        )


def _refuse_without_pairs(options: Options) -> None:
    """Options of curvature pairs need pairs."""
    preset = PRESETS[options.preset].get("history_size", 0)
    if options.history_size if options.given("history_size") else preset:
        return
    history = "--history-size 0" if options.given("history_size") else f"--preset {options.preset}"
    for name in ("fisher_size", "update_interval", "monitor"):
        if options.given(name) and getattr(options, name):
            raise DataError(
                f"{flag(name)} does nothing without curvature pairs, and {history} has none; add "
                "--preset pairs, --preset paper or --history-size"
            )


def refuse_shared_files(options: Options) -> None:
    """A file that is read or written under one name is not overwritten under another.

    Raises:
        DataError: the message names both options.
    """
    seen: dict[Path, str] = {}
    for name in ("data", "plot", "json", "save"):
        value = getattr(options, name)
        if value is None:
            continue
        other = seen.setdefault(Path(value).resolve(), flag(name))
        if other != flag(name):
            raise DataError(f"{other} and {flag(name)} both name {value}; name two files")
