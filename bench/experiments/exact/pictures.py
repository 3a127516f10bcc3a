"""Pictures of the second record: loss over evaluations and over seconds."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from ..plots import OTHER, save, sheet
from .tables import Table

#: Colour and line of the methods that are drawn, those of most interest first.
STYLES: dict[str, tuple[str, str]] = {
    "k-ss": ("#d55e00", "-"),
    "k-ss, wolfe": ("#d55e00", "--"),
    "k, wolfe": ("#d55e00", ":"),
    "scalar-ss, wolfe": ("#e69f00", "-"),
    "ss-broyden, dense": ("#009e73", "-"),
    "ss-bfgs, dense": ("#009e73", "--"),
    "bfgs, dense": ("#009e73", ":"),
    "lbfgs-100": ("#000000", "-"),
    "adam, lbfgs-100": ("#000000", "--"),
    "soap": ("#0072b2", "-"),
    "adam": ("#0072b2", "--"),
    "adaqn, slow": ("#cc79a7", "-"),
    "adaqn": ("#cc79a7", "--"),
    "k alone": ("#999999", "-"),
}


def draw(tables: dict[str, Table], path: Path) -> None:
    """Two panels for each problem, side by side."""
    figure, axes = sheet(2 * len(tables), 4)
    panels = iter(axes)
    for name, table in tables.items():
        for unit in ("evaluations", "seconds"):
            ax = next(panels)
            for method in (m for m in STYLES if m in table["methods"]):
                draw_curve(ax, method, table["methods"][method], unit)
            ax.set_title(name, fontsize=9)
            ax.set_xlabel(unit, fontsize=8)
            ax.set_ylabel("loss", fontsize=8)
            ax.set_yscale("log")
    save(figure, axes, list(STYLES), path)


def draw_curve(ax: Any, method: str, entry: Table, unit: str) -> None:
    """The seed with the median loss; seconds of a quiet machine where they have been measured."""
    curve = median_curve(entry)
    if not curve:
        return
    if unit == "seconds":
        timed = entry["ms"]
        at = [p[0] * timed / 1000 if timed else p[2] for p in curve]
    else:
        at = [p[0] for p in curve]
    colour, line = STYLES.get(method, OTHER)
    losses = [p[1] if math.isfinite(p[1]) else math.nan for p in curve]
    ax.plot(at, losses, color=colour, linestyle=line, linewidth=1.3, label=method)


def median_curve(entry: Table) -> list[list[float]]:
    if not entry["curves"]:
        return []
    middle = min(entry["losses"], key=lambda loss: abs(loss - median(entry["losses"])))
    return entry["curves"][entry["losses"].index(middle)]
