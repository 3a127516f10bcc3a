"""Tries out one wheel on many versions of Python and torch.

    python tests/wheel_matrix.py dist/*.whl [--only REGEX] [--environments FOLDER] [--output FILE]

For every pair in PAIRS whose Python is installed, an environment gets that torch and the wheel, and
runs tests of the wheel's library against the reference; beside it lie no sources.  Environments are
made anew, or, in a FOLDER, left there for the next time; with torch's CUDA builds each takes some 7
GB.  The outcome is a table, into FILE too, and the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
#: What must serve: the oldest of both together, every torch in use, and the newest on every Python.
PAIRS = [
    ("3.10", "2.10.0"),
    ("3.11", "2.12.1"),
    ("3.11", "2.13.0"),
    ("3.11", "2.15.0"),
    ("3.12", "2.15.0"),
    ("3.13", "2.15.0"),
    ("3.14", "2.15.0"),
]
NEEDED = ["pytest", "hypothesis", "numpy"]
SUITE = ["test_trajectories.py", "test_native_ops.py", "test_kronecker_native.py"]
#: A minute of them: whole runs, and every operation once, in several dtypes and by opcheck.
CHOSEN = "test_trajectories or opcheck or mixed"
HEADER = "| Python | torch | outcome |\n|---|---|---|\n"


def interpreter(version: str) -> str | None:
    """A Python of this version, if one is installed: as a command, or where pyenv puts it."""
    places = [shutil.which(f"python{version}")]
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places += sorted(str(path) for path in root.glob(f"versions/{version}.*/bin/python"))
    for place in filter(None, places):
        done = subprocess.run([place, "-c", "import venv"], capture_output=True)
        if done.returncode == 0:
            return place
    return None


def quiet(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])


def environment(folder: Path, python: str, torch: str) -> Path:
    """The Python of an environment with this torch."""
    own = folder / "bin" / "python"
    if not own.exists():
        quiet(python, "-m", "venv", folder)
    quiet(own, "-m", "pip", "install", "-q", f"torch=={torch}", *NEEDED)
    return own


def outcome(python: str, torch: str, wheel: Path, folder: Path) -> str:
    """What became of the tests: pytest's last line, or why there were none."""
    found = interpreter(python)
    if found is None:
        return "not tried: no such Python here"
    try:
        own = environment(folder, found, torch)
        quiet(own, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    except RuntimeError as error:
        return f"not tried: {error}"
    with tempfile.TemporaryDirectory() as scratch:
        tests = shutil.copytree(TESTS, Path(scratch) / "tests", ignore=shutil.ignore_patterns("_*"))
        suite = [str(tests / name) for name in SUITE]
        command = [str(own), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not cuda"]
        command += ["-k", CHOSEN, *suite]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    print(done.stdout[-3000:] + done.stderr[-1000:] if done.returncode else "", end="")
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
    said = re.sub(r" in [\d.]+s.*|=+|, \d+ (warnings?|deselected)", "", last).strip()
    return said if done.returncode == 0 else f"failed with exit status {done.returncode}: {said}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "--only", default=".", help="pairs like python3.11-torch2.13.0 that this matches"
    )
    parser.add_argument("--environments", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = []
    with contextlib.ExitStack() as stack:
        for python, torch in PAIRS:
            name = f"python{python}-torch{torch}"
            if not re.search(options.only, name):
                continue
            root = options.environments or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            said = outcome(python, torch, options.wheel.resolve(), root / name)
            lines.append(f"| {python} | {torch} | {said} |")
            print(lines[-1], flush=True)
    if options.output:
        options.output.write_text(HEADER + "\n".join(lines) + "\n")
    return int(any("| failed" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
