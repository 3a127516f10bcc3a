"""Pictures: loss over steps and seconds, and loss over lr."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .methods import block_label
from .results import Table, tuned_loss

#: Colour and line of each method; Okabe & Ito's colours can be told apart without colour vision.
STYLES: dict[str, tuple[str, str]] = {
    "kronecker+pairs": ("#d55e00", "-"),
    "kronecker": ("#d55e00", "--"),
    "untuned": ("#d55e00", ":"),
    "quasi-newton": ("#e69f00", "-"),
    "diagonal+pairs": ("#e69f00", "-"),
    "diagonal": ("#e69f00", "--"),
    "paper": ("#cc79a7", "-"),
    "paper, pairs off": ("#cc79a7", "--"),
    "adam": ("#0072b2", "-"),
    "nadam": ("#56b4e9", "-"),
    "rmsprop": ("#009e73", "-"),
    "soap, our settings": ("#000000", "-"),
    "soap": ("#000000", "--"),
    "shampoo, our settings": ("#8c510a", "-"),
    "shampoo": ("#8c510a", "--"),
    "psgd-kron": ("#9970ab", "-"),
    "muon": ("#000000", ":"),
    "lbfgs": ("#000000", "-."),
    "sgd": ("#999999", "-"),
    "adagrad": ("#999999", "--"),
}
OTHER = ("#f0e442", "-")
#: Lines in a panel; those of most interest come first.
LINES = 8
SHOWN_LANGUAGE = (
    "kronecker", "soap, our settings", "soap", "psgd-kron", "shampoo", "muon", "adam", "nadam",
    "untuned", "kronecker+pairs", "rmsprop", "shampoo, our settings", "diagonal+pairs", "paper",
    "paper, pairs off", "sgd", "adagrad",
)  # fmt: skip
SHOWN_DETERMINISTIC = (
    "quasi-newton", "kronecker", "lbfgs", "soap, our settings", "soap", "psgd-kron", "adam",
    "muon", "nadam", "rmsprop", "shampoo", "kronecker+pairs", "shampoo, our settings",
    "diagonal+pairs", "paper, pairs off", "paper", "sgd", "adagrad",
)  # fmt: skip


def draw(results: dict[str, Table], folder: Path, name: str) -> list[Path]:
    """Draw what there is; the files written."""
    tested = {n: t for n, t in results.items() if t["methods"]}
    parts = {
        "loss": (draw_curves, {n: t for n, t in tested.items() if t["stochastic"]}),
        "lr": (draw_rates, tested),
        "deterministic": (draw_curves, {n: t for n, t in tested.items() if not t["stochastic"]}),
        "blocks": (draw_block_curves, {n: t for n, t in results.items() if t["blocks"]}),
    }
    written = []
    for suffix, (draw_part, tasks) in parts.items():
        if tasks:
            written.append(folder / f"{name}-{suffix}.png")
            draw_part(tasks, written[-1])
    return written


def shown(tasks: dict[str, Table], order: tuple[str, ...]) -> list[str]:
    """The methods to draw in all panels of a picture."""
    known = {name for task in tasks.values() for name in task["methods"]}
    names = [*order, *sorted(known - set(order))]
    return [name for name in names if name in known][:LINES]


def sheet(panels: int, columns: int) -> tuple[Figure, list[Any]]:
    """A figure with ``panels`` axes, and room for a legend above them."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows + 0.7), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[panels:]:
        ax.set_axis_off()
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes[:panels]


def save(figure: Figure, axes: list[Any], names: list[str], path: Path) -> None:
    """Add the legend, above the panels, and write the picture."""
    lines = {}
    for ax in axes:
        lines.update({line.get_label(): line for line in ax.get_lines()})
    known = [name for name in names if name in lines]
    figure.legend(
        [lines[name] for name in known], known,
        loc="outside upper center", ncols=4 if figure.get_figwidth() < 10 else len(known),
        frameon=False, fontsize=9,
    )  # fmt: skip
    figure.savefig(path)


# ---------------------------------------------------------------------- loss over steps, seconds


def draw_curves(tasks: dict[str, Table], path: Path) -> None:
    """Two panels for each task, side by side: over steps and, where timed, over seconds."""
    stochastic = next(iter(tasks.values()))["stochastic"]
    names = shown(tasks, SHOWN_LANGUAGE if stochastic else SHOWN_DETERMINISTIC)
    timed = any(e["ms"] is not None for task in tasks.values() for e in task["methods"].values())
    units = ("steps", "seconds") if timed else ("steps",)
    columns = len(units) if len(tasks) < 4 else 4
    figure, axes = sheet(len(tasks) * len(units), columns)
    panels = iter(axes)
    for name, task in tasks.items():
        for unit in units:
            ax = next(panels)
            for method in (m for m in names if m in task["methods"]):
                draw_curve(ax, method, task["methods"][method], unit)
            ax.set_title(name, fontsize=9)
            ax.set_xlabel(unit if stochastic or unit != "steps" else "gradients", fontsize=8)
            ax.set_ylabel(axis_title(task), fontsize=8)
            zoom(ax, task, names)
    save(figure, axes, names, path)


def draw_curve(ax: Any, method: str, entry: Table, unit: str) -> None:
    curve = entry["curves"].get("1.0")
    if not curve or (unit == "seconds" and entry["ms"] is None):
        return
    scale = 1.0 if unit == "steps" else entry["ms"] / 1000
    colour, line = STYLES.get(method, OTHER)
    steps, losses = zip(*curve, strict=True)
    at = [step * scale for step in steps]
    ax.plot(at, losses, color=colour, linestyle=line, linewidth=1.4, label=method)


def axis_title(task: Table) -> str:
    return "validation loss (nats)" if task["stochastic"] else task["metric"]


def zoom(ax: Any, task: Table, names: list[str]) -> None:
    """Cut off the beginning of language models' losses; decades for the others."""
    curves = [e["curves"].get("1.0") for n, e in task["methods"].items() if n in names]
    finals = [curve[-1][1] for curve in curves if curve]
    if not finals:
        return
    if task["stochastic"]:
        early = sorted(at_share(curve, 0.3) for curve in curves if curve)
        low, high = min(finals), early[len(early) // 2]
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    else:
        start = max(curve[0][1] for curve in curves if curve)
        ax.set_yscale("log")
        ax.set_ylim(min(finals) / 2, 3 * start)


def at_share(curve: list[Any], share: float) -> float:
    """Loss after ``share`` of the curve's steps."""
    return next(loss for step, loss in curve if step >= share * curve[-1][0])


# ---------------------------------------------------------------------- loss, cost over block size


def draw_block_curves(tasks: dict[str, Table], path: Path) -> None:
    """Three panels for each task: loss, milliseconds of a step, and memory over the block size."""
    figure, axes = sheet(3 * len(tasks), 3)
    panels = iter(axes)
    for name, task in tasks.items():
        entries = list(task["blocks"].values())
        timed = all(entry["ms"] is not None for entry in entries)
        cost = "ms" if timed else "run_ms"
        curves = {
            axis_title(task): [tuned_loss(entry) for entry in entries],
            "ms / step" if timed else "ms / step in the runs": [entry[cost] for entry in entries],
            "state, MB": [entry["state_bytes"] / 1e6 for entry in entries],
        }
        labels = [block_label(entry["options"]["block_size"]) for entry in entries]
        for title, values in curves.items():
            draw_block_curve(next(panels), name, labels, title, values)
    figure.savefig(path)


def draw_block_curve(
    ax: Any, name: str, labels: list[str], title: str, values: list[float]
) -> None:
    """A point for each block size, evenly spaced; losses that diverged are left out."""
    colour, _ = STYLES["kronecker"]
    values = [value if math.isfinite(value) else math.nan for value in values]
    ax.plot(range(len(values)), values, color=colour, marker="o", markersize=3, linewidth=1.4)
    ax.set_xticks(range(len(labels)), labels)
    ax.set_title(name, fontsize=9)
    ax.set_xlabel("block size", fontsize=8)
    ax.set_ylabel(title, fontsize=8)


# ---------------------------------------------------------------------- loss over lr


def draw_rates(results: dict[str, Table], path: Path) -> None:
    """One panel for each task: tuning loss over lr, as a multiple of the best."""
    names = shown(results, SHOWN_LANGUAGE)
    figure, axes = sheet(len(results), 4)
    for ax, (name, task) in zip(axes, results.items(), strict=True):
        mine = [method for method in names if method in task["methods"]]
        for method in mine:
            draw_rate(ax, method, task["methods"][method])
        ax.set_title(name, fontsize=9)
        ax.set_xscale("log")
        ax.set_xlabel("lr / best lr", fontsize=8)
        ax.set_ylabel(axis_title(task), fontsize=8)
        zoom_rates(ax, task, mine)
    save(figure, axes, names, path)


def draw_rate(ax: Any, method: str, entry: Table) -> None:
    """The finite losses; a line ends where the next lr has diverged."""
    colour, line = STYLES.get(method, OTHER)
    finite = [(lr / entry["lr"], loss) for lr, loss in entry["tuning"] if math.isfinite(loss)]
    if len(finite) > 1:
        ax.plot(
            *zip(*finite, strict=True), color=colour, linestyle=line, marker="o", markersize=3,
            linewidth=1.2, label=method,
        )  # fmt: skip


def zoom_rates(ax: Any, task: Table, names: list[str]) -> None:
    losses = [x for n in names for _, x in task["methods"][n]["tuning"] if math.isfinite(x)]
    if not losses:
        return
    if task["stochastic"]:
        ax.set_ylim(min(losses) - 0.03, min(losses) + 0.7)
    else:
        ax.set_yscale("log")
