"""The native library: where it is, what it serves, and what to do if it is not there.

``setup.py`` runs this file for :func:`sources_digest`: it imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

#: Types of devices for which there may be native kernels.
SERVED = ("cpu", "cuda")
PACKAGE = Path(__file__).resolve().parent
#: What a failed build leaves in the built package: its reason, in one line.
BUILD_FAILURE = PACKAGE / "_build_failure.txt"
#: In a library, what comes before its record: JSON, and a zero byte.
RECORD_MARK = b"adaqn_build {"
#: Values of ``ADAQN_ISA``; csrc/cpu/parallel.cpp reads it.
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


@dataclass(frozen=True)
class Record:
    """What a build wrote into its library.

    Args:
        sources: :func:`sources_digest` of the sources it was built from.
        images: what its CUDA kernels run on: ``sm_90`` is machine code, ``compute_90`` PTX.
        without_cuda: why it has no CUDA kernels; ``None`` if it has.
    """

    sources: str
    images: tuple[str, ...]
    without_cuda: str | None


def sources_digest(root: Path) -> str | None:
    """A name for the native sources in ``root``: other sources, other name; ``None`` without."""
    if not (root / "csrc" / "torch" / "cpu.cpp").exists():
        return None
    kinds = {".h", ".cuh", ".cpp", ".cu"}
    files = [path for path in (root / "csrc").rglob("*") if path.suffix in kinds]
    digest = hashlib.sha256()
    for path in sorted([*files, root / "adaqn_cuda" / "version.py"]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def read_record(library: Path) -> Record:
    """The record of a library; one of a build that wrote none matches no sources."""
    content = library.read_bytes()
    start = content.find(RECORD_MARK)
    if start < 0:
        return Record("", (), "its build left no record")
    end = content.index(b"\0", start)
    words = json.loads(content[start + len(RECORD_MARK) - 1 : end])
    return Record(words["sources"], tuple(words["images"]), words["without_cuda"])


def library_path() -> Path | None:
    """The library that serves this package, or ``None``."""
    return _find()[0]


def _own_record() -> Record:
    """The record of the library that serves this package; there must be one."""
    library = library_path()
    assert library is not None
    return read_record(library)


@cache
def library_obstacle() -> str | None:
    """Why the native library is not loaded, and the remedy; ``None`` once it is.

    The first call loads it, and warns if it cannot.
    """
    return _warned("adaqn_cuda runs without native kernels", _isa_obstacle() or _load())


@cache
def obstacle(device_type: str) -> str | None:
    """Why native kernels cannot serve a type of device, and the remedy; ``None`` if they can."""
    missing = library_obstacle()
    if missing is not None:
        return missing
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if device_type in SERVED and has_kernel("adaqn::direction_step", device_type.upper()):
        return None
    if device_type == "cuda":
        reason = _own_record().without_cuda
        return _warned(
            "adaqn_cuda runs without native kernels on cuda",
            f"the native library was built without CUDA: {reason}; with the CUDA toolkit in place, "
            f"{_build_command()}",
        )
    return f"there are no native kernels for {device_type}"


@cache
def cuda_obstacle(index: int) -> str | None:
    """Why the library's CUDA kernels cannot run on a device, and the remedy; ``None`` if they can.

    The first call for a device asks the CUDA runtime, and warns if they cannot.
    """
    error = _probe(index)
    if error is None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    images = " ".join(_own_record().images)
    return _warned(
        f"adaqn_cuda runs without native kernels on cuda:{index}",
        f"the native library's kernels ({images}) do not run on cuda:{index}, of compute "
        f"capability {major}.{minor} ({error}); if its driver is not too old, set "
        f"TORCH_CUDA_ARCH_LIST={major}.{minor} and {_build_command()}",
    )


def _probe(index: int) -> str | None:
    """What the CUDA runtime says against a kernel of the library on a device."""
    probe = ctypes.CDLL(str(library_path())).adaqn_cuda_probe
    probe.restype = ctypes.c_char_p
    with torch.cuda.device(index):
        error = probe(ctypes.c_int(index))
    return None if error is None else error.decode()


def _warned(what: str, reason: str | None) -> str | None:
    """``reason``, and a warning if there is one."""
    if reason is not None:
        warnings.warn(f"{what}: {reason}", RuntimeWarning, 3)
    return reason


def _isa_obstacle() -> str | None:
    word = os.environ.get("ADAQN_ISA", "")
    if word in ("", *INSTRUCTION_SETS):
        return None
    return (
        f"ADAQN_ISA={word} is none of {', '.join(INSTRUCTION_SETS)}; set one of them, or unset it"
    )


def _load() -> str | None:
    path, missing = _find()
    if path is None:
        return missing
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return (
            f"{path} does not load into torch {torch.__version__} ({error}); it needs torch 2.10 "
            f"or later; to build it anew, {_build_command()}"
        )
    return None


@cache
def _find() -> tuple[Path | None, str]:
    """The library, and if there is none, why, with the remedy.

    Sources without an up-to-date library of their own, as in a clone that is the working directory
    of a program, take the one of an installed package, if it was built from the same sources.
    """
    wanted = sources_digest(PACKAGE.parent)
    found: list[str] = []
    for folder in [PACKAGE] if wanted is None else _packages():
        for path in sorted(folder.glob("_native*.so")):
            if wanted is None or read_record(path).sources == wanted:
                return path, ""
            found.append(f"{path} was built from other sources than {PACKAGE.parent / 'csrc'}")
        failure = folder / BUILD_FAILURE.name
        if failure.exists():
            found.append(f"it is missing in {folder}: {failure.read_text().strip()}")
    if not found:
        found.append("it has not been built")
    return None, f"no native library: {'; '.join(found)}; {_remedy()}"


def _packages() -> list[Path]:
    """Where packages of this name are, this one first."""
    others = [Path(entry or ".").resolve() / PACKAGE.name for entry in sys.path]
    return list(dict.fromkeys([PACKAGE, *others]))


def _remedy() -> str:
    return (
        f"install a C++17 compiler (e.g. apt install g++) if there is none, and {_build_command()}"
    )


def _build_command() -> str:
    install = "ADAQN_REQUIRE_EXT=1 pip install --force-reinstall --no-deps --no-cache-dir"
    root = PACKAGE.parent
    if (root / "csrc").exists():
        return (
            f"run '{install} {root}', or, to build it in place, "
            f"'cd {root} && python setup.py build_ext --inplace'"
        )
    return f"run '{install} .' in the sources of adaqn_cuda"
