"""What a filesystem's reader must tell about two frozen generations: changed inodes, owners of changed blocks, extents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class View:
    """A frozen generation: its read-only device, and a descriptor of the root of its read-only mount."""

    device: Path
    mount_point: Path
    mount_fd: int


@dataclass(frozen=True, slots=True, eq=False)
class InodeChanges:
    """Inodes that may differ, one row per (inode, generation): a number that was reused stands twice (deleted and new).

    None that differs in more than access time is missing. ``kind`` is st_mode >> 12.
    """

    inode: U64
    generation: U32
    kind: U8
    in_base: NDArray[np.bool_]
    in_target: NDArray[np.bool_]
    target_nlink: U32  # 0: not in the target, or nameless


@dataclass(frozen=True, slots=True, eq=False)
class Ownership:
    """The changed runs split by owner: ascending, disjoint, covering exactly the changed runs.

    ``claim_run``/``claim_inode`` say which regular files own a run of class FILE (several for shared extents), sorted by run. A run of
    class METADATA is claimed only by an inode that is not among the changes: its names or attributes may have changed all the same.
    """

    first: U64
    blocks: U64
    owner: U8  # dmi.Owner
    claim_run: U32
    claim_inode: U64


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """Extents of the asked files in the target: file ``i`` of the question owns rows ``start[i]:start[i + 1]``, in logical order."""

    start: U64
    logical: U64
    physical: U64
    blocks: U64
    flags: U32  # dmi.ExtentFlag


class FilesystemReader(Protocol):
    """One differential's filesystem facts; ``base`` is None when the base is g0."""

    root_inode: int

    def changed_inodes(self) -> InodeChanges:
        """Return every inode that differs between base and target."""

    def anticipate(self, directories: U64) -> None:
        """Begin to read what opening these directories of base and target will need, where that can be done; the caller goes on."""

    def extents(self, inode: U64, generation: U32) -> Extents:
        """Return the target's extents of regular files (data fork only); none for inline data."""

    def ownership(self, changes: InodeChanges, regular: U64, extents: Extents) -> Ownership:
        """Return who owns the changed runs, given the ``extents`` of the changed ``regular`` files of the target.

        A block is FREE only by the target's allocation map. A changed allocated block that nobody claims forces a full walk of
        owners; an inode found only by it is reported as a claim, and the caller adds it to the changed files.
        """
