"""The faults of a scenario, dealt to a lab's nodes, and what puts them right again."""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, Protocol

from mgmt.drill.scenario import Fault, Repair

MANAGEMENT: Final = "mgmt"
SOURCE: Final = "nas1"
RECEIVER: Final = "nas2"


class Nodes(Protocol):
    """What a lab can let happen to its nodes. Every verb returns once it has happened."""

    def kill_agent(self, node: str) -> None:
        """SIGKILL the node's agent, which stays away."""

    def start_agent(self, node: str) -> None:
        """Start it again; it can be spoken to."""

    def cut_power(self, node: str) -> None:
        """Switch the node off: nothing is flushed, nobody is told."""

    def start(self, node: str) -> None:
        """Switch it on; it can be spoken to."""

    def pause(self, node: str) -> None:
        """Let nothing of the node run, and no packet of it pass."""

    def wake(self, node: str) -> None:
        """Let it go on as if no time had passed."""

    def fail_disk(self, node: str) -> None:
        """Let every read and write where the node's volumes are end in an I/O error."""

    def cut_link(self) -> None:
        """Let no packet pass between nas1 and nas2; everybody else reaches both."""

    def heal_link(self) -> None:
        """Let them reach each other again."""


class Wire(Enum):
    """What becomes of the transfer's connections, where a proxy holds them at the byte of the fault."""

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


def deal(nodes: Nodes, fault: Fault) -> None:
    """Return once it has happened."""
    match fault:
        case Fault.SOURCE_AGENT_KILLED:
            nodes.kill_agent(SOURCE)
        case Fault.SOURCE_POWER_CUT:
            nodes.cut_power(SOURCE)
        case Fault.SOURCE_PAUSED:
            nodes.pause(SOURCE)
        case Fault.SOURCE_DISK_FAILED:
            nodes.fail_disk(SOURCE)
        case Fault.LINK_CUT:
            nodes.cut_link()
        case Fault.RECEIVER_AGENT_KILLED:
            nodes.kill_agent(RECEIVER)
        case Fault.RECEIVER_POWER_CUT:
            nodes.cut_power(RECEIVER)
        case Fault.MANAGEMENT_POWER_CUT:
            nodes.cut_power(MANAGEMENT)


def repair(nodes: Nodes, wanted: Repair) -> None:
    """Return once it is as before, and can be spoken to."""
    match wanted:
        case Repair.START_SOURCE:
            nodes.start(SOURCE)
        case Repair.WAKE_SOURCE:
            nodes.wake(SOURCE)
        case Repair.HEAL_LINK:
            nodes.heal_link()
        case Repair.START_RECEIVER_AGENT:
            nodes.start_agent(RECEIVER)
        case Repair.START_RECEIVER:
            nodes.start(RECEIVER)
        case Repair.START_MANAGEMENT:
            nodes.start(MANAGEMENT)
