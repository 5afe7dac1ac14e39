"""Where the checker says that blocks lie, against what the mounted filesystem says (FIEMAP)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mgmt.drill.checker.blocks import differing_blocks
from mgmt.drill.checker.extents import blocks_of
from tests.storage.checker_scene import blocks_by_filefrag, copy, make, plainly_differing, run, writable


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_blocks_of_every_shape_of_file(tmp_path: Path, filesystem: str) -> None:
    image = tmp_path / "volume.img"
    make(image, filesystem)
    with writable(image, tmp_path / "mnt", filesystem) as root:
        (root / "inline").write_bytes(b"tiny")
        (root / "empty").touch()
        (root / "plain").write_bytes(os.urandom(300_000))
        with (root / "preallocated").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 1 << 20)
            file.write(b"some")
        with (root / "sparse").open("wb") as file:
            for number in range(900):  # more extents than the inode holds, and than one block of an ext4 tree
                file.seek(number * 12_288)
                file.write(os.urandom(1 + number % 4096))
        (root / "attributed").write_bytes(os.urandom(5000))
        os.setxattr(root / "attributed", "user.large", os.urandom(3000))
        if filesystem == "ext4":
            (root / "mapped").touch()
            run("chattr", "-e", root / "mapped")
            (root / "mapped").write_bytes(os.urandom(200_000))
        else:
            run("cp", "--reflink=always", root / "plain", root / "shared")
        paths = [path for path in root.iterdir() if path.is_file()]
        expected = {path.stat().st_ino: blocks_by_filefrag(path) for path in paths}
        names = {path.stat().st_ino: path.name for path in paths}
        if filesystem == "ext4":
            expected[(root / "inline").stat().st_ino] = set()
    found = blocks_of(image, filesystem, expected)
    for inode, blocks in expected.items():
        # A block map's own blocks are counted with it.
        assert len(set(found[inode].tolist()) - blocks) == (names[inode] == "mapped"), names[inode]
        assert blocks <= set(found[inode].tolist()), names[inode]
    assert max(len(blocks) for blocks in expected.values()) >= 900


def test_a_filesystem_with_small_blocks(tmp_path: Path) -> None:
    image = tmp_path / "volume.img"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    run("mkfs.ext4", "-q", "-b", "1024", image)
    content = os.urandom(50_000)
    with writable(image, tmp_path / "mnt", "ext4") as root:
        (root / "file").write_bytes(content)
        inode = (root / "file").stat().st_ino
    blocks = blocks_of(image, "ext4", [inode])[inode]
    with image.open("rb") as file:
        volume = b"".join(os.pread(file.fileno(), 4096, 4096 * block) for block in blocks.tolist())
    assert content[:20_000] in volume


def test_differing_blocks_are_found_across_holes_and_past_an_end(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with first.open("wb") as file:
        file.truncate(40 << 20)
        file.seek(9 << 20)
        file.write(os.urandom(3 << 20))
        file.seek((33 << 20) + 5)
        file.write(bytes(100_000))  # zeros that are written are no difference to a hole
    copy(first, second)
    with second.open("r+b") as file:
        for at in (0, 4095, 8191, (9 << 20) + 1, (10 << 20) - 1, (39 << 20) + 77):
            file.seek(at)
            file.write(b"\xaa")
        file.truncate((40 << 20) + 100)
    with second.open("ab") as file:
        file.write(b"tail")
    expected = [0, 1, (9 << 20) // 4096, (10 << 20) // 4096 - 1, (39 << 20) // 4096 + 0, (40 << 20) // 4096]
    assert differing_blocks(first, second).tolist() == expected
    assert differing_blocks(second, first).tolist() == expected
    assert plainly_differing(first, second) == expected[:-1]
    assert differing_blocks(first, first).dtype == np.int64
