"""The way to another node, tried with what a transfer sends: a connection to a fresh port of the replication address, and full packets.

A firewall that knows only some ports, and a network that drops large packets, let a small probe through.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pyroute2 import IPRoute

from agent.contract.errors import LinkLost
from agent.system.clock import monotonic_s

LENGTH_BYTES: Final = 256 << 10
_COUNT_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Tried:
    """How it went; ``problem`` is empty if every byte was counted at the other end. ``interface`` and ``mtu`` are this end's."""

    source: str
    interface: str
    mtu: int
    seconds: float
    problem: str


def listen(address: str, limit_s: float) -> int:
    """Return a port that takes one connection within ``limit_s``, reads a bounded number of bytes and answers how many; LinkLost."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listener = socket.create_server((address, 0), family=family, backlog=1)
    except OSError as error:
        raise LinkLost(f"{address} cannot be listened on", cause=str(error), fix="Correct replication_address.") from error
    listener.settimeout(limit_s)
    port: int = listener.getsockname()[1]
    threading.Thread(target=_count, args=(listener, limit_s), name="path", daemon=True).start()
    return port


def attempt(address: str, port: int, limit_s: float) -> Tried:
    """Return how it went to send ``LENGTH_BYTES`` there."""
    begun, source = monotonic_s(), ""
    try:
        with socket.create_connection((address, port), timeout=limit_s) as connection:
            source = str(connection.getsockname()[0])
            connection.sendall(os.urandom(LENGTH_BYTES))
            answer = b""
            while len(answer) < _COUNT_BYTES and (more := connection.recv(_COUNT_BYTES)):
                answer += more
        counted = int.from_bytes(answer, "little")
        problem = "" if counted == LENGTH_BYTES else f"{counted} of {LENGTH_BYTES} bytes arrived"
    except TimeoutError:
        problem = "connected, and then silence: large packets are dropped on the way" if source else "no answer"
    except OSError as error:
        problem = error.strerror or str(error)
    interface, mtu = _interface(source)
    return Tried(source, interface, mtu, monotonic_s() - begun, problem)


def _count(listener: socket.socket, limit_s: float) -> None:
    """Serve one connection; whoever tries the path sees what went wrong at its own end."""
    with listener, suppress(OSError):
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(limit_s)
            counted = 0
            while counted < LENGTH_BYTES and (read := connection.recv(1 << 16)):
                counted += len(read)
            connection.sendall(counted.to_bytes(_COUNT_BYTES, "little"))


def _interface(source: str) -> tuple[str, int]:
    """Return name and MTU of the interface that has an address; nothing where none has it."""
    if not source:
        return "", 0
    with IPRoute() as network:
        for found in network.get_addr(address=source):
            (link,) = network.get_links(found["index"])
            return str(link.get_attr("IFLA_IFNAME")), int(link.get_attr("IFLA_MTU"))
    return "", 0
