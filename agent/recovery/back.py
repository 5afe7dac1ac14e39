"""Roll back: whether it can be, whether it is cheaper, and what it needs before the target's filesystem is mounted.

A landing volume that has all of the target's metadata is the target, but for the content of files that are not whole: its filesystem says
of every block what the source's said. Free blocks do not matter, and ext4's journal is empty in every generation, so one that came in part
is exchanged for the base's, which is empty and older; XFS's log is not empty, so it has to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.blockio.device import Device
from agent.contract.arrival import ArrivalRecord
from agent.contract.dmi import Change, Dmi, FileKind, Owner
from agent.contract.errors import SalvageFailed
from agent.contract.identity import FilesystemKind
from agent.contract.messages import FileOutcome, Outcome
from agent.recovery.content import Ending, read_files
from agent.transfer.landing import unequal_pieces
from agent.volume.superblock import Incompat, read_ext4

_STORED_FILE_S: Final = 1.9e-3
_STORED_BYTE_S: Final = 1e-8
_PROVED_FILE_S: Final = 3.7e-4
_PROVED_BYTE_S: Final = 1e-9
_PIECE_S: Final = 1.5e-4
_BEGIN_S: Final = 0.3
"""Seconds to store and verify, to prove and verify, to clone a landing volume that consists of so many pieces, and to mount the base, too.
Measured with 10,000 of 1,000,000 files changed, with cold caches (`python -m tests.bench recovery`); only their ratio counts."""


@dataclass(frozen=True, slots=True)
class Proved:
    """The digest and length of each regular file whose content was proved at the DMI's extents, and those that proved damaged."""

    contents: dict[int, tuple[bytes, int]]
    damaged: dict[int, FileOutcome]


NOTHING: Final = Proved({}, {})


def hindrance(dmi: Dmi, arrival: ArrivalRecord) -> str:
    """Return why a landing volume cannot be rolled back, empty if it can."""
    if dmi.head.base.counter == 0:
        return "the base is empty"
    missing = int(np.count_nonzero(~arrival.complete[_of_filesystem(dmi)]))
    return f"{missing} pieces of the filesystem's metadata did not arrive" if missing else ""


def is_cheaper(dmi: Dmi, designated: Sequence[int], *, apply_deletions: bool) -> bool:
    """Whether rolling back is estimated to take less time than rolling forward: files and bytes to be stored and to be proved."""
    of_target = np.zeros(dmi.file_total, dtype=np.bool_)
    of_target[list(designated)] = True
    deleted, new = (dmi.change & Change.DELETED) != 0, (dmi.change & Change.NEW) != 0
    undone = ~of_target & ~new & (~deleted | (not apply_deletions))
    begin = _BEGIN_S + dmi.piece_total * _PIECE_S
    proving = _seconds(dmi, of_target, _PROVED_FILE_S, _PROVED_BYTE_S)
    storing = _seconds(dmi, undone, _STORED_FILE_S, _STORED_BYTE_S)
    return begin + proving + storing < _seconds(dmi, of_target, _STORED_FILE_S, _STORED_BYTE_S)


def prove(landing: Device, dmi: Dmi, designated: Sequence[int], tick: Callable[[int], None]) -> Proved:
    """Read the metadata and the designated files back from the landing volume; SalvageFailed unless the metadata is what was sent.

    Then the kernel finds in it what it would find in the source's, and of each file what is proved here.
    """
    bad = unequal_pieces(landing, dmi, np.flatnonzero(_of_filesystem(dmi)).astype(np.uint32), dmi.update_digest)
    if len(bad):
        raise SalvageFailed(f"{len(bad)} pieces of metadata do not read back from the landing volume as they were sent")
    contents: dict[int, tuple[bytes, int]] = {}
    damaged: dict[int, FileOutcome] = {}
    for item in read_files(landing, dmi, [row for row in designated if dmi.kind[row] == FileKind.REGULAR]):
        if isinstance(item, Ending):
            if item.damage:
                damaged[item.row] = FileOutcome(item.row, Outcome.DAMAGED, item.damage)
            else:
                contents[item.row] = (item.digest, item.length_bytes)
            tick(len(contents) + len(damaged))
    return Proved(contents, damaged)


def exchange_journal(dmi: Dmi, arrival: ArrivalRecord, clone: Path, base: Path) -> None:
    """Give a clone of the landing volume the base's journal, unless all of the target's arrived or it has a log that counts as metadata.

    A journal of two generations must not be: what the kernel appends to it could run into what another time left there, and a replay after
    a crash would go on with that. SalvageFailed if the target's filesystem wants its own replayed.
    """
    of_journal = np.flatnonzero(dmi.owner == Owner.JOURNAL)
    if dmi.head.filesystem is FilesystemKind.XFS or bool(np.all(arrival.complete[of_journal])):
        return
    if Incompat.NEEDS_RECOVERY in read_ext4(clone).incompat:
        raise SalvageFailed("the target's journal is to be replayed, and did not arrive")
    with Device.open_reading(base) as source, Device.open_writing(clone) as device:
        for first, blocks in zip(dmi.op_block[of_journal].tolist(), dmi.block_count[of_journal].tolist(), strict=True):
            device.write(first, source.read(first, blocks))
        device.sync()


def _of_filesystem(dmi: Dmi) -> NDArray[np.bool_]:
    """Return which pieces a filesystem needs to be mounted as the target's."""
    log = (dmi.owner == Owner.JOURNAL) & (dmi.head.filesystem is FilesystemKind.XFS)
    found: NDArray[np.bool_] = (dmi.owner == Owner.METADATA) | log
    return found


def _seconds(dmi: Dmi, files: NDArray[np.bool_], per_file: float, per_byte: float) -> float:
    size = dmi.size[files & (dmi.kind == FileKind.REGULAR)].sum(dtype=np.float64)
    return int(np.count_nonzero(files)) * per_file + float(size) * per_byte
