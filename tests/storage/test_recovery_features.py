"""What a filesystem can hold, salvaged: FAULTS.md, group H."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent.contract.dmi import Change, ExtentFlag
from agent.contract.identity import FilesystemKind
from agent.contract.messages import Deletions, Outcome
from agent.system import attributes
from agent.system.blockdev import punch
from agent.volume.substrate import Workspace, WorkspaceKind
from tests.storage import recovery_fixtures
from tests.storage.recovery_fixtures import MakeScene
from tests.storage.salvage_scene import Scene

make_scene = recovery_fixtures.make_scene
pool = recovery_fixtures.pool
scene = recovery_fixtures.scene

BLOCK = 4096


def set_flags(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        attributes.set_flags(fd, flags)
    finally:
        os.close(fd)


def equal_to_target(scene: Scene, fill: Callable[[Path], None], change: Callable[[Path], None]) -> None:
    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    result, tree = scene.salvaged(scene.job(built, scene.land(built)))
    assert result.exceptions == ()
    assert tree.facts() == built.target.facts()
    groups = [sorted(names) for names in built.target.names().values() if len(names) > 1]
    assert sorted(map(sorted, (names for names in tree.names().values() if len(names) > 1))) == sorted(groups)


def test_H1_H10_sparse_and_preallocated_files(scene: Scene) -> None:
    def fill(root: Path) -> None:
        (root / "full").write_bytes(os.urandom(40 * BLOCK))
        with open(root / "sparse", "wb") as file:
            file.truncate(1 << 40)
            os.pwrite(file.fileno(), b"early", 0)

    def change(root: Path) -> None:
        with open(root / "full", "r+b") as file:
            punch(file.fileno(), 10 * BLOCK, 10 * BLOCK)
            os.pwrite(file.fileno(), b"x", 30 * BLOCK + 17)
        with open(root / "sparse", "r+b") as file:
            os.pwrite(file.fileno(), b"late", (1 << 40) - 2)
            os.pwrite(file.fileno(), os.urandom(100), 1 << 33)
        with open(root / "reserved", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 64 * BLOCK)
            os.pwrite(file.fileno(), b"in the middle", 20 * BLOCK + 5)
        with open(root / "beyond", "wb") as file:
            file.write(b"short")
            file.flush()
            subprocess.run(["fallocate", "-n", "-l", str(64 * BLOCK), root / "beyond"], check=True)

    equal_to_target(scene, fill, change)


def test_H1_holes_stay_holes(scene: Scene) -> None:
    def change(root: Path) -> None:
        with open(root / "sparse", "wb") as file:
            file.seek(1 << 30)
            file.write(b"end")

    scene.fill(lambda root: None)
    scene.change(change)
    built = scene.build()
    result, _ = scene.salvaged(scene.job(built, scene.land(built)))
    with scene.opened(result.generation) as root:
        assert (root / "sparse").stat().st_blocks <= 16


def test_H2_hard_links_of_which_some_names_are_in_the_differential(scene: Scene) -> None:
    def fill(root: Path) -> None:
        (root / "d").mkdir()
        for name in ("one", "two", "three"):
            (root / name).write_bytes(os.urandom(9000))
            os.link(root / name, root / "d" / name)
            os.link(root / name, root / f"{name} again")

    def change(root: Path) -> None:
        (root / "one").unlink()
        os.link(root / "two", root / "d/two more")
        (root / "three again").rename(root / "d/three again")
        (root / "three").write_bytes(os.urandom(20_000))
        (root / "d/one").unlink()
        os.link(root / "one again", root / "one")

    equal_to_target(scene, fill, change)


def test_H2_a_hard_linked_file_that_is_not_whole_keeps_its_base_content_at_all_its_new_names(scene: Scene) -> None:
    def fill(root: Path) -> None:
        (root / "a").write_bytes(os.urandom(9000))
        os.link(root / "a", root / "b")

    def change(root: Path) -> None:
        (root / "a").write_bytes(os.urandom(9001))
        (root / "a").rename(root / "c")

    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    _, tree = scene.salvaged(scene.job(built, scene.land(built, built.pieces(b"c"))))
    assert tree.facts() == {
        **{path: node for path, node in built.target.facts().items() if path not in (b"b", b"c")},
        b"b": built.base.node(b"a"),
        b"c": built.base.node(b"a"),
    }
    assert tree.paths[b"b"] == tree.paths[b"c"]


def test_H3_xattrs_and_acls(scene: Scene) -> None:
    def fill(root: Path) -> None:
        for name in ("file", "cleared"):
            (root / name).write_bytes(b"x" * 5000)
        (root / "d").mkdir()
        os.setxattr(root / "cleared", "user.old", b"old")
        os.setxattr(root / "cleared", "trusted.old", b"old")
        subprocess.run(["setfacl", "-m", "u:1234:r", root / "cleared"], check=True)

    def change(root: Path) -> None:
        os.setxattr(root / "file", "user.empty", b"")
        os.setxattr(root / "file", "user.large", os.urandom(3000))
        os.setxattr(root / "file", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
        subprocess.run(["setfacl", "-m", "u:1000:rw,g:2000:r", root / "file"], check=True)
        subprocess.run(["setfacl", "-d", "-m", "u:1000:rwx", root / "d"], check=True)
        (root / "d/inherits").write_bytes(b"new")
        subprocess.run(["setfacl", "-b", root / "cleared"], check=True)
        os.removexattr(root / "cleared", "user.old")
        os.removexattr(root / "cleared", "trusted.old")
        (root / "link").symlink_to("file")
        os.setxattr(root / "link", "trusted.on.link", b"1", follow_symlinks=False)

    equal_to_target(scene, fill, change)


def test_H4_immutable_and_append_only(scene: Scene) -> None:
    def fill(root: Path) -> None:
        for name in ("locked", "unlocked", "log", "moved", "kept", "deleted"):
            (root / name).write_bytes(os.urandom(5000))
        for name in ("d", "e"):
            (root / name).mkdir()
            (root / name / "inner").write_bytes(b"inner")
        for name in ("unlocked", "moved", "kept", "deleted", "d"):
            set_flags(root / name, attributes.IMMUTABLE)
        set_flags(root / "log", attributes.APPEND)

    def change(root: Path) -> None:
        set_flags(root / "unlocked", 0)
        set_flags(root / "moved", 0)
        set_flags(root / "deleted", 0)
        set_flags(root / "d", 0)
        (root / "locked").write_bytes(os.urandom(6000))
        (root / "unlocked").write_bytes(os.urandom(6000))
        with open(root / "log", "ab") as file:
            file.write(os.urandom(5000))
        (root / "moved").rename(root / "d/moved")
        (root / "deleted").unlink()
        (root / "d/inner").rename(root / "e/from d")
        set_flags(root / "locked", attributes.IMMUTABLE)
        set_flags(root / "d/moved", attributes.APPEND)
        set_flags(root / "d", attributes.IMMUTABLE)

    equal_to_target(scene, fill, change)


def test_H4_a_locked_file_that_is_not_whole_stays_locked(scene: Scene) -> None:
    def fill(root: Path) -> None:
        (root / "a").write_bytes(os.urandom(5000))
        set_flags(root / "a", attributes.IMMUTABLE)

    def change(root: Path) -> None:
        set_flags(root / "a", 0)
        (root / "a").write_bytes(os.urandom(5000))
        (root / "a").rename(root / "b")

    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    _, tree = scene.salvaged(scene.job(built, scene.land(built, built.pieces(b"b"))))
    assert tree.node(b"b") == built.base.node(b"a")
    assert tree.node(b"b").flags == attributes.IMMUTABLE


def test_H5_G19_fifos_sockets_and_devices_are_made_and_never_opened(scene: Scene) -> None:
    def fill(root: Path) -> None:
        os.mkfifo(root / "old fifo", 0o600)
        os.mknod(root / "gone", stat.S_IFCHR | 0o600, os.makedev(1, 3))

    def change(root: Path) -> None:
        (root / "old fifo").chmod(0o4711)
        (root / "old fifo").rename(root / "fifo")
        (root / "gone").unlink()
        os.mkfifo(root / "new fifo", 0o622)
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
        os.chown(root / "disk", 3, 4)
        with socket.socket(socket.AF_UNIX) as one:
            here = Path.cwd()
            os.chdir(root)
            try:
                one.bind("socket")
            finally:
                os.chdir(here)
        (root / "setuid").write_bytes(b"#!")
        os.chown(root / "setuid", 1, 1)
        (root / "setuid").chmod(0o6755)

    equal_to_target(scene, fill, change)


def test_H7_G17_long_names_odd_names_and_long_paths(make_scene: MakeScene) -> None:
    scene = make_scene(FilesystemKind.EXT4)
    names = [b"n" * 255, b"\xff\xfe not utf-8", b"line\nfeed", b"\x1b[31mred", "e\u0301".encode(), "\u00e9".encode(), b"...", b"..a", b" "]

    def change(root: Path) -> None:
        folder = os.fsencode(root)
        for name in names:
            Path(os.fsdecode(os.path.join(folder, name))).write_bytes(name * 100)
        for _ in range(15):
            folder = os.path.join(folder, b"d" * 230)
            os.mkdir(folder)
        Path(os.fsdecode(os.path.join(folder, b"x"))).write_bytes(b"deep")

    equal_to_target(scene, lambda root: None, change)


def test_H8_reflinked_extents(make_scene: MakeScene) -> None:
    def fill(root: Path) -> None:
        (root / "a").write_bytes(os.urandom(20 * BLOCK))

    def change(root: Path) -> None:
        subprocess.run(["cp", "--reflink=always", root / "a", root / "b"], check=True)
        (root / "c").write_bytes(os.urandom(20 * BLOCK))
        subprocess.run(["cp", "--reflink=always", root / "c", root / "d"], check=True)
        with open(root / "d", "r+b") as file:
            file.write(b"d is another")

    scene = make_scene(FilesystemKind.XFS)
    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    assert any(flags & ExtentFlag.SHARED for *_, flags in built.dmi.extents(built.row(b"c")))
    _, tree = scene.salvaged(scene.job(built, scene.land(built)))
    assert tree.facts() == built.target.facts()
    only_d = sorted(set(built.pieces(b"d")) - set(built.pieces(b"c")))
    _, tree = scene.salvaged(scene.job(built, scene.land(built, only_d)))
    assert tree.facts() == {path: node for path, node in built.target.facts().items() if path != b"d"}


def test_H9_inline_data(make_scene: MakeScene) -> None:
    def fill(root: Path) -> None:
        (root / "inline").write_bytes(b"a few bytes")
        (root / "shrinks").write_bytes(os.urandom(9000))
        (root / "grows").write_bytes(b"small")
        (root / "empty").write_bytes(b"not yet")
        (root / "folder" / "below").mkdir(parents=True)  # a directory that lives in its inode
        (root / "folder" / "below" / "renamed").write_bytes(b"r" * 100)

    def change(root: Path) -> None:
        (root / "inline").write_bytes(b"some other bytes")
        (root / "shrinks").write_bytes(b"tiny")
        (root / "grows").write_bytes(os.urandom(9000))
        (root / "empty").write_bytes(b"")
        (root / "new").write_bytes(b"n" * 120)
        (root / "void").write_bytes(b"")
        (root / "folder" / "below" / "renamed").rename(root / "folder" / "below" / "moved")
        (root / "folder" / "below" / "made").write_bytes(b"m" * 5000)

    scene = make_scene(FilesystemKind.EXT4, "-O", "inline_data")
    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    assert built.dmi.payload_of(built.row(b"new")) == b"n" * 120
    _, tree = scene.salvaged(scene.job(built, scene.land(built)))
    assert tree.facts() == built.target.facts()


def test_H13_truncated_grown_and_appended(scene: Scene) -> None:
    def fill(root: Path) -> None:
        for name in ("cut in block", "cut at block", "emptied", "grown", "appended", "cut and grown"):
            (root / name).write_bytes(os.urandom(5 * BLOCK + 100))

    def change(root: Path) -> None:
        os.truncate(root / "cut in block", 2 * BLOCK + 1)
        os.truncate(root / "cut at block", 2 * BLOCK)
        os.truncate(root / "emptied", 0)
        os.truncate(root / "grown", 50 * BLOCK + 1)
        with open(root / "appended", "ab") as file:
            file.write(b"tail")
        os.truncate(root / "cut and grown", 10)
        os.truncate(root / "cut and grown", 9 * BLOCK)

    equal_to_target(scene, fill, change)


def test_H18_times_project_and_flags(make_scene: MakeScene) -> None:
    def fill(root: Path) -> None:
        (root / "d").mkdir()
        (root / "d/file").write_bytes(os.urandom(5000))
        (root / "untouched").mkdir()
        os.utime(root / "untouched", ns=(5, 1_000_000_007))

    def change(root: Path) -> None:
        for name in ("d", "d/file"):
            fd = os.open(root / name, os.O_RDONLY)
            attributes.set_project(fd, 4711)
            attributes.set_flags(fd, 0x40 | 0x80)
            os.close(fd)
            os.utime(root / name, ns=(1, 123_456_789_123_456_789))
        os.utime(root, ns=(1, 999_999_999))

    equal_to_target(make_scene(FilesystemKind.XFS), fill, change)  # this kernel may have no quota, which ext4's project ids need


def test_H18_folders_of_a_project_take_files_of_others(make_scene: MakeScene) -> None:
    def of_project(path: Path, number: int, flags: int = 0) -> None:
        fd = os.open(path, os.O_RDONLY)
        attributes.set_project(fd, number)
        attributes.set_flags(fd, flags)
        os.close(fd)

    def fill(root: Path) -> None:
        (root / "d").mkdir()
        (root / "other").write_bytes(os.urandom(5000))
        of_project(root / "d", 7, attributes.PROJECT_INHERIT)
        (root / "d/inherited").write_bytes(os.urandom(5000))
        (root / "d/inside").mkdir()

    def change(root: Path) -> None:
        of_project(root / "d", 7)
        (root / "other").rename(root / "d/moved in")
        (root / "d/inside/link").symlink_to("x")
        (root / "d/inside/new").write_bytes(os.urandom(5000))
        (root / "d/new").mkdir()
        (root / "d/inherited").rename(root / "moved out")
        of_project(root / "d", 7, attributes.PROJECT_INHERIT)

    equal_to_target(make_scene(FilesystemKind.XFS), fill, change)


def test_H18_a_folder_that_did_not_change_keeps_its_time_though_a_name_passes_through_the_root(scene: Scene) -> None:
    def fill(root: Path) -> None:
        (root / "d").mkdir()
        (root / "d/a").write_bytes(os.urandom(5000))
        os.utime(root, ns=(1, 77))

    scene.fill(fill)
    scene.change(lambda root: os.rename(root / "d/a", root / "d/b"))
    built = scene.build()
    assert built.row(b"d/b") >= 0
    _, tree = scene.salvaged(scene.job(built, scene.land(built)))
    assert tree.node(b"").mtime_ns == 77


def test_H12_held_files_whose_name_is_taken_go_to_their_own_folder(scene: Scene) -> None:
    def fill(root: Path) -> None:
        (root / "d").mkdir()
        (root / "d/old").write_bytes(b"old")
        (root / "d/keep").write_bytes(b"keep")
        (root / "torn").write_bytes(os.urandom(5000))

    def change(root: Path) -> None:
        for name in ("old", "keep"):
            (root / "d" / name).unlink()
        (root / "d").rmdir()
        (root / "d").write_bytes(b"a file now" * 1000)
        (root / "torn").write_bytes(os.urandom(5000))

    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    result, tree = scene.salvaged(scene.job(built, scene.land(built, built.pieces(b"torn"))))
    assert tree.node(b"d") == built.target.node(b"d")
    assert tree.node(b".landfall-held/d/old").content == b"old"
    assert tree.node(b".landfall-held").mode == 0o700
    assert {(outcome.outcome, outcome.path) for outcome in result.exceptions} == {
        (Outcome.HELD, ".landfall-held/d"),
        (Outcome.HELD, ".landfall-held/d/old"),
        (Outcome.HELD, ".landfall-held/d/keep"),
    }


def test_H6_what_there_is_no_room_for_is_left_out_and_named(scene: Scene) -> None:
    """The second operational volume holds deleted files, so the target need not fit."""
    room = 18 << 20 if scene.kind is FilesystemKind.EXT4 else 100 << 20

    def fill(root: Path) -> None:
        (root / "deleted").write_bytes(os.urandom(room))
        (root / "grown").write_bytes(b"grown")

    def change(root: Path) -> None:
        (root / "deleted").unlink()
        for number in range(3):
            (root / f"large{number}").write_bytes(os.urandom(room * 3 // 4 + number))
        (root / "small").write_bytes(os.urandom(9000))
        (root / "torn").write_bytes(os.urandom(9000))
        (root / "grown").write_bytes(os.urandom(9000))

    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    result, tree = scene.salvaged(scene.job(built, scene.land(built, built.pieces(b"torn"))))
    named = {outcome.file: outcome for outcome in result.exceptions}
    assert named
    for row, outcome in named.items():
        assert outcome.outcome is Outcome.ABSENT
        assert "no room" in outcome.reason
        path = built.dmi.path(int(built.dmi.name_start[row]))
        assert path.startswith(b"large")
        assert path not in tree.paths
    for path in (b"small", b"grown", *(f"large{n}".encode() for n in range(3) if built.row(f"large{n}".encode()) not in named)):
        assert tree.node(path) == built.target.node(path)
    assert tree.node(b"deleted") == built.base.node(b"deleted")


def test_H6_deletions_make_room_before_content_is_stored(scene: Scene) -> None:
    room = 40 << 20 if scene.kind is FilesystemKind.EXT4 else 150 << 20

    def fill(root: Path) -> None:
        (root / "old").write_bytes(os.urandom(room))

    def change(root: Path) -> None:
        (root / "old").unlink()
        (root / "new").write_bytes(os.urandom(room))

    equal_to_target(scene, fill, change)


@pytest.mark.parametrize("deletions", list(Deletions))
def test_G13_G23_data_that_is_not_what_its_digest_says_is_damaged_and_the_base_version_stays(scene: Scene, deletions: Deletions) -> None:
    def fill(root: Path) -> None:
        for name in ("changed", "replaced", "good", "deleted"):
            (root / name).write_bytes(os.urandom(9000))

    def change(root: Path) -> None:
        (root / "changed").write_bytes(os.urandom(9000))
        (root / "new").write_bytes(os.urandom(9000))
        (root / ".tmp").write_bytes(os.urandom(9000))
        (root / ".tmp").rename(root / "replaced")
        (root / "good").write_bytes(os.urandom(9000))
        (root / "deleted").unlink()

    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    arrival = scene.land(built)
    spoilt = (b"changed", b"new", b"replaced")
    landing = Workspace(scene.volume, built.dmi.head.transfer, WorkspaceKind.LANDING)
    with scene.substrate.writing(landing) as device, open(device, "r+b") as file:
        for path in spoilt:
            file.seek(built.dmi.extents(built.row(path))[0][1] * BLOCK + 7)
            file.write(b"spoilt")
        file.flush()
        os.fsync(file.fileno())
    job = scene.job(built, arrival, deletions=deletions)
    assert job.instruction.complete
    result, tree = scene.salvaged(job)
    damaged = {outcome.file for outcome in result.exceptions if outcome.outcome is Outcome.DAMAGED}
    assert damaged == {built.row(path) for path in spoilt}
    assert tree.node(b"changed") == built.base.node(b"changed")
    assert tree.node(b"replaced") == built.base.node(b"replaced")
    assert tree.node(b"good") == built.target.node(b"good")
    assert b"new" not in tree.paths
    # It is not complete any more, so the policy says what becomes of deleted files.
    assert (b"deleted" in tree.paths) is (deletions is Deletions.HOLD)
    assert any(outcome.outcome is Outcome.HELD for outcome in result.exceptions)


def test_H14_H16_files_open_and_unlinked_at_the_freeze(scene: Scene) -> None:
    """Orphans of the base vanish when its clone is mounted, so what was an orphan and has a name again is new there."""
    opened: list[int] = []

    def unlinked(path: Path) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.write(fd, os.urandom(9000))
        path.unlink()
        return fd

    def base(root: Path) -> list[int]:
        (root / "unlinked later").write_bytes(os.urandom(9000))
        (root / "being written").write_bytes(os.urandom(9000))
        opened.append(os.open(root, os.O_TMPFILE | os.O_RDWR, 0o600))
        os.write(opened[0], os.urandom(9000))
        return [opened[0], unlinked(root / "orphan of both"), os.open(root / "being written", os.O_WRONLY | os.O_APPEND)]

    def target(root: Path) -> list[int]:
        root_fd = os.open(root, os.O_RDONLY)
        os.link(f"/proc/self/fd/{opened[0]}", "linked at last", dst_dir_fd=root_fd, follow_symlinks=True)
        os.close(root_fd)
        later = os.open(root / "unlinked later", os.O_RDWR)
        (root / "unlinked later").unlink()
        with open(root / "being written", "ab") as file:
            file.write(os.urandom(5000))
        return [later, unlinked(root / "orphan of the target")]

    scene.live(base, target)
    built = scene.build_as_the_agent_does()
    result, tree = scene.salvaged(scene.job(built, scene.land(built)))
    assert result.exceptions == ()
    assert tree.facts() == built.target.facts()
    assert built.pieces(b"linked at last") == []  # its data was in the base before it had a name
    _, tree = scene.salvaged(scene.job(built, scene.land(built, built.pieces(b"being written"))))
    wanted = built.target.facts() | {path: built.base.node(path) for path in (b"being written", b"unlinked later")}
    assert tree.facts() == wanted


def test_H12_a_name_open_but_unlinked_in_the_target_is_a_deletion(scene: Scene) -> None:
    def fill(root: Path) -> None:
        (root / "open").write_bytes(os.urandom(9000))

    def change(root: Path) -> None:
        (root / "torn").write_bytes(os.urandom(9000))
        (root / "open").unlink()

    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    row = built.row(b"open")
    changed = built.dmi.change.copy()
    changed[row] = int(Change.NAMELESS | Change.NAMES)
    object.__setattr__(built.dmi, "change", changed)
    job = scene.job(built, scene.land(built, built.pieces(b"torn")), files=[*built.whole(scene.land(built, built.pieces(b"torn"))), row])
    _, tree = scene.salvaged(job)
    assert tree.node(b"open") == built.base.node(b"open")


def test_an_atomic_set_loses_all_its_members_with_one_that_has_no_room(scene: Scene) -> None:
    room = 18 << 20 if scene.kind is FilesystemKind.EXT4 else 100 << 20

    def fill(root: Path) -> None:
        (root / "deleted").write_bytes(os.urandom(room))
        (root / "log").write_bytes(b"log of the base")

    def change(root: Path) -> None:
        (root / "deleted").unlink()
        for number in range(3):
            (root / f"large{number}").write_bytes(os.urandom(room * 3 // 4 + number))
        (root / "log").write_bytes(os.urandom(9000))
        (root / "alone").write_bytes(os.urandom(9000))
        (root / "torn").write_bytes(os.urandom(9000))

    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    job = scene.job(built, scene.land(built, built.pieces(b"torn")))
    members = tuple(built.row(name) for name in (b"log", b"large0", b"large1", b"large2"))
    result, tree = scene.salvaged(replace(job, instruction=replace(job.instruction, atomic_sets=(members,))))
    named = {outcome.file: outcome for outcome in result.exceptions}
    assert set(members) <= set(named)
    assert any("no room" in outcome.reason for outcome in named.values())
    assert "atomic set" in named[built.row(b"log")].reason
    assert tree.node(b"log") == built.base.node(b"log")
    assert not any(path.startswith(b"large") for path in tree.paths)
    assert tree.node(b"alone") == built.target.node(b"alone")
