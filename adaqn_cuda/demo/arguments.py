"""What the command line accepts, and the values that options have when they are not given."""

from __future__ import annotations

import argparse
import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import AdaQN
from ..options import INITS
from ..version import __version__
from . import bench, fit
from .equations import EQUATIONS
from .models import KINDS
from .optimizers import DEFAULT_LR, IRNN_LR, NAMES, PRESETS
from .processes import own_device
from .train import WARMUP_SHARE, Config

#: Endings of pictures that can be written without further programs.
PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")
#: Options, by destination, that mean something to adaqn alone.
ADAQN_OPTIONS = ("history_size", "fisher_size", "update_interval", "init", "fused")
ADAQN_ONLY = ("preset", "monitor", "shard_state", *ADAQN_OPTIONS)


class Options(argparse.Namespace):
    """Parsed options: those given are in ``vars``, these stand for the others."""

    data = lr = warmup = save = resume = json = None
    vocab, preset, monitor, save_every = Config.vocab, Config.preset, Config.monitor, 100
    fsdp, shard_state = Config.fsdp, Config.shard_state

    def given(self, name: str) -> bool:
        return name in vars(self)


def flag(name: str) -> str:
    """The option with destination ``name``, as people write it."""
    return "--" + name.replace("_", "-")


# --------------------------------------------------------------------------- values


def number(
    convert: Callable[[str], float], expected: str, accepts: Callable[[float], bool]
) -> Callable[[str], Any]:
    """A type for argparse whose message says what was ``expected``."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


#: Counts stay below this: larger ones overflow in torch.
LARGEST = 2**31 - 1
positive = number(int, f"a whole number from 1 to {LARGEST}", lambda n: 1 <= n <= LARGEST)
natural = number(int, f"a whole number from 0 to {LARGEST}", lambda n: 0 <= n <= LARGEST)
words = number(int, f"a whole number from 2 to {LARGEST}", lambda n: 2 <= n <= LARGEST)
points = number(int, "a whole number from 1 to 1000000", lambda n: 1 <= n <= 1_000_000)
seed = number(int, "a whole number from 0 to 2**64 - 1", lambda n: 0 <= n < 2**64)
rate = number(float, "a finite number > 0", lambda x: 0 < x < math.inf)
norm = number(float, "a finite number >= 0", lambda x: 0 <= x < math.inf)


def device(text: str) -> str:
    try:
        torch.zeros(1, device=torch.device(own_device(text))).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used ({reason}); try cpu") from None
    return text


def output(text: str) -> Path:
    path = Path(text)
    try:
        usable = not path.is_dir() and path.parent.is_dir() and os.access(path.parent, os.W_OK)
        usable = usable and (not path.exists() or os.access(path, os.W_OK))
    except OSError:  # for example, a name longer than the system takes
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(
            f"cannot write {text!r}: name a file in a folder that exists and is writable"
        )
    return path


def picture(text: str) -> Path:
    path = output(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no picture: expected a name that ends in {', '.join(PICTURES)}"
        )
    return path


def sizes(text: str) -> tuple[tuple[int, ...], ...]:
    """Shapes, as in ``768x768,768``."""
    try:
        shapes = tuple(tuple(int(n) for n in shape.split("x")) for shape in text.split(","))
    except ValueError:
        shapes = ()
    if not shapes or any(not 1 <= n <= LARGEST for shape in shapes for n in shape):
        raise argparse.ArgumentTypeError(
            f"expected shapes of whole numbers from 1 on, as in 768x768,768, got {text!r}"
        )
    return shapes


# --------------------------------------------------------------------------- options


def parser() -> argparse.ArgumentParser:
    """Options with a default of their own are always set; the others only where given."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    top = argparse.ArgumentParser(
        prog="adaqn",
        description="Train recurrent language models with adaQN and others, and physics-informed "
        "networks with L-BFGS; measure what a step costs.",
    )
    top.add_argument("--version", action="version", version=f"adaqn_cuda {__version__}")
    commands = top.add_subparsers(dest="command")
    unset: dict[str, Any] = {"formatter_class": formatter, "argument_default": argparse.SUPPRESS}
    _add_train(commands.add_parser("train", help="train one model", **unset))
    text = "several optimizers on the same seed and data"
    _add_compare(commands.add_parser("compare", help=text, **unset))
    text = "solve a differential equation with a physics-informed network and L-BFGS"
    _add_fit(commands.add_parser("fit", help=text, description=text, **unset))
    text = "what a step of each optimizer costs on this machine"
    _add_bench(commands.add_parser("bench", help=text, description=text, **unset))
    return top


def _add_train(train: argparse.ArgumentParser) -> None:
    train.add_argument("--optimizer", choices=NAMES, default=Config.optimizer, help="the method")
    train.add_argument("--lr", type=rate, help=f"peak lr ({_default_rates()})")
    _add_outputs(train, "adaqn-train.png")
    _add_task(train)
    group = train.add_argument_group("checkpoints")
    group.add_argument("--save", type=output, metavar="FILE",
                       help="write checkpoints here (default: none)")  # fmt: skip
    text = f"steps between two checkpoints (default: {Options.save_every})"
    group.add_argument("--save-every", type=positive, metavar="STEPS", help=text)
    group.add_argument(
        "--resume", nargs="?", const="", metavar="FILE",
        help="continue from FILE, or from --save's file if it is there (default: start afresh)",
    )  # fmt: skip
    group = train.add_argument_group("processes, under torchrun")
    group.add_argument(
        "--fsdp", action="store_true",
        help="divide parameters and state among them, by fully_shard (default: "
        "DistributedDataParallel; every process has all of both)",
    )  # fmt: skip
    group.add_argument(
        "--shard-state", action="store_true",
        help="divide the optimizer's state only; adaqn's (default: every process has all of it)",
    )  # fmt: skip


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("--optimizers", default="adaqn,adam,rmsprop,adagrad", metavar="A,B,...",
                         help=f"some of {', '.join(NAMES)}")  # fmt: skip
    compare.add_argument(
        "--lr", action="append", metavar="NAME=LR",
        help=f"peak lr of one optimizer; may be repeated ({_default_rates()})",
    )  # fmt: skip
    _add_outputs(compare, "adaqn-compare.png")
    _add_task(compare)


def _add_fit(parser: argparse.ArgumentParser) -> None:
    plain = fit.Config
    parser.add_argument("--problem", choices=tuple(EQUATIONS), default=plain.problem,
                        help="the equation")  # fmt: skip
    parser.add_argument("--evaluations", type=positive, default=plain.evaluations, metavar="N",
                        help="of loss and gradient, for each optimizer")  # fmt: skip
    parser.add_argument("--against", choices=("torch", "none"), default="torch",
                        help="the optimizer to compare with")  # fmt: skip
    parser.add_argument("--points", type=points, default=plain.points, metavar="N",
                        help="where the equation shall hold")  # fmt: skip
    parser.add_argument("--seed", type=seed, default=plain.seed, metavar="N",
                        help="of the points and the initial parameters")  # fmt: skip
    parser.add_argument("--device", type=device, default=plain.device, help="a device of torch")
    _add_outputs(parser, "adaqn-fit.png", "the solution, its errors and the losses")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    plain = bench.Config
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--model", default=plain.model, metavar="MODEL",
        help=f"{', '.join(KINDS)}, or MODULE:FUNCTION that returns a torch.nn.Module, as in "
        "torchvision.models:resnet50",
    )  # fmt: skip
    what.add_argument(
        "--sizes", type=sizes, metavar="AxB,C,...",
        help="shapes of parameters, as in 768x768,768 (default: the model's)",
    )  # fmt: skip
    parser.add_argument("--hidden", type=positive, default=plain.hidden, metavar="N",
                        help="width of the recurrent models")  # fmt: skip
    parser.add_argument("--optimizers", default=",".join(plain.optimizers), metavar="A,B,...",
                        help=f"some of {', '.join(bench.MAKERS)}")  # fmt: skip
    parser.add_argument("--against", choices=tuple(bench.MAKERS),
                        help="what the others are compared with (default: adam, or the last "
                        "one)")  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=plain.rounds, metavar="N",
                        help="times that each is measured, in turn with the others")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"),
                        default=plain.dtype, help="of the parameters")  # fmt: skip
    parser.add_argument("--device", type=device, default=plain.device, help="a device of torch")
    _add_outputs(parser, "adaqn-bench.png", "the times")


def _default_rates() -> str:
    told = ", ".join(f"{name} {lr:g}" for name, lr in DEFAULT_LR.items())
    lower = ", ".join(f"{name} {lr:g}" for name, lr in IRNN_LR.items())
    return f"default: {told}; with --model irnn: {lower}"


def _add_outputs(parser: argparse.ArgumentParser, plot: str, content: str = "the losses") -> None:
    parser.add_argument(
        "--plot", type=picture, default=plot, metavar="FILE.png", help=f"draw {content} here"
    )
    parser.add_argument("--json", type=output, metavar="FILE",
                        help="write the numbers here (default: nowhere)")  # fmt: skip


def _add_task(parser: argparse.ArgumentParser) -> None:
    task = parser.add_argument_group("task")
    task.add_argument("--model", choices=KINDS, default=Config.model, help="recurrent layers")
    task.add_argument(
        "--level", choices=("char", "word"), default=Config.level, help="what a symbol is"
    )
    task.add_argument(
        "--data", metavar="PATH",
        help="text file, or folder with train/valid/test files (default: Python's own sources)",
    )  # fmt: skip
    task.add_argument("--vocab", type=words, metavar="N",
                      help=f"words kept with --level word (default: {Config.vocab})")  # fmt: skip
    counts = {
        "steps": "optimizer steps",
        "batch": "streams of text side by side",
        "bptt": "symbols of a stream that a step looks at",
        "hidden": "width of the recurrent layers",
        "layers": "recurrent layers on top of each other",
    }
    for name, text in counts.items():
        task.add_argument(
            f"--{name}", type=positive, default=getattr(Config, name), metavar="N", help=text
        )
    task.add_argument(
        "--seed", type=seed, default=Config.seed, metavar="N", help="of the initial parameters"
    )
    task.add_argument("--device", type=device, default=Config.device, help="a device of torch")
    _add_rates(parser.add_argument_group("step length"))
    _add_adaqn(parser.add_argument_group("adaqn only"))


def _add_rates(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--schedule", choices=("constant", "linear", "cosine"), default=Config.schedule,
        help="of lr after the warm-up; the last two end at zero",
    )  # fmt: skip
    text = f"steps until lr is at its peak (default: {100 * WARMUP_SHARE:g} %% of --steps)"
    group.add_argument("--warmup", type=natural, metavar="STEPS", help=text)
    group.add_argument(
        "--clip", type=norm, default=Config.clip, metavar="NORM", help="gradient norm; 0: off"
    )


def _add_adaqn(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--preset", choices=tuple(PRESETS),
                       help=f"set of hyper-parameters (default: {Config.preset})")  # fmt: skip
    group.add_argument("--monitor", type=natural, metavar="N",
                       help="monitor the loss on N fixed sequences (default: 0, off)")  # fmt: skip
    counts = {
        "history_size": (natural, "curvature pairs kept"),
        "fisher_size": (positive, "gradients kept for the Fisher product"),
        "update_interval": (positive, "steps between two pair updates"),
    }
    for name, (kind, text) in counts.items():
        text = f"{text} ({_default_of(name)})"
        group.add_argument(flag(name), type=kind, metavar="N", help=text)
    text = f"initial inverse Hessian ({_default_of('init')})"
    group.add_argument("--init", choices=INITS, help=text)
    group.add_argument(
        "--fused", action=argparse.BooleanOptionalAction,
        help="insist on native kernels, or on the reference (default: native where they can)",
    )  # fmt: skip


def _default_of(name: str) -> str:
    plain = inspect.signature(AdaQN).parameters[name].default
    presets = {preset: options.get(name, plain) for preset, options in PRESETS.items()}
    others = [f"{preset}: {value}" for preset, value in presets.items() if value != plain]
    return "; ".join([f"default: {plain}", *others])
