"""The faults of a scenario, dealt to the local lab, and what puts them right again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from agent.system.block import go_down
from mgmt.drill.disks import within_node
from mgmt.drill.scenario import Fault, Repair
from mgmt.lab import control, lifecycle
from mgmt.lab.layout import NODE_ROOT, Lab, NodeName

MGMT, NAS1, NAS2 = NodeName


class Wire(Enum):
    """What becomes of the transfer's connections, which a proxy holds at the byte of the fault."""

    RESET = auto()  # a process that dies closes its connections
    SILENT = auto()  # a machine or a link says no goodbye
    OPEN = auto()  # they are not concerned


WIRE: Final = {
    Fault.SOURCE_AGENT_KILLED: Wire.RESET,
    Fault.SOURCE_POWER_CUT: Wire.SILENT,
    Fault.SOURCE_PAUSED: Wire.SILENT,
    Fault.SOURCE_DISK_FAILED: Wire.OPEN,
    Fault.LINK_CUT: Wire.SILENT,
    Fault.RECEIVER_AGENT_KILLED: Wire.RESET,
    Fault.RECEIVER_POWER_CUT: Wire.SILENT,
    Fault.MANAGEMENT_POWER_CUT: Wire.OPEN,
}


@dataclass(frozen=True, slots=True)
class Strikes:
    """Deals faults to one lab."""

    lab: Lab

    def deal(self, fault: Fault) -> None:
        """Return once it has happened."""
        match fault:
            case Fault.SOURCE_AGENT_KILLED:
                control.kill_service(self.lab, NAS1, "agent")
            case Fault.SOURCE_POWER_CUT:
                self._cut_power(NAS1)
            case Fault.SOURCE_PAUSED:
                lifecycle.pause(self.lab, NAS1)
            case Fault.SOURCE_DISK_FAILED:
                self._fail_disk(NAS1)
            case Fault.LINK_CUT:
                lifecycle.cut(self.lab, NAS1, NAS2)
            case Fault.RECEIVER_AGENT_KILLED:
                control.kill_service(self.lab, NAS2, "agent")
            case Fault.RECEIVER_POWER_CUT:
                self._fail_disk(NAS2)  # what it had not flushed is gone
                self._cut_power(NAS2)
            case Fault.MANAGEMENT_POWER_CUT:
                self._cut_power(MGMT)

    def repair(self, repair: Repair) -> None:
        """Return once it is as before, and can be spoken to."""
        match repair:
            case Repair.START_SOURCE:
                lifecycle.start_node(self.lab, NAS1)
            case Repair.WAKE_SOURCE:
                lifecycle.wake(self.lab, NAS1)
            case Repair.HEAL_LINK:
                lifecycle.heal(self.lab, NAS1, NAS2)
            case Repair.START_RECEIVER_AGENT:
                control.start_service(self.lab, NAS2, "agent")
            case Repair.START_RECEIVER:
                lifecycle.start_node(self.lab, NAS2)
            case Repair.START_MANAGEMENT:
                lifecycle.start_node(self.lab, MGMT)

    def _cut_power(self, node: NodeName) -> None:
        lifecycle.cut_off(self.lab, node)  # a machine without power does not say goodbye, as processes that are killed do
        lifecycle.kill(self.lab, node)

    def _fail_disk(self, node: NodeName) -> None:
        """Let the filesystem of the node's pool end every read and write in an I/O error, without flushing, as when its disk is gone."""
        pool = os.open(within_node(self.lab, node, NODE_ROOT / "pool"), os.O_RDONLY | os.O_DIRECTORY)
        try:
            go_down(pool)
        finally:
            os.close(pool)
