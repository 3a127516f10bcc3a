"""The authors' own runs, iterate by iterate."""

import pytest
import torch
from oracle import Oracle
from problems import AuthorsProblem, plain_adaqn, trajectory

CASES = [
    ("case1.csv", 1.0, 20, (50, 0, 24)),
    ("case2.csv", 600.0, 12, (66, 7, 1)),
]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(("name", "scale", "fisher_size", "outcome"), CASES)
def test_authors_trajectory_is_reproduced(name, scale, fisher_size, outcome, fused):
    problem, expected = AuthorsProblem(scale), trajectory(name)
    w = torch.nn.Parameter(problem.w0.clone())
    optimizer = plain_adaqn(
        [w],
        lr=0.02,
        history_size=5,
        fisher_size=fisher_size,
        update_interval=5,
        monitor=lambda: problem.loss(w),
        fused=fused,
    )
    for step, iterate in enumerate(expected):
        assert (w.detach() - iterate).norm() <= 1e-9 * iterate.norm(), f"step {step}"
        w.grad = problem.gradient(w.detach(), step)
        optimizer.step()
    stats = optimizer.stats()
    assert (stats["stored"], stats["skipped"], stats["resets"]) == outcome


@pytest.mark.parametrize("init", ["rmsprop", "adagrad", "scalar"])
@pytest.mark.parametrize("monitored", [True, False])
@pytest.mark.parametrize(("history_size", "interval"), [(1, 2), (5, 5), (20, 3)])
def test_every_configuration_follows_the_textbook_form(init, monitored, history_size, interval):
    problem = AuthorsProblem(1.0)
    options = dict(
        lr=0.05 if init == "scalar" else 0.02,
        history_size=history_size,
        fisher_size=11,
        update_interval=interval,
        init=init,
        weight_decay=0.01,
    )
    w = torch.nn.Parameter(problem.w0.clone())
    monitor = problem.loss if monitored else None
    oracle = Oracle(problem.w0, monitor=monitor, **options)
    optimizer = plain_adaqn(
        [w], monitor=(lambda: problem.loss(w)) if monitored else None, **options
    )
    for step in range(200):
        g = problem.gradient(w.detach(), step)
        if step in (7, 8, 9, 31):
            g[step % 24] = float("nan")
        w.grad = g
        optimizer.step()
        oracle.step(g)
        torch.testing.assert_close(w.detach(), oracle.w, rtol=1e-9, atol=1e-11)
        # The iteration itself amplifies rounding; each step is compared from the same iterate.
        oracle.w = w.detach().clone()
    stats = optimizer.stats()
    for word in ("stored", "skipped", "resets"):
        assert stats[word] == getattr(oracle, word), word
    assert stats["steps_skipped"] == 4
