"""The machine that hosts the lab: where its files are, and the place from which its machines can be reached."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from agent.contract.errors import LabMissing
from agent.system.clock import wall_ns
from mgmt.drill.vm.machines import LibvirtMachines
from mgmt.drill.vm.plays import Hear, Playing
from mgmt.drill.vm.scenario import Begin

ROOT: Final = Path(__file__).resolve().parents[3]
INVENTORY: Final = ROOT / "build" / "vm" / "inventory.yml"
SSH_CONFIG: Final = ROOT / "build" / "vm" / "ssh_config"
PLAYBOOK: Final = ROOT / "playbooks" / "failover_drill.yml"
RUNS: Final = Path("build/vm/runs")
_WRAPPER: Final = ROOT / "vagrant" / "host"
_INSIDE: Final = "LANDFALL_VM_HOST"


def go_inside() -> None:
    """Return where the machines can be reached: this program begins again there, under ``vagrant/host run``, unless it is there already.

    LabMissing if this is no checkout, or no lab is up.
    """
    if not _WRAPPER.exists():
        raise LabMissing("the VM lab is driven from a checkout of Landfall, and this is none")
    if not INVENTORY.exists() or not SSH_CONFIG.exists():
        raise LabMissing("no VM lab is up", fix="`vagrant/lab up` brings it up; `make vm-drill` does everything.")
    if _INSIDE not in os.environ:
        argv = [str(_WRAPPER), "run", sys.executable, "-m", "mgmt.cli", *sys.argv[1:]]
        os.execve(argv[0], argv, {**os.environ, _INSIDE: "1"})  # noqa: S606 - the same program, elsewhere


def machines() -> LibvirtMachines:
    """Return the lab's machines."""
    return LibvirtMachines(SSH_CONFIG)


def new_run() -> Path:
    """Return the name of a folder that no other run has; relative, since it is shown."""
    return RUNS / datetime.fromtimestamp(wall_ns() / 1e9, UTC).strftime("%Y%m%d-%H%M%S")


def player(folder: Path) -> Begin:
    """Return what begins the drill's plays; Ansible's own artefacts are kept below ``folder``."""

    def begin(tag: str, variables: Mapping[str, Any], hear: Hear) -> Playing:
        return Playing(PLAYBOOK, INVENTORY, folder / "ansible", tags=tag, variables=variables, hear=hear)

    return begin
