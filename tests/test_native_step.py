"""The optimizer on native kernels, and what is said where there are none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import (
    AuthorsProblem,
    needs_library,
    plain_adaqn,
    random_parameters,
    set_gradients,
    trajectory,
)

from adaqn_cuda import native


@needs_library
@pytest.mark.parametrize(
    ("name", "scale", "fisher_size"), [("case1.csv", 1.0, 20), ("case2.csv", 600.0, 12)]
)
def test_authors_trajectory(name, scale, fisher_size):
    problem = AuthorsProblem(scale)
    w = torch.nn.Parameter(problem.w0.clone())
    optimizer = plain_adaqn(
        [w], lr=0.02, history_size=5, fisher_size=fisher_size, update_interval=5, fused=True,
        monitor=lambda: problem.loss(w),
    )  # fmt: skip
    for step, iterate in enumerate(trajectory(name)):
        assert (w.detach() - iterate).norm() <= 1e-9 * iterate.norm(), f"step {step}"
        w.grad = problem.gradient(w.detach(), step)
        optimizer.step()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("init", ["adagrad", "scalar"])
def test_a_run_follows_the_reference(dtype, init):
    shapes = [(3, 4), (5,), (), (0,), (2, 3, 7)]
    ours, theirs = (random_parameters(shapes, dtype) for _ in range(2))
    options = dict(lr=0.02, init=init, update_interval=3, history_size=4, fisher_size=5)
    a = plain_adaqn(
        ours, monitor=lambda: float(ours[0].detach().abs().sum()), fused=True, **options
    )
    b = plain_adaqn(
        theirs, monitor=lambda: float(theirs[0].detach().abs().sum()), fused=False, **options
    )
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}.get(dtype, 1e-9)
    for step in range(40):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        if step == 11:
            ours[2].grad = theirs[2].grad = None
        if step == 12:
            ours[0].grad[0, 0] = theirs[0].grad[0, 0] = torch.inf
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
            with torch.no_grad():  # rounding must not pile up over steps
                q.copy_(p)
    assert a.stats()["stored"] == b.stats()["stored"] > 0
    assert a.stats()["steps_skipped"] == 1


@needs_library
def test_compiled_step_in_one_graph():
    ours, theirs = (random_parameters([(3, 4), (5,)]) for _ in range(2))
    a, b = (plain_adaqn(p, update_interval=2, fused=True) for p in (ours, theirs))
    compiled = torch.compile(lambda: a.step(), fullgraph=True, backend="aot_eager")
    for step in range(6):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        compiled()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@needs_library
def test_autograd_sees_that_parameters_have_changed():
    w = torch.nn.Parameter(torch.ones(3))
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    plain_adaqn([w], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_library
def test_lazily_negated_gradient():
    z = torch.randn(5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(torch.zeros(5)) for _ in range(2))
    ours.grad, theirs.grad = z.conj().imag, z.conj().imag.clone()
    assert ours.grad.is_neg()
    for w in (ours, theirs):
        plain_adaqn([w], fused=True).step()
    assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------- without the library


SCRIPT = """
import warnings, torch
warnings.simplefilter("always")
from adaqn_cuda import AdaQN
with warnings.catch_warnings(record=True) as seen:
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    optimizers = [AdaQN([w]), AdaQN([w])]
    for optimizer in optimizers:
        optimizer.step()
print("warnings:", len(seen), seen[0].message)
print(repr(optimizers[0]))
try:
    AdaQN([w], fused=True)
except RuntimeError as error:
    print("raised:", error)
"""


def run_without_library(
    tmp_path: Path, *, failure: str | None = None, library: bytes | None = None
):
    """What SCRIPT prints with a copy of the package that has no library, or a broken one."""
    package = tmp_path / "adaqn_cuda"
    shutil.copytree(native.PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "_build_*"))
    if failure is not None:
        (package / native.BUILD_FAILURE.name).write_text(failure)
    if library is not None:
        (package / "_native.abi3.so").write_bytes(library)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warnings: 1 adaqn_cuda runs without native kernels" in done.stdout
    assert "Backend: reference" in done.stdout
    assert "raised: fused=True, but" in done.stdout
    return done.stdout


def test_a_missing_library_is_explained_once(tmp_path):
    text = run_without_library(tmp_path)
    assert "has not been built" in text
    assert "pip install" in text


def test_a_failed_build_is_explained(tmp_path):
    assert "no C++ compiler: c++" in run_without_library(tmp_path, failure="no C++ compiler: c++\n")


def test_a_library_that_does_not_load_is_explained(tmp_path):
    text = run_without_library(tmp_path, library=b"\x7fELF, but not really")
    assert "does not load into torch" in text
    assert "torch 2.10" in text


def test_a_source_tree_names_its_build_command(tmp_path):
    (tmp_path / "csrc").mkdir()
    assert "setup.py build_ext --inplace" in run_without_library(tmp_path)
