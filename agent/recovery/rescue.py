"""Single files from a generation of one node into the volume that another serves, over one stream of the data plane.

Both sides are given the same order: which files, and where each is to be. The side that has the generation reads (``gather``), the side
that serves makes (``restore``). A link that breaks leaves every file old or new; the same order again does the rest.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final
from uuid import UUID

from agent.contract import file_frames as wire
from agent.contract import frames
from agent.contract.errors import LandfallError, LinkLost, PeerRefused, ProtocolViolated
from agent.contract.frames import FrameType, Hello, Welcome
from agent.contract.messages import Differential, TlsMaterial
from agent.recovery.gather import Attributes, Content, Directory, Inode, Item, Refused, Spot, Whole, gather
from agent.recovery.restore import Restored, Restorer
from agent.system.failpoint import failpoint
from agent.transfer import tls
from agent.transfer.door import Door, DoorRules, is_token
from agent.transfer.group import ThreadGroup
from agent.transfer.rate import RateLimit
from agent.transfer.stream import HEARTBEAT_S, Stream, complaint

_CONNECT_LIMIT_S: Final = 60.0
_HANDSHAKE_LIMIT_S: Final = 10.0
_LINGER_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class FileOrder:
    """What both sides are given: the files, and what they prove themselves with."""

    id: UUID
    spots: tuple[Spot, ...]
    token: str
    tls: TlsMaterial
    silence_limit_s: float

    @property
    def levels(self) -> tuple[int, ...]:
        """How many directories lead to each spot in the generation."""
        return tuple(spot.path.count(b"/") for spot in self.spots)

    @property
    def hello(self) -> Hello:
        """The greeting that names this order."""
        pairs = wire.order_bytes((spot.path, spot.at) for spot in self.spots)
        return Hello(frames.PROTOCOL, self.id, self.token, 0, 1, Differential.VERIFY, len(pairs), wire.order_identity(pairs))


# --- the side that has the generation


def send_files(
    order: FileOrder, source_fd: int, address: str, port: int, *, rate_limit_bytes_s: int = 0, tell: Callable[[int, int], None]
) -> Restored:
    """Return what the other side made of the files of a generation whose root is ``source_fd``; LinkLost may be tried again.

    ``tell`` hears how many files of how many were sent.
    """
    sending = _Sending(order, rate_limit_bytes_s)
    try:
        return sending.run(source_fd, address, port, tell)
    except BaseException as error:
        sending.group.fail(error)
        failure = sending.group.failure
        raise (failure if failure is not None else error) from None
    finally:
        sending.close()


class _Sending:
    """One run of ``send_files``."""

    def __init__(self, order: FileOrder, rate_limit_bytes_s: int) -> None:
        self._order = order
        self._stream: Stream | None = None
        self._numbers = {
            spot.above(up): (number, up) for number, spot in enumerate(order.spots) for up in range(1, spot.path.count(b"/") + 1)
        }
        self._numbers |= {spot: (number, 0) for number, spot in enumerate(order.spots)}  # also of one that leads to others
        self._refused: list[Refused] = []
        self._restored: queue.SimpleQueue[wire.FilesRestored | None] = queue.SimpleQueue()
        self._over = threading.Event()
        self.group = ThreadGroup("send files", self._break)
        self._rate = RateLimit(rate_limit_bytes_s, self.group.ended)

    def run(self, source_fd: int, address: str, port: int, tell: Callable[[int, int], None]) -> Restored:
        stream = self._connect(address, port)
        self.group.start(partial(self._beat, stream))
        self.group.start(partial(self._listen, stream), listens=True)
        total, sent = len(self._order.spots), 0
        for item in gather(source_fd, self._order.spots, with_below=False):
            self._send(stream, item)
            if isinstance(item, Whole | Refused) or (isinstance(item, Directory) and item.wanted):
                sent += 1
                tell(sent, total)
        failpoint("rescue.src.before_finish")
        stream.send(frames.encode(FrameType.FINISH))
        restored = self._restored.get()
        if restored is None:
            raise self.group.failure or LinkLost("the sending ended")
        return Restored(restored.files, restored.bytes, self._refused)

    def close(self) -> None:
        """End every thread and free the connection."""
        self._over.set()
        self.group.end()
        if self._stream is not None:
            self._stream.abort()
        self.group.wait()
        if self._stream is not None:
            self._stream.close()

    def _connect(self, address: str, port: int) -> Stream:
        order = self._order
        try:
            raw = socket.create_connection((address, port), timeout=_HANDSHAKE_LIMIT_S)
        except OSError as error:
            raise LinkLost(f"{address} port {port} cannot be reached", cause=str(error)) from error
        stream = self._stream = Stream.open(
            raw,
            tls.connecting(order.tls),
            peer=order.tls.peer,
            server_side=False,
            limit_s=_HANDSHAKE_LIMIT_S,
            silence_limit_s=order.silence_limit_s,
        )
        stream.send(frames.encode_hello(order.hello))
        answer = stream.receive()
        if answer.type is FrameType.ERROR:
            raise frames.decode_error(answer.payload)
        if answer.type is not FrameType.WELCOME:
            raise ProtocolViolated(f"a {answer.type.name} frame came where WELCOME was expected")
        return stream

    def _send(self, stream: Stream, item: Item) -> None:
        match item:
            case Directory() | Inode():
                number, up = self._numbers[item.spot]
                try:
                    stream.send(wire.encode_item(_packed(number, up, item)))
                except ValueError:
                    self._send(stream, Refused(item.spot, "its extended attributes are larger than can be sent"))
            case Content():
                self._rate.spend(len(item.data))
                failpoint("rescue.src.before_content")
                stream.send(wire.encode_content(item.offset, item.data))
            case Whole():
                stream.send(frames.encode(FrameType.WHOLE))
            case Refused():
                stream.send(wire.encode_refusal(self._numbers[item.spot][0], item.reason))

    def _listen(self, stream: Stream) -> None:
        """Take what the other side says until it says what came of it."""
        while True:
            frame = stream.receive()
            match frame.type:
                case FrameType.REFUSAL:
                    refusal = wire.decode_refusal(frame.payload, len(self._order.spots))
                    self._refused.append(Refused(self._order.spots[refusal.number], refusal.reason))
                case FrameType.RESTORED:
                    self.group.end()
                    self._restored.put(frames.read_json(frame.payload, wire.FilesRestored))
                    return
                case FrameType.ERROR:
                    raise frames.decode_error(frame.payload)
                case _:
                    raise ProtocolViolated(f"a {frame.type.name} frame came where the result was expected")

    def _beat(self, stream: Stream) -> None:
        while not self._over.wait(HEARTBEAT_S):
            stream.heartbeat()

    def _break(self, error: BaseException) -> None:
        if self._stream is not None:
            if not isinstance(error, LinkLost):
                self._stream.complain(complaint(error, "other node"))
            self._stream.abort()
        self._restored.put(None)


def _packed(number: int, up: int, item: Directory | Inode) -> wire.FileItem:
    if isinstance(item, Inode):
        wanted, size, device, link = True, item.size_bytes, item.device, item.link
    else:
        wanted, size, device, link = item.wanted, 0, 0, b""
    about = item.attributes
    xattrs = tuple((wire.to_text(name), wire.to_text(value)) for name, value in about.xattrs)
    return wire.FileItem(
        number,
        up,
        wanted,
        about.mode,
        about.uid,
        about.gid,
        about.mtime_ns,
        about.project,
        about.flags,
        size,
        device,
        wire.to_text(link),
        xattrs,
    )


# --- the side that serves the volume


class FileReceiver:
    """The open port of one order. ``run`` once; ``cancel`` from another thread breaks it off.

    ``target`` gives what makes the files, for as long as its context lasts; it is entered when the other side has proved itself.
    """

    def __init__(self, order: FileOrder, address: str, target: Callable[[], AbstractContextManager[Restorer]]) -> None:
        """Listen on the address; LinkLost if it is not this node's."""
        self._order = order
        self._target = target
        self._numbers = {spot: number for number, spot in enumerate(order.spots)}
        self._first: queue.SimpleQueue[Stream | None] = queue.SimpleQueue()
        self._stream: Stream | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._group = ThreadGroup("receive files", self._break)
        rules = DoorRules(address, 0, order.tls.peer, 1, _HANDSHAKE_LIMIT_S, order.silence_limit_s)
        self._door = Door(rules, tls.listening(order.tls), self._register)
        self.address, self.port = self._door.address, self._door.port

    def run(self) -> None:
        """Take the files; whoever sends them is told what came of each. LinkLost, if nobody comes, or the link breaks."""
        try:
            self._group.start(self._door.watch)
            stream = self._connected()
            self._group.start(partial(self._beat, stream))
            stream.send(frames.encode_welcome(Welcome(dmi_wanted=False, committed=False)))
            with self._target() as restorer:
                self._take(stream, restorer)
            self._group.end()
            done = restorer.done
            stream.send(wire.encode_restored(done.files, done.length_bytes))
            with suppress(LandfallError):  # a connection that is closed with unread heartbeats in it takes our last word with it
                while True:
                    stream.receive(_LINGER_S)
        except BaseException as error:
            self._group.fail(error)
            failure = self._group.failure
            raise (failure if failure is not None else error) from None
        finally:
            self._close()

    def cancel(self) -> None:
        """Break it off; ``run`` raises LinkLost."""
        self._group.fail(LinkLost("the reception was cancelled"))

    def _connected(self) -> Stream:
        try:
            stream = self._first.get(timeout=_CONNECT_LIMIT_S)
        except queue.Empty:
            refused = f"; refused: {'; '.join(self._door.refused)}" if self._door.refused else ""
            raise LinkLost(f"the other node did not connect within {_CONNECT_LIMIT_S:g} s{refused}") from None
        if stream is None:
            raise self._group.failure or LinkLost("the reception ended")
        return stream

    def _take(self, stream: Stream, restorer: Restorer) -> None:
        """Do what comes until the other side says that it was all; say at once what is not taken."""
        levels, told = self._order.levels, 0
        while True:
            frame = stream.receive()
            match frame.type:
                case FrameType.ITEM:
                    restorer.take(self._unpacked(wire.decode_item(frame.payload, levels)))
                case FrameType.CONTENT:
                    offset, data = wire.decode_content(frame.payload)
                    restorer.take(Content(offset, bytes(data)))
                case FrameType.WHOLE:
                    restorer.take(Whole())
                    failpoint("rescue.dst.after_file")
                case FrameType.REFUSAL:
                    refusal = wire.decode_refusal(frame.payload, len(levels))
                    restorer.take(Refused(self._order.spots[refusal.number], refusal.reason))
                case FrameType.FINISH:
                    return
                case FrameType.ERROR:
                    raise LinkLost("the other node gave the files up", cause=str(frames.decode_error(frame.payload)))
                case _:
                    raise ProtocolViolated(f"a {frame.type.name} frame came where files were expected")
            for refused in restorer.done.refused[told:]:
                stream.send(wire.encode_refusal(self._numbers[refused.spot], refused.reason))
            told = len(restorer.done.refused)

    def _unpacked(self, item: wire.FileItem) -> Directory | Inode:
        spot = self._order.spots[item.number].above(item.up)
        xattrs = tuple((wire.from_text(name), wire.from_text(value)) for name, value in item.xattrs)
        about = Attributes(item.mode, item.uid, item.gid, item.mtime_ns, item.project, item.flags, xattrs)
        if about.is_directory:
            return Directory(spot, about, wanted=item.wanted and not item.up)
        return Inode(spot, about, item.size_bytes, item.device, wire.from_text(item.link))

    def _register(self, stream: Stream, hello: Hello) -> None:
        """Let in who shows the order and its token; PeerRefused, also for the second who does."""
        expected = self._order.hello
        if not is_token(hello.token, expected.token):
            raise PeerRefused("the token is not that of this order")
        if hello != expected:
            raise ProtocolViolated("the two nodes were given different orders")
        with self._lock:
            if self._over.is_set() or self._stream is not None:
                raise PeerRefused("the token was used before")
            self._stream = stream
        self._first.put(stream)

    def _beat(self, stream: Stream) -> None:
        while not self._over.wait(HEARTBEAT_S):
            stream.heartbeat()

    def _break(self, error: BaseException) -> None:
        with self._lock:
            stream = self._stream
        if stream is not None:
            if not isinstance(error, LinkLost):
                stream.complain(complaint(error, "other node"))
            stream.abort()
        self._first.put(None)

    def _close(self) -> None:
        """End every thread and free the connection."""
        self._over.set()
        self._group.end()
        self._door.close()
        with self._lock:
            stream = self._stream
        if stream is not None:
            stream.abort()
        self._group.wait()
        self._door.free()
        if stream is not None:
            stream.close()
