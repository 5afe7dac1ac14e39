"""What a differential must say, found without the code under test: by walking both mounts, comparing images byte by byte, and debugfs."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from agent.contract.dmi import Change, Dmi, FileKind, Owner, Side
from tests.storage.frozen_images import Built, blocks_of, changed_blocks, command


@dataclass(frozen=True, slots=True)
class Entry:
    """One inode of a mounted generation as lstat and friends show it."""

    inode: int
    kind: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    mtime_ns: int
    device: int
    content: bytes  # of a symlink its target
    xattrs: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """A mounted generation: inodes by number, and the inode of each path; the root's path is empty."""

    inodes: dict[int, Entry]
    paths: dict[bytes, int]

    def entries_of(self, inode: int) -> set[tuple[int, bytes]]:
        """Return (directory, name): what a renamed directory above does not change."""
        return {(self.paths[os.path.dirname(path)], os.path.basename(path)) for path in self.paths_of(inode)}

    def paths_of(self, inode: int) -> set[bytes]:
        return {path for path, number in self.paths.items() if number == inode}


def tree_of(mount_point: Path) -> Tree:
    root = os.fsencode(mount_point)
    paths = [root]
    for directory, directories, files in os.walk(root):
        paths += [os.path.join(directory, name) for name in directories + files]
    inodes, by_path = {}, {}
    for path in paths:
        facts = os.lstat(path)
        by_path[path[len(root) + 1 :]] = facts.st_ino
        if facts.st_ino not in inodes:
            inodes[facts.st_ino] = _entry(path, facts)
    return Tree(inodes, by_path)


def _entry(path: bytes, facts: os.stat_result) -> Entry:
    content = b""
    if stat.S_ISREG(facts.st_mode):
        with open(path, "rb") as file:
            content = file.read()
    elif stat.S_ISLNK(facts.st_mode):
        content = os.readlink(path)
    node = stat.S_ISCHR(facts.st_mode) or stat.S_ISBLK(facts.st_mode)
    xattrs = sorted(
        (os.fsencode(name), os.getxattr(path, name, follow_symlinks=False)) for name in os.listxattr(path, follow_symlinks=False)
    )
    return Entry(
        facts.st_ino,
        facts.st_mode >> 12,
        facts.st_mode & 0o7777,
        facts.st_uid,
        facts.st_gid,
        facts.st_nlink,
        facts.st_size,
        facts.st_mtime_ns,
        os.major(facts.st_rdev) << 32 | os.minor(facts.st_rdev) if node else 0,
        content,
        tuple(xattrs),
    )


def check_blocks(built: Built) -> None:
    """Every changed block is in exactly one piece, no other is, and both digests of every piece are those of the images' bytes."""
    dmi = built.dmi
    covered = np.zeros(dmi.head.volume_blocks, dtype=int)
    now = blocks_of(built.target)
    before = blocks_of(built.base) if built.base else np.zeros_like(now)
    for first, count, update, diff in zip(dmi.op_block.tolist(), dmi.block_count.tolist(), dmi.update_digest, dmi.diff_digest, strict=True):
        covered[first : first + count] += 1
        assert update.tobytes() == _piece(now[first : first + count], first)
        assert diff.tobytes() == _piece(before[first : first + count], first)
    assert np.array_equal(covered, changed_blocks(built.base, built.target).astype(int))


def check_files(built: Built, base: Tree | None, target: Tree) -> None:
    """Rows, names, attributes and reconstructed contents are those of the mounts; nothing that differs is missing."""
    dmi, image = built.dmi, blocks_of(built.target)
    seen = set()
    for row in range(dmi.file_total):
        inode, change = int(dmi.inode[row]), Change(int(dmi.change[row]))
        names = {side: {path for _, path in dmi.names(row, side)} for side in Side}
        for side, tree in ((Side.BASE, base), (Side.TARGET, target)):
            for parent, path in dmi.names(row, side):
                assert tree is not None
                assert tree.paths[os.path.dirname(path)] == parent
        if change & Change.NAMELESS:
            assert not names[Side.TARGET]
            assert inode not in target.inodes
            continue
        if change & Change.DELETED:
            assert base is not None
            assert names == {Side.BASE: base.paths_of(inode), Side.TARGET: set()}
            check_attributes(dmi, row, base.inodes[inode])
            continue
        seen.add(inode)
        entry = target.inodes[inode]
        check_attributes(dmi, row, entry)
        assert names[Side.TARGET] == target.paths_of(inode), names
        if change & Change.NEW:
            assert not names[Side.BASE]
        else:
            assert base is not None
            assert names[Side.BASE] == base.paths_of(inode)
            assert bool(change & Change.NAMES) == (names[Side.BASE] != names[Side.TARGET])
        if entry.kind == FileKind.REGULAR:
            assert reconstructed(dmi, row, image) == entry.content
            assert dmi.file_digest[row].tobytes() == _folded(dmi, row, image)
            if base is not None and not change & (Change.CONTENT | Change.NEW):
                assert base.inodes[inode].content == entry.content
        else:
            assert (
                dmi.file_digest[row].tobytes() == xxhash.xxh3_128(dmi.payload_of(row) + int(dmi.size[row]).to_bytes(8, "little")).digest()
            )
    missing = differing(base, target) - seen
    assert not missing, [target.paths_of(inode) for inode in missing]
    if base is not None:
        rows = {(int(dmi.inode[row]), bool(dmi.change[row] & Change.DELETED)) for row in range(dmi.file_total)}
        assert {inode for inode, deleted in rows if deleted} >= base.inodes.keys() - target.inodes.keys()


def differing(base: Tree | None, target: Tree) -> set[int]:
    """Return the inodes of the target that are new or of which something promised differs."""
    if base is None:
        return set(target.inodes)
    return {
        inode
        for inode, entry in target.inodes.items()
        if base.inodes.get(inode) is None
        or _without_size_of_directory(base.inodes[inode]) != _without_size_of_directory(entry)
        or (entry.kind != FileKind.DIRECTORY and base.entries_of(inode) != target.entries_of(inode))
    }


def _without_size_of_directory(entry: Entry) -> tuple[object, ...]:
    size = 0 if entry.kind == FileKind.DIRECTORY else entry.size
    return entry.kind, entry.mode, entry.uid, entry.gid, size, entry.mtime_ns, entry.device, entry.content, entry.xattrs


def check_attributes(dmi: Dmi, row: int, entry: Entry) -> None:
    assert int(dmi.kind[row]) == entry.kind
    assert (int(dmi.mode[row]), int(dmi.uid[row]), int(dmi.gid[row])) == (entry.mode, entry.uid, entry.gid)
    assert (int(dmi.nlink[row]), int(dmi.size[row])) == (entry.nlink, entry.size)
    assert int(dmi.mtime_s[row]) * 10**9 + int(dmi.mtime_ns[row]) == entry.mtime_ns
    assert int(dmi.device[row]) == entry.device
    assert tuple(dmi.xattrs(row)) == entry.xattrs
    if entry.kind == FileKind.SYMLINK:
        assert dmi.payload_of(row) == entry.content


def reconstructed(dmi: Dmi, row: int, image: NDArray[np.uint8]) -> bytes:
    """Return the content that extents, payload and size give: unwritten and holes are zeros, cut at the size."""
    size = int(dmi.size[row])
    content = bytearray(size)
    content[: len(dmi.payload_of(row))] = dmi.payload_of(row)
    for logical, physical, blocks, flags in dmi.extents(row):
        if flags & 1:
            continue
        data = image[physical : physical + blocks].tobytes()
        at = logical * 4096
        room = max(0, min(len(data), size - at))
        content[at : at + room] = data[:room]
    return bytes(content)


def check_owners(built: Built) -> None:
    """Owner classes and claims are those that dumpe2fs and debugfs icheck tell of the target image."""
    dmi = built.dmi
    free = free_blocks(built.target)
    blocks: list[int] = []
    classes: list[Owner] = []
    claims: list[set[int]] = []
    needing: dict[int, set[int]] = {}
    for row in range(dmi.file_total):
        for piece in dmi.needs(row).tolist():
            needing.setdefault(piece, set()).add(int(dmi.inode[row]))
    for piece, (first, count) in enumerate(zip(dmi.op_block.tolist(), dmi.block_count.tolist(), strict=True)):
        blocks += range(first, first + count)
        classes += [Owner(int(dmi.owner[piece]))] * count
        claims += [needing.get(piece, set())] * count
    owners = inodes_of_blocks(built.target, blocks)
    # icheck passes over inodes without links, so those are asked one by one.
    unlinked = {}
    for inode, change in zip(dmi.inode.tolist(), dmi.change.tolist(), strict=True):
        if change & (Change.DELETED | Change.NAMELESS):
            unlinked[inode] = {int(word) for word in debugfs(built.target, [f"blocks <{inode}>"]).split() if word.isdigit()}
    for block, owner, claim in zip(blocks, classes, claims, strict=True):
        assert (owner is Owner.FREE) == (block in free), (block, owner)
        if owner is Owner.JOURNAL:
            assert owners[block] == 8
        elif owner is Owner.FILE:
            if owners[block] is None:
                assert [inode for inode in unlinked if block in unlinked[inode]], block
                assert all(block in unlinked[inode] for inode in claim), (block, claim)
            else:
                assert claim == {owners[block]}, (block, claim, owners[block])
        else:
            assert not claim


def free_blocks(image: Path) -> set[int]:
    """Return the free blocks as dumpe2fs lists them."""
    found: set[int] = set()
    for line in command("dumpe2fs", str(image)).decode(errors="replace").splitlines():
        if line.startswith("  Free blocks:"):
            for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
                found.update(range(int(first), int(last or first) + 1))
    return found


def inodes_of_blocks(image: Path, blocks: list[int]) -> dict[int, int | None]:
    """Return the inode that owns each block, as debugfs tells; None for blocks no inode owns."""
    lines = ["icheck " + " ".join(map(str, blocks[at : at + 400])) for at in range(0, len(blocks), 400)]
    found: dict[int, int | None] = {}
    for line in debugfs(image, lines).splitlines():
        match = re.fullmatch(r"(\d+)\t(\d+|<block not found>)", line)
        if match:
            found[int(match[1])] = int(match[2]) if match[2].isdigit() else None
    assert found.keys() == set(blocks)
    return found


def debugfs(image: Path, lines: list[str]) -> str:
    """Return what debugfs prints for commands in a file (a command line above 8 KiB would be cut silently)."""
    with tempfile.NamedTemporaryFile("w", suffix=".debugfs") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        return command("debugfs", "-f", file.name, str(image)).decode(errors="replace")


def _piece(data: NDArray[np.uint8], first: int) -> bytes:
    table = b"".join(xxhash.xxh3_64_intdigest(block.tobytes()).to_bytes(8, "little") for block in data)
    return xxhash.xxh3_128_digest(table, seed=first)


def _folded(dmi: Dmi, row: int, image: NDArray[np.uint8]) -> bytes:
    fold = xxhash.xxh3_128(dmi.payload_of(row))
    for logical, physical, blocks, flags in dmi.extents(row):
        if not flags & 1:
            fold.update(logical.to_bytes(8, "little") + blocks.to_bytes(8, "little"))
            for block in image[physical : physical + blocks]:
                fold.update(xxhash.xxh3_64_intdigest(block.tobytes()).to_bytes(8, "little"))
    fold.update(int(dmi.size[row]).to_bytes(8, "little"))
    return fold.digest()
