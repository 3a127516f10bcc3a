#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes, with nothing downloaded: builds the library,
# tests it, looks for memory errors and races, measures the step.  Needs torch with CUDA and nvcc.
#   bench/gpu_check.sh [output folder]     (default: bench/results)
set -euo pipefail
cd "$(dirname "$0")/.."
output=$(realpath "${1:-bench/results}")
mkdir -p "$output"
export PYTHONPATH=$PWD ADAQN_REQUIRE_EXT=1
failed=()

stage() { printf '\n=== %s (%d s)\n' "$1" "$SECONDS"; }
attempt() { # name, command ...: goes on after a failure, to see the rest
    local name=$1
    shift
    stage "$name"
    "$@" || failed+=("$name")
}

python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
name=$(python3 -c 'import torch; print(torch.cuda.get_device_name())')
slug=$(tr '[:upper:]' '[:lower:]' <<<"${name#NVIDIA }" | sed 's/[^a-z0-9]\+/-/g; s/^-//; s/-$//')
capability=$(python3 -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
echo "$name, compute capability $capability"

stage "build"
log=$(mktemp)
TORCH_CUDA_ARCH_LIST=$capability MAX_JOBS=$(nproc) python3 setup.py -q build_ext --inplace \
    >"$log" 2>&1 || { tail -50 "$log"; exit 1; }
python3 -m adaqn_cuda

attempt "tests" timeout 170 python3 -m pytest -q -m cuda -p no:cacheprovider tests/test_cuda.py

# Two cases of every operation.  Only our kernels are instrumented, except where a tool must have
# seen who wrote what.
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
for tool in memcheck racecheck synccheck initcheck; do
    if [ ! -x "$sanitizer" ]; then
        echo "compute-sanitizer not found: $tool not run"
        continue
    fi
    only=(--kernel-name kernel_substring=adaqn)
    if [ $tool = initcheck ]; then only=(); fi
    attempt "compute-sanitizer $tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        timeout 90 "$sanitizer" --tool $tool --error-exitcode 9 "${only[@]}" \
        python3 -m pytest -q -x -m cuda -p no:cacheprovider tests/test_cuda.py \
        -k "agrees and mixed and not float64"
done

attempt "benchmark" timeout 260 python3 bench/gpu_step.py --budget 200 \
    --output "$output/$slug-step.json"

stage "done"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all checks passed on $name"
