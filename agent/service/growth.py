"""More room for a volume: its copies here by zeros at their end, then a primary's filesystem, while clients use it."""

from __future__ import annotations

from agent.contract import messages as m
from agent.contract.errors import LayoutUnsupported
from agent.contract.identity import BLOCK_BYTES, FilesystemKind
from agent.differential import digests
from agent.service.node import Node, ProgressCall
from agent.service.removal import refuse_open
from agent.service.serving import facts_of
from agent.volume import filesystem
from agent.volume.substrate import VolumeRecord


def grow(node: Node, arguments: m.GrowVolume, progress: ProgressCall) -> m.VolumeFacts:
    """Return the volume, larger. LayoutUnsupported for less than it has, TransferBusy while a transfer is open: that has the old size;
    DeviceBusy while it is used, on a substrate that cannot do it then.

    The digest tables follow, so that the next differential does not read the base anew. If we die here, asking again does the rest.
    """
    record = node.record(arguments.volume)
    with node.job(record.id, "volume.grow"):
        refuse_open(node, record)
        if arguments.size_bytes < record.size_bytes:
            raise LayoutUnsupported(
                f"volume {record.name} has {record.size_bytes} bytes and does not shrink", fix="Make a smaller volume and copy the files."
            )
        if arguments.dry_run:
            node.substrate.refuse_growth(record.id, arguments.size_bytes)
            return facts_of(node, record)
        node.substrate.grow(record.id, arguments.size_bytes)
        more = (arguments.size_bytes - record.size_bytes) // BLOCK_BYTES
        for table in node.differential_state(record.id).glob("*.digests") if more else ():
            digests.lengthened(table, record.size_bytes // BLOCK_BYTES, more)
        record = node.record(record.id)
        if record.role is m.Role.PRIMARY:
            _grow_filesystem(node, record)
    return facts_of(node, record)


def _grow_filesystem(node: Node, record: VolumeRecord) -> None:
    if node.serving(record):
        device = filesystem.device_of(node.mount_point(record))
        if device is not None:
            filesystem.grow(device, node.mount_point(record), record.filesystem)
        return
    mount_point = node.private_folder("grow", str(record.id))
    with node.substrate.operational(record.id) as device:
        filesystem.mount(device, mount_point, record.filesystem, read_only=False)  # which replays its journal
        try:
            if record.filesystem is FilesystemKind.XFS:
                filesystem.grow(device, mount_point, record.filesystem)
        finally:
            filesystem.unmount(mount_point)
        if record.filesystem is FilesystemKind.EXT4:
            filesystem.grow_ext4(device)
