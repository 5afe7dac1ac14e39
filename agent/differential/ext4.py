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
from agent.differential.ext4_extents import EA_INODE_FLAG, REGULAR, Mapping, field, kinds, mapping, merged_tree, xattr_blocks
from agent.differential.ext4_layout import (
    JOURNAL_INODE,
    ROOT_INODE,
    Layout,
    all_used_inodes,
    free_runs,
    inodes_of_tables,
    inodes_used,
    read_inodes,
    read_layout,
)
from agent.differential.intervals import U64, Flags, Runs, cut, row_at, runs_of, runs_of_blocks, united
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
class _Claims:
    """Blocks of files: ``runs`` (in order of address) with the inode of each, and blocks that are metadata."""

    runs: Runs
    inode: U64
    metadata: Runs


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
        """Return the owners of the changed runs; walks all inodes where a changed allocated block is claimed by nobody."""
        claims = self._claims_of_changed(changes, regular, extents)
        journal = self._journal()
        fixed = united(self._target.fixed, self._system_metadata())
        free = free_runs(self._target, self._changed)
        parts = cut(self._runs, *(edge for runs in (fixed, free, journal, claims.runs, claims.metadata) for edge in (runs.first, runs.end)))
        owner = np.full(len(parts), _UNOWNED, dtype=np.uint8)
        inode = np.zeros(len(parts), dtype=np.uint64)
        for runs, as_what in ((fixed, Owner.METADATA), (free, Owner.FREE), (journal, Owner.JOURNAL), (claims.metadata, Owner.METADATA)):
            owner[(owner == _UNOWNED) & (row_at(runs, parts.first) >= 0)] = as_what
        _assign(owner, inode, parts, claims)
        # In the base it was an xattr block of a changed inode and nobody new took it: others share it still.
        owner[(owner == _UNOWNED) & (row_at(self._shared_xattrs(changes), parts.first) >= 0)] = Owner.METADATA
        if bool(np.any(owner == _UNOWNED)):
            parts, owner, inode = self._walk(parts, owner, inode)
        claimed = np.flatnonzero(owner == Owner.FILE)
        return Ownership(parts.first, parts.blocks, owner, claimed.astype(np.uint32), inode[claimed])

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

    def _claims_of_changed(self, changes: InodeChanges, regular: U64, extents: Extents) -> _Claims:
        """Return what the changed inodes own in the target."""
        inodes = np.unique(np.concatenate([changes.inode[changes.in_target], self._ea_inodes()]))
        found = _claims(self._target, inodes)
        owner = np.repeat(regular, np.diff(extents.start).astype(np.int64))
        return _Claims(*_by_address(Runs(extents.physical, extents.physical + extents.blocks), owner), found.metadata)

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
        return united(Runs(found.runs.first[others], found.runs.end[others]), merged_tree(found))

    def _shared_xattrs(self, changes: InodeChanges) -> Runs:
        if self._base is None:
            return Runs(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        inodes = np.unique(changes.inode[changes.in_base | ~changes.in_target])
        blocks = xattr_blocks(read_inodes(self._base, inodes))
        return runs_of_blocks(blocks[blocks != 0])

    def _walk(self, parts: Runs, owner: U8, inode: U64) -> tuple[Runs, U8, U64]:
        """Return the parts, cut further, with the owners of those that no changed inode claimed, by reading all inodes of the target."""
        walked = 0
        while walked < self._target.groups:
            step = max(1, _WALK_INODES // self._target.inodes_per_group)
            groups = np.arange(walked, min(walked + step, self._target.groups), dtype=np.int64)
            inodes = all_used_inodes(self._target, groups)
            claims = _claims(self._target, inodes[~np.isin(inodes, self._system)])
            finer = cut(parts, claims.runs.first, claims.runs.end, claims.metadata.first, claims.metadata.end)
            row = row_at(parts, finer.first)
            parts, owner, inode = finer, owner[row], inode[row]
            owner[(owner == _UNOWNED) & (row_at(claims.metadata, parts.first) >= 0)] = Owner.METADATA
            _assign(owner, inode, parts, claims)
            walked += step
        # Allocated and in no inode: lost by a crash of long ago. It is sent like metadata, which is always right.
        owner[owner == _UNOWNED] = Owner.METADATA
        return parts, owner, inode


def _assign(owner: U8, inode: U64, parts: Runs, claims: _Claims) -> None:
    """Give the parts that have no owner yet to the files that claim them."""
    row = row_at(claims.runs, parts.first)
    files = (owner == _UNOWNED) & (row >= 0)
    owner[files] = Owner.FILE
    inode[files] = claims.inode[row[files]]


def _claims(layout: Layout, inodes: U64) -> _Claims:
    """Return what ``inodes`` (allocated ones) own: data of regular files, everything else as metadata."""
    raw = read_inodes(layout, inodes)
    found = mapping(layout.device, inodes, raw)
    is_file = (kinds(raw) == REGULAR) & ((field(raw, 0x20, "<u4") & np.uint64(EA_INODE_FLAG)) == 0)
    of_file = is_file[found.row]
    xattrs = xattr_blocks(raw)
    metadata = united(Runs(found.runs.first[~of_file], found.runs.end[~of_file]), merged_tree(found), runs_of_blocks(xattrs[xattrs != 0]))
    return _Claims(*_by_address(_rows(found, of_file), inodes[found.row[of_file]]), metadata)


def _rows(found: Mapping, which: Flags) -> Runs:
    return Runs(found.runs.first[which], found.runs.end[which])


def _by_address(runs: Runs, inode: U64) -> tuple[Runs, U64]:
    order = np.argsort(runs.first, kind="stable")
    return Runs(runs.first[order], runs.end[order]), inode[order].astype(np.uint64)


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
