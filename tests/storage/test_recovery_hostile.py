"""DMIs that are well formed and lie: FAULTS.md, G1 to G7. They are refused, and nothing outside the workspace is touched."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.contract.dmi import Dmi, Side
from agent.contract.errors import DmiMalformed, LandfallError, LayoutUnsupported, SalvageFailed
from agent.contract.identity import FilesystemKind
from agent.recovery.salvage import salvage
from tests.storage import recovery_fixtures
from tests.storage.salvage_scene import Built, Scene

pool = recovery_fixtures.pool
make_scene = recovery_fixtures.make_scene
scene = recovery_fixtures.scene


def fill(root: Path) -> None:
    (root / "d").mkdir()
    (root / "e").mkdir()
    (root / "d/x").write_bytes(os.urandom(5000))
    (root / "e/y").write_bytes(os.urandom(5000))
    (root / "e/bystander").write_bytes(b"not in the differential")
    (root / "link").symlink_to("/etc")


def change(root: Path) -> None:
    (root / "d/x").rename(root / "d/x2")
    (root / "e/y").write_bytes(os.urandom(6000))
    (root / "e/new").write_bytes(os.urandom(6000))
    (root / "d/new folder").mkdir()
    (root / "e").rename(root / "e2")
    (root / "d/link").symlink_to("../../../../../..")


@pytest.fixture
def built(scene: Scene) -> Built:
    scene.fill(fill)
    scene.change(change)
    return scene.build()


class Names:
    """The names of a DMI, to be falsified."""

    def __init__(self, dmi: Dmi) -> None:
        self.dmi = dmi
        names = [(int(dmi.name_side[at]), int(dmi.name_parent[at]), dmi.path(at)) for at in range(len(dmi.name_side))]
        self.rows = [names[int(dmi.name_start[row]) : int(dmi.name_start[row + 1])] for row in range(dmi.file_total)]

    def set(self, row: int, side: Side, names: Iterable[tuple[int, bytes]]) -> None:
        kept = [name for name in self.rows[row] if name[0] != side]
        self.rows[row] = sorted([*kept, *((int(side), parent, path) for parent, path in names)], key=lambda name: name[0])

    def replaced(self, **columns: Any) -> Dmi:
        flat = [name for names in self.rows for name in names]

        def starts(lengths: Iterable[int]) -> Any:
            return np.concatenate([[0], np.cumsum(list(lengths))]).astype(np.uint64)

        values = {field: getattr(self.dmi, field) for field in self.dmi.__slots__}
        values |= {
            "name_start": starts(map(len, self.rows)),
            "name_side": np.array([name[0] for name in flat], np.uint8),
            "name_parent": np.array([name[1] for name in flat], np.uint64),
            "name_path_start": starts(len(name[2]) for name in flat),
            "paths": np.frombuffer(b"".join(name[2] for name in flat), np.uint8),
            **columns,
        }
        return Dmi.decode(b"".join(Dmi(**values).encode()))


def inode(built: Built, path: bytes) -> int:
    return (built.target.paths.get(path) or built.base.paths[path])[0]


def refused(scene: Scene, built: Built, dmi: Dmi, *kinds: type[LandfallError]) -> LandfallError:
    """Runs the lie; returns the refusal after proving that base and generations are what they were."""
    arrival = scene.land(built)
    held = scene.substrate.generations(scene.volume)
    lie = Built(dmi, built.base, built.target, built.image, built.rows)
    outside = sorted(os.listdir(scene.tmp))
    job = scene.job(lie, arrival)
    with pytest.raises(kinds or (DmiMalformed, SalvageFailed)) as caught:
        salvage(job)
    assert scene.substrate.generations(scene.volume) == held
    assert not scene.substrate.exists(job.workspace)
    assert list(job.mount_folder.iterdir()) == [] if job.mount_folder.exists() else True
    assert sorted(set(os.listdir(scene.tmp)) - {"mounts"}) == [name for name in outside if name != "mounts"]
    assert scene.walked(scene.base).facts() == built.base.facts()
    return caught.value


LIES: dict[str, Callable[[Names, Built], Any]] = {}


def lie(act: Callable[[Names, Built], Any]) -> Callable[[Names, Built], Any]:
    LIES[act.__name__] = act
    return act


@lie
def two_files_of_one_name(names: Names, built: Built) -> None:
    names.set(built.row(b"e2/new"), Side.TARGET, [(inode(built, b"e2"), b"e2/y")])


@lie
def a_name_taken_by_a_bystander(names: Names, built: Built) -> None:
    names.set(built.row(b"e2/new"), Side.TARGET, [(inode(built, b"e2"), b"e2/bystander")])


@lie
def a_folder_moved_onto_a_bystander(names: Names, built: Built) -> None:
    names.set(built.row(b"d/new folder"), Side.TARGET, [(inode(built, b"e2"), b"e2/bystander")])


@lie
def a_folder_in_itself(names: Names, built: Built) -> None:
    names.set(built.row(b"e2"), Side.TARGET, [(inode(built, b"e2"), b"e2/e2")])


@lie
def folders_in_each_other(names: Names, built: Built) -> None:
    names.set(built.row(b"e2"), Side.TARGET, [(inode(built, b"d"), b"d/e2")])
    names.set(built.row(b"d"), Side.TARGET, [(inode(built, b"e2"), b"e2/d")])


@lie
def a_file_as_parent(names: Names, built: Built) -> None:
    names.set(built.row(b"e2/new"), Side.TARGET, [(inode(built, b"d/x2"), b"d/x2/new")])


@lie
def G4_a_symlink_of_the_base_as_parent(names: Names, built: Built) -> None:
    names.set(built.row(b"e2/new"), Side.TARGET, [(inode(built, b"link"), b"link/passwd")])


@lie
def G4_a_new_symlink_as_parent(names: Names, built: Built) -> None:
    names.set(built.row(b"e2/new"), Side.TARGET, [(inode(built, b"d/link"), b"d/link/passwd")])


@lie
def a_parent_that_is_nowhere(names: Names, built: Built) -> None:
    names.set(built.row(b"e2/new"), Side.TARGET, [(999_999, b"nowhere/new")])


@lie
def a_parent_at_another_path(names: Names, built: Built) -> None:
    names.set(built.row(b"e2/new"), Side.TARGET, [(inode(built, b"d"), b"e2/new")])


@lie
def a_base_name_that_is_somebody_elses(names: Names, built: Built) -> None:
    names.set(built.row(b"d/x2"), Side.BASE, [(inode(built, b"e2"), b"e/bystander")])


@lie
def the_root_renamed(names: Names, built: Built) -> None:
    names.set(built.row(b""), Side.TARGET, [(inode(built, b"d"), b"d/root")])


@lie
def a_file_named_like_the_root(names: Names, built: Built) -> None:
    names.set(built.row(b"e2/new"), Side.TARGET, [(inode(built, b""), b"")])


@lie
def a_folder_with_two_names(names: Names, built: Built) -> None:
    names.set(built.row(b"e2"), Side.TARGET, [(inode(built, b""), b"e2"), (inode(built, b""), b"e3")])


@lie
def a_folder_without_a_name_that_holds_files(names: Names, built: Built) -> None:
    names.set(built.row(b"e2"), Side.TARGET, [])


@pytest.mark.parametrize("name", LIES)
def test_G1_to_G6_names_that_lie(scene: Scene, built: Built, name: str) -> None:
    names = Names(built.dmi)
    LIES[name](names, built)
    refused(scene, built, names.replaced())


@pytest.mark.parametrize("path", [b"../x", b"/etc/shadow", b"d/../../x", b"d//x", b"d/./x", b"d/x/", b"a\0b", b"x" * 256])
def test_G1_G2_G3_paths_that_leave_are_refused_before_anything_is_done(scene: Scene, built: Built, path: bytes) -> None:
    names = Names(built.dmi)
    names.set(built.row(b"e2/new"), Side.TARGET, [(inode(built, b"d"), path)])
    with pytest.raises(DmiMalformed):
        names.replaced()


def test_an_inode_that_the_base_does_not_have(scene: Scene, built: Built) -> None:
    for column in ("inode", "inode_generation"):
        values = getattr(built.dmi, column).copy()
        values[built.row(b"d/x2")] += 777
        assert "no inode" in str(refused(scene, built, Names(built.dmi).replaced(**{column: values}), SalvageFailed))


def test_an_inode_that_is_of_another_kind(scene: Scene, built: Built) -> None:
    kind = built.dmi.kind.copy()
    kind[built.row(b"d/x2")] = 1
    refused(scene, built, Names(built.dmi).replaced(kind=kind), SalvageFailed)


def test_names_of_the_stage_and_of_held_files_are_names_like_others(scene: Scene) -> None:
    def change(root: Path) -> None:
        (root / ".landfall-stage-0123456789abcdef").write_bytes(b"1")
        (root / ".landfall-held").write_bytes(b"2")
        (root / "a").unlink()
        (root / "a").mkdir()
        (root / "torn").write_bytes(os.urandom(5000))

    scene.fill(lambda root: os.close(os.open(root / "a", os.O_CREAT)))
    scene.change(change)
    built = scene.build()
    _, tree = scene.salvaged(scene.job(built, scene.land(built, built.pieces(b"torn"))))
    assert tree.node(b".landfall-held").content == b"2"
    assert tree.node(b".landfall-stage-0123456789abcdef").content == b"1"
    assert tree.node(b".landfall-held-2/a").content == b""


def test_G6_a_hard_link_to_a_symlink_is_the_symlink(scene: Scene) -> None:
    def change(root: Path) -> None:
        (root / "d").mkdir()
        (root / "d/deep").symlink_to("/etc/shadow")
        os.link(root / "d/deep", root / "link", follow_symlinks=False)
        os.link(root / "old", root / "old again", follow_symlinks=False)

    before = os.stat("/etc/shadow")
    scene.fill(lambda root: os.symlink("/etc/shadow", root / "old"))
    scene.change(change)
    built = scene.build()
    _, tree = scene.salvaged(scene.job(built, scene.land(built)))
    assert tree.facts() == built.target.facts()
    after = os.stat("/etc/shadow")
    assert (after.st_nlink, after.st_ctime_ns, after.st_mtime_ns) == (before.st_nlink, before.st_ctime_ns, before.st_mtime_ns)


def test_G5_G7_nobody_can_follow_into_the_private_mount(scene: Scene) -> None:
    """The mount is below a folder that only root may enter, so no local user can swap a name or mount over one during a salvage."""
    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    seen: set[tuple[int, str]] = set()
    job = scene.job(built, scene.land(built))

    def look(_: object) -> None:
        if str(job.mount_point) in (mounts := Path("/proc/self/mountinfo").read_text()):
            line = next(line for line in mounts.splitlines() if str(job.mount_point) in line)
            seen.add((job.mount_folder.stat().st_mode & 0o777, line.split(" ")[5]))

    scene.salvaged(scene.job(built, scene.land(built), progress=look))
    assert seen
    for mode, options in seen:
        assert mode == 0o700
        assert {"nosuid", "nodev", "noexec"} <= set(options.split(","))


def test_G5_names_that_change_under_way_lead_nowhere_else(scene: Scene) -> None:
    """Somebody with root's rights swaps a folder for a symlink all the time: salvage ends or fails, outside nothing happens."""
    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    outside = scene.tmp / "outside"
    outside.mkdir()
    job = scene.job(built, scene.land(built))
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            try:
                os.rename(job.mount_point / "d", job.mount_point / "d.away")
                os.symlink(outside, job.mount_point / "d")
            except OSError:
                pass

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(5):
            try:
                salvage(job)
            except LandfallError:
                continue
    finally:
        stop.set()
        thread.join()
    assert list(outside.iterdir()) == []


def test_words_for_mkfs_that_reach_outside_are_refused(make_scene: recovery_fixtures.MakeScene) -> None:
    scene = make_scene(FilesystemKind.EXT4)
    scene.change(fill)
    built = scene.build()
    for words in (("mkfs.ext4", "-d", "/etc"), ("sh", "-c", "true"), ("mkfs.ext4", "-J", "device=/dev/sda"), ()):
        head = built.dmi.head
        fields = {name: getattr(head, name) for name in head.__slots__}
        lying = Names(built.dmi).replaced(head=type(head)(**{**fields, "mkfs_arguments": words}))
        refused(scene, built, lying, LayoutUnsupported)
