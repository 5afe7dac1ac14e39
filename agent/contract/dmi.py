"""Differential management information (DMI): which blocks changed between two generations, and whose they are.

Everything is columns (numpy arrays), so a DMI of ten million pieces is a handful of arrays. ``Dmi.decode`` refuses what is not
consistent in itself, so that later stages index without looking. Rows that belong to a file (its pieces, extents,
names, xattrs) are in compressed form: ``<what>_start`` has one entry per file and one more, file ``f`` owns rows
``start[f]:start[f + 1]``.

FORMAT.md, section 2, gives the sections and their bounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum, IntFlag
from typing import Any, Final
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from agent.contract.columns import ColumnSpec, decode, encode
from agent.contract.errors import DmiMalformed
from agent.contract.identity import BLOCK_BYTES, FilesystemKind, GenerationId

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
Digests = NDArray[np.void]

HOLE: Final = 2**64 - 1
"""As ``diff_block``: the base has a hole here, its differential data is zeros and is stored nowhere."""

MAX_PIECE_BLOCKS: Final = 256
MAX_NAME_BYTES: Final = 255
MAX_PATH_BYTES: Final = 64 * 1024
MAX_VOLUME_BLOCKS: Final = 2**44


class Owner(IntEnum):
    """Who owns a piece in the target generation."""

    METADATA = 0
    FILE = 1
    FREE = 2  # by the target's own allocation map
    JOURNAL = 3  # the filesystem's log: sent last


class FileKind(IntEnum):
    """Type of a changed inode; the values are stat's S_IFMT >> 12."""

    FIFO = 1
    CHARACTER = 2
    DIRECTORY = 4
    BLOCK = 6
    REGULAR = 8
    SYMLINK = 10
    SOCKET = 12


class Change(IntFlag):
    """What happened to an inode between base and target."""

    NEW = 1  # not in the base
    DELETED = 2  # not in the target; the attributes are the base's
    CONTENT = 4  # pieces of it changed, or its size, extents or payload did
    ATTRIBUTES = 8
    NAMES = 16
    NAMELESS = 32  # open but unlinked in the target: it has blocks and no name, so it is nobody's loss


class Side(IntEnum):
    """The generation in which a file has a name."""

    BASE = 0
    TARGET = 1


class ExtentFlag(IntFlag):
    """Flags of an extent."""

    UNWRITTEN = 1  # allocated, reads as zeros
    SHARED = 2  # reflinked: other files have the same blocks


@dataclass(frozen=True, slots=True)
class Head:
    """Which differential this is. Times are nanoseconds since the epoch, for people; nothing is decided by them."""

    transfer: UUID
    base: GenerationId
    target: GenerationId
    base_taken_ns: int
    target_taken_ns: int
    volume_name: str
    volume_bytes: int
    sector_bytes: int
    filesystem: FilesystemKind
    mkfs_arguments: tuple[str, ...]  # make an empty filesystem of the same kind and features; the device is appended
    root_inode: int
    differential_volume: str  # identity of the device that ``diff_block`` addresses

    @property
    def volume_blocks(self) -> int:
        """Blocks of the volume, the last one possibly partial."""
        return -(-self.volume_bytes // BLOCK_BYTES)


@dataclass(frozen=True, slots=True, eq=False)
class Dmi:
    """One differential. P pieces in order of address, F files, all arrays little-endian and read-only."""

    head: Head
    # pieces, P rows, ascending and disjoint by op_block
    op_block: U64  # first operational block
    diff_block: U64  # block address of its pre-image in the differential volume, HOLE where the base has none
    block_count: U32  # 1 to MAX_PIECE_BLOCKS
    owner: U8  # Owner
    target_hole: U8  # 1: the target has a hole here, the update data is zeros and is not sent
    update_digest: Digests  # V16, digest.piece_digest of the target's blocks
    diff_digest: Digests  # V16, digest.piece_digest of the base's blocks
    # files, F rows
    inode: U64
    inode_generation: U32
    kind: U8  # FileKind
    change: U8  # Change
    mode: U32  # permission bits with setuid, setgid, sticky; without the type
    uid: U32
    gid: U32
    nlink: U32
    size: U64  # bytes
    mtime_s: NDArray[np.int64]
    mtime_ns: U32
    device: U64  # major << 32 | minor of a device node
    project: U32
    attr_flags: U32  # chattr flags as FS_IOC_GETFLAGS gives them, inherent ones (extents, inline) masked out
    file_digest: Digests  # V16, digest.file_digest or payload_digest
    payload_start: U64  # F + 1 offsets into payload
    payload: U8  # symlink targets, content that lives in the inode
    # pieces a file needs, by row of the piece columns; a shared piece stands under several files
    need_start: U64
    need: U32
    # extents of changed regular files in the target, in logical order
    extent_start: U64
    extent_logical: U64
    extent_physical: U64
    extent_blocks: U64
    extent_flags: U32  # ExtentFlag
    # names of each file, base side first; the path is relative to the root, its last component is the name
    name_start: U64
    name_side: U8  # Side
    name_parent: U64  # inode of the directory that holds the name
    name_path_start: U64  # one per name and one more, offsets into paths
    paths: U8
    # extended attributes, with ACLs as system.posix_acl_*
    xattr_start: U64
    xattr_name_start: U64  # one per xattr and one more
    xattr_names: U8
    xattr_value_start: U64
    xattr_values: U8

    @property
    def piece_total(self) -> int:
        """Number of pieces."""
        return len(self.op_block)

    @property
    def file_total(self) -> int:
        """Number of changed files (inodes of any kind)."""
        return len(self.inode)

    def needs(self, file: int) -> U32:
        """Return the rows of the pieces that ``file`` needs."""
        return self.need[int(self.need_start[file]) : int(self.need_start[file + 1])]

    def names(self, file: int, side: Side) -> list[tuple[int, bytes]]:
        """Return (parent inode, path) of each name of ``file`` in one generation."""
        rows = range(int(self.name_start[file]), int(self.name_start[file + 1]))
        return [(int(self.name_parent[row]), self.path(row)) for row in rows if self.name_side[row] == side]

    def path(self, name_row: int) -> bytes:
        """Return the path in row ``name_row`` of the names."""
        return _blob(self.paths, self.name_path_start, name_row)

    def payload_of(self, file: int) -> bytes:
        """Return the symlink target or inline content of ``file``."""
        return _blob(self.payload, self.payload_start, file)

    def xattrs(self, file: int) -> list[tuple[bytes, bytes]]:
        """Return the extended attributes of ``file`` as (name, value)."""
        rows = range(int(self.xattr_start[file]), int(self.xattr_start[file + 1]))
        return [
            (_blob(self.xattr_names, self.xattr_name_start, row), _blob(self.xattr_values, self.xattr_value_start, row)) for row in rows
        ]

    def extents(self, file: int) -> list[tuple[int, int, int, int]]:
        """Return the extents of ``file`` as (logical block, physical block, blocks, ExtentFlag)."""
        at = slice(int(self.extent_start[file]), int(self.extent_start[file + 1]))
        return list(
            zip(
                self.extent_logical[at].tolist(),
                self.extent_physical[at].tolist(),
                self.extent_blocks[at].tolist(),
                self.extent_flags[at].tolist(),
                strict=True,
            )
        )

    def encode(self) -> Iterator[bytes]:
        """Yield the DMI's bytes."""
        columns = {spec.name: getattr(self, spec.name) for spec in SPECS[1:]}
        columns["head"] = np.frombuffer(_head_bytes(self.head), dtype=np.uint8)
        return encode(columns, SPECS)

    @staticmethod
    def decode(buffer: bytes | memoryview) -> Dmi:
        """Return the DMI in ``buffer``; DmiMalformed unless all of it is well formed and consistent."""
        columns = decode(buffer, SPECS)
        head = _head_of(columns.pop("head").tobytes())
        dmi = Dmi(head, **columns)
        _check(dmi)
        return dmi


_TYPES: Final = {
    "U64": "<u8",
    "U32": "<u4",
    "U8": "u1",
    "Digests": "V16",
    "NDArray[np.int64]": "<i8",
}
SPECS: Final = (
    ColumnSpec.of("head", "u1"),
    *(ColumnSpec.of(field.name, _TYPES[str(field.type)]) for field in fields(Dmi)[1:]),
)
"""The sections in file order: the head, then the fields of Dmi in the order in which they stand above."""

_HEAD_KEYS: Final = (
    "transfer", "base", "target", "base_taken_ns", "target_taken_ns", "volume_name", "volume_bytes", "sector_bytes",
    "filesystem", "mkfs_arguments", "root_inode", "differential_volume",
)  # fmt: skip


def _head_bytes(head: Head) -> bytes:
    document = {
        "transfer": str(head.transfer),
        "base": _generation_list(head.base),
        "target": _generation_list(head.target),
        **{key: getattr(head, key) for key in _HEAD_KEYS[3:]},
    }
    return json.dumps(document, sort_keys=True, ensure_ascii=True).encode()


def _generation_list(generation: GenerationId) -> list[str | int]:
    return [str(generation.volume), generation.epoch, generation.counter, generation.nonce]


def _head_of(raw: bytes) -> Head:
    """Return the head, each value checked for type and bounds."""
    if len(raw) > 64 * 1024:
        raise DmiMalformed("the head is too long")
    try:
        document = json.loads(raw)
        if not isinstance(document, dict) or set(document) != set(_HEAD_KEYS):
            raise ValueError("its keys are not those of a head")
        if json.dumps(document, sort_keys=True, ensure_ascii=True).encode() != raw:
            raise ValueError("it is not in its one spelling")
        for key in ("base_taken_ns", "target_taken_ns", "volume_bytes", "sector_bytes", "root_inode"):
            _bounded(document[key], key)
        for key in ("volume_name", "differential_volume"):
            if not isinstance(document[key], str) or len(document[key]) > 256:
                raise ValueError(f"{key} is no short text")
        arguments = document["mkfs_arguments"]
        if not isinstance(arguments, list) or not all(isinstance(word, str) and len(word) < 1024 for word in arguments):
            raise ValueError("mkfs_arguments is no list of words")
        head = Head(
            UUID(document["transfer"]),
            _generation_of(document["base"]),
            _generation_of(document["target"]),
            document["base_taken_ns"],
            document["target_taken_ns"],
            document["volume_name"],
            document["volume_bytes"],
            document["sector_bytes"],
            FilesystemKind(document["filesystem"]),
            tuple(arguments),
            document["root_inode"],
            document["differential_volume"],
        )
        if head.base.volume != head.target.volume or head.base.counter >= head.target.counter:
            raise ValueError("base and target are not two generations of one volume in order")
        if head.sector_bytes not in (512, 4096) or not 0 < head.volume_blocks <= MAX_VOLUME_BLOCKS:
            raise ValueError("sector or volume size out of bounds")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DmiMalformed("the head is not well formed", cause=str(error)) from error
    return head


def _bounded(value: Any, key: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{key} is out of bounds")
    return value


def _generation_of(value: Any) -> GenerationId:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError("a generation is not four values")
    volume, epoch, counter, nonce = value
    if not isinstance(nonce, str) or len(nonce) != 32 or set(nonce) - set("0123456789abcdef"):
        raise ValueError("a nonce is not 32 hex digits")
    return GenerationId(UUID(volume), _bounded(epoch, "epoch"), _bounded(counter, "counter"), nonce)


def _blob(data: U8, starts: U64, row: int) -> bytes:
    return data[int(starts[row]) : int(starts[row + 1])].tobytes()


def _check(dmi: Dmi) -> None:
    """Refuse a DMI whose columns contradict each other. Vectorised: a pass over each column, no row in Python."""
    pieces, files = dmi.piece_total, dmi.file_total
    names, xattrs = len(dmi.name_side), max(len(dmi.xattr_name_start) - 1, 0)
    extents = len(dmi.extent_logical)
    _same_rows(dmi, pieces, "diff_block", "block_count", "owner", "target_hole", "update_digest", "diff_digest")
    _same_rows(dmi, files, "inode_generation", "kind", "change", "mode", "uid", "gid", "nlink", "size", "mtime_s", "mtime_ns",
               "device", "project", "attr_flags", "file_digest")  # fmt: skip
    _same_rows(dmi, extents, "extent_physical", "extent_blocks", "extent_flags")
    _same_rows(dmi, names, "name_parent")
    for starts, rows, end in (
        (dmi.payload_start, files, len(dmi.payload)),
        (dmi.need_start, files, len(dmi.need)),
        (dmi.extent_start, files, extents),
        (dmi.name_start, files, names),
        (dmi.xattr_start, files, xattrs),
        (dmi.name_path_start, names, len(dmi.paths)),
        (dmi.xattr_name_start, xattrs, len(dmi.xattr_names)),
        (dmi.xattr_value_start, xattrs, len(dmi.xattr_values)),
    ):
        _refuse(len(starts) != rows + 1, "a column of starts has the wrong number of rows")
        _refuse(int(starts[0]) != 0 or int(starts[-1]) != end or bool(np.any(starts[1:] < starts[:-1])), "starts do not ascend to the end")

    volume = dmi.head.volume_blocks
    counts = dmi.block_count.astype(np.uint64)
    _refuse(bool(np.any((counts < 1) | (counts > MAX_PIECE_BLOCKS))), "a piece has no blocks or too many")
    _refuse(bool(np.any(dmi.op_block >= volume)) or bool(np.any(dmi.op_block + counts > volume)), "a piece passes the end of the volume")
    _refuse(bool(np.any(dmi.op_block[1:] < dmi.op_block[:-1] + counts[:-1])), "pieces overlap or are out of order")
    _refuse(bool(np.any((dmi.diff_block != HOLE) & (dmi.diff_block > 2**52))), "an address in the differential volume is out of bounds")
    _refuse(bool(np.any(dmi.owner > max(Owner))) or bool(np.any(dmi.target_hole > 1)), "an owner class or hole mark is unknown")
    _refuse(bool(np.any(dmi.need >= pieces)), "a file needs a piece that is not there")

    _refuse(bool(np.any(~np.isin(dmi.kind, [int(kind) for kind in FileKind]))), "a file has an unknown type")
    _refuse(bool(np.any(dmi.change == 0)) or bool(np.any(dmi.change > 63)), "a file has an unknown change")
    _refuse(bool(np.any((dmi.change & Change.NEW > 0) & (dmi.change & Change.DELETED > 0))), "a file is new and deleted at once")
    _refuse(bool(np.any(dmi.mode > 0o7777)), "a mode has bits that are none")
    _refuse(bool(np.any(dmi.mtime_ns >= 10**9)) or bool(np.any(dmi.size > 2**63 - 1)), "a time or a size is out of bounds")
    keys = np.stack([dmi.inode, dmi.inode_generation.astype(np.uint64)], axis=1) if files else np.zeros((0, 2), np.uint64)
    _refuse(len(np.unique(keys, axis=0)) != files, "an inode stands twice")

    ends = dmi.extent_physical + dmi.extent_blocks
    _refuse(bool(np.any(dmi.extent_blocks == 0)) or bool(np.any(dmi.extent_blocks > volume)), "an extent has no blocks or too many")
    _refuse(bool(np.any(dmi.extent_physical >= volume)) or bool(np.any(ends > volume)), "an extent passes the end of the volume")
    _refuse(bool(np.any(dmi.extent_logical > 2**51)) or bool(np.any(dmi.extent_flags > 3)), "an extent is out of bounds")
    later = np.ones(extents, dtype=bool)
    later[dmi.extent_start[:-1][dmi.extent_start[:-1] < extents].astype(np.int64)] = False
    overlap = np.zeros(extents, dtype=bool)
    overlap[1:] = dmi.extent_logical[1:] < dmi.extent_logical[:-1] + dmi.extent_blocks[:-1]
    _refuse(bool(np.any(later & overlap)), "extents of a file overlap or are out of order")
    _refuse(_shared_by_chance(dmi), "two files have the same blocks and no extent says it is shared")

    _refuse(bool(np.any(dmi.name_side > 1)), "a name is in no generation")
    _check_paths(dmi)
    lengths = np.diff(dmi.xattr_name_start)
    _refuse(bool(np.any((lengths < 3) | (lengths > MAX_NAME_BYTES))), "the name of an xattr is too short or too long")
    _refuse(bool(np.any(np.diff(dmi.xattr_value_start) > 64 * 1024)), "the value of an xattr is too long")


def _same_rows(dmi: Dmi, rows: int, *columns: str) -> None:
    for column in columns:
        _refuse(len(getattr(dmi, column)) != rows, f"column {column} has not {rows} rows")


def _refuse(amiss: bool, sentence: str) -> None:
    if amiss:
        raise DmiMalformed(sentence)


def _shared_by_chance(dmi: Dmi) -> bool:
    """Whether extents that are not marked shared overlap physically."""
    order = np.argsort(dmi.extent_physical, kind="stable")
    first, last = dmi.extent_physical[order], (dmi.extent_physical + dmi.extent_blocks)[order]
    furthest = np.maximum.accumulate(last) if len(last) else last
    unshared = (dmi.extent_flags[order] & ExtentFlag.SHARED) == 0
    return bool(np.any((first[1:] < furthest[:-1]) & unshared[1:]))


def _check_paths(dmi: Dmi) -> None:
    """Refuse paths that are absolute, climb, are empty or have an empty, dotted or over-long component: all of them in one go."""
    start, end = dmi.name_path_start[:-1].astype(np.int64), dmi.name_path_start[1:].astype(np.int64)
    there = end > start
    _refuse(bool(np.any(~there & (dmi.name_parent != dmi.head.root_inode))), "a path is empty")
    _refuse(bool(np.any(end - start > MAX_PATH_BYTES)), "a path is too long")
    slash = np.flatnonzero(dmi.paths == ord("/"))
    # Every path and every slash begins a component, and every slash and every path ends one; in order of place they are pairs.
    first = np.sort(np.concatenate([start[there], slash + 1]))
    length = np.sort(np.concatenate([slash, end[there]])) - first
    text = np.concatenate([dmi.paths, np.zeros(2, np.uint8)])
    dotted = (text[first] == ord(".")) & ((length == 1) | ((length == 2) & (text[first + 1] == ord("."))))
    amiss = np.any(dotted | (length < 1) | (length > MAX_NAME_BYTES)) or np.any(dmi.paths == 0)
    _refuse(bool(amiss), "a path has a component that names no file")
