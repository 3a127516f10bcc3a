"""Python modules that CMake builds for tests."""

from __future__ import annotations

import fcntl
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def compile_module(source: Path, name: str, variant: str = "", *options: str) -> Path:
    """Where the extension module ``name`` of the CMake project in ``source`` is.

    Sources that have not changed since an earlier build there are not compiled again, and processes
    that ask for the same build wait for the first of them.

    Args:
        source: the project's directory.
        name: of the module.
        variant: what tells builds with other options apart.
        options: for CMake.
    """
    import pybind11

    build = ROOT / "build" / f"{name}{variant}-{sys.implementation.cache_tag}"
    configure = [
        "cmake", "-S", source, "-B", build, "-GNinja",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DPYTHON_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options,
    ]  # fmt: skip
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", build]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    [path] = build.glob(f"{name}*.so")
    return path


def import_module(name: str, path: Path) -> ModuleType:
    """The extension module at ``path``."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_module(source: Path, name: str) -> ModuleType:
    """The extension module ``name`` of the CMake project in ``source``."""
    return import_module(name, compile_module(source, name))
