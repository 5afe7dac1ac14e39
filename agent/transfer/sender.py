"""NAS 1's side of one transfer: connect, prove who we are, send the DMI and then what the other side lacks of the pieces, in send order.

Every stream has threads that read from the volumes and send, and one that listens. Death of this side at any point leaves the other with
what it recorded; the next ``send`` of the same transfer sends only what is missing.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

import numpy as np
import zstandard

from agent.blockio.buffers import aligned
from agent.blockio.device import Device
from agent.contract import frames
from agent.contract.columns import identity
from agent.contract.dmi import U8, Dmi
from agent.contract.errors import DeviceFailed, LandfallError, LinkLost, ProtocolViolated
from agent.contract.frames import FrameType, Hello
from agent.contract.messages import Differential, Progress, Sent, TlsMaterial
from agent.system.failpoint import failpoint
from agent.transfer import tls
from agent.transfer.group import ThreadGroup
from agent.transfer.order import send_order
from agent.transfer.rate import RateLimit
from agent.transfer.stream import HEARTBEAT_S, Stream
from agent.transfer.work import Generations, Work

_READERS: Final = 2
"""Threads of each stream: one reads from the volumes while the other sends."""
_SAMPLE_BYTES: Final = 64 * 1024
_PAYS: Final = 0.85
"""Compression pays if what it makes is at most this share of what it is made of."""


@dataclass(frozen=True, slots=True)
class SendJob:
    """All that a sending needs. ``dmi`` is what ``dmi_bytes`` say; ``target`` and ``base`` are devices of the two generations.

    ``still_sound`` raises if one of them was lost since: it is asked after the last read, before the other side may commit.
    """

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
    still_sound: Callable[[], None] = lambda: None
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


class _Sending:
    """One run of ``send``."""

    def __init__(self, job: SendJob) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._streams: list[Stream] = []
        self._work: Work | None = None
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
        work = self._work = Work(
            job.dmi, send_order(job.dmi, job.priorities, job.differential), job.differential, self._receive_state(first), job.batch_bytes
        )
        with Device.open_reading(job.target) as target, Device.open_reading(job.base) as base:
            for device in (target, base):
                if device.size_bytes != job.dmi.head.volume_bytes:
                    raise DeviceFailed(f"{device.path} has another size than its DMI says", cause=f"{device.size_bytes} bytes")
            try:
                self._send_pieces(first, work, Generations(job.dmi, target, base))
            finally:
                work.end()
                self._writers.wait()
        failpoint("src.before_commit")
        job.still_sound()
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

    def _send_pieces(self, first: Stream, work: Work, generations: Generations) -> None:
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

    def _write(self, stream: Stream, work: Work, generations: Generations) -> None:
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

    def _listen(self, stream: Stream, work: Work) -> None:
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


def _packed(compressor: zstandard.ZstdCompressor, data: memoryview) -> bytes | None:
    """Return ``data`` compressed; None where a sample, or the result, says that it does not pay."""
    if len(data) > 2 * _SAMPLE_BYTES:
        middle = len(data) // 2
        sample = data[middle : middle + _SAMPLE_BYTES]
        if len(compressor.compress(sample)) > _PAYS * len(sample):
            return None
    packed = compressor.compress(data)
    return packed if len(packed) <= _PAYS * len(data) else None
