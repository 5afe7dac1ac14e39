"""The DMI of two ext4 generations, after every kind of change, held against mounts, images and debugfs."""

from __future__ import annotations

import os
import random
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.contract.dmi import Change, Dmi, FileKind, Owner, Side
from tests.storage.differential_truth import Tree, check_blocks, check_files, check_owners, tree_of
from tests.storage.frozen_images import Built, built, command, copied_tree, freeze_copy, loop, make_ext4, mounted, view

FEATURES = {
    "default": (),
    "rich": ("-I", "256", "-O", "inline_data,ea_inode,metadata_csum_seed,orphan_file,meta_bg,^resize_inode"),
    "plain": ("-O", "^64bit,^flex_bg,^metadata_csum,uninit_bg", "-g", "8192"),
    "maps": ("-O", "^extents,^64bit,^metadata_csum", "-I", "128"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """Both differentials of one scenario: g0 to g1 and g1 to g2."""

    features: str
    first: Built
    second: Built
    g1: Tree
    g2: Tree
    noise: random.Random


def fill(root: Path, random_bytes: random.Random, features: str) -> None:
    """Make the base: something of everything."""
    copied_tree(Path("/usr/share/perl5"), root / "tree", 150)
    for name in (
        "append in-place safe-save delete truncate grow punch unwritten chmod chown touch link-gone link-more xattr xattr-drop acl swap-a "
        "swap-b move shrink-xattr replaced kind-change untouched open-deleted punch-hidden flags"
    ).split():
        (root / name).write_bytes(random_bytes.randbytes(random_bytes.randrange(1, 60_000)))
    (root / "punch").write_bytes(random_bytes.randbytes(400_000))
    (root / "punch-hidden").write_bytes(random_bytes.randbytes(400_000))
    (root / "small").write_bytes(b"in the inode" * 4)
    (root / "small-grows").write_bytes(b"in the inode" * 4)
    (root / "sparse").write_bytes(b"head")
    os.truncate(root / "sparse", 50_000_000)
    os.link(root / "link-gone", root / "link-gone-2")
    os.link(root / "link-more", root / "link-more-2")
    os.symlink("short", root / "symlink-short")
    os.symlink("long/" * 100, root / "symlink-long")
    os.mkfifo(root / "fifo")
    for folder in ("d1", "d2", "many", "gone", "old-name"):
        (root / folder).mkdir()
    (root / "old-name" / "inside").write_bytes(b"moves with its directory")
    (root / "gone" / "below").write_bytes(random_bytes.randbytes(9000))
    for number in range(3000):
        (root / "many" / f"entry-{number:05d}-{'x' * 40}").touch()
    os.setxattr(root / "xattr-drop", "user.a", b"1")
    os.setxattr(root / "shrink-xattr", "user.big", b"b" * 3000)
    for name in ("shared-1", "shared-2", "shared-3"):
        (root / name).write_bytes(name.encode())
        os.setxattr(root / name, "user.same", b"s" * 2000)
    fragment(root / "deep", 700)
    fragment(root / "filler", 50)


def fragment(path: Path, pieces: int) -> None:
    """Make a file of single blocks with holes between: more extents than fit the inode."""
    with open(path, "wb") as file:
        for number in range(pieces):
            os.pwrite(file.fileno(), number.to_bytes(4, "little") * 1024, number * 8192)
        os.fsync(file.fileno())


def change(root: Path, random_bytes: random.Random, features: str) -> None:
    """Make the target: every kind of change."""
    with open(root / "append", "ab") as file:
        file.write(random_bytes.randbytes(30_000))
    with open(root / "in-place", "r+b") as file:
        file.write(b"new beginning")
    (root / "safe-save.tmp").write_bytes(random_bytes.randbytes(20_000))
    os.rename(root / "safe-save.tmp", root / "safe-save")
    (root / "delete").unlink()
    os.truncate(root / "truncate", 100)
    os.truncate(root / "grow", 300_000)
    for name, times in (("punch", None), ("punch-hidden", os.stat(root / "punch-hidden"))):
        if features != "maps":
            command("fallocate", "--punch-hole", "--offset", "8192", "--length", "16384", str(root / name))
        else:
            os.truncate(root / name, 8192)
        if times:
            os.utime(root / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    if features != "maps":
        command("fallocate", "--offset", "100000", "--length", "500000", str(root / "unwritten"))
        command("fallocate", "--keep-size", "--length", "200000", str(root / "grow"))
    os.chmod(root / "chmod", 0o4751)
    os.chown(root / "chown", 70_001, 70_002)
    os.utime(root / "touch", ns=(0, -1_500_000_001 if features == "maps" else -1_500_000_001))
    (root / "link-gone-2").unlink()
    os.link(root / "link-more", root / "d1" / "link-more-3")
    os.setxattr(root / "xattr", "user.small", b"v")
    os.setxattr(root / "xattr", "trusted.big", b"t" * 3500)
    os.setxattr(root / "xattr", "security.odd", b"\0\1")
    os.removexattr(root / "xattr-drop", "user.a")
    os.setxattr(root / "shrink-xattr", "user.big", b"b")
    (root / "shared-1").unlink()
    command("setfacl", "-m", "u:70003:rw,g:70004:r", str(root / "acl"))
    command("setfacl", "-d", "-m", "u:70003:rwx", str(root / "d2"))
    os.rename(root / "swap-a", root / "swap-t")
    os.rename(root / "swap-b", root / "swap-a")
    os.rename(root / "swap-t", root / "swap-b")
    os.rename(root / "move", root / "d1" / "moved")
    os.rename(root / "old-name", root / "d2" / "new-name")
    (root / "gone" / "below").unlink()
    (root / "gone").rmdir()
    (root / "kind-change").unlink()
    (root / "kind-change").mkdir()
    (root / "small").write_bytes(b"other in the inode")
    with open(root / "small-grows", "ab") as file:
        file.write(b"y" * 10_000)
    with open(root / "sparse", "r+b") as file:
        os.pwrite(file.fileno(), b"far", 40_000_000)
    os.truncate(root / "all-hole", 10_000) if (root / "all-hole").exists() else (root / "all-hole").touch()
    os.truncate(root / "all-hole", 10_000)
    (root / "empty").touch()
    (root / "symlink-short").unlink()
    os.symlink("other", root / "symlink-short")
    os.symlink("l" * 59, root / "symlink-59")
    os.symlink("l" * 60, root / "symlink-60")
    os.mkfifo(root / "fifo-2", 0o640)
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(root / "disk", 0o660 | stat.S_IFBLK, os.makedev(259, 70_000))
    with socket.socket(socket.AF_UNIX) as listener:
        directory = os.open(root, os.O_RDONLY)
        try:
            listener.bind(f"/proc/self/fd/{directory}/socket")
        finally:
            os.close(directory)
    for name in (b"not-utf8-\xff\xfe", b"new\nline", b" space ", b"-rf", b"x" * 255, "größe".encode()):
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(name)
    for number in range(3000, 10_000):
        (root / "many" / f"entry-{number:05d}-{'x' * 40}").touch()
    for number in range(0, 3000, 7):
        (root / "many" / f"entry-{number:05d}-{'x' * 40}").unlink()
    with open(root / "deep", "r+b") as file:
        os.pwrite(file.fileno(), b"changed in the middle", 350 * 8192)
        os.pwrite(file.fileno(), b"more" * 2048, 701 * 8192)
    with open(root / "short-lived", "wb") as file:
        file.write(random_bytes.randbytes(3_000_000))
        os.fsync(file.fileno())
    (root / "short-lived").unlink()
    command("chattr", "+d", str(root / "flags"))
    changed = sorted(path for path in (root / "tree").rglob("*") if path.is_file() and not path.is_symlink())
    for path in changed[::10]:
        with open(path, "ab") as file:
            file.write(b"# one line more\n")


@pytest.fixture(scope="module", params=list(FEATURES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("ext4")
    features = str(request.param)
    noise = random.Random(features)
    image = folder / "operational.img"
    make_ext4(image, 160 << 20, *FEATURES[features])
    mount_point = folder / "mount"
    with mounted(image, mount_point):
        fill(mount_point, noise, features)
        freeze_copy(mount_point, image, folder / "g1.img")
        with open(mount_point / "open-deleted", "r+b") as held, open(mount_point / "born-deleted", "wb") as born:
            (mount_point / "open-deleted").unlink()
            held.write(b"still written")
            (mount_point / "born-deleted").unlink()
            born.write(noise.randbytes(50_000))
            change(mount_point, noise, features)
            freeze_copy(mount_point, image, folder / "g2.img")
    first = built(folder, None, folder / "g1.img", counter=1)
    second = built(folder, folder / "g1.img", folder / "g2.img", counter=2)
    trees = []
    for name in ("g1", "g2"):
        with view(folder / f"{name}.img", folder / "look"):
            trees.append(tree_of(folder / "look"))
    yield Case(features, first, second, trees[0], trees[1], noise)
    for path in folder.glob("*.img"):
        path.unlink()


def row_of(dmi: Dmi, path: str | bytes, side: Side = Side.TARGET) -> int:
    wanted = os.fsencode(path)
    rows = [row for row in range(dmi.file_total) if any(name == wanted for _, name in dmi.names(row, side))]
    assert len(rows) == 1, (path, rows)
    return rows[0]


def test_first_differential_has_every_block_file_and_content(case: Case) -> None:
    check_blocks(case.first)
    check_files(case.first, None, case.g1)
    assert {int(change) & Change.NEW for change in case.first.dmi.change} == {Change.NEW}


def test_every_changed_block_is_in_one_piece(case: Case) -> None:
    check_blocks(case.second)


def test_every_changed_file_is_told_as_it_is(case: Case) -> None:
    check_files(case.second, case.g1, case.g2)


def test_owners_are_those_debugfs_tells(case: Case) -> None:
    check_owners(case.first)
    check_owners(case.second)
    assert Owner.FREE in case.second.dmi.owner
    assert Owner.METADATA in case.second.dmi.owner


def test_changes_are_classified(case: Case) -> None:
    dmi = case.second.dmi

    def change_of(path: str, side: Side = Side.TARGET) -> Change:
        return Change(int(dmi.change[row_of(dmi, path, side)]))

    for path in ("append", "in-place", "truncate", "grow", "small", "small-grows", "sparse", "deep", "punch", "punch-hidden"):
        assert change_of(path) & Change.CONTENT, path
        assert not change_of(path) & Change.NAMES, path
    assert change_of("chmod") == Change.ATTRIBUTES
    assert change_of("touch") == Change.ATTRIBUTES
    assert change_of("flags") == Change.ATTRIBUTES
    assert change_of("swap-a") == change_of("swap-b") == change_of("d1/moved") == change_of("d2/new-name") == Change.NAMES
    assert change_of("link-gone") == Change.NAMES
    for path in ("delete", "gone", "gone/below", "open-deleted", "shared-1"):
        assert change_of(path, Side.BASE) == Change.DELETED, path
    assert change_of("safe-save", Side.BASE) == Change.DELETED
    assert change_of("safe-save") & Change.NEW
    nameless = [row for row in range(dmi.file_total) if dmi.change[row] & Change.NAMELESS]
    assert len(nameless) == 1
    assert len(dmi.needs(nameless[0])) > 0
    paths = {path for row in range(dmi.file_total) for side in Side for _, path in dmi.names(row, side)}
    assert not paths & {b"untouched", b"filler", b"fifo", b"d2/new-name/inside", b"lost+found"}


def test_attributes_that_lstat_does_not_show(case: Case) -> None:
    dmi = case.second.dmi
    assert int(dmi.attr_flags[row_of(dmi, "flags")]) & 0x40
    if case.features == "rich":
        assert dmi.payload_of(row_of(dmi, "small")) == b"other in the inode"


def test_H9_a_hole_is_no_content_in_the_inode(case: Case) -> None:
    dmi = case.second.dmi
    row = row_of(dmi, "all-hole")
    assert int(dmi.size[row]) == 10_000
    assert dmi.payload_of(row) == b""
    assert dmi.extents(row) == []


def test_deep_trees_are_walked(case: Case) -> None:
    assert len(case.second.dmi.extents(row_of(case.second.dmi, "deep"))) > 600


def test_generations_can_be_attached_again(case: Case) -> None:
    with loop(case.second.target, read_only=True) as device:
        assert device.exists()


def test_kinds(case: Case) -> None:
    dmi = case.second.dmi
    for path, kind in (
        ("fifo-2", FileKind.FIFO),
        ("null", FileKind.CHARACTER),
        ("disk", FileKind.BLOCK),
        ("socket", FileKind.SOCKET),
        ("symlink-59", FileKind.SYMLINK),
        ("kind-change", FileKind.DIRECTORY),
    ):
        assert int(dmi.kind[row_of(dmi, path)]) == kind
