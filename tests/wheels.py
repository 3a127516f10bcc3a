"""Builds what is published, and checks it: a source distribution, and a wheel made from it.

    pip install ".[release]" && python tests/wheels.py [--cuda] [--output dist]

The wheel serves every Python and torch that the package admits, on any Linux whose glibc is no
older than its name says.  With ``--cuda`` it has kernels for all GPUs too, which takes nvcc and
some minutes; such a wheel also serves where there is no CUDA.  ``wheel_matrix.py`` tries it out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Libraries of torch, which are there when the wheel's library is loaded.
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")


def run(*words: str | Path, **environment: str) -> None:
    """A program of the same environment as this Python's."""
    command = [str(word) for word in words]
    print("$", " ".join(command), flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {**os.environ, "PATH": path, **environment}
    subprocess.run(command, cwd=ROOT, env=inherited, check=True)


def build(cuda: bool, folder: Path) -> tuple[Path, Path]:
    """The source distribution, and the wheel made from it."""
    environment = {"ADAQN_REQUIRE_EXT": "1", **({} if cuda else {"ADAQN_CUDA": "0"})}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, **environment)
    [source], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


def tagged(wheel: Path, folder: Path) -> Path:
    """The wheel under the name of the oldest glibc that it runs on; nothing is put into it."""
    excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
    run("auditwheel", "repair", *excluded, "--wheel-dir", folder, wheel)
    [repaired] = folder.glob("*.whl")
    return repaired


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", action="store_true", help="with kernels for all GPUs")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source, wheel = build(options.cuda, Path(scratch) / "built")
        wheel = tagged(wheel, Path(scratch) / "tagged")
        run("auditwheel", "show", wheel)
        run("abi3audit", "--strict", "--verbose", wheel)
        run("twine", "check", "--strict", source, wheel)
        options.output.mkdir(parents=True, exist_ok=True)
        made = [shutil.copy(path, options.output) for path in (source, wheel)]
    print(*made, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
