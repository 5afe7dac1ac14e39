"""Verbs on salvages: the update instruction, and taking its result back."""

from __future__ import annotations

from agent.contract import messages as m
from agent.contract.columns import identity
from agent.contract.errors import BaseMismatch, DeviceBusy, LandfallError, NoSuchTransfer, RequestRefused
from agent.recovery.salvage import SalvageJob, salvage, undo
from agent.recovery.salvage import recover as sweep_salvages
from agent.service.node import Node, ProgressCall
from agent.service.receiving import newest_before, place_healed, ready_landing
from agent.system.failpoint import failpoint
from agent.transfer.store import TransferRecord


def update(node: Node, arguments: m.UpdateInstruction, progress: ProgressCall) -> m.Salvaged:
    """Store the designated files in the second operational volume. Every file is checked again by this node's own record."""
    volume = node.record(node.store.load(arguments.transfer).target.volume)
    with node.job(volume.id, f"salvage.update {arguments.transfer}"):
        transfer = _salvageable(node, arguments)
        ready_landing(node, transfer, node.store.dmi(transfer.id))
        place_healed(node, transfer)
        salvaged = salvage(_job(node, transfer, arguments, progress))
        failpoint("recovery.before_record")
        node.store.set_state(transfer.id, m.TransferState.SALVAGED)
        failpoint("recovery.after_record")
    return salvaged


def _salvageable(node: Node, arguments: m.UpdateInstruction) -> TransferRecord:
    """Return the transfer of an update instruction. Everything that speaks against storing its files is said here."""
    transfer = node.store.load(arguments.transfer)
    volume = node.record(transfer.target.volume)
    if transfer.sending or transfer.state is not m.TransferState.INTERRUPTED:
        raise NoSuchTransfer(f"transfer {transfer.id} is not an interrupted reception: it is {transfer.state}")
    if node.serving(volume):
        raise DeviceBusy("this node serves the volume", fix="Salvage before serving: what clients wrote since then cannot be merged.")
    if volume.role is not m.Role.SECONDARY:
        raise BaseMismatch(
            f"node {node.config.node} was made the primary of volume {volume.name}, and what it serves is not cloned anew",
            fix="Salvage before serving.",
        )
    if newest_before(node, transfer.base, transfer.target).id != transfer.base:
        raise BaseMismatch("the newest generation here is not the base of this transfer any more")
    node.substrate.refuse_written(transfer.base)  # what is salvaged is labelled as this base with whole files in it
    if identity(node.store.dmi_bytes(transfer.id)).hex() != arguments.dmi_digest:
        raise RequestRefused("the update instruction speaks of another DMI than the one stored here", fix="Determine anew.")
    return transfer


def undo_salvage(node: Node, arguments: m.UndoSalvage, progress: ProgressCall) -> m.Done:
    """Take the newest salvage of a volume back; its transfer is resumable again."""
    with node.job(arguments.volume, "salvage.undo"):
        volume = node.record(arguments.volume)
        if node.serving(volume) or volume.role is not m.Role.SECONDARY:
            raise DeviceBusy("the salvaged volume is served: clients may have written to it", fix="It cannot be undone any more.")
        for number in node.store.list():
            transfer = node.store.load(number)
            if transfer.target.volume == volume.id and transfer.state is m.TransferState.SALVAGED:
                nothing = m.UpdateInstruction(number, "", (), m.Deletions.HOLD, complete=False)
                undo(_job(node, transfer, nothing, progress))
                node.store.set_state(number, m.TransferState.INTERRUPTED)
                return m.Done()
    raise NoSuchTransfer(f"no salvage of volume {volume.name} can be undone")


def recover(node: Node) -> None:
    """Sweep clones of a salvage that died; whether a transfer is salvaged is what the generations say."""
    sweep_salvages(node.substrate, node.private_folder("salvage"))
    held = {facts.salvaged_from for volume in node.substrate.volumes() for facts in node.substrate.generations(volume.id)}
    for number in node.store.list():
        try:
            transfer = node.store.load(number)
        except LandfallError:
            continue
        is_salvaged = transfer.target in held
        if transfer.state is (m.TransferState.INTERRUPTED if is_salvaged else m.TransferState.SALVAGED) and not transfer.sending:
            node.store.set_state(number, m.TransferState.SALVAGED if is_salvaged else m.TransferState.INTERRUPTED)


def _job(node: Node, transfer: TransferRecord, instruction: m.UpdateInstruction, progress: ProgressCall) -> SalvageJob:
    dmi = node.store.dmi(transfer.id)
    return SalvageJob(
        substrate=node.substrate,
        dmi=dmi,
        arrival=node.store.arrival(transfer.id, node.store.dmi_digest(transfer.id), dmi.piece_total),
        instruction=instruction,
        mount_folder=node.private_folder("salvage"),
        progress=lambda said: progress(said.step, said.done, said.total),
    )
