"""The reflink substrate on XFS and on btrfs: the conformance suite, and what is particular to image files."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from agent.contract.errors import (
    BaseMismatch,
    DeviceBusy,
    DeviceFailed,
    FreezeFailed,
    LayoutUnsupported,
    NoSpace,
    NoSuchGeneration,
    NotOurs,
    VersionUnknown,
)
from agent.contract.identity import FilesystemKind, GenerationKind, empty_generation
from agent.contract.messages import Role
from agent.system import block
from agent.volume import filesystem, loop, reflink
from agent.volume.freeze import thaw_if_frozen
from agent.volume.reflink import ReflinkSubstrate
from agent.volume.snapshot import catch_up
from agent.volume.substrate import Substrate, VolumeRecord, Workspace, WorkspaceKind
from tests.storage.conformance import (
    Bench,
    Call,
    SubstrateConformance,
    block_of,
    blocks_of,
    content,
    differing,
    facts_after,
    in_child,
    read,
    record,
    taken,
    write,
)
from tests.storage.pools import pool_on, unmounted

SIZES = {FilesystemKind.EXT4: 64 << 20, FilesystemKind.XFS: 320 << 20}


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def mounted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pool_on(request.param, tmp_path_factory.mktemp("pool")) as mount_point:
        yield mount_point


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come soon: nobody else is waited for longer than a passing look takes."""
    monkeypatch.setattr(loop, "_GRACE_S", 0.3)


@pytest.fixture
def pool(mounted: Path) -> Path:
    folder = mounted / uuid4().hex
    ReflinkSubstrate.initialise(folder)
    return folder


@pytest.fixture
def bench(pool: Path) -> Bench:
    opener = f"from pathlib import *; from agent.volume.reflink import *; substrate = ReflinkSubstrate(Path({str(pool)!r}))"
    return Bench(lambda: ReflinkSubstrate(pool), opener)


@pytest.fixture
def substrate(pool: Path) -> ReflinkSubstrate:
    return ReflinkSubstrate(pool)


def unaccounted(substrate: ReflinkSubstrate) -> list[str]:
    """Temporary files, images without a record and records without an image."""
    found = [path for path in substrate.pool.path.rglob(".*") if path.name.startswith(".new-")]
    for folder in substrate.pool.volumes.glob("*/generations"):
        stems = [{path.stem for path in folder.glob(f"*.{suffix}")} for suffix in ("img", "json")]
        found += [folder / stem for stem in stems[0] ^ stems[1]]
    return [str(path) for path in found]


class TestReflink(SubstrateConformance):
    def leftovers(self, substrate: Substrate) -> list[str]:
        assert isinstance(substrate, ReflinkSubstrate)
        return unaccounted(substrate)


# --- the pool ---


def test_a_pool_carries_its_marker(mounted: Path, tmp_path: Path) -> None:
    folder = mounted / uuid4().hex
    folder.mkdir()
    with pytest.raises(NotOurs):
        ReflinkSubstrate(folder)
    (folder / "landfall-pool").symlink_to(folder)
    with pytest.raises(NotOurs):
        ReflinkSubstrate(folder)
    (folder / "landfall-pool").unlink()
    (folder / "volumes").mkdir()
    (folder / "volumes" / "somebody's").touch()
    with pytest.raises(NotOurs):
        ReflinkSubstrate.initialise(folder)
    (folder / "volumes" / "somebody's").unlink()
    first = ReflinkSubstrate.initialise(folder)
    assert ReflinkSubstrate.initialise(folder).pool.filesystem == first.pool.filesystem
    with pytest.raises(LayoutUnsupported):
        ReflinkSubstrate.initialise(tmp_path / "on-ext4")


def test_a_pool_is_known_by_its_filesystem(substrate: ReflinkSubstrate) -> None:
    g0 = empty_generation(uuid4())
    with substrate.differential(g0) as device:
        tool = subprocess.run(["blkid", "-p", "-o", "value", "-s", "UUID", device], capture_output=True, text=True, check=True)
    assert substrate.differential_identity(g0) == tool.stdout.strip()


def test_only_root_sees_images(substrate: ReflinkSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    taken(substrate, volume.id, {0: block_of("a")})
    paths = list(substrate.pool.volumes.rglob("*"))
    assert [path for path in paths if path.stat().st_mode & 0o077] == []
    assert (substrate.pool.volumes.stat().st_mode & 0o077) == 0


def test_an_image_that_is_a_link_is_refused(substrate: ReflinkSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    image = substrate.pool.volumes / str(volume.id) / "operational.img"
    image.rename(image.with_name("elsewhere.img"))
    image.symlink_to(image.with_name("elsewhere.img"))
    with pytest.raises(NotOurs), substrate.operational(volume.id):
        pass
    with pytest.raises(NotOurs):
        substrate.take(volume.id, None, facts_after(substrate, volume.id))
    assert len(substrate.generations(volume.id)) == 1


def test_records_are_read_strictly(substrate: ReflinkSubstrate) -> None:
    """One that cannot be read counts for nothing, hides no other, is told with its reason and swept by nobody."""
    volume, other = record(), record()
    substrate.create(volume)
    substrate.create(other)
    path = substrate.pool.volumes / str(volume.id) / "volume.json"
    good = json.loads(path.read_text())
    for wrong in (b"", b"[]", b"{", json.dumps({**good, "size_bytes": "1"}).encode(), json.dumps({**good, "more": 1}).encode()):
        path.write_bytes(wrong)
        assert substrate.volumes() == (other,)
        assert [(found.volume, found.where) for found in substrate.unreadable()] == [(volume.id, str(path))]
    path.write_bytes(json.dumps({**good, "format": 2}).encode())
    (told,) = substrate.unreadable()
    assert VersionUnknown.code in told.reason
    substrate.recover()
    path.write_bytes(json.dumps({**good, "id": str(uuid4())}).encode())
    with pytest.raises(NotOurs):
        substrate.generations(volume.id)
    path.write_bytes(json.dumps(good).encode())
    assert set(substrate.volumes()) == {volume, other}
    assert substrate.unreadable() == ()


def test_B12_a_generation_that_cannot_be_read_hides_no_other_and_is_swept_by_nobody(substrate: ReflinkSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    first, second = (taken(substrate, volume.id, {1: block_of(text)}) for text in ("first", "second"))
    path = substrate.pool.volumes / str(volume.id) / "generations" / f"{first.id.name}.json"
    good = path.read_bytes()
    path.write_bytes(good[:-9])
    substrate.recover()
    assert [facts.id for facts in substrate.generations(volume.id)][1:] == [second.id]
    assert [found.where for found in substrate.unreadable()] == [str(path)]
    with pytest.raises(NoSuchGeneration):
        content(substrate, first.id)
    path.write_bytes(good)
    assert read(path.with_suffix(".img"), 1, 1) == block_of("first")
    assert [facts.id for facts in substrate.generations(volume.id)][1:] == [first.id, second.id]


def test_E20_an_image_that_was_cut_or_grown_is_not_used(substrate: ReflinkSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    base = taken(substrate, volume.id, {0: block_of("a")})
    folder = substrate.pool.volumes / str(volume.id)
    for size in (volume.size_bytes - 4096, volume.size_bytes + 4096):
        os.truncate(folder / "operational.img", size)
        os.truncate(folder / "generations" / f"{base.id.name}.img", size)
        with pytest.raises(BaseMismatch), substrate.operational(volume.id):
            pass
        with pytest.raises(BaseMismatch):
            substrate.take(volume.id, None, facts_after(substrate, volume.id))
        with pytest.raises(BaseMismatch), substrate.reading(base.id):
            pass
        with pytest.raises(BaseMismatch):
            substrate.changed(empty_generation(volume.id), base.id)
        with pytest.raises(BaseMismatch):
            substrate.begin(Workspace(volume.id, uuid4(), WorkspaceKind.LANDING), base.id)
    assert len(substrate.generations(volume.id)) == 2
    assert unaccounted(substrate) == []


def test_E5_a_full_pool_leaves_everything_as_it_was(mounted: Path, tmp_path: Path) -> None:
    kind = mounted.name.removeprefix("pool-")
    with pool_on(kind, tmp_path, 320 << 20) as small:
        substrate = ReflinkSubstrate.initialise(small / "pool")
        volume = record()
        substrate.create(volume)
        base = taken(substrate, volume.id, {1: block_of("a")})
        workspace = Workspace(volume.id, uuid4(), WorkspaceKind.LANDING)
        substrate.begin(workspace, base.id)
        with substrate.writing(workspace) as device:
            write(device, 2, block_of("kept"))
        fill(small / "filler")
        for refused in (
            lambda: substrate.create(record()),
            lambda: substrate.begin(Workspace(volume.id, uuid4(), WorkspaceKind.SALVAGE), base.id),
            lambda: substrate.begin(workspace, base.id),
            lambda: substrate.take(volume.id, None, facts_after(substrate, volume.id)),
        ):
            with pytest.raises(NoSpace):
                refused()
        assert substrate.volumes() == (volume,)
        assert substrate.generations(volume.id)[1:] == (base,)
        with substrate.writing(workspace) as device:
            assert read(device, 2, 1) == block_of("kept")
        assert unaccounted(substrate) == []
        (small / "filler").unlink()
        substrate.commit(workspace, facts_after(substrate, volume.id))


def fill(path: Path) -> None:
    """Takes all the room there is."""
    with open(path, "wb", buffering=0) as file:
        size = 64 << 20
        while size >= 4096:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
            except OSError:  # ENOSPC
                size //= 2
        os.fsync(file.fileno())


def test_E23_a_read_only_pool_refuses_by_name(substrate: ReflinkSubstrate, mounted: Path) -> None:
    volume = record()
    substrate.create(volume)
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    try:
        with pytest.raises(DeviceFailed):
            substrate.create(record())
        with pytest.raises(DeviceFailed):
            substrate.begin(Workspace(volume.id, uuid4(), WorkspaceKind.LANDING), empty_generation(volume.id))
        assert content(substrate, empty_generation(volume.id)) == bytes(volume.size_bytes)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", mounted], check=True)


# --- a served volume ---


@contextmanager
def served(substrate: ReflinkSubstrate, kind: FilesystemKind, mount_point: Path) -> Iterator[VolumeRecord]:
    """A primary's volume with a filesystem, mounted."""
    volume = record(filesystem=kind, size_bytes=SIZES[kind])
    substrate.create(volume)
    mount_point.mkdir()
    with substrate.operational(volume.id) as device:
        filesystem.make(device, kind)
        filesystem.mount(device, mount_point, kind, read_only=False)
    try:
        yield volume
    finally:
        if filesystem.is_mounted(mount_point):
            thaw_if_frozen(mount_point)
            filesystem.unmount(mount_point)


def test_a_snapshot_under_load_is_what_the_image_was_when_frozen(substrate: ReflinkSubstrate, tmp_path: Path) -> None:
    mount_point = tmp_path / "served"
    with served(substrate, FilesystemKind.EXT4, mount_point) as volume:
        (mount_point / "file").write_bytes(bytes(16 << 20))
        operational = substrate.pool.volumes / str(volume.id) / "operational.img"
        stop = threading.Event()

        def rewrite() -> None:
            file_fd = os.open(mount_point / "file", os.O_RDWR)
            n = 0
            while not stop.is_set():
                os.pwrite(file_fd, n.to_bytes(8, "little") * 512, n * 37 % 4096 * 4096)
                if n % 50 == 0:
                    os.fdatasync(file_fd)
                n += 1
            os.close(file_fd)

        writer = threading.Thread(target=rewrite)
        writer.start()
        try:
            for _ in range(4):
                facts = facts_after(substrate, volume.id)
                seen: list[bytes] = []

                def look_and_catch_up(source: int, destination: int, cloned: block.ExtentMap, seen: list[bytes] = seen) -> int:
                    ranges = catch_up(source, destination, cloned)
                    seen.append(operational.read_bytes())
                    return ranges

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(reflink, "catch_up", look_and_catch_up)
                    substrate.take(volume.id, mount_point, facts)
                assert content(substrate, facts.id) == seen[0]
        finally:
            stop.set()
            writer.join()


@pytest.mark.parametrize("kind", [FilesystemKind.EXT4, FilesystemKind.XFS], ids=str)
def test_generations_of_a_served_volume_are_consistent_and_exact(substrate: ReflinkSubstrate, tmp_path: Path, kind: FilesystemKind) -> None:
    with served(substrate, kind, tmp_path / "served") as volume:
        for n in range(200):
            (tmp_path / "served" / f"{n}").write_bytes(os.urandom(3000 + 100 * n))
        one = facts_after(substrate, volume.id)
        assert substrate.take(volume.id, tmp_path / "served", one) > 0
        with pytest.raises(DeviceBusy):
            substrate.take(volume.id, None, facts_after(substrate, volume.id))
        for n in range(0, 200, 3):
            (tmp_path / "served" / f"{n}").write_bytes(os.urandom(5000))
            (tmp_path / "served" / f"{n + 1}").unlink(missing_ok=True)
        (tmp_path / "served" / "0").write_bytes(b"in the generation, synchronised or not")
        two = facts_after(substrate, volume.id)
        substrate.take(volume.id, tmp_path / "served", two)
        (tmp_path / "served" / "0").write_bytes(b"after the generation")
        want = (tmp_path / "served" / "3").read_bytes()
        (tmp_path / "beside").mkdir()
        with substrate.reading(two.id) as device:
            filesystem.mount(device, tmp_path / "beside", kind, read_only=True)
        try:
            assert (tmp_path / "beside" / "0").read_bytes() == b"in the generation, synchronised or not"
            assert (tmp_path / "beside" / "3").read_bytes() == want
            assert not (tmp_path / "beside" / "1").exists()
            with pytest.raises(DeviceBusy):
                substrate.drop(two.id)
        finally:
            filesystem.unmount(tmp_path / "beside")
        before, after = content(substrate, one.id), content(substrate, two.id)
        changed = blocks_of(substrate.changed(one.id, two.id))
        assert differing(before, after) <= changed
        assert len(changed) <= len(differing(before, after)) + 64, "written without change: the log, superblocks"
        if kind is FilesystemKind.XFS:
            return
        image = substrate.pool.volumes / str(volume.id) / "generations" / f"{two.id.name}.img"
        subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True)


def test_E25_trimmed_room_is_a_hole_of_the_next_generation(substrate: ReflinkSubstrate, tmp_path: Path) -> None:
    with served(substrate, FilesystemKind.EXT4, tmp_path / "served") as volume:
        (tmp_path / "served" / "big").write_bytes(os.urandom(8 << 20))
        one = facts_after(substrate, volume.id)
        substrate.take(volume.id, tmp_path / "served", one)
        (tmp_path / "served" / "big").unlink()
        subprocess.run(["sync", "-f", tmp_path / "served"], check=True)
        subprocess.run(["fstrim", tmp_path / "served"], check=True)
        two = facts_after(substrate, volume.id)
        substrate.take(volume.id, tmp_path / "served", two)
        runs = substrate.changed(one.id, two.id)
        holes = int(runs.blocks[runs.target_hole].sum())
        assert holes >= (8 << 20) // 4096
        after = content(substrate, two.id)
        for first, blocks, hole in zip(runs.first.tolist(), runs.blocks.tolist(), runs.target_hole.tolist(), strict=True):
            if hole:
                assert not any(after[first * 4096 :][: blocks * 4096])


def test_E18_another_filesystem_is_never_frozen(substrate: ReflinkSubstrate, tmp_path: Path) -> None:
    with served(substrate, FilesystemKind.EXT4, tmp_path / "one") as one, served(substrate, FilesystemKind.EXT4, tmp_path / "other"):
        for elsewhere in (tmp_path / "other", tmp_path, Path("/proc")):
            with pytest.raises(NotOurs):
                substrate.take(one.id, elsewhere, facts_after(substrate, one.id))
        assert len(substrate.generations(one.id)) == 1


@pytest.mark.parametrize(
    "point",
    ["before_freeze", "frozen", "after_thaw", "before_record", "before_rename"],
)
def test_A11_a_primary_that_dies_taking_a_generation(bench: Bench, tmp_path: Path, point: str) -> None:
    substrate = bench.open()
    assert isinstance(substrate, ReflinkSubstrate)
    mount_point = tmp_path / "served"
    with served(substrate, FilesystemKind.EXT4, mount_point) as volume:
        (mount_point / "file").write_bytes(b"before")
        call = Call("take", (volume.id, mount_point, facts_after(substrate, volume.id)))
        assert in_child(bench, call, f"substrate.take.{point}=kill", tmp_path / "trace") == -9
        wrote = threading.Event()

        def write_on() -> None:
            (mount_point / "file").write_bytes(b"after")
            wrote.set()

        threading.Thread(target=write_on, daemon=True).start()
        assert wrote.wait(1.0), "the filesystem stayed frozen"
        substrate.recover()
        assert [facts.kind for facts in substrate.generations(volume.id)] == [GenerationKind.EMPTY]
        assert unaccounted(substrate) == []
        assert in_child(bench, call) == 0
        assert len(substrate.generations(volume.id)) == 2


def test_recovery_thaws_what_guard_and_agent_left_frozen(substrate: ReflinkSubstrate, tmp_path: Path) -> None:
    with served(substrate, FilesystemKind.EXT4, tmp_path / "served") as volume:
        mount_fd = os.open(tmp_path / "served", os.O_RDONLY)
        block.freeze(mount_fd)
        os.close(mount_fd)
        substrate.recover()
        assert not thaw_if_frozen(tmp_path / "served")
        assert substrate.volumes() == (volume,)


def test_a_frozen_volume_that_is_thawed_too_early_makes_no_generation(
    substrate: ReflinkSubstrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(substrate, FilesystemKind.EXT4, tmp_path / "served") as volume:

        def thawed(source: int, destination: int, cloned: block.ExtentMap) -> int:
            subprocess.run(["fsfreeze", "-u", tmp_path / "served"], check=True)
            return catch_up(source, destination, cloned)

        monkeypatch.setattr(reflink, "catch_up", thawed)
        with pytest.raises(FreezeFailed):
            substrate.take(volume.id, tmp_path / "served", facts_after(substrate, volume.id))
        assert len(substrate.generations(volume.id)) == 1
        assert unaccounted(substrate) == []


def test_addresses_of_pre_images_are_the_pool_device_s_own(substrate: ReflinkSubstrate, mounted: Path) -> None:
    """On btrfs FIEMAP's addresses are not the device's: with several chunks they differ, and the run must name the device's."""
    volume = record(size_bytes=64 << 20)
    substrate.create(volume)
    before = {n * 2: os.urandom(4096) for n in range(6000)}
    with substrate.operational(volume.id) as device, open(device, "r+b", buffering=0) as file:
        for n, old in before.items():
            os.pwrite(file.fileno(), old, n * 4096)
        os.fsync(file.fileno())
    base = facts_after(substrate, volume.id)
    substrate.take(volume.id, None, base)
    target = taken(substrate, volume.id, {n: block_of(f"{n}") for n in list(before)[::7]})
    runs = substrate.changed(base.id, target.id)
    image_fd = os.open(substrate.pool.volumes / str(volume.id) / "generations" / f"{base.id.name}.img", os.O_RDONLY)
    mapped = block.extent_map(image_fd)
    os.close(image_fd)
    reported = {
        (logical + n) // 4096: (physical + n) // 4096
        for logical, physical, length in zip(mapped.logical.tolist(), mapped.physical.tolist(), mapped.length.tolist(), strict=True)
        for n in range(0, length, 4096)
    }
    moved = 0
    with substrate.differential(base.id) as device, open(device, "rb", buffering=0) as pool:
        for first, blocks, at in zip(runs.first.tolist(), runs.blocks.tolist(), runs.diff_block.tolist(), strict=True):
            for n in range(blocks):
                assert os.pread(pool.fileno(), 4096, (at + n) * 4096) == before[first + n]
                moved += reported[first + n] != at + n
    assert moved > 0 if mounted.name == "pool-btrfs" else moved == 0


# --- power ---


def test_what_was_committed_survives_a_power_cut_of_the_pool(tmp_path: Path) -> None:
    image, mount_point = tmp_path / "pool.img", tmp_path / "mount"
    mount_point.mkdir()
    with open(image, "wb") as file:
        file.truncate(1 << 30)
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount_point], check=True)
    try:
        substrate = ReflinkSubstrate.initialise(mount_point / "pool")
        volume = record(Role.SECONDARY)
        substrate.create(volume)
        landing, open_one = (Workspace(volume.id, UUID(int=n), WorkspaceKind.LANDING) for n in (1, 2))
        for workspace in (landing, open_one):
            substrate.begin(workspace, empty_generation(volume.id))
            with substrate.writing(workspace) as device:
                write(device, 9, block_of("durable"))
        facts = facts_after(substrate, volume.id, GenerationKind.COMMITTED)
        substrate.commit(landing, facts)
        root_fd = os.open(mount_point, os.O_RDONLY)
        block.go_down(root_fd)
        os.close(root_fd)
        unmounted(mount_point)
        subprocess.run(["mount", "-o", "loop", image, mount_point], check=True)
        substrate = ReflinkSubstrate(mount_point / "pool")
        substrate.recover()
        assert substrate.generations(volume.id)[-1] == facts
        assert not substrate.exists(landing)
        assert content(substrate, facts.id)[9 * 4096 :][:4096] == block_of("durable")
        with substrate.writing(open_one) as device:
            assert read(device, 9, 1) == block_of("durable")
    finally:
        unmounted(mount_point)


def test_A10_a_drop_that_was_cut_is_ended_and_the_base_stays_valid(bench: Bench) -> None:
    substrate = bench.open()
    volume = record()
    substrate.create(volume)
    one, two = (taken(substrate, volume.id, {n: block_of(f"{n}")}) for n in (1, 2))
    assert in_child(bench, Call("drop", (one.id,)), "substrate.drop.half=kill") == -9
    substrate.recover()
    with pytest.raises(NoSuchGeneration):
        content(substrate, one.id)
    three = taken(substrate, volume.id, {3: block_of("3")})
    assert blocks_of(substrate.changed(two.id, three.id)) == {3}
