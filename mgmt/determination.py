"""The determination: a verdict per changed file, from the DMI and the arrival record alone. Pure.

The claim's determination processing. A file is whole when every piece it needs has both its update data and its differential
data; a file that needs none is whole by its record in the DMI. Everything is done on columns: nothing loops in Python over
files or pieces, except over those whose path begins as an atomic set's pattern does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.contract.arrival import ArrivalRecord, Arrived
from agent.contract.closure import counted_pieces, needed_pieces, pieces_of
from agent.contract.dmi import U8, U32, Change, Dmi
from agent.contract.errors import RecordMalformed
from agent.contract.identity import BLOCK_BYTES
from agent.contract.messages import Deletions, Outcome

Mask = NDArray[np.bool_]

OUTCOMES: Final = tuple(Outcome)
"""The outcome for each value of ``Determination.outcome``."""

NOT_REPORTED: Final = 255
"""As ``Determination.outcome``: open but unlinked in the target, so it is nobody's loss."""


class Reason(IntEnum):
    """Why a file has its verdict."""

    ARRIVED = 0
    RECORDED = 1
    PIECES_MISSING = 2
    NEW_PIECES_MISSING = 3
    BASE_DIFFERS = 4
    SET_BROKEN = 5
    DELETED_COMPLETE = 6
    DELETED_POLICY = 7
    HELD_POLICY = 8
    HELD_SET_BROKEN = 9
    NAMELESS = 10

    @property
    def sentence(self) -> str:
        """The reason in words."""
        return _SENTENCES[self]


_SENTENCES: Final = {
    Reason.ARRIVED: "all its update and differential data arrived",
    Reason.RECORDED: "none of its data changed; its record arrived with the DMI",
    Reason.PIECES_MISSING: "not all its data arrived; it keeps the content of the base",
    Reason.NEW_PIECES_MISSING: "it is new and not all its data arrived",
    Reason.BASE_DIFFERS: "the base on the secondary is not what the primary had, and could not be healed",
    Reason.SET_BROKEN: "it belongs to an atomic set of which not every changed file arrived",
    Reason.DELETED_COMPLETE: "it was deleted, and every changed file arrived",
    Reason.DELETED_POLICY: "it was deleted, and deletions are applied",
    Reason.HELD_POLICY: "it was deleted on the primary; a partial salvage keeps it",
    Reason.HELD_SET_BROKEN: "it was deleted on the primary; deletions are held because an atomic set with deleted files is not whole",
    Reason.NAMELESS: "it was open and unlinked on the primary",
}


@dataclass(frozen=True, slots=True)
class AtomicSet:
    """Files that are recovered all or not at all.

    A pattern without ``*`` and ``?`` is a path and everything below it; ``*`` and ``?`` match inside one component, ``**`` any number
    of components. A file belongs if one of its names in base or target matches.
    """

    name: str
    patterns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """What the administrator has laid down for a volume."""

    deletions: Deletions = Deletions.HOLD
    atomic_sets: tuple[AtomicSet, ...] = ()


@dataclass(frozen=True, slots=True)
class BrokenSet:
    """An atomic set that was not recovered: its changed files, and how many of them did not arrive whole."""

    name: str
    members: int
    not_whole: int


@dataclass(frozen=True, slots=True, eq=False)
class Determination:
    """The verdicts. Columns have one row per file of the DMI.

    ``deletions`` is what the update instruction is to say: the policy, or hold where an atomic set with deleted files is broken.
    """

    outcome: U8  # index into OUTCOMES, or NOT_REPORTED
    reason: U8  # Reason
    needed: U32  # pieces it needs
    arrived: U32  # those of them that are complete
    broken_sets: tuple[BrokenSet, ...]
    deletions: Deletions
    complete: bool  # every changed file is designated

    @property
    def designated(self) -> NDArray[np.int64]:
        """The rows for the update instruction, ascending."""
        return np.flatnonzero(self.outcome == _CODE[Outcome.RECOVERED])

    @property
    def reported(self) -> NDArray[np.int64]:
        """The rows that a loss statement names: all but nameless files."""
        return np.flatnonzero(self.outcome != NOT_REPORTED)

    def count(self, outcome: Outcome) -> int:
        """Return the number of files with this verdict."""
        return int(np.count_nonzero(self.outcome == _CODE[outcome]))


@dataclass(frozen=True, slots=True)
class Gauge:
    """What a salvage would bring if the primary died now. Bytes are of changed blocks that files own."""

    files_whole: int
    files_total: int
    bytes_whole: int
    bytes_total: int

    @property
    def sentence(self) -> str:
        """The gauge as people read it."""
        share = 100 * self.bytes_whole // self.bytes_total if self.bytes_total else 100
        return f"{self.files_whole:,} of {self.files_total:,} changed files, {share} % of bytes"


def determine(dmi: Dmi, arrival: ArrivalRecord, policy: Policy) -> Determination:
    """Return the verdict on every file of ``dmi``; RecordMalformed if the record is of another DMI."""
    needed, arrived, base_differs = _closure(dmi, arrival)
    is_new, is_deleted, is_nameless = (_has(dmi, change) for change in (Change.NEW, Change.DELETED, Change.NAMELESS))
    is_deleted &= ~is_nameless
    judged = ~(is_deleted | is_nameless)
    whole = judged & (arrived == needed) & ~base_differs

    outcome = np.where(is_new, _CODE[Outcome.ABSENT], _CODE[Outcome.KEPT]).astype(np.uint8)
    reason = np.where(is_new, Reason.NEW_PIECES_MISSING, Reason.PIECES_MISSING).astype(np.uint8)
    outcome[base_differs], reason[base_differs] = _CODE[Outcome.DAMAGED], Reason.BASE_DIFFERS
    outcome[whole] = _CODE[Outcome.RECOVERED]
    reason[whole] = np.where(needed[whole] > 0, Reason.ARRIVED, Reason.RECORDED)

    columns = _Columns(judged, is_new, is_deleted, outcome, reason)
    broken, deleted_member_of_broken = _break_sets(dmi, policy.atomic_sets, columns)
    complete = bool(np.all(outcome[judged] == _CODE[Outcome.RECOVERED]))
    deletions = Deletions.HOLD if deleted_member_of_broken else policy.deletions
    verdict, why = _deletion(complete, deletions, deleted_member_of_broken)
    outcome[is_deleted], reason[is_deleted] = _CODE[verdict], why
    outcome[is_nameless], reason[is_nameless] = NOT_REPORTED, Reason.NAMELESS
    return Determination(outcome, reason, needed, arrived, broken, deletions, complete)


def gauge(dmi: Dmi, arrival: ArrivalRecord) -> Gauge:
    """Return how much of the differential is whole by now, atomic sets and deletions left out."""
    needed, arrived, base_differs = _closure(dmi, arrival)
    judged = ~(_has(dmi, Change.DELETED) | _has(dmi, Change.NAMELESS))
    whole = judged & (arrived == needed) & ~base_differs
    return Gauge(int(np.count_nonzero(whole)), int(np.count_nonzero(judged)), _bytes_of(dmi, whole), _bytes_of(dmi, judged))


def _closure(dmi: Dmi, arrival: ArrivalRecord) -> tuple[U32, U32, Mask]:
    """Return per file: pieces needed, pieces complete, whether a piece's base differs."""
    if arrival.transfer != dmi.head.transfer or len(arrival.bits) != dmi.piece_total:
        raise RecordMalformed("the arrival record belongs to another DMI")
    differs = (arrival.bits & Arrived.BASE_DIFFERS) != 0
    needed, arrived = needed_pieces(dmi), counted_pieces(dmi, arrival.complete)
    # Nearly always no base differs, and then nothing need be counted.
    base_differs: Mask = counted_pieces(dmi, differs) > 0 if differs.any() else np.zeros(dmi.file_total, dtype=np.bool_)
    return needed, arrived, base_differs


def _has(dmi: Dmi, change: Change) -> Mask:
    mask: Mask = (dmi.change & np.uint8(change)) != 0
    return mask


def _deletion(complete: bool, deletions: Deletions, set_broken: bool) -> tuple[Outcome, Reason]:
    if complete:
        return Outcome.DELETED, Reason.DELETED_COMPLETE
    if set_broken:
        return Outcome.HELD, Reason.HELD_SET_BROKEN
    if deletions is Deletions.APPLY:
        return Outcome.DELETED, Reason.DELETED_POLICY
    return Outcome.HELD, Reason.HELD_POLICY


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """Verdicts in the making."""

    judged: Mask
    is_new: Mask
    is_deleted: Mask
    outcome: U8
    reason: U8


def _break_sets(dmi: Dmi, sets: tuple[AtomicSet, ...], columns: _Columns) -> tuple[tuple[BrokenSet, ...], bool]:
    """Take back the recovered members of sets that are not whole, in place; return those sets, and whether one has deleted files.

    A file may be in several sets, so breaking one can break the next: repeat until nothing changes.
    """
    judged, is_deleted, outcome = columns.judged, columns.is_deleted, columns.outcome
    recovered = _CODE[Outcome.RECOVERED]
    members = [members_of(dmi, atomic) for atomic in sets]
    not_whole = [int(np.count_nonzero(rows & judged & (outcome != recovered))) for rows in members]
    broken: set[int] = set()
    while found := [at for at, rows in enumerate(members) if at not in broken and (rows & judged & (outcome != recovered)).any()]:
        for at in found:
            taken_back = members[at] & judged & (outcome == recovered)
            outcome[taken_back] = np.where(columns.is_new[taken_back], _CODE[Outcome.ABSENT], _CODE[Outcome.KEPT])
            columns.reason[taken_back] = Reason.SET_BROKEN
            broken.add(at)
    facts = tuple(
        BrokenSet(sets[at].name, int(np.count_nonzero(members[at] & (judged | is_deleted))), not_whole[at]) for at in sorted(broken)
    )
    return facts, any(bool((members[at] & is_deleted).any()) for at in broken)


def members_of(dmi: Dmi, atomic: AtomicSet) -> Mask:
    """Return which files of the DMI have a name that a pattern of the set matches."""
    name_rows = np.zeros(len(dmi.name_side), dtype=np.bool_)
    for pattern in atomic.patterns:
        plain = pattern.strip("/").encode("utf-8", "surrogateescape")
        wild = re.search(rb"[*?]", plain)
        candidates = _beginning_with(dmi, plain[: wild.start()] if wild else plain)
        matcher = re.compile(_as_expression(plain), re.DOTALL)
        name_rows[[row for row in candidates.tolist() if matcher.fullmatch(dmi.path(row))]] = True
    counts = np.concatenate([np.zeros(1, np.int64), np.cumsum(name_rows)])
    starts = dmi.name_start.astype(np.intp)
    members: Mask = counts[starts[1:]] > counts[starts[:-1]]
    return members


def _beginning_with(dmi: Dmi, prefix: bytes) -> NDArray[np.int64]:
    """Return the rows of names whose path begins with ``prefix``."""
    starts = dmi.name_path_start.astype(np.int64)
    rows = np.flatnonzero(np.diff(starts) >= len(prefix))
    for at, byte in enumerate(prefix):
        rows = rows[dmi.paths[starts[rows] + at] == byte]
    return rows


def _as_expression(pattern: bytes) -> bytes:
    if not re.search(rb"[*?]", pattern):
        return re.escape(pattern) + (rb"(?:/.*)?" if pattern else rb".*")
    words = {b"**/": rb"(?:.*/)?", b"**": rb".*", b"*": rb"[^/]*", b"?": rb"[^/]"}
    return b"".join(words.get(part, re.escape(part)) for part in re.split(rb"(\*\*/|\*\*|\*|\?)", pattern) if part)


def _bytes_of(dmi: Dmi, files: Mask) -> int:
    """Return the bytes of the pieces that ``files`` need, each counted once."""
    return int(dmi.block_count.sum(dtype=np.uint64, where=pieces_of(dmi, files))) * BLOCK_BYTES


_CODE: Final = {outcome: number for number, outcome in enumerate(OUTCOMES)}
