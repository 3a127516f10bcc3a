"""adaQN, a stochastic quasi-Newton optimizer for PyTorch at close to first-order cost."""

from .adaqn import AdaQN
from .distributed.replicas import check_replicas
from .lbfgs import DETERMINISTIC, LBFGS
from .parametrized import parametrized_groups
from .presets import OLBFGS, PAPER, SQN
from .products import gauss_newton, hessian
from .state.blocks import rnn_blocks
from .state.plain import flatten_state_dict, unflatten_state_dict
from .version import __version__
from .wrappers import unwrap

__all__ = [
    "DETERMINISTIC",
    "LBFGS",
    "OLBFGS",
    "PAPER",
    "SQN",
    "AdaQN",
    "__version__",
    "check_replicas",
    "flatten_state_dict",
    "gauss_newton",
    "hessian",
    "parametrized_groups",
    "rnn_blocks",
    "unflatten_state_dict",
    "unwrap",
]
