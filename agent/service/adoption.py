"""A filesystem that is there already becomes a volume, in place: looked at, then taken in, then served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agent.contract import messages as m
from agent.contract.errors import BaseMismatch, LayoutUnsupported
from agent.service.node import Node, ProgressCall
from agent.service.serving import facts_of, start_serving
from agent.service.volumes import new_record, refuse_known
from agent.volume import filesystem
from agent.volume.superblock import kind_of


def appraise(node: Node, arguments: m.AppraiseVolume, progress: ProgressCall) -> m.Appraised:
    """Return what would be adopted; every refusal of ``adopt`` that does not depend on its name. Nothing is changed."""
    with _sound(node, arguments.source) as found:
        return found


def adopt(node: Node, arguments: m.AdoptVolume, progress: ProgressCall) -> m.VolumeFacts:
    """Make a filesystem that is there an operational volume, and serve it.

    What it holds is never removed here, whatever fails: until it is the operational volume it is where it was, and from then on it is
    that. If we die in between or before it is served, asking again does the rest; asked after that, it is served still.
    """
    record = new_record(arguments, m.Role.PRIMARY)
    with node.job(record.id, "volume.adopt"):
        if record not in node.substrate.volumes():
            refuse_known(node, record)
            with _sound(node, arguments.source) as found:
                if (found.filesystem, found.size_bytes, found.sector_bytes) != (record.filesystem, record.size_bytes, record.sector_bytes):
                    raise BaseMismatch(f"{arguments.source} is not what was looked at before", cause=str(found), fix="Look at it again.")
        node.substrate.adopt(record, arguments.source)
        start_serving(node, record)
    return facts_of(node, record)


@contextmanager
def _sound(node: Node, source: str) -> Iterator[m.Appraised]:
    """Yield what there is to adopt; LayoutUnsupported unless it holds a filesystem that can be replicated and was left in order."""
    with node.substrate.foreign(source) as found:
        kind = kind_of(found.device)
        if kind is None:
            raise LayoutUnsupported(
                f"{source} holds no ext4 or XFS at its beginning", fix="Name what the filesystem itself lies on: no disk with partitions."
            )
        filesystem.refuse_unsupported(found.device, kind)
        filesystem.refuse_unclean(found.device, kind)
        yield m.Appraised(kind, found.size_bytes, found.sector_bytes)
