"""What this node sees of another: the second path by which a silent node is judged."""

from __future__ import annotations

from agent.contract import messages as m
from agent.service.node import Node, ProgressCall
from agent.system.reach import refusal


def probe(node: Node, arguments: m.ProbePeer, progress: ProgressCall) -> m.Probed:
    """Return whether a TCP connection can be opened to the peer, from this node, within the time limit."""
    reason = refusal(arguments.address, arguments.port, arguments.limit_s)
    return m.Probed(not reason, reason)
