"""Frames over one TLS connection. One thread receives, any thread sends; a peer that says nothing for too long is gone.

OpenSSL's connection object is not for two threads at once, so every call into it is made without blocking under one lock, and the waiting
is done outside of it.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from typing import Final

from agent.contract.errors import DeviceFailed, LandfallError, LinkLost
from agent.contract.frames import Buffer, Frame, FrameType, encode, encode_error, read_frame
from agent.system.clock import monotonic_s
from agent.transfer.tls import check_peer, mapped

HEARTBEAT_S: Final = 1.0
_SLICE_BYTES: Final = 256 * 1024
_SLOWEST_BYTES_S: Final = 16 * 1024
"""A frame that comes slower than this on average is a peer that trickles to hold the port."""

_FRAME_S: Final = 60.0
_HEARTBEAT: Final = b"".join(map(bytes, encode(FrameType.HEARTBEAT)))


class Stream:
    """One connection, its peer proved. Counts ``bytes_sent`` and ``bytes_received`` before TLS."""

    def __init__(self, connection: ssl.SSLSocket, silence_limit_s: float) -> None:
        self._connection = connection
        self._silence_limit_s = silence_limit_s
        self._ssl_lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._closed = False
        self.bytes_sent = 0
        self.bytes_received = 0

    @staticmethod
    def open(
        raw: socket.socket, context: ssl.SSLContext, *, peer: str, server_side: bool, limit_s: float, silence_limit_s: float
    ) -> Stream:
        """Return a stream over ``raw`` once ``peer`` has proved itself; PeerRefused, or LinkLost after ``limit_s``.

        On failure ``raw`` is closed.
        """
        deadline = monotonic_s() + limit_s
        try:
            raw.setblocking(False)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = context.wrap_socket(raw, server_side=server_side, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:
            raw.close()
            raise LinkLost("the connection broke before the handshake", cause=str(error)) from error
        try:
            while True:
                try:
                    connection.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    _wait(connection, select.POLLIN, deadline, "the handshake")
                except ssl.SSLWantWriteError:
                    _wait(connection, select.POLLOUT, deadline, "the handshake")
        except OSError as error:
            connection.close()
            raise mapped(error, "the handshake") from error
        except BaseException:
            connection.close()
            raise
        stream = Stream(connection, silence_limit_s)
        try:
            check_peer(connection, peer)
        except LandfallError as error:
            stream.complain(error)
            stream.close()
            raise
        return stream

    def send(self, frame: Sequence[Buffer], between: Callable[[], None] | None = None) -> None:
        """Send a frame. Waits as long as the peer lives and does not read: its silence is noticed by who receives.

        ``between`` is called when half of the frame's buffers are out.
        """
        with self._send_lock:
            for number, buffer in enumerate(frame):
                if between is not None and number == len(frame) - 1:
                    between()
                self._send_all(memoryview(buffer).cast("B"))

    def heartbeat(self) -> None:
        """Send a sign of life, unless something is being sent anyway or the peer does not read."""
        if self._send_lock.acquire(blocking=False):
            try:
                if not self._closed and _ready(self._connection, select.POLLOUT, 0):
                    self._send_all(memoryview(_HEARTBEAT))
            finally:
                self._send_lock.release()

    def receive(self, limit_s: float | None = None) -> Frame:
        """Return the next frame that is no heartbeat; LinkLost after the silence limit, or after ``limit_s``."""
        deadline = None if limit_s is None else monotonic_s() + limit_s
        while True:
            frame = read_frame(_Reader(self, deadline).read)
            if frame.type is not FrameType.HEARTBEAT:
                return frame

    def complain(self, error: LandfallError) -> None:
        """Tell the peer why this is the end, if it can be told at once."""
        if self._send_lock.acquire(timeout=0.5):
            try:
                self._send_all(memoryview(b"".join(map(bytes, encode_error(error)))), monotonic_s() + 0.5)
            except LandfallError:
                return
            finally:
                self._send_lock.release()

    def abort(self) -> None:
        """Break the connection under whoever waits on it; they see LinkLost. ``close`` frees it."""
        self._closed = True
        try:
            # SSLSocket's own shutdown drops the TLS state under a thread that may be using it.
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Free the connection; nobody may be waiting on it any more."""
        self._closed = True
        with self._ssl_lock:
            self._connection.close()

    def _send_all(self, view: memoryview, deadline: float | None = None) -> None:
        at = 0
        while at < len(view):
            part = view[at : at + _SLICE_BYTES]
            try:
                with self._ssl_lock:
                    sent = self._connection.send(part)
                at += sent
                self.bytes_sent += sent
            except ssl.SSLWantWriteError:
                _wait(self._connection, select.POLLOUT, deadline, "sending")
            except ssl.SSLWantReadError:
                _wait(self._connection, select.POLLIN, deadline, "sending")
            except OSError as error:
                raise mapped(error, "sending") from error
            except ValueError as error:
                raise LinkLost("the connection was closed while sending", cause=str(error)) from error

    def receive_some(self, view: memoryview, deadline: float | None) -> int:
        """Fill the beginning of ``view`` with what has come, waiting for at least one byte; return how many."""
        silent_until = monotonic_s() + self._silence_limit_s
        until = silent_until if deadline is None else min(silent_until, deadline)
        while True:
            try:
                with self._ssl_lock:
                    got = self._connection.recv_into(view)
            except ssl.SSLWantReadError:
                _wait(self._connection, select.POLLIN, until, "waiting for the peer")
                continue
            except ssl.SSLWantWriteError:
                _wait(self._connection, select.POLLOUT, until, "waiting for the peer")
                continue
            except OSError as error:
                raise mapped(error, "receiving") from error
            except ValueError as error:
                raise LinkLost("the connection was closed while receiving", cause=str(error)) from error
            if not got:
                raise LinkLost("the peer closed the connection")
            self.bytes_received += got
            return got


class _Reader:
    """Reads one frame's bytes within its deadline."""

    def __init__(self, stream: Stream, deadline: float | None) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, length: int) -> memoryview:
        buffer = memoryview(bytearray(length))
        got = 0
        if self._deadline is not None:
            self._deadline += length / _SLOWEST_BYTES_S
        while got < length:
            got += self._stream.receive_some(buffer[got:], self._deadline)
            if self._deadline is None:
                # It has begun: from here the whole frame has a deadline, not each byte of it.
                self._deadline = monotonic_s() + _FRAME_S
        return buffer


def complaint(error: BaseException, side: str) -> LandfallError:
    """Return what the peer is told of a failure here, which is the ``side`` of the transfer."""
    if isinstance(error, LandfallError):
        return error
    if isinstance(error, OSError):
        return DeviceFailed(f"a disk of the {side} failed", cause=str(error), fix=f"Look at the {side}'s dmesg and journal.")
    return LandfallError(f"{type(error).__name__} on the {side}")


def _wait(connection: ssl.SSLSocket, events: int, deadline: float | None, act: str) -> None:
    """Wait until the connection is ready; LinkLost at the deadline."""
    if not _ready(connection, events, None if deadline is None else max(0.0, deadline - monotonic_s()) * 1000):
        raise LinkLost(f"{act}: the peer was silent past the time limit")


def _ready(connection: ssl.SSLSocket, events: int, timeout_ms: float | None) -> bool:
    poll = select.poll()
    try:
        poll.register(connection, events)
    except ValueError as error:
        raise LinkLost("the connection was closed", cause=str(error)) from error
    return bool(poll.poll(timeout_ms))
