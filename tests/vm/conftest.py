"""The three virtual machines after a drill, looked at over SSH from their host, by programs of the system alone.

Collected only where LANDFALL_VM_RUN names the folder of a drill that has just been held in the VM lab: without machines there is nothing
to ask, and a skip of every test would look like a result. `make vm-drill` sets it; by hand, with the lab up:

    vagrant/host run env LANDFALL_VM_RUN=build/vm/runs/TIME build/venv/bin/python -m pytest tests/vm
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import testinfra
from testinfra.host import Host

from tests.vm.run import DIGESTS, ROOT, Listing, Run, Volume, listing, logical_volumes

collect_ignore_glob = [] if "LANDFALL_VM_RUN" in os.environ else ["test_*.py"]

SSH_CONFIG = ROOT / "build" / "vm" / "ssh_config"


@pytest.fixture(scope="session")
def run() -> Run:
    """What the drill left."""
    return Run.read(Path(os.environ["LANDFALL_VM_RUN"]))


def machine(name: str) -> Host:
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(SSH_CONFIG), sudo=True)


@pytest.fixture(scope="session")
def mgmt() -> Host:
    return machine("mgmt")


@pytest.fixture(scope="session")
def nas1() -> Host:
    """The one that died, switched on again."""
    return machine("nas1")


@pytest.fixture(scope="session")
def nas2() -> Host:
    return machine("nas2")


@pytest.fixture(scope="session", params=["nas1", "nas2"])
def nas(request: pytest.FixtureRequest) -> Host:
    """Each of the two."""
    return machine(request.param)


@pytest.fixture(scope="session")
def served(nas2: Host, run: Run) -> Listing:
    """Every file that nas2 serves, with attributes and digest, told by a program that is sent there."""
    return listing(nas2.check_output("python3 -c %s %s", DIGESTS.read_text(), run.mount_point))


@pytest.fixture(scope="session")
def volumes1(nas1: Host) -> list[Volume]:
    return logical_volumes(nas1)


@pytest.fixture(scope="session")
def volumes2(nas2: Host) -> list[Volume]:
    return logical_volumes(nas2)
