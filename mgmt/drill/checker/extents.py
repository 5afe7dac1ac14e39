"""Where the blocks of files lie in a frozen image, by the filesystem's own debugger."""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mgmt.drill.checker.blocks import BLOCK, Blocks
from mgmt.drill.checker.trees import command

_EX_LEAF = re.compile(r"^\s*(\d+)/\s*(\d+)\s+\d+/\s*\d+\s+\d+\s+-\s+\d+\s+(\d+)\s+-\s+(\d+)\s+\d+")
_BLOCK = re.compile(r"\b(\d+)\b")
_BMAP = re.compile(r"startblock \d+ \((\d+)/(\d+)\) count (\d+)")


def blocks_of(image: Path, filesystem: str, inodes: Iterable[int]) -> dict[int, Blocks]:
    """Return the 4096-byte blocks of the image that each regular file's extents touch, unwritten ones included."""
    wanted = sorted(set(inodes))
    if not wanted:
        return {}
    ranges = _ext4(image, wanted) if filesystem == "ext4" else _xfs(image, wanted)
    return {inode: _to_blocks(ranges.get(inode, [])) for inode in wanted}


def _to_blocks(ranges: list[tuple[int, int]]) -> Blocks:
    parts = [np.arange(start // BLOCK, -(-end // BLOCK), dtype=np.int64) for start, end in ranges]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)


def _ext4(image: Path, inodes: list[int]) -> dict[int, list[tuple[int, int]]]:
    """Byte ranges by ``ex``; ``blocks`` for files that have a block map. One short command a line: debugfs drops long ones."""
    with image.open("rb") as file:
        file.seek(1024)
        block_bytes = 1024 << struct.unpack_from("<I", file.read(1024), 24)[0]
    ranges: dict[int, list[tuple[int, int]]] = {}
    mapped: list[int] = []  # those that have no extent tree: block maps, and inline data, which has no blocks
    for inode, lines in _debugfs(image, "ex", inodes).items():
        ranges[inode] = []
        if not any("Logical" in line for line in lines):
            mapped.append(inode)
        for match in filter(None, map(_EX_LEAF.match, lines)):
            level, depth, first, last = (int(value) for value in match.groups())
            if level == depth:
                ranges[inode].append((first * block_bytes, (last + 1) * block_bytes))
    for inode, lines in (_debugfs(image, "blocks", mapped) if mapped else {}).items():
        numbers = [int(number) for line in lines for number in _BLOCK.findall(line)]
        ranges[inode] = [(number * block_bytes, (number + 1) * block_bytes) for number in numbers if number]
    return ranges


def _debugfs(image: Path, verb: str, inodes: list[int]) -> dict[int, list[str]]:
    with tempfile.NamedTemporaryFile("w", prefix="landfall-check-") as script:
        script.writelines(f"{verb} <{inode}>\n" for inode in inodes)
        script.flush()
        text = command("debugfs", "-f", script.name, str(image))
    found: dict[int, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := re.match(rf"debugfs: {verb} <(\d+)>", line):
            current = found.setdefault(int(match.group(1)), [])
        else:
            current.append(line)
    if set(found) != set(inodes):
        raise RuntimeError(f"debugfs answered for {len(found)} of {len(inodes)} files")
    return found


def _xfs(image: Path, inodes: list[int]) -> dict[int, list[tuple[int, int]]]:
    """Byte ranges of the data fork by ``bmap``; a block's address is (allocation group/block in it)."""
    with image.open("rb") as file:
        head = file.read(128)
    block_bytes, group_blocks = struct.unpack_from(">I", head, 4)[0], struct.unpack_from(">I", head, 84)[0]
    script = "".join(f"echo @{inode}\ninode {inode}\nbmap -d\n" for inode in inodes)
    text = command("xfs_db", "-r", str(image), stdin=script.encode())
    ranges: dict[int, list[tuple[int, int]]] = {}
    current: list[tuple[int, int]] = []
    for line in text.splitlines():
        if match := re.search(r"@(\d+)", line):
            current = ranges.setdefault(int(match.group(1)), [])
        elif match := _BMAP.search(line):
            group, block, count = (int(value) for value in match.groups())
            start = group * group_blocks + block
            current.append((start * block_bytes, (start + count) * block_bytes))
    if set(ranges) != set(inodes):
        raise RuntimeError(f"xfs_db answered for {len(ranges)} of {len(inodes)} files")
    return ranges
