"""Small DMIs made by hand, for tests of what reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

import numpy as np

from agent.contract.digest import block_digests, file_digest, payload_digest, piece_digest
from agent.contract.dmi import HOLE, Change, Dmi, FileKind, Head, Owner, Side
from agent.contract.identity import BLOCK_BYTES, FilesystemKind, GenerationId, empty_generation

VOLUME = UUID("0a1b2c3d-0000-4000-8000-000000000001")
TRANSFER = UUID("0a1b2c3d-0000-4000-8000-000000000002")


def block_of(number: int) -> bytes:
    """Return a block that no other number has."""
    return number.to_bytes(8, "little") * (BLOCK_BYTES // 8)


def sample_head() -> Head:
    """Return a head from g0 to g1 of a volume of 64 blocks."""
    return Head(
        transfer=TRANSFER,
        base=empty_generation(VOLUME),
        target=GenerationId(VOLUME, 1, 1, "00112233445566778899aabbccddeeff"),
        base_taken_ns=0,
        target_taken_ns=1_700_000_000_000_000_000,
        volume_name="media",
        volume_bytes=64 * BLOCK_BYTES,
        sector_bytes=512,
        filesystem=FilesystemKind.EXT4,
        mkfs_arguments=("mkfs.ext4", "-b", "4096"),
        root_inode=2,
        differential_volume="pool:00000000-0000-0000-0000-0000000000aa",
    )


def sample_dmi() -> Dmi:
    """Return four pieces and four files: root, a file of two pieces, a symlink, a deleted file."""
    digests = [
        block_digests(b"".join(block_of(n) for n in range(first, first + count))) for first, count in ((1, 1), (8, 2), (12, 1), (40, 3))
    ]
    updates = [piece_digest(d, first) for d, first in zip(digests, (1, 8, 12, 40), strict=True)]
    zero = block_digests(bytes(BLOCK_BYTES))
    before = [piece_digest(np.repeat(zero, count), first) for first, count in ((1, 1), (8, 2), (12, 1), (40, 3))]
    names = [(0, Side.TARGET, 2, b""), (1, Side.TARGET, 2, b"a"), (2, Side.TARGET, 2, b"link\xff"), (3, Side.BASE, 2, b"gone")]
    paths = b"".join(name[3] for name in names)
    content = file_digest(3 * BLOCK_BYTES - 7, [(0, digests[1]), (2, digests[2])])
    files: dict[str, tuple[str, list[Any]]] = {
        "inode": ("<u8", [2, 12, 13, 14]),
        "inode_generation": ("<u4", [0, 7, 8, 9]),
        "kind": ("u1", [FileKind.DIRECTORY, FileKind.REGULAR, FileKind.SYMLINK, FileKind.REGULAR]),
        "change": ("u1", [Change.ATTRIBUTES, Change.NEW | Change.CONTENT | Change.NAMES, Change.NEW | Change.NAMES, Change.DELETED]),
        "mode": ("<u4", [0o755, 0o640, 0o777, 0o600]),
        "uid": ("<u4", [0, 1000, 0, 0]),
        "gid": ("<u4", [0, 1000, 0, 0]),
        "nlink": ("<u4", [3, 1, 1, 1]),
        "size": ("<u8", [4096, 3 * BLOCK_BYTES - 7, 3, 5]),
        "mtime_s": ("<i8", [1_700_000_000, -1, 5, 6]),
        "mtime_ns": ("<u4", [1, 999_999_999, 0, 0]),
        "device": ("<u8", [0, 0, 0, 0]),
        "project": ("<u4", [0, 0, 0, 0]),
        "attr_flags": ("<u4", [0, 0x40, 0, 0]),
        "payload_start": ("<u8", [0, 0, 0, 3, 3]),
        "need_start": ("<u8", [0, 0, 2, 2, 2]),
        "extent_start": ("<u8", [0, 0, 2, 2, 2]),
        "name_start": ("<u8", [0, 1, 2, 3, 4]),
        "xattr_start": ("<u8", [0, 0, 1, 1, 1]),
    }
    empty = payload_digest(0, b"")
    return Dmi(
        head=sample_head(),
        op_block=np.array([1, 8, 12, 40], "<u8"),
        diff_block=np.array([HOLE, HOLE, HOLE, HOLE], "<u8"),
        block_count=np.array([1, 2, 1, 3], "<u4"),
        owner=np.array([Owner.METADATA, Owner.FILE, Owner.FILE, Owner.FREE], "u1"),
        target_hole=np.zeros(4, "u1"),
        update_digest=np.array(updates, dtype="V16"),
        diff_digest=np.array(before, dtype="V16"),
        file_digest=np.array([empty, content, payload_digest(3, b"tgt"), empty], dtype="V16"),
        payload=np.frombuffer(b"tgt", "u1"),
        need=np.array([1, 2], "<u4"),
        extent_logical=np.array([0, 2], "<u8"),
        extent_physical=np.array([8, 12], "<u8"),
        extent_blocks=np.array([2, 1], "<u8"),
        extent_flags=np.zeros(2, "<u4"),
        name_side=np.array([name[1] for name in names], "u1"),
        name_parent=np.array([name[2] for name in names], "<u8"),
        name_path_start=np.cumsum([0, *(len(name[3]) for name in names)]).astype("<u8"),
        paths=np.frombuffer(paths, "u1"),
        xattr_name_start=np.array([0, 8], "<u8"),
        xattr_names=np.frombuffer(b"user.tag", "u1"),
        xattr_value_start=np.array([0, 3], "<u8"),
        xattr_values=np.frombuffer(b"\x00\x01\x02", "u1"),
        **{name: np.array(values, dtype) for name, (dtype, values) in files.items()},
    )


def altered(dmi: Dmi, **columns: Any) -> bytes:
    """Return the bytes of ``dmi`` with other columns: a container that is whole and a DMI that may lie."""
    return b"".join(replace(dmi, **columns).encode())
