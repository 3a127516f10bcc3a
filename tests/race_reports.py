"""Plugin of pytest: a test fails during which ThreadSanitizer has reported something.

``races.py`` loads it, and lets ThreadSanitizer write to ``ADAQN_RACE_REPORTS``.
"""

import os
from pathlib import Path

import pytest

#: A report holds the names of many templates.
MOST_CHARACTERS = 12_000

reports = Path(f"{os.environ['ADAQN_RACE_REPORTS']}.{os.getpid()}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = reports.stat().st_size if reports.exists() else 0
    result = yield
    text = reports.read_text()[before:] if reports.exists() else ""
    if text:
        pytest.fail(text[:MOST_CHARACTERS], pytrace=False)
    return result
