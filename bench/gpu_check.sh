#!/usr/bin/env bash
# Everything that needs a GPU, with nothing downloaded: builds the library, tests it, measures the
# step, looks for memory errors and races.  Needs torch with CUDA and nvcc.
#   bench/gpu_check.sh [--dry-run] [--seconds N] [--only REGEX] [output folder]
# Stages come in the order of what they tell, and each has a limit of its own.  One that cannot have
# half of that in N seconds (default: 540) is left out, and said to be; --only takes the stages whose
# names match, for another call.  With --dry-run, which needs no GPU, tests are collected, the
# benchmark runs at tiny sizes, and nothing is built or written.  Results go to bench/results, if
# nothing else is given.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} dry=false seconds=540 only=. output=bench/results
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=true ;;
        --seconds) seconds=$2 && shift ;;
        --only) only=$2 && shift ;;
        -*) echo "unknown option: $1" >&2 && exit 2 ;;
        *) output=$1 ;;
    esac
    shift
done
output=$(realpath -m "$output")
failed=() left_out=()

attempt() { # name, seconds, function ...: goes on after a failure, to see the rest
    local name=$1 most=$2 left=$((seconds - SECONDS))
    shift 2
    [[ $name =~ $only ]] || return 0
    printf '\n=== %s (%d s)\n' "$name" "$SECONDS"
    if $dry; then left=$most; fi
    if [ $((2 * left)) -lt "$most" ]; then
        left_out+=("$name: $left of $most s were left")
        return 0
    fi
    local limit=$((most < left ? most : left))
    limit=$limit timeout "$limit" bash -euo pipefail -c '"$@"' stage "$@" || failed+=("$name")
}

# ------------------------------------------------------------------ what stages do

build() {
    if $dry; then
        "$python" setup.py -q --version
        return
    fi
    local log
    log=$(mktemp)
    ADAQN_REQUIRE_EXT=1 TORCH_CUDA_ARCH_LIST=$capability MAX_JOBS=$(nproc) \
        "$python" setup.py -q build_ext --inplace >"$log" 2>&1 || { tail -50 "$log" && return 1; }
    "$python" -m adaqn_cuda
}

tests() { # pytest arguments
    local how=(--collect-only)
    if ! $dry; then
        how=()
        # With pytest-xdist, tests share the device.
        if "$python" -c 'import xdist' 2>/dev/null; then how=(-n 4); fi
    fi
    "$python" -m pytest -q -m cuda -p no:cacheprovider "${how[@]}" "$@"
}

# It writes what it has only at its end, which must come before the stage's limit.
benchmark() { # name of the file, further arguments
    local name=$1
    shift
    if $dry; then set -- --dry-run "$@"; else set -- --output "$output/$slug-$name.json" "$@"; fi
    "$python" bench/gpu_step.py --budget $((limit - 20)) "$@"
}

# Two cases of every operation.  Only our kernels are instrumented, except where a tool must have
# seen who wrote what.
sanitize() { # tool
    local selection=(tests/test_cuda.py -k "agrees and mixed and not float64")
    if $dry; then
        if [ "$1" = memcheck ]; then tests "${selection[@]}"; fi  # the others take the same
        return
    fi
    local sanitizer instrumented=(--kernel-name kernel_substring=adaqn)
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    if [ "$1" = initcheck ]; then instrumented=(); fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 9 \
        "${instrumented[@]}" "$python" -m pytest -q -x -m cuda -p no:cacheprovider "${selection[@]}"
}

# ------------------------------------------------------------------ the stages

slug=dry-run name="no device" capability=""
if ! $dry; then
    mkdir -p "$output"
    "$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
    name=$("$python" -c 'import torch; print(torch.cuda.get_device_name())')
    slug=$(tr '[:upper:]' '[:lower:]' <<<"${name#NVIDIA }" | sed 's/[^a-z0-9]\+/-/g; s/^-//; s/-$//')
    capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    echo "$name, compute capability $capability"
fi
export PYTHONPATH=$PWD python dry output slug capability
export -f build tests benchmark sanitize

# Tests of whole optimizers, by their names.
whole="option or captured or capture or launches or contiguous or never_wait or same_way"

attempt "build" 240 build
if [ ${#failed[@]} -gt 0 ]; then exit 1; fi
attempt "tests of whole optimizers" 90 tests tests/test_cuda.py -k "$whole"
attempt "benchmark of the default" 100 benchmark default \
    --optimizers "default|blocks of 64|Adam fused" --cases "1e[57]|LSTM|tensors"
attempt "all other tests" 240 tests tests/test_cuda.py tests/test_products.py -k "not ($whole)"
attempt "torch's suites and checkpoints" 180 tests tests/test_torch_suite.py tests/test_groups.py \
    tests/test_checkpoint.py tests/test_offload.py tests/test_safetensors.py
attempt "benchmark" 200 benchmark step
for tool in memcheck racecheck synccheck initcheck; do
    attempt "compute-sanitizer $tool" 90 sanitize $tool
done

printf '\n=== done (%d s)\n' "$SECONDS"
if [ ${#left_out[@]} -gt 0 ]; then printf 'LEFT OUT: %s\n' "${left_out[@]}"; fi
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
if $dry; then echo "all stages walked"; else echo "all checks that were run passed on $name"; fi
