"""Several volumes frozen together: one generation of each, all of one moment, so that none shows an effect without its cause in another.

Each order names its volumes; what `landfall watch` orders by schedule is laid down with the volumes (``VolumeEntry.together``). All
generations are on the primary before the first is sent. They arrive one after the other: whoever fails over in between finds the volumes
that have arrived at this moment, the others at the one before (or salvaged).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from agent.contract import messages as m
from agent.contract.errors import LandfallError, NotTogether
from agent.contract.identity import GenerationId
from agent.system.clock import wall_ns
from mgmt.catalog import VolumeEntry
from mgmt.run import replication
from mgmt.run.replication import Prepared, Replicated
from mgmt.run.site import Site, Teller, nobody
from mgmt.run.volumes import facts_of


@dataclass(frozen=True, slots=True)
class Member:
    """A volume of the set. ``prepared`` is None where its generation had arrived before this order."""

    volume: str
    target: GenerationId
    prepared: Prepared | None


@dataclass(frozen=True, slots=True)
class Together:
    """A set whose generations are all taken at one moment."""

    moment_ns: int
    frozen_ms: float  # 0 where they had been taken before this order
    members: tuple[Member, ...]


def prepare_together(
    site: Site, names: tuple[str, ...], *, differential: m.Differential = m.Differential.VERIFY, tell: Teller = nobody
) -> Together:
    """Return the set that ``replicate_together`` sends; nothing is sent now. One that is under way is gone on with.

    NotTogether for volumes that have not one primary, or of which some have a transfer under way that is not of this set. If we die here
    the primary holds generations of which not all have a transfer; the same order makes the rest of them.
    """
    entries = [site.catalog.volume(name) for name in names]
    primary = _one_primary(entries)
    for entry in entries:
        replication.refuse_contested(site, entry)
    continued = {entry.id: replication.continued(site, entry) for entry in entries}
    there = {entry.id: {facts.id: facts.taken_ns for facts in facts_of(site.node(primary), entry.id).generations} for entry in entries}
    begun = {there[number][prepared.target] for number, prepared in continued.items() if prepared is not None}
    if not begun:
        return _ordered(site, entries, primary, differential, tell)
    moment_ns = max(begun)
    members = []
    for entry in entries:
        target = next((generation for generation, taken_ns in there[entry.id].items() if taken_ns == moment_ns), None)
        if len(begun) > 1 or target is None:
            busy = [other.name for other in entries if continued[other.id] is not None]
            raise NotTogether(
                f"transfers of {', '.join(busy)} are under way that are not of one set with the others",
                fix=f"{'; '.join(f'`landfall replicate {name}`' for name in busy)}, then the set.",
            )
        members.append(_member(site, entry, target, continued[entry.id], differential, tell))
    return Together(moment_ns, 0.0, tuple(members))


def replicate_together(
    site: Site,
    names: tuple[str, ...],
    *,
    differential: m.Differential = m.Differential.VERIFY,
    streams: int | None = None,
    rate_limit_bytes_s: int | None = None,
    tell: Teller = nobody,
) -> tuple[Together, tuple[Replicated, ...]]:
    """Return the set, and what came of its transfers, once every generation of it is committed on the volume's secondary.

    Raises what ended a transfer: the same order goes on with the set.
    """
    together = prepare_together(site, names, differential=differential, tell=tell)
    done = tuple(
        replication.replicate(
            site, member.volume, differential=differential, streams=streams, rate_limit_bytes_s=rate_limit_bytes_s, tell=tell
        )
        for member in together.members
        if member.prepared is not None
    )
    return together, done


def _one_primary(entries: list[VolumeEntry]) -> str:
    primaries = {entry.primary for entry in entries}
    if len(entries) < 2 or len({entry.id for entry in entries}) != len(entries):
        raise NotTogether("together are two volumes or more, each named once", fix="Name them.")
    if len(primaries) != 1:
        where = ", ".join(f"{entry.name} on {entry.primary}" for entry in entries)
        raise NotTogether("volumes on different nodes cannot be frozen together", cause=where, fix="Name those of one primary.")
    return primaries.pop()


def _ordered(site: Site, entries: list[VolumeEntry], primary: str, differential: m.Differential, tell: Teller) -> Together:
    """Return a new set; if the differential of one cannot be made, nothing of the set is left."""
    taken = site.node(primary).ask(m.TakeTogether(tuple(entry.id for entry in entries)))
    members: list[Member] = []
    try:
        for entry, facts in zip(entries, taken.generations, strict=True):
            prepared = replication.built(site, entry, m.Taken(facts, taken.frozen_ms), differential, tell)
            members.append(Member(entry.name, facts.id, prepared))
    except LandfallError:
        for member in members:
            if member.prepared is not None:
                with contextlib.suppress(LandfallError):
                    site.node(primary).ask(m.DiscardTransfer(member.prepared.transfer))
        for facts in taken.generations:
            with contextlib.suppress(LandfallError):
                site.node(primary).ask(m.DropGeneration(facts.id))
        raise
    for entry in entries:
        others = " and ".join(sorted(other.name for other in entries if other.id != entry.id))
        site.catalog.note(entry.id, "together", f"{entry.name} was frozen together with {others}, for {taken.frozen_ms:.0f} ms", wall_ns())
    return Together(taken.generations[0].taken_ns, taken.frozen_ms, tuple(members))


def _member(
    site: Site, entry: VolumeEntry, target: GenerationId, continued: Prepared | None, differential: m.Differential, tell: Teller
) -> Member:
    """Return a volume of a set that is under way: arrived, to be gone on with, or taken and not yet to be sent."""
    if continued is not None:
        return Member(entry.name, target, continued)
    if any(facts.id == target for facts in facts_of(site.node(entry.secondary), entry.id).generations):
        return Member(entry.name, target, None)
    taken = next(facts for facts in facts_of(site.node(entry.primary), entry.id).generations if facts.id == target)
    return Member(entry.name, target, replication.built(site, entry, m.Taken(taken, 0.0), differential, tell))
