"""Which ports of the switch are joined, isolated or down, from the pairs of nodes that are cut.

A bridge keeps two isolated ports from exchanging packets while each still reaches a port that is not isolated. So one cut
pair is two isolated ports; two cut pairs have a node in common, whose port goes down; three are all ports down.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from agent.system.files import write_durably
from mgmt.lab.layout import NodeName

Pair = frozenset[NodeName]


class Port(StrEnum):
    """How a node's port of the switch stands."""

    JOINED = "joined"
    ISOLATED = "isolated"
    DOWN = "down"


def pair(one: NodeName, other: NodeName) -> Pair:
    """Return the pair of two different nodes; ValueError for a node and itself."""
    if one == other:
        raise ValueError(f"{one} cannot be cut from itself")
    return frozenset((one, other))


def ports(cut: frozenset[Pair]) -> Mapping[NodeName, Port]:
    """Return the state of every port: exactly the pairs in ``cut`` cannot exchange a packet."""
    ends = Counter(node for cut_pair in cut for node in cut_pair)
    if len(cut) == 1:
        return {node: Port.ISOLATED if ends[node] else Port.JOINED for node in NodeName}
    return {node: Port.DOWN if ends[node] == 2 else Port.JOINED for node in NodeName}


def read_cuts(path: Path) -> frozenset[Pair]:
    """Return the recorded set of cut pairs; a lab without the file has none."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return frozenset()
    return frozenset(pair(NodeName(one), NodeName(other)) for one, other in document["cut"])


def write_cuts(path: Path, cut: frozenset[Pair]) -> None:
    """Record the set of cut pairs."""
    write_durably(path, json.dumps({"cut": sorted(sorted(cut_pair) for cut_pair in cut)}).encode() + b"\n")
