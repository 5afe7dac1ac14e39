"""What a file needs and what of it is there: the one place where pieces become files. Pure, vectorised.

A hundred million needs are looked at a few million at a time: what is then in use fits the caches better, and memory is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.contract.dmi import U32, Dmi

_NEEDS_AT_ONCE: Final = 1 << 22

Mask = NDArray[np.bool_]


def needed_pieces(dmi: Dmi) -> U32:
    """Return how many pieces each file needs."""
    return np.diff(dmi.need_start).astype(np.uint32)


def counted_pieces(dmi: Dmi, marked: Mask) -> U32:
    """Return how many of the pieces each file needs are ``marked`` (one mark per piece of the DMI)."""
    counts = np.zeros(dmi.file_total, dtype=np.uint32)
    for files, needs in _parts(dmi):
        starts = dmi.need_start[files.start : files.stop + 1].astype(np.intp) - needs.start
        rows = files.start + np.flatnonzero(np.diff(starts))
        if len(rows):
            # reduceat gives a segment that is empty its neighbour's value, so only files that need something have a segment.
            counts[rows] = np.add.reduceat(marked[dmi.need[needs]], starts[rows - files.start], dtype=np.uint32)
    return counts


def pieces_of(dmi: Dmi, chosen: Mask) -> Mask:
    """Return which pieces the ``chosen`` files need (one mark per file of the DMI)."""
    pieces = np.zeros(dmi.piece_total, dtype=np.bool_)
    for files, needs in _parts(dmi):
        lengths = np.diff(dmi.need_start[files.start : files.stop + 1]).astype(np.intp)
        pieces[dmi.need[needs][np.repeat(chosen[files], lengths)]] = True
    return pieces


def whole_files(dmi: Dmi, complete: Mask) -> Mask:
    """Return which files have every piece they need; one that needs none is whole by its record in the DMI."""
    return np.asarray(counted_pieces(dmi, complete) == needed_pieces(dmi), dtype=np.bool_)


def _parts(dmi: Dmi) -> Iterator[tuple[slice, slice]]:
    """Yield all files in turn, as a slice of files and the slice of what they need: about ``_NEEDS_AT_ONCE``, or one file's."""
    first, total = 0, dmi.file_total
    while first < total:
        begins = int(dmi.need_start[first])
        after = int(np.searchsorted(dmi.need_start, begins + _NEEDS_AT_ONCE, side="right")) - 1
        last = min(max(after, first + 1), total)
        yield slice(first, last), slice(begins, int(dmi.need_start[last]))
        first = last
