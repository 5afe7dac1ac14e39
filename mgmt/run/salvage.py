"""Salvage: what arrived of an unfinished transfer, judged here, stored there.

In the order of the claim: the reception failure notification is known; DMI and arrival record are obtained from the secondary and
stored here; the determination specifies the files that arrived whole; the update instruction names them; the secondary checks each
again and stores them. If we die anywhere before the instruction nothing has changed; after it the secondary finishes or returns to
the base on its own, and the same command says what became of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import numpy as np

from agent.contract import arrival as arrivals
from agent.contract import columns
from agent.contract import messages as m
from agent.contract.dmi import Dmi
from agent.contract.errors import DmiMalformed, NoSuchTransfer, NotificationUnhandled, PrimaryAlive, TransferBusy
from agent.system.clock import monotonic_s, wall_ns
from agent.system.files import write_durably
from mgmt.catalog import HistoryEntry, VolumeEntry
from mgmt.determination import Determination, determine, members_of
from mgmt.report import Circumstances, LossStatement, Seconds, state
from mgmt.run import notices
from mgmt.run.site import Site, Teller, nobody, operator, release

CONNECT_LIMIT_S = 60.0
"""How long an agent that listens waits for its peer's first stream."""

Decision = Callable[[LossStatement], bool]
"""Shown the verdicts before anything is changed; False stops the salvage."""


DEEDS: Final = frozenset({"failover", "failback", "rescue"})
"""Kinds of history entries that tell what became of a salvaged volume."""


@dataclass(frozen=True, slots=True, eq=False)
class Salvage:
    """A salvage that is decided but not ordered: the evidence and the verdicts. ``statement`` says what would become of each file."""

    entry: VolumeEntry
    transfer: UUID
    dmi: Dmi
    dmi_digest: bytes
    arrival: arrivals.ArrivalRecord
    determination: Determination
    statement: LossStatement


def verdicts(site: Site, name: str, *, transfer: UUID | None = None, detect_s: float | None = None, tell: Teller = nobody) -> Salvage:
    """Return the verdicts on the volume's unfinished transfer; the secondary is read, nothing is changed.

    NoSuchTransfer where nothing is unfinished; TransferBusy while it still runs.
    """
    entry = site.catalog.volume(name)
    notices.collect(site, (entry.secondary,))  # a primary that is gone would take its time to be found so
    facts = _unfinished(site, entry, transfer)
    begun = monotonic_s()
    dmi, digest, record = _evidence(site, entry, facts.id, tell)
    determination = determine(dmi, record, entry.policy)
    seconds = Seconds(_detect_s(site, facts.id) if detect_s is None else detect_s, monotonic_s() - begun, 0.0)
    statement = state(dmi, record, determination, _circumstances(entry), seconds, priorities=entry.priorities)
    return Salvage(entry, facts.id, dmi, digest, record, determination, statement)


def salvage(
    site: Site,
    name: str,
    *,
    transfer: UUID | None = None,
    declare_dead: bool = False,
    decide: Decision = lambda _: True,
    detect_s: float | None = None,
    tell: Teller = nobody,
) -> LossStatement | None:
    """Return the loss statement of the salvage, which is verified and committed on the secondary; None if ``decide`` said no.

    PrimaryAlive while the primary answers and is not declared dead: a living primary resumes, and nothing is lost.
    """
    entry = site.catalog.volume(name)
    if not declare_dead and site.alive(entry.primary):
        raise PrimaryAlive(
            f"{entry.primary} answers", fix=f"`landfall replicate {name}` resumes its transfer; `--declare-dead` salvages all the same."
        )
    _await_notification(site, entry, transfer)
    found = verdicts(site, name, transfer=transfer, detect_s=detect_s, tell=tell)
    if not decide(found.statement):
        return None
    instruction = m.UpdateInstruction(
        found.transfer,
        found.dmi_digest.hex(),
        tuple(found.determination.designated.tolist()),
        found.determination.deletions,
        found.determination.complete,
        tuple(tuple(np.flatnonzero(members_of(found.dmi, atomic)).tolist()) for atomic in entry.policy.atomic_sets),
    )
    begun = monotonic_s()
    salvaged = site.node(entry.secondary).ask(instruction, lambda progress: tell(entry.secondary, progress))
    before = found.statement.seconds
    seconds = Seconds(before.detect, before.determine, monotonic_s() - begun)
    statement = state(
        found.dmi,
        found.arrival,
        found.determination,
        _circumstances(entry),
        seconds,
        salvaged=salvaged,
        priorities=entry.priorities,
    )
    site.catalog.add_salvage(statement)
    site.catalog.end_transfer(found.transfer, "salvaged", wall_ns())
    site.catalog.mark_handled(found.transfer)
    return statement


def undo(site: Site, name: str) -> VolumeEntry:
    """Return the volume after its salvaged generation was taken back: its transfer is resumable again."""
    entry = site.catalog.volume(name)
    site.node(entry.secondary).ask(m.UndoSalvage(entry.id))
    site.catalog.undo_salvage(entry.id, wall_ns())
    return entry


def newest_statement(site: Site, name: str) -> LossStatement:
    """Return the loss statement of the salvage that stands; NoSuchTransfer if there is none."""
    for entry in reversed(site.catalog.statements(name)):
        if entry.undone_ns is None:
            return entry.statement
    raise NoSuchTransfer(f"no salvage of volume {name} stands")


def done_since(site: Site, statement: LossStatement) -> list[HistoryEntry]:
    """Return what was done for the volume after its salvage: who took it over, what was rescued and by whom, how it went back."""
    entries = site.catalog.history(statement.volume, newest=10_000)
    return [entry for entry in entries if entry.kind in DEEDS and entry.at_ns >= statement.circumstances.at_ns]


def _await_notification(site: Site, entry: VolumeEntry, transfer: UUID | None) -> None:
    """Give a secondary that still waits for its peer the time in which it must notice that the peer is gone."""
    notices.collect(site, (entry.secondary,))
    limits = {m.TransferState.RUNNING: 2 * site.inventory.silence_limit_s + 5, m.TransferState.WAITING: CONNECT_LIMIT_S + 5}
    for facts in _received(site, entry):
        if facts.state in limits and transfer in {None, facts.id}:
            try:
                notices.wait_for_failure(site, entry.secondary, facts.id, limits[facts.state])
            except NotificationUnhandled as error:
                raise TransferBusy(f"transfer {facts.id} still runs on {entry.secondary}") from error


def _unfinished(site: Site, entry: VolumeEntry, transfer: UUID | None) -> m.TransferFacts:
    """Return the transfer to salvage, as the secondary knows it."""
    received = [facts for facts in _received(site, entry) if transfer in {None, facts.id}]
    for facts in sorted(received, key=lambda found: found.target.counter, reverse=True):
        if facts.state is m.TransferState.INTERRUPTED:
            return facts
        if facts.state in {m.TransferState.RUNNING, m.TransferState.WAITING}:
            raise TransferBusy(f"transfer {facts.id} still runs on {entry.secondary}")
        if facts.state is m.TransferState.SALVAGED:
            undo_it = f"`landfall salvage {entry.name} --undo` takes it back"
            raise NoSuchTransfer(
                f"transfer {facts.id} is salvaged already",
                fix=f"`landfall statement {entry.name}` says what became of its files; {undo_it}.",
            )
    raise NoSuchTransfer(f"{entry.secondary} has no unfinished transfer of volume {entry.name}", fix="There is nothing to salvage.")


def _received(site: Site, entry: VolumeEntry) -> list[m.TransferFacts]:
    listed = site.node(entry.secondary).ask(m.ListTransfers()).transfers
    return [facts for facts in listed if facts.volume == entry.id and not facts.sending]


def _evidence(site: Site, entry: VolumeEntry, transfer: UUID, tell: Teller) -> tuple[Dmi, bytes, arrivals.ArrivalRecord]:
    """Obtain DMI and arrival record from the secondary, keep both here, and return what they say."""
    node, folder = site.node(entry.secondary), site.evidence_folder(transfer)
    raw_dmi = node.fetch(m.FetchDmi(transfer), lambda progress: tell(entry.secondary, progress))
    raw_record = node.fetch(m.FetchArrival(transfer), lambda progress: tell(entry.secondary, progress))
    write_durably(folder / "dmi", raw_dmi)
    write_durably(folder / "arrival", raw_record)
    dmi = Dmi.decode(raw_dmi)
    if dmi.head.transfer != transfer or dmi.head.target.volume != entry.id:
        raise DmiMalformed(f"{entry.secondary} answers with the DMI of another transfer", cause=str(dmi.head.transfer))
    digest = columns.identity(raw_dmi)
    if not raw_record:  # the transfer broke off before the first piece was recorded
        raw_record = arrivals.encode_head(transfer, digest, dmi.piece_total)
    return dmi, digest, arrivals.decode(raw_record, transfer=transfer, dmi_digest=digest, pieces=dmi.piece_total)


def _detect_s(site: Site, transfer: UUID) -> float:
    """Return the time from the end of the order here to the secondary's notification; 0 where either is unknown or came first."""
    ordered = site.catalog.transfer(transfer)
    said = [seen.notification.at_ns for seen in site.catalog.notifications() if seen.notification.transfer == transfer]
    if ordered is None or ordered.ended_ns is None or not said:
        return 0.0
    return max(0.0, (said[-1] - ordered.ended_ns) / 1e9)


def _circumstances(entry: VolumeEntry) -> Circumstances:
    return Circumstances(entry.primary, entry.secondary, operator(), wall_ns(), release())
