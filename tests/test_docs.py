"""The README and docs/: they build, links lead somewhere, code runs, and nothing is stale."""

from __future__ import annotations

import ast
import inspect
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_blocks import PAGES, blocks, run

import adaqn_cuda
from adaqn_cuda import DETERMINISTIC, LBFGS, PAPER, AdaQN

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATOR = ("sphinx", "myst_parser", "furo")
#: What links are followed in.
LINKED = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "bench" / "results").rglob("*.md"))]


# ------------------------------------------------------------------------------ the site


def test_the_site_builds_without_warnings(tmp_path):
    """And shows formulas without a network, and a reference of all that is exported."""
    missing = [name for name in GENERATOR if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing; pip install '.[docs]'")
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-b", "html", "."]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    site = {page.stem: page.read_text() for page in (tmp_path / "docs").glob("*.html")}
    assert set(site) >= {page.stem for page in PAGES[1:]} - {"wheel_matrix"}
    for name in ("method", "api"):
        assert site[name].count("<math") >= 50
        assert r"\sqrt" not in site[name] and r"\_" not in site[name]
        assert not re.search(r'<(script|link)[^>]+(src|href)="(https?:)?//', site[name])
    for name in set(adaqn_cuda.__all__) - {"__version__", "DETERMINISTIC"}:  # without docstrings
        assert re.search(rf'id="adaqn_cuda\.(presets\.)?{name}"', site["api"]), name


# ------------------------------------------------------------------------------ links


def without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Headings as GitHub and MyST name them."""
    titles = re.findall(r"^#+ +(.*)$", without_blocks(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`]*`", "", without_blocks(page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), f"{target}: no such file"
        assert file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


# ------------------------------------------------------------------------------ code


def test_every_block_of_code_runs(tmp_path):
    """In a folder of its own, as some write files."""
    assert sum(len(blocks(page)) for page in PAGES) > 15
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "doc_blocks.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_block_that_fails_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("- text\n\n  ```python\n  a = model\n  a.nothing\n  ```\n")
    with pytest.raises(AttributeError, match="nothing") as raised:
        run(page)
    place = raised.traceback[-2]  # before torch's own
    assert str(place.path) == str(page) and place.lineno + 1 == 5


# ------------------------------------------------------------------------------ memory


@pytest.fixture(scope="module")
def memory() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "memory.py"))


def test_the_table_of_memory_is_that_of_its_script(memory):
    assert memory["PAGE"].read_text() == memory["page"](), "run python docs/memory.py"


def test_the_models_have_as_many_parameters_as_is_known(memory):
    known = [124_439_808, 86_567_656, 25_557_032, 1_235_814_400]
    shapes = [model() for model in memory["MODELS"].values()]
    counts = [sum(torch.Size(shape).numel() for shape in own) for own in shapes]
    assert counts[: len(known)] == known


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, dict):
        return [t for value in state.values() for t in tensors(value)]
    if isinstance(state, list):
        return [t for value in state for t in tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []


def measured(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state after a step, of tensors with more than one element."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.step()
    found = [t for state in optimizer.state.values() for t in tensors(state) if t.numel() > 1]
    return sum(t.numel() * t.element_size() for t in found)


def test_bytes_are_those_of_the_optimizers_themselves(memory, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from experiments.peers.soap import SOAP

    shapes = [(6, 4), (3, 2, 2, 2), (7,), (1, 5)]
    params = [torch.randn(shape) for shape in shapes]
    assert measured(torch.optim.Adam(params)) == memory["adam_bytes"](shapes)
    assert measured(SOAP(params)) == memory["soap_bytes"](shapes)
    for options in memory["SETTINGS"].values():
        optimizer = AdaQN(params, **options)
        measured(optimizer)
        assert optimizer.stats()["state_bytes"] == memory["adaqn_bytes"](shapes, options)


def test_what_the_readme_says_of_memory_is_in_the_table(memory):
    rows = [line.split("|")[1:-1] for line in memory["lines"]()]
    own = [float(row[rows[0].index(" default ")]) for row in rows[2:]]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"State is {min(own)} to {max(own)} bytes per parameter" in text
    migrating = " ".join((DOCS / "migrating.md").read_text().split())
    assert f"{min(own) / 8:.1f} to {max(own) / 8:.1f} times the bytes of Adam's" in migrating


# ------------------------------------------------------------------------------ results

#: Tasks of the README's table, as the record names them.
TASKS = {
    "Elman network": "tanh",
    "IRNN": "irnn",
    "GRU": "gru",
    "LSTM": "lstm",
    "LSTM on words": "lstm-word",
    "transformer": "transformer",
    "Elman, batch 512": "tanh-512",
    "LSTM, batch 512": "lstm-512",
}


def recorded(task: str) -> dict[str, list[str]]:
    """Rows of the record's table of a task, by method."""
    record = (ROOT / "bench" / "results" / "convergence.md").read_text()
    section = record.split(f"\n## {task}\n")[1].split("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\|.*\|$", section, re.M)]
    return {row[0].strip("*"): row for row in rows}


def mean_loss(row: list[str]) -> float:
    """That of both seeds; infinite if one has diverged."""
    return sum(inf if cell == "diverged" else float(cell) for cell in row[2:4]) / 2


@pytest.mark.parametrize("task", TASKS)
def test_losses_in_the_readme_are_recorded(task):
    text = (ROOT / "README.md").read_text()
    [line] = re.findall(rf"^\| {task} \| (.* %) \|$", text, re.M)
    best, muon, own, steps, wall = line.replace("*", "").split(" | ")
    loss, best_method = best.lower().split()
    rows = recorded(TASKS[task])
    for method, figure in {best_method: loss, "muon": muon, "kronecker": own}.items():
        assert abs(mean_loss(rows[method]) - float(figure)) < 0.0011, method  # seeds are rounded
    assert rows["kronecker"][-2:] == [steps, wall]
    assert best_method == min(("adam", "nadam", "rmsprop"), key=lambda m: mean_loss(rows[m]))


# ------------------------------------------------------------------------------ options


def value_of(cell: str) -> Any:
    """What a table says of a default."""
    words = {"inf": inf, "none": None, "2⁻²⁶": 2**-26}
    text = cell.strip().strip("`")
    return words[text] if text in words else ast.literal_eval(text)


def rows_of(page: Path, heading: str) -> list[list[str]]:
    section = page.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    table = re.findall(r"^\| (`.*) \|$", section, re.M)
    return [re.split(r" ?(?<!\\)\| ?", row) for row in table]


def defaults_of(optimizer: type) -> dict[str, Any]:
    parameters = inspect.signature(optimizer.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def test_the_table_of_hyper_parameters_has_the_defaults():
    own, seen = defaults_of(AdaQN), set()
    for names, _, default, paper, *_ in rows_of(DOCS / "choosing.md", "Hyper-parameters of AdaQN"):
        for name in re.findall(r"`(\w+)`", names):
            seen.add(name)
            assert own[name] == value_of(default), name
            assert not paper or PAPER.get(name, own[name]) == value_of(paper), name
    assert set(PAPER) <= seen
    untold = {
        "curvature_closure",
        "foreach",
        "capturable",
        "differentiable",
        "max_factor_dim",
        "state_sharding",
    }
    assert set(own) - seen == untold


def test_the_table_of_lbfgs_has_the_defaults():
    own = defaults_of(LBFGS)
    for names, default, preset, _ in rows_of(DOCS / "choosing.md", "Hyper-parameters of LBFGS"):
        values = zip(default.split(", "), preset.split(", "), strict=True)
        for name, (plain, chosen) in zip(re.findall(r"`(\w+)`", names), values, strict=True):
            assert own[name] == value_of(plain), name
            assert DETERMINISTIC.get(name, own[name]) == value_of(chosen), name


# ------------------------------------------------------------------------------ errors


def template(node: ast.AST) -> str:
    """The text of a message, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    return "…"


def raised() -> dict[str, str]:
    """Messages of the package, its demo apart, and where they are raised or warned of."""
    found = {}
    for path in sorted((ROOT / "adaqn_cuda").rglob("*.py")):
        if "demo" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            warns = isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "warn"
            if isinstance(call, ast.Call) and call.args and (warns or isinstance(node, ast.Raise)):
                found[template(call.args[0])] = f"{path.name}:{call.lineno}"
    return found


def explained() -> list[str]:
    """Beginnings of messages that the page has something to say about."""
    text = (DOCS / "troubleshooting.md").read_text().split("## Warnings")[1]
    heads = re.findall(r"^- ((?:`[^`]+`(?:,\s+)?)+):", text, re.MULTILINE)
    return [entry for head in heads for entry in re.findall(r"`([^`]+)`", head)]


def explains(entry: str, message: str) -> bool:
    """Whether a message begins as an entry does; what an entry leaves open, a message must, too."""
    pattern = ".*".join(re.escape(part) for part in entry.removesuffix(" …").split("…"))
    left_open = entry.startswith("…") and not message.startswith("…")
    return not left_open and re.match(pattern, message, re.DOTALL) is not None


def test_every_error_is_explained():
    entries = explained()
    assert len(entries) > 50
    for message, place in raised().items():
        if message != "…: …":  # native.py's, of which the page has the first words
            assert any(explains(entry, message) for entry in entries), f"{place}: {message}"


def test_every_error_that_is_explained_is_raised():
    messages = [*raised(), "… runs without native kernels …"]
    for entry in explained():
        assert any(explains(entry, message) for message in messages), entry
