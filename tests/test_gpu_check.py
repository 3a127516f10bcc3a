"""``bench/gpu_check.sh`` without a GPU: its stages, with a stand-in for Python."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

from adaqn_cuda import ops

ROOT = Path(__file__).parents[1]
STAGES = [
    "build", "tests of whole optimizers", "benchmark of the default", "all other tests",
    "torch's suites and checkpoints", "benchmark",
    *(f"compute-sanitizer {t}check" for t in ("mem", "race", "sync", "init")),
]  # fmt: skip

#: Python on a machine with a GPU; of tests and benchmarks it notes the arguments.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
    *get_device_name*) echo "NVIDIA H100 80GB HBM3" ;;
    *get_device_capability*) echo 9.0 ;;
    -c*) ;;
    *) printf '%q ' "$@" >>"$LOG"; echo >>"$LOG" ;;
esac
if [[ "$*" =~ $FAILS ]]; then exit 1; fi
"""


@pytest.fixture
def check(tmp_path):
    """A function that runs the script, and gives the result and the commands of its stages."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "compute-sanitizer").write_text('#!/usr/bin/env bash\necho "$@" >>"$LOG"\n')
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"

    def run(*arguments, fails="^$"):
        log.write_text("")
        environment = {
            **os.environ, "PYTHON": str(tmp_path / "python"), "LOG": str(log), "FAILS": fails,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        }  # fmt: skip
        done = subprocess.run(
            [ROOT / "bench" / "gpu_check.sh", *arguments, tmp_path / "results"],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        return done, [shlex.split(line) for line in log.read_text().splitlines()]

    return run


def stages_of(text):
    return [line.split(" (")[0][4:] for line in text.splitlines() if line.startswith("=== ")]


def test_dry_run_walks_every_stage(check, tmp_path):
    done, commands = check("--dry-run")
    assert done.returncode == 0, done.stderr
    assert stages_of(done.stdout) == [*STAGES, "done"]
    assert "all stages walked" in done.stdout
    assert not (tmp_path / "results").exists()
    for command in commands:
        assert {"--collect-only", "--dry-run", "--version"} & set(command), command


def test_on_a_gpu_nothing_is_dry(check, tmp_path):
    done, commands = check()
    assert done.returncode == 0, done.stderr
    assert stages_of(done.stdout) == [*STAGES, "done"]
    assert not any({"--collect-only", "--dry-run"} & set(command) for command in commands)
    written = [word for command in commands for word in command if word.endswith(".json")]
    folder = tmp_path / "results"
    assert written == [f"{folder}/h100-80gb-hbm3-{name}.json" for name in ("default", "step")]


def test_a_failure_is_told_and_the_rest_goes_on(check):
    done, _ = check("--dry-run", fails="gpu_step.*default")
    assert done.returncode == 1
    assert stages_of(done.stdout) == [*STAGES, "done"]
    assert "FAILED: benchmark of the default\n" in done.stdout


def test_what_there_is_no_time_for_is_told(check):
    done, commands = check("--seconds", "40", "--only", "default|memcheck|all other")
    assert done.returncode == 0
    assert stages_of(done.stdout) == [
        "benchmark of the default", "all other tests", "compute-sanitizer memcheck", "done"
    ]  # fmt: skip
    assert not commands
    for stage, most in (("benchmark of the default", 100), ("all other tests", 240)):
        # A second may pass before the first stage is looked at.
        assert re.search(f"LEFT OUT: {stage}: (40|3.) of {most} s were left", done.stdout)
    done, _ = check("--quickly")
    assert done.returncode == 2 and "--quickly" in done.stderr


def test_a_benchmark_ends_before_its_stage_does(check):
    """Or nothing of it would be written."""
    for seconds, limit in (("540", 100), ("70", 70)):
        done, (command,) = check("--seconds", seconds, "--only", "benchmark of the default")
        assert done.returncode == 0, done.stderr
        budget = int(command[command.index("--budget") + 1])
        assert limit - 30 < budget <= limit - 20


def test_stages_select_tests_that_there_are(check):
    """All of them between the two stages, and every operation for the sanitizer."""
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "--collect-only", "-p",
         "no:cacheprovider", "tests/test_cuda.py", "tests/test_products.py"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout  # fmt: skip
    names = [line for line in collected.splitlines() if "::" in line]
    _, commands = check("--dry-run")
    selections = [c[c.index("-k") + 1] for c in commands if "-k" in c]
    whole, others, sanitized = (
        {name for name in names if Expression.compile(k).evaluate(matcher(name))}
        for k in selections
    )
    assert whole and whole | others >= set(names) and not whole & others
    assert any("the default" in name for name in whole)
    for operation in set(ops.SCHEMAS) - {"kronecker_apply", "secant_decide"}:
        assert any(f"[{operation}-" in name for name in sanitized), operation


def matcher(name):
    return lambda word, **_: word.lower() in name.lower()


def test_benchmark_at_tiny_sizes(monkeypatch, capsys):
    arguments = ["--dry-run", "--optimizers", "^AdaQN$|default|Adam fused|LBFGS"]
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "bench" / "gpu_step.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "dry run: nothing written" in text
    for words in ("AdaQN default", "eager/period/device", "torch's LBFGS", "eager/amortised"):
        assert words in text
