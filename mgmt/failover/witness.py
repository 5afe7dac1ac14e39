"""Whether a primary is gone, by two paths: the management node's own, and that of the node's peer. Nothing is changed by looking."""

from __future__ import annotations

import errno
import os

from agent.contract import messages as m
from agent.contract.errors import NodeUnreachable
from mgmt.failover.plan import Sight
from mgmt.run.site import Site

REFUSED = os.strerror(errno.ECONNREFUSED)
"""A connection that is refused is refused by somebody."""


def look(site: Site, source: str, target: str) -> Sight:
    """Return what is seen of ``source`` now, both paths asked at the same time. NodeUnreachable if the second witness cannot be asked.

    A path that the network's own limit has not decided within ``probe_limit_s`` counts as no connection.
    """
    entry, limit_s = site.inventory.entry(source), site.inventory.probe_limit_s
    probe = m.ProbePeer(entry.address, entry.ssh_port, limit_s)
    peer = site.threads.beside(lambda: site.node(target).ask(probe, limit_s=limit_s + 30))
    try:
        ours = site.knock(entry.address, entry.ssh_port, limit_s)
        agent, reason = False, "no connection"
        if ours:
            try:
                site.hello(source)
                agent = True
            except NodeUnreachable as error:
                reason = error.message
    finally:
        said = peer()
    peers = said.reachable or REFUSED in said.reason
    words = f"from here: {'its agent answers' if agent else reason}; from {target}: {said.reason or 'a connection'}"
    return Sight(agent, ours, peers, words)
