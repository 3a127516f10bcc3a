"""Finished work, one JSON line each, in a file that outlives the process."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def key_of(definition: Record) -> str:
    """Equal for equal definitions, and only for those."""
    return json.dumps(definition, sort_keys=True)


class Ledger:
    """What has been run (``kind`` ``"run"``) and timed (``"time"``), found by its definition.

    Records of other definitions may stand in the same file and are left alone: a task or method
    that has changed is run again.  A last line without its end was cut off by a kill, and is
    dropped.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        self.records: list[Record] = [json.loads(line) for line in whole.splitlines()]
        self._runs = {key_of(r["definition"]): r for r in self._of("run")}

    def _of(self, kind: str) -> Iterator[Record]:
        return (record for record in self.records if record["kind"] == kind)

    def add(self, record: Record) -> None:
        self.records.append(record)
        if record["kind"] == "run":
            self._runs[key_of(record["definition"])] = record
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def find(self, definition: Record) -> Record | None:
        """The run so defined."""
        return self._runs.get(key_of(definition))

    def loss(self, definition: Record) -> float | None:
        """Its final loss: infinite if it diverged, ``None`` if it has not been run."""
        record = self.find(definition)
        if record is None:
            return None
        loss = record["loss"]
        return loss if loss is not None and math.isfinite(loss) else math.inf

    def runs(self) -> list[Record]:
        return list(self._of("run"))

    def timings(self) -> list[Record]:
        return list(self._of("time"))
