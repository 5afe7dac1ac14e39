"""Replication: a generation, the differential to what both nodes hold, and a transfer that resumes while both live.

``prepare`` stops before the first byte is sent, ``replicate`` goes on from there, or does both.

What there is to resume is asked of the agents, never read from the catalog. A transfer whose target the primary still holds is
continued; only what the arrival record lacks is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID, uuid4

from agent.contract import messages as m
from agent.contract.errors import (
    BaseMismatch,
    FailoverBusy,
    LandfallError,
    NodeUnreachable,
    NoSuchTransfer,
    NoSuchVolume,
    Retry,
    SplitBrain,
    TransferBusy,
)
from agent.contract.identity import GenerationId, GenerationKind, empty_generation
from agent.system.clock import monotonic_s, sleep, wall_ns
from mgmt.catalog import TransferEntry, VolumeEntry
from mgmt.run import notices
from mgmt.run.retention import retain
from mgmt.run.site import Site, Teller, nobody
from mgmt.run.volumes import facts_of

Route = Callable[[str, int], tuple[str, int]]
"""Where the primary is to connect, given where the secondary listens; a proxy may stand between."""

OPEN_STATES = frozenset({m.TransferState.BUILDING, m.TransferState.WAITING, m.TransferState.RUNNING, m.TransferState.INTERRUPTED})
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0
BUSY_LIMIT_S = 75.0
"""A little longer than an agent listens for a peer that does not come."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """A transfer that is committed on the secondary."""

    transfer: UUID
    base: GenerationId
    target: GenerationId
    resumed: bool  # it had been begun before this order
    sessions: int  # that this order took
    frozen_ms: float  # 0 where no generation was taken
    built: m.Built | None  # None where the differential was there already
    sent: m.Sent
    seconds: float


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is to be transferred: both generations are on the primary, and so is the differential between them."""

    transfer: UUID
    base: GenerationId
    target: GenerationId
    resumed: bool  # it had been prepared or begun before this order
    frozen_ms: float  # 0 where no generation was taken
    built: m.Built | None  # None where the differential was there already


def direct(address: str, port: int) -> tuple[str, int]:
    """Return the address as it is: nothing stands between the nodes."""
    return address, port


def replicate(
    site: Site,
    name: str,
    *,
    differential: m.Differential = m.Differential.VERIFY,
    streams: int | None = None,
    rate_limit_bytes_s: int | None = None,
    route: Route = direct,
    attempts: int | None = None,
    tell: Teller = nobody,
    on_order: Callable[[UUID, m.Built | None], None] | None = None,
    within_failover: bool = False,
) -> Replicated:
    """Return once the volume's newest generation is committed on the secondary.

    Raises what ended the transfer: LinkLost after ``attempts`` sessions, NodeUnreachable when a node went away. What had arrived is kept
    on the secondary, for the next order or a salvage. ``on_order`` hears the transfer before the first byte of it is sent. SplitBrain,
    FailoverBusy where a differential might overwrite what nobody else has; a failover's own steps are ``within_failover``.
    """
    begun = monotonic_s()
    entry = site.catalog.volume(name)
    if not within_failover:
        refuse_contested(site, entry)
    order = _prepared(site, entry, differential, tell)
    record = TransferEntry(order.transfer, entry.id, order.base, order.target, differential, wall_ns())
    site.catalog.begin_transfer(record)
    if on_order is not None:
        on_order(order.transfer, order.built)
    session = _Session(
        site,
        entry,
        order,
        differential,
        site.inventory.streams if streams is None else streams,
        site.inventory.rate_limit_bytes_s if rate_limit_bytes_s is None else rate_limit_bytes_s,
        route,
        tell,
    )
    try:
        sent, sessions = _until_committed(session, site.inventory.resume_attempts if attempts is None else attempts)
    except BaseException as error:
        ending = "primary-lost" if isinstance(error, NodeUnreachable) else "interrupted"
        site.catalog.end_transfer(order.transfer, ending, wall_ns())
        raise
    site.catalog.end_transfer(order.transfer, "committed", wall_ns())
    notices.collect(site)  # what was said of earlier sessions is answered by this one
    site.catalog.mark_handled(order.transfer)
    _discard_overtaken(site, entry, order.target)
    retain(site, entry)
    return Replicated(
        order.transfer,
        order.base,
        order.target,
        order.resumed,
        sessions,
        order.frozen_ms,
        order.built,
        sent,
        monotonic_s() - begun,
    )


def prepare(
    site: Site,
    name: str,
    *,
    differential: m.Differential = m.Differential.VERIFY,
    tell: Teller = nobody,
    within_failover: bool = False,
) -> Prepared:
    """Return the transfer that the next ``replicate`` sends; nothing is sent now. What is there to go on with is returned as it is.

    If we die here, the primary holds a generation that is of no transfer, or a transfer that waits: the next order goes on with the one,
    and ``discard`` or the next commit lets go of the other.
    """
    entry = site.catalog.volume(name)
    if not within_failover:
        refuse_contested(site, entry)
    return _prepared(site, entry, differential, tell)


def discard(site: Site, name: str, transfer: UUID | None = None) -> list[tuple[UUID, str]]:
    """Return the open transfers given up, each with the node that forgot it; without ``transfer`` all of the volume.

    A sender that does not answer is left out: it is asked again another time. What the receiver has committed, though the sender did
    not hear of it, is not open: the sender keeps its generation, the newest that both have. NodeUnreachable if that cannot be known.
    After a failover it is the new secondary that sent.
    """
    entry = site.catalog.volume(name)
    gone = []
    nodes = (entry.secondary, entry.primary)
    held = {node: _held(site, entry, node) for node in nodes}
    for node, peer in (nodes, nodes[::-1]):
        try:
            listed = site.node(node).ask(m.ListTransfers()).transfers
        except NodeUnreachable:
            continue
        for facts in listed:
            committed, away = held[peer if facts.sending else node]
            # What a salvaged transfer takes is given up by name only, and when the secondary says that it is of no use any more.
            is_open = facts.state in OPEN_STATES and facts.target not in committed
            is_open |= facts.state is m.TransferState.SALVAGED and facts.id == transfer
            is_open |= facts.mends and facts.state in OPEN_STATES  # its target is on both nodes, and stays
            if away and facts.sending and not facts.mends and facts.state is m.TransferState.INTERRUPTED:
                raise away
            if facts.volume == entry.id and is_open and transfer in {None, facts.id}:
                site.node(node).ask(m.DiscardTransfer(facts.id))
                gone.append((facts.id, node))
    if not gone:
        raise NoSuchTransfer(f"volume {name} has no open transfer" + (f" {transfer}" if transfer else ""))
    for found in {found for found, _ in gone}:
        site.catalog.end_transfer(found, "discarded", wall_ns())
        site.catalog.mark_handled(found)
    return gone


def refuse_contested(site: Site, entry: VolumeEntry) -> None:
    """SplitBrain or FailoverBusy while it is not settled which node's content is the volume."""
    if node := site.catalog.split_brain(entry.id):
        raise SplitBrain(
            f"nothing proved that {node} did not write volume {entry.name} when {entry.primary} took it over",
            fix=f"`landfall resync {entry.name} --discard-from {node}` keeps what it holds as a generation, and lets it follow.",
        )
    if site.catalog.failover_open(entry.id):
        raise FailoverBusy(f"a failover of volume {entry.name} is not done")


def _held(site: Site, entry: VolumeEntry, node: str) -> tuple[set[GenerationId], NodeUnreachable | None]:
    """Return the generations of a node, and why they are not known."""
    try:
        return {facts.id for facts in facts_of(site.node(node), entry.id).generations}, None
    except NoSuchVolume:
        return set(), None
    except NodeUnreachable as error:
        return set(), error


def _discard_overtaken(site: Site, entry: VolumeEntry, committed: GenerationId) -> None:
    """Forget transfers whose target is older than what is committed now; a node that does not answer keeps them until the next time."""
    for node in (entry.secondary, entry.primary):
        with contextlib.suppress(NodeUnreachable):
            for facts in site.node(node).ask(m.ListTransfers()).transfers:
                overtaken = facts.state in OPEN_STATES - {m.TransferState.RUNNING} and facts.target.counter < committed.counter
                if facts.volume == entry.id and overtaken:
                    site.node(node).ask(m.DiscardTransfer(facts.id))
                    site.catalog.mark_handled(facts.id)


def _prepared(site: Site, entry: VolumeEntry, differential: m.Differential, tell: Teller) -> Prepared:
    return continued(site, entry) or _ordered(site, entry, differential, tell)


def continued(site: Site, entry: VolumeEntry) -> Prepared | None:
    """Return the transfer that the primary can go on with, newest first; None if there is none."""
    primary, secondary = site.node(entry.primary), site.node(entry.secondary)
    here = {facts.id for facts in facts_of(secondary, entry.id).generations} | {empty_generation(entry.id)}
    there = {facts.id for facts in facts_of(primary, entry.id).generations}
    received = [facts for facts in secondary.ask(m.ListTransfers()).transfers if facts.volume == entry.id and not facts.sending]
    if any(facts.state is m.TransferState.SALVAGED for facts in received):
        undo = f"`landfall salvage {entry.name} --undo` makes its transfer resumable again"
        raise TransferBusy(
            f"{entry.secondary} holds a salvaged generation of volume {entry.name}",
            fix=f"{undo}, unless {entry.secondary} has served it: then it is the volume now, and is not replicated back by this release.",
        )
    unfinished = {facts.id for facts in received if facts.state in OPEN_STATES}
    sending = [facts for facts in primary.ask(m.ListTransfers()).transfers if facts.volume == entry.id and facts.sending]
    for facts in sending:
        if facts.state is m.TransferState.RUNNING:
            raise TransferBusy(
                f"{entry.primary} is sending transfer {facts.id} now", fix="Wait for it; `landfall status` shows how far it is."
            )
    for facts in sorted(sending, key=lambda found: found.target.counter, reverse=True):
        ready = facts.state in OPEN_STATES - {m.TransferState.BUILDING}
        if ready and facts.id in (unfinished or {facts.id}) and facts.target in there and facts.base in here and facts.target not in here:
            return Prepared(facts.id, facts.base, facts.target, True, 0.0, None)
    if unfinished:
        raise TransferBusy(
            f"{entry.secondary} holds a part of transfer {min(unfinished)}, which {entry.primary} cannot go on with",
            fix=f"`landfall discard {entry.name}` gives it up; `landfall salvage {entry.name} --declare-dead` recovers its files first.",
        )
    return None


def _ordered(site: Site, entry: VolumeEntry, differential: m.Differential, tell: Teller) -> Prepared:
    """Return a new transfer: the newest generation both nodes hold to one that is taken now."""
    return built(site, entry, site.node(entry.primary).ask(m.TakeGeneration(entry.id)), differential, tell)


def built(site: Site, entry: VolumeEntry, taken: m.Taken, differential: m.Differential, tell: Teller) -> Prepared:
    """Return a new transfer: the newest generation both nodes hold to one that was just taken, which is dropped if that fails."""
    primary, secondary = site.node(entry.primary), site.node(entry.secondary)
    target = taken.generation.id
    try:
        base = newest_common(facts_of(primary, entry.id), facts_of(secondary, entry.id))
        if base.counter >= target.counter:
            raise BaseMismatch(f"{entry.secondary} holds {base.name}, which is no older than {target.name}")
        transfer = uuid4()
        # Recorded before it is ordered: if we die here, the agents' own lists and this entry agree on what it was for.
        site.catalog.begin_transfer(TransferEntry(transfer, entry.id, base, target, differential, wall_ns()))
        order = m.BuildTransfer(transfer, base, target, entry.priorities)
        made = primary.ask(order, lambda progress: tell(entry.primary, progress))
    except LandfallError:
        # It is of no transfer, and a schedule that meets the same refusal each time would fill the pool with such.
        with contextlib.suppress(LandfallError):
            primary.ask(m.DropGeneration(target))
        raise
    return Prepared(transfer, base, target, False, taken.frozen_ms, made)


def newest_common(primary: m.VolumeFacts, secondary: m.VolumeFacts) -> GenerationId:
    """Return the newest generation that both nodes hold, by its whole identity; g0 if there is no other."""
    usable = {facts.id for facts in secondary.generations if facts.kind not in {GenerationKind.SALVAGED, GenerationKind.KEPT}}
    both = [facts.id for facts in primary.generations if facts.id in usable and facts.kind is not GenerationKind.EMPTY]
    return max(both, key=lambda generation: (generation.epoch, generation.counter), default=empty_generation(primary.id))


@dataclass(frozen=True, slots=True)
class _Session:
    site: Site
    entry: VolumeEntry
    order: Prepared
    differential: m.Differential
    streams: int
    rate_limit_bytes_s: int
    route: Route
    tell: Teller

    def run(self) -> m.Sent:
        """Open the port on the secondary and have the primary send; passes and token are of this session alone."""
        site, entry, order = self.site, self.entry, self.order
        passes = site.authority.passes(entry.primary, entry.secondary)
        silence = site.inventory.silence_limit_s
        receive = m.ReceiveTransfer(
            order.transfer, order.base, order.target, self.differential, self.streams, passes.token, passes.receiver, silence
        )
        listening = site.node(entry.secondary).ask(receive)
        address, port = self.route(listening.address, listening.port)
        send = m.SendTransfer(
            order.transfer,
            address,
            port,
            self.differential,
            self.streams,
            passes.token,
            passes.sender,
            silence,
            self.rate_limit_bytes_s,
        )
        try:
            return site.node(entry.primary).ask(send, lambda progress: self.tell(entry.primary, progress))
        except NodeUnreachable as error:
            raise _PrimaryGone(error) from error


class _PrimaryGone(Exception):
    """The primary itself went away while it was sending: nothing to resume with."""

    def __init__(self, reason: NodeUnreachable) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _until_committed(session: _Session, attempts: int) -> tuple[m.Sent, int]:
    """Return what the last session sent and how many it took. The class of an error alone decides whether there is another.

    A secondary that is busy with the session before has to notice first that nobody comes: that is waited for and is no session.
    """
    number, pause_s = 1, FIRST_PAUSE_S
    busy_until = monotonic_s() + BUSY_LIMIT_S
    while True:
        try:
            return session.run(), number
        except _PrimaryGone as gone:
            raise gone.reason from gone
        except TransferBusy as error:
            own = number > 1 or session.order.resumed
            if not own or monotonic_s() > busy_until:
                raise
            session.tell(session.entry.secondary, m.Progress(f"waiting: {error.code}", 0, 0))
        except LandfallError as error:
            if error.retry not in {Retry.RECONNECT, Retry.LATER} or number == attempts:
                raise
            session.tell(session.entry.secondary, m.Progress(f"waiting to resume: {error.code}", number, attempts))
            number, busy_until = number + 1, monotonic_s() + BUSY_LIMIT_S
        sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
