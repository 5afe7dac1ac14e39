"""The way back of a node that was overtaken: what it holds is kept and listed, then it follows, then it may take over again.

Nothing of it is overwritten before it is kept as a generation. If we die anywhere, the same command goes on: the node says that it is
demoted already, the lists are made again, the transfer resumes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from agent.contract import messages as m
from agent.contract.dmi import Dmi
from agent.contract.errors import NoSuchTransfer, PrimaryAlive
from agent.contract.identity import GenerationId, GenerationKind, empty_generation
from agent.system.clock import wall_ns
from agent.system.failpoint import failpoint
from agent.system.files import write_durably
from mgmt.catalog import VolumeEntry
from mgmt.failover.account import Account
from mgmt.failover.driver import failover
from mgmt.failover.journal import Journal
from mgmt.failover.plan import Wish
from mgmt.failover.rescue import lists_folder
from mgmt.failover.returned import Comparison, Returned, compare
from mgmt.run import replication
from mgmt.run.site import Site, Teller, nobody
from mgmt.run.volumes import facts_of, follow_roles

HISTORY_KIND: Final = "failback"


@dataclass(frozen=True, slots=True)
class Followed:
    """A node that was overtaken and follows again. ``kept`` names the generation of what it held, empty if that was nothing of its own."""

    volume: str
    node: str
    primary: str
    epoch: int
    kept: str
    base: GenerationId  # the newest generation that both had
    comparison: Comparison
    lists: str  # the file that has the comparison
    bytes_sent: int
    target: GenerationId

    @property
    def sentence(self) -> str:
        """It in one sentence, for the history."""
        held, changed = len(self.comparison.held), len(self.comparison.changed)
        own = f"{held:,} files that {self.primary} lacks are kept in {self.kept}" if self.kept else "it held nothing of its own"
        return (
            f"{self.node} follows {self.primary} at epoch {self.epoch}: {own}; {changed:,} changed files came "
            f"as a differential from {self.base.name}, {self.bytes_sent:,} bytes"
        )


Agreement = Callable[[VolumeEntry, str], bool]
"""Told the volume and the node that is to follow; False stops it before anything is changed."""


def resync(
    site: Site, name: str, node: str | None = None, *, agree: Agreement = lambda entry, node: True, tell: Teller = nobody
) -> Followed | None:
    """Return once the node that was overtaken (``node``, if named, has to be it) holds what the primary has; ends a split brain.

    PrimaryAlive for the primary itself: what it holds is the volume, and is not given up for the other's.
    """
    entry = follow_roles(site, site.catalog.volume(name))
    returned = node or entry.secondary
    if returned != entry.secondary:
        raise PrimaryAlive(
            f"{returned} is the primary of volume {name} at epoch {entry.epoch}",
            fix=f"It is {entry.secondary} whose content can be given up; to serve that, `landfall failover {name}`.",
        )
    if not agree(entry, returned):
        return None
    with site.alone(entry.id):
        site.hello(returned)
        kept = site.node(returned).ask(m.DemoteVolume(entry.id, entry.epoch)).kept
        failpoint("failback.after_demote")
        return _follow(site, entry, returned, kept, tell)


def failback(
    site: Site, name: str, *, agree: Agreement = lambda entry, node: True, tell: Teller = nobody
) -> tuple[Followed | None, Account] | None:
    """Return what the node that was overtaken held, and what it cost to let it take over again; None if ``agree`` said no.

    It follows first, while clients work on the other, then takes over as planned. The first is None where a planned failover was under way
    already, which goes on.
    """
    entry = follow_roles(site, site.catalog.volume(name))
    followed = None
    if Journal(site.catalog).open_entry(entry.id) is None:
        followed = resync(site, name, agree=agree, tell=tell)
        if followed is None:
            return None
    done = failover(site, name, Wish(planned=True), tell=tell)
    return None if done is None else (followed, done)


def _follow(site: Site, entry: VolumeEntry, returned: str, kept: m.GenerationFacts | None, tell: Teller) -> Followed:
    """List both sides' changes, then bring the differential over; from the newest generation that both have."""
    primary = site.node(entry.primary)
    kept = kept or _kept_before(site, entry, returned)
    order = replication.prepare(site, entry.name, tell=tell, within_failover=True)
    served = Dmi.decode(primary.fetch(m.FetchDmi(order.transfer)))
    theirs = _changes(site, entry, returned, order.base, kept.id, tell) if kept else None
    comparison = compare(theirs, served)
    path = _stored(
        site, entry.id, Returned(returned, entry.primary, kept.id if kept else empty_generation(entry.id), order.base, comparison)
    )
    failpoint("failback.after_lists")
    done = replication.replicate(site, entry.name, tell=tell, within_failover=True)
    site.catalog.end_split_brain(entry.id)
    followed = Followed(
        entry.name,
        returned,
        entry.primary,
        entry.epoch,
        kept.id.name if kept else "",
        order.base,
        comparison,
        str(path),
        done.sent.bytes_sent,
        done.target,
    )
    site.catalog.note(entry.id, HISTORY_KIND, followed.sentence, wall_ns())
    return followed


def _kept_before(site: Site, entry: VolumeEntry, returned: str) -> m.GenerationFacts | None:
    """Return what was kept of the node when it was demoted, if nothing newer has come to it since."""
    held = facts_of(site.node(returned), entry.id).generations
    return held[-1] if held and held[-1].kind is GenerationKind.KEPT else None


def _changes(site: Site, entry: VolumeEntry, node: str, base: GenerationId, target: GenerationId, tell: Teller) -> Dmi:
    """Return the DMI between two generations of a node that sends nothing of it; what it made for this is forgotten at once.

    If we die in between, a transfer that nobody wants is left there; it is discarded at the next run.
    """
    asked = site.node(node)
    for left in asked.ask(m.ListTransfers()).transfers:
        if left.volume == entry.id and left.sending and left.target == target:
            asked.ask(m.DiscardTransfer(left.id))
    number = uuid4()
    asked.ask(m.BuildTransfer(number, base, target), lambda progress: tell(node, progress))
    try:
        return Dmi.decode(asked.fetch(m.FetchDmi(number), lambda progress: tell(node, progress)))
    finally:
        with contextlib.suppress(NoSuchTransfer):
            asked.ask(m.DiscardTransfer(number))


def _stored(site: Site, volume: UUID, lists: Returned) -> Path:
    """Keep the lists where they outlive both nodes."""
    folder = lists_folder(site, volume)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{lists.kept.name}.json"
    write_durably(path, lists.to_json().encode() + b"\n")
    return path
