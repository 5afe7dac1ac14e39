"""Verbs on transfers, whichever way they go: list, fetch, discard; and bringing their records in line with what is true.

A volume has one transfer under way at a time; a partial one never blocks the next for ever, ``transfer.discard`` ends it.
"""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

import numpy as np

from agent.contract import messages as m
from agent.contract.arrival import encode_head
from agent.contract.closure import whole_files
from agent.contract.dmi import HOLE, Change, Dmi
from agent.contract.errors import (
    DeviceBusy,
    DmiMalformed,
    LandfallError,
    NoSuchTransfer,
    NoSuchVolume,
    RecordMalformed,
    TransferBusy,
    VersionUnknown,
)
from agent.contract.identity import BLOCK_BYTES, GenerationId, GenerationKind
from agent.differential.build import drop as forget
from agent.service.node import Node, ProgressCall
from agent.system.failpoint import failpoint
from agent.transfer.store import TransferRecord
from agent.volume.substrate import Workspace, WorkspaceKind


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
        give_up(node, transfer)
        failpoint("dst.after_discard")
    return m.Done()


def recover(node: Node) -> None:
    """Bring every record in line with what is true after a crash; idempotent. What cannot be read is left as it is (B12)."""
    for number in node.store.list():
        try:
            transfer = node.store.load(number)
        except LandfallError:
            continue
        if transfer.state is m.TransferState.BUILDING or transfer.mends:
            for kind in WorkspaceKind if transfer.mends else ():  # a mend that broke off is begun anew
                node.substrate.discard(Workspace(transfer.base.volume, number, kind))
            node.store.discard(number)
        elif not transfer.sending and is_held(node, transfer.target):
            node.store.set_state(number, m.TransferState.COMMITTED)
        elif transfer.state in (m.TransferState.RUNNING, m.TransferState.WAITING):
            interrupted(node, transfer, None if transfer.sending else "the agent of the receiving node was restarted")


def records_of(node: Node, volume: UUID) -> list[TransferRecord]:
    records = [node.store.load(number) for number in node.store.list()]
    return [record for record in records if record.target.volume == volume]


def is_held(node: Node, generation: GenerationId, kind: GenerationKind | None = None) -> bool:
    """Whether a generation is here (as one of ``kind``, if that is named)."""
    try:
        return any(facts.id == generation and kind in {None, facts.kind} for facts in node.substrate.generations(generation.volume))
    except NoSuchVolume:  # the pool was exchanged: what is known of its transfers must not keep the agent from starting
        return False


def known_transfer(node: Node, number: UUID, *, sending: bool) -> TransferRecord:
    transfer = node.store.load(number)
    if transfer.sending is not sending:
        raise NoSuchTransfer(f"transfer {number} goes the other way on node {node.config.node}")
    return transfer


def interrupted(node: Node, transfer: TransferRecord, message: str | None) -> None:
    """Record that the transfer is interrupted; with a message, tell the management node, who hears it when the record says so.

    If we die between notification and record, ``recover`` finds the transfer running and tells it again: twice is better than never.
    """
    with node.outbox.held():
        if message is not None:
            failpoint("dst.before_notification")
            node.outbox.put("reception-failure", transfer.target.volume, transfer.id, message)
            failpoint("dst.after_notification")
        node.store.set_state(transfer.id, m.TransferState.INTERRUPTED)


def give_up(node: Node, transfer: TransferRecord, *, with_target: bool = True) -> None:
    """Forget a transfer and what it needed; its target too, if it was taken for this. What was kept of an overtaken primary never goes.

    The record goes last, so a crash here leaves a transfer that can be discarded again.
    """
    if transfer.state is m.TransferState.SALVAGED and node.record(transfer.target.volume).role is m.Role.SECONDARY:
        raise DeviceBusy("a salvage of this transfer is committed", fix="Undo the salvage first, or keep both.")
    if transfer.sending:
        is_left = transfer.state is not m.TransferState.COMMITTED and is_held(node, transfer.target, GenerationKind.FROZEN)
        if with_target and is_left and not transfer.mends:
            node.substrate.drop(transfer.target)
            forget(node.differential_state(transfer.target.volume), transfer.target)
    else:
        # Its pieces are recorded as arrived, so the record must not outlive the landing volume as one that can be resumed.
        node.store.arrival_path(transfer.id).unlink(missing_ok=True)
        for kind in WorkspaceKind:
            node.substrate.discard(Workspace(transfer.base.volume, transfer.id, kind))
    node.store.discard(transfer.id)


def changed_bytes(dmi: Dmi) -> int:
    return int(dmi.block_count.sum(dtype=np.uint64)) * BLOCK_BYTES


def _as_it_stands(node: Node, transfer: TransferRecord) -> TransferRecord:
    """Return a transfer's record. What ended and could not be recorded, as on a full disk, is recorded and told now."""
    running = (m.TransferState.RUNNING,) if transfer.sending else (m.TransferState.RUNNING, m.TransferState.WAITING)
    if transfer.state in running:
        with suppress(TransferBusy, OSError), node.job(transfer.target.volume, "transfer.list"):  # who runs it holds the volume
            transfer = node.store.load(transfer.id)
            if transfer.state not in running:
                return transfer
            if not transfer.sending and is_held(node, transfer.target):
                return node.store.set_state(transfer.id, m.TransferState.COMMITTED)
            interrupted(node, transfer, None if transfer.sending else "the reception ended, and that could not be recorded")
            return node.store.load(transfer.id)
    return transfer


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
        transfer.mends,
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
