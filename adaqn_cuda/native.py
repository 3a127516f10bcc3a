"""The native library: where it is, what it serves, and what to do if it is not there."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
#: What a failed build leaves behind: its reason, in one line.
BUILD_FAILURE = PACKAGE / "_build_failure.txt"


def library_path() -> Path | None:
    """The built library, or ``None``."""
    return next(iter(sorted(PACKAGE.glob("_native*.so"))), None)


@cache
def library_obstacle() -> str | None:
    """Why the native library is not loaded, and the remedy; ``None`` once it is.

    The first call loads it, and warns if it cannot.
    """
    obstacle = _load()
    if obstacle is not None:
        warnings.warn(f"adaqn_cuda runs without native kernels: {obstacle}", RuntimeWarning, 2)
    return obstacle


@cache
def obstacle(device_type: str) -> str | None:
    """Why native kernels cannot serve a type of device, and the remedy; ``None`` if they can."""
    missing = library_obstacle()
    if missing is not None:
        return missing
    if torch._C._dispatch_has_kernel_for_dispatch_key("adaqn::direction_step", device_type.upper()):
        return None
    if device_type == "cuda":
        return (
            "the native library was built without CUDA, because there was no nvcc; install the "
            f"CUDA toolkit and {_build_command()}"
        )
    return f"there are no native kernels for {device_type}"


def _load() -> str | None:
    path = library_path()
    if path is None:
        return f"{_missing()}; {_remedy()}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return (
            f"{path} does not load into torch {torch.__version__} ({error}); it needs torch 2.10 "
            f"or later; to build it anew, {_build_command()}"
        )
    return None


def _missing() -> str:
    """Why there is no library."""
    if BUILD_FAILURE.exists():
        return f"the native library is missing: {BUILD_FAILURE.read_text().strip()}"
    return "the native library has not been built"


def _remedy() -> str:
    return (
        f"install a C++17 compiler (e.g. apt install g++) if there is none, and {_build_command()}"
    )


def _build_command() -> str:
    if (PACKAGE.parent / "csrc").exists():
        return f"run 'cd {PACKAGE.parent} && python setup.py build_ext --inplace'"
    return (
        "run 'ADAQN_REQUIRE_EXT=1 pip install --force-reinstall --no-deps --no-cache-dir .' in the "
        "sources of adaqn_cuda"
    )
