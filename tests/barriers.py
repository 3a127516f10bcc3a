"""Leaves out each barrier of the CUDA kernels once, and tells who notices.

    python tests/barriers.py [file:line ...]

For every barrier of a block or a grid in ``csrc/cuda`` (or for those named) the cases of
``small_cases.py`` run without it, once under ThreadSanitizer and once without, each in a process of
its own and up to the first failure.  The exit status is 1 where nobody notices one of them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import races
from cmake_module import ROOT

KERNELS = ROOT / "csrc" / "cuda"
#: Seconds that the cases may take without a barrier.
PATIENCE = 1800
#: Exit statuses of a process that has run the cases; negative ones are signals.
NOBODY = "nobody"
NOTICED_BY = {0: NOBODY, 1: "results", 66: "race", -signal.SIGALRM: "no end"}


def barriers() -> list[str]:
    """Where they are, as file:line."""
    call = re.compile(r"\b(__syncthreads|sync)\(\)")
    return [
        f"{path.name}:{number}"
        for path in sorted(KERNELS.glob("*.cu*"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if call.search(line)
    ]


def status_without(barrier: str) -> int:
    """Of a process that runs the cases without the barrier."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    from emulated import build
    from small_cases import SMALL_CASES

    file, line = barrier.split(":")
    build().omit_barrier(file, int(line))
    signal.alarm(PATIENCE)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    try:
        for check in SMALL_CASES.values():
            check()
    except (AssertionError, RuntimeError):
        os._exit(1)
    os._exit(0)


def judge(names: list[str]) -> None:
    """Prints who notices that each barrier is missing.

    The processes of the cases begin where this one is, with all loaded that takes long.
    """
    import small_cases  # noqa: F401
    from emulated import build

    build()
    for name in names:
        status = status_without(name)
        print(name, NOTICED_BY.get(status, f"status {status}"), flush=True)


def verdicts(names: list[str], sanitized: bool) -> dict[str, str]:
    """Who notices that each barrier is missing, with or without ThreadSanitizer."""
    script = [__file__, "--judge", *names]
    if sanitized:
        done = races.run(script, capture=True, halt_on_error=1, symbolize=0)
    else:
        done = subprocess.run([sys.executable, *script], text=True, stdout=subprocess.PIPE)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def main(names: list[str]) -> int:
    names = names or barriers()
    by_race, by_result = verdicts(names, True), verdicts(names, False)
    print("| barrier | under ThreadSanitizer | without |\n|---|---|---|")
    for name in names:
        print(f"| `{name}` | {by_race[name]} | {by_result[name]} |")
    missed = [name for name in names if by_race[name] == by_result[name] == NOBODY]
    print(f"{len(names)} barriers; nobody notices that {len(missed)} of them are missing.")
    return bool(missed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--judge"]:
        judge(sys.argv[2:])
    elif races.obstacle():
        sys.exit(races.obstacle())
    else:
        sys.exit(main(sys.argv[1:]))
