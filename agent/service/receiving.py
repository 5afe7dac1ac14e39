"""The verb of the receiving side (NAS 2), and what salvages share with it.

A receiver runs on in the background: its verb answers as soon as the data port is open, and a reception that fails is told through
the outbox.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from uuid import UUID

import numpy as np

from agent.contract import messages as m
from agent.contract.arrival import Arrived
from agent.contract.dmi import Dmi
from agent.contract.errors import (
    BaseMismatch,
    DeviceBusy,
    EpochStale,
    LandfallError,
    NoSpace,
    RecordMalformed,
    TransferBusy,
)
from agent.contract.identity import BLOCK_BYTES, GenerationId, GenerationKind
from agent.differential.build import drop as forget
from agent.service import mending
from agent.service.node import Node, ProgressCall
from agent.service.transfers import interrupted, is_held, records_of
from agent.system.clock import wall_ns
from agent.system.failpoint import failpoint
from agent.system.priority import io_priority
from agent.transfer.receiver import ReceiveJob, Receiver, Volumes
from agent.transfer.store import TransferRecord
from agent.volume.substrate import VolumeRecord, Workspace, WorkspaceKind


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
        transfer = mending.expected(node, volume, arguments) if arguments.mends else _expected(node, volume, arguments)
        _begin_anew_if_lost(node, transfer)
        receiver = Receiver(_receive_job(node, transfer, arguments))
        is_committed = not transfer.mends and is_held(node, transfer.target)
        node.store.set_state(transfer.id, m.TransferState.COMMITTED if is_committed else m.TransferState.WAITING)
    except BaseException:
        node.release(volume.id)
        raise
    node.receptions[transfer.id] = _Reception(node, transfer, receiver)
    failpoint("dst.after_listen")
    return m.Listening(receiver.address, receiver.port)


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
            with io_priority(node.config.io_priority):
                self._receiver.run()
        except Exception as error:
            if transfer.mends:
                mending.forget(node, transfer)
            elif not is_held(node, transfer.target):
                interrupted(node, transfer, None if self._gives_way else str(error))
        finally:
            if node.receptions.get(transfer.id) is self:
                del node.receptions[transfer.id]
            node.release(transfer.target.volume)


def _expected(node: Node, volume: VolumeRecord, arguments: m.ReceiveTransfer) -> TransferRecord:
    """Return the record of the transfer that is to come, a new one if it is not known. Everything that speaks against it is said here."""
    records = records_of(node, volume.id)
    for known in records:
        if known.id != arguments.transfer:
            if known.state is not m.TransferState.COMMITTED:
                raise TransferBusy(f"transfer {known.id} of this volume is unfinished", fix="Resume, salvage or discard it first.")
        elif (known.base, known.target, known.sending) != (arguments.base, arguments.target, False):
            raise BaseMismatch(f"transfer {known.id} is known here with another base or target")
        elif known.state is m.TransferState.SALVAGED:
            raise TransferBusy("the transfer was salvaged", fix="`landfall salvage --undo` makes it resumable.")
        elif known.state is m.TransferState.COMMITTED and is_held(node, known.target):
            return known
    _refuse_unfit_base(node, volume, arguments.base, arguments.target)
    for known in records:
        if known.id == arguments.transfer and known.state is not m.TransferState.COMMITTED:
            return known
    for known in records_of(node, volume.id):
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


def _refuse_unfit_base(node: Node, volume: VolumeRecord, base: GenerationId, target: GenerationId) -> None:
    """BaseMismatch unless ``base`` is the newest generation, as it was committed, of a volume that nobody may have written to here.

    EpochStale for the target of a primary that was overtaken.
    """
    if node.serving(volume) or volume.role is not m.Role.SECONDARY:
        raise BaseMismatch(
            f"node {node.config.node} has taken volume {volume.name} over, so its content is not the base any more",
            fix="It is the volume now; `landfall failback` brings the other node up to it.",
        )
    if target.epoch < volume.epoch:
        raise EpochStale(f"{target.name} is of epoch {target.epoch}, volume {volume.name} is at epoch {volume.epoch}")
    newest = newest_before(node, base, target)
    if newest.id != base:
        raise BaseMismatch(
            f"the base {base.name} is not the newest generation here", cause=f"that is {newest.id.name} of epoch {newest.id.epoch}"
        )
    node.substrate.refuse_written(base)


def _begin_anew_if_lost(node: Node, transfer: TransferRecord) -> None:
    """Let pieces land on fresh clones, where the volumes that they landed on proved to lose writes, or were given up by the kernel.

    If we die here it is done again.
    """
    landing = Workspace(transfer.base.volume, transfer.id, WorkspaceKind.LANDING)
    gone = not transfer.mends and not is_held(node, transfer.target) and not node.substrate.exists(landing)
    if node.store.distrusted(transfer.id) or (gone and node.store.arrival_path(transfer.id).exists()):
        node.substrate.discard(Workspace(transfer.base.volume, transfer.id, WorkspaceKind.HEALED))
        node.store.forget_arrival(transfer.id)


def newest_before(node: Node, base: GenerationId, target: GenerationId) -> m.GenerationFacts:
    """Return the newest generation here that counts for a target of ``base``: what it overtakes stands beside the line."""
    held = node.substrate.generations(base.volume)
    return m.newest(tuple(facts for facts in held if not _is_overtaken(facts, base, target)))


def _is_overtaken(facts: m.GenerationFacts, base: GenerationId, target: GenerationId) -> bool:
    """Whether this node took or salvaged a generation by itself, after the base, in an epoch that has ended."""
    is_own = facts.kind in {GenerationKind.FROZEN, GenerationKind.SALVAGED}
    return is_own and facts.id.epoch < target.epoch and (facts.id.epoch, facts.id.counter) > (base.epoch, base.counter)


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
        _follow(node, transfer)
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
        prepare=(lambda _: mending.prepared(node, transfer)) if transfer.mends else prepare,
        heal=heal,
        commit=(lambda: mending.commit(node, transfer)) if transfer.mends else commit,
        address=node.config.replication_address,
        committed=not transfer.mends and is_held(node, transfer.target),
        silence_limit_s=arguments.silence_limit_s,
    )


def ready_landing(node: Node, transfer: TransferRecord, dmi: Dmi) -> None:
    """Make the landing volume, unless it is there with what arrived. RecordMalformed if that is recorded and the volume is gone."""
    landing = Workspace(transfer.base.volume, transfer.id, WorkspaceKind.LANDING)
    arrived = node.store.arrival(transfer.id, node.store.dmi_digest(transfer.id), dmi.piece_total).batches > 0
    if not arrived:
        room = int(dmi.block_count.sum(dtype=np.uint64)) * BLOCK_BYTES
        node.substrate.begin(landing, transfer.base, room)  # of one that is there nothing is recorded, so it is nobody's
    elif not node.substrate.exists(landing):
        raise RecordMalformed("pieces are recorded as arrived and their landing volume is gone", fix="Discard the transfer.")


def _need_room(node: Node, transfer: TransferRecord, dmi: Dmi) -> None:
    """Raise NoSpace before the first piece is taken, if what is still to come has no room."""
    missing = (node.store.arrival(transfer.id, node.store.dmi_digest(transfer.id), dmi.piece_total).bits & Arrived.UPDATE) == 0
    coming = int(dmi.block_count[missing & (dmi.target_hole == 0)].sum(dtype=np.uint64)) * BLOCK_BYTES
    free = node.substrate.free_bytes(Workspace(transfer.base.volume, transfer.id, WorkspaceKind.LANDING))
    if free < coming:
        raise NoSpace(
            f"the pool has no room for transfer {transfer.id}", cause=f"{coming >> 20} MiB are to come, {free >> 20} MiB are free"
        )


def place_healed(node: Node, transfer: TransferRecord) -> None:
    """Let a base whose damaged blocks were fetched take the base's place; what it has is the source's, proved by digest."""
    healed = Workspace(transfer.base.volume, transfer.id, WorkspaceKind.HEALED)
    if node.substrate.exists(healed):
        node.substrate.replace(healed, transfer.base)


def _follow(node: Node, transfer: TransferRecord) -> None:
    """Take over the epoch of what was committed, and let go what it overtook: all of that is in what was kept at the demotion.

    If we die here, the epoch stands or is taken over at the next commit, and what is left goes then.
    """
    record = node.record(transfer.target.volume)
    if transfer.target.epoch > record.epoch:
        node.substrate.set_role(record.id, record.role, transfer.target.epoch)
    for facts in node.substrate.generations(record.id):
        if _is_overtaken(facts, transfer.base, transfer.target):
            with suppress(DeviceBusy):
                node.substrate.drop(facts.id)
                forget(node.differential_state(record.id), facts.id)


def _sweep_strays(node: Node, volume: UUID) -> None:
    """Remove workspaces whose transfer nobody remembers, as after the loss of the state folder; those in use stay."""
    for workspace in node.substrate.workspaces(volume):
        if not node.store.folder(workspace.transfer).exists():
            with suppress(LandfallError):
                node.substrate.discard(workspace)
