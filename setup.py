"""Build entry point; the metadata is in pyproject.toml.

Builds ``adaqn_cuda/_native.abi3.so`` from ``csrc/``: CPU kernels, and CUDA kernels where nvcc is,
whether or not there is a GPU.  Without a C++ compiler, or where the build fails, the package is
installed without it, and says so when it is used.

Environment variables:

* ``ADAQN_REQUIRE_EXT=1``: fail instead of installing without the native library;
* ``ADAQN_CUDA=0``: leave the CUDA kernels out;
* ``ADAQN_CXXFLAGS``: further compiler and linker flags;
* ``CXX``, ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``: as for every torch extension.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
FAILURE = ROOT / "adaqn_cuda" / "_build_failure.txt"
REQUIRED = os.environ.get("ADAQN_REQUIRE_EXT") == "1"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
EXTRA_FLAGS = shlex.split(os.environ.get("ADAQN_CXXFLAGS", ""))

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    # Loops with sqrt and comparisons vectorise; infinities and NaN keep their meaning.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    TORCH_TARGET,
]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fvisibility=hidden",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(p))


def cuda_home() -> str | None:
    """The CUDA toolkit to build with; ``None`` to build without CUDA."""
    if os.environ.get("ADAQN_CUDA") == "0" or not sources("csrc/torch/cuda.cpp"):
        return None
    nvcc = shutil.which("nvcc")
    found = nvcc and str(Path(nvcc).resolve().parents[1])
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", found]
    return next((home for home in homes if home and (Path(home) / "bin" / "nvcc").exists()), None)


def native_library() -> Extension:
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    extension = Extension(
        "adaqn_cuda._native",
        sources("csrc/cpu/*.cpp", "csrc/torch/cpu.cpp"),
        depends=sources("csrc/**/*.h", "csrc/**/*.cuh"),
        extra_compile_args={
            "cxx": CXX_FLAGS + includes + EXTRA_FLAGS,
            "nvcc": NVCC_FLAGS,
        },
        library_dirs=cpp_extension.library_paths(),
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"],
        py_limited_api=True,
    )
    home = cuda_home()
    if home is not None:
        add_cuda(extension, home)
    extension.extra_link_args += EXTRA_FLAGS
    return extension


def add_cuda(extension: Extension, home: str) -> None:
    """CUDA kernels and their operations, for a list of architectures that needs no GPU to ask."""
    cpp_extension.CUDA_HOME = home
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    toolkit = [path for path in ("lib64", "lib") if (Path(home) / path).exists()]
    extension.sources += sources("csrc/cuda/*.cu", "csrc/torch/cuda.cpp")
    extension.extra_compile_args["cxx"] += ["-DUSE_CUDA", f"-isystem{home}/include"]
    extension.library_dirs += [str(Path(home) / path) for path in toolkit]
    extension.extra_link_args += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]


class Build(cpp_extension.BuildExtension):
    """Builds the library, or leaves a note in the package that says why it is not there."""

    def run(self) -> None:
        FAILURE.unlink(missing_ok=True)
        try:
            super().run()
        except Exception as error:
            if REQUIRED:
                raise
            hint = " (ADAQN_CUDA=0 builds for the CPU alone)" if cuda_home() else ""
            note_failure(f"the build failed: {error}{hint}")
            (Path(self.build_lib) / "adaqn_cuda").mkdir(parents=True, exist_ok=True)
            if not self.inplace:
                shutil.copy(FAILURE, Path(self.build_lib) / "adaqn_cuda")
            self.extensions = []


def note_failure(reason: str) -> None:
    """Warn, and leave the reason for ``python -m adaqn_cuda``."""
    FAILURE.write_text(" ".join(reason.split()) + "\n")
    if {"egg_info", "dist_info"} & set(sys.argv):  # pip asks for metadata first, then builds
        return
    rule = "*" * 78
    print(
        f"{rule}\nWARNING: installing adaqn_cuda without its native kernels:\n{reason}\n"
        "The optimizer works, but slowly. 'python -m adaqn_cuda' says how to get them.\n"
        f"{rule}",
        file=sys.stderr,
    )


def extensions() -> list[Extension]:
    """The native library, if there is a compiler for it."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) or shutil.which("g++"):
        return [native_library()]
    reason = f"no C++ compiler: {compiler} and g++ were not found"
    if REQUIRED:
        raise SystemExit(f"{reason}; ADAQN_REQUIRE_EXT=1 asks for the native library")
    note_failure(reason)
    return []


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    package_data={"adaqn_cuda": [FAILURE.name]},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
