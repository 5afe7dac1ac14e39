"""The node itself: who it is, what devices it has, and what it has to say."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Hello:
    """hello: who are you?"""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Answer to hello."""

    node: str
    release: str
    protocol: int
    lab: bool
    substrates: tuple[str, ...]
    term: int = 0  # the highest that a management node named


@dataclass(frozen=True, slots=True)
class AskHealth:
    """node.health: what a preflight must know of this node."""


@dataclass(frozen=True, slots=True)
class ExportHealth:
    """How the node exports by a protocol that it is configured for; ``problem`` is empty if all is well."""

    protocol: str
    problem: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """Answer to node.health. ``serves`` are the volumes mounted for clients."""

    wall_ns: int
    pool_free_bytes: int
    state_free_bytes: int
    serves: tuple[str, ...]
    exports: tuple[ExportHealth, ...]


@dataclass(frozen=True, slots=True)
class OpenPath:
    """path.open: listen on the replication address for one connection of ``TryPath``, for some seconds."""

    limit_s: float = 10.0


@dataclass(frozen=True, slots=True)
class TryPath:
    """path.try: send as many bytes as fill some packets to a port that OpenPath opened, and have them counted."""

    address: str
    port: int
    limit_s: float = 5.0


@dataclass(frozen=True, slots=True)
class PathTried:
    """Answer to path.try. ``problem`` is empty if every byte arrived; ``interface`` and ``mtu`` are this end's."""

    source: str
    interface: str
    mtu: int
    seconds: float
    problem: str


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A block device that this node sees; identity, not name, is what Landfall goes by."""

    path: str
    size_bytes: int
    sector_bytes: int
    read_only: bool
    kind: str  # disk, loop, dm, partition
    identity: str  # serial, WWN, UUID or backing inode; empty if it has none
    holder: str  # what it is used for, as far as known


@dataclass(frozen=True, slots=True)
class ListDevices:
    """devices"""


@dataclass(frozen=True, slots=True)
class Devices:
    devices: tuple[DeviceFacts, ...]


@dataclass(frozen=True, slots=True)
class Notification:
    """A word of an agent to the management node, kept until acknowledged. ``kind`` is reception-failure, device-changed ..."""

    sequence: int
    kind: str
    volume: UUID
    transfer: UUID | None
    at_ns: int
    message: str


@dataclass(frozen=True, slots=True)
class ReadOutbox:
    """outbox.read: notifications after ``after``; waits up to ``wait_s`` for one."""

    after: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outbox:
    notifications: tuple[Notification, ...]


@dataclass(frozen=True, slots=True)
class AcknowledgeOutbox:
    """outbox.acknowledge: the management node has stored everything up to ``sequence``."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long verb is."""

    step: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Done:
    """Answer of verbs that have nothing to say."""
