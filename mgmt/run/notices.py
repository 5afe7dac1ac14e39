"""Notifications: what agents had to say, also while the management node was away.

A notification is durable here before the agent is told to forget it. If we die in between, it is read again and known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from agent.contract import messages as m
from agent.contract.errors import HostKeyChanged, NodeUnreachable, NotificationUnhandled
from agent.system.clock import monotonic_s
from mgmt.run.site import Site

RECEPTION_FAILURE: Final = "reception-failure"
DEVICE_CHANGED: Final = "device-changed"
LONGEST_WAIT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Collected:
    """What was new, per node in order, and the nodes that could not be asked."""

    new: tuple[m.Notification, ...]
    unreachable: tuple[str, ...]


def collect(site: Site, nodes: Sequence[str] | None = None) -> Collected:
    """Return what the agents (without ``nodes``, all) had to say, stored and acknowledged."""
    new: list[m.Notification] = []
    unreachable = []
    for name in site.inventory.names if nodes is None else nodes:
        try:
            new += _take(site, name, 0.0)
        except (NodeUnreachable, HostKeyChanged):
            unreachable.append(name)
    return Collected(tuple(new), tuple(unreachable))


def wait_for_failure(site: Site, node: str, transfer: UUID, limit_s: float) -> m.Notification:
    """Return the reception failure notification of a transfer as soon as ``node`` sends it, or at once if it did before.

    NotificationUnhandled when none came within ``limit_s``.
    """
    until = monotonic_s() + limit_s
    while True:
        for seen in site.catalog.notifications(pending_only=True):
            if seen.node == node and seen.notification.transfer == transfer and seen.notification.kind == RECEPTION_FAILURE:
                return seen.notification
        left = until - monotonic_s()
        if left <= 0:
            raise NotificationUnhandled(
                f"{node} has sent no reception failure notification for transfer {transfer} in {limit_s:g} s",
                fix="Look at `landfall status`: the transfer may still run.",
            )
        _take(site, node, min(left, LONGEST_WAIT_S))


def _take(site: Site, name: str, wait_s: float) -> list[m.Notification]:
    """Fetch, store, then acknowledge, in this order."""
    outbox = site.node(name).ask(m.ReadOutbox(after=0, wait_s=wait_s), limit_s=wait_s + site.inventory.connect_limit_s)
    if not outbox.notifications:
        return []
    new = site.catalog.store_notifications(name, outbox.notifications)
    site.node(name).ask(m.AcknowledgeOutbox(max(said.sequence for said in outbox.notifications)))
    return new
