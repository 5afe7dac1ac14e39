"""Verbs on transfers: build the DMI and send it (NAS 1), receive (NAS 2).

A receiver runs on in the background: its verb answers as soon as the data port is open, and a reception that fails is told through
the outbox. A volume has one transfer under way at a time; a partial one never blocks the next for ever, ``transfer.discard`` ends it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from uuid import UUID

import numpy as np

from agent.contract import messages as m
from agent.contract.arrival import Arrived, encode_head
from agent.contract.closure import whole_files
from agent.contract.dmi import HOLE, Change, Dmi
from agent.contract.errors import (
    BaseMismatch,
    DeviceBusy,
    DmiMalformed,
    LandfallError,
    NoSpace,
    NoSuchTransfer,
    NoSuchVolume,
    RecordMalformed,
    TransferBusy,
    VersionUnknown,
)
from agent.contract.identity import BLOCK_BYTES, GenerationId, GenerationKind
from agent.differential.build import BuildRequest, build
from agent.differential.build import drop as forget
from agent.differential.reader import View
from agent.service.node import Node, ProgressCall, open_mount
from agent.system.clock import wall_ns
from agent.system.failpoint import failpoint
from agent.transfer.receiver import ReceiveJob, Receiver, Volumes
from agent.transfer.sender import SendJob, send
from agent.transfer.store import TransferRecord
from agent.volume import filesystem
from agent.volume.substrate import VolumeRecord, Workspace, WorkspaceKind


def build_transfer(node: Node, arguments: m.BuildTransfer, progress: ProgressCall) -> m.Built:
    """Make the DMI of a new transfer. If we die here there is no transfer, or one without DMI, which ``recover`` discards."""
    record = node.record(arguments.target.volume)
    node.generation(arguments.base)
    node.generation(arguments.target)
    with node.job(record.id, "transfer.build"):
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
    return m.Built(dmi.piece_total, dmi.file_total, _changed_bytes(dmi), size, digest.hex())


def send_transfer(node: Node, arguments: m.SendTransfer, progress: ProgressCall) -> m.Sent:
    """Send until NAS 2 has committed. LinkLost: what is durable there stays, and sending again sends only the rest."""
    transfer = _known(node, arguments.transfer, sending=True)
    with node.job(transfer.target.volume, "transfer.send"):
        node.store.set_state(transfer.id, m.TransferState.RUNNING)
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
                    )
                )
        except BaseException:
            node.store.set_state(transfer.id, m.TransferState.INTERRUPTED)
            raise
        failpoint("src.before_release")
        node.store.set_state(transfer.id, m.TransferState.COMMITTED)
        failpoint("src.after_release")
    return sent


def receive(node: Node, arguments: m.ReceiveTransfer, progress: ProgressCall) -> m.Listening:
    """Open the data port. BaseMismatch unless the base is this node's newest generation and nobody serves the volume here.

    A reception of the same transfer that still runs, or waits for its peer, gives way: its token is worth nothing from now on.
    """
    volume = node.record(arguments.target.volume)
    if running := node.receptions.get(arguments.transfer):
        running.give_way()
    node.claim(volume.id, f"transfer.receive {arguments.transfer}")
    try:
        failpoint("dst.before_listen")
        transfer = _expected(node, volume, arguments)
        receiver = Receiver(_receive_job(node, transfer, arguments))
        node.store.set_state(transfer.id, m.TransferState.COMMITTED if _held(node, transfer.target) else m.TransferState.WAITING)
    except BaseException:
        node.release(volume.id)
        raise
    node.receptions[transfer.id] = _Reception(node, transfer, receiver)
    failpoint("dst.after_listen")
    return m.Listening(receiver.address, receiver.port)


def list_transfers(node: Node, arguments: m.ListTransfers, progress: ProgressCall) -> m.Transfers:
    """Return every transfer this node remembers; one whose record cannot be read is left out, and left as it is."""
    found = []
    for transfer in node.store.list():
        try:
            found.append(_facts(node, _as_it_stands(node, node.store.load(transfer))))
        except LandfallError:
            continue
    return m.Transfers(tuple(found))


def fetch_dmi(node: Node, arguments: m.FetchDmi, progress: ProgressCall) -> bytes:
    """Return the DMI's bytes as this node stored them."""
    return bytes(node.store.dmi_bytes(arguments.transfer))


def fetch_arrival(node: Node, arguments: m.FetchArrival, progress: ProgressCall) -> bytes:
    """Return the arrival record's bytes; nothing has arrived where there is none yet."""
    path = node.store.arrival_path(arguments.transfer)
    if not node.store.has_dmi(arguments.transfer):
        raise NoSuchTransfer(f"transfer {arguments.transfer} has no DMI here: nothing of it can be salvaged")
    if path.exists():
        return path.read_bytes()
    return encode_head(arguments.transfer, node.store.dmi_digest(arguments.transfer), node.store.dmi(arguments.transfer).piece_total)


def discard(node: Node, arguments: m.DiscardTransfer, progress: ProgressCall) -> m.Done:
    """Forget a transfer; on NAS 1 its target generation too, unless it was committed. The running one is refused.

    A salvaged one is kept for as long as its salvage can be undone: until this node serves what was salvaged as the primary.
    """
    volume = node.store.load(arguments.transfer).target.volume
    with node.job(volume, "transfer.discard"):
        transfer = node.store.load(arguments.transfer)  # it may have been committed before the volume was ours
        failpoint("dst.before_discard")
        _discard(node, transfer)
        failpoint("dst.after_discard")
    return m.Done()


def recover(node: Node) -> None:
    """Bring every record in line with what is true after a crash; idempotent. What cannot be read is left as it is (B12)."""
    for number in node.store.list():
        try:
            transfer = node.store.load(number)
        except LandfallError:
            continue
        if transfer.state is m.TransferState.BUILDING:
            node.store.discard(number)
        elif not transfer.sending and _held(node, transfer.target):
            node.store.set_state(number, m.TransferState.COMMITTED)
        elif transfer.state in (m.TransferState.RUNNING, m.TransferState.WAITING):
            _interrupted(node, transfer, None if transfer.sending else "the agent of the receiving node was restarted")


# --- building ---


def _build(node: Node, record: VolumeRecord, arguments: m.BuildTransfer) -> Dmi:
    base, target = node.generation(arguments.base), node.generation(arguments.target)
    with _view(node, record, arguments.target) as target_view, _base_view(node, record, base) as base_view:
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
                differential_volume=node.substrate.differential_identity,
                base=base_view,
                target=target_view,
                changed=node.substrate.changed(base.id, target.id),
                state=node.differential_state(record.id),
            )
        )


@contextmanager
def _view(node: Node, record: VolumeRecord, generation: GenerationId) -> Iterator[View]:
    """Yield a generation's device and read-only mount."""
    mount_point = node.private_folder("build", f"{record.id}-{generation.name}")
    with node.substrate.reading(generation) as device:
        filesystem.mount(device, mount_point, record.filesystem, read_only=True)
        try:
            with open_mount(mount_point) as mount_fd:
                yield View(device, mount_point, mount_fd)
        finally:
            filesystem.unmount(mount_point)


@contextmanager
def _base_view(node: Node, record: VolumeRecord, base: m.GenerationFacts) -> Iterator[View | None]:
    """Yield the view of the base, None for g0, which has no filesystem."""
    if base.kind is GenerationKind.EMPTY:
        yield None
    else:
        with _view(node, record, base.id) as view:
            yield view


def _changed_bytes(dmi: Dmi) -> int:
    return int(dmi.block_count.sum(dtype=np.uint64)) * BLOCK_BYTES


# --- receiving ---


def _expected(node: Node, volume: VolumeRecord, arguments: m.ReceiveTransfer) -> TransferRecord:
    """Return the record of the transfer that is to come, a new one if it is not known. Everything that speaks against it is said here."""
    records = _records(node, volume.id)
    for known in records:
        if known.id != arguments.transfer:
            if known.state is not m.TransferState.COMMITTED:
                raise TransferBusy(f"transfer {known.id} of this volume is unfinished", fix="Resume, salvage or discard it first.")
        elif (known.base, known.target, known.sending) != (arguments.base, arguments.target, False):
            raise BaseMismatch(f"transfer {known.id} is known here with another base or target")
        elif known.state is m.TransferState.SALVAGED:
            raise TransferBusy("the transfer was salvaged", fix="`landfall salvage --undo` makes it resumable.")
        elif known.state is m.TransferState.COMMITTED and _held(node, known.target):
            return known
    _refuse_unfit_base(node, volume, arguments.base)
    for known in records:
        if known.id == arguments.transfer and known.state is not m.TransferState.COMMITTED:
            return known
    for known in _records(node, volume.id):
        node.store.discard(known.id)
    transfer = TransferRecord(
        arguments.transfer,
        arguments.base,
        arguments.target,
        arguments.differential,
        sending=False,
        state=m.TransferState.WAITING,
        since_ns=wall_ns(),
    )
    node.store.create(transfer)
    return transfer


def _refuse_unfit_base(node: Node, volume: VolumeRecord, base: GenerationId) -> None:
    """BaseMismatch unless ``base`` is the newest generation, as it was committed, of a volume that nobody may have written to here."""
    if node.serving(volume) or volume.role is not m.Role.SECONDARY:
        raise BaseMismatch(
            f"node {node.config.node} has taken volume {volume.name} over, so its content is not the base any more",
            fix="It is the volume now; it is not replicated back by this release.",
        )
    newest = node.substrate.generations(volume.id)[-1]
    if newest.id != base:
        raise BaseMismatch(
            f"the base {base.name} is not the newest generation here", cause=f"that is {newest.id.name} of epoch {newest.id.epoch}"
        )
    node.substrate.refuse_written(base)


def ready_landing(node: Node, transfer: TransferRecord, dmi: Dmi) -> None:
    """Make the landing volume, unless it is there with what arrived. RecordMalformed if that is recorded and the volume is gone."""
    landing = Workspace(transfer.base.volume, transfer.id, WorkspaceKind.LANDING)
    arrived = node.store.arrival(transfer.id, node.store.dmi_digest(transfer.id), dmi.piece_total).batches > 0
    if not arrived:
        node.substrate.begin(landing, transfer.base)  # of one that is there nothing is recorded, so it is nobody's
    elif not node.substrate.exists(landing):
        raise RecordMalformed("pieces are recorded as arrived and their landing volume is gone", fix="Discard the transfer.")


def _receive_job(node: Node, transfer: TransferRecord, arguments: m.ReceiveTransfer) -> ReceiveJob:
    landing, healed = (Workspace(transfer.base.volume, transfer.id, kind) for kind in (WorkspaceKind.LANDING, WorkspaceKind.HEALED))

    @contextmanager
    def prepare(dmi: Dmi) -> Iterator[Volumes]:
        ready_landing(node, transfer, dmi)
        _need_room(node, transfer, dmi)
        node.store.set_state(transfer.id, m.TransferState.RUNNING)
        with node.substrate.writing(landing) as landing_path, node.substrate.reading(transfer.base) as base_path:
            yield Volumes(landing_path, base_path)

    def heal() -> AbstractContextManager[Path]:
        if not node.substrate.exists(healed):
            node.substrate.begin(healed, transfer.base)
        return node.substrate.writing(healed)

    def commit() -> None:
        place_healed(node, transfer)
        facts = m.GenerationFacts(transfer.target, GenerationKind.COMMITTED, node.store.dmi(transfer.id).head.target_taken_ns)
        node.substrate.commit(landing, facts)
        node.store.set_state(transfer.id, m.TransferState.COMMITTED)
        _sweep_strays(node, transfer.target.volume)

    return ReceiveJob(
        transfer=transfer.id,
        base=transfer.base,
        target=transfer.target,
        differential=arguments.differential,
        streams=arguments.streams,
        token=arguments.token,
        tls=arguments.tls,
        store=node.store,
        prepare=prepare,
        heal=heal,
        commit=commit,
        address=node.config.replication_address,
        committed=_held(node, transfer.target),
        silence_limit_s=arguments.silence_limit_s,
    )


def _need_room(node: Node, transfer: TransferRecord, dmi: Dmi) -> None:
    """Raise NoSpace before the first piece is taken, if what is still to come has no room."""
    missing = (node.store.arrival(transfer.id, node.store.dmi_digest(transfer.id), dmi.piece_total).bits & Arrived.UPDATE) == 0
    coming = int(dmi.block_count[missing & (dmi.target_hole == 0)].sum(dtype=np.uint64)) * BLOCK_BYTES
    free = node.substrate.free_bytes()
    if free < coming:
        raise NoSpace(
            f"the pool has no room for transfer {transfer.id}", cause=f"{coming >> 20} MiB are to come, {free >> 20} MiB are free"
        )


def place_healed(node: Node, transfer: TransferRecord) -> None:
    """Let a base whose damaged blocks were fetched take the base's place; what it has is the source's, proved by digest."""
    healed = Workspace(transfer.base.volume, transfer.id, WorkspaceKind.HEALED)
    if node.substrate.exists(healed):
        node.substrate.replace(healed, transfer.base)


def _sweep_strays(node: Node, volume: UUID) -> None:
    """Remove workspaces whose transfer nobody remembers, as after the loss of the state folder; those in use stay."""
    for workspace in node.substrate.workspaces(volume):
        if not node.store.folder(workspace.transfer).exists():
            with suppress(LandfallError):
                node.substrate.discard(workspace)


class _Reception:
    """A receiver in a thread of its own. A failure becomes a reception failure notification, once the record says `interrupted`."""

    def __init__(self, node: Node, transfer: TransferRecord, receiver: Receiver) -> None:
        self._node, self._transfer, self._receiver = node, transfer, receiver
        self._gives_way = False
        self._thread = threading.Thread(target=self._run, name=f"receive {transfer.id}", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """End it soon; what it had made durable stays."""
        self._receiver.cancel()

    def give_way(self) -> None:
        """End it, without a word to anybody, and wait until the volume is free."""
        self._gives_way = True
        self.cancel()
        self._thread.join()

    def _run(self) -> None:
        node, transfer = self._node, self._transfer
        try:
            self._receiver.run()
        except Exception as error:
            if not _held(node, transfer.target):
                _interrupted(node, transfer, None if self._gives_way else str(error))
        finally:
            if node.receptions.get(transfer.id) is self:
                del node.receptions[transfer.id]
            node.release(transfer.target.volume)


def _interrupted(node: Node, transfer: TransferRecord, message: str | None) -> None:
    """Record that the transfer is interrupted; with a message, tell the management node, who hears it when the record says so.

    If we die between notification and record, ``recover`` finds the transfer running and tells it again: twice is better than never.
    """
    with node.outbox.held():
        if message is not None:
            failpoint("dst.before_notification")
            node.outbox.put("reception-failure", transfer.target.volume, transfer.id, message)
            failpoint("dst.after_notification")
        node.store.set_state(transfer.id, m.TransferState.INTERRUPTED)


# --- looking ---


def _as_it_stands(node: Node, transfer: TransferRecord) -> TransferRecord:
    """Return a transfer's record. What ended and could not be recorded, as on a full disk, is recorded and told now."""
    running = (m.TransferState.RUNNING,) if transfer.sending else (m.TransferState.RUNNING, m.TransferState.WAITING)
    if transfer.state in running:
        with suppress(TransferBusy, OSError), node.job(transfer.target.volume, "transfer.list"):  # who runs it holds the volume
            transfer = node.store.load(transfer.id)
            if transfer.state not in running:
                return transfer
            if not transfer.sending and _held(node, transfer.target):
                return node.store.set_state(transfer.id, m.TransferState.COMMITTED)
            _interrupted(node, transfer, None if transfer.sending else "the reception ended, and that could not be recorded")
            return node.store.load(transfer.id)
    return transfer


def _known(node: Node, number: UUID, *, sending: bool) -> TransferRecord:
    transfer = node.store.load(number)
    if transfer.sending is not sending:
        raise NoSuchTransfer(f"transfer {number} goes the other way on node {node.config.node}")
    return transfer


def _records(node: Node, volume: UUID) -> list[TransferRecord]:
    records = [node.store.load(number) for number in node.store.list()]
    return [record for record in records if record.target.volume == volume]


def _held(node: Node, generation: GenerationId) -> bool:
    try:
        return any(facts.id == generation for facts in node.substrate.generations(generation.volume))
    except NoSuchVolume:  # the pool was exchanged: what is known of its transfers must not keep the agent from starting
        return False


def _discard(node: Node, transfer: TransferRecord) -> None:
    """The record goes last, so a crash here leaves a transfer that can be discarded again."""
    if transfer.state is m.TransferState.SALVAGED and node.record(transfer.target.volume).role is m.Role.SECONDARY:
        raise DeviceBusy("a salvage of this transfer is committed", fix="Undo the salvage first, or keep both.")
    if transfer.sending:
        if transfer.state is not m.TransferState.COMMITTED and _held(node, transfer.target):
            node.substrate.drop(transfer.target)
            forget(node.differential_state(transfer.target.volume), transfer.target)
    else:
        # Its pieces are recorded as arrived, so the record must not outlive the landing volume as one that can be resumed.
        node.store.arrival_path(transfer.id).unlink(missing_ok=True)
        for kind in WorkspaceKind:
            node.substrate.discard(Workspace(transfer.base.volume, transfer.id, kind))
    node.store.discard(transfer.id)


def _facts(node: Node, transfer: TransferRecord) -> m.TransferFacts:
    """Return what is known of a transfer; one whose DMI or arrival record is damaged counts nothing, and can be discarded."""
    pieces = arrived = bytes_total = bytes_arrived = files = whole = 0
    with suppress(DmiMalformed, RecordMalformed, VersionUnknown):
        pieces, arrived, bytes_total, bytes_arrived, files, whole = _counts(node, transfer)
    return m.TransferFacts(
        transfer.id,
        transfer.target.volume,
        transfer.base,
        transfer.target,
        transfer.differential,
        transfer.sending,
        transfer.state,
        pieces,
        arrived,
        bytes_total,
        bytes_arrived,
        files,
        whole,
        transfer.since_ns,
    )


def _counts(node: Node, transfer: TransferRecord) -> tuple[int, int, int, int, int, int]:
    """Return pieces, of these arrived, their bytes, of these arrived, files, of these whole."""
    pieces = arrived = bytes_total = bytes_arrived = files = whole = 0
    if node.store.has_dmi(transfer.id):
        dmi = node.store.dmi(transfer.id)
        blocks = dmi.block_count.astype(np.uint64) * BLOCK_BYTES
        if transfer.differential is m.Differential.SEND:
            blocks = blocks * (np.uint64(1) + (dmi.diff_block != HOLE).astype(np.uint64))
        reported = (dmi.change & (Change.DELETED | Change.NAMELESS)) == 0
        pieces, files, bytes_total = dmi.piece_total, int(reported.sum()), int(blocks.sum())
        if transfer.state is m.TransferState.COMMITTED:
            arrived, bytes_arrived, whole = pieces, bytes_total, files
        elif not transfer.sending:
            complete = node.store.arrival(transfer.id, node.store.dmi_digest(transfer.id), pieces).complete
            arrived, bytes_arrived = int(complete.sum()), int(blocks[complete].sum())
            whole = int((whole_files(dmi, complete) & reported).sum())
    return pieces, arrived, bytes_total, bytes_arrived, files, whole
