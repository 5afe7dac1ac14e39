"""The moment when a given number of bytes has left a node."""

from __future__ import annotations

from typing import Final, Protocol

from agent.contract.errors import DrillFailed
from agent.system.clock import monotonic_s
from mgmt.drill.stage import Advance
from mgmt.drill.vm.machines import Machines

STILL_LIMIT_S: Final = 60.0


class Transfer(Protocol):
    """The order to send, while it is carried out."""

    @property
    def under_way(self) -> bool:
        """Whether it still is; waits a moment for its end."""

    def finish(self) -> None:
        """Return if it has ended as it should, raise what ended it otherwise."""


def await_bytes(machines: Machines, node: str, goal_bytes: int, before: int, order: Transfer | None, advance: Advance) -> int:
    """Return how many bytes have left the node since it stood at ``before``, at the first look at which they are ``goal_bytes``.

    Bytes are counted outside the machine and are what passed its interface: the transfer, its acknowledgements, and the few that the
    node says to the management node. DrillFailed if the order ends first, or nothing leaves for a minute. No ``order``: nobody can say so.
    """
    sent, moved_s = 0, monotonic_s()
    while True:
        last, sent = sent, machines.bytes_sent(node) - before
        advance(sent, goal_bytes)
        if sent >= goal_bytes:
            return sent
        if sent > last:
            moved_s = monotonic_s()
        ended = order is not None and not order.under_way
        if order is not None and ended:
            order.finish()
        if ended or monotonic_s() - moved_s > STILL_LIMIT_S:
            words = f"the transfer ended after {sent:,} of {goal_bytes:,} bytes, before something was to happen to it"
            raise DrillFailed(words, fix="Take a lower --at.")
