"""Pieces onto the landing volume: checked against the DMI and against the base here, written, made durable, and only then recorded.

The streams' threads offer batches, workers take them, and one thread commits in groups what they wrote: fdatasync of the landing volume
(and of the healed base), then a batch of the arrival record. If we die in between, the pieces are there and not recorded, and are sent
again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.blockio.buffers import aligned
from agent.blockio.device import Device
from agent.blockio.scatter import digest_runs
from agent.contract.arrival import Arrived
from agent.contract.digest import ZERO_BLOCK, BlockDigests, block_digests, piece_digest
from agent.contract.dmi import HOLE, U32, Digests, Dmi
from agent.contract.errors import LinkLost, ProtocolViolated, VerifyFailed
from agent.contract.frames import MAX_RAW_BYTES, Batch, Part
from agent.contract.identity import BLOCK_BYTES, empty_generation
from agent.system.failpoint import failpoint
from agent.transfer.store import ArrivalWriter

_UPDATE: Final = np.uint8(Arrived.UPDATE)
_DIFFERENTIAL: Final = np.uint8(Arrived.DIFFERENTIAL)
_BASE_DIFFERS: Final = np.uint8(Arrived.BASE_DIFFERS)
_HEALED: Final = np.uint8(Arrived.HEALED)

_COMPLETE: Final = _UPDATE | _DIFFERENTIAL

_WAITING: Final = 4
"""Batches that came and wait for a worker: the bound on memory, and what makes a fast source wait."""

_GROUP: Final = 32
_GROUP_S: Final = 0.05
"""A group commit is of so many batches, or of what comes in so many seconds after the first."""

_VERIFIED_BLOCKS: Final = 1 << 18
"""Blocks whose digests are held at once when the landing volume is read back: 2 MiB of digests."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """What one group commit made durable: ``complete`` counts pieces of the whole transfer, ``need`` are pieces whose base differs."""

    complete: int
    need: U32


class Landing:
    """The landing volume of one transfer, its base and its arrival record."""

    def __init__(self, dmi: Dmi, writer: ArrivalWriter, landing: Device, base: Device, heal: Callable[[], Device]) -> None:
        """``heal`` returns the writable clone of the base in which differing blocks are replaced; it is asked for it at most once."""
        self._dmi = dmi
        self._writer = writer
        self._landing = landing
        self._base = base
        self._heal = heal
        self._healed: Device | None = None
        self._base_is_empty = dmi.head.base == empty_generation(dmi.head.base.volume)
        self._state = writer.bits.copy()  # what the record will say once what is pending is durable
        self._changed = threading.Condition()
        self._pending: list[tuple[U32, NDArray[np.uint8]]] = []
        self._waiting: deque[Batch] = deque()
        self._taking = 0
        self._closed = False
        self._failure: BaseException | None = None
        self.complete = int(np.count_nonzero(_complete(self._state)))

    def offer(self, batch: Batch) -> None:
        """Hand a batch over to the workers, waiting while too many wait already; after the end the worker's failure, or LinkLost."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < _WAITING or self._closed)
            if self._closed:
                raise self._failure or LinkLost("a batch came after the end")
            self._waiting.append(batch)
            self._changed.notify_all()

    def work(self) -> None:
        """Take batches that wait until the end, and those that wait then. Any number of threads may work."""
        buffer = aligned(MAX_RAW_BYTES)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                batch = self._waiting.popleft()
                self._taking += 1
                self._changed.notify_all()
            try:
                self.take(batch, buffer)
            except BaseException as error:
                with self._changed:  # in one step: who is refused for it says the same reason
                    self._failure = self._failure or error
                    self._waiting.clear()
                    self._closed = True
                raise
            finally:
                with self._changed:
                    self._taking -= 1
                    self._changed.notify_all()

    def take(self, batch: Batch, buffer: memoryview) -> None:
        """Check a batch and write it; its pieces are recorded by a later ``record``. ProtocolViolated, DeviceFailed.

        A piece that came before is checked and not written again; other data for it does not pass the check. ``buffer`` is aligned.
        """
        rows, bits = self._take(batch, buffer)
        with self._changed:
            bits |= self._state[rows]
            bits[(bits & _DIFFERENTIAL) != 0] &= ~_BASE_DIFFERS
            self._state[rows] = bits
            self._pending.append((rows, bits))
            self._changed.notify_all()

    def record(self, timeout_s: float) -> Recorded | None:
        """Make durable and record what was written so far; None if nothing came within ``timeout_s``.

        One sync serves what comes within a moment: it costs the same for one batch as for many.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._pending or self._closed, timeout_s) or not self._pending:
                return None
            self._changed.wait_for(lambda: self._closed or len(self._pending) >= _GROUP, _GROUP_S)
            pending, self._pending = self._pending, []
        rows = np.concatenate([rows for rows, _ in pending])
        bits = np.concatenate([bits for _, bits in pending])
        failpoint("dst.before_datasync")
        self._landing.sync()
        if self._healed is not None:
            self._healed.sync()
        failpoint("dst.after_datasync")
        distinct = np.unique(rows)
        before = np.count_nonzero(_complete(self._writer.bits[distinct]))
        self._writer.append(rows, bits)
        after = self._writer.bits[distinct]
        self.complete += int(np.count_nonzero(_complete(after)) - before)
        return Recorded(self.complete, distinct[(after & _BASE_DIFFERS) != 0])

    def verify(self) -> int:
        """Read every piece back from the landing volume and return how many bytes that were; VerifyFailed if one is not what was sent.

        Such a piece is struck from the record, so that no salvage takes it. The landing volume is not gone on with: a disk that loses a
        write may have lost what a thin pool copied around it, which no piece tells of. If we die before the mark, this is found again.
        """
        bad = unequal_pieces(self._landing, self._dmi, np.arange(self._dmi.piece_total, dtype=np.uint32), self._dmi.update_digest)
        if len(bad):
            self._writer.distrust()
            self._writer.append(bad, self._writer.bits[bad] & ~_UPDATE)
            raise VerifyFailed(
                f"{len(bad)} pieces do not read back from the landing volume as they were sent", cause=f"first: piece {bad[0]}"
            )
        healed = np.flatnonzero(self._writer.bits & _HEALED).astype(np.uint32)
        if len(healed):
            bad = unequal_pieces(self._healed_device(), self._dmi, healed, self._dmi.diff_digest, workers=1)
            if len(bad):
                self._writer.distrust()
                lost = ~(_DIFFERENTIAL | _HEALED)
                self._writer.append(bad, (self._writer.bits[bad] & lost) | _BASE_DIFFERS)
                raise VerifyFailed(f"{len(bad)} pieces do not read back from the healed base", cause=f"first: piece {bad[0]}")
        return int(self._dmi.block_count.sum(dtype=np.int64)) * BLOCK_BYTES

    def stop(self) -> None:
        """Take nothing more; what is being taken goes on, and can be recorded."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Take nothing more; on return no stream's thread uses the devices."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._taking and not self._waiting)

    def _take(self, batch: Batch, buffer: memoryview) -> tuple[U32, NDArray[np.uint8]]:
        dmi, rows = self._dmi, batch.rows
        if len(rows) and int(rows.max()) >= dmi.piece_total:
            raise ProtocolViolated("a batch has a piece that the DMI does not have")
        update = (batch.parts & Part.UPDATE) != 0
        differential = (batch.parts & Part.DIFFERENTIAL) != 0
        update_holes = dmi.target_hole[rows] != 0
        differential_holes = dmi.diff_block[rows] == HOLE
        blocks = dmi.block_count[rows].astype(np.int64)
        update_bytes = int(blocks[update & ~update_holes].sum()) * BLOCK_BYTES
        differential_bytes = int(blocks[differential & ~differential_holes].sum()) * BLOCK_BYTES
        if update_bytes + differential_bytes != batch.raw_bytes:
            raise ProtocolViolated(f"a batch has {batch.raw_bytes} bytes where its pieces have {update_bytes + differential_bytes}")
        data = batch.unpack(buffer)
        updates = _Pieces(dmi, rows[update], update_holes[update], data[:update_bytes])
        differentials = _Pieces(dmi, rows[differential], differential_holes[differential], data[update_bytes:])
        updates.check(dmi.update_digest, "update")
        differentials.check(dmi.diff_digest, "differential")
        equal = self._base_equals(rows)

        failpoint("dst.before_write")
        known = self._state[rows]
        updates.write(self._landing, (known[update] & _UPDATE) == 0)
        to_heal = differential & ~equal & ((known & _HEALED) == 0)
        if to_heal.any():
            differentials.write(self._healed_device(), to_heal[differential])
        failpoint("dst.after_write")

        bits = known.copy()
        bits[update] |= _UPDATE
        bits[equal] |= _DIFFERENTIAL
        bits[to_heal] |= _DIFFERENTIAL | _HEALED
        bits[to_heal] &= ~_BASE_DIFFERS
        bits[(bits & _DIFFERENTIAL) == 0] |= _BASE_DIFFERS
        return rows, bits

    def _base_equals(self, rows: U32) -> Mask:
        """Return which pieces' base here is what the DMI says; pieces whose differential data is known to be here are not read again."""
        equal: Mask = (self._state[rows] & (_DIFFERENTIAL | _HEALED)) == _DIFFERENTIAL
        ask = rows[~equal]
        unequal = unequal_pieces(self._base, self._dmi, ask, self._dmi.diff_digest, all_holes=self._base_is_empty, workers=1)
        equal[~equal] = ~np.isin(ask, unequal)
        return equal

    def _healed_device(self) -> Device:
        with self._changed:
            if self._healed is None:
                self._healed = self._heal()
            return self._healed


def unequal_pieces(device: Device, dmi: Dmi, rows: U32, wanted: Digests, *, all_holes: bool = False, workers: int = 4) -> U32:
    """Return which of ``rows`` have another digest on ``device``; read in portions of bounded size."""
    counts = dmi.block_count[rows].astype(np.int64)
    unequal: list[int] = []
    at = 0
    ends = np.cumsum(counts)
    while at < len(rows):
        begun = int(ends[at - 1]) if at else 0
        stop = max(int(np.searchsorted(ends, begun + _VERIFIED_BLOCKS, side="right")), at + 1)
        part = rows[at:stop]
        first, blocks = dmi.op_block[part], counts[at:stop].astype(np.uint64)
        holes = np.ones(len(part), dtype=np.bool_) if all_holes else None
        digests = digest_runs(device, first, blocks, holes=holes, workers=workers)
        for row, digest in zip(part.tolist(), _fold(digests, blocks.astype(np.int64), first.tolist()), strict=True):
            if digest != wanted[row].tobytes():
                unequal.append(row)
        at = stop
    return np.array(unequal, dtype=np.uint32)


class _Pieces:
    """One part of a batch: its pieces, which of them are holes, and the data of the others."""

    def __init__(self, dmi: Dmi, rows: U32, holes: Mask, data: memoryview) -> None:
        self._dmi = dmi
        self._rows = rows
        self._holes = holes
        self._data = data
        self._blocks = dmi.block_count[rows].astype(np.int64)
        self._first = dmi.op_block[rows].astype(np.int64)

    def check(self, wanted: Digests, what: str) -> None:
        """Refuse data that is not what the DMI says, be it a hole."""
        digests = np.full(int(self._blocks.sum()), ZERO_BLOCK, dtype=np.uint64)
        digests[np.repeat(~self._holes, self._blocks)] = block_digests(self._data)
        for row, digest in zip(self._rows.tolist(), _fold(digests, self._blocks, self._first.tolist()), strict=True):
            if digest != wanted[row].tobytes():
                raise ProtocolViolated(f"the {what} data of piece {row} is not what the DMI says")

    def write(self, device: Device, chosen: Mask) -> None:
        """Write the chosen pieces; neighbours in the batch that are neighbours on the volume in one go, and many goes at once."""
        ends = np.cumsum(np.where(self._holes, 0, self._blocks))
        holes = chosen & self._holes
        for first, blocks in zip(self._first[holes].tolist(), self._blocks[holes].tolist(), strict=True):
            device.write_zeros(first, blocks)
        wanted = np.flatnonzero(chosen & ~self._holes)
        if not len(wanted):
            return
        first, blocks, end = self._first[wanted], self._blocks[wanted], ends[wanted]
        place = end - blocks
        heads = np.flatnonzero(np.append(True, (place[1:] != end[:-1]) | (first[1:] != first[:-1] + blocks[:-1])))
        last = np.append(heads[1:], len(wanted)) - 1
        device.write_scattered(first[heads], place[heads], end[last] - place[heads], self._data)


def _fold(digests: BlockDigests, blocks: NDArray[np.int64], first: list[int]) -> list[bytes]:
    """Return the piece digests over the digests of consecutive pieces' blocks."""
    ends = np.cumsum(blocks)
    return [
        piece_digest(digests[end - count : end], address) for end, count, address in zip(ends.tolist(), blocks.tolist(), first, strict=True)
    ]


def _complete(bits: NDArray[np.uint8]) -> Mask:
    complete: Mask = (bits & (_COMPLETE | _BASE_DIFFERS)) == _COMPLETE
    return complete
