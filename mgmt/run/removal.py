"""The end of a volume: on both nodes, then in the catalog. Loss statements stay: they are all that tells of it."""

from __future__ import annotations

import shutil

from agent.contract import messages as m
from agent.contract.errors import DeviceBusy, TransferBusy
from agent.system.clock import wall_ns
from mgmt.catalog import VolumeEntry
from mgmt.run.replication import OPEN_STATES
from mgmt.run.site import Site


def remove_volume(site: Site, name: str, *, without: str | None = None) -> VolumeEntry:
    """Return what the catalog said of a volume that is destroyed now; nothing of it is destroyed if anything speaks against it.

    DeviceBusy while a node serves it, TransferBusy while a transfer is open, NodeUnreachable for a node that does not answer, unless it
    is the one to do ``without``: what that one holds stays there. If we die here, the same command finishes it.
    """
    entry = site.catalog.volume(name)
    nodes = [node for node in (entry.secondary, entry.primary) if node != without]
    for node in nodes:
        _refuse_used(site, entry, node)
    for node in nodes:
        site.node(node).ask(m.RemoveVolume(entry.id))
    for transfer in site.catalog.transfers(entry.id):
        shutil.rmtree(site.evidence_folder(transfer.id), ignore_errors=True)
    site.catalog.note(entry.id, "remove", f"{entry.name} was removed from {' and '.join(nodes)}", wall_ns())
    site.catalog.forget_volume(entry.id)
    return entry


def _refuse_used(site: Site, entry: VolumeEntry, node: str) -> None:
    """Say what speaks against it, before anything is destroyed anywhere; each agent says it again."""
    held = next((facts for facts in site.node(node).ask(m.ListVolumes()).volumes if facts.id == entry.id), None)
    if held is not None and held.serving:
        raise DeviceBusy(f"{node} serves volume {entry.name}", fix=f"`landfall unserve {entry.name} --node {node}` first.")
    for facts in site.node(node).ask(m.ListTransfers()).transfers:
        if facts.volume == entry.id and facts.state in OPEN_STATES:
            raise TransferBusy(
                f"transfer {facts.id} of volume {entry.name} is open on {node}", fix=f"`landfall discard {entry.name}` first."
            )
