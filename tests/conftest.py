import os
import signal

import pytest

from adaqn_cuda.native import library_obstacle

# Matplotlib must not look for a display.
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_configure(config):
    """Without the native library, tests of it would be skipped: that must be asked for."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs behind it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("ADAQN_TEST_WITHOUT_LIBRARY") == "1":
        return
    obstacle = library_obstacle()
    if obstacle is not None:
        raise pytest.UsageError(
            f"{obstacle}. ADAQN_TEST_WITHOUT_LIBRARY=1 tests what does not need the library."
        )
