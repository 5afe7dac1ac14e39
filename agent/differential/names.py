"""The inode-to-name index of a generation: who is called what, beneath which directory.

A row is one directory entry. The index is built by a walk once; later generations are made from it by dropping the rows of
changed directories and reading those directories again, so its cost follows the changes. It is a cache: one that is not there or
does not read back is built anew.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.contract import columns
from agent.contract.columns import ColumnSpec
from agent.contract.errors import DeviceFailed, DmiMalformed, VersionUnknown
from agent.differential.intervals import spans
from agent.system.files import write_durably

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]

_SPECS: Final = (
    ColumnSpec.of("child", "<u8"),
    ColumnSpec.of("parent", "<u8"),
    ColumnSpec.of("name_at", "<u8"),
    ColumnSpec.of("name_bytes", "<u4"),
    ColumnSpec.of("names", "u1"),
)
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOATIME


@dataclass(frozen=True, slots=True, eq=False)
class NameIndex:
    """Rows sorted by child (stable): inode, directory that holds the name, place of the name in ``names``."""

    child: U64
    parent: U64
    name_at: U64
    name_bytes: U32
    names: U8
    _paths: dict[int, bytes | None] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.child)

    def rows_of(self, child: int) -> range:
        """Return the rows of the names of an inode."""
        at = np.searchsorted(self.child, np.array([child, child + 1], dtype=np.uint64))
        return range(int(at[0]), int(at[1]))

    def count_of(self, children: U64) -> NDArray[np.int64]:
        """Return how many names each inode has."""
        wanted = children.astype(np.uint64)
        return np.searchsorted(self.child, wanted, side="right") - np.searchsorted(self.child, wanted, side="left")

    def name(self, row: int) -> bytes:
        """Return the name in a row."""
        at = int(self.name_at[row])
        return self.names[at : at + int(self.name_bytes[row])].tobytes()

    def with_those_above(self, directories: U64) -> U64:
        """Return ``directories`` and all directories above them."""
        found = fresh = np.unique(directories.astype(np.uint64))
        while len(fresh) and len(self):
            at = np.searchsorted(self.child, fresh)
            named = self.child[np.minimum(at, len(self) - 1)] == fresh
            fresh = np.setdiff1d(self.parent[at[named]], found)
            found = np.union1d(found, fresh)
        return found

    def paths_of(self, child: int, root: int) -> list[tuple[int, bytes]]:
        """Return (parent inode, path from the root) of each name; the root is called b"". Names not beneath the root are left out."""
        if child == root:
            return [(root, b"")]
        found = []
        for row in self.rows_of(child):
            parent = int(self.parent[row])
            above = self._directory(parent, root)
            if above is not None:
                found.append((parent, above + self.name(row)))
        return found

    def _directory(self, inode: int, root: int) -> bytes | None:
        """Return a directory's path with a slash at its end, None if it is not beneath the root (or beneath itself)."""
        climbed: list[tuple[int, bytes]] = []
        seen = set()
        at = inode
        while at != root and at not in self._paths:
            rows = self.rows_of(at)
            if at in seen or not rows:
                self._paths[at] = None
                break
            seen.add(at)
            climbed.append((at, self.name(rows[0])))
            at = int(self.parent[rows[0]])
        path = b"" if at == root else self._paths[at]
        for directory, name in reversed(climbed):
            if path is not None:
                path = path + name + b"/"
            self._paths[directory] = path
        return path


def walked(mount_fd: int) -> NameIndex:
    """Return the index of a mounted generation by a walk of all its directories."""
    root = os.open(".", _OPEN, dir_fd=mount_fd)
    try:
        return _sorted(_walk(root))
    except OSError as error:
        raise DeviceFailed("cannot walk the generation", cause=f"{error.strerror} (errno {error.errno})") from error
    finally:
        os.close(root)


def updated(index: NameIndex, dropped: U64, directories: Iterable[tuple[int, int]]) -> NameIndex:
    """Return ``index`` without the entries of ``dropped`` directories, and with those of ``directories`` (inode, open descriptor) read."""
    keep = ~np.isin(index.parent, dropped)
    try:
        fresh = _sorted((inode, child, name) for inode, fd in directories for child, name, _ in _entries(fd))
    except OSError as error:
        raise DeviceFailed("cannot read a directory of the generation", cause=f"{error.strerror} (errno {error.errno})") from error
    return _joined(_compact(index, keep), fresh)


def renamed_inodes(base: NameIndex, target: NameIndex, directories: U64) -> U64:
    """Return the inodes whose names beneath the changed ``directories`` differ between two indexes."""
    rows = _entry_set(base, directories) ^ _entry_set(target, directories)
    return np.unique(np.array([child for child, _, _ in rows], dtype=np.uint64))


def save(index: NameIndex, path: Path) -> None:
    """Store the index durably; if we die here there is the old one or none."""
    content = {spec.name: getattr(index, spec.name) for spec in _SPECS}
    write_durably(path, columns.encode(content, _SPECS))


def load(path: Path) -> NameIndex | None:
    """Return the stored index; None if there is none that is whole."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            content = columns.decode(view.read(), _SPECS)
    except (OSError, ValueError, DmiMalformed, VersionUnknown):
        return None
    index = NameIndex(content["child"], content["parent"], content["name_at"], content["name_bytes"], content["names"])
    whole = len({len(index.child), len(index.parent), len(index.name_at), len(index.name_bytes)}) == 1
    whole = whole and not bool(np.any(index.child[1:] < index.child[:-1]))
    return index if whole and not bool(np.any(index.name_at + index.name_bytes > len(index.names))) else None


def _walk(root_fd: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield (directory, child, name) of every entry; holds one descriptor per level."""
    stack = [(os.fstat(root_fd).st_ino, os.dup(root_fd), _entries(root_fd))]
    try:
        while stack:
            inode, fd, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                stack.pop()
                os.close(fd)
                continue
            child, name, is_directory = entry
            yield inode, child, name
            if is_directory:
                below = os.open(name, _OPEN, dir_fd=fd)
                stack.append((child, below, _entries(below)))
    finally:
        for _, fd, _ in stack:
            os.close(fd)


def _entries(fd: int) -> Iterator[tuple[int, bytes, bool]]:
    with os.scandir(fd) as listing:
        for entry in listing:
            yield entry.inode(), os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)


def _sorted(entries: Iterable[tuple[int, int, bytes]]) -> NameIndex:
    parents, children, lengths = [], [], []
    blob = bytearray()
    for parent, child, name in entries:
        parents.append(parent)
        children.append(child)
        lengths.append(len(name))
        blob += name
    length = np.array(lengths, dtype=np.uint32)
    at = np.cumsum(length, dtype=np.uint64) - length
    child_column = np.array(children, dtype=np.uint64)
    order = np.argsort(child_column, kind="stable")
    names = np.frombuffer(bytes(blob), dtype=np.uint8)
    return NameIndex(child_column[order], np.array(parents, dtype=np.uint64)[order], at[order], length[order], names)


def _compact(index: NameIndex, keep: NDArray[np.bool_]) -> NameIndex:
    """Return the rows to ``keep``, with only their names in the blob."""
    length = index.name_bytes[keep]
    where = spans(index.name_at[keep].astype(np.int64), length.astype(np.int64))
    at = np.cumsum(length, dtype=np.uint64) - length
    return NameIndex(index.child[keep], index.parent[keep], at, length, index.names[where])


def _joined(one: NameIndex, other: NameIndex) -> NameIndex:
    child = np.concatenate([one.child, other.child])
    order = np.argsort(child, kind="stable")
    return NameIndex(
        child[order],
        np.concatenate([one.parent, other.parent])[order],
        np.concatenate([one.name_at, other.name_at + np.uint64(len(one.names))])[order],
        np.concatenate([one.name_bytes, other.name_bytes])[order],
        np.concatenate([one.names, other.names]),
    )


def _entry_set(index: NameIndex, directories: U64) -> set[tuple[int, int, bytes]]:
    rows = np.flatnonzero(np.isin(index.parent, directories))
    return {(int(index.child[row]), int(index.parent[row]), index.name(row)) for row in rows.tolist()}
