"""What is left to send, dealt out in send order, and the data that goes with it."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.blockio.device import Device
from agent.blockio.scatter import gather
from agent.contract.arrival import Arrived
from agent.contract.dmi import HOLE, U8, U32, Dmi
from agent.contract.frames import Part
from agent.contract.identity import BLOCK_BYTES
from agent.contract.messages import Differential

_ROWS: Final = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Generations:
    """The two generations, open."""

    dmi: Dmi
    target: Device
    base: Device

    def read(self, rows: U32, parts: U8, buffer: memoryview) -> memoryview:
        """Return the data of a batch, in the beginning of ``buffer``."""
        at = 0
        for part, device in ((Part.UPDATE, self.target), (Part.DIFFERENTIAL, self.base)):
            blocks = _blocks(self.dmi, rows, parts, part)
            carry = blocks > 0
            length = int(blocks.sum()) * BLOCK_BYTES
            if length:
                gather(device, self.dmi.op_block[rows[carry]], blocks[carry].astype(np.uint64), buffer[at : at + length])
            at += length
        return buffer[:at]


class Work:
    """What is left to send, dealt out in send order; and how much of it the other side says is durable."""

    def __init__(self, dmi: Dmi, order: U32, differential: Differential, bits: U8, batch_bytes: int) -> None:
        """``order`` is every row in send order, ``bits`` what the other side has of each piece, ``batch_bytes`` the data of one batch."""
        update = (bits & int(Arrived.UPDATE)) == 0
        pre_image = (bits & int(Arrived.DIFFERENTIAL)) == 0
        if differential is Differential.VERIFY:
            # The other side proves its own base when the update data comes; only where it could not do we send ours.
            pre_image &= ~update
        self.parts: U8 = (update * np.uint8(Part.UPDATE) + pre_image * np.uint8(Part.DIFFERENTIAL)).astype(np.uint8)
        self._order: U32 = order[self.parts[order] != 0]
        self.skipped = dmi.piece_total - len(self._order)
        blocks = _blocks(dmi, self._order, self.parts[self._order], Part.UPDATE)
        blocks += _blocks(dmi, self._order, self.parts[self._order], Part.DIFFERENTIAL)
        self._ends = np.cumsum(blocks) * BLOCK_BYTES
        self._batch_bytes = batch_bytes
        self._total = dmi.piece_total
        self._at = 0
        self._needed: deque[int] = deque()
        self._complete = 0
        self._ended = False
        self._changed = threading.Condition()
        self.sent = 0
        self.healed = 0

    def take(self) -> tuple[U32, U8] | None:
        """Return the next rows and their parts, waiting for some; None when everything is durable on the other side, or at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._needed or self._at < len(self._order) or self._complete == self._total or self._ended)
            if self._ended:
                return None
            if self._needed:
                row = self._needed.popleft()
                self.healed += 1
                return np.array([row], dtype=np.uint32), np.array([Part.DIFFERENTIAL], dtype=np.uint8)
            if self._at == len(self._order):
                return None
            begin = self._at
            sent = int(self._ends[begin - 1]) if begin else 0
            stop = int(np.searchsorted(self._ends, sent + self._batch_bytes, side="right"))
            self._at = min(max(stop, begin + 1), begin + _ROWS)
            rows = self._order[begin : self._at]
            self.sent += len(rows)
            return rows, self.parts[rows]

    def need(self, rows: U32) -> None:
        """Put ``rows`` first: their base differs on the other side, and files wait for their differential data."""
        with self._changed:
            self._needed.extend(rows.tolist())
            self._changed.notify_all()

    def completed(self, complete: int) -> None:
        """Remember that the other side has ``complete`` pieces of all, durably."""
        with self._changed:
            self._complete = max(self._complete, complete)
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when everything is durable on the other side, or at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._complete == self._total or self._ended)

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def _blocks(dmi: Dmi, rows: U32, parts: U8, part: Part) -> NDArray[np.int64]:
    """Return how many blocks of data each row has for one part: none if it does not carry it, or if it is a hole."""
    hole = dmi.target_hole[rows] != 0 if part is Part.UPDATE else dmi.diff_block[rows] == HOLE
    return np.where(((parts & int(part)) != 0) & ~hole, dmi.block_count[rows], 0).astype(np.int64)
