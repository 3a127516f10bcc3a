r"""Settings of published methods, as arguments of :class:`adaqn_cuda.AdaQN`.

.. data:: PAPER

    adaQN as its authors ran it, with every extension off: Keskar and Berahas, ECML PKDD 2016,
    Algorithm 1.

.. data:: SQN

    The stochastic quasi-Newton method of Byrd, Hansen, Nocedal and Singer, SIAM J. Optim. 26(2),
    2016, Algorithms 1 and 2. Every :math:`L` steps, with :math:`\bar w_t` the average of their
    iterates, there is a new pair of :math:`s_t = \bar w_t - \bar w_{t-1}` and
    :math:`y_t = \nabla^2 F_{S_H}(\bar w_t) s_t`, a Hessian-vector product on a batch :math:`S_H`
    of its own; :math:`H_t` is L-BFGS on :math:`(s_t^\top y_t / y_t^\top y_t) I` of the newest
    pair. The first :math:`2 L` steps are plain SGD. As one product serves :math:`L` steps, its
    batch should be larger than that of the gradients::

        product = hessian(model, loss_fn, batch=lambda: next(large_batches))
        optimizer = AdaQN(model.parameters(), lr=beta, **{**SQN, "curvature": product})
        scheduler = LambdaLR(optimizer, lambda k: 1 / (1 + k))  # the paper's beta / k

    The iterates are those of the paper. It assumes convexity; where :math:`s_t^\top y_t` is not
    positive, the pair is refused and :math:`\bar w_{t-1}` stays for the next one. A batch is asked
    for in step :math:`L`, too, when there is nothing to multiply yet.

.. data:: OLBFGS

    Online L-BFGS: Schraudolph, Yu and Günter, AISTATS 2007, in the form of Mokhtari and Ribeiro,
    JMLR 16, 2015. The step from :math:`w_t` to :math:`w_{t+1}` on a batch :math:`x_t` gives a pair
    of :math:`s_t = w_{t+1} - w_t` and :math:`y_t = \nabla f(w_{t+1}, x_t) - \nabla f(w_t, x_t)`,
    two gradients on the same batch; :math:`H_{t+1}` is L-BFGS on :math:`(s_t^\top y_t / y_t^\top
    y_t) I`. As a pair is taken in the step after its own, ``curvature_closure`` is the loss on the
    batch before::

        optimizer = AdaQN(model.parameters(), lr=0.1, **OLBFGS)
        for before, batch in itertools.pairwise(batches):
            optimizer.curvature_closure = lambda: loss_on(before)
            optimizer.zero_grad()
            loss_on(batch).backward()
            optimizer.step()

    It differs from the papers:

    - a pair is first used two steps after its own, in the papers one. For their iterates, follow
      every step by a second one at lr 0 with the closure on the present batch, which takes the pair
      at once (and the next call of the first kind tries an empty one, which is refused);
    - the initial matrix is that of the newest pair, as in the second paper, where the first one
      averages :math:`s_i^\top y_i / y_i^\top y_i` over the pairs;
    - steps before there is a pair are plain SGD, where the first paper shortens the first one to
      almost nothing; a scheduler can;
    - a pair of which :math:`s_t^\top y_t` is not positive is refused, and the next one begins where
      it began;
    - three gradients are computed in a step, in the papers two.

    The first paper's step lengths :math:`\eta_0 \tau / (\tau + t)` are a scheduler's, and its
    :math:`\lambda s_t` in :math:`y_t` is :math:`\frac{\lambda}{2} |w|^2` in the loss of the
    closure.
"""

from __future__ import annotations

from math import inf
from typing import Any

PAPER: dict[str, Any] = {
    "lr": 0.01,
    "history_size": 10,
    "fisher_size": 100,
    "update_interval": 20,
    "init": "rmsprop",
    "decay": 0.9,
    "eps": 2**-26,
    "min_curvature": 1e-4,
    "max_increase": 1.01,
    "weight_decay": 0.0,
    "maximize": False,
    "history_dtype": None,
    "fisher_dtype": None,
    "curvature": "fisher",
    "momentum": 0.0,
    "damping": 0.0,
    "max_direction": inf,
    "bias_correction": False,
    "max_grad_norm": inf,
}

#: Plain L-BFGS, on a multiple of the identity, of all pairs with positive s.y.
_PLAIN: dict[str, Any] = {
    "history_size": 10,
    "init": "scalar",
    "min_curvature": 0.0,
    "momentum": 0.0,
    "damping": 0.0,
    "max_direction": inf,
    "max_grad_norm": inf,
}

SQN: dict[str, Any] = {**_PLAIN, "update_interval": 20, "curvature": "product"}

OLBFGS: dict[str, Any] = {**_PLAIN, "update_interval": 1, "curvature": "difference"}
