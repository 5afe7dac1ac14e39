"""Generations: what a node holds of them, taking, dropping and opening them."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from agent.contract.errors import NoSuchGeneration
from agent.contract.identity import GenerationId, GenerationKind


@dataclass(frozen=True, slots=True)
class GenerationFacts:
    """A generation as a node holds it."""

    id: GenerationId
    kind: GenerationKind
    taken_ns: int
    salvaged_from: GenerationId | None = None  # the target whose transfer did not finish


@dataclass(frozen=True, slots=True)
class TakeGeneration:
    """generation.take: freeze, clone, thaw (NAS 1)."""

    volume: UUID


@dataclass(frozen=True, slots=True)
class Taken:
    generation: GenerationFacts
    frozen_ms: float


@dataclass(frozen=True, slots=True)
class TakeTogether:
    """generation.take_together: freeze several volumes, clone each, thaw them (NAS 1). What they hold is of one moment."""

    volumes: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class TakenTogether:
    """Answer to generation.take_together: one of each volume, in the order of the request, all with the same ``taken_ns``."""

    generations: tuple[GenerationFacts, ...]
    frozen_ms: float  # from the first that was frozen to the last that was thawed


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
class PlacedFile:
    """A file of a generation, and where it is to be: paths (surrogateescape) relative to the root, ``at`` with at least as many parts.

    What is there is replaced if it is to be, or if nobody touched it since a generation that the order names, or if it is the same.
    """

    path: str
    at: str
    replace: bool = True


@dataclass(frozen=True, slots=True)
class RestoreFiles:
    """generation.restore: copy files from a generation into the volume that this node serves; ``with_below`` with all in directories."""

    generation: GenerationId
    files: tuple[PlacedFile, ...]
    with_below: bool = True
    untouched_since: GenerationId | None = None


@dataclass(frozen=True, slots=True)
class RefusedPath:
    """A path that was not restored, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Restored:
    """Answer to generation.restore and rescue.send: files that are in their place now, and the bytes of their content."""

    files: int
    bytes: int
    refused: tuple[RefusedPath, ...]


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


def newest(generations: tuple[GenerationFacts, ...]) -> GenerationFacts:
    """Return the newest of a node's generations, g0 if there is no other; NoSuchGeneration if none can be read.

    What is kept of an overtaken primary stands beside the line.
    """
    line = [facts for facts in generations if facts.kind is not GenerationKind.KEPT]
    if not line:
        raise NoSuchGeneration("no record of a generation of this volume can be read")
    return line[-1]
