"""Settings of every test run."""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

ROOT = Path(__file__).resolve().parent.parent
NEEDS_ROOT = ("storage", "lab", "drills", "faults")
DEVICE_MAPPER = Path("/sys/class/misc/device-mapper")
IN_GUEST = "LANDFALL_IN_GUEST" in os.environ
DESELECTED = pytest.StashKey[int]()

# A shell that runs us in the background makes us ignore Ctrl-C, and so would every program under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Two shared cores make a deadline per example a coin toss; the time limit per test stands.
settings.register_profile("landfall", deadline=None, database=DirectoryBasedExampleDatabase(ROOT / "build" / "hypothesis"))
settings.load_profile("landfall")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what takes a guest; skips, where the run is not root's, what makes devices and mounts."""
    there = {"device_mapper": DEVICE_MAPPER.exists(), "nfs_server": IN_GUEST, "netem": IN_GUEST}
    missing = {marker for marker, found in there.items() if not found}
    if left := [item for item in items if missing & {mark.name for mark in item.iter_markers()}]:
        config.stash[DESELECTED] = len(left)
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]
    if os.geteuid() == 0:
        return
    for item in items:
        if item.path.parent.name in NEEDS_ROOT:
            item.add_marker(pytest.mark.skip(reason="makes loop devices and mounts, which takes root"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says in one line what was left out, and where it runs."""
    if left := config.stash.get(DESELECTED, 0):
        what = "device-mapper or netem, which this kernel has not, or the kernel's NFS server for themselves"
        terminalreporter.write_line(f"{left} tests need {what}: `make vm-test` runs them in a guest")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Lets nothing be skipped in the guest, which is there so that everything can run."""
    report = yield
    if IN_GUEST and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped in the guest: {report.longrepr}"
    return report
