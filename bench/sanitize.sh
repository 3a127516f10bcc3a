#!/usr/bin/env bash
# Runs the tests of the native CPU operations under AddressSanitizer and UndefinedBehaviorSanitizer,
# in a copy of the working tree.  Wide vectors are those of this machine.
#   bench/sanitize.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$scratch"
cd "$scratch"

# One instruction set: the choice at run time goes through function pointers all the same.
export ADAQN_REQUIRE_EXT=1 ADAQN_CUDA=0 ADAQN_CXXFLAGS="-O1 -g -march=native -DADAQN_ONE_ISA
    -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
python setup.py --quiet build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }

# Python itself keeps memory until it ends.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libubsan.so)" \
    python -m pytest -q -p no:cacheprovider tests/test_native_ops.py \
    --deselect tests/test_native_ops.py::test_narrower_instruction_sets "$@"
