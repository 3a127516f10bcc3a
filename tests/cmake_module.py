"""Python modules that CMake builds for tests."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType


def build_module(source: Path, build: Path, name: str) -> ModuleType:
    """The extension module ``name`` of the CMake project in ``source``, built in ``build``.

    Sources that have not changed since an earlier build there are not compiled again.
    """
    import pybind11

    configure = [
        "cmake", "-S", source, "-B", build, "-GNinja",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DPYTHON_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    [path] = build.glob(f"{name}*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
