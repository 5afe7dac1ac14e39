"""The loss statement: the one account of what became of every changed file. Pure; tables, JSON and HTML are skins on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from agent.contract.arrival import ArrivalRecord, Arrived
from agent.contract.closure import needed_pieces
from agent.contract.dmi import MAX_PIECE_BLOCKS, Change, Dmi, FileKind, Side
from agent.contract.identity import BLOCK_BYTES, GenerationId
from agent.contract.messages import Deletions, FileOutcome, Outcome, Salvaged
from mgmt.determination import OUTCOMES, AtomicSet, BrokenSet, Determination, Policy, Reason, determine, members_of

CELLS: Final = 256
NOTHING_THERE: Final = -1
"""As a cell of a picture: nothing changed there."""


@dataclass(frozen=True, slots=True)
class FileAccount:
    """What became of one changed file. Paths are relative to the volume, bytes that are not UTF-8 as surrogates."""

    row: int  # of the DMI
    paths: tuple[str, ...]  # in the target; of a deleted file in the base
    base_paths: tuple[str, ...]  # in the base, where they were others
    kind: str
    outcome: Outcome
    reason: str
    size_bytes: int  # in the target
    digest: str  # hex, of the target's content
    mtime_ns: int
    pieces_needed: int
    pieces_arrived: int
    found_at: str = ""  # where it is now, if not at its path


@dataclass(frozen=True, slots=True)
class FileTotals:
    """Numbers of files. ``changed`` is the sum of the others."""

    changed: int
    recovered: int
    kept_at_base: int
    absent: int
    damaged: int
    deleted: int
    held: int


@dataclass(frozen=True, slots=True)
class ByteTotals:
    """Bytes of blocks that changed, and of those whose update and differential data arrived; bytes of the recovered files' content."""

    changed: int
    arrived: int
    recovered: int


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long it took from the primary's last sign to the notification, from there to the verdicts, and to the committed result."""

    detect: float
    determine: float
    recover: float


@dataclass(frozen=True, slots=True)
class Picture:
    """What arrived, per mille in each cell, or NOTHING_THERE: along the volume's addresses, and along the files as they were sent."""

    by_address: tuple[int, ...]
    by_send_order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Who salvaged what, when, for whom; all that the files do not say."""

    primary: str
    secondary: str
    operator: str
    at_ns: int
    release: str


@dataclass(frozen=True, slots=True)
class LossStatement:
    """The account of one salvage, or, while ``generation`` is None, of what a salvage would do."""

    transfer: UUID
    volume: UUID
    volume_name: str
    base: GenerationId
    target: GenerationId
    base_taken_ns: int
    target_taken_ns: int
    generation: GenerationId | None  # the salvaged generation that the secondary committed
    circumstances: Circumstances
    deletions: Deletions
    complete: bool
    files: FileTotals
    bytes: ByteTotals
    seconds: Seconds
    verified_files: int
    verified_bytes: int
    broken_sets: tuple[BrokenSet, ...]
    picture: Picture
    accounts: tuple[FileAccount, ...]

    @property
    def lost(self) -> list[FileAccount]:
        """The files that are not as the target has them, deletions that were applied apart."""
        return [account for account in self.accounts if account.outcome not in {Outcome.RECOVERED, Outcome.DELETED}]


def state(
    dmi: Dmi,
    arrival: ArrivalRecord,
    determination: Determination,
    circumstances: Circumstances,
    seconds: Seconds,
    *,
    salvaged: Salvaged | None = None,
    priorities: tuple[tuple[str, int], ...] = (),
) -> LossStatement:
    """Return the account: the verdicts, and where the secondary says otherwise (``salvaged``), its word."""
    said = {found.file: found for found in salvaged.exceptions} if salvaged else {}
    accounts = tuple(_accounts(dmi, determination, said))
    complete_blocks = dmi.block_count.astype(np.uint64)[arrival.complete]
    head = dmi.head
    return LossStatement(
        transfer=head.transfer,
        volume=head.target.volume,
        volume_name=head.volume_name,
        base=head.base,
        target=head.target,
        base_taken_ns=head.base_taken_ns,
        target_taken_ns=head.target_taken_ns,
        generation=salvaged.generation.id if salvaged else None,
        circumstances=circumstances,
        deletions=determination.deletions,
        complete=determination.complete and not any(found.outcome is not Outcome.RECOVERED for found in said.values()),
        files=_totals(accounts),
        bytes=ByteTotals(
            changed=int(dmi.block_count.sum(dtype=np.uint64)) * BLOCK_BYTES,
            arrived=int(complete_blocks.sum()) * BLOCK_BYTES,
            recovered=sum(account.size_bytes for account in accounts if account.outcome is Outcome.RECOVERED),
        ),
        seconds=seconds,
        verified_files=salvaged.verified_files if salvaged else 0,
        verified_bytes=salvaged.verified_bytes if salvaged else 0,
        broken_sets=determination.broken_sets,
        picture=Picture(_by_address(dmi, arrival), _by_send_order(dmi, arrival, priorities)),
        accounts=accounts,
    )


def accounts_of(dmi: Dmi) -> tuple[FileAccount, ...]:
    """Return every changed file of a DMI, as if all of it had arrived: what changed between two generations that one node holds."""
    everything = np.full(dmi.piece_total, Arrived.UPDATE | Arrived.DIFFERENTIAL, dtype=np.uint8)
    record = ArrivalRecord(dmi.head.transfer, b"", everything, 0, 0)
    return tuple(_accounts(dmi, determine(dmi, record, Policy(Deletions.APPLY)), {}))


def _accounts(dmi: Dmi, determination: Determination, said: Mapping[int, FileOutcome]) -> Iterator[FileAccount]:
    """Yield an account per reported file. Columns become lists once: a row of an array costs ten times what an entry of a list does."""
    names = _Names.of(dmi)
    change, kind, size = dmi.change.tolist(), dmi.kind.tolist(), dmi.size.tolist()
    mtime_s, mtime_ns = dmi.mtime_s.tolist(), dmi.mtime_ns.tolist()
    digests = dmi.file_digest.tobytes().hex()
    outcomes, reasons = determination.outcome.tolist(), determination.reason.tolist()
    needed, arrived = determination.needed.tolist(), determination.arrived.tolist()
    for row in determination.reported.tolist():
        base, target = names.of_file(row)
        deleted = bool(change[row] & _DELETED)
        sentence = _SENTENCES[reasons[row]]
        if reasons[row] in _LACKING:
            sentence = f"{sentence} ({needed[row] - arrived[row]} of {needed[row]} pieces missing)"
        word = said.get(row)
        yield FileAccount(
            row=row,
            paths=base if deleted else target,
            base_paths=() if deleted or base == target else base,
            kind=_KINDS[kind[row]],
            outcome=word.outcome if word else OUTCOMES[outcomes[row]],
            reason=word.reason if word else sentence,
            size_bytes=size[row],
            digest=digests[32 * row : 32 * row + 32],
            mtime_ns=mtime_s[row] * 10**9 + mtime_ns[row],
            pieces_needed=needed[row],
            pieces_arrived=arrived[row],
            found_at=word.path if word else "",
        )


_DELETED: Final = int(Change.DELETED)
_SENTENCES: Final = {int(reason): reason.sentence for reason in Reason}
_LACKING: Final = frozenset({int(Reason.PIECES_MISSING), int(Reason.NEW_PIECES_MISSING)})
_KINDS: Final = {int(kind): kind.name.lower() for kind in FileKind}


@dataclass(frozen=True, slots=True)
class _Names:
    """The names of a DMI as lists."""

    first: list[int]
    side: list[int]
    start: list[int]
    paths: bytes

    @staticmethod
    def of(dmi: Dmi) -> _Names:
        return _Names(dmi.name_start.tolist(), dmi.name_side.tolist(), dmi.name_path_start.tolist(), dmi.paths.tobytes())

    def of_file(self, row: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the paths of a file in the base and in the target."""
        sides: tuple[list[str], list[str]] = ([], [])
        for name in range(self.first[row], self.first[row + 1]):
            sides[self.side[name]].append(self.paths[self.start[name] : self.start[name + 1]].decode("utf-8", "surrogateescape"))
        return tuple(sides[Side.BASE]), tuple(sides[Side.TARGET])


def _totals(accounts: tuple[FileAccount, ...]) -> FileTotals:
    counts = Counter(account.outcome for account in accounts)
    return FileTotals(
        changed=len(accounts),
        recovered=counts[Outcome.RECOVERED],
        kept_at_base=counts[Outcome.KEPT],
        absent=counts[Outcome.ABSENT],
        damaged=counts[Outcome.DAMAGED],
        deleted=counts[Outcome.DELETED],
        held=counts[Outcome.HELD],
    )


def _by_address(dmi: Dmi, arrival: ArrivalRecord) -> tuple[int, ...]:
    """Return the share of changed blocks that arrived, for each equal part of the volume."""
    blocks = dmi.head.volume_blocks
    return _shares(dmi.op_block.astype(np.float64), blocks, dmi.block_count.astype(np.float64), arrival.complete)


def _by_send_order(dmi: Dmi, arrival: ArrivalRecord, priorities: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    """Return the share that arrived of the pieces that files need, file after file as they are sent: priority, then fewest blocks."""
    priority = np.zeros(dmi.file_total, dtype=np.int64)
    for prefix, level in sorted(priorities, key=lambda entry: len(entry[0].strip("/"))):
        priority[members_of(dmi, AtomicSet("", (prefix,)))] = level
    owner = np.repeat(np.arange(dmi.file_total), needed_pieces(dmi))
    blocks = np.where(dmi.target_hole == 0, dmi.block_count, 0)[dmi.need].astype(np.float64)
    to_send = np.bincount(owner, weights=blocks, minlength=dmi.file_total)
    order = np.lexsort((owner, to_send[owner], -priority[owner]))
    sent, weight = dmi.need[order], np.maximum(blocks[order], 1)
    position = np.cumsum(weight) - weight
    return _shares(position, int(weight.sum()), weight, arrival.complete[sent])


def _shares(position: NDArray[np.float64], length: int, weight: NDArray[np.float64], arrived: NDArray[np.bool_]) -> tuple[int, ...]:
    """Return per cell the share of ``weight`` that arrived. A cell is no shorter than a piece, so that a long piece leaves no gap."""
    total = min(CELLS, max(length // MAX_PIECE_BLOCKS, 1))
    cells = np.minimum((position * total / max(length, 1)).astype(np.int64), total - 1)
    there = np.bincount(cells, weights=weight, minlength=total)
    came = np.bincount(cells, weights=weight * arrived, minlength=total)
    mille = np.where(there > 0, np.floor(1000 * came / np.maximum(there, 1)), NOTHING_THERE)
    return tuple(int(value) for value in mille)
