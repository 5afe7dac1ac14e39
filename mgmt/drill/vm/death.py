"""The end of nas1: its power is cut when a given number of bytes has left it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from agent.contract.errors import DrillFailed
from agent.system.clock import monotonic_s
from mgmt.drill.stage import Advance
from mgmt.drill.vm.machines import Machines


class Transfer(Protocol):
    """The order to send, while it is carried out."""

    @property
    def under_way(self) -> bool:
        """Whether it still is; waits a moment for its end."""

    def finish(self) -> None:
        """Return if it has ended as it should, raise what ended it otherwise."""


@dataclass(frozen=True, slots=True)
class Death:
    """When it died: bytes that had left it since the transfer was ordered, and the moment."""

    bytes_sent: int
    at_s: float


def kill_at(machines: Machines, node: str, goal_bytes: int, before: int, transfer: Transfer, advance: Advance) -> Death:
    """Return once the node is dead, which it is at the first look after ``goal_bytes`` have left it since it stood at ``before``.

    Bytes are counted outside the machine and are what passed its interface: the transfer, its acknowledgements, and the few that the
    node says to the management node. DrillFailed if the transfer ends first.
    """
    while True:
        sent = machines.bytes_sent(node) - before
        advance(sent, goal_bytes)
        if sent >= goal_bytes:
            machines.kill(node)
            return Death(sent, monotonic_s())
        if not transfer.under_way:
            transfer.finish()
            raise DrillFailed(
                f"the transfer ended after {sent:,} of {goal_bytes:,} bytes, before {node} was to die", fix="Take a lower --at."
            )
