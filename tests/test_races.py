"""Data races of the CUDA kernels, which ThreadSanitizer sees in the emulation."""

import barriers
import pytest
import races

pytestmark = pytest.mark.skipif(races.obstacle() is not None, reason=str(races.obstacle()))


def test_no_races():
    """In a few small cases of every kernel; ``races.py`` runs the other tests that way."""
    done = races.run_tests([races.SMALL, "-q", "-x"], capture=True)
    assert done.returncode == 0, done.stdout[-12_000:]
    assert " passed" in done.stdout


def test_missing_barriers_are_seen():
    """One of a block and one of the grid; ``barriers.py`` leaves out every one."""
    places = barriers.barriers()
    of_block = next(place for place in places if place.startswith("curvature.cu"))
    of_grid = next(place for place in reversed(places) if place.startswith("direction.cu"))
    assert barriers.verdicts([of_block, of_grid], sanitized=True) == {
        of_block: "race",
        of_grid: "race",
    }
