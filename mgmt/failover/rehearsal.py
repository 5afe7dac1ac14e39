"""A failover rehearsed: what the secondary would serve is read, held against what was recorded of it, and mounted for a moment.

The replica's newest generation is what a promotion would make the volume of. Its blocks are read from the disk again and compared with the
digest table from the time it was made, the primary's where only that has one; and the kernel mounts it, read-only. Of a transfer that
is unfinished the verdicts are drawn as a salvage would. Nothing is fenced, promoted or recovered, and replication goes on meanwhile. If
we die here a read-only mount stays that nobody sees; the next rehearsal, or the agent's next start, ends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from agent.contract import messages as m
from agent.contract.errors import NodeUnreachable, NoSuchGeneration, NoSuchTransfer, NoSuchVolume, TransferBusy
from agent.contract.identity import GenerationId, GenerationKind
from agent.system.clock import monotonic_s, wall_ns
from mgmt.report import FileTotals
from mgmt.run.salvage import verdicts
from mgmt.run.site import Site, Teller, nobody
from mgmt.run.volumes import facts_of

PORTION_BLOCKS: Final = 1 << 18
"""Blocks whose digests are held at a time: 2 MiB of them."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a failover now would end in. ``unfinished``: what a salvage would first make of a transfer that is under way."""

    volume: str
    node: str
    generation: GenerationId
    taken_ns: int
    behind_s: float  # what clients would lose, as time
    blocks: int
    wrong_blocks: int  # that are not what was recorded of them
    recorded_by: str  # the node whose digest table it was compared with; empty: no node that answers has one, nothing could be compared
    written: str  # why somebody must have written to it; empty: nothing speaks for that
    unfinished: FileTotals | None
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether it could be served as it is."""
        return not self.wrong_blocks and not self.written

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        state = "is sound" if self.sound else f"is NOT sound: {self.wrong_blocks:,} blocks are wrong. {self.written}".rstrip(". ")
        proof = f"{self.blocks:,} blocks read" if self.recorded_by else "no record to compare with"
        more = f"; of the transfer under way {self.unfinished.recovered:,} files more" if self.unfinished else ""
        return f"{self.node} would serve {self.generation.name}, {self.behind_s:.0f} s old, which mounts and {state} ({proof}){more}"


def rehearse(site: Site, name: str, tell: Teller = nobody) -> Rehearsal:
    """Return what a failover of the volume would end in now; NoSuchGeneration if the secondary holds nothing of it."""
    begun = monotonic_s()
    entry = site.catalog.volume(name)
    node = site.node(entry.secondary)
    newest = m.newest(facts_of(node, entry.id).generations)
    if newest.kind is GenerationKind.EMPTY:
        raise NoSuchGeneration(f"{entry.secondary} holds no generation of volume {name}: it was never replicated")
    examined = node.ask(m.ExamineGeneration(newest.id))
    recorder = entry.secondary if examined.recorded else _recorder(site, entry.primary, newest.id)
    wrong = sum(
        _wrong_blocks(site, entry.secondary, recorder, newest.id, first, min(PORTION_BLOCKS, examined.blocks - first), tell)
        for first in range(0, examined.blocks if recorder else 0, PORTION_BLOCKS)
    )
    node.ask(m.OpenGeneration(newest.id))
    node.ask(m.CloseGeneration(newest.id))
    return Rehearsal(
        entry.name,
        entry.secondary,
        newest.id,
        newest.taken_ns,
        (wall_ns() - newest.taken_ns) / 1e9,
        examined.blocks,
        wrong,
        recorder,
        examined.written,
        _unfinished(site, name, tell),
        monotonic_s() - begun,
    )


def _recorder(site: Site, name: str, generation: GenerationId) -> str:
    """Return the node's name if it has a digest table of the generation; empty if not, or it does not answer."""
    try:
        return name if site.node(name).ask(m.ExamineGeneration(generation)).recorded else ""
    except (NodeUnreachable, NoSuchGeneration, NoSuchVolume):
        return ""


def _wrong_blocks(site: Site, name: str, recorder: str, generation: GenerationId, first: int, count: int, tell: Teller) -> int:
    found = site.node(name).fetch(m.FetchDigests(generation, first, count), lambda progress: tell(name, progress))
    recorded = site.node(recorder).fetch(m.FetchDigests(generation, first, count, recorded=True))
    return int(np.count_nonzero(np.frombuffer(found, dtype="<u8") != np.frombuffer(recorded, dtype="<u8")))


def _unfinished(site: Site, name: str, tell: Teller) -> FileTotals | None:
    """Return what a salvage would make of an unfinished transfer; None where there is none, or it still runs."""
    try:
        return verdicts(site, name, tell=tell).statement.files
    except (NoSuchTransfer, TransferBusy):
        return None
