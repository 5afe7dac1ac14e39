"""Transfers: made, received, sent, looked into, discarded."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from uuid import UUID

from agent.contract.identity import GenerationId


class Differential(StrEnum):
    """How differential data travels."""

    VERIFY = "verify"  # its digest; NAS 2 proves its own base against it
    SEND = "send"  # itself: the claim's literal form


class TransferState(StrEnum):
    """Where a transfer stands on a node. Waiting is a state of its own."""

    BUILDING = "building"  # NAS 1 makes the DMI
    WAITING = "waiting"  # ready, no peer connected
    RUNNING = "running"
    INTERRUPTED = "interrupted"  # the peer went away; resumable, or salvageable on NAS 2
    SALVAGED = "salvaged"  # a salvage of it is committed; undo makes it resumable again
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class TransferFacts:
    """A transfer as a node knows it; ``whole_files`` and ``whole_bytes`` answer "if NAS 1 died now"."""

    id: UUID
    volume: UUID
    base: GenerationId
    target: GenerationId
    differential: Differential
    sending: bool
    state: TransferState
    pieces_total: int
    pieces_arrived: int
    bytes_total: int
    bytes_arrived: int
    files_total: int = 0
    files_whole: int = 0
    since_ns: int = 0
    mends: bool = False  # it replaces damaged blocks of a generation that both nodes hold


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """What one side of a transfer proves itself with; issued by the management node for one transfer."""

    authority_pem: str
    certificate_pem: str
    key_pem: str = field(repr=False)
    peer: str  # the URI that the peer's certificate must carry


@dataclass(frozen=True, slots=True)
class BuildMend:
    """transfer.mend: make the DMI that brings these runs of a generation to a node that holds the generation with other content there."""

    transfer: UUID
    generation: GenerationId
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class BuildTransfer:
    """transfer.build: make the DMI from base to target (NAS 1). Priorities are (path prefix, higher is earlier)."""

    transfer: UUID
    base: GenerationId
    target: GenerationId
    priorities: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Built:
    pieces: int
    files: int
    changed_bytes: int
    dmi_bytes: int
    dmi_digest: str  # hex


@dataclass(frozen=True, slots=True)
class ReceiveTransfer:
    """transfer.receive: open the data port for one transfer and one peer (NAS 2). Resumes if the transfer is known.

    ``mends``: the target is held here with damaged blocks. The base is g0; what comes replaces these blocks in a clone of the target,
    which then takes the target's place in one step.
    """

    transfer: UUID
    base: GenerationId
    target: GenerationId
    differential: Differential
    streams: int
    token: str = field(repr=False)
    tls: TlsMaterial
    silence_limit_s: float = 10.0
    mends: bool = False


@dataclass(frozen=True, slots=True)
class Listening:
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class SendTransfer:
    """transfer.send: connect and send until committed (NAS 1). Answers progress lines, then Sent."""

    transfer: UUID
    address: str
    port: int
    differential: Differential
    streams: int
    token: str = field(repr=False)
    tls: TlsMaterial
    silence_limit_s: float = 10.0
    rate_limit_bytes_s: int = 0  # 0: none


@dataclass(frozen=True, slots=True)
class Sent:
    """The transfer is committed on NAS 2. Bytes are what this session sent, after compression and before TLS."""

    bytes_sent: int
    pieces_sent: int
    pieces_skipped: int  # had arrived before
    healed: int


@dataclass(frozen=True, slots=True)
class ListTransfers:
    """transfer.list"""


@dataclass(frozen=True, slots=True)
class Transfers:
    transfers: tuple[TransferFacts, ...]


@dataclass(frozen=True, slots=True)
class FetchDmi:
    """transfer.dmi: answers a blob, the DMI's bytes."""

    transfer: UUID


@dataclass(frozen=True, slots=True)
class FetchArrival:
    """transfer.arrival: answers a blob, the arrival record's bytes."""

    transfer: UUID


@dataclass(frozen=True, slots=True)
class Blob:
    blob_bytes: int


@dataclass(frozen=True, slots=True)
class DiscardTransfer:
    """transfer.discard: forget landing volume, DMI and arrival record (NAS 2) or DMI and target generation (NAS 1)."""

    transfer: UUID
