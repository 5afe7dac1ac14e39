"""A TCP proxy that does something at an exact byte of what passes it, for faults that must be placed and repeated.

It forwards byte for byte until the sum over all of its connections, in one direction, reaches ``at_byte``; then the trigger acts.
Exactly ``at_byte`` bytes have been handed to the receiver's side by then, and not one more follows before the action is over.

As a library::

    with Proxy(Endpoint("10.77.0.1", 0), Endpoint("10.77.0.12", 7077), namespace="landfall-mgmt", on_event=heard) as proxy:
        proxy.arm(Trigger(at_byte=4096, action=Action.SIGNAL))
        ...                     # heard(Event) is called in a thread; the bytes behind stay held
        proxy.resume()

As a program: `python -m mgmt.lab.proxy --listen HOST:PORT --to HOST:PORT [--namespace NAME] [--at BYTE --action ACTION]` prints each
event as a JSON line and resumes when it reads a line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self

from agent.contract.errors import LabMissing
from mgmt.lab.namespace import enter

CHUNK_BYTES = 1 << 16
THROTTLED_CHUNK_BYTES = 1 << 12
START_S = 10.0
FLUSH_S = 5.0


class Direction(StrEnum):
    """Which way bytes go: upstream is from the one who connects to the one who is connected to."""

    UPSTREAM = "upstream"
    DOWNSTREAM = "downstream"


class Action(StrEnum):
    """What a trigger does."""

    SIGNAL = "signal"
    """Hold both directions until resumed."""
    PAUSE = "pause"
    """Hold the trigger's direction until resumed."""
    BLACKHOLE = "blackhole"
    """Hold both directions, of later connections too; sockets stay open, and nothing ends."""
    BLACKHOLE_ONE_WAY = "blackhole-one-way"
    """The same in the trigger's direction only."""
    CUT = "cut"
    """Reset every connection there is; later ones are forwarded."""
    THROTTLE = "throttle"
    """Forward at ``bytes_per_s`` from now on, in the trigger's direction."""
    FLIP = "flip"
    """Invert the lowest bit of the byte that follows, and go on."""
    CONNECTED = "connected"
    """No action: what the event of a new connection is called."""


HOLDS = {Action.SIGNAL, Action.PAUSE, Action.BLACKHOLE, Action.BLACKHOLE_ONE_WAY}
BOTH_WAYS = {Action.SIGNAL, Action.BLACKHOLE}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host's address and a TCP port; port 0 listens on any."""

    host: str
    port: int

    @staticmethod
    def parse(text: str) -> Endpoint:
        """Return the endpoint that HOST:PORT names."""
        host, _, port = text.rpartition(":")
        return Endpoint(host.strip("[]"), int(port))


@dataclass(frozen=True, slots=True)
class Trigger:
    """Do ``action`` once ``at_byte`` bytes have passed in ``direction``; it acts once, when a further byte arrives."""

    at_byte: int
    action: Action
    direction: Direction = Direction.UPSTREAM
    bytes_per_s: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Event:
    """What happened, and the bytes that had been forwarded each way by then."""

    action: Action
    upstream_bytes: int
    downstream_bytes: int


class Proxy:
    """A proxy in a thread of its own, inside a network namespace if one is named. Leaving the `with` resets what is open."""

    def __init__(
        self,
        listen: Endpoint,
        to: Endpoint,
        *,
        namespace: str | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        trigger: Trigger | None = None,
    ) -> None:
        self._listen, self._to = listen, to
        self._namespace = namespace
        self._on_event = on_event
        self._trigger = trigger
        self._bytes = dict.fromkeys(Direction, 0)
        self._pace: dict[Direction, int] = {}
        self._connections: set[_Connection] = set()
        self._unflushed = 0
        self._thread = threading.Thread(target=self._run, name="landfall-proxy", daemon=True)
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(START_S) or self._failure:
            raise LabMissing("the proxy did not start", cause=str(self._failure)) from self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens."""
        return Endpoint(self._listen.host, self._port)

    def forwarded(self, direction: Direction) -> int:
        """Return the bytes forwarded so far, summed over all connections."""
        return self._bytes[direction]

    def arm(self, trigger: Trigger) -> None:
        """Replace the trigger; one whose byte has passed acts at the next byte."""
        self._loop.call_soon_threadsafe(setattr, self, "_trigger", trigger)

    def resume(self) -> None:
        """Let go of everything that is held, throttling included."""
        self._loop.call_soon_threadsafe(self._let_go)

    def cut(self) -> None:
        """Reset every connection there is."""
        self._loop.call_soon_threadsafe(self._reset_all)

    def _run(self) -> None:
        try:
            if self._namespace is not None:
                enter(self._namespace)
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._gates = {direction: asyncio.Event() for direction in Direction}
        self._flushed = asyncio.Event()
        self._let_go()
        server = await asyncio.start_server(self._accept, self._listen.host, self._listen.port)
        self._port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._ended.wait()
        server.close()
        self._reset_all()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection([writer])
        self._connections.add(connection)
        try:
            far_reader, far_writer = await asyncio.open_connection(self._to.host, self._to.port)
            connection.ends.append(far_writer)
            if writer.transport.is_closing():
                raise ConnectionResetError
            self._tell(Action.CONNECTED)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, far_writer, Direction.UPSTREAM))
                pumps.create_task(self._pump(far_reader, writer, Direction.DOWNSTREAM))
        except* (OSError, asyncio.CancelledError):
            connection.reset()
        finally:
            self._connections.discard(connection)
            for end in connection.ends:
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        # Drained means handed to the kernel, so that a count of bytes is a count of bytes on their way.
        writer.transport.set_write_buffer_limits(high=0)
        while data := await reader.read(CHUNK_BYTES):
            while data:
                await self._gates[direction].wait()
                head, data, fired = self._take(data, direction)
                await self._forward(head, writer)
                if fired is not None:
                    data = await self._act(fired, data)
                if direction in self._pace:
                    await asyncio.sleep(len(head) / self._pace[direction])
        with contextlib.suppress(OSError):
            writer.write_eof()

    def _take(self, data: bytes, direction: Direction) -> tuple[bytes, bytes, Trigger | None]:
        """Return what may go now, what must wait, and the trigger that is reached; its gate closes before anybody else takes."""
        limit = THROTTLED_CHUNK_BYTES if direction in self._pace else CHUNK_BYTES
        trigger = self._trigger
        if trigger is not None and trigger.direction is direction:
            left = max(trigger.at_byte - self._bytes[direction], 0)
            if left < min(len(data), limit):
                self._trigger = None
                for held in _held(trigger):
                    self._gates[held].clear()
                self._bytes[direction] += left
                return data[:left], data[left:], trigger
        self._bytes[direction] += len(data[:limit])
        return data[:limit], data[limit:], None

    async def _forward(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        self._unflushed += 1
        try:
            writer.write(head)
            await writer.drain()
        finally:
            self._unflushed -= 1
            self._flushed.set()

    async def _act(self, trigger: Trigger, rest: bytes) -> bytes:
        """Do what the trigger says; return the bytes behind it, changed if it says so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                while self._unflushed:
                    self._flushed.clear()
                    await self._flushed.wait()
        self._tell(trigger.action)
        if trigger.action is Action.CUT:
            self._reset_all()
            raise ConnectionResetError
        if trigger.action is Action.THROTTLE:
            self._pace[trigger.direction] = trigger.bytes_per_s
        if trigger.action is Action.FLIP:
            return bytes([rest[0] ^ 1]) + rest[1:]
        return rest

    def _tell(self, action: Action) -> None:
        event = Event(action, self._bytes[Direction.UPSTREAM], self._bytes[Direction.DOWNSTREAM])
        # In another thread: who listens may take its time, and the other direction goes on meanwhile.
        self._loop.run_in_executor(None, self._on_event, event)

    def _let_go(self) -> None:
        self._pace.clear()
        for gate in self._gates.values():
            gate.set()

    def _reset_all(self) -> None:
        for connection in list(self._connections):
            connection.reset()


@dataclass(frozen=True, slots=True, eq=False)
class _Connection:
    ends: list[asyncio.StreamWriter]

    def reset(self) -> None:
        for end in self.ends:
            _reset(end)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection by RST: a close with a linger time of zero (socket(7))."""
    end = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _held(trigger: Trigger) -> Iterator[Direction]:
    if trigger.action in HOLDS:
        yield from Direction if trigger.action in BOTH_WAYS else (trigger.direction,)


def main() -> None:
    """Be a proxy until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m mgmt.lab.proxy")
    parser.add_argument("--listen", type=Endpoint.parse, required=True)
    parser.add_argument("--to", type=Endpoint.parse, required=True)
    parser.add_argument("--namespace")
    parser.add_argument("--at", type=int)
    parser.add_argument("--action", type=Action, default=Action.SIGNAL)
    arguments = parser.parse_args()
    trigger = None if arguments.at is None else Trigger(arguments.at, arguments.action)

    def say(document: dict[str, object]) -> None:
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()

    with Proxy(
        arguments.listen,
        arguments.to,
        namespace=arguments.namespace,
        trigger=trigger,
        on_event=lambda event: say(asdict(event)),
    ) as proxy:
        say({"listening": asdict(proxy.endpoint)})
        for _ in sys.stdin:
            proxy.resume()


if __name__ == "__main__":
    main()
