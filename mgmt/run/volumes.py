"""Volumes: made on the primary, admitted on the secondary, remembered with their policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

from agent.contract import messages as m
from agent.contract.errors import (
    FailoverBusy,
    LandfallError,
    LayoutUnsupported,
    LeaseEnded,
    NodeUnreachable,
    NoSuchVolume,
    NotPrimary,
    TransferBusy,
    VolumeExists,
)
from agent.contract.identity import FilesystemKind, GenerationKind, volume_name
from mgmt.catalog import VolumeEntry
from mgmt.determination import Policy
from mgmt.reach import Node
from mgmt.run.leases import let_serve
from mgmt.run.roles import roles_of
from mgmt.run.site import Site


def add_volume(
    site: Site,
    name: str,
    *,
    filesystem: FilesystemKind,
    size_bytes: int,
    primary: str,
    secondary: str,
    policy: Policy | None = None,
    priorities: tuple[tuple[str, int], ...] = (),
    sector_bytes: int = 512,
    mkfs_options: tuple[str, ...] = (),
    address: str = "",
) -> m.VolumeFacts:
    """Return the volume as the primary serves it (at ``address``, if it has one), with a secondary that is ready for its replica.

    Recorded first: if we die here, adding the same volume again finishes what is missing.
    """
    volume_name(name)
    entry = VolumeEntry(uuid4(), name, primary, secondary, filesystem, size_bytes, policy or Policy(), priorities, address=address)
    one, other = site.node(primary), site.node(secondary)
    for node in (primary, secondary):
        site.hello(node)
    known = next((found for found in site.catalog.volumes() if found.name.lower() == name.lower()), None)
    if known is None:
        site.catalog.add_volume(entry)
    elif dataclasses.replace(known, id=entry.id, policy=entry.policy, priorities=entry.priorities, address=address) != entry:
        raise VolumeExists(f"there is another volume {known.name} already")
    else:
        entry = dataclasses.replace(entry, id=known.id)
        if _held(one, entry.id) and _held(other, entry.id):
            raise VolumeExists(f"there is a volume {name} already")
    facts = _held(one, entry.id)
    if facts is None or _is_unfinished(facts):
        create = m.CreateVolume(entry.id, name, filesystem, size_bytes, sector_bytes, mkfs_options)
        try:
            facts = one.ask(create)
        except NodeUnreachable:
            raise  # it may have been made: the entry stays, so that the same command finds it
        except LandfallError:
            if known is None:
                site.catalog.forget_volume(entry.id)
            raise
    if address:
        one.ask(m.TakeAddress(entry.id, address))
    other.ask(m.AdmitReplica(entry.id, name, filesystem, size_bytes, sector_bytes))
    return facts


def adopt_volume(
    site: Site,
    name: str,
    source: str,
    *,
    primary: str,
    secondary: str,
    policy: Policy | None = None,
    priorities: tuple[tuple[str, int], ...] = (),
    address: str = "",
    agree: Callable[[m.Appraised], bool] = lambda found: True,
) -> m.VolumeFacts | None:
    """Return the volume that an existing filesystem of the primary has become in place, as the primary serves it; None if ``agree``,
    told what it is, said no.

    It is looked at before anything is recorded. If we die after that, the same command finishes what is missing.
    """
    volume_name(name)
    one, other = site.node(primary), site.node(secondary)
    for node in (primary, secondary):
        site.hello(node)
    entry = next((found for found in site.catalog.volumes() if found.name.lower() == name.lower()), None)
    if entry is not None and (entry.name, entry.primary, entry.secondary, entry.epoch) != (name, primary, secondary, 1):
        raise VolumeExists(f"there is another volume {entry.name} already")
    begun = _held(one, entry.id) if entry is not None else None
    if begun is None:
        if entry is not None:  # nothing came of it
            site.catalog.forget_volume(entry.id)
            entry = None
        found = one.ask(m.AppraiseVolume(source))
        if not agree(found):
            return None
        kind, size_bytes, sector_bytes = found.filesystem, found.size_bytes, found.sector_bytes
    else:
        kind, size_bytes, sector_bytes = begun.filesystem, begun.size_bytes, begun.sector_bytes
    if entry is None:
        entry = VolumeEntry(uuid4(), name, primary, secondary, kind, size_bytes, policy or Policy(), priorities, address=address)
        site.catalog.add_volume(entry)
    try:
        facts = one.ask(m.AdoptVolume(entry.id, name, kind, size_bytes, sector_bytes, source))
    except NodeUnreachable:
        raise  # it may have been adopted: the entry stays, so that the same command finds it
    except LandfallError:
        if _held(one, entry.id) is None:
            site.catalog.forget_volume(entry.id)
        raise
    if entry.address:
        one.ask(m.TakeAddress(entry.id, entry.address))
    other.ask(m.AdmitReplica(entry.id, name, kind, size_bytes, sector_bytes))
    return facts


def grow_volume(site: Site, name: str, size_bytes: int) -> m.VolumeFacts:
    """Return the volume as its primary has it, larger on both nodes; its filesystem too.

    Both are asked first, so that what speaks against it on one of them leaves the other as it is. Then the secondary grows first: a
    larger copy of a smaller volume can wait, the other way round nothing could be received. If we die here, the same command does the
    rest. TransferBusy while a transfer is open, LayoutUnsupported for less than it has, DeviceBusy while it is served on lvm-snapshot.
    """
    entry = site.catalog.volume(name)
    if size_bytes < entry.size_bytes:
        raise LayoutUnsupported(
            f"volume {name} has {entry.size_bytes} bytes and does not shrink", fix="Make a smaller volume and copy the files."
        )
    nodes = (site.node(entry.secondary), site.node(entry.primary))
    for node in nodes:
        facts_of(node, entry.id)
        for transfer in node.ask(m.ListTransfers()).transfers:
            if transfer.volume == entry.id and transfer.state not in {m.TransferState.COMMITTED, m.TransferState.SALVAGED}:
                raise TransferBusy(f"transfer {transfer.id} has the old size", fix=f"`landfall replicate {name}`, then grow it.")
    for node in nodes:
        node.ask(m.GrowVolume(entry.id, size_bytes, dry_run=True))
    _, facts = [node.ask(m.GrowVolume(entry.id, size_bytes)) for node in nodes]
    site.catalog.grow_volume(entry.id, size_bytes)
    return facts


def list_volumes(site: Site) -> list[VolumeEntry]:
    """Return the volumes that the catalog knows."""
    return site.catalog.volumes()


def set_volume(site: Site, name: str, **changes: Any) -> VolumeEntry:
    """Return the volume with ``changes``, fields of its entry, laid down for it; what is not among them stays."""
    site.catalog.set_volume(dataclasses.replace(site.catalog.volume(name), **changes))
    return site.catalog.volume(name)


def move_address(site: Site, name: str, address: str) -> VolumeEntry:
    """Return the volume with another address (empty: none), which its primary takes before it gives the old one up.

    If we die here the new one is recorded: `landfall serve` and every failover take it.
    """
    entry = site.catalog.volume(name)
    site.catalog.set_volume(dataclasses.replace(entry, address=address))
    primary = site.node(entry.primary)
    if address:
        primary.ask(m.TakeAddress(entry.id, address))
    if entry.address and entry.address != address:
        primary.ask(m.DropAddress(entry.id, entry.address))
    return site.catalog.volume(name)


def serve(site: Site, name: str, *, node: str | None = None, without_peer: bool = False) -> m.VolumeFacts:
    """Return the volume as its primary serves it from now on, at its address; ``node``, if it is named, has to be that primary.

    Nobody is promoted by this. NotPrimary for another node, and for one that was overtaken while it was away, which does not know it;
    FailoverBusy until a failover is done: its fence holds only as long as nobody lets the node serve. NodeUnreachable if the peer does not
    answer, which may have been promoted meanwhile; ``without_peer`` if an operator knows that it was not.
    """
    with site.alone(site.catalog.volume(name).id):
        return _served(site, name, node, without_peer)


def _served(site: Site, name: str, node: str | None, without_peer: bool) -> m.VolumeFacts:
    entry = follow_roles(site, site.catalog.volume(name))
    if site.catalog.failover_open(entry.id):
        raise FailoverBusy(f"a failover of volume {name} is not done", fix=f"`landfall failover {name}` goes on with it.")
    server = node or entry.primary
    facts = facts_of(site.node(server), entry.id)
    if server != entry.primary or facts.epoch < entry.epoch:
        raise NotPrimary(
            f"{entry.primary} is the primary of volume {name} at epoch {entry.epoch}, {server} stands at epoch {facts.epoch}",
            fix=f"`landfall failover {name}` lets the secondary take over, `landfall failback {name}` a node that has returned.",
        )
    if not without_peer and not site.alive(entry.secondary):
        raise NodeUnreachable(
            f"{entry.secondary} does not answer, so nobody can say that it was not promoted while {server} was away",
            fix=f"If you know that it was not: `landfall serve {name} --without-peer`.",
        )
    if not entry.address:
        return let_serve(site, entry, server, facts.epoch)
    take = m.TakeAddress(entry.id, entry.address)
    try:
        site.node(server).ask(take)
    except LeaseEnded:  # what it gave up it takes only when it was told anew that it may
        let_serve(site, entry, server, facts.epoch)
        site.node(server).ask(take)
    return let_serve(site, entry, server, facts.epoch)


def unserve(site: Site, name: str, *, node: str | None = None) -> m.VolumeFacts:
    """Return the volume after ``node`` (without one: its primary) stopped to serve it: exports, then the address."""
    entry = site.catalog.volume(name)
    server = site.node(node or entry.primary)
    facts = server.ask(m.StopServing(entry.id))
    if entry.address:
        server.ask(m.DropAddress(entry.id, entry.address))
    return facts


def follow_roles(site: Site, entry: VolumeEntry) -> VolumeEntry:
    """Return the volume's entry after the catalog was made to say what those nodes say that answer."""
    held: dict[str, m.VolumeFacts | None] = {}
    for node in (entry.primary, entry.secondary):
        try:
            held[node] = _held(site.node(node), entry.id)
        except NodeUnreachable:
            held[node] = None
    actual = roles_of(entry, held)
    if actual != entry:
        site.catalog.set_volume(actual)
    return actual


def facts_of(node: Node, volume: UUID) -> m.VolumeFacts:
    """Return a volume as a node holds it; NoSuchVolume."""
    facts = _held(node, volume)
    if facts is None:
        raise NoSuchVolume(f"{node.name} holds no volume {volume}")
    return facts


def _is_unfinished(facts: m.VolumeFacts) -> bool:
    """Whether the making of a volume broke off, perhaps, before it was served for the first time."""
    return not facts.serving and all(held.kind is GenerationKind.EMPTY for held in facts.generations)


def _held(node: Node, volume: UUID) -> m.VolumeFacts | None:
    return next((facts for facts in node.ask(m.ListVolumes()).volumes if facts.id == volume), None)
