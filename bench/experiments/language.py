"""Language models: the recurrent ones of the demo, and a small transformer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from adaqn_cuda.demo.data import Batches, Corpus, load_corpus
from adaqn_cuda.demo.models import RecurrentLM, detach, loss_of

#: The validation loss is taken over at most this many symbols, read as so many streams.
VALID_SYMBOLS, VALID_STREAMS, VALID_LENGTH = 30_000, 32, 64

corpus_at = lru_cache(maxsize=None)(load_corpus)


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each behind its own normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mixing = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mixing = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + self.mixing(self.before_mixing(x))

    def attention(self, x: Tensor) -> Tensor:
        split = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projection(mixed.transpose(1, 2).flatten(-2))


class TransformerLM(nn.Module):
    """Pre-norm causal transformer with learned positions; takes and gives what `RecurrentLM` does.

    Args:
        vocabulary: number of symbols.
        width: of the residual stream.
        heads: attention heads per layer.
        layers: blocks.
        context: longest stretch it can read.
    """

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, symbols: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Logits of shape (steps, batch, vocabulary), and no state."""
        x = self.embedding(symbols.t()) + self.position[: len(symbols)]
        return self.output(self.norm(self.blocks(x))).transpose(0, 1), None


class LanguageModelling:
    """Predict the next symbol of a text, read in parallel streams.

    Args:
        options: of the task: ``model``, ``level``, sizes, ``batch``, ``bptt``, and whether to
            ``carry`` the hidden state from batch to batch.
        seed: sets the initial parameters and where in the text the training starts.
        path: the text, as :func:`load_corpus` takes it.
    """

    def __init__(self, options: dict[str, Any], seed: int, path: str | None) -> None:
        corpus: Corpus = corpus_at(path, options["level"])
        self.symbols = len(corpus.vocabulary)
        torch.manual_seed(seed)
        self.model = self._build(options)
        self.batches = Batches(corpus.train, options["batch"], options["bptt"], "training text")
        start = torch.randint(len(self.batches), (), generator=torch.Generator().manual_seed(seed))
        self.batches.position = int(start) * self.batches.bptt
        self.valid = Batches(corpus.valid, VALID_STREAMS, VALID_LENGTH, "validation text")
        self.carry, self.hidden, self.repeats = options["carry"], None, 0

    def _build(self, options: dict[str, Any]) -> nn.Module:
        if options["model"] == "transformer":
            sizes = (options[name] for name in ("width", "heads", "layers", "bptt"))
            return TransformerLM(self.symbols, *sizes)
        return RecurrentLM(options["model"], self.symbols, options["hidden"], layers=1)

    def loss(self) -> Tensor:
        """Cross entropy of the next batch, in nats per symbol."""
        if self.batches.at_start():
            self.hidden = None
        inputs, targets = self.batches.next()
        self.current = inputs, targets, self.hidden
        logits, hidden = self.model(inputs, self.hidden)
        self.hidden = detach(hidden) if self.carry else None
        return loss_of(logits, targets)

    def again(self) -> Tensor:
        """The same on the same batch, from the same hidden state."""
        self.repeats += 1
        inputs, targets, hidden = self.current
        return loss_of(self.model(inputs, hidden)[0], targets)

    @torch.no_grad()
    def metric(self) -> float:
        """Validation loss, nats per symbol."""
        self.valid.position, hidden, losses = 0, None, []
        count = min(len(self.valid), VALID_SYMBOLS // (VALID_STREAMS * VALID_LENGTH))
        for _ in range(max(1, count)):
            inputs, targets = self.valid.next()
            logits, state = self.model(inputs, hidden)
            hidden = state if self.carry else None
            losses.append(float(loss_of(logits, targets)))
        return sum(losses) / len(losses)
