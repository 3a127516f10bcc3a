"""Recurrent language models."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

KINDS = ("lstm", "gru", "tanh", "irnn")
#: Kinds that start every stretch of text from zero.  Nothing bounds their state: carried along a
#: stream of thousands of symbols it overflows as soon as the recurrent matrix expands at all.
STATELESS = ("irnn",)


class RecurrentLM(nn.Module):
    """Embedding, recurrent layers, linear output.

    Args:
        kind: ``"lstm"``, ``"gru"``, ``"tanh"`` (Elman network) or ``"irnn"`` (ReLU network with
            identity recurrence, Le, Jaitly & Hinton 2015).
        vocabulary: number of symbols.
        hidden: width of the layers and, at most, of the embedding.
        layers: recurrent layers.
    """

    def __init__(self, kind: str, vocabulary: int, hidden: int, layers: int) -> None:
        super().__init__()
        width = min(hidden, max(16, vocabulary))
        self.embedding = nn.Embedding(vocabulary, width)
        if kind in ("lstm", "gru"):
            self.recurrent = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](width, hidden, layers)
        else:
            nonlinearity = {"tanh": "tanh", "irnn": "relu"}[kind]
            self.recurrent = nn.RNN(width, hidden, layers, nonlinearity=nonlinearity)
        self.output = nn.Linear(hidden, vocabulary)
        if kind == "irnn":
            self._start_from_identity()

    def _start_from_identity(self) -> None:
        for name, p in self.recurrent.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.eye_(p)
            elif name.startswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=0.01)

    def forward(self, symbols: Tensor, state: Hidden = None) -> tuple[Tensor, Hidden]:
        """Logits of shape (steps, batch, vocabulary) and the state after the last step."""
        features, state = self.recurrent(self.embedding(symbols), state)
        return self.output(features), state


Hidden = Tensor | tuple[Tensor, Tensor] | None


def map_hidden(function: Callable[[Tensor], Tensor], state: Hidden) -> Hidden:
    """``function`` of the state, or of both tensors of an LSTM's."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else function(state)
    h, c = state
    return function(h), function(c)


def detach(state: Hidden) -> Hidden:
    """The state without its history."""
    return map_hidden(Tensor.detach, state)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy per symbol, in nats."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
