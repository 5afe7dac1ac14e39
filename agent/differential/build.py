"""The differential management information of two frozen generations, put together from its parts.

Nothing is written but the target's digest table and name index in ``state``, each in one durable step: if we die here, the next
call makes what is missing anew. A pure function of the two generations otherwise, so a second call gives the same DMI.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from agent.contract.digest import BlockDigests, file_digest, payload_digest, piece_digest
from agent.contract.dmi import Change, Dmi, ExtentFlag, FileKind, Head, Side
from agent.contract.identity import FilesystemKind, GenerationId
from agent.differential import digests, names
from agent.differential.ext4 import Ext4Reader
from agent.differential.inodes import Attributes, nameless, read_attributes
from agent.differential.intervals import spans
from agent.differential.names import NameIndex
from agent.differential.pieces import Pieces, needs_of, pieces_of
from agent.differential.reader import Extents, FilesystemReader, InodeChanges, View
from agent.system import files, handles
from agent.volume.substrate import ChangedRuns

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NOATIME
_NOTHING: Final = Change(0)


@dataclass(frozen=True, slots=True, eq=False)
class BuildRequest:
    """What a DMI is built from; ``base`` None: the base is g0. ``state`` is a folder for digest tables and name indexes."""

    transfer: UUID
    base_id: GenerationId
    target_id: GenerationId
    base_taken_ns: int
    target_taken_ns: int
    volume_name: str
    volume_bytes: int
    sector_bytes: int
    filesystem: FilesystemKind
    mkfs_arguments: tuple[str, ...]
    differential_volume: str
    base: View | None
    target: View
    changed: ChangedRuns
    state: Path


@dataclass(frozen=True, slots=True)
class _File:
    """One row of the DMI's files before it is columns; ``change`` is complete but for what its pieces say."""

    inode: int
    generation: int
    change: Change
    attributes: Attributes
    base_names: tuple[tuple[int, bytes], ...]
    target_names: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Indexes:
    """The names on both sides; ``base`` is empty where the base is g0."""

    base: NameIndex
    target: NameIndex


def build(request: BuildRequest) -> Dmi:
    """Return the DMI of ``request``; it decodes as what it is encoded to.

    Errors: LayoutUnsupported, DeviceFailed. Leaves the target's digest table and name index in ``request.state``.
    """
    request.state.mkdir(parents=True, exist_ok=True)
    base_table, table = _tables(request)
    reader = reader_for(request.filesystem, request.base, request.target, request.changed)
    before = None if request.base is None else reader_for(request.filesystem, None, request.base, request.changed)
    changes = reader.changed_inodes()
    indexes = _indexes(request, changes, reader.root_inode)
    files.sweep(request.state)

    regular = (changes.kind == FileKind.REGULAR) & changes.in_target
    extents = reader.extents(changes.inode[regular], changes.generation[regular])
    ownership = reader.ownership(changes, changes.inode[regular], extents)
    pieces = pieces_of(request.changed, ownership)
    changes = _with_others(request, changes, np.unique(ownership.claim_inode), indexes, reader.root_inode)

    extents = _extents_of_rows(reader, changes, changes.in_target)
    old = None if before is None else _extents_of_rows(before, changes, changes.in_base)
    claimed = np.isin(changes.inode, pieces.claim_inode) & changes.in_target
    rows = _rows(request, changes, indexes, reader.root_inode, extents=extents, old=old, claimed=claimed)
    head = Head(
        request.transfer, request.base_id, request.target_id, request.base_taken_ns, request.target_taken_ns,
        request.volume_name, request.volume_bytes, request.sector_bytes, request.filesystem, request.mkfs_arguments,
        reader.root_inode, request.differential_volume,
    )  # fmt: skip
    return Dmi(head, **_piece_columns(pieces, base_table, table), **_file_columns(rows, pieces, extents, table))


def reader_for(kind: FilesystemKind, base: View | None, target: View, changed: ChangedRuns) -> FilesystemReader:
    """Return the reader for a filesystem; LayoutUnsupported if the devices hold something Landfall does not replicate."""
    if kind is FilesystemKind.XFS:
        from agent.differential.xfs import XfsReader

        return XfsReader(base, target, changed)
    return Ext4Reader(base, target, changed)


def drop(state: Path, generation: GenerationId) -> None:
    """Forget the digest table and name index of a retired generation."""
    files.remove_durably(_table_path(state, generation))
    files.remove_durably(_index_path(state, generation))


def _table_path(state: Path, generation: GenerationId) -> Path:
    return state / f"{generation.name}.digests"


def _index_path(state: Path, generation: GenerationId) -> Path:
    return state / f"{generation.name}.names"


def _tables(request: BuildRequest) -> tuple[BlockDigests, BlockDigests]:
    """Return the digest tables of base and target, the latter stored."""
    blocks = -(-request.volume_bytes // 4096)
    base_table = None
    if request.base is not None:
        path = _table_path(request.state, request.base_id)
        base_table = digests.load(path, blocks)
        if base_table is None:
            base_table = digests.computed(path, request.base.device, request.volume_bytes)
    path = _table_path(request.state, request.target_id)
    table = digests.load(path, blocks)
    if table is None:
        table = digests.derived(path, base_table, request.target.device, request.volume_bytes, request.changed)
    return digests.table_of_zeros(blocks) if base_table is None else base_table, table


def _indexes(request: BuildRequest, changes: InodeChanges, root: int) -> _Indexes:
    """Return the name indexes, the target's stored. One that contradicts the inodes' link counts is not believed but built anew."""
    path = _index_path(request.state, request.target_id)
    if request.base is None:
        target = names.walked(request.target.mount_fd)
        names.save(target, path)
        return _Indexes(names.updated(target, np.unique(target.parent), ()), target)
    base_path = _index_path(request.state, request.base_id)
    base = names.load(base_path)
    if base is not None:
        target = _updated_index(request, changes, base)
        if _agrees(target, changes):
            names.save(target, path)
            return _Indexes(base, target)
    base = names.walked(request.base.mount_fd)
    names.save(base, base_path)
    target = names.walked(request.target.mount_fd)
    names.save(target, path)
    return _Indexes(base, target)


def _updated_index(request: BuildRequest, changes: InodeChanges, base: NameIndex) -> NameIndex:
    directories = changes.kind == FileKind.DIRECTORY
    there = np.flatnonzero(directories & changes.in_target & (changes.target_nlink > 0))

    def opened() -> Iterator[tuple[int, int]]:
        for row in there.tolist():
            inode, generation = int(changes.inode[row]), int(changes.generation[row])
            fd = handles.open_inode(request.target.mount_fd, request.filesystem, inode, generation, _DIRECTORY)
            try:
                yield inode, fd
            finally:
                os.close(fd)

    return names.updated(base, np.unique(changes.inode[directories]), opened())


def _agrees(index: NameIndex, changes: InodeChanges) -> bool:
    named = changes.in_target & (changes.kind != FileKind.DIRECTORY)
    return bool(np.all(index.count_of(changes.inode[named]) == changes.target_nlink[named]))


def _with_others(request: BuildRequest, changes: InodeChanges, claimed: U64, indexes: _Indexes, root: int) -> InodeChanges:
    """Return the changes with the inodes that did not change themselves but whose blocks or names did.

    An inode without a name is left out: nobody's loss.
    """
    directories = np.unique(changes.inode[changes.kind == FileKind.DIRECTORY])
    renamed = names.renamed_inodes(indexes.base, indexes.target, directories) if request.base is not None else claimed[:0]
    others = np.setdiff1d(np.union1d(claimed, renamed), changes.inode)
    found: list[tuple[int, int, int, int]] = []
    for inode in others.tolist():
        for _, path in indexes.target.paths_of(inode, root)[:1]:
            _, generation = handles.identity_at(request.target.mount_fd, path)
            facts = os.stat(path, dir_fd=request.target.mount_fd, follow_symlinks=False)
            found.append((inode, generation, facts.st_mode >> 12, facts.st_nlink))
    if not found:
        return changes
    more = np.array(found, dtype=np.uint64)
    yes = np.ones(len(more), dtype=bool)
    return InodeChanges(
        np.concatenate([changes.inode, more[:, 0]]),
        np.concatenate([changes.generation, more[:, 1].astype(np.uint32)]),
        np.concatenate([changes.kind, more[:, 2].astype(np.uint8)]),
        np.concatenate([changes.in_base, yes & (request.base is not None)]),
        np.concatenate([changes.in_target, yes]),
        np.concatenate([changes.target_nlink, more[:, 3].astype(np.uint32)]),
    )


def _extents_of_rows(reader: FilesystemReader, changes: InodeChanges, there: NDArray[np.bool_]) -> Extents:
    """Return extents with a row of ``start`` for every row of the changes; none where the inode is not there or not regular."""
    rows = np.flatnonzero(there & (changes.kind == FileKind.REGULAR))
    found = reader.extents(changes.inode[rows], changes.generation[rows])
    counts = np.zeros(len(changes.inode), dtype=np.uint64)
    counts[rows] = np.diff(found.start)
    start = np.concatenate([np.zeros(1, np.uint64), np.cumsum(counts, dtype=np.uint64)])
    return Extents(start, found.logical, found.physical, found.blocks, found.flags)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The files that go into the DMI, and the row of each in the changes (and in their extents)."""

    files: list[_File]
    of_changes: NDArray[np.int64]


def _rows(
    request: BuildRequest,
    changes: InodeChanges,
    indexes: _Indexes,
    root: int,
    *,
    extents: Extents,
    old: Extents | None,
    claimed: NDArray[np.bool_],
) -> _Rows:
    """Return a row for every inode of which something promised changed."""
    found: list[_File] = []
    kept: list[int] = []
    columns = (changes.inode, changes.generation, changes.kind, changes.in_base, changes.in_target, changes.target_nlink)
    for row, (inode, generation, kind, in_base, in_target, links) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        base_names = tuple(indexes.base.paths_of(inode, root)) if in_base and request.base is not None else ()
        target_names = tuple(indexes.target.paths_of(inode, root)) if in_target and links else ()
        was = now = None
        if base_names and request.base is not None:
            was = read_attributes(request.base, request.filesystem, inode, generation, kind, mapped=old is not None and _mapped(old, row))
        if target_names:
            now = read_attributes(request.target, request.filesystem, inode, generation, kind, mapped=_mapped(extents, row))
        if now is not None:
            change = _change(was, now, claimed[row] or (was is not None and old is not None and not _same_extents(old, extents, row)))
            change |= Change.NAMES if was is not None and set(base_names) != set(target_names) else _NOTHING
            file = _File(inode, generation, change, now, base_names if was else (), target_names)
        elif was is not None:
            file = _File(inode, generation, Change.DELETED, was, base_names, ())
        elif in_target:
            file = _File(inode, generation, Change.NEW | Change.NAMELESS, nameless(kind), (), ())
        else:
            continue
        if file.change:
            found.append(file)
            kept.append(row)
    return _Rows(found, np.array(kept, dtype=np.int64))


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


def _mapped(extents: Extents, row: int) -> bool:
    return bool(extents.start[row] != extents.start[row + 1])


def _same_extents(old: Extents, new: Extents, row: int) -> bool:
    before, after = (slice(int(each.start[row]), int(each.start[row + 1])) for each in (old, new))
    unwritten = np.uint32(ExtentFlag.UNWRITTEN)
    return (
        np.array_equal(old.logical[before], new.logical[after])
        and np.array_equal(old.physical[before], new.physical[after])
        and np.array_equal(old.blocks[before], new.blocks[after])
        and np.array_equal(old.flags[before] & unwritten, new.flags[after] & unwritten)
    )


def _piece_columns(pieces: Pieces, base: BlockDigests, target: BlockDigests) -> dict[str, NDArray[Any]]:
    bounds = list(zip(pieces.op_block.tolist(), pieces.block_count.tolist(), strict=True))
    return {
        "op_block": pieces.op_block,
        "diff_block": pieces.diff_block,
        "block_count": pieces.block_count,
        "owner": pieces.owner,
        "target_hole": pieces.target_hole,
        "update_digest": _digest_column(piece_digest(target[first : first + count], first) for first, count in bounds),
        "diff_digest": _digest_column(piece_digest(base[first : first + count], first) for first, count in bounds),
    }


def _file_columns(rows: _Rows, pieces: Pieces, extents: Extents, table: BlockDigests) -> dict[str, NDArray[Any]]:
    found = rows.files
    inode = np.array([file.inode for file in found], dtype="<u8")
    present = np.array([not file.change & Change.DELETED for file in found], dtype=bool)
    need_start, need = needs_of(pieces, inode, present)
    start, count = extents.start[rows.of_changes], np.diff(extents.start)[rows.of_changes]
    count[~present] = 0
    place = spans(start.astype(np.int64), count.astype(np.int64))
    attributes = [file.attributes for file in found]
    listed = [
        (side, name) for file in found for side, some in zip(Side, (file.base_names, file.target_names), strict=True) for name in some
    ]
    xattrs = [pair for each in attributes for pair in each.xattrs]
    return {
        "inode": inode,
        "inode_generation": np.array([file.generation for file in found], dtype="<u4"),
        "kind": np.array([each.kind for each in attributes], dtype="u1"),
        "change": np.array([int(file.change) for file in found], dtype="u1"),
        "mode": np.array([each.mode for each in attributes], dtype="<u4"),
        "uid": np.array([each.uid for each in attributes], dtype="<u4"),
        "gid": np.array([each.gid for each in attributes], dtype="<u4"),
        "nlink": np.array([each.nlink for each in attributes], dtype="<u4"),
        "size": np.array([each.size for each in attributes], dtype="<u8"),
        "mtime_s": np.array([each.mtime_s for each in attributes], dtype="<i8"),
        "mtime_ns": np.array([each.mtime_ns for each in attributes], dtype="<u4"),
        "device": np.array([each.device for each in attributes], dtype="<u8"),
        "project": np.array([each.project for each in attributes], dtype="<u4"),
        "attr_flags": np.array([each.flags for each in attributes], dtype="<u4"),
        "file_digest": _digest_column(_content_digests(rows, extents, table)),
        **_blobs("payload_start", "payload", [each.payload for each in attributes]),
        "need_start": need_start,
        "need": need,
        "extent_start": _starts(count),
        "extent_logical": extents.logical[place],
        "extent_physical": extents.physical[place],
        "extent_blocks": extents.blocks[place],
        "extent_flags": extents.flags[place],
        "name_start": _starts([len(file.base_names) + len(file.target_names) for file in found]),
        "name_side": np.array([int(side) for side, _ in listed], dtype="u1"),
        "name_parent": np.array([parent for _, (parent, _) in listed], dtype="<u8"),
        **_blobs("name_path_start", "paths", [path for _, (_, path) in listed]),
        "xattr_start": _starts([len(each.xattrs) for each in attributes]),
        **_blobs("xattr_name_start", "xattr_names", [name for name, _ in xattrs]),
        **_blobs("xattr_value_start", "xattr_values", [value for _, value in xattrs]),
    }


def _content_digests(rows: _Rows, extents: Extents, table: BlockDigests) -> Iterator[bytes]:
    """Yield the digest of each file's content in the target; a deleted or nameless file counts as empty but for its size."""
    logical, physical, blocks = extents.logical.tolist(), extents.physical.tolist(), extents.blocks.tolist()
    written = ((extents.flags & np.uint32(ExtentFlag.UNWRITTEN)) == 0).tolist()
    start = extents.start.tolist()
    for file, row in zip(rows.files, rows.of_changes.tolist(), strict=True):
        size = file.attributes.size
        if file.change & Change.DELETED:
            yield payload_digest(size, b"")
        elif file.attributes.kind != FileKind.REGULAR or file.attributes.payload:
            yield payload_digest(size, file.attributes.payload)
        else:
            runs = (
                (logical[at], table[physical[at] : physical[at] + blocks[at]]) for at in range(start[row], start[row + 1]) if written[at]
            )
            yield file_digest(size, runs)


def _digest_column(values: Iterator[bytes]) -> NDArray[np.void]:
    return np.frombuffer(b"".join(values), dtype="V16")


def _starts(counts: Any) -> U64:
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(np.asarray(counts, dtype=np.uint64), dtype=np.uint64)])


def _blobs(start: str, data: str, values: list[bytes]) -> dict[str, NDArray[Any]]:
    return {start: _starts([len(value) for value in values]), data: np.frombuffer(b"".join(values), dtype=np.uint8)}
