"""What a volume group of Landfall's means at one moment, read from the tags of its logical volumes (lvm_tags.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from agent.contract.errors import LandfallError, NoSuchGeneration, NoSuchTransfer, NoSuchVolume, RequestRefused
from agent.contract.identity import GenerationId, empty_generation
from agent.contract.messages import GenerationFacts, Unreadable
from agent.volume import lvm_tags as tags
from agent.volume.lvm import LogicalVolume
from agent.volume.substrate import VolumeRecord, Workspace


@dataclass(frozen=True, slots=True)
class Held:
    """Volumes, and which logical volume is what; only what has a meaning is in it, but for ``meaningless``, which is to be swept."""

    volumes: dict[UUID, VolumeRecord]
    facts: dict[GenerationId, GenerationFacts]
    generations: dict[GenerationId, LogicalVolume]
    workspaces: dict[Workspace, LogicalVolume]
    operational: dict[UUID, LogicalVolume]
    origins: dict[UUID, LogicalVolume]  # of classic snapshots
    meaningless: tuple[LogicalVolume, ...]
    unreadable: tuple[Unreadable, ...] = ()

    def volume(self, volume: UUID) -> VolumeRecord:
        """Return a volume's record; NoSuchVolume."""
        if volume not in self.volumes:
            raise NoSuchVolume(f"no volume {volume} here")
        return self.volumes[volume]

    def generation(self, generation: GenerationId) -> LogicalVolume:
        """Return what holds a generation; NoSuchGeneration unless all four fields of its identity agree."""
        self.volume(generation.volume)
        if generation not in self.generations:
            raise NoSuchGeneration(f"generation {generation.name} of volume {generation.volume} is not held here")
        return self.generations[generation]

    def generations_of(self, volume: UUID) -> tuple[GenerationFacts, ...]:
        """Return a volume's generations, oldest first."""
        self.volume(volume)
        found = [facts for facts in self.facts.values() if facts.id.volume == volume]
        return tuple(sorted(found, key=lambda facts: (facts.id.epoch, facts.id.counter, facts.id.nonce)))

    def workspace(self, workspace: Workspace) -> LogicalVolume:
        """Return what holds a workspace; NoSuchTransfer."""
        self.volume(workspace.volume)
        if workspace not in self.workspaces:
            raise NoSuchTransfer(f"there is no {workspace.kind} volume of transfer {workspace.transfer}")
        return self.workspaces[workspace]

    def operational_of(self, volume: UUID) -> LogicalVolume:
        """Return the operational volume; NoSuchVolume."""
        self.volume(volume)
        if volume not in self.operational:
            raise NoSuchVolume(f"volume {volume} has no operational volume here", fix="Serve it first, or ask the node that does.")
        return self.operational[volume]

    def record_of(self, volume: UUID) -> LogicalVolume:
        """Return what carries the tag that is the volume: its g0."""
        self.volume(volume)
        return self.generation(empty_generation(volume))

    def all_of(self, volume: UUID) -> Iterator[LogicalVolume]:
        """Yield every logical volume of a volume."""
        yield from (found for generation, found in self.generations.items() if generation.volume == volume)
        yield from (found for workspace, found in self.workspaces.items() if workspace.volume == volume)
        yield from (found[volume] for found in (self.operational, self.origins) if volume in found)

    def refuse_taken(self, facts: GenerationFacts) -> None:
        """RequestRefused if a generation of that name is here."""
        if any(known.id.name == facts.id.name for known in self.generations_of(facts.id.volume)):
            raise RequestRefused(f"generation {facts.id.name} is here already")


def read(ours: Sequence[LogicalVolume], group: str) -> Held:
    """Return what logical volumes mean. The tag on g0 is the volume: what belongs to none has no meaning.

    As long as some tag cannot be read, what seems to belong to none may belong to that, and is left alone.
    """
    displaced = frozenset[str]().union(*(tags.displaced(found.tags) for found in ours))
    held = Held({}, {}, {}, {}, {}, {}, ())
    unreadable: dict[str, Unreadable] = {}
    for found in ours:
        try:
            if (record := tags.read_volume(found.tags)) is not None:
                held.volumes[record.id] = record
            _meaning(found)
        except LandfallError as error:
            unreadable[found.uuid] = Unreadable(None, f"{group}/{found.name}", str(error))
    meaningless: list[LogicalVolume] = []
    for found in ours:
        if found.uuid in unreadable:
            continue
        facts, workspace, operational, origin, unfinished = _meaning(found)
        of = facts.id.volume if facts else workspace.volume if workspace else operational or origin
        if unfinished or found.uuid in displaced:
            meaningless.append(found)
        elif of is not None and of not in held.volumes:
            meaningless += [] if unreadable else [found]
        elif origin:  # what it holds it holds only if nothing else does
            held.origins[origin] = found
        elif facts:
            held.facts[facts.id], held.generations[facts.id] = facts, found
        elif workspace:
            held.workspaces[workspace] = found
        if operational is not None and found not in meaningless and operational in held.volumes:
            held.operational[operational] = found
    return replace(held, meaningless=tuple(meaningless), unreadable=tuple(unreadable.values()))


def _meaning(found: LogicalVolume) -> tuple[GenerationFacts | None, Workspace | None, UUID | None, UUID | None, UUID | None]:
    """Return (generation, workspace, operational volume of, origin of, unfinished thing of) by a logical volume's tags."""
    operational, origin, unfinished = (tags.read_uuid(found.tags, what) for what in ("operational", "origin", "unfinished"))
    tags.read_becoming(found.tags)  # whoever has origins reads it; what cannot be read is to be known here
    return tags.read_generation(found.tags), tags.read_workspace(found.tags), operational, origin, unfinished
