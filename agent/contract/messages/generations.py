"""Generations: what a node holds of them, taking, dropping and opening them."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

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


def newest(generations: tuple[GenerationFacts, ...]) -> GenerationFacts:
    """Return the newest of a node's generations, g0 if there is no other. What is kept of an overtaken primary stands beside the line."""
    return [facts for facts in generations if facts.kind is not GenerationKind.KEPT][-1]
