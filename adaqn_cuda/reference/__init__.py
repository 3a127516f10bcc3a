"""Every operation of adaQN in plain PyTorch: the ground truth for native kernels, and the fallback.

The algorithm is that of Keskar & Berahas, "adaQN: An Adaptive Quasi-Newton Algorithm for Training
RNNs", ECML PKDD 2016.  One step is three passes over the d-vectors, separated by recursions on
``m = history_size`` numbers; a pair update adds two passes and a commit.

Beyond the paper, each of these is off at the value in brackets: clipping of the gradient
(``max_grad_norm = inf``), momentum with Nesterov's look-ahead (``beta = 0``), bias correction of
the average of squared gradients (``False``), damped pairs (``image = None``), a cap on the
direction (``max_direction = inf``), and another initial matrix than a diagonal
(``identity = False``).

Averages come by group: decays and ``eps`` may differ, and flat vectors are taken in runs of
elements that have the same (:mod:`.averages`).

The modules, in the order in which they build on one another:

===================  ==========================================================================
:mod:`.flat`         flat vectors out of tensors and back, and which elements have a gradient
:mod:`.acceptance`   the words that describe a gradient, whether its step counts, the counters
:mod:`.averages`     clipping, outliers, momentum and its look-ahead, the diagonal ``v``
:mod:`.descent`      how the parameters move, and a whole step without pairs
:mod:`.kronecker`    the Kronecker-factored initial matrix, and a whole step with it
:mod:`.recursion`    the ring of pairs, and the two-loop recursion on ``m`` numbers
:mod:`.direction`    a step with pairs: its three passes
:mod:`.iterate`      the averaged iterate, put in the parameters' place and taken out again
:mod:`.pairs`        the pair update: its two passes, and reset, store or skip
:mod:`.secant`       pairs of successive iterates on a deterministic loss, and the line search
===================  ==========================================================================

Symbols (the flat vectors hold every parameter of the optimizer, one after the other):

===============  ===========  =========================================================
argument         shape        meaning
===============  ===========  =========================================================
``params``       list         parameters ``w``, in any floating dtype
``grads``        list         their gradients ``g``; where ``None``, the parameter stands still
``accumulator``  (d,)         ``v``, the diagonal; ``None`` for the scalar initial matrix
``momentum``     (d,)         ``m``, the average of gradients; ``None`` without momentum
``iterate_sum``  (d,)         sum of the iterates since the last pair update; ``None``
                              without pairs
``anchor``       (d,)         ``w_o``, the averaged iterate at which the last pair ended
``direction``    (d,)         scratch: ``r = H0 q``, or the parameters set aside
``image``        (d,)         ``B0 s``, the candidate's image under the inverse of ``H0``
``s_ring``       (m+1, d)     pair differences ``s``; the row after the newest is free
``y_ring``       (m+1, d)     curvature images ``y``
``fisher``       (n, d)       recent gradients ``F``, or one row: ``y`` as given
``gram``         (m+2, m+1)   by slot: ``gram[i, j] = s_i.y_j``, ``gram[m+1, j] = y_j.y_j``
``moments``      (m+1,)       by slot ``s_i.m``
``projections``  (m+4,)       by slot ``u_i = s_i.q``, then the words of :class:`layout.Flag`
``images``       (m+2,)       by slot ``z_i = y_i.r``, then ``|H0 q|^2`` for the cap
===============  ===========  =========================================================

With ``history_size = 0`` the rings have no rows, and the buffers by slot only their last words.

No function reads a device value on the host; decisions are taken with ``torch.where``.  All rows of
the rings hold finite values at all times, so a zero coefficient switches a free row off.

With P the projection onto the parameters that have a gradient, a step is ``p = P H P q``: positive
definite where anything moves.  The others keep w, m and v, to the bit, and their part of F is zero;
a reset, which drops all momentum, leaves their w.
"""

from .acceptance import count_step, step_is_accepted
from .averages import (
    Averages,
    Run,
    averages_of_each,
    bias_correction,
    clip_factor,
    look_ahead_from_new,
    old_and_new,
    runs_of,
)
from .descent import diagonal_step, mean_squares, normalized_rates
from .direction import (
    cap_factor,
    count_moments,
    direction_images,
    direction_pass1,
    direction_pass2,
    direction_pass3,
    direction_step,
    moments_anew,
    projections_by_run,
    standing_moments,
)
from .flat import flatten, gradient_vector, presence, write_back
from .iterate import average, iterate_restore, iterate_swap
from .kronecker import (
    kronecker_accumulate,
    kronecker_apply,
    kronecker_step,
    shorten_outlier,
)
from .pairs import (
    curvature_commit,
    curvature_pass_a,
    curvature_pass_b,
    damping_factor,
    displacement,
    initial_product,
    weigh,
)
from .recursion import (
    backward_coefficients,
    forward_coefficients,
    free_slot,
    newest_slot,
    scalar_initial_matrix,
)
from .secant import (
    Sum,
    candidate_sums,
    judge_candidate,
    product,
    put_candidate,
    secant_combine,
    secant_decide,
    secant_keep,
    secant_measure,
    secant_move,
    secant_pair,
    secant_residual,
)

__all__ = [
    "Averages",
    "Run",
    "Sum",
    "average",
    "averages_of_each",
    "backward_coefficients",
    "bias_correction",
    "candidate_sums",
    "cap_factor",
    "clip_factor",
    "count_moments",
    "count_step",
    "curvature_commit",
    "curvature_pass_a",
    "curvature_pass_b",
    "damping_factor",
    "diagonal_step",
    "direction_images",
    "direction_pass1",
    "direction_pass2",
    "direction_pass3",
    "direction_step",
    "displacement",
    "flatten",
    "forward_coefficients",
    "free_slot",
    "gradient_vector",
    "initial_product",
    "iterate_restore",
    "iterate_swap",
    "judge_candidate",
    "kronecker_accumulate",
    "kronecker_apply",
    "kronecker_step",
    "look_ahead_from_new",
    "mean_squares",
    "moments_anew",
    "newest_slot",
    "normalized_rates",
    "old_and_new",
    "presence",
    "product",
    "projections_by_run",
    "put_candidate",
    "runs_of",
    "scalar_initial_matrix",
    "secant_combine",
    "secant_decide",
    "secant_keep",
    "secant_measure",
    "secant_move",
    "secant_pair",
    "secant_residual",
    "shorten_outlier",
    "standing_moments",
    "step_is_accepted",
    "weigh",
    "write_back",
]
