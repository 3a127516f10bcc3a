"""adaQN, a stochastic quasi-Newton optimizer for PyTorch at close to first-order cost."""

from .adaqn import AdaQN
from .blocks import rnn_blocks
from .options import PAPER
from .version import __version__

__all__ = ["PAPER", "AdaQN", "__version__", "rnn_blocks"]
