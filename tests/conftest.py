"""Settings of every test run."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

ROOT = Path(__file__).resolve().parent.parent
NEEDS_ROOT = ("storage", "lab", "faults")

# A shell that runs us in the background makes us ignore Ctrl-C, and so would every program under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Two shared cores make a deadline per example a coin toss; the time limit per test stands.
settings.register_profile("landfall", deadline=None, database=DirectoryBasedExampleDatabase(ROOT / "build" / "hypothesis"))
settings.load_profile("landfall")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, where the run is not root's, the tests that make loop devices, mounts and namespaces."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.path.parent.name in NEEDS_ROOT:
            item.add_marker(pytest.mark.skip(reason="makes loop devices and mounts, which takes root"))
