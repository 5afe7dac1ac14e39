"""The ext4 reader on images that no mount of this kernel makes, or that were changed behind the filesystem's back."""

from __future__ import annotations

import os
import random
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent.contract.dmi import Change, Owner, Side
from agent.contract.errors import FailpointHit, LayoutUnsupported
from agent.differential import build as building
from agent.differential.ext4 import Ext4Reader
from agent.differential.ext4_layout import read_layout
from agent.differential.intervals import expanded
from agent.differential.reader import Extents, InodeChanges, Ownership, View
from agent.system import failpoint as failpoints
from tests.storage.differential_truth import (
    Tree,
    check_blocks,
    check_files,
    check_owners,
    debugfs,
    free_blocks,
    inodes_of_blocks,
    tree_of,
)
from tests.storage.frozen_images import built, changed_runs, command, freeze_copy, generation, make_ext4, mounted, view

SMALL = 64 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for path in tmp_path.glob("*.img"):
        path.unlink()


def raw(image: Path) -> View:
    return View(image, image, -1)


def facts(image: Path) -> tuple[Ext4Reader, InodeChanges, Ownership]:
    """Return what the reader says of an image, unmounted, against g0."""
    reader = Ext4Reader(None, raw(image), changed_runs(None, image))
    changes = reader.changed_inodes()
    regular = changes.kind == 8
    extents = reader.extents(changes.inode[regular], changes.generation[regular])
    return reader, changes, reader.ownership(changes, changes.inode[regular], extents)


def tree_at(image: Path, where: Path) -> Tree:
    with view(image, where):
        return tree_of(where)


def populated(folder: Path, *arguments: str) -> Path:
    """Return an image that mkfs filled itself, so that no kernel need know its features."""
    source = folder / "source"
    (source / "below").mkdir(parents=True)
    noise = random.Random(3)
    for number in range(40):
        (source / "below" / f"file-{number}").write_bytes(noise.randbytes(number * 1000))
    (source / "long-link").symlink_to("x" * 300)
    image = folder / "made.img"
    make_ext4(image, SMALL, "-d", str(source), *arguments)
    return image


@pytest.mark.parametrize(
    "arguments",
    [
        ("-O", "quota,project", "-E", "quotatype=usrquota:grpquota:prjquota"),
        ("-O", "mmp"),
        ("-O", "sparse_super2,^resize_inode"),
        ("-O", "^sparse_super,^has_journal,^resize_inode"),
        ("-O", "meta_bg,^resize_inode,^64bit", "-g", "1024"),
        ("-O", "^flex_bg", "-g", "2048"),
        ("-O", "64bit", "-g", "1024", "-N", "9000"),
        ("-O", "^extents,^64bit,^dir_index", "-J", "size=4"),
        ("-O", "orphan_file,inline_data", "-I", "512"),
    ],
    ids=lambda arguments: arguments[1],
)
def test_every_layout_is_owned_as_debugfs_and_dumpe2fs_say(folder: Path, arguments: tuple[str, ...]) -> None:
    image = populated(folder, *arguments)
    _, changes, owners = facts(image)
    blocks = [range(int(first), int(first) + int(count)) for first, count in zip(owners.first, owners.blocks, strict=True)]
    claims = dict(zip(owners.claim_run.tolist(), owners.claim_inode.tolist(), strict=True))
    told = {
        block: (Owner(int(owner)), claims.get(run))
        for run, (some, owner) in enumerate(zip(blocks, owners.owner, strict=True))
        for block in some
    }
    inodes = inodes_of_blocks(image, sorted(told))
    files = {int(inode) for inode, kind in zip(changes.inode, changes.kind, strict=True) if kind == 8}
    free = free_blocks(image)
    assert len(files) == 40
    for block, (owner, inode) in told.items():
        assert (owner is Owner.FREE) == (block in free), block
        assert owner is not Owner.JOURNAL or inodes[block] == 8, block
        assert inodes[block] != 8 or owner is not Owner.FILE, block
        assert inode is None or inode == inodes[block], block
        if owner is Owner.METADATA:
            assert inodes[block] not in files
    # What no inode has and is not free is fixed metadata: all of it is known, and nothing else.
    assert {block for block in told if inodes[block] is None and block not in free} <= set(expanded(read_layout(image).fixed).tolist())
    assert not set(expanded(read_layout(image).fixed).tolist()) & free


def test_all_block_maps_are_walked(folder: Path) -> None:
    image = folder / "maps.img"
    make_ext4(image, SMALL, "-O", "^extents,^64bit,^metadata_csum")
    with mounted(image, folder / "mount"), open(folder / "mount" / "far", "wb") as file:
        for block in (0, 11, 12, 1035, 1036, 1037, 2059, 2060, 1024 * 1024 + 1035, 1024 * 1024 + 1036, 3 * 1024 * 1024):
            os.pwrite(file.fileno(), block.to_bytes(8, "little") * 512, block * 4096)
    reader, changes, _ = facts(image)
    row = int(np.flatnonzero(changes.kind == 8)[0])
    extents = reader.extents(changes.inode[row : row + 1], changes.generation[row : row + 1])
    assert mapped(extents) == debugfs_map(image, int(changes.inode[row]))


def test_deep_trees_are_those_debugfs_prints(folder: Path) -> None:
    image = folder / "deep.img"
    make_ext4(image, SMALL, "-N", "64")
    with mounted(image, folder / "mount"), open(folder / "mount" / "deep", "wb") as file:
        for number in range(1500):
            os.pwrite(file.fileno(), b"d" * 4096, number * 8192)
    reader, changes, owners = facts(image)
    row = int(np.flatnonzero(changes.kind == 8)[0])
    extents = reader.extents(changes.inode[row : row + 1], changes.generation[row : row + 1])
    assert len(extents.logical) == 1500
    assert mapped(extents) == debugfs_map(image, int(changes.inode[row]))
    tree = {int(word) for word in debugfs(image, [f"blocks <{int(changes.inode[row])}>"]).split() if word.isdigit()} - set(
        mapped(extents).values()
    )
    metadata = {
        int(first) + step
        for first, count, owner in zip(owners.first, owners.blocks, owners.owner, strict=True)
        if owner == Owner.METADATA
        for step in range(int(count))
    }
    assert tree <= metadata


def mapped(extents: Extents) -> dict[int, int]:
    rows = zip(extents.logical.tolist(), extents.physical.tolist(), extents.blocks.tolist(), strict=True)
    return {logical + step: physical + step for logical, physical, count in rows for step in range(count)}


def debugfs_map(image: Path, inode: int) -> dict[int, int]:
    """Return the file's map as debugfs `bmap` tells it, asked for every block that may be there."""
    found = {}
    size = int(debugfs(image, [f"stat <{inode}>"]).split("Size: ")[1].split()[0])
    near = [*range(min(size // 4096 + 1, 3200)), *range(1024 * 1024 + 1030, min(size // 4096 + 1, 1024 * 1024 + 1040)), size // 4096 - 1]
    answers = debugfs(image, [f"bmap <{inode}> {block}" for block in near]).splitlines()
    numbers = [int(line) for line in answers if line.isdigit()]
    assert len(numbers) == len(near)
    for block, physical in zip(near, numbers, strict=True):
        if physical:
            found[block] = physical
    return found


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("-b", "1024"), "1024"), (("-O", "bigalloc"), "bigalloc"), (("-O", "encrypt"), "encryption"), (("-O", "journal_dev"), "journal")],
)
def test_layouts_that_are_not_replicated_are_refused_by_name(folder: Path, arguments: tuple[str, ...], word: str) -> None:
    image = folder / "refused.img"
    make_ext4(image, SMALL, *arguments)
    with pytest.raises(LayoutUnsupported, match=word):
        read_layout(image)


def test_a_journal_that_was_not_flushed_is_refused(folder: Path) -> None:
    image = folder / "operational.img"
    make_ext4(image, SMALL)
    with mounted(image, folder / "mount"):
        (folder / "mount" / "file").write_text("not frozen")
        command("sync", "-f", str(folder / "mount"))
        command("cp", str(image), str(folder / "torn.img"))
    with pytest.raises(LayoutUnsupported, match="not frozen"):
        read_layout(folder / "torn.img")
    (folder / "noise.img").write_bytes(random.Random(1).randbytes(1 << 20))
    with pytest.raises(LayoutUnsupported, match="no ext4"):
        read_layout(folder / "noise.img")


def test_a_damaged_tree_is_refused_with_its_inode(folder: Path) -> None:
    image = folder / "damaged.img"
    make_ext4(image, SMALL, "-O", "^metadata_csum")
    with mounted(image, folder / "mount"):
        (folder / "mount" / "file").write_bytes(b"x" * 5000)
        inode = (folder / "mount" / "file").stat().st_ino
    where = debugfs(image, [f"imap <{inode}>"])
    block, offset = int(where.split("located at block ")[1].split(",")[0]), int(where.split("offset 0x")[1].split()[0], 16)
    with open(image, "r+b") as file:
        os.pwrite(file.fileno(), b"\xff\xff", block * 4096 + offset + 0x28 + 2)
    with pytest.raises(LayoutUnsupported, match=f"inode {inode} "):
        facts(image)


class Scene:
    """A base with a few files, mounted nowhere; the target is the base, changed behind the filesystem's back."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.base, self.target = folder / "g1.img", folder / "g2.img"
        image = folder / "operational.img"
        make_ext4(image, SMALL, *arguments)
        mount_point = folder / "mount"
        with mounted(image, mount_point):
            (mount_point / "directory").mkdir()
            for name in ("victim", "bystander", "directory/inside"):
                (mount_point / name).write_bytes(name.encode() * 5000)
            (mount_point / "labelled").write_text("labelled")
            os.setxattr(mount_point / "labelled", "user.word", b"before" * 300)
            freeze_copy(mount_point, image, self.base)
        self.target.write_bytes(self.base.read_bytes())

    def physical(self, name: str) -> int:
        return int(debugfs(self.base, [f"bmap {name} 0"]).splitlines()[-1])

    def overwrite(self, block: int, old: bytes, new: bytes) -> None:
        with open(self.target, "r+b") as file:
            content = os.pread(file.fileno(), 4096, block * 4096)
            assert old in content
            os.pwrite(file.fileno(), content.replace(old, new, 1), block * 4096)


def test_a_block_changed_in_a_file_whose_inode_did_not_is_found(folder: Path) -> None:
    scene = Scene(folder)
    scene.overwrite(scene.physical("victim"), b"victim", b"VICTIM")
    told = built(folder, scene.base, scene.target)
    check_blocks(told)
    check_owners(told)
    check_files(told, tree_at(scene.base, folder / "look"), tree_at(scene.target, folder / "look"))
    dmi = told.dmi
    assert [[path for _, path in dmi.names(row, Side.TARGET)] for row in range(dmi.file_total)] == [[b"victim"]]
    assert Change(int(dmi.change[0])) == Change.CONTENT
    assert dmi.needs(0).tolist() == [0]


def test_names_changed_in_a_directory_whose_inode_did_not_are_found(folder: Path) -> None:
    scene = Scene(folder, "-O", "^metadata_csum", "-I", "128")
    built(folder, None, scene.base, counter=1)
    scene.overwrite(scene.physical("directory"), b"inside", b"INSIDE")
    dmi = built(folder, scene.base, scene.target).dmi
    rows = [row for row in range(dmi.file_total) if dmi.names(row, Side.TARGET)[0][1] == b"directory/INSIDE"]
    assert [(Change(int(dmi.change[row])), dmi.names(row, Side.BASE)[0][1]) for row in rows] == [(Change.NAMES, b"directory/inside")]


def test_xattrs_changed_in_a_block_whose_inode_did_not_are_found(folder: Path) -> None:
    scene = Scene(folder, "-O", "^metadata_csum", "-I", "128")
    block = int(debugfs(scene.base, ["stat labelled"]).split("File ACL: ")[1].split()[0])
    scene.overwrite(block, b"before", b"behind")
    dmi = built(folder, scene.base, scene.target).dmi
    assert [path for _, path in dmi.names(0, Side.TARGET)] == [b"labelled"]
    assert Change(int(dmi.change[0])) == Change.ATTRIBUTES
    assert dmi.xattrs(0)[0][1].startswith(b"behind")
    assert dmi.owner.tolist() == [Owner.METADATA]


def test_a_block_in_use_by_nobody_is_sent_as_metadata(folder: Path) -> None:
    scene = Scene(folder, "-O", "^metadata_csum")
    layout = read_layout(scene.base)
    lost = max(free_blocks(scene.base))
    with open(scene.target, "r+b") as file:
        group, bit = divmod(lost, 32768)
        at = int(layout.block_bitmap[group]) * 4096 + bit // 8
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte | 1 << bit % 8]), at)
        os.pwrite(file.fileno(), b"lost", lost * 4096)
    dmi = built(folder, scene.base, scene.target).dmi
    assert int(dmi.owner[list(dmi.op_block).index(lost)]) == Owner.METADATA


def test_access_times_alone_are_no_change(folder: Path) -> None:
    image, mount_point = folder / "operational.img", folder / "mount"
    make_ext4(image, SMALL)
    with mounted(image, mount_point, "rw,strictatime"):
        (mount_point / "read").write_text("read")
        (mount_point / "mode").write_text("mode")
        freeze_copy(mount_point, image, folder / "g1.img")
        (mount_point / "read").read_text()
        (mount_point / "mode").chmod(0o600)
        (mount_point / "mode").chmod(0o644)
        freeze_copy(mount_point, image, folder / "g2.img")
    told = built(folder, folder / "g1.img", folder / "g2.img")
    check_blocks(told)
    assert told.dmi.file_total == 0
    g1, g2 = folder / "g1.img", folder / "g2.img"
    read = int(debugfs(g2, ["stat read"]).split("Inode: ")[1].split()[0])
    mode = int(debugfs(g2, ["stat mode"]).split("Inode: ")[1].split()[0])
    assert Ext4Reader(raw(g1), raw(g2), changed_runs(g1, g2)).changed_inodes().inode.tolist() == [mode], read


def test_the_map_of_a_group_that_was_never_used_is_not_believed(folder: Path) -> None:
    image = folder / "fresh.img"
    make_ext4(image, 512 << 20)
    layout = read_layout(image)
    group = int(np.flatnonzero(layout.block_uninit)[0])
    block = max(block for block in free_blocks(image) if block // 32768 == group)
    with open(image, "r+b") as file:
        os.pwrite(file.fileno(), b"\xff" * 4096, int(layout.block_bitmap[group]) * 4096)
        os.pwrite(file.fileno(), b"left over", block * 4096)
    _, _, owners = facts(image)
    row = int(np.searchsorted(owners.first, np.uint64(block), side="right")) - 1
    assert int(owners.owner[row]) == Owner.FREE


def test_a_reused_inode_number_stands_twice(folder: Path) -> None:
    image, mount_point = folder / "operational.img", folder / "mount"
    make_ext4(image, SMALL)
    with mounted(image, mount_point):
        (mount_point / "old").write_bytes(b"old" * 3000)
        number = (mount_point / "old").stat().st_ino
        freeze_copy(mount_point, image, folder / "g1.img")
        (mount_point / "old").unlink()
        for attempt in range(20):
            (mount_point / f"new-{attempt}").write_bytes(b"new" * 3000)
        assert number in {path.stat().st_ino for path in mount_point.glob("new-*")}
        freeze_copy(mount_point, image, folder / "g2.img")
    told = built(folder, folder / "g1.img", folder / "g2.img")
    check_files(told, tree_at(folder / "g1.img", folder / "look"), tree_at(folder / "g2.img", folder / "look"))
    dmi = told.dmi
    rows = np.flatnonzero(dmi.inode == number)
    assert sorted(int(dmi.change[row]) & (Change.NEW | Change.DELETED) for row in rows) == [Change.NEW, Change.DELETED]
    assert len(set(dmi.inode_generation[rows].tolist())) == 2
    assert [len(dmi.needs(int(row))) > 0 for row in rows] == [bool(dmi.change[row] & Change.NEW) for row in rows]


def test_caches_that_are_lost_or_damaged_are_made_anew(folder: Path) -> None:
    image, mount_point = folder / "operational.img", folder / "mount"
    make_ext4(image, SMALL)
    with mounted(image, mount_point):
        for number in range(30):
            (mount_point / f"file-{number}").write_bytes(bytes([number]) * 9000)
        freeze_copy(mount_point, image, folder / "g1.img")
        (mount_point / "file-3").rename(mount_point / "moved")
        (mount_point / "file-4").write_bytes(b"other")
        freeze_copy(mount_point, image, folder / "g2.img")
    built(folder, None, folder / "g1.img", counter=1)
    state = folder / "state"
    first, wanted = generation(1).name, b"".join(built(folder, folder / "g1.img", folder / "g2.img").dmi.encode())
    stored = {path.name: path.read_bytes() for path in state.iterdir()}
    assert set(stored) == {f"{generation(number).name}.{kind}" for number in (1, 2) for kind in ("names", "digests")}
    for damage in ("lost", "flipped", "cut"):
        for path in state.iterdir():
            content = bytearray(path.read_bytes())
            if damage == "lost":
                path.unlink()
                continue
            content[len(content) // 2] ^= 1
            path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
        assert b"".join(built(folder, folder / "g1.img", folder / "g2.img").dmi.encode()) == wanted, damage
        assert (state / f"{first}.digests").read_bytes() == stored[f"{first}.digests"]
    building.drop(state, generation(1))
    assert not list(state.glob(f"{first}*"))
    building.drop(state, generation(1))


@pytest.mark.parametrize("point", ["differential.table_stored", "differential.names_stored", "files.before_rename"])
def test_a_build_that_died_is_repeated_to_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    image, mount_point = folder / "operational.img", folder / "mount"
    make_ext4(image, SMALL)
    with mounted(image, mount_point):
        (mount_point / "file").write_text("one")
        freeze_copy(mount_point, image, folder / "g1.img")
        (mount_point / "file").write_text("two")
        freeze_copy(mount_point, image, folder / "g2.img")
    with monkeypatch.context() as armed:
        armed.setattr(failpoints, "_passed", Counter())
        armed.setenv("LANDFALL_ALLOW_FAILPOINTS", "1")
        armed.setenv("LANDFALL_FAILPOINTS", f"{point}=raise")
        with pytest.raises(FailpointHit):
            built(folder, folder / "g1.img", folder / "g2.img")
    again = b"".join(built(folder, folder / "g1.img", folder / "g2.img").dmi.encode())
    for path in (folder / "state").iterdir():
        path.unlink()
    assert again == b"".join(built(folder, folder / "g1.img", folder / "g2.img").dmi.encode())
    assert not list((folder / "state").glob(".new-*"))


def test_an_index_that_contradicts_the_link_counts_is_not_believed(folder: Path) -> None:
    image, mount_point = folder / "operational.img", folder / "mount"
    make_ext4(image, SMALL)
    with mounted(image, mount_point):
        (mount_point / "sub").mkdir()
        (mount_point / "sub" / "file").write_text("one")
        freeze_copy(mount_point, image, folder / "g1.img")
        (mount_point / "sub" / "file").write_text("two")
        freeze_copy(mount_point, image, folder / "g2.img")
    built(folder, None, folder / "g1.img", counter=1)
    # The index of another generation, whole by its digests: the file is not in it.
    make_ext4(folder / "other.img", SMALL)
    built(folder, None, folder / "other.img", counter=5)
    state = folder / "state"
    (state / f"{generation(5).name}.names").replace(state / f"{generation(1).name}.names")
    dmi = built(folder, folder / "g1.img", folder / "g2.img").dmi
    assert [path for _, path in dmi.names(0, Side.TARGET)] == [b"sub/file"]


def test_superblocks_are_found_where_struct_says(folder: Path) -> None:
    """The layout's own offsets, against dumpe2fs."""
    image = populated(folder, "-O", "64bit")
    told = command("dumpe2fs", "-h", str(image)).decode(errors="replace")
    layout = read_layout(image)

    def value(key: str) -> int:
        return int(told.split(f"{key}:")[1].split()[0])

    assert (layout.blocks, layout.inodes) == (value("Block count"), value("Inode count"))
    assert (layout.inodes_per_group, layout.inode_bytes) == (value("Inodes per group"), value("Inode size"))
    assert struct.unpack_from("<H", image.read_bytes()[1024:2048], 0x38) == (0xEF53,)
