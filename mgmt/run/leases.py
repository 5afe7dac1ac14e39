"""Leases: a primary that is fenced by its lease serves under one from the first moment, and what a fence may go by is recorded.

How long a lease may be is recorded before it is asked for; that the node has one, only when it has answered. From that answer on it obeys
no management node of a lower term either, so nobody else can prolong the lease. If we die in between, the fence takes it that the node
serves without a lease, which proves nothing: that errs on the safe side, and the next answer mends it.
"""

from __future__ import annotations

from agent.contract import messages as m
from mgmt.catalog import VolumeEntry
from mgmt.fencing.kinds import FenceKind
from mgmt.run.site import Site


def let_serve(site: Site, entry: VolumeEntry, node: str, epoch: int) -> m.VolumeFacts:
    """Return the volume as a node serves it from now on, under a lease if that is what fences it."""
    if not is_leased(site, node):
        site.catalog.forget_lease(entry.id, node)
        return site.node(node).ask(m.ServeVolume(entry.id, epoch))
    seconds, term = site.inventory.lease_s, site.catalog.term
    site.catalog.note_lease(entry.id, node, seconds)
    facts = site.node(node).ask(m.ServeVolume(entry.id, epoch, seconds))
    site.catalog.note_leased(entry.id, node, term)
    return facts


def renew(site: Site, entry: VolumeEntry, node: str, epoch: int) -> None:
    """Let a node serve on for a while, under its lease or from now on under one."""
    seconds, term = site.inventory.lease_s, site.catalog.term
    site.catalog.note_lease(entry.id, node, seconds)
    site.node(node).ask(m.RenewLease(entry.id, epoch, seconds), limit_s=site.inventory.connect_limit_s)
    site.catalog.note_leased(entry.id, node, term)


def is_leased(site: Site, node: str) -> bool:
    """Whether a node is fenced by its lease."""
    return site.inventory.entry(node).fence == FenceKind.LEASE
