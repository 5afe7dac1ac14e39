"""What a logical volume is to Landfall, written in its tags: the group's metadata alone remembers volumes, generations and workspaces.

    landfall/volume/1/UUID/NAME/FILESYSTEM/SIZE/SECTOR/ROLE/EPOCH                 on g0, which thereby is the volume
    landfall/generation/1/VOLUME/EPOCH/COUNTER/NONCE/KIND/TAKEN_NS[/EPOCH/COUNTER/NONCE]   the last three: salvaged from. On an origin:
                                                                                  it holds that one, unless another carries the same
    landfall/workspace/1/VOLUME/TRANSFER/KIND
    landfall/operational/1/VOLUME
    landfall/origin/1/VOLUME                                                      what the volume's classic snapshots are snapshots of
    landfall/becoming/1/LV-UUID                                                   an origin is being given that one's content
    landfall/detached/1/LV-UUID                                                   on an origin that is being made larger: that one is its
                                                                                  snapshot, also while LVM does not know it
    landfall/unfinished/1/VOLUME                                                  swept by ``recover``
    landfall/instead-of/1/LV-UUID                                                 that one has lost its place to this one, and is swept

A change of tags is one commit of LVM's metadata, so it is the one durable step of every operation.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

from agent.contract.errors import NotOurs, VersionUnknown
from agent.contract.identity import FilesystemKind, GenerationId, GenerationKind
from agent.contract.messages import GenerationFacts, Role
from agent.volume.substrate import VolumeRecord, Workspace, WorkspaceKind

_FORMAT: Final = "1"


def volume_tag(record: VolumeRecord) -> str:
    """Return the tag that makes g0 the volume."""
    return _joined("volume", record.id, record.name, record.filesystem, record.size_bytes, record.sector_bytes, record.role, record.epoch)


def generation_tag(facts: GenerationFacts) -> str:
    """Return the tag that makes a logical volume a generation."""
    of = facts.salvaged_from
    more = () if of is None else (of.epoch, of.counter, of.nonce)
    return _joined("generation", facts.id.volume, facts.id.epoch, facts.id.counter, facts.id.nonce, facts.kind, facts.taken_ns, *more)


def origin_tag(volume: UUID) -> str:
    """Return the tag of what a volume's classic snapshots are snapshots of."""
    return _joined("origin", volume)


def becoming_tag(lv_uuid: str) -> str:
    """Return the tag of an origin that is being given another's content."""
    return _joined("becoming", lv_uuid)


def detached_tag(lv_uuid: str) -> str:
    """Return the tag of an origin of which that one is a snapshot, and is to become one again."""
    return _joined("detached", lv_uuid)


def workspace_tag(workspace: Workspace) -> str:
    """Return the tag that makes a logical volume a workspace."""
    return _joined("workspace", workspace.volume, workspace.transfer, workspace.kind)


def operational_tag(volume: UUID) -> str:
    """Return the tag that makes a logical volume the operational one."""
    return _joined("operational", volume)


def unfinished_tag(volume: UUID) -> str:
    """Return the tag of what is nothing yet."""
    return _joined("unfinished", volume)


def instead_of_tag(lv_uuid: str) -> str:
    """Return the tag of what takes another's place."""
    return _joined("instead-of", lv_uuid)


def read_volume(tags: frozenset[str]) -> VolumeRecord | None:
    """Return the volume that a logical volume's tags speak of, if they do."""
    words = _words(tags, "volume")
    if words is None:
        return None
    with _Strict(tags):
        volume, name, filesystem, size, sector, role, epoch = words
        return VolumeRecord(UUID(volume), name, FilesystemKind(filesystem), int(size), int(sector), Role(role), int(epoch))


def read_generation(tags: frozenset[str]) -> GenerationFacts | None:
    """Return the generation that a logical volume's tags speak of, if they do."""
    words = _words(tags, "generation")
    if words is None:
        return None
    with _Strict(tags):
        volume, epoch, counter, nonce, kind, taken, *of = words
        salvaged_from = GenerationId(UUID(volume), int(of[0]), int(of[1]), of[2]) if of else None
        return GenerationFacts(GenerationId(UUID(volume), int(epoch), int(counter), nonce), GenerationKind(kind), int(taken), salvaged_from)


def read_workspace(tags: frozenset[str]) -> Workspace | None:
    """Return the workspace that a logical volume's tags speak of, if they do."""
    words = _words(tags, "workspace")
    if words is None:
        return None
    with _Strict(tags):
        volume, transfer, kind = words
        return Workspace(UUID(volume), UUID(transfer), WorkspaceKind(kind))


def read_uuid(tags: frozenset[str], what: str) -> UUID | None:
    """Return the volume of an ``operational``, ``origin`` or ``unfinished`` one."""
    words = _words(tags, what)
    if words is None:
        return None
    with _Strict(tags):
        (volume,) = words
        return UUID(volume)


def read_becoming(tags: frozenset[str]) -> str | None:
    """Return the UUID of the logical volume whose content an origin is being given, if it is."""
    words = _words(tags, "becoming")
    return words[0] if words else None


def displaced(tags: frozenset[str]) -> frozenset[str]:
    """Return the UUIDs of the logical volumes whose place this one has taken."""
    return _last_words(tags, "instead-of")


def detached(tags: frozenset[str]) -> frozenset[str]:
    """Return the UUIDs of the logical volumes that are an origin's snapshots, while it is being made larger."""
    return _last_words(tags, "detached")


class _Strict:
    """Turns what does not read as one of our tags into NotOurs."""

    def __init__(self, tags: frozenset[str]) -> None:
        self._tags = tags

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | IndexError):
            raise NotOurs("a logical volume's tags are none of Landfall's", cause=f"{sorted(self._tags)}: {error}") from error


def _joined(what: str, *words: object) -> str:
    return "/".join(("landfall", what, _FORMAT, *map(str, words)))


def _last_words(tags: frozenset[str], what: str) -> frozenset[str]:
    return frozenset(tag.rpartition("/")[2] for tag in tags if tag.startswith(f"landfall/{what}/{_FORMAT}/"))


def _words(tags: frozenset[str], what: str) -> list[str] | None:
    found = [tag.split("/") for tag in tags if tag.startswith(f"landfall/{what}/")]
    if not found:
        return None
    if len(found) > 1:
        raise NotOurs(f"a logical volume carries several tags landfall/{what}", cause=str(sorted(tags)))
    _, _, version, *words = found[0]
    if version != _FORMAT:
        raise VersionUnknown(f"a logical volume carries landfall/{what} of format {version}, this release knows {_FORMAT}")
    return words
