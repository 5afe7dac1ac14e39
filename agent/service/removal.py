"""The end of a volume on this node: its generations, its transfers' records, what was derived from them."""

from __future__ import annotations

import shutil
from contextlib import suppress
from uuid import UUID

from agent.contract import messages as m
from agent.contract.errors import DeviceBusy, LandfallError, TransferBusy
from agent.service.node import OPENED, Node, ProgressCall
from agent.system.failpoint import failpoint
from agent.volume import filesystem
from agent.volume.substrate import VolumeRecord

ENDED = frozenset({m.TransferState.COMMITTED, m.TransferState.SALVAGED})


def remove(node: Node, arguments: m.RemoveVolume, progress: ProgressCall) -> m.Done:
    """Destroy a volume. DeviceBusy while it is served or somebody looks into it, TransferBusy while a transfer is open.

    The volume itself goes first and in one step, so what is half gone is never taken for a volume. If we die after it, asking again
    sweeps the records; asked for a volume that is not here, only that is done.
    """
    with node.job(arguments.volume, "volume.remove"):
        known = next((record for record in node.substrate.volumes() if record.id == arguments.volume), None)
        if known is not None:
            _refuse_used(node, known)
            for mount_point in (node.config.run_dir / "private" / OPENED).glob(f"{known.id}-*"):
                if filesystem.is_mounted(mount_point):
                    filesystem.unmount(mount_point)
            node.substrate.remove(known.id)
            with suppress(OSError):  # somebody put something there, or it was never made
                node.mount_point(known).rmdir()
        failpoint("remove.before_records")
        for number in _transfers(node, arguments.volume):
            node.store.discard(number)
        shutil.rmtree(node.config.state_dir / "differential" / str(arguments.volume), ignore_errors=True)
        node.tenures.end(arguments.volume)
        failpoint("remove.after_records")
    return m.Done()


def _refuse_used(node: Node, record: VolumeRecord) -> None:
    if node.serving(record):
        raise DeviceBusy(
            f"node {node.config.node} serves volume {record.name}", fix=f"`landfall unserve {record.name} --node {node.config.node}` first."
        )
    refuse_open(node, record)


def refuse_open(node: Node, record: VolumeRecord) -> None:
    """TransferBusy while a transfer of the volume is open."""
    for number in _transfers(node, record.id):
        transfer = node.store.load(number)
        if transfer.state not in ENDED and not transfer.mends:
            raise TransferBusy(f"transfer {number} of volume {record.name} is open", fix=f"`landfall discard {record.name}` first.")


def _transfers(node: Node, volume: UUID) -> list[UUID]:
    """Return the transfers of a volume; those whose record cannot be read are nobody's."""
    found = []
    for number in node.store.list():
        with suppress(LandfallError):
            if node.store.load(number).target.volume == volume:
                found.append(number)
    return found
