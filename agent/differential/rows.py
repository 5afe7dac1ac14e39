"""Changed inodes to the DMI's rows of files: what happened to each, its attributes, its names on both sides; read from the mounts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.contract.dmi import Change, ExtentFlag, FileKind
from agent.contract.identity import FilesystemKind
from agent.differential.inodes import Attributes, Subject, nameless, read_attributes
from agent.differential.names import NameIndex
from agent.differential.reader import Extents, InodeChanges, View

_NOTHING: Final = Change(0)


@dataclass(frozen=True, slots=True)
class File:
    """One row of the DMI's files before it is columns; names are (inode of the directory, path)."""

    inode: int
    generation: int
    change: Change
    attributes: Attributes
    base_names: tuple[tuple[int, bytes], ...]
    target_names: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The files that go into the DMI, and the row of each in the changes (and in their extents)."""

    files: list[File]
    of_changes: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One generation: its mount, its names, and the extents of the changed inodes (a row of ``start`` for each row of the changes)."""

    view: View
    filesystem: FilesystemKind
    root_inode: int
    names: NameIndex
    extents: Extents

    def names_of(self, inode: int) -> tuple[tuple[int, bytes], ...]:
        """Return (directory, path) of each name, in order of paths."""
        return tuple(sorted(self.names.paths_of(inode, self.root_inode), key=lambda name: name[1]))

    def attributes_of(self, row: int, changes: InodeChanges, path: bytes) -> Attributes:
        """Return the attributes of the inode in a row of the changes, which has a name."""
        mapped = bool(self.extents.start[row] != self.extents.start[row + 1])
        subject = Subject(int(changes.inode[row]), int(changes.generation[row]), int(changes.kind[row]), path, mapped)
        return read_attributes(self.view, self.filesystem, subject)


def rows_of(changes: InodeChanges, base: Side | None, target: Side, blocks_changed: NDArray[np.bool_]) -> Rows:
    """Return a row for every inode of which something promised changed.

    ``blocks_changed`` (by row of the changes): blocks that it has in the target differ. An inode that has lost its last name counts as
    deleted, though it be open still; one that never had a name is NAMELESS.
    """
    found: list[File] = []
    kept: list[int] = []
    columns = (changes.inode, changes.generation, changes.kind, changes.in_base, changes.in_target, changes.target_nlink)
    for row, (inode, generation, kind, in_base, in_target, links) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        base_names = base.names_of(inode) if base is not None and in_base else ()
        target_names = target.names_of(inode) if in_target and links else ()
        was = base.attributes_of(row, changes, base_names[0][1]) if base is not None and base_names else None
        if target_names:
            now = target.attributes_of(row, changes, target_names[0][1])
            moved = was is not None and base is not None and not _same_extents(base.extents, target.extents, row)
            change = _change(was, now, bool(blocks_changed[row]) or moved)
            change |= Change.NAMES if was is not None and base_names != target_names else _NOTHING
            file = File(inode, generation, change, now, base_names, target_names)
        elif was is not None:
            file = File(inode, generation, Change.DELETED, was, base_names, ())
        elif in_target:
            file = File(inode, generation, Change.NEW | Change.NAMELESS, nameless(kind), (), ())
        else:
            continue
        if file.change:
            found.append(file)
            kept.append(row)
    return Rows(found, np.array(kept, dtype=np.int64))


def _change(was: Attributes | None, now: Attributes, blocks_differ: bool) -> Change:
    """Return what happened to a file that has a name in the target, its names apart."""
    if was is None:
        return Change.NEW | Change.CONTENT | Change.ATTRIBUTES | Change.NAMES
    change = _NOTHING
    if now.kind == FileKind.REGULAR and (blocks_differ or was.size != now.size):
        change |= Change.CONTENT
    if was.payload != now.payload or was.device != now.device or was.kind != now.kind:
        change |= Change.CONTENT
    if _promised(was) != _promised(now):
        change |= Change.ATTRIBUTES
    return change


def _promised(of: Attributes) -> tuple[int, int, int, int, int, int, int, tuple[tuple[bytes, bytes], ...]]:
    return of.mode, of.uid, of.gid, of.mtime_s, of.mtime_ns, of.project, of.flags, of.xattrs


def _same_extents(old: Extents, new: Extents, row: int) -> bool:
    before, after = (slice(int(each.start[row]), int(each.start[row + 1])) for each in (old, new))
    unwritten = np.uint32(ExtentFlag.UNWRITTEN)
    return (
        np.array_equal(old.logical[before], new.logical[after])
        and np.array_equal(old.physical[before], new.physical[after])
        and np.array_equal(old.blocks[before], new.blocks[after])
        and np.array_equal(old.flags[before] & unwritten, new.flags[after] & unwritten)
    )
