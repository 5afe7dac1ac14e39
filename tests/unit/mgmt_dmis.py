"""DMIs made by hand for the tests of the management node: a list of files in, the columns out."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import UUID

import numpy as np

from agent.contract.arrival import ArrivalRecord
from agent.contract.dmi import SPECS, Change, Dmi, FileKind, Head, Owner, Side
from agent.contract.identity import FilesystemKind, GenerationId, empty_generation

VOLUME = UUID("6a1f6b0e-6a2d-4a53-8f3c-9f6f1d2c3b4a")
TRANSFER = UUID("0b0f7a52-3c1c-4f0e-9f61-1d6f0a3e5c77")
BASE = empty_generation(VOLUME)
TARGET = GenerationId(VOLUME, 1, 1, "5f3a9c21" * 4)
HEAD = Head(TRANSFER, BASE, TARGET, 10**18, 10**18 + 10**12, "projects", 1 << 30, 512, FilesystemKind.EXT4, ("mkfs.ext4",), 2, "pool")


@dataclass(frozen=True, slots=True)
class File:
    """A changed file: its names in the target and in the base, its change, the pieces it needs."""

    paths: tuple[bytes, ...]
    change: Change = Change.CONTENT
    needs: tuple[int, ...] = ()
    base_paths: tuple[bytes, ...] | None = None  # None: as in the target, none if new
    size: int = 100
    kind: FileKind = FileKind.REGULAR


@dataclass(frozen=True, slots=True)
class Made:
    """A DMI with its files."""

    files: list[File]
    dmi: Dmi = field(repr=False)


def make(files: list[File], pieces: int, blocks: int = 1) -> Dmi:
    """Return a DMI that ``Dmi.decode`` accepts."""
    columns = {spec.name: np.zeros(0, dtype=spec.dtype) for spec in SPECS[1:]}
    names = [(row, side, path) for row, file in enumerate(files) for side, path in _sides(file)]
    columns["op_block"] = np.arange(pieces, dtype=np.uint64) * np.uint64(blocks) + np.uint64(16)
    columns["diff_block"] = columns["op_block"].copy()
    columns["block_count"] = np.full(pieces, blocks, dtype=np.uint32)
    columns["owner"] = np.full(pieces, Owner.FILE, dtype=np.uint8)
    columns["target_hole"] = np.zeros(pieces, dtype=np.uint8)
    for name in ("update_digest", "diff_digest"):
        columns[name] = np.zeros(pieces, dtype="V16")
    rows = len(files)
    for spec in SPECS[1:]:
        if spec.name in _PER_FILE:
            columns[spec.name] = np.zeros(rows, dtype=spec.dtype)
        elif spec.name.endswith("_start"):
            columns[spec.name] = np.zeros(rows + 1, dtype=np.uint64)
    columns["inode"] = np.arange(12, 12 + rows, dtype=np.uint64)
    columns["kind"] = np.array([file.kind for file in files], dtype=np.uint8)
    columns["change"] = np.array([file.change for file in files], dtype=np.uint8)
    columns["mode"][:] = 0o644
    columns["size"] = np.array([file.size for file in files], dtype=np.uint64)
    columns["need_start"] = _starts([len(file.needs) for file in files])
    columns["need"] = np.array([piece for file in files for piece in file.needs], dtype=np.uint32)
    columns["name_start"] = _starts([len(_sides(file)) for file in files])
    columns["name_side"] = np.array([side for _, side, _ in names], dtype=np.uint8)
    columns["name_parent"] = np.full(len(names), 2, dtype=np.uint64)
    columns["name_path_start"] = _starts([len(path) for *_, path in names])
    columns["paths"] = np.frombuffer(b"".join(path for *_, path in names), dtype=np.uint8)
    for name in ("xattr_name_start", "xattr_value_start"):
        columns[name] = np.zeros(1, dtype=np.uint64)
    return Dmi(HEAD, **columns)


def arrived(dmi: Dmi, bits: list[int]) -> ArrivalRecord:
    """Return a record of ``dmi`` with these bits."""
    return ArrivalRecord(dmi.head.transfer, bytes(16), np.array(bits, dtype=np.uint8), 0, 0)


_PER_FILE = {
    "inode_generation", "uid", "gid", "nlink", "mtime_s", "mtime_ns", "device", "project", "attr_flags", "file_digest", "mode",
}  # fmt: skip


def _sides(file: File) -> list[tuple[Side, bytes]]:
    base = file.base_paths
    if base is None:
        base = () if file.change & Change.NEW else file.paths
    target = () if file.change & (Change.DELETED | Change.NAMELESS) else file.paths
    return [*((Side.BASE, path) for path in base), *((Side.TARGET, path) for path in target)]


def _starts(lengths: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.uint64)]).astype(np.uint64)
