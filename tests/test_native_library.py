"""Which native library is taken, and what is said where there is none that fits."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import needs_library

from adaqn_cuda import AdaQN, native, ops
from adaqn_cuda.diagnosis import report

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda", 3)


def write_library(folder: Path, sources: str | None, **record) -> Path:
    """A file that is a library as far as its record goes; ``None`` for one without."""
    words = {"sources": sources, "images": [], "without_cuda": None, **record}
    text = b"adaqn_build\0" + (b"" if sources is None else b"adaqn_build ")
    path = folder / "adaqn_cuda" / "_native.abi3.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF\0" + text + json.dumps(words).encode() + b"\0\xff")
    return path


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A source tree whose package is imported, first on the path, before ``installed``."""
    clone = tmp_path / "clone"
    for name in ("csrc/torch/cpu.cpp", "csrc/common/layout.h", "adaqn_cuda/version.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(name)
    monkeypatch.setattr(native, "PACKAGE", clone / "adaqn_cuda")
    monkeypatch.setattr(sys, "path", ["", str(clone), str(tmp_path / "installed")])
    monkeypatch.chdir(clone)
    return clone


@pytest.fixture
def installed(tmp_path) -> Path:
    return tmp_path / "installed"


def find() -> tuple[Path | None, str]:
    return native._find.__wrapped__()


# ------------------------------------------------------------------------------ a source tree


@pytest.mark.parametrize("own", [None, "other", "no record"])
def test_sources_take_the_installed_library_of_the_same_sources(clone, installed, own):
    if own is not None:
        write_library(clone, None if own == "no record" else own)
    theirs = write_library(installed, native.sources_digest(clone))
    assert find() == (theirs, "")


def test_sources_prefer_their_own_library(clone, installed):
    ours = write_library(clone, native.sources_digest(clone))
    write_library(installed, native.sources_digest(clone))
    assert find() == (ours, "")


@pytest.mark.parametrize("changed", ["csrc/common/layout.h", "adaqn_cuda/version.py"])
def test_a_library_of_other_sources_is_refused(clone, installed, changed):
    """In the tree as well as installed; both are named, and how to build anew."""
    paths = [write_library(root, native.sources_digest(clone)) for root in (clone, installed)]
    (clone / changed).write_text("changed")
    path, why = find()
    assert path is None
    for path in paths:
        assert f"{path} was built from other sources than {clone / 'csrc'}" in why
    assert f"pip install --force-reinstall --no-deps --no-cache-dir {clone}" in why


def test_a_new_source_file_makes_a_library_old(clone):
    write_library(clone, native.sources_digest(clone))
    (clone / "csrc" / "torch" / "more.cu").write_text("")
    assert find()[0] is None


def test_notes_beside_the_sources_do_not_matter(clone):
    ours = write_library(clone, native.sources_digest(clone))
    (clone / "csrc" / "README.md").write_text("")
    assert find() == (ours, "")


def test_the_failure_of_an_installed_package_is_told(clone, installed):
    (installed / "adaqn_cuda").mkdir(parents=True)
    (installed / "adaqn_cuda" / "_build_failure.txt").write_text("no C++ compiler\n")
    path, why = find()
    assert path is None
    assert f"missing in {installed / 'adaqn_cuda'}: no C++ compiler" in why


def test_an_installed_package_takes_no_library_but_its_own(clone, installed):
    """Without sources there is nothing to compare another one with."""
    digest = native.sources_digest(clone)
    shutil.rmtree(clone / "csrc")
    write_library(installed, digest)
    assert find()[0] is None
    ours = write_library(clone, digest)
    assert find() == (ours, "")


@needs_library
def test_programs_in_the_source_tree_find_the_library():
    """The working directory comes first on the path: its package has no library, if installed.

    Nor do they import torch's compiler, which takes as long as torch does.
    """
    command = [sys.executable, "-X", "importtime", "-m", "adaqn_cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "threads: native (native kernels serve cpu)" in done.stdout
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())
    assert "torch._dynamo" not in done.stderr


@needs_library
def test_the_diagnosis_names_the_library():
    path = native.library_path()
    built = native.read_record(path)
    text = report()
    assert str(path) in text
    assert (" ".join(built.images) if built.images else built.without_cuda) in text


# ------------------------------------------------------------------------------ the test suite


@pytest.mark.parametrize("asked", [False, True])
def test_a_missing_library_fails_the_tests_unless_asked(tmp_path, asked):
    package = tmp_path / "adaqn_cuda"
    shutil.copytree(native.PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "_build_*"))
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), tests)
    (tests / "test_one.py").write_text("def test_one(): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path,
        env={**os.environ, "ADAQN_TEST_WITHOUT_LIBRARY": str(int(asked))},
        capture_output=True,
        text=True,
    )
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == asked, text
    assert ("1 passed" in text) == asked
    assert asked or "has not been built" in text
    assert asked or "ADAQN_TEST_WITHOUT_LIBRARY=1" in text


# ------------------------------------------------------------------------------ ADAQN_ISA


def test_an_unknown_instruction_set_is_an_obstacle(monkeypatch):
    monkeypatch.setenv("ADAQN_ISA", "avx-512")
    with pytest.warns(RuntimeWarning, match="ADAQN_ISA=avx-512 is none of baseline, avx2, avx512"):
        obstacle = native.library_obstacle.__wrapped__()
    assert "ADAQN_ISA=avx-512" in obstacle


@pytest.mark.parametrize("word", [None, "", "baseline", "avx2", "avx512"])
def test_known_instruction_sets_are_none(monkeypatch, word):
    monkeypatch.delenv("ADAQN_ISA", raising=False)
    if word is not None:
        monkeypatch.setenv("ADAQN_ISA", word)
    assert native._isa_obstacle() is None


# ------------------------------------------------------------------------------ a GPU


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU of compute capability 7.0 beside a library for others; records what it is asked."""
    library = write_library(tmp_path, "", images=["sm_80", "compute_120"])
    asked: list[int] = []

    def probe(index):
        asked.append(index)
        return probe.error

    probe.error, probe.asked = "no kernel image is available", asked
    monkeypatch.setattr(native, "library_obstacle", lambda: None)
    monkeypatch.setattr(native, "library_path", lambda: library)
    monkeypatch.setattr(native, "_probe", probe)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for function in (native.obstacle, native.cuda_obstacle):
        function.cache_clear()
    yield probe
    for function in (native.obstacle, native.cuda_obstacle):
        function.cache_clear()


def test_a_gpu_without_kernels_takes_the_reference(gpu):
    """The kernels of the library, which are registered for it, are not run."""
    with pytest.warns(RuntimeWarning, match="without native kernels on cuda:3"):
        backend = ops.select_backend(GPU, None)
    assert backend.name == "reference"
    assert backend.ops is ops._REFERENCE
    for word in ("sm_80 compute_120", "7.3", "no kernel image", "TORCH_CUDA_ARCH_LIST=7.3"):
        assert word in backend.reason
    with pytest.raises(RuntimeError, match="fused=True, but .*no kernel image.*fused=None"):
        ops.select_backend(GPU, True)


@pytest.mark.parametrize("error", [None, "no kernel image"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gpu_is_asked_once(gpu, error):
    gpu.error = error
    names = {ops.select_backend(GPU, None).name for _ in range(3)}
    assert names == {"native" if error is None else "reference"}
    assert gpu.asked == [3]
    ops.select_backend(torch.device("cuda"), None)
    assert gpu.asked == [3, 0]
    ops.select_backend(torch.device("cuda"), False)
    assert gpu.asked == [3, 0]


def test_a_library_without_cuda_says_why(gpu, tmp_path, monkeypatch):
    write_library(tmp_path, "", without_cuda="nvcc: not today")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    with pytest.warns(RuntimeWarning, match="built without CUDA: nvcc: not today"):
        backend = ops.select_backend(GPU, None)
    assert backend.name == "reference"
    assert not gpu.asked


@pytest.mark.parametrize("error", [None, "no kernel image"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_kernels_are_loaded_where_they_are_to_run(gpu, error, monkeypatch):
    loaded = []
    monkeypatch.setattr(native, "load_cuda_kernels", lambda *a, **k: loaded.append((a, k)))
    gpu.error = error
    for device, fused in ((torch.device("cpu"), None), (GPU, False), (GPU, None)):
        ops.load_kernels(device, fused, search=True)
    assert loaded == ([] if error else [((3,), {"search": True})])


def test_an_optimizer_loads_its_kernels_when_it_gets_its_state(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "load_kernels", lambda *a, **k: asked.append((a, k)))
    w = torch.nn.Parameter(torch.ones(4, 4))
    w.grad = torch.ones_like(w)
    optimizer = AdaQN([w], history_size=2, history_dtype=torch.bfloat16, fused=False)
    assert not asked
    for _ in range(3):
        optimizer.step()
    kinds = dict(vectors=torch.float32, pairs=torch.bfloat16, fisher=torch.float32)
    kinds.update(has_pairs=True, kronecker=True)
    assert asked == [((torch.device("cpu"), False), kinds)]


@needs_library
@pytest.mark.parametrize(
    ("name", "arguments"), [("adaqn_cuda_load", (0, 0, 0, 0, 0, 1, 1)), ("adaqn_cuda_probe", (0,))]
)
def test_loading_and_the_probe_tell_what_is_wrong(name, arguments):
    path = native.library_path()
    if not native.read_record(path).images or torch.cuda.is_available():
        pytest.skip("there are no CUDA kernels, or they can run")
    function = getattr(ctypes.CDLL(str(path)), name)
    function.restype = ctypes.c_char_p
    assert b"CUDA" in function(*arguments)
