"""A TCP relay that does what bad links do, at a byte that the test chooses."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass
class Relay:
    """What happens to the bytes: counted over all connections, ``to_target`` bytes from source to target."""

    cut_at: int | None = None  # both directions end when so many bytes went to the target
    flip_at: int | None = None  # this byte to the target is changed
    stall_at: int | None = None  # from this byte on nothing is forwarded either way, and nothing closed
    mute_at: int | None = None  # from this byte on nothing comes back from the target
    only_connection: int | None = None  # the cut is of this connection alone, counted from 0, at its own bytes
    on_bytes: Callable[[int], None] = lambda _: None
    to_target: int = 0
    to_source: int = 0
    _accepted: int = 0

    @contextlib.contextmanager
    def before(self, port: int) -> Iterator[int]:
        """Relay to ``port`` as long as the context lasts; give the port to connect to."""
        listener = socket.create_server(("127.0.0.1", 0))
        wake, woken = socket.socketpair()
        thread = threading.Thread(target=self._run, args=(listener, woken, port), name="relay", daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            wake.close()
            thread.join()
            listener.close()
            woken.close()

    def _run(self, listener: socket.socket, woken: socket.socket, port: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ, None)
            selector.register(woken, selectors.EVENT_READ, None)
            open_sockets: list[socket.socket] = []
            try:
                while True:
                    for key, _ in selector.select():
                        if key.fileobj is woken:
                            return
                        if key.fileobj is listener:
                            self._connect(listener, port, selector, open_sockets)
                        else:
                            self._forward(key, selector)
            finally:
                for each in open_sockets:
                    each.close()

    def _connect(self, listener: socket.socket, port: int, selector: selectors.BaseSelector, open_sockets: list[socket.socket]) -> None:
        source = listener.accept()[0]
        number, self._accepted = self._accepted, self._accepted + 1
        if self._cut() and self.only_connection is None:
            source.close()
            return
        target = socket.create_connection(("127.0.0.1", port))
        open_sockets += [source, target]
        selector.register(source, selectors.EVENT_READ, (source, target, True, number))
        selector.register(target, selectors.EVENT_READ, (target, source, False, number))

    def _forward(self, key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
        origin, other, forth, number = key.data
        if self.only_connection is not None and number != self.only_connection:
            self._pass_on(origin, other, selector)
            return
        room = 1 << 16
        if forth and self.cut_at is not None:
            room = max(min(room, self.cut_at - self.to_target), 1)
        try:
            data = bytearray(origin.recv(room))
        except OSError:
            data = bytearray()
        if forth:
            begin = self.to_target
            self.to_target += len(data)
            if self.flip_at is not None and begin <= self.flip_at < self.to_target:
                data[self.flip_at - begin] ^= 0x55
            self.on_bytes(self.to_target)
        else:
            self.to_source += len(data)
        if self.stall_at is not None and self.to_target >= self.stall_at:
            selector.unregister(origin)
            return
        if not forth and self.mute_at is not None and self.to_target >= self.mute_at:
            return
        if not data:
            selector.unregister(origin)
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_WR)
            return
        with contextlib.suppress(OSError):
            other.sendall(data)
        if self._cut():
            for each in list(selector.get_map().values()):
                if each.data is not None and self.only_connection in (None, each.data[3]):
                    selector.unregister(each.fileobj)
                    with contextlib.suppress(OSError):
                        each.fileobj.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def _pass_on(self, origin: socket.socket, other: socket.socket, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):
            if data := origin.recv(1 << 16):
                other.sendall(data)
                return
            other.shutdown(socket.SHUT_WR)
        selector.unregister(origin)

    def _cut(self) -> bool:
        return self.cut_at is not None and self.to_target >= self.cut_at
