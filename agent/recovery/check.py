"""NAS 2 checks the update instruction by its own DMI and arrival record before it stores anything."""

from __future__ import annotations

import numpy as np

from agent.contract.arrival import ArrivalRecord
from agent.contract.dmi import Change, Dmi, Side
from agent.contract.errors import FileNotWhole, RequestRefused
from agent.contract.messages import UpdateInstruction


def check_instruction(instruction: UpdateInstruction, dmi: Dmi, arrival: ArrivalRecord) -> tuple[int, ...]:
    """Return the designated rows, ascending, nameless files left out.

    FileNotWhole names the first file of which a piece is missing here; RequestRefused for an instruction that is not of this DMI, or
    designates what cannot be stored.
    """
    if not instruction.transfer == arrival.transfer == dmi.head.transfer or instruction.dmi_digest != arrival.dmi_digest.hex():
        raise RequestRefused("the update instruction was made from another DMI", fix="Fetch DMI and record again, determine anew.")
    rows = np.array(sorted(instruction.files), dtype=np.int64)
    if len(rows) and (rows[0] < 0 or rows[-1] >= dmi.file_total or bool(np.any(rows[1:] == rows[:-1]))):
        raise RequestRefused("the update instruction designates rows that are not in the DMI, or one twice")
    if any(not 0 <= row < dmi.file_total for members in instruction.atomic_sets for row in members):
        raise RequestRefused("an atomic set of the update instruction has rows that are not in the DMI")
    for row in rows[(dmi.change[rows] & Change.DELETED) != 0].tolist():
        raise RequestRefused(f"the update instruction designates a deleted file: {name_of(dmi, row)}")
    judged = np.flatnonzero((dmi.change & np.uint8(Change.DELETED | Change.NAMELESS)) == 0)
    if instruction.complete and len(np.setdiff1d(judged, rows)):
        raise RequestRefused("the update instruction says that it is complete, and leaves files out")
    complete = arrival.complete
    for row in rows.tolist():
        missing = int(np.count_nonzero(~complete[dmi.needs(row)]))
        if missing:
            needed = len(dmi.needs(row))
            raise FileNotWhole(f"{name_of(dmi, row)} is not whole here: {missing} of {needed} pieces are missing or not proved")
    return tuple(rows[(dmi.change[rows] & Change.NAMELESS) == 0].tolist())


def name_of(dmi: Dmi, row: int) -> str:
    """Return a file's name for people: its first name in the target, or in the base, safe to print."""
    names = dmi.names(row, Side.TARGET) or dmi.names(row, Side.BASE)
    return repr(names[0][1])[1:] if names else f"inode {int(dmi.inode[row])}"
