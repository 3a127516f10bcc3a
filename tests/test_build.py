"""``setup.py``: what it builds, what it leaves out and says so, and what it never leaves behind.

The native sources are stand-ins, so that a build takes seconds; compilers are shell scripts.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

from adaqn_cuda.native import BUILD_FAILURE, Record, read_record, sources_digest

ROOT = Path(__file__).parents[1]
LIBRARY = "_native.abi3.so"
STAND_INS = ("cpu/rows.cpp", "cuda/rows.cu", "torch/cpu.cpp", "torch/cuda.cpp", "torch/probe.cu")

#: Options as of nvcc, around the host's compiler.
NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.99"; exit ;;
--list-gpu-code) echo "{known}"; exit ;;
--list-gpu-arch) echo "{known}" | sed s/sm_/compute_/g; exit ;;
esac
echo "$@" >> "$0.log"
case "$*" in *{broken}*) echo "{broken}: error: not today" >&2; exit 2 ;; esac
while [ "$1" != -o ]; do shift; done
exec g++ -x c++ -c /dev/null -o "$2"
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """A source tree with stand-ins for the native sources."""
    tree = tmp_path / "tree"
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    shutil.copytree(
        ROOT / "adaqn_cuda",
        tree / "adaqn_cuda",
        ignore=shutil.ignore_patterns("*.so", "_build_*", "__pycache__"),
    )
    for name in STAND_INS:
        (tree / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "csrc" / name).write_text("static_assert(true);\n")
    return tree


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def toolkit(folder: Path, version="13.0", known="sm_75 sm_80 sm_90 sm_100 sm_120", broken="/-/"):
    """``CUDA_HOME`` with an nvcc that knows ``known`` and fails on sources with ``broken``."""
    script = NVCC.format(version=version, known="\n".join(known.split()), broken=broken)
    write_script(folder / "bin" / "nvcc", script)
    (folder / "include").mkdir()
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").write_bytes(b"!<arch>\n")
    return {"CUDA_HOME": str(folder), "ADAQN_CUDA": "1"}


#: A process that has imported torch once forks for every build.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["setuptools", "torch.utils.cpp_extension"])


def run_setup(
    tree: Path, *arguments: str, torch_cuda: str | None = None, gpus: str = "", **environment: str
):
    """``setup.py`` in a process of its own.

    Args:
        torch_cuda: CUDA version of its torch, if it has one.
        gpus: compute capabilities of the machine's GPUs.
        environment: variables, beside those of this process that are not about builds.
    """
    ours = ("ADAQN_", "TORCH_CUDA", "CUDA_HOME", "CXX", "CC")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment = {**inherited, "MAX_JOBS": "1", "ADAQN_CUDA": "0", **environment}
    answer = (
        "; ".join(f"echo {gpu}" for gpu in gpus.split()) or "echo no devices were found; exit 6"
    )
    driver = write_script(tree.parent / "driver" / "nvidia-smi", f"#!/bin/sh\n{answer}\n")
    environment["PATH"] = f"{driver.parent}{os.pathsep}{environment['PATH']}"
    log = tree.parent / "log"
    process = SERVER.Process(
        target=setup_process, args=(tree, arguments, torch_cuda, environment, log)
    )
    process.start()
    process.join()
    return SimpleNamespace(returncode=process.exitcode, output=log.read_text())


def setup_process(tree, arguments, torch_cuda, environment, log) -> None:
    with log.open("w") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    os.chdir(tree)
    os.environ.clear()
    os.environ.update(environment)
    torch.version.cuda = torch_cuda
    sys.argv = ["setup.py", *arguments]
    # The path of this process is pytest's, without what setuptools brings along.
    sys.path.append(str(Path(setuptools.__file__).parent / "_vendor"))
    runpy.run_path("setup.py", run_name="__main__")


def build(tree: Path, *arguments: str, **options: str) -> str:
    """What a build that succeeds prints."""
    done = run_setup(tree, *(arguments or ("build_ext", "--inplace")), **options)
    assert done.returncode == 0, done.output
    return done.output


def record(tree: Path) -> Record:
    return read_record(tree / "adaqn_cuda" / LIBRARY)


def libraries(tree: Path) -> list[str]:
    return [str(path.relative_to(tree)) for path in tree.rglob("_native*.so")]


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def built_folder() -> str:
    """The name of setuptools' folder for built packages."""
    platform = sysconfig.get_platform()
    return f"lib.{platform}-{sys.implementation.cache_tag}"


def wheel_names(tree: Path, **environment: str) -> set[str]:
    """The package's files in a wheel that is built now."""
    shutil.rmtree(tree / "dist", ignore_errors=True)
    build(tree, "bdist_wheel", **environment)
    [wheel] = (tree / "dist").glob("*.whl")
    return {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}


# ------------------------------------------------------------------------------ what is built


def test_a_library_tells_what_it_was_built_from(tree):
    build(tree)
    assert record(tree).sources == sources_digest(tree)
    assert record(tree).without_cuda == "ADAQN_CUDA=0 was set"
    (tree / "csrc" / "cpu" / "rows.cpp").write_text("static_assert(true);\n\n")
    assert record(tree).sources != sources_digest(tree)


def test_cuda_kernels_have_the_default_images(tree, tmp_path):
    build(tree, **toolkit(tmp_path / "cuda"))
    images = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120")
    assert record(tree).images == images
    assert record(tree).without_cuda is None
    commands = (tmp_path / "cuda" / "bin" / "nvcc.log").read_text().splitlines()
    kernels = [line for line in commands if "cuda/rows.cu" in line]
    assert kernels
    for line in kernels:
        assert {w.rpartition("code=")[2] for w in line.split() if "-gencode" in w} == {*images}


def test_an_in_place_build_is_for_the_gpus_of_the_machine(tree, tmp_path):
    cuda = toolkit(tmp_path / "cuda", known="sm_75 sm_80 sm_86 sm_90 sm_100 sm_120")
    build(tree, gpus="9.0 8.6 9.0", **cuda)
    assert record(tree).images == ("sm_86", "sm_90")
    build(tree, gpus="9.0 8.6 9.0", TORCH_CUDA_ARCH_LIST="7.5", **cuda)
    assert record(tree).images == ("sm_75",)


def test_a_gpu_that_nvcc_does_not_know_has_its_ptx(tree, tmp_path):
    build(tree, gpus="8.0 12.0", **toolkit(tmp_path / "cuda", "12.4", "sm_75 sm_80 sm_90"))
    assert record(tree).images == ("sm_75", "sm_80", "sm_90", "compute_90")


def test_a_wheel_is_for_all_gpus(tree, tmp_path):
    build(tree, "build_ext", gpus="9.0", **toolkit(tmp_path / "cuda"))
    images = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120")
    assert read_record(tree / "build" / built_folder() / "adaqn_cuda" / LIBRARY).images == images


def test_an_old_nvcc_leaves_out_what_it_does_not_know(tree, tmp_path):
    """PTX of the newest that it knows serves what it does not."""
    text = build(tree, **toolkit(tmp_path / "cuda", "12.4", "sm_75 sm_80 sm_90"))
    assert record(tree).images == ("sm_75", "sm_80", "sm_90", "compute_90")
    assert "does not know sm_100 sm_120 compute_120 of the default architectures" in text


def test_unknown_architectures_may_be_required(tree, tmp_path):
    cuda = {
        **toolkit(tmp_path / "cuda", "12.4", "sm_75 sm_80 sm_90"),
        "TORCH_CUDA_ARCH_LIST": "8.0;10.0",
    }
    done = run_setup(tree, "build_ext", "--inplace", ADAQN_REQUIRE_EXT="1", **cuda)
    assert done.returncode != 0
    assert "sm_100 of TORCH_CUDA_ARCH_LIST" in done.output


def test_nvcc_is_given_further_flags(tree, tmp_path):
    build(tree, ADAQN_NVCCFLAGS="--warn -Xptxas '-v -w'", **toolkit(tmp_path / "cuda"))
    commands = (tmp_path / "cuda" / "bin" / "nvcc.log").read_text().splitlines()
    assert commands
    assert all("--warn -Xptxas -v -w" in line for line in commands)


# ------------------------------------------------------------------------------ CUDA does not build

BROKEN = {
    "nvcc does not run": ({"broken": "list"}, {}, "not today"),
    "an early error": ({"broken": "probe"}, {}, "probe: error: not today"),
    "a late error": ({"broken": "cuda/rows"}, {}, "Error compiling"),
    "another CUDA": ({"version": "12.4"}, {"torch_cuda": "13.0"}, "12.4, and torch of CUDA 13.0"),
    "too old": ({"known": "sm_60"}, {"TORCH_CUDA_ARCH_LIST": "9.0"}, "does not know sm_90"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_without_cuda_kernels_those_for_the_cpu_are_built(tree, tmp_path, case):
    options, environment, reason = BROKEN[case]
    cuda = toolkit(tmp_path / "cuda", **options)
    if case == "nvcc does not run":
        write_script(tmp_path / "cuda" / "bin" / "nvcc", "#!/bin/sh\necho not today; exit 1\n")
    text = build(tree, **cuda, **environment)
    assert "trying to build adaqn_cuda without CUDA" in text
    assert reason in text
    assert record(tree).images == ()
    assert reason in record(tree).without_cuda
    assert str(tmp_path / "cuda" / "bin" / "nvcc") in record(tree).without_cuda


def test_cuda_kernels_may_be_required(tree, tmp_path):
    """And left out all the same."""
    cuda = toolkit(tmp_path / "cuda", broken="cuda/rows")
    done = run_setup(tree, "build_ext", "--inplace", ADAQN_REQUIRE_EXT="1", **cuda)
    assert done.returncode != 0
    assert "ADAQN_CUDA=0" in done.output
    assert not libraries(tree)
    build(tree, **{**cuda, "ADAQN_REQUIRE_EXT": "1", "ADAQN_CUDA": "0"})
    assert libraries(tree)


# ------------------------------------------------------------------------------ nothing builds


@pytest.fixture(params=["a broken compiler", "no compiler"])
def no_compiler(request, tmp_path) -> dict[str, str]:
    if request.param == "no compiler":
        (tmp_path / "empty").mkdir()
        return {"PATH": str(tmp_path / "empty")}
    script = write_script(tmp_path / "broken" / "g++", "#!/bin/sh\nexit 1\n")
    return {"CXX": str(script)}


def test_a_failed_build_leaves_no_earlier_library_in_a_wheel(tree, no_compiler):
    """Builds in one tree share its folder ``build``."""
    assert LIBRARY in wheel_names(tree)
    after = wheel_names(tree, **no_compiler)
    assert LIBRARY not in after
    assert BUILD_FAILURE.name in after
    assert not libraries(tree)
    assert not (tree / "adaqn_cuda" / BUILD_FAILURE.name).exists()


def test_a_build_leaves_no_earlier_failure_in_a_wheel(tree):
    note = tree / "build" / built_folder() / "adaqn_cuda" / BUILD_FAILURE.name
    note.parent.mkdir(parents=True)
    note.write_text("no C++ compiler\n")
    names = wheel_names(tree)
    assert LIBRARY in names
    assert BUILD_FAILURE.name not in names


@pytest.mark.parametrize("required", [False, True])
def test_a_failed_build_in_place_leaves_nothing(tree, no_compiler, required):
    before = files(tree / "adaqn_cuda")
    (tree / "adaqn_cuda" / LIBRARY).write_text("yesterday's")
    environment = {**no_compiler, "ADAQN_REQUIRE_EXT": str(int(required))}
    done = run_setup(tree, "build_ext", "--inplace", **environment)
    assert (done.returncode != 0) == required
    assert required or "without its native kernels" in done.output
    assert files(tree / "adaqn_cuda") == before
    assert not libraries(tree)
