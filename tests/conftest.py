import os
import signal

import pytest
import torch
from hypothesis import settings

from adaqn_cuda.native import library_obstacle
from adaqn_cuda.search import Search

# Matplotlib must not look for a display.
os.environ.setdefault("MPLBACKEND", "Agg")

# How long an example takes says nothing on a machine with other work.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_configure(config):
    """Without the native library, tests of it would be skipped: that must be asked for.

    Workers of pytest-xdist share the cores.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs behind it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start
    if os.environ.get("ADAQN_TEST_WITHOUT_LIBRARY") == "1":
        return
    obstacle = library_obstacle()
    if obstacle is not None:
        raise pytest.UsageError(
            f"{obstacle}. ADAQN_TEST_WITHOUT_LIBRARY=1 tests what does not need the library."
        )


@pytest.fixture
def device_decides(monkeypatch):
    """LBFGS looks at its decisions no more often than on a GPU."""
    begin = Search.__post_init__

    def begin_as_on_a_gpu(self):
        begin(self)
        self.reads = False

    monkeypatch.setattr(Search, "__post_init__", begin_as_on_a_gpu)


@pytest.fixture
def launched_late():
    """A function that counts emulated launches of kernels which were not loaded, from now on."""
    from emulated import build

    module = build()
    module.unload()
    before = module.unloaded_launches()
    yield lambda: module.unloaded_launches() - before
    module.unload()
