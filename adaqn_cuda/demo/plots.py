"""Pictures of runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from . import bench, fit
from .equations import Collocation, Network
from .train import Result

#: Colours by optimizer, distinguishable also without colour vision (Okabe & Ito).
COLOURS = {
    "adaqn": "#d55e00",
    "adam": "#0072b2",
    "nadam": "#56b4e9",
    "rmsprop": "#009e73",
    "adagrad": "#cc79a7",
    "sgd": "#999999",
    "lbfgs": "#000000",
}
FIT_COLOURS = {"adaqn_cuda": "#d55e00", "torch": "#0072b2"}


class PlotUnavailable(RuntimeError):
    """matplotlib is missing."""


def _figure(width: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotUnavailable(
            'no picture: matplotlib is missing; pip install matplotlib (or ".[demo]")'
        ) from None
    return Figure(figsize=(width, 4.4), dpi=120, layout="constrained")


def _axes(columns: int) -> tuple[Any, Any]:
    figure = _figure(7.5 if columns == 1 else 11)
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss (nats per symbol)")
    return figure, axes


def _column(result: Result | fit.Result, name: str) -> list[float]:
    return [record[name] for record in result.curve]


def _fit(ax: Any, losses: list[float], top: float) -> None:
    """Cut off what is above ``top``: one spike would hide all the rest."""
    seen = [loss for loss in losses if math.isfinite(loss)]
    if seen and max(seen) > top:
        ax.set_ylim(min(*seen, top - 1) - 0.05, top)


def plot_run(result: Result, path: Path) -> None:
    """Training and validation loss of one run over its steps.

    Raises:
        PlotUnavailable: matplotlib is not installed.
    """
    figure, (ax,) = _axes(1)
    config, steps = result.config, _column(result, "step")
    colour = COLOURS[config["optimizer"]]
    train = _column(result, "train")
    ax.plot(steps, train, color=colour, alpha=0.45, label="train (mean of 100 steps)")
    ax.plot(steps, _column(result, "valid"), "o-", color=colour, markersize=4, label="valid")
    _fit(ax, [*train, *_column(result, "valid")], 1.5 * math.log(result.vocabulary))
    ax.axhline(math.log(result.vocabulary), color="grey", linestyle=":", linewidth=1)
    ax.annotate(
        f"ln({result.vocabulary}), guessing",
        (steps[-1], math.log(result.vocabulary)),
        xytext=(0, -11), textcoords="offset points", ha="right", fontsize=8, color="grey",
    )  # fmt: skip
    (unit, value), *_ = result.summary().items()
    ax.set_title(
        f"{config['optimizer']} on {result.data}: {config['model']}, "
        f"{result.parameters:,} parameters\n"
        f"valid {result.valid:.3f} nats ({value:.2f} {unit.replace('_', ' ')}), "
        f"{result.seconds:.0f} s",
        fontsize=10,
    )
    ax.set_xlabel("step")
    ax.legend(frameon=False)
    figure.savefig(path)


def plot_comparison(
    results: list[Result], path: Path, over: tuple[str, ...] = ("step", "seconds")
) -> None:
    """Validation loss of several runs, one panel for each column of ``over``.

    Raises:
        PlotUnavailable: matplotlib is not installed.
    """
    figure, axes = _axes(len(over))
    for ax, name in zip(axes, over, strict=True):
        for result in results:
            label = f"{result.config['optimizer']}  {result.valid:.3f}"
            colour = COLOURS[result.config["optimizer"]]
            ax.plot(_column(result, name), _column(result, "valid"), color=colour, label=label)
        ax.set_xlabel(name)
    finals = [result.valid for result in results if math.isfinite(result.valid)]
    if finals:
        axes[0].set_ylim(min(finals) - 0.05, min(finals) + 1.0)
    axes[-1].legend(frameon=False, title="final valid loss")
    config = results[0].config
    figure.suptitle(f"{config['model']} on {results[0].data}, seed {config['seed']}", fontsize=10)
    figure.savefig(path)


def plot_fit(task: Collocation, network: Network, results: list[fit.Result], path: Path) -> None:
    """The network's solution, its errors, and the losses of all runs over their evaluations.

    Raises:
        PlotUnavailable: matplotlib is not installed.
    """
    figure = _figure(13)
    solution, error, losses = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    values, errors = (field.cpu().numpy() for field in task.on_grid(network))
    _field(figure, solution, values, "viridis", "solution")
    _field(figure, error, errors, "RdBu_r", f"error (relative: {results[0].relative_error:.1e})")
    for result in results:
        colour = FIT_COLOURS[result.config["optimizer"]]
        label = f"{result.name}  {result.loss:.1e}, {result.seconds:.0f} s"
        losses.semilogy(
            _column(result, "evaluation"), _column(result, "loss"), color=colour, label=label
        )
    losses.grid(alpha=0.25)
    losses.spines[["top", "right"]].set_visible(False)
    losses.set(xlabel="evaluation", ylabel="lowest loss so far")
    losses.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{task.equation.title}, seed {results[0].config['seed']}", fontsize=10)
    figure.savefig(path)


def plot_bench(run: bench.Bench, path: Path) -> None:
    """Median and quartiles of each optimizer's step, and how it compares.

    Raises:
        PlotUnavailable: matplotlib is not installed.
    """
    figure = _figure(8)
    ax = figure.subplots()
    rows = run.measured()[::-1]
    rival = next((row for row in rows if row.name == run.config.against), None)
    medians = [row.median for row in rows]
    errors = [[abs(row.median - row.spread[side]) for row in rows] for side in (0, 1)]
    colours = [COLOURS.get(row.name.partition("-")[0], "#999999") for row in rows]
    ax.barh([row.name for row in rows], medians, xerr=errors, color=colours, height=0.6)
    for place, row in enumerate(rows):
        ratio = "" if rival is None else f" ({row.ratio_to(rival):.2f} x {rival.name})"
        ax.annotate(
            f"{row.median:,.0f}{ratio}", (row.spread[1], place), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    ax.margins(x=0.3)
    ax.set_xlim(left=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("microseconds per step: median and quartiles of the rounds")
    of = "shapes of --sizes" if run.config.sizes else run.config.model
    ax.set_title(
        f"{of}: {run.numel:,} parameters in {len(run.shapes)} tensors, {run.config.dtype}, on "
        f"{run.config.device}", fontsize=10,
    )  # fmt: skip
    figure.savefig(path)


def _field(figure: Any, ax: Any, values: Any, colours: str, title: str) -> None:
    """A function on the square, with a scale that is symmetric about 0."""
    top = max(float(abs(values).max()), 1e-300)
    image = ax.imshow(
        values, extent=(-1, 1, -1, 1), origin="lower", cmap=colours, vmin=-top, vmax=top
    )
    figure.colorbar(image, ax=ax, shrink=0.8)
    ax.set_title(title, fontsize=10)
    ax.set(xlabel="x", ylabel="y")
