"""Runs tests of the emulated CUDA kernels under ThreadSanitizer: see ``emulation/include/order.h``.

    python tests/races.py [pytest arguments]

Without arguments these are all such tests, which takes an hour.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from cmake_module import ROOT, compile_module
from emulated import NAME, SOURCE

TESTS = ROOT / "tests"
WHOLE = [
    str(TESTS / f"test_{name}.py") for name in ("cuda_emulated", "kronecker_cuda", "secant_cuda")
]
SMALL = str(TESTS / "small_cases.py")


@cache
def library() -> str | None:
    """GCC's ThreadSanitizer."""
    if shutil.which("g++") is None:
        return None
    found = subprocess.check_output(["g++", "-print-file-name=libtsan.so"], text=True).strip()
    return found if os.path.isabs(found) else None


@cache
def interpreter() -> list[str] | None:
    """How to start Python under ThreadSanitizer, if that is possible.

    ThreadSanitizer wants memory where the kernel's randomisation may not put it.
    """
    fixed = ["setarch", platform.machine(), "-R"]
    for prefix in (fixed if shutil.which("setarch") else []), []:
        command = [*prefix, sys.executable]
        environment = {**os.environ, "LD_PRELOAD": library() or ""}
        tried = subprocess.run([*command, "-c", ""], env=environment, capture_output=True)
        if tried.returncode == 0:
            return command
    return None


def obstacle() -> str | None:
    """Why races cannot be looked for here."""
    if library() is None:
        return "g++ with its ThreadSanitizer is not installed"
    if interpreter() is None:
        return "Python does not start under ThreadSanitizer here"
    return None


def build() -> Path:
    """The emulation, compiled for ThreadSanitizer."""
    return compile_module(
        SOURCE, NAME, "-races", "-DADAQN_EMULATE_RACES=ON", "-DCMAKE_CXX_COMPILER=g++"
    )


def run(arguments: list[str], capture: bool = False, **options: str | int):
    """Runs Python under ThreadSanitizer, with options of that: what :func:`subprocess.run` returns.

    Of a race's earlier access the place is known only as far back as the thread's history goes,
    which takes memory for each of thousands of threads.
    """
    options = {"history_size": 0, **options}
    environment = {
        **os.environ, "LD_PRELOAD": library(), "ADAQN_EMULATED": str(build()),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "TSAN_OPTIONS": ":".join(f"{name}={value}" for name, value in options.items()),
    }  # fmt: skip
    return subprocess.run(
        [*interpreter(), *arguments], env=environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE if capture else None,
    )  # fmt: skip


def run_tests(arguments: list[str], capture: bool = False) -> subprocess.CompletedProcess:
    """Runs tests under ThreadSanitizer, of which those fail that show a race."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ADAQN_RACE_REPORTS"] = log = f"{scratch}/report"
        pytest = ["-m", "pytest", "-p", "race_reports", "-p", "no:cacheprovider", *arguments]
        return run(pytest, capture, log_path=log)


if __name__ == "__main__":
    if obstacle():
        sys.exit(obstacle())
    sys.exit(run_tests(sys.argv[1:] or [*WHOLE, "-q"]).returncode)
