#!/usr/bin/env bash
# Compiles every kernel with warnings, spills and local memory as errors, for every architecture that
# a release carries, and prints what each kernel takes.
#   csrc/cuda/check.sh [architecture ...]
set -euo pipefail
cd "$(dirname "$0")"

if ! command -v nvcc >/dev/null; then
    echo "nvcc not found: CUDA kernels not checked"
    exit 0
fi

architectures=("$@")
if [ ${#architectures[@]} = 0 ]; then architectures=(75 80 90 100 120); fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

check() { # source architecture
    nvcc -std=c++17 -O3 -gencode "arch=compute_$2,code=sm_$2" -c "$1" -o "$scratch/$1.$2.o" \
        --options-file strict.options >"$scratch/$1.$2.log" 2>&1 ||
        { cat "$scratch/$1.$2.log"; return 1; }
}
export -f check
export scratch
for architecture in "${architectures[@]}"; do
    printf "%s $architecture\n" *.cu
done | xargs -P "$(nproc)" -L 1 bash -c 'check "$0" "$1"'

# The most registers over the instances of a kernel that differ in the capacity of their table.
cat "$scratch"/*.log | c++filt | awk '
    /Compiling entry function/ {
        architecture = $0
        sub(/.*for .sm_/, "", architecture)
        sub(/[^0-9].*/, "", architecture)
        kernel = $0
        sub(/.*entry function .(void )?/, "", kernel)
        gsub(/adaqn::cuda::|\(anonymous namespace\)::/, "", kernel)
        sub(/\(.*/, "", kernel)
        sub(/, (32|64|256|1024)>/, ">", kernel)
        gsub(/__nv_bfloat16/, "bf16", kernel)
    }
    / registers/ { sub(/.*Used /, ""); print kernel "|" architecture "|" $1 }' |
    sort | awk -F'|' -v list="${architectures[*]}" '
    function row(i) {
        if (last == "") return
        printf "| `%s` |", last
        for (i = 1; i <= n; ++i) printf " %s |", most[names[i]]
        print ""
        split("", most)
    }
    BEGIN {
        n = split(list, names, " ")
        printf "| kernel |"
        for (i = 1; i <= n; ++i) printf " sm_%s |", names[i]
        printf "\n|---|"
        for (i = 1; i <= n; ++i) printf "---|"
        print ""
    }
    $1 != last { row(); last = $1 }
    $3 + 0 > most[$2] + 0 { most[$2] = $3 }
    END { row() }'
echo "Registers per thread. No spills, no local memory, no static shared memory."
