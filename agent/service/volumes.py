"""Verbs on volumes. Order on a primary: device, filesystem, mount, export; the other way round to stop."""

from __future__ import annotations

from agent.contract import messages as m
from agent.contract.errors import DeviceBusy, LandfallError, NoSuchGeneration, VolumeExists
from agent.contract.identity import GenerationKind, volume_name
from agent.service.node import Node, ProgressCall
from agent.serving.samba import Share
from agent.system.failpoint import failpoint
from agent.volume import filesystem
from agent.volume.substrate import VolumeRecord
from agent.volume.superblock import kind_of


def create(node: Node, arguments: m.CreateVolume, progress: ProgressCall) -> m.VolumeFacts:
    """Make an operational volume with an empty filesystem and serve it.

    If we die before it is served, the volume is there, not serving; asked again, what is missing is done, and a filesystem that is there
    stays as it is.
    """
    record = VolumeRecord(
        arguments.volume,
        volume_name(arguments.name),
        arguments.filesystem,
        arguments.size_bytes,
        arguments.sector_bytes,
        m.Role.PRIMARY,
        epoch=1,
    )
    with node.job(record.id, "volume.create"):
        is_new = not _is_unfinished(node, record)
        if is_new:
            _refuse_known(node, record)
            node.substrate.create(record)
        try:
            with node.substrate.operational(record.id) as device:
                if kind_of(device) is None:
                    filesystem.make(device, record.filesystem, arguments.mkfs_options)
                filesystem.refuse_unsupported(device, record.filesystem)
            _start_serving(node, record)
        except BaseException:
            if is_new:
                _stop_serving(node, record)
                node.substrate.remove(record.id)
            raise
    return facts_of(node, record)


def admit(node: Node, arguments: m.AdmitReplica, progress: ProgressCall) -> m.VolumeFacts:
    """Get ready to hold the second operational volume. Asked again for the same volume, it changes nothing."""
    record = VolumeRecord(
        arguments.volume,
        volume_name(arguments.name),
        arguments.filesystem,
        arguments.size_bytes,
        arguments.sector_bytes,
        m.Role.SECONDARY,
        epoch=1,
    )
    if record in node.substrate.volumes():
        return facts_of(node, record)
    _refuse_known(node, record)
    with node.job(record.id, "volume.admit"):
        node.substrate.create(record)
    return facts_of(node, record)


def list_volumes(node: Node, arguments: m.ListVolumes, progress: ProgressCall) -> m.Volumes:
    """Return every volume of this node with its generations, and what cannot be read: it hides nothing else."""
    found, unreadable = [], list(node.substrate.unreadable())
    for record in node.substrate.volumes():
        try:
            found.append(facts_of(node, record))
        except (LandfallError, OSError) as error:
            unreadable.append(m.Unreadable(record.id, f"volume {record.name}", str(error)))
    return m.Volumes(tuple(found), tuple(unreadable))


def serve(node: Node, arguments: m.ServeVolume, progress: ProgressCall) -> m.VolumeFacts:
    """Serve a volume; asked twice, once. A secondary's operational image is first cloned from its newest generation: it becomes primary.

    If we die before the role is recorded, asking again clones again.
    """
    record = node.record(arguments.volume)
    if not node.serving(record):
        with node.job(record.id, "volume.serve"):
            if record.role is m.Role.SECONDARY:
                newest = node.substrate.generations(record.id)[-1]
                if newest.kind is GenerationKind.EMPTY:
                    raise NoSuchGeneration(
                        f"node {node.config.node} holds no generation of volume {record.name}: it was never replicated",
                        fix="`landfall replicate` brings one.",
                    )
                node.substrate.clone_operational(record.id, newest.id)
                node.substrate.set_role(record.id, m.Role.PRIMARY, record.epoch + 1)
                failpoint("serve.after_role")
            _start_serving(node, node.record(record.id))
            failpoint("serve.after_mount")
    _export(node, record)
    return facts_of(node, node.record(record.id))


def unserve(node: Node, arguments: m.StopServing, progress: ProgressCall) -> m.VolumeFacts:
    """End exports, then unmount; DeviceBusy if a local process holds a file open."""
    record = node.record(arguments.volume)
    with node.job(record.id, "volume.unserve"):
        _stop_serving(node, record)
        if node.serving(record):
            raise DeviceBusy(f"volume {record.name} is still mounted")
    return facts_of(node, record)


def facts_of(node: Node, record: VolumeRecord) -> m.VolumeFacts:
    """Return what this node knows of a volume."""
    generations = node.substrate.generations(record.id)
    serving = node.serving(record)
    mount_point = node.mount_point(record)
    salvaged = bool(generations) and generations[-1].kind is GenerationKind.SALVAGED
    return m.VolumeFacts(
        record.id,
        record.name,
        record.filesystem,
        record.size_bytes,
        record.role,
        m.ReplicaState.OUTDATED if salvaged and not serving else m.ReplicaState.UP_TO_DATE,
        record.epoch,
        serving,
        str(filesystem.device_of(mount_point)) if serving else "",
        str(mount_point) if serving else "",
        generations,
    )


def _is_unfinished(node: Node, record: VolumeRecord) -> bool:
    """Whether exactly this volume is here and was perhaps never served: its making may have broken off."""
    return record in node.substrate.volumes() and not node.serving(record) and len(node.substrate.generations(record.id)) == 1


def _refuse_known(node: Node, record: VolumeRecord) -> None:
    for known in node.substrate.volumes():
        if known.id == record.id or known.name.lower() == record.name.lower():
            raise VolumeExists(f"node {node.config.node} holds a volume {known.name} ({known.id}) already")


def _start_serving(node: Node, record: VolumeRecord) -> None:
    mount_point = node.mount_point(record)
    mount_point.mkdir(mode=0o755, parents=True, exist_ok=True)
    with node.substrate.operational(record.id) as device:
        filesystem.mount(device, mount_point, record.filesystem, read_only=False)
    _export(node, record)


def _stop_serving(node: Node, record: VolumeRecord) -> None:
    node.samba.withdraw(record.name)
    if node.serving(record):
        filesystem.unmount(node.mount_point(record))


def _export(node: Node, record: VolumeRecord) -> None:
    node.samba.export(Share(record.name, node.mount_point(record)))
