"""The fault proxy acts at an exact byte; all on the loopback address."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mgmt.lab.proxy import Action, Direction, Endpoint, Event, Proxy, Trigger

LIMIT_S = 10.0
HERE = "127.0.0.1"


class Receiver:
    """Accepts connections, keeps what comes, and tells how each ended."""

    def __init__(self) -> None:
        self.listener = socket.create_server((HERE, 0))
        self.endpoint = Endpoint(HERE, self.listener.getsockname()[1])
        self.connections: queue.Queue[socket.socket] = queue.Queue()
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            connection.settimeout(LIMIT_S)
            self.connections.put(connection)

    def next(self) -> socket.socket:
        return self.connections.get(timeout=LIMIT_S)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


class Listener:
    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def __call__(self, event: Event) -> None:
        if event.action is not Action.CONNECTED:
            self.events.put(event)

    def next(self) -> Event:
        return self.events.get(timeout=LIMIT_S)


@contextmanager
def connected(proxy: Proxy, receiver: Receiver) -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_connection((HERE, proxy.endpoint.port), LIMIT_S) as near, receiver.next() as far:
        yield near, far


def exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            break
        data += part
    return data


def nothing_more(connection: socket.socket) -> bool:
    """Whether nothing is there to read; with the holder's event heard before, nothing can be under way either."""
    connection.setblocking(False)
    try:
        connection.recv(1)
    except BlockingIOError:
        return True
    finally:
        connection.settimeout(LIMIT_S)
    return False


def test_it_forwards_both_ways_and_counts(receiver: Receiver) -> None:
    with Proxy(Endpoint(HERE, 0), receiver.endpoint) as proxy, connected(proxy, receiver) as (near, far):
        near.sendall(b"x" * 300_000)
        assert exactly(far, 300_000) == b"x" * 300_000
        far.sendall(b"back")
        assert exactly(near, 4) == b"back"
        near.shutdown(socket.SHUT_WR)
        assert far.recv(1) == b""
        assert (proxy.forwarded(Direction.UPSTREAM), proxy.forwarded(Direction.DOWNSTREAM)) == (300_000, 4)


@pytest.mark.parametrize("at_byte", [0, 1, 65_535, 65_536, 123_457])
def test_a_signal_holds_every_byte_behind_it_until_resumed(receiver: Receiver, at_byte: int) -> None:
    heard = Listener()
    content = bytes(range(256)) * 800
    with (
        Proxy(Endpoint(HERE, 0), receiver.endpoint, on_event=heard, trigger=Trigger(at_byte, Action.SIGNAL)) as proxy,
        connected(proxy, receiver) as (near, far),
    ):
        sender = threading.Thread(target=near.sendall, args=(content,))
        sender.start()
        assert heard.next() == Event(Action.SIGNAL, at_byte, 0)
        assert exactly(far, at_byte) == content[:at_byte]
        assert nothing_more(far)
        proxy.resume()
        assert exactly(far, len(content) - at_byte) == content[at_byte:]
        sender.join()


def test_the_count_is_the_sum_over_connections(receiver: Receiver) -> None:
    heard = Listener()
    with (
        Proxy(Endpoint(HERE, 0), receiver.endpoint, on_event=heard, trigger=Trigger(150, Action.SIGNAL)) as proxy,
        connected(proxy, receiver) as (near_1, far_1),
        connected(proxy, receiver) as (near_2, far_2),
    ):
        near_1.sendall(b"a" * 100)
        assert exactly(far_1, 100) == b"a" * 100
        near_2.sendall(b"b" * 100)
        assert heard.next() == Event(Action.SIGNAL, 150, 0)
        assert exactly(far_2, 50) == b"b" * 50
        assert nothing_more(far_2)


def test_D_cut_resets_every_connection_and_lets_later_ones_pass(receiver: Receiver) -> None:
    with Proxy(Endpoint(HERE, 0), receiver.endpoint, trigger=Trigger(10, Action.CUT)) as proxy:
        with connected(proxy, receiver) as (near, far), connected(proxy, receiver) as (other_near, other_far):
            near.sendall(b"c" * 20)
            for end in (far, other_far, other_near):
                with pytest.raises(ConnectionResetError):
                    exactly(end, 1000)
        with connected(proxy, receiver) as (near, far):
            near.sendall(b"again")
            assert exactly(far, 5) == b"again"


def test_D_a_one_way_blackhole_leaves_the_other_way_open(receiver: Receiver) -> None:
    heard = Listener()
    with (
        Proxy(Endpoint(HERE, 0), receiver.endpoint, on_event=heard, trigger=Trigger(3, Action.BLACKHOLE_ONE_WAY)) as proxy,
        connected(proxy, receiver) as (near, far),
    ):
        near.sendall(b"abcdef")
        heard.next()
        assert exactly(far, 3) == b"abc"
        far.sendall(b"still here")
        assert exactly(near, 10) == b"still here"
        assert nothing_more(far)


def test_D10_one_bit_is_flipped_and_nothing_else(receiver: Receiver) -> None:
    with (
        Proxy(Endpoint(HERE, 0), receiver.endpoint, trigger=Trigger(2, Action.FLIP)) as proxy,
        connected(proxy, receiver) as (near, far),
    ):
        near.sendall(b"abcdef")
        assert exactly(far, 6) == b"abbdef"


def test_throttling_slows_and_loses_nothing(receiver: Receiver) -> None:
    heard = Listener()
    trigger = Trigger(0, Action.THROTTLE, bytes_per_s=1 << 20)
    with (
        Proxy(Endpoint(HERE, 0), receiver.endpoint, on_event=heard, trigger=trigger) as proxy,
        connected(proxy, receiver) as (near, far),
    ):
        near.sendall(b"t" * 100_000)
        heard.next()
        assert exactly(far, 100_000) == b"t" * 100_000


def test_a_trigger_can_be_armed_for_the_way_back(receiver: Receiver) -> None:
    heard = Listener()
    with (
        Proxy(Endpoint(HERE, 0), receiver.endpoint, on_event=heard) as proxy,
        connected(proxy, receiver) as (near, far),
    ):
        far.sendall(b"12")
        assert exactly(near, 2) == b"12"
        proxy.arm(Trigger(4, Action.PAUSE, Direction.DOWNSTREAM))
        far.sendall(b"3456")
        assert heard.next() == Event(Action.PAUSE, 0, 4)
        assert exactly(near, 2) == b"34"
        proxy.resume()
        assert exactly(near, 2) == b"56"
