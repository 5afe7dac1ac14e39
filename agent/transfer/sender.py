"""NAS 1's side of one transfer: connect, prove who we are, send the DMI and then what the other side lacks of the pieces, in send order.

Every stream has threads that read from the volumes and send, and one that listens. Death of this side at any point leaves the other with
what it recorded; the next ``send`` of the same transfer sends only what is missing.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

import numpy as np
import zstandard
from numpy.typing import NDArray

from agent.blockio.buffers import aligned
from agent.blockio.device import Device
from agent.blockio.scatter import gather
from agent.contract import frames
from agent.contract.arrival import Arrived
from agent.contract.columns import identity
from agent.contract.dmi import HOLE, U8, U32, Dmi
from agent.contract.errors import DeviceFailed, LandfallError, LinkLost, ProtocolViolated
from agent.contract.frames import FrameType, Hello, Part
from agent.contract.identity import BLOCK_BYTES
from agent.contract.messages import Differential, Progress, Sent, TlsMaterial
from agent.system.failpoint import failpoint
from agent.transfer import tls
from agent.transfer.group import ThreadGroup
from agent.transfer.order import send_order
from agent.transfer.rate import RateLimit
from agent.transfer.stream import HEARTBEAT_S, Stream

_ROWS: Final = 4096
_READERS: Final = 2
"""Threads of each stream: one reads from the volumes while the other sends."""
_SAMPLE_BYTES: Final = 64 * 1024
_PAYS: Final = 0.85
"""Compression pays if what it makes is at most this share of what it is made of."""


@dataclass(frozen=True, slots=True)
class SendJob:
    """All that a sending needs. ``dmi`` is what ``dmi_bytes`` say; ``target`` and ``base`` are devices of the two generations."""

    transfer: UUID
    address: str
    port: int
    differential: Differential
    streams: int
    token: str
    tls: TlsMaterial
    dmi: Dmi
    dmi_bytes: memoryview
    target: Path
    base: Path
    priorities: tuple[tuple[str, int], ...] = ()
    silence_limit_s: float = 10.0
    connect_limit_s: float = 10.0
    rate_limit_bytes_s: int = 0
    batch_bytes: int = 1 << 20
    compress: bool = True
    progress: Callable[[Progress], None] = lambda _: None
    cancelled: threading.Event | None = None


def send(job: SendJob) -> Sent:
    """Send what the other side lacks and return when it has committed. LinkLost may be tried again; other errors are the peer's or ours."""
    sending = _Sending(job)
    try:
        return sending.run()
    except BaseException as error:
        sending.group.fail(error)
        failure = sending.group.failure
        raise (failure if failure is not None else error) from None
    finally:
        sending.close()


@dataclass(frozen=True, slots=True, eq=False)
class _Generations:
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


class _Work:
    """What is left to send, dealt out in send order; and how much of it the other side says is durable."""

    def __init__(self, job: SendJob, bits: U8) -> None:
        dmi = job.dmi
        update = (bits & int(Arrived.UPDATE)) == 0
        differential = (bits & int(Arrived.DIFFERENTIAL)) == 0
        if job.differential is Differential.VERIFY:
            # The other side proves its own base when the update data comes; only where it could not do we send ours.
            differential &= ~update
        self.parts: U8 = (update * np.uint8(Part.UPDATE) + differential * np.uint8(Part.DIFFERENTIAL)).astype(np.uint8)
        order = send_order(dmi, job.priorities, job.differential)
        self._order: U32 = order[self.parts[order] != 0]
        self.skipped = dmi.piece_total - len(self._order)
        blocks = _blocks(dmi, self._order, self.parts[self._order], Part.UPDATE)
        blocks += _blocks(dmi, self._order, self.parts[self._order], Part.DIFFERENTIAL)
        self._ends = np.cumsum(blocks) * BLOCK_BYTES
        self._batch_bytes = job.batch_bytes
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


class _Sending:
    """One run of ``send``."""

    def __init__(self, job: SendJob) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._streams: list[Stream] = []
        self._work: _Work | None = None
        self._finished = self._acknowledged = False
        self._committed = threading.Event()  # or failed: whoever waits for it looks
        self._over = threading.Event()
        self.group = ThreadGroup("send", self._break)
        self._writers = ThreadGroup("write", self.group.fail)
        self._context = tls.connecting(job.tls)
        self._rate = RateLimit(job.rate_limit_bytes_s, self.group.ended)

    def run(self) -> Sent:
        job = self._job
        failpoint("src.before_connect")
        first, welcome = self._connect(0)
        failpoint("src.after_connect")
        self.group.start(self._beat)
        if welcome.committed:
            return Sent(first.bytes_sent, 0, job.dmi.piece_total, 0)
        if welcome.dmi_wanted:
            try:
                self._send_dmi(first)
            except LinkLost:
                self._expect(first, FrameType.DMI_STORED)  # raises what the other side said, if it said something
                raise
        work = self._work = _Work(job, self._receive_state(first))
        with Device.open_reading(job.target) as target, Device.open_reading(job.base) as base:
            for device in (target, base):
                if device.size_bytes != job.dmi.head.volume_bytes:
                    raise DeviceFailed(f"{device.path} has another size than its DMI says", cause=f"{device.size_bytes} bytes")
            try:
                self._send_pieces(first, work, _Generations(job.dmi, target, base))
            finally:
                work.end()
                self._writers.wait()
        failpoint("src.before_commit")
        self._finished = True
        first.send(frames.encode(FrameType.FINISH))
        failpoint("src.after_finish")
        self._wait_committed()
        failpoint("src.after_commit")
        return Sent(sum(stream.bytes_sent for stream in self._streams), work.sent, work.skipped, work.healed)

    def close(self) -> None:
        """End every thread and free every connection."""
        self._over.set()
        self.group.end()
        for stream in self._all():
            stream.abort()
        self.group.wait()
        for stream in self._all():
            stream.close()

    # the steps, in order

    def _connect(self, number: int) -> tuple[Stream, frames.Welcome]:
        job = self._job
        try:
            raw = socket.create_connection((job.address, job.port), timeout=job.connect_limit_s)
        except OSError as error:
            raise LinkLost(f"{job.address} port {job.port} cannot be reached", cause=str(error)) from error
        stream = Stream.open(
            raw, self._context, peer=job.tls.peer, server_side=False, limit_s=job.connect_limit_s, silence_limit_s=job.silence_limit_s
        )
        with self._lock:
            self._streams.append(stream)
        hello = Hello(
            frames.PROTOCOL,
            job.transfer,
            job.token,
            number,
            job.streams,
            job.differential,
            len(job.dmi_bytes),
            identity(job.dmi_bytes).hex(),
        )
        stream.send(frames.encode_hello(hello))
        return stream, frames.decode_welcome(self._expect(stream, FrameType.WELCOME))

    def _send_dmi(self, first: Stream) -> None:
        failpoint("src.before_mgmtinfo")
        view = self._job.dmi_bytes
        for at in range(0, len(view), frames.CHUNK_BYTES):
            chunk = view[at : at + frames.CHUNK_BYTES]
            self._rate.spend(len(chunk))
            first.send(frames.encode(FrameType.DMI, [chunk]), between=partial(failpoint, "src.within_mgmtinfo"))
            self._job.progress(Progress("management information", at + len(chunk), len(view)))
        failpoint("src.after_mgmtinfo")

    def _receive_state(self, first: Stream) -> U8:
        """Return what the other side has of each piece, once the DMI is durable there."""
        stored = self._expect(first, FrameType.DMI_STORED)
        if bytes(stored) != identity(self._job.dmi_bytes):
            raise ProtocolViolated("the other side stored another DMI than the one sent")
        failpoint("src.after_dmi_stored")
        state = bytearray()
        while len(state) < self._job.dmi.piece_total:
            state += self._expect(first, FrameType.STATE)
        if len(state) != self._job.dmi.piece_total:
            raise ProtocolViolated("the other side speaks of more pieces than there are")
        return np.frombuffer(bytes(state), dtype=np.uint8)

    def _send_pieces(self, first: Stream, work: _Work, generations: _Generations) -> None:
        """Return when every piece is durable on the other side."""
        self.group.start(partial(self._listen, first, work), listens=True)
        streams = [first, *(self._connect(number)[0] for number in range(1, self._job.streams))]
        for stream in streams[1:]:
            self.group.start(partial(self._listen, stream, work), listens=True)
        for stream in streams * _READERS:
            self._writers.start(partial(self._write, stream, work, generations))
        work.wait()
        if self.group.ended.is_set():
            raise self.group.failure or LinkLost("the sending ended")

    def _wait_committed(self) -> None:
        self._committed.wait()
        if not self._acknowledged:
            raise self.group.failure or LinkLost("the sending ended")

    def _expect(self, stream: Stream, kind: FrameType) -> memoryview:
        frame = stream.receive()
        if frame.type is FrameType.ERROR:
            raise frames.decode_error(frame.payload)
        if frame.type is not kind:
            raise ProtocolViolated(f"a {frame.type.name} frame came where {kind.name} was expected")
        return frame.payload

    # threads

    def _write(self, stream: Stream, work: _Work, generations: _Generations) -> None:
        """Send batches until there is nothing left to send."""
        buffer = aligned(frames.MAX_RAW_BYTES)
        compressor = zstandard.ZstdCompressor(level=1)
        while (taken := work.take()) is not None:
            rows, parts = taken
            data = generations.read(rows, parts, buffer)
            packed = _packed(compressor, data) if self._job.compress else None
            frame = frames.encode_batch(rows, parts, len(data), data if packed is None else packed, compressed=packed is not None)
            self._rate.spend(sum(map(len, frame)))
            failpoint("src.before_batch")
            stream.send(frame, between=partial(failpoint, "src.within_batch"))
            failpoint("src.after_batch")

    def _listen(self, stream: Stream, work: _Work) -> None:
        """Take what the other side says until it has committed."""
        total = self._job.dmi.piece_total
        while True:
            frame = stream.receive()
            match frame.type:
                case FrameType.PROGRESS:
                    complete = frames.decode_progress(frame.payload)
                    work.completed(complete)
                    self._job.progress(Progress("pieces", complete, total))
                case FrameType.NEED_DIFFERENTIAL:
                    rows = frames.decode_need(frame.payload)
                    if len(rows) and int(rows.max()) >= total:
                        raise ProtocolViolated("the other side needs a piece that is not there")
                    work.need(rows)
                case FrameType.COMMITTED if self._finished:
                    self._acknowledged = True
                    self.group.end()
                    self._committed.set()
                    return
                case FrameType.ERROR:
                    raise frames.decode_error(frame.payload)
                case _:
                    raise ProtocolViolated(f"a {frame.type.name} frame came where progress was expected")

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_S):
            if self._job.cancelled is not None and self._job.cancelled.is_set():
                raise LinkLost("the sending was cancelled")
            for stream in self._all():
                stream.heartbeat()

    def _break(self, error: BaseException) -> None:
        """Tell the other side why, and wake every thread."""
        for stream in self._all():
            if not isinstance(error, LinkLost):
                stream.complain(error if isinstance(error, LandfallError) else LandfallError(f"{type(error).__name__} on the source"))
            stream.abort()
        if self._work is not None:
            self._work.end()
        self._committed.set()

    def _all(self) -> list[Stream]:
        with self._lock:
            return list(self._streams)


def _blocks(dmi: Dmi, rows: U32, parts: U8, part: Part) -> NDArray[np.int64]:
    """Return how many blocks of data each row has for one part: none if it does not carry it, or if it is a hole."""
    hole = dmi.target_hole[rows] != 0 if part is Part.UPDATE else dmi.diff_block[rows] == HOLE
    return np.where(((parts & int(part)) != 0) & ~hole, dmi.block_count[rows], 0).astype(np.int64)


def _packed(compressor: zstandard.ZstdCompressor, data: memoryview) -> bytes | None:
    """Return ``data`` compressed; None where a sample, or the result, says that it does not pay."""
    if len(data) > 2 * _SAMPLE_BYTES:
        middle = len(data) // 2
        sample = data[middle : middle + _SAMPLE_BYTES]
        if len(compressor.compress(sample)) > _PAYS * len(sample):
            return None
    packed = compressor.compress(data)
    return packed if len(packed) <= _PAYS * len(data) else None
