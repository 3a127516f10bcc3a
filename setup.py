"""Build entry point; the metadata is in pyproject.toml.

Builds ``adaqn_cuda/_native.abi3.so`` from ``csrc/``: CPU kernels, and CUDA kernels where nvcc is,
whether or not there is a GPU.  Where the CUDA kernels do not build, the library has those for the
CPU alone; without a C++ compiler, or where the build fails, the package is installed without it.
Either is said here and when the package is used.

CUDA kernels take most of the time, as many times as there are architectures.  An in-place build is
for the machine that it is on, and so for the GPUs there, if there are any; every other one is for
all architectures.

Environment variables:

* ``ADAQN_REQUIRE_EXT=1``: fail instead of leaving anything out that should be there: the library,
  CUDA kernels where nvcc is, an architecture that ``TORCH_CUDA_ARCH_LIST`` names;
* ``ADAQN_CUDA=0``: leave the CUDA kernels out;
* ``ADAQN_CXXFLAGS``: further compiler and linker flags;
* ``ADAQN_NVCCFLAGS``: further flags of nvcc;
* ``CXX``, ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``: as for every torch extension.
"""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
NATIVE = runpy.run_path(str(ROOT / "adaqn_cuda" / "native.py"))
REQUIRED = os.environ.get("ADAQN_REQUIRE_EXT") == "1"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
#: Machine code for 7.5 to 12.1 but for 11, where 8.0 serves 8.6 to 8.9, and PTX for what follows.
ARCHITECTURES = "7.5;8.0;9.0;10.0;12.0+PTX"
EXTRA_FLAGS = shlex.split(os.environ.get("ADAQN_CXXFLAGS", ""))
#: Where the sources are published.  With it, the metadata has URLs, and the description links.
REPOSITORY = ""

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
    *shlex.split(os.environ.get("ADAQN_NVCCFLAGS", "")),
]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(p))


def cuda_home() -> str | None:
    """The CUDA toolkit to build with; ``None`` if there is none."""
    nvcc = shutil.which("nvcc")
    found = nvcc and str(Path(nvcc).resolve().parents[1])
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", found]
    return next((home for home in homes if home and (Path(home) / "bin" / "nvcc").exists()), None)


def ask_nvcc(nvcc: str, *arguments: str) -> list[str]:
    """The words that nvcc prints; an error has the line that tells why."""
    done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.split()
    lines = (done.stderr + done.stdout).strip().splitlines()
    errors = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
    why = [*errors, *lines, f"exit status {done.returncode} of {arguments[0]}"][0]
    raise RuntimeError(f"{nvcc}: {why}")


def check_toolkit(nvcc: str, images: list[str]) -> None:
    """Fails early, and in a sentence, where every CUDA source would fail."""
    version = re.search(r"release (\d+)\.\d+", " ".join(ask_nvcc(nvcc, "--version")))
    torch_version = torch.version.cuda
    if version and torch_version and version[1] != torch_version.partition(".")[0]:
        raise RuntimeError(
            f"{nvcc} is of CUDA {version[0].split()[1]}, and torch of CUDA {torch_version}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        source, made = str(ROOT / "csrc" / "torch" / "probe.cu"), str(Path(scratch) / "probe.o")
        ask_nvcc(nvcc, "-c", source, "-o", made, *NVCC_FLAGS, *map(gencode, images))


# ------------------------------------------------------------------------------ architectures


def present_architectures() -> str:
    """Architectures of the GPUs of this machine, as words of ``TORCH_CUDA_ARCH_LIST``.

    The driver is asked, as the torch that builds may be one without CUDA.
    """
    question = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(question, capture_output=True, text=True)
    except OSError:
        return ""
    answers = done.stdout.split() if done.returncode == 0 else []
    return ";".join(sorted({word for word in answers if re.fullmatch(r"\d+\.\d", word)}))


def requested_images(default: str) -> list[str]:
    """What ``TORCH_CUDA_ARCH_LIST`` asks for, or the default: sm_90, compute_90 and the like."""
    words = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    os.environ["TORCH_CUDA_ARCH_LIST"] = words
    try:
        flags = cpp_extension._get_cuda_arch_flags()
    except (ValueError, IndexError) as error:  # a word that torch does not know; "native" without
        raise RuntimeError(f"TORCH_CUDA_ARCH_LIST={words}: {error}") from error
    return sorted((flag.rpartition("code=")[2] for flag in flags), key=by_kind_and_number)


def by_kind_and_number(image: str) -> tuple[bool, int]:
    """Machine code comes before PTX."""
    return image.startswith("compute_"), int(re.sub(r"\D", "", image))


def images_of(nvcc: str, default: str) -> list[str]:
    """The requested images that this nvcc can make; PTX of one it cannot is that of the newest.

    Of a GPU that is newer than nvcc there is only such PTX, and it comes with the usual images.
    """
    explicit = bool(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    requested = requested_images(default)
    known = {*ask_nvcc(nvcc, "--list-gpu-code"), *ask_nvcc(nvcc, "--list-gpu-arch")}
    images = [image for image in requested if image.rstrip("af") in known]
    unknown = [image for image in requested if image not in images]
    if not unknown:
        return requested
    if not explicit and default != ARCHITECTURES:
        del os.environ["TORCH_CUDA_ARCH_LIST"]
        return images_of(nvcc, ARCHITECTURES)
    asked = "TORCH_CUDA_ARCH_LIST" if explicit else "the default architectures"
    text = f"{nvcc} does not know {' '.join(unknown)} of {asked}"
    if not images or (explicit and REQUIRED):
        raise RuntimeError(text)
    if any(image.startswith("compute_") for image in unknown):
        images.append("compute_" + images[-1].rpartition("_")[2])
    announce(f"building adaqn_cuda for {' '.join(images)} alone:", f"{text}.")
    return images


def gencode(image: str) -> str:
    return f"-gencode=arch=compute_{image.rpartition('_')[2]},code={image}"


# ------------------------------------------------------------------------------ the library


def native_library() -> Extension:
    """The library without CUDA kernels and without its record."""
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    return Extension(
        "adaqn_cuda._native",
        sources("csrc/cpu/*.cpp", "csrc/torch/cpu*.cpp"),
        depends=sources("csrc/**/*.h", "csrc/**/*.cuh"),
        extra_compile_args={
            "cxx": CXX_FLAGS + includes + EXTRA_FLAGS,
            "nvcc": NVCC_FLAGS,
        },
        library_dirs=cpp_extension.library_paths(),
        extra_link_args=[
            "-Wl,--no-as-needed",
            "-ltorch",
            "-Wl,--as-needed",
            "-ltorch_cpu",
            *EXTRA_FLAGS,
        ],
        py_limited_api=True,
    )


def add_cuda(extension: Extension, home: str, architectures: str) -> list[str]:
    """CUDA kernels and their operations; returns the images that they have.

    ``architectures`` are those to build for where ``TORCH_CUDA_ARCH_LIST`` says nothing.
    """
    nvcc = f"{home}/bin/nvcc"
    images = images_of(nvcc, architectures)
    check_toolkit(nvcc, images)
    cpp_extension.CUDA_HOME = home
    toolkit = [path for path in ("lib64", "lib") if (Path(home) / path).exists()]
    extension.sources += sources("csrc/cuda/*.cu", "csrc/torch/*.cu", "csrc/torch/cuda*.cpp")
    extension.extra_compile_args["nvcc"] += map(gencode, images)
    extension.extra_compile_args["cxx"] += ["-DUSE_CUDA", f"-isystem{home}/include"]
    extension.library_dirs += [str(Path(home) / path) for path in toolkit]
    extension.extra_link_args += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    return images


def write_record(folder: Path, images: list[str], without_cuda: str | None) -> str:
    """A source file with what adaqn_cuda/native.py must know of the library, before it loads it."""
    digest = NATIVE["sources_digest"](ROOT)
    record = {"sources": digest, "images": images, "without_cuda": without_cuda}
    mark = NATIVE["RECORD_MARK"].decode().removesuffix("{")
    text = (
        'extern "C" __attribute__((used, visibility("default"))) const char adaqn_build[] =\n'
        f'    R"record({mark}{json.dumps(record)})record";\n'
    )
    path = folder / "adaqn_build.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return str(path)


class Build(cpp_extension.BuildExtension):
    """Builds as much of the library as can be built, and says what was left out, and why.

    Nothing of an earlier build stays where the library goes, whatever becomes of this one.
    """

    def run(self) -> None:
        built = Path(self.build_lib) / "adaqn_cuda"
        for folder in (built, ROOT / "adaqn_cuda") if self.inplace else (built,):
            for path in (*folder.glob("_native*.so"), folder / NATIVE["BUILD_FAILURE"].name):
                path.unlink(missing_ok=True)
        inplace = self.inplace
        try:
            require_compiler()
            self.build_with_cuda_or_without()
        except Exception as error:
            if REQUIRED:
                raise
            reason = one_line(error)
            announce("installing adaqn_cuda without its native kernels:", f"{reason}.\n{SLOW}")
            self.extensions = []
            if not inplace:
                built.mkdir(parents=True, exist_ok=True)
                (built / NATIVE["BUILD_FAILURE"].name).write_text(reason + "\n")

    def build_with_cuda_or_without(self) -> None:
        home = cuda_home()
        if os.environ.get("ADAQN_CUDA") == "0":
            without = "ADAQN_CUDA=0 was set"
        elif home is None:
            without = "there was no nvcc"
        else:
            try:
                return self.build(home, None)
            except Exception as error:
                if REQUIRED:
                    raise RuntimeError(
                        f"{one_line(error)} (ADAQN_CUDA=0 builds for the CPU alone)"
                    ) from error
                without = f"building it with {home}/bin/nvcc failed: {one_line(error)}"
                announce("trying to build adaqn_cuda without CUDA:", f"{without}.")
        self.build(None, without)

    def build(self, home: str | None, without_cuda: str | None) -> None:
        """One attempt, which leaves this command as it was if it fails."""
        [extension] = self.extensions
        before = self.compiler, self.inplace, copy.deepcopy(vars(extension))
        here = present_architectures() if home is not None and self.inplace else ""
        try:
            images = add_cuda(extension, home, here or ARCHITECTURES) if home is not None else []
            extension.sources.append(write_record(Path(self.build_temp), images, without_cuda))
            super().run()
        except Exception:
            self.compiler, self.inplace, parts = before
            vars(extension).update(parts)
            raise


SLOW = "The optimizer works, but slowly. 'python -m adaqn_cuda' says how to get them."


def require_compiler() -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler) and not shutil.which("g++"):
        raise RuntimeError(f"no C++ compiler: {compiler} and g++ were not found")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def announce(what: str, why: str) -> None:
    rule = "*" * 78
    print(f"{rule}\nWARNING: {what}\n{why}\n{rule}", file=sys.stderr)


# ------------------------------------------------------------------------------ the description


def description(text: str, repository: str) -> str:
    """The README as an index shows it, where no link may be relative.

    Links lead into ``repository``.  Without one, their words remain, and pictures go.
    """

    def resolve(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        if not repository:
            return "" if mark else words
        return f"{mark}[{words}]({repository}/{'raw' if mark else 'blob'}/HEAD/{target})"

    return re.sub(r"(!?)\[([^]]*)\]\(([^)\s]+)\)", resolve, text)


def project_urls(repository: str) -> dict[str, str]:
    pages = {
        "Source": "",
        "Documentation": "/blob/HEAD/docs/index.md",
        "Changelog": "/blob/HEAD/CHANGELOG.md",
        "Issues": "/issues",
    }
    return {name: repository + page for name, page in pages.items()} if repository else {}


setup(
    long_description=description((ROOT / "README.md").read_text(encoding="utf-8"), REPOSITORY),
    long_description_content_type="text/markdown",
    project_urls=project_urls(REPOSITORY),
    ext_modules=[native_library()],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
