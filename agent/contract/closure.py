"""What a file needs and what of it is there: the one place where pieces become files. Pure, vectorised."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agent.contract.dmi import U32, Dmi


def needed_pieces(dmi: Dmi) -> U32:
    """Return how many pieces each file needs."""
    return np.diff(dmi.need_start).astype(np.uint32)


def counted_pieces(dmi: Dmi, marked: NDArray[np.bool_]) -> U32:
    """Return how many of the pieces each file needs are ``marked`` (one mark per piece of the DMI)."""
    needed = needed_pieces(dmi)
    counts = np.zeros(dmi.file_total, dtype=np.uint32)
    has_need = needed > 0
    if has_need.any():
        # reduceat gives a segment that is empty its neighbour's value, so only files that need something have a segment.
        counts[has_need] = np.add.reduceat(marked[dmi.need], dmi.need_start[:-1][has_need].astype(np.intp), dtype=np.uint32)
    return counts


def whole_files(dmi: Dmi, complete: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which files have every piece they need; one that needs none is whole by its record in the DMI."""
    return np.asarray(counted_pieces(dmi, complete) == needed_pieces(dmi), dtype=np.bool_)
