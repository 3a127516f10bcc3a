"""The report people read: a summary over tasks, then a table and a verdict for each."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import adaqn_cuda
from adaqn_cuda.demo.numbers import write_json

from . import plots
from .ledger import Ledger
from .methods import PEERS, POINTS, RATIO, Method, block_label
from .protocol import EXTENSIONS, SHORT_HORIZONS
from .results import REFERENCES, Table, collect, tuned_loss
from .tasks import TEST_SEEDS, TUNING_SEED, Task

NAME = "convergence"
CONVEX = ("least-squares", "regression")
ABSENT = "–"


def write(
    ledger: Ledger, tasks: Sequence[Task], methods: Sequence[Method], folder: Path, command: str
) -> list[Path]:
    """Write JSON, pictures and text to ``folder``; the files written.

    ``command`` is what people type for the same report.
    """
    results = collect(ledger, tasks, methods)
    if not results:
        raise SystemExit(f"{ledger.path}: no method is finished on any of the tasks")
    folder.mkdir(parents=True, exist_ok=True)
    written = plots.draw(results, folder, NAME)
    content = {
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {"adaqn_cuda": adaqn_cuda.__version__, "torch": torch.__version__},
        "tasks": rounded(results),
    }
    write_json(folder / f"{NAME}.json", content)
    (folder / f"{NAME}.md").write_text(text(results, [path.name for path in written], command))
    return [folder / f"{NAME}.json", folder / f"{NAME}.md", *written]


def rounded(value: Any) -> Any:
    """The same with five significant digits, which is more than the numbers are worth."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def text(results: dict[str, Table], pictures: list[str], command: str) -> str:
    """The report, in Markdown."""
    tested = {name: task for name, task in results.items() if task["methods"]}
    parts = [introduction(results, command), *([summary(tested)] if tested else [])]
    parts += [f"![{CAPTIONS[name]}]({name})" for name in pictures]
    parts += [*([rates(tested)] if tested else []), *block_curves(results)]
    parts += [section(name, task) for name, task in tested.items()]
    return "\n\n".join(parts) + "\n"


CAPTIONS = {
    f"{NAME}-loss.png": "Validation loss of the language models over steps and seconds",
    f"{NAME}-lr.png": "Loss over lr",
    f"{NAME}-deterministic.png": "Deterministic problems over gradients and seconds",
    f"{NAME}-blocks.png": "Loss, milliseconds of a step and memory over the block size",
}


def introduction(results: dict[str, Table], command: str) -> str:
    references = ", ".join(REFERENCES)
    shorter = ", ".join(f"{share:.0%}".replace("%", " %") for share in SHORT_HORIZONS)
    seeds = " and ".join(map(str, TEST_SEEDS))
    texts = sorted({task["text"] for task in results.values() if task["text"]})
    threads = {e["threads"] for t in results.values() for e in t["methods"].values()} - {None}
    clock = (
        f"A step is timed on {max(threads)} threads of a CPU, gradient and optimizer together; "
        "seconds are steps times that."
        if threads
        else "Steps have not been timed yet."
    )
    paragraphs = (
        f"Written by `{command}`; the numbers are in [{NAME}.json]({NAME}.json).",
        f"""Every method but `untuned` has its lr tuned by the same rule: {POINTS} points, a factor
        of {RATIO} apart, on seed {TUNING_SEED}; while the best is at an edge the grid grows by a
        point, at most {EXTENSIONS} times each way ("edge" marks where it still ended there). That
        lr is then run on seeds {seeds}, which it was not tuned on, and those are the losses below.
        In language models lr warms up over the first 5 % of the steps and falls linearly to zero,
        for all; nothing is stopped early. Weight decay, on the tasks that have it, is decoupled and
        the same for all, so that there `adam` is AdamW.""",
        f"""The target of a task is the mean loss of the best of {references}. "Steps" is how soon a
        method is as good, in percent of the full length, "wall" the same in percent of that best
        one's time, and a dash means never. The default setting of AdaQN (`kronecker`) is also run
        over {shorter} of the steps, each with the best of three lr on seed {TUNING_SEED}; of these
        runs the shortest that was as good as the target on that seed counts, where it is there
        sooner than the full run. The others were not run over shorter horizons. `untuned` is that
        setting at the lr it has by default. {clock}""",
        """`soap`, `psgd-kron`, `shampoo` and `muon` are written from their papers, to be read and
        not to be fast: their losses can be compared, while their seconds are no measure of the
        authors' own implementations. "Our settings" are the averages, the interval and the split
        gates of AdaQN's default.""",
        f"Texts: {', '.join(texts) or 'none'}.",
    )
    return "\n\n".join(("# Convergence", *map(filled, paragraphs)))


def filled(paragraph: str) -> str:
    return textwrap.fill(" ".join(paragraph.split()), 100)


# ---------------------------------------------------------------------- tables


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(results: dict[str, Table]) -> str:
    """One line for each task: the best of either side."""
    head = ["task", "target", "best other", "best AdaQN", "AdaQN against it", "steps", "wall"]
    rows = []
    for name, task in results.items():
        other, ours = best(task, ours=False), best(task, ours=True)
        target = task["methods"][task["target"]] if task["target"] else None
        rows.append(
            [
                f"[{name}](#{name})",
                named(task, task["target"], target),
                named(task, *other),
                named(task, *ours),
                against(task, ours[1], other[1]) if ours[1] and other[1] else ABSENT,
                percent(ours[1] and ours[1]["steps_share"]),
                percent(ours[1] and ours[1]["wall_share"]),
            ]
        )
    note = "Mean over the test seeds; steps and wall are those of the best AdaQN setting."
    return f"## Summary\n\n{note}\n\n{markdown(head, rows)}"


def rates(results: dict[str, Table]) -> str:
    """The best lr of some methods on each task, and what rescaled steps do to it."""
    tried = {name: task for name, task in results.items() if task["trials"]}
    tasks = tried or {name: task for name, task in results.items() if name not in CONVEX}
    trials = list(dict.fromkeys(method for task in tried.values() for method in task["trials"]))
    rows = []
    for method in (*REFERENCES, *PEERS, "kronecker", "normalized", *trials):
        mine = {n: {**t["methods"], **t["trials"]}.get(method) for n, t in tasks.items()}
        if any(mine.values()):
            cells = [rate_and_loss(tasks[n], e) if e else ABSENT for n, e in mine.items()]
            rows.append([method, *cells, spread([e for e in mine.values() if e])])
    note = f"""The best lr, and the loss there on the tuning seed {TUNING_SEED}. The last column is
    the largest of a row's lr over the smallest; points of a grid are a factor of {RATIO} apart."""
    parts = ["## Best lr", filled(note + (RESCALED if trials else ""))]
    return "\n\n".join([*parts, markdown(["method", *tasks, "spread"], rows)])


def block_curves(results: dict[str, Table]) -> list[str]:
    """The section on block sizes: a table for each task where they were tried."""
    curves = {name: task for name, task in results.items() if task["blocks"]}
    note = f"""The default of AdaQN with sides cut into even blocks of at most so much. Losses are
    those at the best lr on the tuning seed {TUNING_SEED}. "Run" is what a step took in those runs,
    on one thread, looks at the metric included; "state" is the memory of the optimizer."""
    head = ["blocks of", "lr", "loss", "ms / step", "ms / step, run", "state, MB"]
    parts = ["## Block size", filled(note)] if curves else []
    for name, task in curves.items():
        rows = [block_row(task, entry) for entry in task["blocks"].values()]
        parts.append(f"{name}:\n\n{markdown(head, rows)}")
    return parts


def block_row(task: Table, entry: Table) -> list[str]:
    return [
        block_label(entry["options"]["block_size"]),
        rate(entry),
        number(task, tuned_loss(entry)),
        milliseconds(entry),
        f"{entry['run_ms']:.3g}",
        f"{entry['state_bytes'] / 1e6:.3g}",
    ]


RESCALED = """ The methods below `kronecker` are that one with every tensor's step rescaled: `unit`,
the step's root mean square is lr; `relative`, the step is multiplied by that of the parameters;
`trust`, both; `distance`, as `unit`, times the distance from the start over the root of the steps.
They were tried on seed 0 alone, over one grid for all language models."""


def rate_and_loss(task: Table, entry: Table) -> str:
    return f"{rate(entry)}: {number(task, tuned_loss(entry))}"


def rate(entry: Table) -> str:
    if not entry["tuned"]:
        return f"{entry['lr']:g} (given)"
    return f"{entry['lr']:g}{' (edge)' if entry['edge'] else ''}"


def spread(entries: list[Table]) -> str:
    lrs = [e["lr"] for e in entries if math.isfinite(tuned_loss(e))]
    return f"{max(lrs) / min(lrs):.2g}" if lrs else ABSENT


def section(name: str, task: Table) -> str:
    """Heading, table and verdict of one task."""
    seeds = [f"seed {seed}" for seed in TEST_SEEDS]
    head = ["method", "lr", *seeds, "ms / step", "seconds", "steps", "wall"]
    by_loss = sorted(task["methods"].items(), key=lambda item: item[1]["mean"])
    rows = [row(task, method, entry) for method, entry in by_loss]
    missing = task["unfinished"]
    rest = "".join(f"\n\n{shorter(task, n, e)}" for n, e in by_loss if e["shorter"])
    rest += f"\n\nNot finished: {', '.join(f'`{m}`' for m in missing)}." if missing else ""
    title = f"## {name}\n\n{task['title'][0].upper()}{task['title'][1:]}"
    title += f"; {task['definition']['steps']} steps; {task['metric']}."
    return f"{title}\n\n{verdict(task)}\n\n{markdown(head, rows)}{rest}"


def shorter(task: Table, name: str, entry: Table) -> str:
    """Mean losses of one method over its shorter horizons."""
    runs = sorted(entry["shorter"].items(), key=lambda item: float(item[0]))
    ends = [
        f"{number(task, mean(run['losses']))} over {percent(float(h))} (lr {run['lr']:g})"
        for h, run in runs
    ]
    return filled(f"`{name}` in shorter runs: {', '.join(ends)}.")


def row(task: Table, name: str, entry: Table) -> list[str]:
    losses = [number(task, loss) for loss in entry["losses"]]
    seconds = ABSENT if entry["seconds"] is None else f"{entry['seconds']:.3g}"
    return [
        f"**{name}**" if entry["ours"] else name,
        rate(entry),
        *losses,
        milliseconds(entry),
        seconds,
        percent(entry["steps_share"]),
        percent(entry["wall_share"]),
    ]


def milliseconds(entry: Table) -> str:
    return ABSENT if entry["ms"] is None else f"{entry['ms']:.3g} ± {entry['iqr'] / 2:.1g}"


# ---------------------------------------------------------------------- words


def best(task: Table, ours: bool) -> tuple[str | None, Table | None]:
    """The tuned setting of AdaQN, or other method, with the lowest mean loss."""
    mine = [
        (name, entry)
        for name, entry in task["methods"].items()
        if entry["ours"] == ours and entry["tuned"]
    ]
    return min(mine, key=lambda item: item[1]["mean"], default=(None, None))


def number(task: Table, loss: float) -> str:
    if not math.isfinite(loss):
        return "diverged"
    return f"{loss:.3f}" if task["stochastic"] else f"{loss:.1e}"


def percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.0f} %"


def named(task: Table, name: str | None, entry: Table | None) -> str:
    return ABSENT if entry is None else f"{number(task, entry['mean'])} {name}"


def against(task: Table, mine: Table, other: Table) -> str:
    """Difference of two means, in nats; a factor for what spans decades."""
    if not (math.isfinite(mine["mean"]) and math.isfinite(other["mean"])):
        return ABSENT
    if task["stochastic"]:
        return f"{mine['mean'] - other['mean']:+.3f}"
    return times(mine["mean"] / other["mean"])


def verdict(task: Table) -> str:
    """One sentence: who wins, by how much, and whether the seeds bear it out."""
    ours, other = best(task, ours=True), best(task, ours=False)
    if ours[1] is None or other[1] is None:
        name, entry = ours if other[1] is None else other
        return f"Of the methods run so far, `{name}` ends lowest, at {number(task, entry['mean'])}."
    won = ours[1]["mean"] < other[1]["mean"]
    (first, winner), (second, loser) = (ours, other) if won else (other, ours)
    who = f"AdaQN (`{first}`) wins" if won else f"AdaQN loses: `{first}` wins"
    what = f"`{second}`, the best of the others," if won else f"AdaQN's best, `{second}`,"
    if math.isinf(loser["mean"]):
        return f"{who} with {number(task, winner['mean'])}; {what} diverges."
    higher = loser["mean"] / winner["mean"]
    size = f"{loser['mean'] - winner['mean']:.3f} above" if task["stochastic"] else factor(higher)
    every = all(a < b for a, b in zip(winner["losses"], loser["losses"], strict=True))
    doubt = "" if every else ", but not on every seed"
    return f"{who} with {number(task, winner['mean'])}; {what} ends {size}{doubt}."


def factor(ratio: float) -> str:
    return "level with it" if ratio < 1.05 else f"{times(ratio)} higher"


def times(ratio: float) -> str:
    return f"{float(f'{ratio:.2g}'):,g} times" if ratio < 1e5 else f"{ratio:.0e} times"
