"""Many runs of blocks of one device: read by several threads, handed over in order, in memory that does not grow with the volume."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from agent.blockio.buffers import BufferPool, aligned
from agent.blockio.device import MAX_VECTOR, Device
from agent.contract.digest import ZERO_BLOCK, BlockDigests, block_digests
from agent.contract.errors import DeviceFailed
from agent.contract.identity import BLOCK_BYTES

U64 = NDArray[np.uint64]
T = TypeVar("T")

NEAR_BLOCKS: Final = 8
"""Runs with at most this many blocks between them are read in one call, the blocks between them thrown away."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some of the blocks asked for. ``position`` counts blocks in the concatenation of all runs; ``data`` is whole blocks.

    ``data`` is valid until the next one is asked for.
    """

    position: int
    data: memoryview


def read_runs(device: Device, first: U64, blocks: U64, *, workers: int = 4, batch_bytes: int = 4 << 20) -> Iterator[Stretch]:
    """Yield the data of the runs, concatenated in their order, in stretches of at most ``batch_bytes``.

    The runs need not ascend. At most ``workers`` + 2 batches are in memory. DeviceFailed as soon as a block that was asked for
    cannot be read.
    """
    pool = BufferPool(workers + 2, batch_bytes)

    def read(batch: _Batch) -> memoryview:
        buffer = pool.take()
        try:
            gather(device, batch.first, batch.blocks, buffer)
        except BaseException:
            pool.give(buffer)
            raise
        return buffer

    # One more than there are workers is read ahead, one is with the caller: the pool never runs dry.
    for batch, buffer in _in_order(read, _batches(first, blocks, batch_bytes // BLOCK_BYTES), workers, workers + 1):
        yield Stretch(batch.position, buffer[: batch.length * BLOCK_BYTES])
        pool.give(buffer)


def digest_runs(
    device: Device,
    first: U64,
    blocks: U64,
    *,
    holes: NDArray[np.bool_] | None = None,
    workers: int = 4,
    batch_bytes: int = 1 << 20,
) -> BlockDigests:
    """Return the digests of the blocks of all runs, concatenated in their order (8 bytes a block).

    Runs that ``holes`` marks are not read: they are zeros.
    """
    starts = np.concatenate([[0], np.cumsum(blocks, dtype=np.int64)])
    digests = np.full(int(starts[-1]), ZERO_BLOCK, dtype=np.uint64)
    wanted = np.ones(len(first), dtype=np.bool_) if holes is None else ~holes
    if not wanted.any():
        return digests
    pool = BufferPool(workers, batch_bytes)

    def digest(batch: _Batch) -> BlockDigests:
        with pool.lent() as buffer:
            gather(device, batch.first, batch.blocks, buffer)
            return block_digests(buffer[: batch.length * BLOCK_BYTES])

    read = np.empty(int(blocks[wanted].sum()), dtype=np.uint64) if holes is not None else digests
    for batch, part in _in_order(digest, _batches(first[wanted], blocks[wanted], batch_bytes // BLOCK_BYTES), workers, 2 * workers):
        read[batch.position : batch.position + batch.length] = part
    if holes is not None:
        digests[np.repeat(wanted, blocks.astype(np.int64))] = read
    return digests


def gather(device: Device, first: U64, blocks: U64, buffer: memoryview) -> None:
    """Read runs into ``buffer`` (aligned) in the order given: many at once, or by as few calls as their addresses allow."""
    if len(first) > 1 and device.read_scattered(first.astype(np.int64), blocks.astype(np.int64), buffer):
        return
    ends = np.cumsum(blocks, dtype=np.int64)
    order = np.argsort(first, kind="stable")
    addresses = first[order].astype(np.int64)
    gaps = np.zeros(len(order), dtype=np.int64)
    gaps[1:] = addresses[1:] - (addresses + blocks[order].astype(np.int64))[:-1]
    scratch = aligned(NEAR_BLOCKS * BLOCK_BYTES)
    group: list[_Run] = []
    vector: list[memoryview] = []
    table = zip(addresses.tolist(), blocks[order].tolist(), ends[order].tolist(), gaps.tolist(), strict=True)
    for address, count, end, gap in table:
        if group and (not 0 <= gap <= NEAR_BLOCKS or len(vector) + 2 > MAX_VECTOR):
            _read_group(device, group, vector)
            group, vector = [], []
        elif group and gap:
            vector.append(scratch[: gap * BLOCK_BYTES])
        group.append(_Run(address, buffer[(end - count) * BLOCK_BYTES : end * BLOCK_BYTES]))
        vector.append(group[-1].data)
    if group:
        _read_group(device, group, vector)


class _Run(NamedTuple):
    """Where a run is and where its data goes."""

    first: int
    data: memoryview


def _read_group(device: Device, group: list[_Run], vector: list[memoryview]) -> None:
    """Read coalesced runs; where that fails read them one by one, since the bad block may be one that nobody asked for."""
    try:
        device.read_into(group[0].first, vector)
    except DeviceFailed:
        if len(group) == 1:
            raise
        for run in group:
            device.read_into(run.first, [run.data])


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Runs that are read together: ``length`` blocks, at ``position`` of the concatenation."""

    position: int
    length: int
    first: U64
    blocks: U64


def _batches(first: U64, blocks: U64, batch_blocks: int) -> Iterator[_Batch]:
    """Yield the runs in batches of exactly ``batch_blocks`` (the last one fewer); a run that does not fit is split."""
    ends = np.cumsum(blocks, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    for position in range(0, total, batch_blocks):
        stop = min(position + batch_blocks, total)
        low = int(np.searchsorted(ends, position, side="right"))
        high = int(np.searchsorted(ends, stop, side="left")) + 1
        begins = first[low:high].astype(np.uint64)
        counts = blocks[low:high].astype(np.uint64)
        skip = position - (int(ends[low]) - int(blocks[low]))
        begins[0] += np.uint64(skip)
        counts[0] -= np.uint64(skip)
        counts[-1] -= np.uint64(int(ends[high - 1]) - stop)
        yield _Batch(position, stop - position, begins, counts)


def _in_order(act: Callable[[_Batch], T], batches: Iterator[_Batch], workers: int, ahead: int) -> Iterator[tuple[_Batch, T]]:
    """Yield each batch with what ``act`` made of it, in order; at most ``ahead`` are begun and not yet yielded.

    One worker is the calling thread itself.
    """
    if workers == 1:
        for batch in batches:
            yield batch, act(batch)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as executor:
        begun: deque[tuple[_Batch, Future[T]]] = deque()
        try:
            for batch in batches:
                begun.append((batch, executor.submit(act, batch)))
                if len(begun) >= ahead:
                    done, future = begun.popleft()
                    yield done, future.result()
            while begun:
                done, future = begun.popleft()
                yield done, future.result()
        finally:
            for _, future in begun:
                future.cancel()
