"""Salvages: the update instruction, what became of each file, and taking it back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from agent.contract.messages.generations import GenerationFacts


class Deletions(StrEnum):
    """What a partial salvage does with files the source had deleted."""

    HOLD = "hold"
    APPLY = "apply"


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
