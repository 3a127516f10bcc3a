"""Random programs of what a user may do to an optimizer (hypothesis); see :mod:`fuzzing`.

A failure prints the shortest program that it was found with, which
``Machine(**machine).run(program)`` runs again.  ``ADAQN_FUZZ=20000`` runs so many programs instead
of 1,000, and different ones every time (pytest's ``--hypothesis-seed`` repeats them).
"""

import os

import torch
from fuzzing import GRADIENTS, LAYOUTS, LEGAL, MOODS, STRUCTURAL, WAYS, Machine
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

EXAMPLES = os.environ.get("ADAQN_FUZZ")

machines = st.fixed_dictionaries(
    dict(
        layout=st.sampled_from([*LAYOUTS, "plain"]),
        dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
        groups=st.sampled_from([1, 2]),
        monitored=st.booleans(),
        init=st.sampled_from(["scalar", "adagrad", "rmsprop", "rmsprop", "kronecker"]),
        history_size=st.sampled_from([0, 2, 3]),
        update_interval=st.sampled_from([2, 3]),
        fisher_size=st.sampled_from([1, 3]),
        curvature=st.sampled_from(["fisher", "fisher", "gradients", "difference", "product"]),
        momentum=st.sampled_from([0.0, 0.8]),
        damping=st.sampled_from([0.0, 0.2]),
        max_direction=st.sampled_from([float("inf"), 1.0]),
        max_grad_norm=st.sampled_from([float("inf"), 1.0]),
        weight_decay=st.sampled_from([0.0, 0.1]),
        bias_correction=st.booleans(),
        maximize=st.sampled_from([False, False, True]),
        normalize=st.sampled_from([False, False, True]),
        history_dtype=st.sampled_from([None, None, torch.bfloat16]),
        lr=st.sampled_from([0.1, 0.01]),
    )
)

STEPS = [("step", kind, way) for kind in GRADIENTS for way in WAYS]
ACTIONS = [
    ("nothing",),  # what others shrink to
    *(("step", "normal", way) for way in WAYS for _ in range(12)),
    *STEPS,
    *(("step", "missing", way) for way in WAYS for _ in range(4)),
    *(("option", name) for name in LEGAL for _ in range(2)),
    *(("structural", name) for name in STRUCTURAL),
    *(("mood", mood) for mood in MOODS),
    *(("mood", "fine") for _ in MOODS),
    *(("resume", how) for how in ("load", "save", "deepcopy", "pickle") for _ in range(2)),
    *((name,) for name in (
        "illegal", "illegal", "illegal", "freeze", "replace", "append", "remove", "add_group",
        "bad_group", "storage", "shape", "expanded", "clone_entry", "clone_entry", "clone_data",
        "zero_entry", "forget_state", "forget_entry", "peek", "look",
    ) for _ in range(2)),
]  # fmt: skip
programs = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, 255)), min_size=10, max_size=20
).map(lambda program: [action for action in program if action[0] != ("nothing",)])


@settings(
    max_examples=int(EXAMPLES or 1000),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
@given(machines, programs)
def test_programs(machine, program):
    Machine(**machine).run(program)
