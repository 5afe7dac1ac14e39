"""The differential management information of two frozen generations, put together from its parts.

Nothing is written but the target's digest table and name index in ``state``, each in one durable step: if we die here, the next
call makes what is missing anew. A pure function of the two generations otherwise, so a second call gives the same DMI.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from agent.contract.digest import BlockDigests, file_digest, payload_digest, piece_digest
from agent.contract.dmi import Change, Dmi, ExtentFlag, FileKind, Head, Owner
from agent.contract.dmi import Side as NameSide
from agent.contract.errors import DeviceFailed
from agent.contract.identity import BLOCK_BYTES, FilesystemKind, GenerationId
from agent.differential import digests, names
from agent.differential.ext4 import Ext4Reader
from agent.differential.intervals import spans
from agent.differential.names import NameIndex
from agent.differential.pieces import Pieces, needs_of, pieces_of
from agent.differential.reader import Extents, FilesystemReader, InodeChanges, View
from agent.differential.rows import Rows, Side, rows_of
from agent.system import files, handles
from agent.system.failpoint import failpoint
from agent.volume.substrate import ChangedRuns

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NOATIME


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


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """Which inodes changed, whose the changed blocks are, and what all of them are called; ``base_names`` None: the base is g0."""

    reader: FilesystemReader
    changes: InodeChanges
    pieces: Pieces
    base_names: NameIndex | None
    target_names: NameIndex


def build(request: BuildRequest) -> Dmi:
    """Return the DMI of ``request``; it decodes as what it is encoded to.

    Errors: LayoutUnsupported, DeviceFailed. Leaves the target's digest table and name index in ``request.state``.
    """
    request.state.mkdir(parents=True, exist_ok=True)
    files.sweep(request.state)
    with ThreadPoolExecutor(1, thread_name_prefix="digests") as aside:
        # The changed blocks are read and digested while inodes, owners and names are found out: neither needs the other.
        digesting = aside.submit(_tables, request)
        found = survey(request)
        reader, changes, pieces = found.reader, found.changes, found.pieces
        target = _side(request, request.target, reader, index=found.target_names, changes=changes, there=changes.in_target)
        base = None
        if request.base is not None and found.base_names is not None:
            before = reader_for(request.filesystem, None, request.base, request.changed)
            base = _side(request, request.base, before, index=found.base_names, changes=changes, there=changes.in_base)
        rows = rows_of(changes, base, target, np.isin(changes.inode, pieces.claim_inode) & changes.in_target)
        base_table, table = digesting.result()
    failpoint("differential.table_stored")
    head = Head(
        request.transfer, request.base_id, request.target_id, request.base_taken_ns, request.target_taken_ns,
        request.volume_name, request.volume_bytes, request.sector_bytes, request.filesystem, request.mkfs_arguments,
        reader.root_inode, request.differential_volume,
    )  # fmt: skip
    return Dmi(head, **_piece_columns(pieces, base_table, table), **_file_columns(rows, pieces, target.extents, table))


def survey(request: BuildRequest) -> Survey:
    """Return the owners and names of all that changed, at a cost that follows the change; leaves the target's name index behind.

    Errors: LayoutUnsupported, DeviceFailed.
    """
    reader = reader_for(request.filesystem, request.base, request.target, request.changed)
    changes = reader.changed_inodes()
    known = None if request.base is None else names.load(index_path(request.state, request.base_id))
    if known is not None:
        reader.anticipate(known.with_those_above(changes.inode[changes.kind == FileKind.DIRECTORY]))
    regular = (changes.kind == FileKind.REGULAR) & changes.in_target
    extents = reader.extents(changes.inode[regular], changes.generation[regular])
    owners = reader.ownership(changes, changes.inode[regular], extents)
    of_files = owners.owner[owners.claim_run] == Owner.FILE
    touched = np.setdiff1d(owners.claim_inode[~of_files], changes.inode)
    base_names, target_names = _indexes(request, changes, known, touched=touched, root=reader.root_inode)
    failpoint("differential.names_stored")
    changes = _with_others(request, changes, owners.claim_inode, base=base_names, target=target_names, root=reader.root_inode)
    pieces = pieces_of(request.changed, replace(owners, claim_run=owners.claim_run[of_files], claim_inode=owners.claim_inode[of_files]))
    return Survey(reader, changes, pieces, base_names, target_names)


def reader_for(kind: FilesystemKind, base: View | None, target: View, changed: ChangedRuns) -> FilesystemReader:
    """Return the reader for a filesystem; LayoutUnsupported if the devices hold something Landfall does not replicate."""
    if kind is FilesystemKind.XFS:
        from agent.differential.xfs import XfsReader

        return XfsReader(base, target, changed)
    return Ext4Reader(base, target, changed)


def drop(state: Path, generation: GenerationId) -> None:
    """Forget the digest table and name index of a retired generation."""
    files.remove_durably(table_path(state, generation))
    files.remove_durably(index_path(state, generation))


def table_path(state: Path, generation: GenerationId) -> Path:
    """Return where a generation's digest table is."""
    return state / f"{generation.name}.digests"


def index_path(state: Path, generation: GenerationId) -> Path:
    """Return where a generation's name index is."""
    return state / f"{generation.name}.names"


def _tables(request: BuildRequest) -> tuple[BlockDigests, BlockDigests]:
    """Return the digest tables of base and target, the latter stored."""
    blocks = -(-request.volume_bytes // BLOCK_BYTES)
    base_table = None
    if request.base is not None:
        path = table_path(request.state, request.base_id)
        base_table = digests.load(path, blocks)
        if base_table is None:
            base_table = digests.computed(path, request.base.device, request.volume_bytes)
    path = table_path(request.state, request.target_id)
    table = digests.load(path, blocks)
    if table is None:
        table = digests.derived(path, base_table, request.target.device, request.volume_bytes, request.changed)
    return digests.table_of_zeros(blocks) if base_table is None else base_table, table


def _indexes(
    request: BuildRequest, changes: InodeChanges, base: NameIndex | None, *, touched: U64, root: int
) -> tuple[NameIndex | None, NameIndex]:
    """Return the name indexes of base (None: g0) and target, the latter stored; ``base`` is the one that was stored, if it is whole.

    An index that contradicts the inodes' link counts is not believed, and where metadata of inodes that did not change was ``touched``
    (their times have whole seconds only, or a directory was changed twice within a tick), nothing is: both are walked anew.
    """
    path = index_path(request.state, request.target_id)
    if request.base is not None:
        if base is not None and not len(touched):
            target = _updated_index(request, changes, base)
            if target is not None and _agrees(target, changes, root):
                names.save(target, path)
                return base, target
        base = names.walked(request.base.mount_fd)
        names.save(base, index_path(request.state, request.base_id))
    target = names.walked(request.target.mount_fd)
    names.save(target, path)
    return base, target


def _updated_index(request: BuildRequest, changes: InodeChanges, base: NameIndex) -> NameIndex | None:
    """Return the base's index with the changed directories read anew; None where one cannot be opened by its number."""
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

    try:
        return names.updated(base, np.unique(changes.inode[directories]), opened())
    except DeviceFailed:
        return None


def _agrees(index: NameIndex, changes: InodeChanges, root: int) -> bool:
    """Whether every changed inode has as many names as links, and every directory one."""
    named = changes.in_target & (changes.kind != FileKind.DIRECTORY)
    directories = changes.in_target & ~named & (changes.inode != root) & (changes.target_nlink > 0)
    links = bool(np.all(index.count_of(changes.inode[named]) == changes.target_nlink[named]))
    return links and bool(np.all(index.count_of(changes.inode[directories]) == 1))


def _with_others(
    request: BuildRequest, changes: InodeChanges, claimed: U64, *, base: NameIndex | None, target: NameIndex, root: int
) -> InodeChanges:
    """Return the changes with the inodes that did not change themselves but whose blocks (``claimed``) or names did.

    An inode without a name is left out: nobody's loss.
    """
    renamed = claimed[:0]
    if base is not None:
        renamed = names.renamed_inodes(base, target, np.union1d(changes.inode[changes.kind == FileKind.DIRECTORY], claimed))
    found: list[tuple[int, int, int, int]] = []
    for inode in np.setdiff1d(np.union1d(claimed, renamed), changes.inode).tolist():
        for _, path in target.paths_of(inode, root)[:1]:
            _, generation = handles.identity_at(request.target.mount_fd, path or b".")
            facts = os.stat(path or b".", dir_fd=request.target.mount_fd, follow_symlinks=False)
            found.append((inode, generation, facts.st_mode >> 12, facts.st_nlink))
    if not found:
        return changes
    more = np.array(found, dtype=np.uint64)
    yes = np.ones(len(more), dtype=bool)
    return InodeChanges(
        np.concatenate([changes.inode, more[:, 0]]),
        np.concatenate([changes.generation, more[:, 1].astype(np.uint32)]),
        np.concatenate([changes.kind, more[:, 2].astype(np.uint8)]),
        np.concatenate([changes.in_base, yes]),
        np.concatenate([changes.in_target, yes]),
        np.concatenate([changes.target_nlink, more[:, 3].astype(np.uint32)]),
    )


def _side(
    request: BuildRequest, view: View, reader: FilesystemReader, *, index: NameIndex, changes: InodeChanges, there: NDArray[np.bool_]
) -> Side:
    """Return one generation with the extents of the changed regular files that are ``there``."""
    rows = np.flatnonzero(there & (changes.kind == FileKind.REGULAR))
    found = reader.extents(changes.inode[rows], changes.generation[rows])
    counts = np.zeros(len(changes.inode), dtype=np.uint64)
    counts[rows] = np.diff(found.start)
    return Side(view, request.filesystem, reader.root_inode, index, replace(found, start=_starts(counts)))


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


def _file_columns(rows: Rows, pieces: Pieces, extents: Extents, table: BlockDigests) -> dict[str, NDArray[Any]]:
    found = rows.files
    inode = np.array([file.inode for file in found], dtype="<u8")
    present = np.array([not file.change & Change.DELETED for file in found], dtype=bool)
    need_start, need = needs_of(pieces, inode, present)
    start, count = extents.start[rows.of_changes], np.diff(extents.start)[rows.of_changes]
    count[~present] = 0
    place = spans(start.astype(np.int64), count.astype(np.int64))
    attributes = [file.attributes for file in found]
    listed = [
        (side, name) for file in found for side, some in zip(NameSide, (file.base_names, file.target_names), strict=True) for name in some
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


def _content_digests(rows: Rows, extents: Extents, table: BlockDigests) -> Iterator[bytes]:
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
