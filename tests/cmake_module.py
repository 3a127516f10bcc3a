"""Python modules that CMake builds for tests."""

from __future__ import annotations

import fcntl
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def build_module(source: Path, name: str) -> ModuleType:
    """The extension module ``name`` of the CMake project in ``source``.

    Sources that have not changed since an earlier build there are not compiled again, and processes
    that ask for the same build wait for the first of them.
    """
    import pybind11

    build = ROOT / "build" / f"{name}-{sys.implementation.cache_tag}"
    configure = [
        "cmake", "-S", source, "-B", build, "-GNinja",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DPYTHON_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", build]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    [path] = build.glob(f"{name}*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
