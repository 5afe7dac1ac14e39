"""NAS 2's side of one transfer: a port for one peer and one token, open until the transfer is committed or broken off.

The steps: a stream proves itself (TLS, token); the DMI comes and is made durable; the landing volume is made ready; pieces come on all
streams and are recorded; the source says it has sent everything; every piece is read back; commit; acknowledge. A failpoint stands
before and after each.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

import numpy as np

from agent.blockio.device import Device
from agent.contract import frames
from agent.contract.arrival import Arrived
from agent.contract.columns import identity
from agent.contract.dmi import U32, Dmi
from agent.contract.errors import BaseMismatch, DeviceFailed, LandfallError, LinkLost, PeerRefused, ProtocolViolated, RecordMalformed
from agent.contract.frames import FrameType, Hello, Welcome
from agent.contract.identity import GenerationId
from agent.contract.messages import Differential, Progress, TlsMaterial
from agent.system.failpoint import failpoint
from agent.system.files import rename_durably
from agent.transfer import tls
from agent.transfer.door import Door, DoorRules, is_token
from agent.transfer.group import ThreadGroup
from agent.transfer.landing import Landing
from agent.transfer.store import ArrivalWriter, TransferStore
from agent.transfer.stream import HEARTBEAT_S, Stream, complaint

_GROUP_COMMIT_S: Final = 0.5
_LINGER_S: Final = 3.0
_WORKERS: Final = 8
"""Threads that check and write pieces."""


@dataclass(frozen=True, slots=True)
class Volumes:
    """Devices of a transfer on NAS 2: the landing volume, writable and nobody else's, and the base, read-only."""

    landing: Path
    base: Path


@dataclass(frozen=True, slots=True)
class ReceiveJob:
    """All that a reception needs. The transfer must be in ``store``; its DMI and arrival record are there if it is resumed.

    ``prepare`` makes (or finds) the landing workspace of a checked DMI and attaches it and the base for as long as its context lasts.
    ``heal`` does the same for the writable clone of the base, and is entered only when a base block differs. ``commit`` is called when
    every piece is verified and both contexts have ended; it puts the landing volume, and the healed base if there is one, in their place.
    """

    transfer: UUID
    base: GenerationId
    target: GenerationId
    differential: Differential
    streams: int
    token: str
    tls: TlsMaterial
    store: TransferStore
    prepare: Callable[[Dmi], AbstractContextManager[Volumes]]
    heal: Callable[[], AbstractContextManager[Path]]
    commit: Callable[[], None]
    address: str
    port: int = 0
    committed: bool = False  # the transfer is committed here already: only say so
    silence_limit_s: float = 10.0
    handshake_limit_s: float = 10.0
    connect_limit_s: float = 60.0
    max_dmi_bytes: int = 8 << 30
    progress: Callable[[Progress], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Received:
    """The transfer is committed here. Counts are of this session; ``refused`` are the connections that were turned away, in words."""

    pieces: int
    bytes_received: int
    healed: int
    refused: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A stream that proved itself, and what it said."""

    stream: Stream
    hello: Hello


class Receiver:
    """The open port of one transfer. ``run`` once; ``cancel`` from another thread breaks it off."""

    def __init__(self, job: ReceiveJob) -> None:
        """Listen on the job's address; LinkLost if it is not this node's."""
        self._job = job
        rules = DoorRules(job.address, job.port, job.tls.peer, job.streams, job.handshake_limit_s, job.silence_limit_s)
        self._door = Door(rules, tls.listening(job.tls), self._register)
        self.address, self.port = self._door.address, self._door.port
        self._lock = threading.Lock()
        self._streams: dict[int, Stream] = {}
        self._first: queue.SimpleQueue[_Admitted | None] = queue.SimpleQueue()
        self._landing: Landing | None = None
        self._finish = threading.Event()
        self._group = ThreadGroup("receive", self._break)
        self._over = threading.Event()

    def run(self) -> Received:
        """Receive until committed. LinkLost: what arrived is recorded and can be resumed or salvaged; other errors say what was refused.

        If we die here the arrival record says what is durable in the landing volume, and nothing is committed, or the commit is done.
        """
        try:
            self._group.start(self._door.watch)
            self._group.start(self._beat)
            return self._receive()
        except BaseException as error:
            self._group.fail(error)
            self._over.set()
            failure = self._group.failure
            raise (failure if failure is not None else error) from None
        finally:
            self._close()

    def cancel(self) -> None:
        """Break the reception off; ``run`` raises LinkLost."""
        self._group.fail(LinkLost("the reception was cancelled"))

    # the steps, in order

    def _receive(self) -> Received:
        first = self._first_stream()
        if self._job.committed:
            first.stream.send(frames.encode_welcome(Welcome(dmi_wanted=False, committed=True)))
            self._linger(first.stream)
            return self._received(0, 0)
        dmi, digest = self._receive_dmi(first)
        writer = self._open_record(dmi, digest)
        try:
            before = writer.bits.copy()
            self._receive_pieces(first.stream, dmi, digest, writer)
            healed = int(np.count_nonzero((writer.bits != before) & (writer.bits & int(Arrived.HEALED) != 0)))
            arrived = int(np.count_nonzero(writer.bits != before))
        finally:
            writer.close()
        failpoint("dst.before_commit")
        self._job.commit()
        failpoint("dst.after_commit")
        failpoint("dst.before_ack")
        self._acknowledge(first.stream)
        failpoint("dst.after_ack")
        return self._received(arrived, healed)

    def _first_stream(self) -> _Admitted:
        try:
            first = self._first.get(timeout=self._job.connect_limit_s)
        except queue.Empty:
            refused = f"; refused: {'; '.join(self._door.refused)}" if self._door.refused else ""
            raise LinkLost(f"the source did not connect within {self._job.connect_limit_s:g} s{refused}") from None
        if first is None:
            raise self._group.failure or LinkLost("the reception ended")
        return first

    def _receive_dmi(self, first: _Admitted) -> tuple[Dmi, bytes]:
        """Return the DMI and its identity; on return it is durable, whole and this transfer's."""
        job, hello, stream = self._job, first.hello, first.stream
        wanted = not job.store.has_dmi(job.transfer)
        if not wanted and job.store.dmi_digest(job.transfer).hex() != hello.dmi_digest:
            raise ProtocolViolated("the source has another DMI for this transfer than the one received before", fix="Discard the transfer.")
        stream.send(frames.encode_welcome(Welcome(dmi_wanted=wanted, committed=False)))
        if wanted:
            raw = self._receive_dmi_bytes(stream, hello.dmi_bytes)
            if identity(raw).hex() != hello.dmi_digest:
                raise ProtocolViolated("the DMI that came is not the one that was announced")
            dmi = Dmi.decode(raw)
            self._check_head(dmi)
            failpoint("dst.before_dmi_durable")
            chunk = frames.CHUNK_BYTES
            job.store.store_dmi(job.transfer, (bytes(raw[at : at + chunk]) for at in range(0, len(raw), chunk)))
            failpoint("dst.after_dmi_durable")
        else:
            dmi = job.store.dmi(job.transfer)
            self._check_head(dmi)
        return dmi, bytes.fromhex(hello.dmi_digest)

    def _receive_dmi_bytes(self, stream: Stream, length: int) -> memoryview:
        if length > self._job.max_dmi_bytes:
            raise ProtocolViolated(f"a DMI of {length} bytes is larger than this node takes")
        raw = bytearray()  # grows with what comes, not with what was announced
        while len(raw) < length:
            frame = self._next(stream)
            if frame.type is not FrameType.DMI or len(raw) + len(frame.payload) > length:
                raise ProtocolViolated(f"a {frame.type.name} frame came where the DMI was expected")
            raw += frame.payload
        return memoryview(raw).toreadonly()

    def _check_head(self, dmi: Dmi) -> None:
        head, job = dmi.head, self._job
        if head.base != job.base:
            raise BaseMismatch("the DMI is of another base than the one ordered", cause=f"{head.base.name}, not {job.base.name}")
        if head.transfer != job.transfer or head.target != job.target:
            raise ProtocolViolated("the DMI is of another transfer than the one ordered", cause=f"{head.transfer}, {head.target.name}")

    def _open_record(self, dmi: Dmi, digest: bytes) -> ArrivalWriter:
        """Return the open arrival record. One that is damaged is put aside: its pieces are fetched again."""
        path = self._job.store.arrival_path(self._job.transfer)
        try:
            return ArrivalWriter(path, self._job.transfer, digest, dmi.piece_total)
        except RecordMalformed:
            rename_durably(path, path.with_name("arrival.damaged"))
            return ArrivalWriter(path, self._job.transfer, digest, dmi.piece_total)

    def _receive_pieces(self, first: Stream, dmi: Dmi, digest: bytes, writer: ArrivalWriter) -> None:
        """Return when every piece is in the landing volume, recorded, and read back from there. All devices are closed then."""
        failpoint("dst.before_prepare")
        with ExitStack() as stack:
            volumes = stack.enter_context(self._job.prepare(dmi))
            failpoint("dst.after_prepare")
            landing_device = stack.enter_context(Device.open_writing(volumes.landing))
            base_device = stack.enter_context(Device.open_reading(volumes.base))
            if landing_device.size_bytes != dmi.head.volume_bytes or base_device.size_bytes != dmi.head.volume_bytes:
                raise DeviceFailed(
                    "the volume has another size here than at the source",
                    cause=f"{landing_device.size_bytes} and {dmi.head.volume_bytes} bytes",
                    fix="Make the replica as large as the volume.",
                )

            def heal() -> Device:
                return stack.enter_context(Device.open_writing(stack.enter_context(self._job.heal())))

            landing = Landing(dmi, writer, landing_device, base_device, heal)
            stack.callback(landing.close)
            for _ in range(_WORKERS):  # before anybody is let in: what a stream brings is waited for at the end
                self._group.start(landing.work)
            with self._lock:
                self._landing = landing  # from here other streams are let in: the source opens them once it knows the state
            first.send(frames.encode(FrameType.DMI_STORED, [digest]))
            state = writer.bits.tobytes()
            for at in range(0, len(state), frames.CHUNK_BYTES):
                first.send(frames.encode(FrameType.STATE, [state[at : at + frames.CHUNK_BYTES]]))
            self._group.start(lambda: self._read(first, landing), listens=True)
            try:
                self._record(first, landing, dmi.piece_total)
            except BaseException as error:
                self._group.fail(error)
                raise
            finally:
                landing.close()
            failpoint("dst.before_verify")
            landing.verify()
            failpoint("dst.after_verify")

    def _record(self, first: Stream, landing: Landing, total: int) -> None:
        """Commit what comes in groups until the source says it has sent all; LandfallError of whichever thread failed first."""
        self._say_progress(first, landing.complete, total, np.zeros(0, dtype=np.uint32))
        while not self._group.ended.is_set():
            recorded = landing.record(_GROUP_COMMIT_S)
            if recorded is not None:
                self._say_progress(first, recorded.complete, total, recorded.need)
            elif self._finish.is_set():
                if landing.complete != total:
                    raise ProtocolViolated(f"the source says it has sent everything, and {total - landing.complete} pieces are missing")
                return
        # What was written when the link broke is worth recording, unless the disk is why it broke.
        landing.close()
        with suppress(LandfallError):
            landing.record(0.0)
        raise self._group.failure or LinkLost("the reception ended")

    def _say_progress(self, first: Stream, complete: int, total: int, need: U32) -> None:
        self._job.progress(Progress("receive", complete, total))
        for frame in frames.encode_need(need):
            first.send(frame)
        first.send(frames.encode_progress(complete))

    def _acknowledge(self, first: Stream) -> None:
        """Say that it is committed. It is, whether the source hears it or not: it asks again."""
        self._group.end()
        with suppress(LandfallError):
            first.send(frames.encode(FrameType.COMMITTED))
        self._linger(first)

    def _linger(self, first: Stream) -> None:
        """Wait until the source has closed: a connection that is closed with unread heartbeats in it takes our last word with it."""
        with suppress(LandfallError):
            while True:
                first.receive(_LINGER_S)

    def _received(self, pieces: int, healed: int) -> Received:
        with self._lock:
            received = sum(stream.bytes_received for stream in self._streams.values())
        return Received(pieces, received, healed, self._door.refused)

    # threads

    def _register(self, stream: Stream, hello: Hello) -> None:
        """Make a stream one of the transfer's; PeerRefused if it shows no right to be."""
        job = self._job
        entitled = is_token(hello.token, job.token) and hello.transfer == job.transfer
        if not entitled:
            raise PeerRefused("the token is not that of this transfer")
        if hello.streams != job.streams or hello.differential is not job.differential:
            raise ProtocolViolated("source and target were given different orders", cause=f"{hello.streams} streams, {hello.differential}")
        with self._lock:
            if self._over.is_set() or hello.stream in self._streams:
                raise PeerRefused("the token was used before")
            landing = self._landing
            if hello.stream and landing is None:
                raise ProtocolViolated("a second stream came before the DMI")
            self._streams[hello.stream] = stream
        if landing is None:
            self._first.put(_Admitted(stream, hello))
        else:
            stream.send(frames.encode_welcome(Welcome(dmi_wanted=False, committed=False)))
            self._group.start(lambda: self._read(stream, landing), listens=True)

    def _read(self, stream: Stream, landing: Landing) -> None:
        """Take what a stream brings until the source is done."""
        while True:
            frame = self._next(stream)
            if frame.type is FrameType.BATCH:
                landing.offer(frames.decode_batch(frame))
            elif frame.type is FrameType.FINISH:
                self._finish.set()
                landing.stop()
                return
            else:
                raise ProtocolViolated(f"a {frame.type.name} frame came where pieces were expected")

    def _next(self, stream: Stream) -> frames.Frame:
        frame = stream.receive()
        if frame.type is FrameType.ERROR:
            raise LinkLost("the source gave the transfer up", cause=str(frames.decode_error(frame.payload)))
        return frame

    def _beat(self) -> None:
        """Show the source that we live, also while a disk is slow."""
        while not self._over.wait(HEARTBEAT_S):
            with self._lock:
                streams = list(self._streams.values())
            for stream in streams:
                stream.heartbeat()

    # the end

    def _break(self, error: BaseException) -> None:
        """Tell the source why, and wake every thread."""
        with self._lock:
            streams = list(self._streams.values())
            landing = self._landing
        if landing is not None:
            landing.stop()
        for stream in streams:
            if not isinstance(error, LinkLost):
                stream.complain(complaint(error, "target"))
            stream.abort()
        self._first.put(None)

    def _close(self) -> None:
        """End every thread and free every connection."""
        self._over.set()
        self._group.end()
        self._door.close()
        with self._lock:
            streams = list(self._streams.values())
        for stream in streams:
            stream.abort()
        self._group.wait()
        self._door.free()
        for stream in streams:
            stream.close()
