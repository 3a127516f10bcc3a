"""Text to train on: where it comes from, how it becomes integers, and how batches are cut."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
#: Size of the default corpus, in characters, and of its largest single file.
DEFAULT_SIZE, LARGEST_FILE = 2_000_000, 100_000
#: Characters rarer than this in the training split become ``<unk>``.
RARE = 20


class DataError(ValueError):
    """The text cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Corpus:
    """A text split in three, as integers.

    Args:
        name: where it comes from, for people.
        level: ``"char"`` or ``"word"``.
        vocabulary: symbol of each integer.
        train, valid, test: the splits, 1-d int64.
        fingerprint: hash over vocabulary and splits.
    """

    name: str
    level: str
    vocabulary: list[str]
    train: Tensor
    valid: Tensor
    test: Tensor
    fingerprint: str


def load_corpus(path: str | None, level: str, vocabulary_size: int = 10_000) -> Corpus:
    """Read the text at ``path``, or the standard library's sources if there is none.

    Args:
        path: a text file, split 90/5/5, or a folder with files named ``*train*``, ``*valid*`` and
            ``*test*`` (without ``train``, ``valid`` is trained on and ``test`` validated on).
        level: ``"char"`` or ``"word"``.
        vocabulary_size: words kept at the word level, the most frequent ones.

    Raises:
        DataError: there is nothing to read.
    """
    if path is None:
        name, splits = "Python standard library", _split(standard_library_sources())
    elif os.path.isdir(path):
        name, splits = _read_folder(Path(path))
    else:
        name, splits = Path(path).name, _split(_read_file(Path(path)))
    tokens = [_tokenize(text, level) for text in splits]
    vocabulary = _vocabulary(tokens[0], level, vocabulary_size)
    if len(vocabulary) < 2:
        raise DataError(f"--data {name}: no symbol to learn in the training text; give more text")
    index = {symbol: number for number, symbol in enumerate(vocabulary)}
    train, valid, test = (
        torch.tensor([index.get(t, 0) for t in part], dtype=torch.int64) for part in tokens
    )
    digest = hashlib.sha256("\0".join(vocabulary).encode())
    for part in (train, valid, test):
        digest.update(part.numpy().tobytes())
    return Corpus(name, level, vocabulary, train, valid, test, digest.hexdigest()[:16])


def standard_library_sources() -> str:
    """About 2 MB of the standard library's modules, always the same ones on one machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts, size = [], 0
    for file in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        if file.parent.name in ("test", "tests", "site-packages", "idlelib", "lib2to3"):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")[:LARGEST_FILE]
        texts.append(text)
        size += len(text)
        if size >= DEFAULT_SIZE:
            break
    if not texts:
        raise DataError(f"no Python sources in {root}; name a text file with --data")
    return "".join(texts)[:DEFAULT_SIZE]


def _read_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"--data {path}: {error.strerror}; name a text file or folder") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"--data {path}: not UTF-8 at byte {error.start}; name a text file, or convert this "
            "one (iconv -t utf-8)"
        ) from None
    if "\0" in text:
        raise DataError(f"--data {path}: no text, it has zero bytes; name a text file")
    if not text.strip():
        raise DataError(f"--data {path}: the file is empty")
    return text


def _read_folder(folder: Path) -> tuple[str, list[str]]:
    """Train, valid and test texts of a Penn-Treebank-style folder."""
    found = {}
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"--data {folder}: {error.strerror}; name another folder") from None
    for split in ("train", "valid", "test"):
        files = [f for f in inside if f.is_file() and split in f.name.lower()]
        if files:
            found[split] = _read_file(files[0])
    if found.keys() >= {"train", "valid"}:
        return folder.name, [found["train"], found["valid"], found.get("test", found["valid"])]
    if found.keys() == {"valid", "test"}:
        note = f"{folder.name} (no train file: trained on valid, validated on test)"
        return note, [found["valid"], found["test"], found["test"]]
    raise DataError(
        f"--data {folder}: expected files named *train* and *valid* (and *test*), found "
        f"{', '.join(found) or 'none'}"
    )


def _split(text: str) -> list[str]:
    """90 % to train, 5 % to validate, 5 % to test, in the text's order."""
    a, b = int(0.9 * len(text)), int(0.95 * len(text))
    return [text[:a], text[a:b], text[b:]]


def _tokenize(text: str, level: str) -> Sequence[str]:
    return text if level == "char" else text.replace("\n", f" {END_OF_LINE} ").split()


def _vocabulary(tokens: Sequence[str], level: str, size: int) -> list[str]:
    """``<unk>`` first, then the symbols of the training split, the most frequent first."""
    counts = Counter(tokens)
    counts.pop(UNKNOWN, None)
    order = sorted(counts, key=lambda symbol: (-counts[symbol], symbol))
    if level == "word":
        return [UNKNOWN, *order[: size - 1]]
    return [UNKNOWN, *(c for c in order if counts[c] >= min(RARE, 1 + len(tokens) // 1000))]


class Batches:
    """Endless stateful batches: ``batch`` parallel streams through the text, ``bptt`` at a time.

    ``position`` is all there is to save.  When the streams end they start again, and the hidden
    state should too: then :meth:`at_start` is true.
    """

    def __init__(
        self,
        tokens: Tensor,
        batch: int,
        bptt: int,
        what: str = "text",
        remedy: str = "lower --batch or --bptt",
    ) -> None:
        length = (len(tokens) - 1) // batch
        if length < bptt:
            raise DataError(
                f"the {what} has {len(tokens):,} symbols, too few for {batch} streams of {bptt}; "
                f"{remedy}, or give more --data"
            )
        used = length * batch
        self.inputs = tokens[:used].view(batch, length).t().contiguous()
        self.targets = tokens[1 : used + 1].view(batch, length).t().contiguous()
        self.bptt, self.position = bptt, 0

    def __len__(self) -> int:
        """Batches in one pass through the text."""
        return len(self.inputs) // self.bptt

    def at_start(self) -> bool:
        return self.position == 0

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each of shape (bptt, batch)."""
        rows = slice(self.position, self.position + self.bptt)
        pair = self.inputs[rows], self.targets[rows]
        self.position += self.bptt
        if self.position + self.bptt > len(self.inputs):
            self.position = 0
        return pair
