"""Verification: both nodes' copies of a generation compared block by block by digests alone, and made equal on request.

Each node reads its blocks from the disk again and answers eight bytes for each. Where the two differ, the digest table that was made when
the generation was built says whose is right; where there is none, or it agrees with neither, only an operator can say (``trust``). Names
of files come from the copy that is right. Mending brings these blocks, and nothing else, over the way of every transfer into a clone that
replaces the damaged generation in one step. Operational volumes are neither read nor written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from agent.contract import messages as m
from agent.contract.errors import (
    NodeUnreachable,
    NoSuchGeneration,
    NoSuchTransfer,
    ProtocolViolated,
    ReplicaDiffers,
    RequestRefused,
    TransferBusy,
)
from agent.contract.identity import GenerationId, GenerationKind, empty_generation
from mgmt.catalog import VolumeEntry
from mgmt.run.site import Site, Teller, nobody
from mgmt.run.volumes import facts_of

PORTION_BLOCKS: Final = 1 << 18
"""Blocks compared at a time: 1 GiB of each volume, 2 MiB of digests of each node."""

MAX_RUNS: Final = 100_000
"""More than so many places that differ are no rot: another volume, or another generation."""

U64 = NDArray[np.uint64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Damage:
    """Blocks in which one node's copy is wrong; ``node`` is empty where nothing says whose is. ``owners`` by the copy that is right."""

    node: str
    runs: tuple[tuple[int, int], ...]
    owners: m.Owners
    owners_by: str  # the node that was asked for them
    mended: bool = False

    @property
    def blocks(self) -> int:
        """How many blocks."""
        return sum(count for _, count in self.runs)


@dataclass(frozen=True, slots=True)
class Verified:
    """One generation, compared. ``doubted`` blocks are equal on both nodes and not what the digest table says they were."""

    volume: str
    generation: GenerationId
    blocks: int
    recorded_by: tuple[str, ...]  # nodes that have a digest table of it
    damage: tuple[Damage, ...]
    doubted: tuple[tuple[int, int], ...]
    written: tuple[tuple[str, str], ...]  # node, and why somebody must have written to its copy
    bytes_sent: int = 0  # by mending

    @property
    def clean(self) -> bool:
        """Whether both copies are equal now, and nothing speaks against them."""
        return all(found.mended for found in self.damage) and not self.doubted


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Blocks by what is wrong with them."""

    wrong: dict[str, U64]  # by node; "": nobody knows whose
    doubted: U64


def verify(
    site: Site, name: str, *, generation: str | None = None, heal: bool = False, trust: str | None = None, tell: Teller = nobody
) -> Verified:
    """Return how both copies of a generation compare: the newest that both hold, or the one named.

    With ``heal`` damaged blocks are brought from the right copy and what was mended is compared again. ``trust`` names the node whose
    copy is right where no record says it. If we die here, the damaged generation is as it was, or mended; the next mend sweeps the rest.
    """
    entry = site.catalog.volume(name)
    if trust not in {None, entry.primary, entry.secondary}:
        raise RequestRefused(f"{trust} is not a node of volume {name}", fix=f"Name {entry.primary} or {entry.secondary}.")
    chosen = _common(site, entry, generation)
    examined = {node: site.node(node).ask(m.ExamineGeneration(chosen)) for node in (entry.primary, entry.secondary)}
    if len({found.blocks for found in examined.values()}) != 1:
        raise ReplicaDiffers(f"the copies of {chosen.name} have different sizes", fix="Replicate in full into a volume of the right size.")
    total = examined[entry.primary].blocks
    recorded = tuple(node for node, found in examined.items() if found.recorded)
    compared = _compared(site, entry, chosen, total, recorded, tell)
    damage = tuple(_damage(site, entry, chosen, node or "", blocks, trust) for node, blocks in compared.wrong.items() if len(blocks))
    sent = 0
    if heal:
        for number, found in enumerate(damage):
            if found.node:
                sent += _mend(site, entry, chosen, found, tell)
                damage = (*damage[:number], _proved(site, entry, chosen, found), *damage[number + 1 :])
    written = tuple((node, found.written) for node, found in examined.items() if found.written)
    return Verified(entry.name, chosen, total, recorded, damage, _runs(compared.doubted), written, sent)


def _common(site: Site, entry: VolumeEntry, wanted: str | None) -> GenerationId:
    """Return the generation to compare; NoSuchGeneration if not both hold it."""
    held = [facts_of(site.node(node), entry.id).generations for node in (entry.primary, entry.secondary)]
    labelled = {GenerationKind.EMPTY, GenerationKind.SALVAGED, GenerationKind.KEPT}  # of these there is but one copy, or nothing to compare
    there = {facts.id for facts in held[1] if facts.kind not in labelled}
    both = [facts.id for facts in held[0] if facts.id in there]
    found = [each for each in both if wanted in {None, each.name}]
    if not found:
        what = f"generation {wanted}" if wanted else "any generation"
        fix = f"Both hold: {', '.join(each.name for each in both) or 'none'}."
        raise NoSuchGeneration(f"{entry.primary} and {entry.secondary} do not both hold {what} of {entry.name}", fix=fix)
    return max(found, key=lambda each: (each.epoch, each.counter))


def _compared(site: Site, entry: VolumeEntry, chosen: GenerationId, total: int, recorded: tuple[str, ...], tell: Teller) -> _Comparison:
    wrong: dict[str, list[U64]] = {entry.primary: [], entry.secondary: [], "": []}
    doubted, places = [], 0
    with ThreadPoolExecutor(2) as pool:
        for first in range(0, total, PORTION_BLOCKS):
            count = min(PORTION_BLOCKS, total - first)
            asked = [pool.submit(_digests, site, node, chosen, first, count, tell) for node in (entry.primary, entry.secondary)]
            one, other = (answer.result() for answer in asked)
            tables = [_recorded(site, node, chosen, first, count) for node in recorded]
            differ = one != other
            as_one, as_other = (_agreed(tables, side) for side in (one, other))
            for node, blocks in (
                (entry.primary, differ & as_other & ~as_one),
                (entry.secondary, differ & as_one & ~as_other),
                ("", differ & (as_one == as_other)),
            ):
                found = np.flatnonzero(blocks).astype(np.uint64) + np.uint64(first)
                wrong[node].append(found)
                places += len(_runs(found))
            doubted.append(np.flatnonzero(~differ & ~as_one & bool(tables)).astype(np.uint64) + np.uint64(first))
            if places > MAX_RUNS:
                raise ReplicaDiffers(
                    f"the copies of {chosen.name} differ in more than {MAX_RUNS:,} places, which is no rot",
                    fix=f"Drop it on one node (`landfall status {entry.name}` shows which) and replicate from an older one, or in full.",
                )
    return _Comparison({node: np.concatenate(parts) for node, parts in wrong.items()}, np.concatenate(doubted))


def _agreed(tables: list[U64], side: U64) -> Mask:
    """Return which blocks some table says are as ``side`` has them."""
    agreed = np.zeros(len(side), dtype=np.bool_)
    for table in tables:
        agreed |= table == side
    return agreed


def _digests(site: Site, node: str, chosen: GenerationId, first: int, count: int, tell: Teller) -> U64:
    blob = site.node(node).fetch(m.FetchDigests(chosen, first, count), lambda progress: tell(node, progress))
    return _column(node, blob, count)


def _recorded(site: Site, node: str, chosen: GenerationId, first: int, count: int) -> U64:
    return _column(node, site.node(node).fetch(m.FetchDigests(chosen, first, count, recorded=True)), count)


def _column(node: str, blob: bytes, count: int) -> U64:
    if len(blob) != 8 * count:
        raise ProtocolViolated(f"{node} answers {len(blob)} bytes of digests for {count} blocks")
    return np.frombuffer(blob, dtype="<u8")


def _damage(site: Site, entry: VolumeEntry, chosen: GenerationId, node: str, blocks: U64, trust: str | None) -> Damage:
    """Return what is wrong on a node; the blocks of which nobody knows whose is right are the other's than the one trusted."""
    sides = {entry.primary, entry.secondary}
    if not node and trust:
        (node,) = sides - {trust}
    (right,) = sides - {node} if node else {entry.primary}
    runs = _runs(blocks)
    return Damage(node, runs, site.node(right).ask(m.FindOwners(chosen, runs)), right)


def _mend(site: Site, entry: VolumeEntry, chosen: GenerationId, damage: Damage, tell: Teller) -> int:
    """Bring the damaged blocks from the right copy; return the bytes sent. Both nodes forget the transfer, however it ends."""
    right, wrong = site.node(damage.owners_by), site.node(damage.node)
    transfer, base, silence = uuid4(), empty_generation(entry.id), site.inventory.silence_limit_s
    passes = site.authority.passes(damage.owners_by, damage.node)
    right.ask(m.BuildMend(transfer, chosen, damage.runs))
    try:
        receive = m.ReceiveTransfer(transfer, base, chosen, m.Differential.VERIFY, 1, passes.token, passes.receiver, silence, mends=True)
        listening = wrong.ask(receive)
        send = m.SendTransfer(
            transfer, listening.address, listening.port, m.Differential.VERIFY, 1, passes.token, passes.sender, silence,
            site.inventory.rate_limit_bytes_s,
        )  # fmt: skip
        return right.ask(send, lambda progress: tell(damage.owners_by, progress)).bytes_sent
    finally:
        for node in (right, wrong):
            with contextlib.suppress(NoSuchTransfer, NodeUnreachable, TransferBusy):
                node.ask(m.DiscardTransfer(transfer))


def _proved(site: Site, entry: VolumeEntry, chosen: GenerationId, damage: Damage) -> Damage:
    """Return the damage as mended, proved by reading both copies again; ReplicaDiffers if they are not equal now."""
    for first, count in _portions(damage.runs):
        one, other = (_digests(site, node, chosen, first, count, nobody) for node in (entry.primary, entry.secondary))
        if bool(np.any(one != other)):
            raise ReplicaDiffers(f"{damage.node}'s copy of {chosen.name} differs after it was mended", fix=f"Look at {damage.node}'s disk.")
    return Damage(damage.node, damage.runs, damage.owners, damage.owners_by, mended=True)


def _portions(runs: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int]]:
    for first, count in runs:
        for at in range(first, first + count, PORTION_BLOCKS):
            yield at, min(PORTION_BLOCKS, first + count - at)


def _runs(blocks: U64) -> tuple[tuple[int, int], ...]:
    """Return ascending blocks as runs (first, count)."""
    if not len(blocks):
        return ()
    breaks = np.flatnonzero(np.diff(blocks) != 1)
    firsts, lasts = blocks[np.append(0, breaks + 1)], blocks[np.append(breaks, len(blocks) - 1)]
    return tuple((first, last - first + 1) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True))
