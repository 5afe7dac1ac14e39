"""Verbs on volumes: made, admitted, listed."""

from __future__ import annotations

from agent.contract import messages as m
from agent.contract.errors import LandfallError, VolumeExists
from agent.contract.identity import volume_name
from agent.service.node import Node, ProgressCall
from agent.service.serving import facts_of, start_serving, stop_serving
from agent.volume import filesystem
from agent.volume.substrate import VolumeRecord
from agent.volume.superblock import kind_of


def create(node: Node, arguments: m.CreateVolume, progress: ProgressCall) -> m.VolumeFacts:
    """Make an operational volume with an empty filesystem and serve it.

    If we die before it is served, the volume is there, not serving; asked again, what is missing is done, and a filesystem that is there
    stays as it is.
    """
    record = new_record(arguments, m.Role.PRIMARY)
    with node.job(record.id, "volume.create"):
        is_new = not _is_unfinished(node, record)
        if is_new:
            refuse_known(node, record)
            node.substrate.create(record)
        try:
            with node.substrate.operational(record.id) as device:
                if kind_of(device) is None:
                    filesystem.make(device, record.filesystem, arguments.mkfs_options)
                filesystem.refuse_unsupported(device, record.filesystem)
            start_serving(node, record)
        except BaseException:
            if is_new:
                stop_serving(node, record)
                node.tenures.end(record.id)
                node.substrate.remove(record.id)
            raise
    return facts_of(node, record)


def admit(node: Node, arguments: m.AdmitReplica, progress: ProgressCall) -> m.VolumeFacts:
    """Get ready to hold the second operational volume. Asked again for the same volume, it changes nothing."""
    record = new_record(arguments, m.Role.SECONDARY)
    if record in node.substrate.volumes():
        return facts_of(node, record)
    refuse_known(node, record)
    with node.job(record.id, "volume.admit"):
        node.substrate.create(record)
    return facts_of(node, record)


def new_record(arguments: m.CreateVolume | m.AdoptVolume | m.AdmitReplica, role: m.Role) -> VolumeRecord:
    """Return the record that a new volume has; NameRefused."""
    name = volume_name(arguments.name)
    return VolumeRecord(arguments.volume, name, arguments.filesystem, arguments.size_bytes, arguments.sector_bytes, role, epoch=1)


def list_volumes(node: Node, arguments: m.ListVolumes, progress: ProgressCall) -> m.Volumes:
    """Return every volume of this node with its generations, and what cannot be read: it hides nothing else."""
    found, unreadable = [], list(node.substrate.unreadable())
    for record in node.substrate.volumes():
        try:
            found.append(facts_of(node, record))
        except (LandfallError, OSError) as error:
            unreadable.append(m.Unreadable(record.id, f"volume {record.name}", str(error)))
    troubles = node.watch.troubles() if node.watch else ()
    return m.Volumes(tuple(found), tuple(unreadable), troubles, node.term.highest)


def _is_unfinished(node: Node, record: VolumeRecord) -> bool:
    """Whether exactly this volume is here and was perhaps never served: its making may have broken off."""
    return record in node.substrate.volumes() and not node.serving(record) and len(node.substrate.generations(record.id)) == 1


def refuse_known(node: Node, record: VolumeRecord) -> None:
    """VolumeExists if the node holds a volume of that name or identity."""
    for known in node.substrate.volumes():
        if known.id == record.id or known.name.lower() == record.name.lower():
            raise VolumeExists(f"node {node.config.node} holds a volume {known.name} ({known.id}) already")
