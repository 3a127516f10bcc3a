"""What is published: a source distribution with everything, a description for an index."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from email import message_from_bytes
from email.message import Message
from importlib.util import find_spec
from pathlib import Path

import pytest
import wheel_matrix
from test_build import run_setup

from adaqn_cuda.native import library_path

ROOT = Path(__file__).parents[1]
#: What setuptools adds, and what it needs to.
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|adaqn_cuda\.egg-info/.*")
REPOSITORY = "https://example.org/adaqn"


def tracked() -> set[str]:
    """Names of all files under version control."""
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git repository")
    return {name for name in found.stdout.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files under version control, and some that nobody should get."""
    tree = tmp_path_factory.mktemp("sdist") / "tree"
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    for name in ("docs/_build/index.html", "tests/__pycache__/x.pyc", "adaqn_cuda/_native.abi3.so"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("")
    return tree


def distribution(tree: Path) -> tarfile.TarFile:
    done = run_setup(tree, "-q", "sdist")
    assert done.returncode == 0, done.output
    [path] = (tree / "dist").glob("*.tar.gz")
    return tarfile.open(path)


def contents(archive: tarfile.TarFile) -> dict[str, bytes]:
    """Files by their names below the archive's one folder."""
    return {
        member.name.partition("/")[2]: archive.extractfile(member).read()
        for member in archive.getmembers()
        if member.isfile()
    }


@pytest.fixture(scope="module")
def released(tree: Path) -> dict[str, bytes]:
    return contents(distribution(tree))


def test_a_source_distribution_has_what_git_has(released, tree):
    names = {name for name in released if not GENERATED.fullmatch(name)}
    assert names == tracked()
    assert all(released[name] == (tree / name).read_bytes() for name in names)


def metadata(released: dict[str, bytes]) -> Message:
    return message_from_bytes(released["PKG-INFO"])


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_a_description_without_a_repository_has_no_relative_links(released):
    said = metadata(released)
    assert said["Description-Content-Type"].startswith("text/markdown")
    assert "![" not in said.get_payload()
    assert all(link.startswith("https://") for link in links(said.get_payload()))
    assert "Project-URL" not in said


def test_with_a_repository_all_links_lead_there(tree, tmp_path):
    tree = shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("dist"))
    path = tree / "setup.py"
    text = path.read_text()
    assert text.count('REPOSITORY = ""') == 1
    path.write_text(text.replace('REPOSITORY = ""', f'REPOSITORY = "{REPOSITORY}"'))
    said = metadata(contents(distribution(tree)))
    described = links(said.get_payload())
    assert all(link.startswith("https://") for link in described)
    own = [link for link in described if link.startswith(REPOSITORY)]
    paths = {re.sub(f"{REPOSITORY}/(blob|raw)/HEAD/|#.*", "", link) for link in own}
    assert "docs/index.md" in paths
    assert all((ROOT / name).exists() for name in paths), paths
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", said.get_payload())
    assert pictures and all(picture.startswith(f"{REPOSITORY}/raw/") for picture in pictures)
    assert {url.partition(", ")[0] for url in said.get_all("Project-URL")} >= {
        "Source",
        "Documentation",
        "Changelog",
        "Issues",
    }


def test_versions_of_python_that_are_named_are_those_that_are_admitted(released):
    said = metadata(released)
    minors = [
        int(word.rpartition(".")[2])
        for word in said.get_all("Classifier")
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", word)
    ]
    assert said["Requires-Python"] == f">=3.{min(minors)}"
    assert sys.version_info.minor in minors


def check(tool: str, *arguments: str | Path) -> None:
    """A program that judges what is published; skips where it is not installed."""
    if find_spec(tool) is None:
        pytest.skip(f"{tool} is missing; pip install '.[test]'")
    done = subprocess.run([sys.executable, "-m", tool, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_index_can_show_the_description(released, tree):
    [path] = (tree / "dist").glob("*.tar.gz")
    check("twine", "check", "--strict", path)


def test_the_library_keeps_to_the_stable_abi():
    if library_path() is None:
        pytest.skip("the native library is not built")
    check("abi3audit", "--strict", library_path())


def test_what_is_not_there_is_not_tried(tmp_path):
    said = wheel_matrix.outcome("3.99", "2.13.0", tmp_path / "none.whl", tmp_path)
    assert said == "not tried: no such Python here"


def test_every_pair_of_versions_has_an_outcome():
    rows = (ROOT / "docs" / "wheel_matrix.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(python, torch) for python, torch, _ in cells] == wheel_matrix.PAIRS
    assert not any(outcome.startswith("failed") for *_, outcome in cells)
