"""The port of one transfer: each connection proves itself in a thread of its own; who cannot is turned away and ends nothing.

Before a peer has shown its certificate nothing it says is parsed; before it has shown the token only its greeting is.
"""

from __future__ import annotations

import hmac
import select
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from agent.contract import frames
from agent.contract.errors import LandfallError, LinkLost, ProtocolViolated
from agent.contract.frames import FrameType, Hello
from agent.system.failpoint import failpoint
from agent.transfer.group import ThreadGroup
from agent.transfer.stream import Stream

_STRANGERS: Final = 4
"""Connections beyond those of the streams that may be in their handshake at once."""

_REMEMBERED: Final = 100


@dataclass(frozen=True, slots=True)
class DoorRules:
    """Where to listen, whom to expect and for how long."""

    address: str
    port: int
    peer: str
    streams: int
    handshake_limit_s: float
    silence_limit_s: float


def is_token(shown: str, expected: str) -> bool:
    """Whether a peer shows the token that was given to it; how long that takes says nothing about the token."""
    return hmac.compare_digest(*(text.encode("utf-8", "surrogatepass") for text in (shown, expected)))


class Door:
    """A listening port. ``enter`` is called with each stream whose peer is the expected one, and refuses it by raising."""

    def __init__(self, rules: DoorRules, context: ssl.SSLContext, enter: Callable[[Stream, Hello], None]) -> None:
        """Listen; LinkLost if the address is not this node's, or the port is taken."""
        self._rules = rules
        self._context = context
        self._enter = enter
        family = socket.AF_INET6 if ":" in rules.address else socket.AF_INET
        try:
            self._listener = socket.create_server((rules.address, rules.port), family=family, backlog=rules.streams + _STRANGERS)
        except OSError as error:
            raise LinkLost(f"{rules.address} cannot be listened on", cause=str(error)) from error
        self.address, self.port = self._listener.getsockname()[:2]
        self._lock = threading.Lock()
        self._shaking: set[socket.socket] = set()  # second descriptors of connections in their handshake
        self._refused: list[str] = []
        self._closed = threading.Event()
        self._threads = ThreadGroup("admit", lambda _: None)

    @property
    def refused(self) -> tuple[str, ...]:
        """The connections that were turned away, in words."""
        with self._lock:
            return tuple(self._refused)

    def watch(self) -> None:
        """Take connections until the door is closed."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while not self._closed.is_set():
            poll.poll()
            try:
                raw, address = self._listener.accept()
            except OSError:
                continue
            with self._lock:
                if self._closed.is_set() or len(self._shaking) >= self._rules.streams + _STRANGERS:
                    raw.close()
                    continue
                twin = raw.dup()
                self._shaking.add(twin)
            failpoint("dst.after_accept")
            self._threads.start(partial(self._admit, raw, twin, str(address[0])))

    def close(self) -> None:
        """Let nobody in any more and hang up on who is in the handshake; ``watch`` returns."""
        self._closed.set()
        with self._lock, suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for twin in self._shaking:
                with suppress(OSError):
                    twin.shutdown(socket.SHUT_RDWR)
        self._threads.wait()

    def free(self) -> None:
        """Give the port back; ``watch`` has returned."""
        self._listener.close()

    def _admit(self, raw: socket.socket, twin: socket.socket, address: str) -> None:
        rules, stream = self._rules, None
        try:
            stream = Stream.open(
                raw,
                self._context,
                peer=rules.peer,
                server_side=True,
                limit_s=rules.handshake_limit_s,
                silence_limit_s=rules.silence_limit_s,
            )
            frame = stream.receive(rules.handshake_limit_s)
            if frame.type is not FrameType.HELLO:
                raise ProtocolViolated(f"a stream began with a {frame.type.name} frame")
            self._enter(stream, frames.decode_hello(frame.payload))
        except Exception as error:
            # Whatever a stranger does, it is the stranger's failure and not the transfer's.
            refusal = error if isinstance(error, LandfallError) else ProtocolViolated(f"{type(error).__name__} in the handshake")
            with self._lock:
                if len(self._refused) < _REMEMBERED:
                    self._refused.append(f"{address}: {refusal.message}")
            if stream is not None:
                stream.complain(refusal)
                stream.close()
        finally:
            with self._lock:
                self._shaking.discard(twin)
            twin.close()
