"""The order in which pieces are sent: at any moment as many files as possible are whole, the most wanted first."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.contract.dmi import HOLE, U8, U32, Change, Dmi, Owner
from agent.contract.identity import FilesystemKind
from agent.contract.messages import Differential

_WANTED: Final = 0
_NAMELESS: Final = 1
_FREE: Final = 2
_JOURNAL: Final = 3

METADATA_AT: Final = 0.95
"""After which share of the files' bytes the metadata goes.

A roll forward needs none of it; a roll back, several times faster when little is missing, all. Metadata that goes at a share X costs, while
it travels, the files that would have been sent instead: at most 1 - X of the bytes. Measured were whole files as a share of the ideal
order's at 10, 25, 50, 75, 90 and 99 % of all bytes, and from how many bytes on a roll back can be:

    differential (all of its bytes)          X      10 %   25 %   50 %   75 %   90 %   99 %   roll back from
    drill tree, ext4 (16 % metadata,         0      0.64   0.91   0.998  1      1      1      16 %
      30 % journal)                          0.5    1      1      0.998  1      1      1      41 %
                                             0.75   1      1      0.999  1      1      1      54 %
                                             0.95   1      1      1      1      1      1      60 %
                                             1      1      1      1      1      1      1      70 %
    drill tree, XFS (28 % metadata,          0      0.65   0.60   0.94   0.995  0.999  0.999  37 %
      9 % log)                               0.5    1      1      0.997  0.995  0.999  0.999  65 %
                                             0.75   1      1      1      0.998  0.999  0.999  82 %
                                             0.95   1      1      1      0.999  0.999  0.999  88 %
                                             1      1      1      1      1      1      1      all
    files of one size, ext4 (33 % metadata,  0.5    1      0.69   0.50   1      1      1      50 %
      33 % journal)                          0.75   1      1      0.75   1      1      1      59 %
                                             0.95   1      1      0.95   1      1      1      65 %
                                             1      1      1      1      1      1      1      67 %
    files of one size, XFS (78 % metadata    0.5    1      0.50   0.50   0.50   0.55   0.95   89 %
      and log)                               0.75   1      0.75   0.75   0.75   0.75   0.95   95 %
                                             0.95   1      0.95   0.95   0.95   0.95   0.95   99 %
                                             1      1      1      1      1      1      1      all

Files come before speed, so it is late: what is lost at worst is 5 % of the files, where all are of one size, and one file in a thousand
where sizes differ; and what can be rolled back is every transfer that ends among its largest files, or after them.
"""


def send_order(
    dmi: Dmi,
    priorities: tuple[tuple[str, int], ...],
    differential: Differential = Differential.VERIFY,
    *,
    metadata_at: float = METADATA_AT,
) -> U32:
    """Return every row of the pieces once, first to be sent first.

    Files by priority, then those with the fewest bytes to send; each file's pieces together, a shared piece with the first file that needs
    it. The metadata no file needs goes before the file with which more than ``metadata_at`` of the files' bytes would be sent. Then what
    only nameless files have, free blocks, and the journal; XFS's log goes with the metadata, because target metadata with a base log is
    refused at mount. ``priorities`` are (path prefix, higher is earlier): the longest prefix of a name counts, and of a file's names the
    highest.
    """
    place = _places(dmi, priorities, differential)
    stage, order = _stages(dmi, place), 2 * place
    size = bytes_to_send(dmi, differential).astype(np.int64)
    of_place = np.bincount(place, weights=size, minlength=dmi.file_total + 1)[: dmi.file_total]
    before = np.searchsorted(np.cumsum(of_place), metadata_at * of_place.sum(), side="right")
    order[(stage == _WANTED) & (place == dmi.file_total)] = 2 * before - 1
    return np.lexsort((np.arange(dmi.piece_total), order, stage)).astype(np.uint32)


def bytes_to_send(dmi: Dmi, differential: Differential) -> NDArray[np.uint64]:
    """Return for each piece the blocks that travel for it (before compression); holes travel as a row without data."""
    blocks = dmi.block_count * (dmi.target_hole == 0)
    if differential is Differential.SEND:
        blocks = blocks + dmi.block_count * (dmi.diff_block != HOLE)
    result: NDArray[np.uint64] = blocks.astype(np.uint64)
    return result


def _places(dmi: Dmi, priorities: tuple[tuple[str, int], ...], differential: Differential) -> NDArray[np.int64]:
    """Return for each piece the place of the first named file that needs it; file_total where none does."""
    files = dmi.file_total
    file_of = np.repeat(np.arange(files), np.diff(dmi.need_start).astype(np.int64))
    to_send = np.zeros(files, dtype=np.uint64)
    np.add.at(to_send, file_of, bytes_to_send(dmi, differential)[dmi.need])
    priority = _priority_of_files(dmi, priorities)
    place_of_file = np.empty(files, dtype=np.int64)
    place_of_file[np.lexsort((np.arange(files), to_send, -priority))] = np.arange(files)
    place_of_file[(dmi.change & Change.NAMELESS) != 0] = files
    place = np.full(dmi.piece_total, files, dtype=np.int64)
    np.minimum.at(place, dmi.need, place_of_file[file_of])
    return place


def _stages(dmi: Dmi, place: NDArray[np.int64]) -> U8:
    """Return for each piece the stage in which it goes."""
    log = _WANTED if dmi.head.filesystem is FilesystemKind.XFS else _JOURNAL
    of_owner = np.zeros(len(Owner), dtype=np.uint8)
    for owner, stage in ((Owner.METADATA, _WANTED), (Owner.FILE, _NAMELESS), (Owner.FREE, _FREE), (Owner.JOURNAL, log)):
        of_owner[owner] = stage
    return np.where(place < dmi.file_total, np.uint8(_WANTED), of_owner[dmi.owner])


def _priority_of_files(dmi: Dmi, priorities: tuple[tuple[str, int], ...]) -> NDArray[np.int64]:
    """Return the priority of each file: 0 where no prefix matches."""
    names = len(dmi.name_side)
    of_name = np.zeros(names, dtype=np.int64)
    for prefix, priority in sorted(priorities, key=lambda entry: len(_prefix_bytes(entry[0]))):
        of_name[_names_below(dmi, _prefix_bytes(prefix))] = priority
    highest = np.full(dmi.file_total, np.iinfo(np.int64).min, dtype=np.int64)
    counts = np.diff(dmi.name_start).astype(np.int64)
    np.maximum.at(highest, np.repeat(np.arange(dmi.file_total), counts), of_name)
    return np.where(counts > 0, highest, 0)


def _prefix_bytes(prefix: str) -> bytes:
    return prefix.strip("/").encode("utf-8", "surrogateescape")


def _names_below(dmi: Dmi, prefix: bytes) -> NDArray[np.bool_]:
    """Return which names are ``prefix`` or below it."""
    starts = dmi.name_path_start[:-1].astype(np.int64)
    lengths = np.diff(dmi.name_path_start).astype(np.int64)
    matches = lengths >= len(prefix)
    if not prefix:
        return matches
    for at, byte in enumerate(prefix):
        rows = np.flatnonzero(matches)
        matches[rows] = dmi.paths[starts[rows] + at] == byte
    longer = np.flatnonzero(matches & (lengths > len(prefix)))
    matches[longer] = dmi.paths[starts[longer] + len(prefix)] == ord("/")
    return matches
