"""The control plane: what the management node asks of an agent, and what an agent answers.

One JSON object a line, over SSH to ``landfall-agent connect``. A request is ``{"v", "id", "verb", "args"}``. An answer to it is
any number of ``{"id", "progress"}`` lines, then one of ``{"id", "error"}``, ``{"id", "result"}``, or a result with ``blob_bytes`` followed
by that many raw bytes (DMI and arrival record can be hundreds of megabytes). Arguments and results are the dataclasses below;
unknown or missing keys are refused on both sides.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, Final, TypeVar
from uuid import UUID

import cattrs
from cattrs.preconf.json import make_converter

from agent.contract.errors import RequestRefused
from agent.contract.identity import FilesystemKind, GenerationId, GenerationKind

PROTOCOL: Final = 1
MAX_LINE_BYTES: Final = 32 << 20
"""An update instruction names its files by number: a million of them take 8 MB."""


class Differential(StrEnum):
    """How differential data travels."""

    VERIFY = "verify"  # its digest; NAS 2 proves its own base against it
    SEND = "send"  # itself: the claim's literal form


class Deletions(StrEnum):
    """What a partial salvage does with files the source had deleted."""

    HOLD = "hold"
    APPLY = "apply"


class Role(StrEnum):
    """What this node is to a volume."""

    PRIMARY = "primary"  # serves the operational volume
    SECONDARY = "secondary"  # holds the second operational volume


class ReplicaState(StrEnum):
    """States of a volume on a node, in DRBD's sense."""

    UP_TO_DATE = "up-to-date"
    OUTDATED = "outdated"
    INCONSISTENT = "inconsistent"


class TransferState(StrEnum):
    """Where a transfer stands on a node. Waiting is a state of its own."""

    BUILDING = "building"  # NAS 1 makes the DMI
    WAITING = "waiting"  # ready, no peer connected
    RUNNING = "running"
    INTERRUPTED = "interrupted"  # the peer went away; resumable, or salvageable on NAS 2
    SALVAGED = "salvaged"  # a salvage of it is committed; undo makes it resumable again
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class GenerationFacts:
    """A generation as a node holds it."""

    id: GenerationId
    kind: GenerationKind
    taken_ns: int
    salvaged_from: GenerationId | None = None  # the target whose transfer did not finish


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """A volume as a node holds it; ``generations`` oldest first."""

    id: UUID
    name: str
    filesystem: FilesystemKind
    size_bytes: int
    role: Role
    state: ReplicaState
    epoch: int
    serving: bool
    device: str  # the operational volume's block device while serving, else empty
    mount_point: str  # where it is mounted while serving, else empty
    generations: tuple[GenerationFacts, ...] = ()


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
class Progress:
    """How far a long verb is."""

    step: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """What one side of a transfer proves itself with; issued by the management node for one transfer."""

    authority_pem: str
    certificate_pem: str
    key_pem: str = field(repr=False)
    peer: str  # the URI that the peer's certificate must carry


# --- verbs: the class name is the verb, in lower case with dots; see VERBS below ---


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
class CreateVolume:
    """volume.create: make an operational volume with an empty filesystem, mount and serve it (NAS 1)."""

    volume: UUID
    name: str
    filesystem: FilesystemKind
    size_bytes: int
    sector_bytes: int = 512
    mkfs_options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdmitReplica:
    """volume.admit: get ready to hold the second operational volume, beginning with g0 (NAS 2)."""

    volume: UUID
    name: str
    filesystem: FilesystemKind
    size_bytes: int
    sector_bytes: int = 512


@dataclass(frozen=True, slots=True)
class ListVolumes:
    """volume.list"""


@dataclass(frozen=True, slots=True)
class Volumes:
    volumes: tuple[VolumeFacts, ...]


@dataclass(frozen=True, slots=True)
class ServeVolume:
    """volume.serve: clone the newest generation as operational volume, mount it read-write, export it (SMB)."""

    volume: UUID


@dataclass(frozen=True, slots=True)
class StopServing:
    """volume.unserve: end exports, unmount, detach. The operational image stays."""

    volume: UUID


@dataclass(frozen=True, slots=True)
class TakeGeneration:
    """generation.take: freeze, clone, thaw (NAS 1)."""

    volume: UUID


@dataclass(frozen=True, slots=True)
class Taken:
    generation: GenerationFacts
    frozen_ms: float


@dataclass(frozen=True, slots=True)
class DropGeneration:
    """generation.drop: the source side cannot ask this of NAS 2; only the management node can."""

    generation: GenerationId


@dataclass(frozen=True, slots=True)
class OpenGeneration:
    """generation.open: mount a generation read-only beside the operational volume and return where."""

    generation: GenerationId


@dataclass(frozen=True, slots=True)
class CloseGeneration:
    """generation.close: undo generation.open."""

    generation: GenerationId


@dataclass(frozen=True, slots=True)
class Opened:
    path: str


@dataclass(frozen=True, slots=True)
class ExamineGeneration:
    """generation.examine: what there is to compare of a generation."""

    generation: GenerationId


@dataclass(frozen=True, slots=True)
class Examined:
    """Answer to generation.examine."""

    blocks: int
    recorded: bool  # there is a digest table of it here
    written: str  # why somebody must have written to it since it became a generation; empty: nothing speaks for that


@dataclass(frozen=True, slots=True)
class FetchDigests:
    """generation.digests: answers a blob, u64 little-endian per block, of ``blocks`` blocks from ``first`` on.

    The blocks are read from the device now; with ``recorded`` the digest table's entries are answered, and no block is read.
    """

    generation: GenerationId
    first: int
    blocks: int
    recorded: bool = False


@dataclass(frozen=True, slots=True)
class FindOwners:
    """generation.owners: whose are these runs (first block, blocks)? Ascending and disjoint."""

    generation: GenerationId
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class OwnedBlocks:
    """A file that has some of the blocks; every name it has (surrogateescape)."""

    paths: tuple[str, ...]
    blocks: int


@dataclass(frozen=True, slots=True)
class Owners:
    """Answer to generation.owners: the files, and how many blocks are of no file with a name. A block that files share counts for each."""

    files: tuple[OwnedBlocks, ...]
    metadata_blocks: int
    journal_blocks: int
    free_blocks: int
    nameless_blocks: int


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


@dataclass(frozen=True, slots=True)
class UpdateInstruction:
    """salvage.update: store these files (rows of the DMI) in the second operational volume (NAS 2).

    The claim's update instruction. ``dmi_digest`` (hex) binds it to the DMI that the determination read. NAS 2 checks every file
    again by its own record and refuses the instruction if one is not whole. ``atomic_sets`` are rows, deleted ones among them, of which
    NAS 2 stores all designated ones or none, should one prove damaged or have no room.
    """

    transfer: UUID
    dmi_digest: str
    files: tuple[int, ...]
    deletions: Deletions
    complete: bool  # every changed file is designated: deletions are applied whatever the policy
    atomic_sets: tuple[tuple[int, ...], ...] = ()


class Outcome(StrEnum):
    """What became of a changed file."""

    RECOVERED = "recovered"
    KEPT = "kept_at_base"
    ABSENT = "absent"
    DAMAGED = "damaged"
    DELETED = "deleted"  # deleted in the target, and deleted here
    HELD = "held"  # deleted in the target, kept here


@dataclass(frozen=True, slots=True)
class FileOutcome:
    """What NAS 2 did with one file of the DMI where that differs from the designation, or needs a word."""

    file: int
    outcome: Outcome
    reason: str
    path: str = ""  # where it is now, if not at its name (surrogateescape)


@dataclass(frozen=True, slots=True)
class Salvaged:
    """The salvage is verified and committed as ``generation``. Files not in ``exceptions`` came out as designated."""

    generation: GenerationFacts
    exceptions: tuple[FileOutcome, ...]
    verified_files: int
    verified_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class UndoSalvage:
    """salvage.undo: take the salvaged generation back; the transfer is resumable again."""

    volume: UUID


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
class Done:
    """Answer of verbs that have nothing to say."""


VERBS: Final[dict[str, tuple[type[Any], type[Any]]]] = {
    "hello": (Hello, NodeFacts),
    "devices": (ListDevices, Devices),
    "volume.create": (CreateVolume, VolumeFacts),
    "volume.admit": (AdmitReplica, VolumeFacts),
    "volume.list": (ListVolumes, Volumes),
    "volume.serve": (ServeVolume, VolumeFacts),
    "volume.unserve": (StopServing, VolumeFacts),
    "generation.take": (TakeGeneration, Taken),
    "generation.drop": (DropGeneration, Done),
    "generation.open": (OpenGeneration, Opened),
    "generation.close": (CloseGeneration, Done),
    "generation.examine": (ExamineGeneration, Examined),
    "generation.digests": (FetchDigests, Blob),
    "generation.owners": (FindOwners, Owners),
    "transfer.build": (BuildTransfer, Built),
    "transfer.mend": (BuildMend, Built),
    "transfer.receive": (ReceiveTransfer, Listening),
    "transfer.send": (SendTransfer, Sent),
    "transfer.list": (ListTransfers, Transfers),
    "transfer.dmi": (FetchDmi, Blob),
    "transfer.arrival": (FetchArrival, Blob),
    "transfer.discard": (DiscardTransfer, Done),
    "salvage.update": (UpdateInstruction, Salvaged),
    "salvage.undo": (UndoSalvage, Done),
    "outbox.read": (ReadOutbox, Outbox),
    "outbox.acknowledge": (AcknowledgeOutbox, Done),
}
"""Every verb with the types of its arguments and of its result."""

VERB_OF: Final = {arguments: verb for verb, (arguments, _) in VERBS.items()}

T = TypeVar("T")


def to_document(value: Any) -> Any:
    """Return ``value`` (a dataclass of this module) as plain JSON values."""
    return _converter().unstructure(value)


def from_document(document: Any, kind: type[T]) -> T:
    """Return the ``kind`` that ``document`` says; RequestRefused for unknown or missing keys and wrong types."""
    try:
        return _converter().structure(document, kind)
    except (cattrs.BaseValidationError, cattrs.StructureHandlerNotFoundError, ValueError, TypeError, KeyError) as error:
        detail = "; ".join(cattrs.transform_error(error)) if isinstance(error, cattrs.BaseValidationError) else str(error)
        raise RequestRefused(f"not a well-formed {kind.__name__}", cause=detail) from error


def encode_line(document: Any) -> bytes:
    """Return ``document`` as one line."""
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def decode_line(line: bytes) -> dict[str, Any]:
    """Return the object on a line; RequestRefused if it is none."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestRefused("a line is not JSON", cause=str(error)) from error
    if not isinstance(document, dict):
        raise RequestRefused("a line is not a JSON object")
    return document


def _converter() -> cattrs.Converter:
    return _CONVERTER


def _make_converter() -> cattrs.Converter:
    converter = make_converter(forbid_extra_keys=True, detailed_validation=True)

    def strict(kind: type[Any]) -> Any:
        allowed = (int, float) if kind is float else (kind,)

        def check(value: Any, asked: type[Any]) -> Any:
            if issubclass(asked, Enum):  # its values are strings, so cattrs takes it for a kind of str
                return asked(value)
            if type(value) not in allowed:
                raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
            return value

        return check

    for kind in (int, str, bool, float):
        converter.register_structure_hook(kind, strict(kind))
    converter.register_structure_hook(UUID, lambda value, _: UUID(value))
    converter.register_unstructure_hook(UUID, str)
    return converter


_CONVERTER: Final = _make_converter()
