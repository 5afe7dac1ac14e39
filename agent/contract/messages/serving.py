"""Who serves a volume: promoted, serving, stopped, demoted.

The epoch counts promotions of a volume. A verb that names another epoch than the node's own record is refused (EpochStale): whoever
ordered it does not know who may write.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from agent.contract.messages.generations import GenerationFacts


@dataclass(frozen=True, slots=True)
class PromoteVolume:
    """volume.promote: a secondary becomes primary at ``epoch``, which must follow its own; its newest generation becomes the volume.

    Neither mounts nor exports. Asked again at the same epoch, it changes nothing.
    """

    volume: UUID
    epoch: int


@dataclass(frozen=True, slots=True)
class ServeVolume:
    """volume.serve: mount and export; the node must be primary at exactly this epoch. Confirms its tenure since the last boot.

    ``lease_s``: with a lease from the beginning. Without one (0) it is served until somebody ends it, whatever lease there was.
    """

    volume: UUID
    epoch: int
    lease_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StopServing:
    """volume.unserve: end exports, unmount, detach. The operational image stays.

    ``quiesce``: stay mounted, read-only; no client reaches it, and what is taken of it is its last state.
    """

    volume: UUID
    quiesce: bool = False


@dataclass(frozen=True, slots=True)
class DemoteVolume:
    """volume.demote: a primary that was overtaken becomes secondary at the higher ``epoch``; what it holds is kept first."""

    volume: UUID
    epoch: int


@dataclass(frozen=True, slots=True)
class Demoted:
    """``kept`` is what this node held and no other generation here that the peer is known to hold does; None if there is no such thing."""

    kept: GenerationFacts | None


@dataclass(frozen=True, slots=True)
class RenewLease:
    """volume.lease: serve it for so many seconds from now on. A node gives up what is not renewed before that time has gone by."""

    volume: UUID
    epoch: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Lease:
    """How long the lease lasts, by the node's own clock."""

    remaining_s: float


@dataclass(frozen=True, slots=True)
class TakeAddress:
    """address.take: have the service address of a volume, such as 192.0.2.100/24, and tell everybody. The node must be its primary."""

    volume: UUID
    address: str


@dataclass(frozen=True, slots=True)
class DropAddress:
    """address.drop: have it no more."""

    volume: UUID
    address: str


@dataclass(frozen=True, slots=True)
class ProbePeer:
    """peer.probe: can this node open a TCP connection there?"""

    address: str
    port: int
    limit_s: float = 3.0


@dataclass(frozen=True, slots=True)
class Probed:
    """``reason`` says why not, in the kernel's words."""

    reachable: bool
    reason: str
