"""Whether this node's network interfaces carry, followed by the kernel's events (rtnetlink(7))."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from pyroute2 import IPRoute

_RTMGRP_LINK: Final = 1
_LOWER_UP: Final = 0x10000  # netdevice(7): IFF_LOWER_UP
_UP: Final = 0x1


def carries(index: int) -> bool:
    """Whether an interface is up and has a carrier; False for one that is gone."""
    with IPRoute() as links:
        return any(link["index"] == index and link["flags"] & _UP and link["flags"] & _LOWER_UP for link in links.get_links())


class Events:
    """The kernel's word that something about a link changed; a context."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, _RTMGRP_LINK))

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def changes(self, index: int, every_s: float) -> Iterator[bool | None]:
        """Yield whether a link carries each time that changed, and None at least every ``every_s`` in between."""
        known = carries(index)
        self._socket.settimeout(every_s)
        while True:
            with suppress(OSError):  # nothing, or more than there was room for: the state itself is asked either way
                self._socket.recv(1 << 16)
            now = carries(index)
            yield None if now == known else now
            known = now
