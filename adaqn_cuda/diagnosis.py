"""A page that says what is installed, which backends serve which device, and what to do if not."""

from __future__ import annotations

import importlib.metadata
import platform
from importlib.util import find_spec

import torch

from . import native
from .ops import select_backend
from .version import __version__

#: Packages of the extras, and what they are for.
OPTIONAL = {"matplotlib": "pictures", "tqdm": "progress bars"}


def report() -> str:
    """The diagnosis as text."""
    lines = [
        f"adaqn_cuda {__version__}",
        f"Python     {platform.python_version()} on {platform.platform()}",
        f"torch      {torch.__version__} (CUDA {torch.version.cuda or 'not built in'})",
        "",
        "Devices and backends",
        *(_device_line(torch.device(name)) for name in _devices()),
        *_missing_cuda(),
        *_library_lines(),
        "",
        "Demo",
        *(_package_line(name, use) for name, use in OPTIONAL.items()),
        "",
        "Next: 'adaqn train' trains a recurrent language model; 'adaqn --help' lists the rest.",
    ]
    return "\n".join(lines)


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _device_line(device: torch.device) -> str:
    backend = select_backend(device, None)
    name = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"  {device!s:8} {name}: {backend.name} ({backend.reason})"


def _missing_cuda() -> list[str]:
    if torch.cuda.is_available():
        return []
    if torch.version.cuda is None:
        return ["  cuda     this torch is built without CUDA; see https://pytorch.org to get one"]
    return ["  cuda     torch finds no CUDA device or driver; nvidia-smi tells more"]


def _library_lines() -> list[str]:
    path = native.library_path()
    if path is None:  # the devices' lines say why
        return []
    built = native.read_record(path)
    cuda = f"CUDA kernels for {' '.join(built.images)}"
    if not built.images:
        cuda = f"no CUDA kernels: {built.without_cuda}"
    return [f"  library  {path}", f"           {cuda}"]


def _package_line(name: str, use: str) -> str:
    if find_spec(name) is None:
        return f"  {name:10} missing ({use}); pip install {name}"
    return f"  {name:10} {importlib.metadata.version(name)} ({use})"
