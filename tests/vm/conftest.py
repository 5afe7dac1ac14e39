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

from tests.vm.run import ADDRESS, DIGESTS, ROOT, Listing, Run, Volume, listing, logical_volumes, recovered

FOLDER = os.environ.get("LANDFALL_VM_RUN")
collect_ignore_glob = ["test_*.py"] if FOLDER is None else ["test_resumed.py" if recovered(Path(FOLDER)) else "test_recovered.py"]

SSH_CONFIG = ROOT / "build" / "vm" / "ssh_config"


@pytest.fixture(scope="session")
def run() -> Run:
    """What the drill left."""
    assert FOLDER is not None
    return Run.read(Path(FOLDER))


def machine(name: str) -> Host:
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(SSH_CONFIG), sudo=True)


@pytest.fixture(scope="session")
def mgmt() -> Host:
    return machine("mgmt")


@pytest.fixture(scope="session")
def nas1() -> Host:
    """The source, switched on again if it had lost its power."""
    return machine("nas1")


@pytest.fixture(scope="session")
def nas2() -> Host:
    return machine("nas2")


@pytest.fixture(scope="session", params=["nas1", "nas2"])
def nas(request: pytest.FixtureRequest) -> Host:
    """Each of the two."""
    return machine(request.param)


@pytest.fixture(scope="session")
def server(run: Run) -> Host:
    """The one of the two that is to serve the volume in the end."""
    return machine(run.server)


@pytest.fixture(scope="session")
def standby(run: Run) -> Host:
    """The other one, which may not."""
    return machine("nas1" if run.server == "nas2" else "nas2")


@pytest.fixture(scope="session")
def served(server: Host, run: Run) -> Listing:
    """Every file that is served, with attributes and digest, told by a program that is sent there."""
    return listing(server.check_output("python3 -c %s %s", DIGESTS.read_text(), run.mount_point))


@pytest.fixture(scope="session")
def volumes(nas1: Host, nas2: Host) -> dict[str, list[Volume]]:
    """Per NAS its logical volumes."""
    return {"nas1": logical_volumes(nas1), "nas2": logical_volumes(nas2)}


@pytest.fixture(scope="session")
def by_nfs(mgmt: Host, run: Run) -> Listing:
    """Every file as the management node's kernel reads it, from where the volume is found."""
    folder = mgmt.check_output("mktemp --directory")
    mgmt.check_output("mount --types nfs4 --options ro,vers=4.2,soft,timeo=600 %s %s", f"{ADDRESS}:{run.mount_point}", folder)
    try:
        return listing(mgmt.check_output("python3 -c %s %s", DIGESTS.read_text(), folder))
    finally:
        mgmt.check_output("umount %s && rmdir %s", folder, folder)
