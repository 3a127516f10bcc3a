"""What a benchmark's JSON file keeps: medians and spreads, no raw timings or machine names."""

import shlex
import sys

import torch

KEPT = ("median", "iqr", "min", "rounds")


def pytest_benchmark_update_json(config, benchmarks, output_json):
    cpu = output_json["machine_info"].get("cpu", {})
    records = [
        {**b["params"], **{k: b["stats"][k] for k in KEPT}, **b["extra_info"]}
        for b in output_json["benchmarks"]
    ]
    date = output_json["datetime"][:10]
    commit = output_json["commit_info"].get("id")
    words = [w for w in sys.argv[1:] if not w.startswith("--benchmark-json")]
    output_json.clear()
    output_json.update(
        command=shlex.join(["pytest", *words]),
        date=date,
        commit=commit,
        versions={"torch": torch.__version__},
        cpu=f"{cpu.get('brand_raw', 'unknown')}, {torch.get_num_threads()} threads",
        benchmarks=sorted(records, key=lambda r: (r["d"], r.get("m", 0))),
    )
