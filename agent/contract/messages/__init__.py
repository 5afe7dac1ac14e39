"""The control plane: what the management node asks of an agent, and what an agent answers.

One JSON object a line, over SSH to ``landfall-agent connect``. A request is ``{"v", "id", "verb", "args", "term"}``. An answer to it is
any number of ``{"id", "progress"}`` lines, then one of ``{"id", "error"}``, ``{"id", "result"}``, or a result with ``blob_bytes`` followed
by that many raw bytes (DMI and arrival record can be hundreds of megabytes). Arguments and results are dataclasses, a module for each
noun; unknown or missing keys are refused on both sides. ``term`` counts management nodes that took over: an agent obeys the highest that
it has heard, and lets lower ones only look. A class's docstring begins with its verb.

node         who answers, its health and devices, the path to its peer, its outbox
generations  facts of them; take, drop, open, close; examine, digests, owners
volumes      facts of them; create, admit, list
serving      promote, serve, unserve, demote
transfers    build, mend, receive, send, list, fetch, discard
salvages     update, undo
wire         lines and documents
"""

from __future__ import annotations

from typing import Any, Final

from agent.contract.messages.generations import (
    CloseGeneration,
    DropGeneration,
    Examined,
    ExamineGeneration,
    FetchDigests,
    FindOwners,
    GenerationFacts,
    Opened,
    OpenGeneration,
    OwnedBlocks,
    Owners,
    TakeGeneration,
    Taken,
    newest,
)
from agent.contract.messages.node import (
    AcknowledgeOutbox,
    AskHealth,
    DeviceFacts,
    Devices,
    Done,
    Health,
    Hello,
    ListDevices,
    NodeFacts,
    Notification,
    OpenPath,
    Outbox,
    PathTried,
    Progress,
    ReadOutbox,
    TryPath,
)
from agent.contract.messages.salvages import (
    Deletions,
    FileOutcome,
    Outcome,
    Salvaged,
    UndoSalvage,
    UpdateInstruction,
)
from agent.contract.messages.serving import (
    Demoted,
    DemoteVolume,
    Probed,
    ProbePeer,
    PromoteVolume,
    ServeVolume,
    StopServing,
)
from agent.contract.messages.transfers import (
    Blob,
    BuildMend,
    BuildTransfer,
    Built,
    Differential,
    DiscardTransfer,
    FetchArrival,
    FetchDmi,
    Listening,
    ListTransfers,
    ReceiveTransfer,
    SendTransfer,
    Sent,
    TlsMaterial,
    TransferFacts,
    Transfers,
    TransferState,
)
from agent.contract.messages.volumes import (
    AdmitReplica,
    CreateVolume,
    ListVolumes,
    RemoveVolume,
    ReplicaState,
    Role,
    Unreadable,
    VolumeFacts,
    Volumes,
)
from agent.contract.messages.wire import MAX_LINE_BYTES, PROTOCOL, decode_line, encode_line, from_document, to_document

__all__ = [
    "LOOKING",
    "MAX_LINE_BYTES",
    "PROTOCOL",
    "VERBS",
    "VERB_OF",
    "AcknowledgeOutbox",
    "AdmitReplica",
    "AskHealth",
    "Blob",
    "BuildMend",
    "BuildTransfer",
    "Built",
    "CloseGeneration",
    "CreateVolume",
    "Deletions",
    "DemoteVolume",
    "Demoted",
    "DeviceFacts",
    "Devices",
    "Differential",
    "DiscardTransfer",
    "Done",
    "DropGeneration",
    "ExamineGeneration",
    "Examined",
    "FetchArrival",
    "FetchDigests",
    "FetchDmi",
    "FileOutcome",
    "FindOwners",
    "GenerationFacts",
    "Health",
    "Hello",
    "ListDevices",
    "ListTransfers",
    "ListVolumes",
    "Listening",
    "NodeFacts",
    "Notification",
    "OpenGeneration",
    "OpenPath",
    "Opened",
    "Outbox",
    "Outcome",
    "OwnedBlocks",
    "Owners",
    "PathTried",
    "ProbePeer",
    "Probed",
    "Progress",
    "PromoteVolume",
    "ReadOutbox",
    "ReceiveTransfer",
    "RemoveVolume",
    "ReplicaState",
    "Role",
    "Salvaged",
    "SendTransfer",
    "Sent",
    "ServeVolume",
    "StopServing",
    "TakeGeneration",
    "Taken",
    "TlsMaterial",
    "TransferFacts",
    "TransferState",
    "Transfers",
    "TryPath",
    "UndoSalvage",
    "Unreadable",
    "UpdateInstruction",
    "VolumeFacts",
    "Volumes",
    "decode_line",
    "encode_line",
    "from_document",
    "newest",
    "to_document",
]

VERBS: Final[dict[str, tuple[type[Any], type[Any]]]] = {
    "hello": (Hello, NodeFacts),
    "node.health": (AskHealth, Health),
    "path.open": (OpenPath, Listening),
    "path.try": (TryPath, PathTried),
    "devices": (ListDevices, Devices),
    "volume.create": (CreateVolume, VolumeFacts),
    "volume.admit": (AdmitReplica, VolumeFacts),
    "volume.remove": (RemoveVolume, Done),
    "volume.list": (ListVolumes, Volumes),
    "volume.promote": (PromoteVolume, VolumeFacts),
    "volume.serve": (ServeVolume, VolumeFacts),
    "volume.unserve": (StopServing, VolumeFacts),
    "volume.demote": (DemoteVolume, Demoted),
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
    "peer.probe": (ProbePeer, Probed),
    "outbox.read": (ReadOutbox, Outbox),
    "outbox.acknowledge": (AcknowledgeOutbox, Done),
}
"""Every verb with the types of its arguments and of its result."""

LOOKING: Final = frozenset(
    {
        "hello",
        "node.health",
        "path.open",
        "path.try",
        "devices",
        "volume.list",
        "generation.examine",
        "generation.digests",
        "generation.owners",
        "transfer.list",
        "transfer.dmi",
        "transfer.arrival",
        "peer.probe",
        "outbox.read",
    }
)
"""Verbs that change nothing: a management node of a lower term may use them."""

VERB_OF: Final = {arguments: verb for verb, (arguments, _) in VERBS.items()}
