"""Who is who: the agents' roles are the truth, the catalog follows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from agent.contract import messages as m
from mgmt.catalog import VolumeEntry


def roles_of(entry: VolumeEntry, held: Mapping[str, m.VolumeFacts | None]) -> VolumeEntry:
    """Return the entry with the node as primary that says so at the highest epoch. Pure; nobody who says nothing counts.

    An epoch below the one that is recorded was overtaken: whoever is primary at it is back, and not the primary any more.
    """
    primaries = [(facts.epoch, node) for node, facts in held.items() if facts is not None and facts.role is m.Role.PRIMARY]
    if not primaries or max(primaries)[0] < entry.epoch:
        return entry
    epoch, node = max(primaries)
    other = entry.secondary if node == entry.primary else entry.primary
    return replace(entry, primary=node, secondary=other, epoch=epoch)
