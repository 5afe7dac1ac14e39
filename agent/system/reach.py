"""Whether something can be reached over the network, asked by opening a connection and closing it again."""

from __future__ import annotations

import errno
import ipaddress
import socket

from agent.contract.errors import RequestRefused

LONGEST_S = 60.0


def refusal(address: str, port: int, limit_s: float) -> str:
    """Return why no TCP connection to an IP address could be opened within ``limit_s``; empty if one could.

    RequestRefused for what is no IP address or port: names are not looked up, since the answer would depend on a third machine.
    """
    try:
        there = ipaddress.ip_address(address)
    except ValueError as error:
        raise RequestRefused(f"{address!r} is no IP address") from error
    if not 0 < port < 1 << 16 or not 0 < limit_s <= LONGEST_S:
        raise RequestRefused(f"port {port} and {limit_s:g} s", cause=f"a port is 1 to 65535, a limit up to {LONGEST_S:g} s")
    try:
        with socket.create_connection((str(there), port), timeout=limit_s):
            return ""
    except TimeoutError:
        return f"no answer within {limit_s:g} s"
    except OSError as error:
        return f"{errno.errorcode.get(error.errno or 0, '?')}: {error.strerror or error}"
