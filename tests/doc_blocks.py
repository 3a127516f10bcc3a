"""Runs the Python of the README and of the documentation, page by page, on the CPU.

    python tests/doc_blocks.py [page ...]

The blocks of a page share a namespace, which begins with what examples take for granted: a small
model, its loss and data.  CUDA graphs have stand-ins that call what would be captured.  Blocks that
import one of OPTIONAL are left out where it is not installed.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import textwrap
import traceback
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Packages that no test needs.
OPTIONAL = ("safetensors", "skorch", "timm", "transformers")
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Python in a page, and the lines before each."""
    text = page.read_text()
    found = BLOCK.finditer(text)
    return [(text[: m.start(2)].count("\n"), textwrap.dedent(m[2])) for m in found]


def lacking(code: str) -> list[str]:
    """Packages that are optional, imported, and not there."""
    imported = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
    return [name for name in imported if name in OPTIONAL and find_spec(name) is None]


def taken_for_granted() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randint(0, 5, (16,)), torch.randint(0, 3, (16,))
    return {
        "model": model, "loss_fn": nn.CrossEntropyLoss(), "batches": [(x, y)] * 12, "x": x, "y": y,
        "held_x": x, "held_y": y, "__name__": "__main__",
    }  # fmt: skip


class Graph:
    """A CUDA graph that holds nothing."""

    def replay(self) -> None:
        pass


def replace_cuda() -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    torch.cuda.CUDAGraph = Graph
    torch.cuda.graph = lambda graph: nullcontext()
    torch.cuda.stream = lambda stream: nullcontext()
    torch.cuda.Stream = torch.cuda.current_stream = lambda: stream


def pretend_to_be_launched() -> None:
    """What torchrun sets for the only process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(where)


def run(page: Path) -> int:
    """How many blocks ran; raises what one raises, with the page's own line in the traceback."""
    namespace = taken_for_granted()
    found = [(line, code) for line, code in blocks(page) if not lacking(code)]
    for line, code in found:
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
    return len(found)


def main(pages: list[Path]) -> int:
    torch.set_num_threads(1)
    replace_cuda()
    pretend_to_be_launched()
    failed = 0
    for page in pages:
        try:
            with warnings.catch_warnings():
                print(f"{page.name}: {run(page)} blocks ran")
        except Exception:
            failed += 1
            print(f"{page.name}: FAILED\n{traceback.format_exc()}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]] or PAGES))
