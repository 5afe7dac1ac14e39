"""``lease``: a node that stops by itself when nobody renews its lease is waited for.

Whoever calls this renews no lease meanwhile, so that none ends later than ``lease_s`` from now; the node stops at least 5 s before the end.
A node that can be paused is refused: its clock stands still with it, and when it wakes, its kernel writes before its agent looks.
"""

from __future__ import annotations

from typing import Final

from agent.system.clock import sleep
from mgmt.fencing.protocol import FenceCode, FenceRequest, NotFencedError, serve

DRIFT: Final = 1.01
"""How much slower the node's clock may go than ours."""
ON_ITS_WAY_S: Final = 1.0
"""How long a renewal that was sent before may still be under way."""


def fence(request: FenceRequest) -> str:
    """Return, once the longest lease that may have been given is over, that it is."""
    if request.options.pausable:
        words = f"{request.node} can be paused: a lease proves nothing of it. Fence it by `libvirt` or `command`"
        raise NotFencedError(FenceCode.REFUSED, words)
    if request.options.lease_s <= 0:
        raise NotFencedError(FenceCode.REFUSED, f"{request.node} is not known to serve this volume under a lease that nobody else renews")
    wait_s = request.options.lease_s * DRIFT + ON_ITS_WAY_S
    sleep(wait_s)
    return f"the lease of {request.options.lease_s:g} s was not renewed for {wait_s:.1f} s"


if __name__ == "__main__":
    serve(fence)
