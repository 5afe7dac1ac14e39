"""Which inodes of an ext4 filesystem changed, and who owns its changed blocks, read from the raw devices of two frozen generations.

Only inodes whose place is in a changed block of an inode table are decoded. Owners come from the target alone: its maps say what is
free, its superblock what is fixed metadata, its changed inodes what is theirs; what is left belongs to inodes that did not change,
and those are found by reading all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.contract.dmi import Owner
from agent.differential.ext4_extents import EA_INODE_FLAG, REGULAR, field, kinds, mapping, xattr_blocks
from agent.differential.ext4_layout import (
    JOURNAL_INODE,
    ROOT_INODE,
    Layout,
    all_used_inodes,
    anticipate,
    free_runs,
    inodes_of_tables,
    inodes_used,
    read_inodes,
    read_layout,
)
from agent.differential.intervals import U64, Flags, Runs, cut, row_at, runs_of, runs_of_blocks, spans, united
from agent.differential.reader import Extents, InodeChanges, Ownership, View
from agent.volume.substrate import ChangedRuns

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]

_UNOWNED: Final = 255
_WALK_INODES: Final = 1 << 17

# Fields that change without anything changing that Landfall promises: access time, checksums, the version counter.
_MASKED_128: Final = ((0x08, 4), (0x24, 4), (0x7C, 2))
_MASKED_EXTRA: Final = ((0x82, 2), (0x8C, 4), (0x98, 4))


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """Inodes of one generation: which of the asked are allocated, and their raw bytes (rows of others are of no meaning)."""

    used: Flags
    raw: U8


@dataclass(frozen=True, slots=True, eq=False)
class _Owned:
    """Runs in order of address, and the inode each belongs to."""

    runs: Runs
    inode: U64


@dataclass(frozen=True, slots=True, eq=False)
class _Claims:
    """What inodes own: data of regular files, and metadata (which inodes may share)."""

    data: _Owned
    metadata: _Owned


class Ext4Reader:
    """The facts of one differential; reads nothing before it is asked."""

    root_inode: int = ROOT_INODE

    def __init__(self, base: View | None, target: View, changed: ChangedRuns) -> None:
        self._base = None if base is None else read_layout(base.device)
        self._target = read_layout(target.device)
        self._changed = united(runs_of(changed.first, changed.blocks))
        self._runs = runs_of(changed.first, changed.blocks)
        self._system = np.array(sorted(self._target.system_inodes), dtype=np.uint64)

    def changed_inodes(self) -> InodeChanges:
        """Return every inode that differs in more than access time, version and checksum."""
        asked = self._candidates()
        target = _side(self._target, asked)
        base = _Side(np.zeros(len(asked), bool), target.raw) if self._base is None else _side(self._base, asked)
        base_number, target_number = field(base.raw, 0x64, "<u4"), field(target.raw, 0x64, "<u4")
        same_inode = base.used & target.used & (base_number == target_number)
        differs = (base.used != target.used) | np.any(_masked(base.raw) != _masked(target.raw), axis=1)
        old = differs & base.used & ~same_inode
        new = differs & target.used
        order = np.argsort(np.concatenate([np.flatnonzero(old), np.flatnonzero(new)]), kind="stable")

        def both(of_old: NDArray[np.generic], of_new: NDArray[np.generic]) -> NDArray[np.generic]:
            return np.concatenate([of_old[old], of_new[new]])[order]

        links = field(target.raw, 0x1A, "<u2").astype(np.uint32)
        return InodeChanges(
            inode=both(asked, asked).astype(np.uint64),
            generation=both(base_number, target_number).astype(np.uint32),
            kind=both(kinds(base.raw), kinds(target.raw)).astype(np.uint8),
            in_base=both(base.used, same_inode).astype(np.bool_),
            in_target=both(np.zeros(len(asked), bool), target.used).astype(np.bool_),
            target_nlink=both(np.zeros(len(asked), np.uint32), links).astype(np.uint32),
        )

    def extents(self, inode: U64, generation: U32) -> Extents:
        """Return the target's extents of regular files, in the order asked; the generation is the target's and not looked at."""
        found = mapping(self._target.device, inode, read_inodes(self._target, inode))
        start = np.searchsorted(found.row, np.arange(len(inode) + 1)).astype(np.uint64)
        return Extents(start, found.logical, found.physical, found.blocks, found.flags)

    def ownership(self, changes: InodeChanges, regular: U64, extents: Extents) -> Ownership:
        """Return the owners of the changed runs; walks all inodes where a changed allocated block is claimed by nobody.

        What only the walk finds is claimed by its inode even where it is metadata: names or xattrs of that inode may have changed.
        """
        found = _claims(self._target, np.unique(np.concatenate([changes.inode[changes.in_target], self._ea_inodes()])))
        owner_of = np.repeat(regular, np.diff(extents.start).astype(np.int64))
        files = _by_address(Runs(extents.physical, extents.physical + extents.blocks), owner_of)
        parts = _Parts(self._runs, np.full(len(self._runs), _UNOWNED, np.uint8), np.zeros(len(self._runs), np.uint64))
        parts = _given(parts, united(self._target.fixed, self._system_metadata()), Owner.METADATA)
        parts = _given(parts, free_runs(self._target, self._changed), Owner.FREE)
        parts = _given(parts, self._journal(), Owner.JOURNAL)
        parts = _given(parts, united(found.metadata.runs), Owner.METADATA)
        parts = _given_to_files(parts, files)
        parts = _given(parts, self._shared_xattrs(changes), Owner.METADATA)
        parts, others = self._walk(parts) if bool(np.any(parts.owner == _UNOWNED)) else (parts, found.metadata)
        claimed = np.flatnonzero(parts.owner == Owner.FILE)
        run, inode = claimed, parts.inode[claimed]
        if others is not found.metadata:
            run = np.concatenate([run, np.searchsorted(parts.runs.first, others.runs.first)])
            inode = np.concatenate([inode, others.inode])
        order = np.argsort(run, kind="stable")
        return Ownership(parts.runs.first, parts.runs.blocks, parts.owner, run[order].astype(np.uint32), inode[order])

    def anticipate(self, directories: U64) -> None:
        """Let the kernel read the blocks of ``directories`` ahead: the mount finds the metadata of ext4 in the device's page cache.

        To open a directory by its number the kernel looks for its name in the one above, and so on to the root, a block at a time.
        """
        for layout in (self._base, self._target):
            if layout is not None:
                inodes = directories[inodes_used(layout, directories)]
                found = mapping(layout.device, inodes, read_inodes(layout, inodes))
                anticipate(layout.device, united(found.runs))

    def _candidates(self) -> U64:
        """Return the inodes that may differ: those in changed blocks of inode tables, and those whose allocation differs."""
        asked = inodes_of_tables(self._target, self._changed)
        base, target = self._base, self._target
        every = np.arange(target.groups, dtype=np.int64)
        if base is None:
            asked = np.concatenate([asked, all_used_inodes(target, every)])
        else:
            common = every[: min(base.groups, target.groups)]
            touched = row_at(self._changed, target.inode_bitmap) >= 0
            touched[common] |= base.inode_uninit[common] != target.inode_uninit[common]
            moved = common[base.inode_table[common] != target.inode_table[common]]
            touched[moved] = True
            groups = np.flatnonzero(touched).astype(np.int64)
            if len(moved):
                asked = np.concatenate([asked, all_used_inodes(target, moved), all_used_inodes(base, moved)])
            new = np.setxor1d(all_used_inodes(target, groups), all_used_inodes(base, groups[groups < base.groups]))
            asked = np.concatenate([asked, new])
        asked = np.unique(asked)
        asked = asked[~np.isin(asked, self._system) & (asked <= target.inodes)]
        used = inodes_used(target, asked)
        if base is not None:
            used |= inodes_used(base, asked)
        return asked[used]

    def _ea_inodes(self) -> U64:
        """Return the changed inodes that hold values of xattrs: they are no files, and their blocks are metadata."""
        if not self._target.ea_inodes:
            return np.zeros(0, dtype=np.uint64)
        asked = self._candidates()
        side = _side(self._target, asked, keep_ea=True)
        found: U64 = asked[side.used & ((field(side.raw, 0x20, "<u4") & np.uint64(EA_INODE_FLAG)) != 0)]
        return found

    def _journal(self) -> Runs:
        if not self._target.journal:
            return Runs(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        inode = np.array([JOURNAL_INODE], dtype=np.uint64)
        return united(mapping(self._target.device, inode, read_inodes(self._target, inode)).runs)

    def _system_metadata(self) -> Runs:
        """Return what reserved inodes own (bad blocks, the resize inode, quota files, the orphan file), the journal's data apart."""
        raw = read_inodes(self._target, self._system)
        found = mapping(self._target.device, self._system, raw)
        others = self._system[found.row] != JOURNAL_INODE
        return united(Runs(found.runs.first[others], found.runs.end[others]), runs_of_blocks(found.tree))

    def _shared_xattrs(self, changes: InodeChanges) -> Runs:
        """Return the xattr blocks that changed inodes had in the base. One that is allocated still and in no changed inode is shared.

        Such a block is changed in place only by its last user, whose change time tells, unless that has whole seconds only.
        """
        if self._base is None or self._base.inode_bytes <= 128:
            return Runs(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        inodes = np.unique(changes.inode[changes.in_base | ~changes.in_target])
        blocks = xattr_blocks(read_inodes(self._base, inodes))
        return runs_of_blocks(blocks[blocks != 0])

    def _walk(self, parts: _Parts) -> tuple[_Parts, _Owned]:
        """Return the parts with owners for those that no changed inode claimed, by reading all inodes of the target.

        Also returned: the parts that turned out to be metadata, by their first block, with each inode that has them.
        """
        none = np.zeros(0, np.uint64)
        first, inode = [none], [none]
        step = max(1, _WALK_INODES // self._target.inodes_per_group)
        for group in range(0, self._target.groups, step):
            groups = np.arange(group, min(group + step, self._target.groups), dtype=np.int64)
            inodes = all_used_inodes(self._target, groups)
            claims = _claims(self._target, inodes[~np.isin(inodes, self._system)])
            # A block may be shared with an inode of a group that comes later, so what was found here stays unowned until the end.
            parts = _cut(parts, united(claims.metadata.runs))
            low, high = (np.searchsorted(parts.runs.first, edge) for edge in (claims.metadata.runs.first, claims.metadata.runs.end))
            part, owner = spans(low, high - low), np.repeat(claims.metadata.inode, high - low)
            open_still = parts.owner[part] == _UNOWNED
            first.append(parts.runs.first[part[open_still]])
            inode.append(owner[open_still])
            parts = _given_to_files(parts, claims.data)
        # What is left is metadata, or allocated and in no inode, lost by a crash of long ago: sent like metadata, which is always right.
        parts.owner[parts.owner == _UNOWNED] = Owner.METADATA
        found = np.concatenate(first)
        return parts, _Owned(Runs(found, found + np.uint64(1)), np.concatenate(inode))


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """The changed runs, cut; each with its owner class, and the inode where that is a file."""

    runs: Runs
    owner: U8
    inode: U64


def _cut(parts: _Parts, at: Runs) -> _Parts:
    runs = cut(parts.runs, at.first, at.end)
    row = row_at(parts.runs, runs.first)
    return _Parts(runs, parts.owner[row], parts.inode[row])


def _given(parts: _Parts, runs: Runs, owner: Owner) -> _Parts:
    """Return the parts with what of them lies in the disjoint ``runs`` and has no owner yet given to ``owner``."""
    parts = _cut(parts, runs)
    parts.owner[(parts.owner == _UNOWNED) & (row_at(runs, parts.runs.first) >= 0)] = owner
    return parts


def _given_to_files(parts: _Parts, files: _Owned) -> _Parts:
    """Return the parts with what of them has no owner yet given to the files whose data it is."""
    parts = _cut(parts, files.runs)
    row = row_at(files.runs, parts.runs.first)
    mine = (parts.owner == _UNOWNED) & (row >= 0)
    parts.owner[mine] = Owner.FILE
    parts.inode[mine] = files.inode[row[mine]]
    return parts


def _claims(layout: Layout, inodes: U64) -> _Claims:
    """Return what ``inodes`` (allocated ones) own: data of regular files, everything else as metadata."""
    raw = read_inodes(layout, inodes)
    found = mapping(layout.device, inodes, raw)
    is_file = (kinds(raw) == REGULAR) & ((field(raw, 0x20, "<u4") & np.uint64(EA_INODE_FLAG)) == 0)
    of_file = is_file[found.row]
    xattrs = xattr_blocks(raw)
    with_xattrs = xattrs != 0
    single = np.concatenate([found.tree, xattrs[with_xattrs]])
    data, owner = found.runs, inodes[found.row]
    return _Claims(
        _by_address(Runs(data.first[of_file], data.end[of_file]), owner[of_file]),
        _by_address(
            Runs(np.concatenate([data.first[~of_file], single]), np.concatenate([data.end[~of_file], single + np.uint64(1)])),
            np.concatenate([owner[~of_file], inodes[found.tree_row], inodes[with_xattrs]]),
        ),
    )


def _by_address(runs: Runs, inode: U64) -> _Owned:
    order = np.argsort(runs.first, kind="stable")
    return _Owned(Runs(runs.first[order], runs.end[order]), inode[order].astype(np.uint64))


def _side(layout: Layout, asked: U64, *, keep_ea: bool = False) -> _Side:
    """Return the asked inodes of one generation; inodes that hold xattr values count as not allocated unless ``keep_ea``."""
    used = inodes_used(layout, asked)
    raw = np.zeros((len(asked), layout.inode_bytes), dtype=np.uint8)
    raw[used] = read_inodes(layout, asked[used])
    used = used & (field(raw, 0, "<u2") != 0)
    if not keep_ea:
        used = used & ((field(raw, 0x20, "<u4") & np.uint64(EA_INODE_FLAG)) == 0)
    return _Side(used, raw)


def _masked(raw: U8) -> U8:
    """Return the raw inodes with the fields zeroed whose change means nothing."""
    masked = raw.copy()
    for offset, width in _MASKED_128 + (_MASKED_EXTRA if raw.shape[1] > 128 else ()):
        masked[:, offset : offset + width] = 0
    return masked
