"""Checkpoints that survive a kill at any moment: written aside, then moved into place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .data import DataError

#: What the content of a checkpoint is known by.
KEYS = (
    "config", "fingerprint", "model", "optimizer", "hidden", "step", "position", "recent", "curve",
    "seconds", "random",
)  # fmt: skip


def save(path: Path, content: dict[str, Any]) -> None:
    """Replace ``path`` by ``content`` in one move; a reader sees the old file or the new one."""
    part = path.with_name(path.name + ".part")  # one name: a kill leaves at most one behind
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """What :func:`save` wrote.

    Raises:
        DataError: the file is something else, or damaged.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load fails in many ways on what is not its own
        reason = type(error).__name__
        raise DataError(f"--resume {path}: not a checkpoint, or damaged ({reason})") from error
    if not isinstance(content, dict) or not content.keys() >= set(KEYS):
        raise DataError(f"--resume {path}: not a checkpoint of adaqn train")
    return content
