"""Verbs of the sending side (NAS 1): make the DMI of two frozen generations, send it and what the other side lacks of its pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agent.contract import messages as m
from agent.contract.dmi import Dmi
from agent.contract.identity import GenerationKind
from agent.differential.build import BuildRequest, build
from agent.differential.reader import View
from agent.service.generations import view
from agent.service.node import Node, ProgressCall
from agent.service.transfers import changed_bytes, known_transfer
from agent.system.clock import wall_ns
from agent.system.failpoint import failpoint
from agent.system.priority import io_priority
from agent.transfer.sender import SendJob, send
from agent.transfer.store import TransferRecord
from agent.volume import filesystem
from agent.volume.substrate import VolumeRecord


def build_transfer(node: Node, arguments: m.BuildTransfer, progress: ProgressCall) -> m.Built:
    """Make the DMI of a new transfer. If we die here there is no transfer, or one without DMI, which ``recover`` discards."""
    record = node.record(arguments.target.volume)
    node.generation(arguments.base)
    node.generation(arguments.target)
    with node.job(record.id, "transfer.build"), io_priority(node.config.io_priority):
        node.store.create(
            TransferRecord(
                arguments.transfer,
                arguments.base,
                arguments.target,
                m.Differential.VERIFY,
                sending=True,
                state=m.TransferState.BUILDING,
                since_ns=wall_ns(),
                priorities=arguments.priorities,
            )
        )
        failpoint("src.before_build")
        try:
            dmi = _build(node, record, arguments)
            failpoint("src.before_dmi_durable")
            node.store.store_dmi(arguments.transfer, dmi.encode())
            failpoint("src.after_dmi_durable")
        except BaseException:
            node.store.discard(arguments.transfer)
            raise
        node.store.set_state(arguments.transfer, m.TransferState.WAITING)
    failpoint("src.after_build")
    size = len(node.store.dmi_bytes(arguments.transfer))
    digest = node.store.dmi_digest(arguments.transfer)
    return m.Built(dmi.piece_total, dmi.file_total, changed_bytes(dmi), size, digest.hex())


def send_transfer(node: Node, arguments: m.SendTransfer, progress: ProgressCall) -> m.Sent:
    """Send until NAS 2 has committed. LinkLost: what is durable there stays, and sending again sends only the rest."""
    transfer = known_transfer(node, arguments.transfer, sending=True)
    with node.job(transfer.target.volume, "transfer.send"), io_priority(node.config.io_priority):
        node.store.set_state(transfer.id, m.TransferState.RUNNING)

        def still_sound() -> None:
            for generation in (transfer.base, transfer.target):
                node.substrate.refuse_written(generation)

        try:
            with node.substrate.reading(transfer.target) as target, node.substrate.reading(transfer.base) as base:
                sent = send(
                    SendJob(
                        transfer=transfer.id,
                        dmi=node.store.dmi(transfer.id),
                        dmi_bytes=node.store.dmi_bytes(transfer.id),
                        target=target,
                        base=base,
                        address=arguments.address,
                        port=arguments.port,
                        differential=arguments.differential,
                        streams=arguments.streams,
                        token=arguments.token,
                        tls=arguments.tls,
                        priorities=transfer.priorities,
                        silence_limit_s=arguments.silence_limit_s,
                        rate_limit_bytes_s=arguments.rate_limit_bytes_s,
                        progress=lambda said: progress(said.step, said.done, said.total),
                        still_sound=still_sound,
                    )
                )
        except BaseException:
            if transfer.mends:
                node.store.discard(transfer.id)  # begun anew
            else:
                node.store.set_state(transfer.id, m.TransferState.INTERRUPTED)
            raise
        failpoint("src.before_release")
        node.store.set_state(transfer.id, m.TransferState.COMMITTED)
        failpoint("src.after_release")
    return sent


def _build(node: Node, record: VolumeRecord, arguments: m.BuildTransfer) -> Dmi:
    base, target = node.generation(arguments.base), node.generation(arguments.target)
    with view(node, record, arguments.target, "build") as target_view, _base_view(node, record, base) as base_view:
        return build(
            BuildRequest(
                transfer=arguments.transfer,
                base_id=base.id,
                target_id=target.id,
                base_taken_ns=base.taken_ns,
                target_taken_ns=target.taken_ns,
                volume_name=record.name,
                volume_bytes=record.size_bytes,
                sector_bytes=record.sector_bytes,
                filesystem=record.filesystem,
                mkfs_arguments=filesystem.mkfs_arguments(target_view.device, record.filesystem),
                differential_volume=node.substrate.differential_identity(base.id),
                base=base_view,
                target=target_view,
                changed=node.substrate.changed(base.id, target.id),
                state=node.differential_state(record.id),
            )
        )


@contextmanager
def _base_view(node: Node, record: VolumeRecord, base: m.GenerationFacts) -> Iterator[View | None]:
    """Yield the view of the base, None for g0, which has no filesystem."""
    if base.kind is GenerationKind.EMPTY:
        yield None
    else:
        with view(node, record, base.id, "build") as found:
            yield found
