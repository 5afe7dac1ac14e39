"""Classic snapshots in particular: the COW device as differential volume, merging a commit, running out of room, crashes and boots."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from agent.contract.errors import DeviceBusy, GenerationInvalid, LayoutUnsupported, NoSpace, NotOurs
from agent.contract.identity import BLOCK_BYTES, GenerationId, GenerationKind, empty_generation
from agent.contract.messages import GenerationFacts, Role
from agent.system.clock import wait_until
from agent.volume import chunks, filesystem, lvm, mapper
from agent.volume import lvm_tags as tags
from agent.volume.lvm_snapshot import LvmSnapshotSubstrate
from agent.volume.lvm_thin import LvmThinSubstrate
from agent.volume.substrate import ChangedRuns, Workspace, WorkspaceKind
from tests.storage.conformance import (
    BLOCKS,
    VOLUME_BYTES,
    Bench,
    Call,
    block_of,
    blocks_of,
    content,
    facts_after,
    in_child,
    read,
    record,
    taken,
    write,
)
from tests.storage.volume_groups import volume_group

pytestmark = pytest.mark.device_mapper

GROUP_BYTES = 256 << 20


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with volume_group(tmp_path_factory.mktemp("disk"), size_bytes=GROUP_BYTES) as name:
        yield name


@pytest.fixture
def substrate(group: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[LvmSnapshotSubstrate]:
    monkeypatch.setattr(mapper, "_GRACE_S", 1.0)
    opened = LvmSnapshotSubstrate(group)
    yield opened
    opened.recover()
    assert wait_until(lambda: not mapper._devices("LANDFALL-"), 30.0)
    for held in opened.volumes():
        opened.remove(held.id)
    assert lvm.volumes(opened.group) == ()


def bench(substrate: LvmSnapshotSubstrate) -> Bench:
    name = substrate.group.name
    return Bench(lambda: LvmSnapshotSubstrate(name), f"from agent.volume.lvm_snapshot import *; substrate = LvmSnapshotSubstrate({name!r})")


def secondary(substrate: LvmSnapshotSubstrate) -> UUID:
    volume = record(Role.SECONDARY)
    substrate.create(volume)
    return volume.id


def landed(
    substrate: LvmSnapshotSubstrate, volume: UUID, changes: dict[int, bytes], kind: WorkspaceKind = WorkspaceKind.LANDING
) -> Workspace:
    """A workspace over the newest generation with some blocks written, sized for them."""
    workspace = Workspace(volume, uuid4(), kind)
    substrate.begin(workspace, substrate.generations(volume)[-1].id, len(changes) * BLOCK_BYTES)
    with substrate.writing(workspace) as device:
        for block, new in changes.items():
            write(device, block, new)
    return workspace


def committed(substrate: LvmSnapshotSubstrate, volume: UUID, changes: dict[int, bytes]) -> GenerationFacts:
    facts = facts_after(substrate, volume, GenerationKind.COMMITTED)
    substrate.commit(landed(substrate, volume, changes), facts)
    return facts


def is_merged(substrate: LvmSnapshotSubstrate, generation: GenerationId) -> bool:
    held = substrate._held()
    return held.generation(generation) == held.origins[generation.volume] and held.origins[generation.volume].read_only


def overflow(substrate: LvmSnapshotSubstrate, volume: UUID) -> None:
    """Writes every block of the operational volume, so that no snapshot that is smaller holds."""
    with substrate.operational(volume) as device:
        _fill(device)


def _fill(device: Path) -> None:
    with open(device, "r+b", buffering=0) as file:
        for at in range(0, VOLUME_BYTES, 1 << 20):
            os.pwrite(file.fileno(), os.urandom(1 << 20), at)
        os.fsync(file.fileno())


# --- whose group it is ---


def test_a_group_without_the_tag_or_with_volumes_of_others_is_not_touched(tmp_path: Path, substrate: LvmSnapshotSubstrate) -> None:
    with volume_group(tmp_path, tag=None, size_bytes=64 << 20) as stranger, pytest.raises(NotOurs):
        LvmSnapshotSubstrate(stranger)
    with volume_group(tmp_path, size_bytes=64 << 20) as thin:
        LvmThinSubstrate.initialise(thin)
        before = lvm.volumes(lvm.group(thin))
        with pytest.raises(NotOurs, match="did not make"):
            LvmSnapshotSubstrate(thin)
        assert lvm.volumes(lvm.group(thin)) == before


# --- the COW device is the differential volume ---


def test_the_base_s_own_cow_device_has_every_pre_image_whatever_came_in_between(substrate: LvmSnapshotSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    first = {block: os.urandom(BLOCK_BYTES) for block in (*range(10, 40), 700, BLOCKS - 1)}
    base = taken(substrate, volume.id, first).id
    taken(substrate, volume.id, {12: block_of("between"), 700: block_of("between"), 900: block_of("new")})
    target = taken(substrate, volume.id, {13: block_of("last"), 12: first[12]}).id
    taken(substrate, volume.id, {5: block_of("after the target")})
    runs = substrate.changed(base, target)
    assert blocks_of(runs) == {13, 700, 900}
    snapshot = substrate._held().generation(base)
    assert substrate.differential_identity(base) == snapshot.uuid
    cow = mapper.by_identity(lvm.dm_uuid(substrate.group, snapshot.uuid, "cow"))
    assert cow is not None
    for device in (cow, None):
        with substrate.differential(base) as given, open(device or given, "rb", buffering=0) as file:
            for block, address in zip(runs.first.tolist(), runs.diff_block.tolist(), strict=True):
                if block in first:
                    assert os.pread(file.fileno(), BLOCK_BYTES, address * BLOCK_BYTES) == first[block]


def test_what_was_not_taken_after_the_base_is_refused_instead_of_missed(substrate: LvmSnapshotSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    base = taken(substrate, volume.id, {1: block_of("a")}).id
    other = committed(substrate, volume.id, {2: block_of("b")}).id
    with pytest.raises(LayoutUnsupported, match="not taken"):
        substrate.changed(base, other)


def test_a_mounted_filesystem_is_frozen_for_the_snapshot(substrate: LvmSnapshotSubstrate, tmp_path: Path) -> None:
    volume = record(size_bytes=32 << 20)
    substrate.create(volume)
    with substrate.operational(volume.id) as device:
        filesystem.make(device, volume.filesystem)
        filesystem.mount(device, tmp_path, volume.filesystem, read_only=False)
    try:
        (tmp_path / "file").write_bytes(b"content")
        facts = facts_after(substrate, volume.id)
        assert substrate.take(volume.id, tmp_path, facts) > 0
        (tmp_path / "file").write_bytes(b"later")
    finally:
        filesystem.unmount(tmp_path)
    with substrate.reading(facts.id) as device:
        filesystem.mount(device, tmp_path, volume.filesystem, read_only=True)
        try:
            assert (tmp_path / "file").read_bytes() == b"content"
        finally:
            filesystem.unmount(tmp_path)


# --- commits are merged ---


def test_generations_of_many_commits_stay_readable_and_none_runs_out_of_room(substrate: LvmSnapshotSubstrate) -> None:
    volume = secondary(substrate)
    expected, image = {}, bytearray(VOLUME_BYTES)
    for number in range(4):
        changes = {block: os.urandom(BLOCK_BYTES) for block in range(number * 900, number * 900 + 1200)}
        for block, new in changes.items():
            image[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = new
        facts = committed(substrate, volume, changes)
        assert is_merged(substrate, facts.id)
        expected[facts.id] = bytes(image)
    for generation, whole in expected.items():
        assert content(substrate, generation) == whole
        substrate.refuse_written(generation)
    oldest, second, *_, newest = expected
    assert len(blocks_of(substrate.changed(oldest, newest))) == 900 * 3 + 300
    substrate.drop(oldest)
    assert content(substrate, second) == expected[second]


def test_a_merge_waits_for_whoever_reads_and_is_made_up_for(substrate: LvmSnapshotSubstrate) -> None:
    volume = secondary(substrate)
    one = committed(substrate, volume, {1: block_of("one")})
    with substrate.reading(one.id) as device:
        two = committed(substrate, volume, {1: block_of("two"), 2: block_of("two")})
        three = committed(substrate, volume, {3: block_of("three")})
        assert read(device, 1, 2) == block_of("one") + bytes(BLOCK_BYTES)
        assert not is_merged(substrate, three.id)
        assert content(substrate, two.id)[BLOCK_BYTES:][: 2 * BLOCK_BYTES] == block_of("two") * 2
        assert content(substrate, three.id)[BLOCK_BYTES:][: 3 * BLOCK_BYTES] == block_of("two") * 2 + block_of("three")
    substrate.recover()
    assert is_merged(substrate, three.id)
    assert [content(substrate, facts.id)[BLOCK_BYTES:][:BLOCK_BYTES] for facts in (one, two, three)] == [
        block_of("one"),
        block_of("two"),
        block_of("two"),
    ]


def test_an_undone_salvage_leaves_the_landing_volume_and_the_base(substrate: LvmSnapshotSubstrate) -> None:
    volume = secondary(substrate)
    base = committed(substrate, volume, {1: block_of("base"), 2: block_of("base")})
    landing = landed(substrate, volume, {1: block_of("landed"), 3: block_of("landed")})
    salvage = landed(substrate, volume, {1: block_of("salvaged"), 9: block_of("salvaged")}, WorkspaceKind.SALVAGE)
    salvaged = facts_after(substrate, volume, GenerationKind.SALVAGED)
    substrate.commit(salvage, salvaged)
    assert is_merged(substrate, salvaged.id)
    assert content(substrate, base.id)[BLOCK_BYTES:][: 2 * BLOCK_BYTES] == block_of("base") * 2
    substrate.drop(salvaged.id)
    assert substrate.generations(volume)[-1] == base
    assert is_merged(substrate, base.id)
    target = facts_after(substrate, volume, GenerationKind.COMMITTED)
    substrate.commit(landing, target)
    after = content(substrate, target.id)
    assert after[BLOCK_BYTES:][: 3 * BLOCK_BYTES] == block_of("landed") + block_of("base") + block_of("landed")
    assert after[9 * BLOCK_BYTES :][:BLOCK_BYTES] == bytes(BLOCK_BYTES)


def test_an_undone_first_salvage_leaves_nothing_of_it_in_the_next_landing(substrate: LvmSnapshotSubstrate) -> None:
    volume = secondary(substrate)
    salvage = landed(substrate, volume, {4: block_of("salvaged")}, WorkspaceKind.SALVAGE)
    facts = facts_after(substrate, volume, GenerationKind.SALVAGED)
    substrate.commit(salvage, facts)
    substrate.drop(facts.id)
    first = committed(substrate, volume, {5: block_of("landed")})
    assert content(substrate, first.id) == bytes(5 * BLOCK_BYTES) + block_of("landed") + bytes(VOLUME_BYTES - 6 * BLOCK_BYTES)
    assert is_merged(substrate, first.id)


def test_a_healed_base_is_merged_and_the_landing_volume_stays(substrate: LvmSnapshotSubstrate) -> None:
    volume = secondary(substrate)
    base = committed(substrate, volume, {1: block_of("rotten"), 2: block_of("sound")})
    landing = landed(substrate, volume, {2: block_of("landed")})
    healed = landed(substrate, volume, {1: block_of("healed")}, WorkspaceKind.HEALED)
    substrate.replace(healed, base.id)
    assert is_merged(substrate, base.id)
    assert content(substrate, base.id)[BLOCK_BYTES:][: 2 * BLOCK_BYTES] == block_of("healed") + block_of("sound")
    with substrate.writing(landing) as device:
        assert read(device, 1, 2) == block_of("rotten") + block_of("landed")


# --- crashes ---

MERGE = ("substrate.merge.kept=kill", "substrate.merge.journalled=kill", "substrate.merge.merged=kill", "substrate.merge.after=kill")
SERVE = ("substrate.operational.journalled=kill", "substrate.operational.copied=kill")


@pytest.mark.parametrize("point", MERGE)
def test_B6_a_crash_in_a_commit_leaves_both_generations_and_the_restart_merges(substrate: LvmSnapshotSubstrate, point: str) -> None:
    volume = secondary(substrate)
    older = committed(substrate, volume, {1: block_of("older"), 2: block_of("older")})
    base = committed(substrate, volume, {1: block_of("base")})
    landing = landed(substrate, volume, {1: block_of("target"), 7: block_of("target")})
    facts = facts_after(substrate, volume, GenerationKind.COMMITTED)
    expected = {
        older.id: block_of("older") * 2,
        base.id: block_of("base") + block_of("older"),
        facts.id: block_of("target") + block_of("older"),
    }
    assert in_child(bench(substrate), Call("commit", (landing, facts)), point) == -9
    survivor = LvmSnapshotSubstrate(substrate.group.name)
    for step in ("before the restart", "after it", "once more"):
        if step != "before the restart":
            survivor.recover()
            assert is_merged(survivor, facts.id)
        assert [known.id for known in survivor.generations(volume)][1:] == list(expected), step
        assert {generation: content(survivor, generation)[BLOCK_BYTES:][: 2 * BLOCK_BYTES] for generation in expected} == expected, step
    assert len(lvm.volumes(survivor.group)) == 4  # g0, the origin, two generations


def test_B6_B10_power_lost_in_a_merge_and_in_its_recovery_again_and_again(substrate: LvmSnapshotSubstrate) -> None:
    volume = secondary(substrate)
    base = committed(substrate, volume, {1: block_of("base")})
    landing = landed(substrate, volume, {block: block_of(f"target {block}") for block in range(1, 300)})
    facts = facts_after(substrate, volume, GenerationKind.COMMITTED)
    assert in_child(bench(substrate), Call("commit", (landing, facts)), "substrate.merge.journalled=kill") == -9
    _boot_into_a_merge(substrate, facts.id)
    for point in ("substrate.merge.merged=kill", "substrate.merge.after=kill", "substrate.recover.before_sweep=kill"):
        in_child(bench(substrate), Call("recover", ()), point)
        _deactivate(substrate, volume)
    survivor = LvmSnapshotSubstrate(substrate.group.name)
    survivor.recover()
    assert is_merged(survivor, facts.id)
    assert content(survivor, base.id)[: 2 * BLOCK_BYTES] == bytes(BLOCK_BYTES) + block_of("base")
    assert content(survivor, facts.id)[BLOCK_BYTES:][: 299 * BLOCK_BYTES] == b"".join(block_of(f"target {n}") for n in range(1, 300))


def _deactivate(substrate: LvmSnapshotSubstrate, volume: UUID) -> None:
    """What a power cut does to the kernel's devices."""
    lvm.deactivate(substrate.group, LvmSnapshotSubstrate(substrate.group.name)._held().origins[volume])


def _boot_into_a_merge(substrate: LvmSnapshotSubstrate, generation: GenerationId) -> None:
    """Lets LVM record that it merges while the kernel has no device of it, as it stands after power was lost in a merge."""
    snapshot = LvmSnapshotSubstrate(substrate.group.name)._held().generation(generation)
    _deactivate(substrate, generation.volume)
    subprocess.run(["lvconvert", "--merge", f"{substrate.group.name}/{snapshot.name}"], check=True, capture_output=True)


def test_B6_a_merge_that_LVM_put_off_is_not_taken_for_one_that_runs(substrate: LvmSnapshotSubstrate) -> None:
    volume = secondary(substrate)
    landing = landed(substrate, volume, {1: block_of("target")})
    facts = facts_after(substrate, volume, GenerationKind.COMMITTED)
    assert in_child(bench(substrate), Call("commit", (landing, facts)), "substrate.merge.journalled=kill") == -9
    survivor = LvmSnapshotSubstrate(substrate.group.name)
    snapshot = survivor._held().generation(facts.id)
    device = mapper.by_identity(lvm.dm_uuid(survivor.group, snapshot.uuid))
    assert device is not None
    with open(device, "rb"):  # LVM puts a merge off while somebody has the snapshot open
        lvm.merge(survivor.group, snapshot)
    assert content(survivor, facts.id)[BLOCK_BYTES:][:BLOCK_BYTES] == block_of("target")
    survivor.recover()
    assert is_merged(survivor, facts.id)
    assert content(survivor, facts.id)[BLOCK_BYTES:][:BLOCK_BYTES] == block_of("target")


@pytest.mark.parametrize("point", SERVE)
def test_B6_a_crash_in_making_the_operational_volume_is_redone(substrate: LvmSnapshotSubstrate, point: str) -> None:
    volume = record()
    substrate.create(volume)
    base = taken(substrate, volume.id, {1: block_of("base"), 2: block_of("base")})
    later = taken(substrate, volume.id, {1: block_of("later"), 3: block_of("later")})
    assert in_child(bench(substrate), Call("clone_operational", (volume.id, base.id)), point) == -9
    survivor = LvmSnapshotSubstrate(substrate.group.name)
    with pytest.raises(DeviceBusy):
        survivor.drop(base.id)
    survivor.recover()
    with survivor.operational(volume.id) as device:
        assert read(device, 1, 3) == block_of("base") * 2 + bytes(BLOCK_BYTES)
    assert content(survivor, later.id)[BLOCK_BYTES:][: 3 * BLOCK_BYTES] == block_of("later") + block_of("base") + block_of("later")
    assert content(survivor, base.id)[BLOCK_BYTES:][: 3 * BLOCK_BYTES] == block_of("base") * 2 + bytes(BLOCK_BYTES)


def test_A11_what_is_no_snapshot_yet_or_was_never_finished_is_removed(substrate: LvmSnapshotSubstrate) -> None:
    volume = secondary(substrate)
    base = committed(substrate, volume, {1: block_of("base")})
    before = lvm.volumes(substrate.group)
    landing = Workspace(volume, uuid4(), WorkspaceKind.LANDING)
    origin = substrate._held().origins[volume]
    # LVM makes a snapshot in two commits: a plain volume with the tags first. And a snapshot that is tagged as unfinished.
    lvm.create(
        substrate.group,
        ["--size", "4m", "--zero", "n", "--wipesignatures", "n", substrate.group.name],
        "half",
        [tags.workspace_tag(landing)],
    )
    lvm.create(
        substrate.group,
        ["--snapshot", "--size", "4m", f"{substrate.group.name}/{origin.name}"],
        "unfinished",
        [tags.unfinished_tag(volume), tags.generation_tag(facts_after(substrate, volume))],
    )
    assert not substrate.exists(landing)
    assert substrate.generations(volume)[-1] == base
    substrate.recover()
    assert lvm.volumes(substrate.group) == before


def test_A12_after_a_boot_all_is_found_by_identity_and_still_copied_before_it_changes(substrate: LvmSnapshotSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    base = taken(substrate, volume.id, {5: block_of("kept"), 6: block_of("kept")})
    with substrate.operational(volume.id) as device:
        write(device, 5, block_of("before the boot"))
    origin = substrate._held().origins[volume.id]
    _deactivate(substrate, volume.id)
    subprocess.run(["lvrename", substrate.group.name, origin.name, "another-name"], check=True, capture_output=True)
    booted = LvmSnapshotSubstrate(substrate.group.name)
    booted.recover()
    with booted.operational(volume.id) as device:
        write(device, 6, block_of("after the boot"))
    assert content(booted, base.id)[5 * BLOCK_BYTES :][: 2 * BLOCK_BYTES] == block_of("kept") * 2
    target = taken(booted, volume.id, {})
    assert blocks_of(booted.changed(base.id, target.id)) == {5, 6}


# --- room ---


def test_E8_a_generation_whose_snapshot_overflows_is_lost_and_nothing_else(substrate: LvmSnapshotSubstrate) -> None:
    volume = record()
    LvmSnapshotSubstrate(substrate.group.name, snapshot_percent=100).create(volume)
    whole = LvmSnapshotSubstrate(substrate.group.name, snapshot_percent=100)
    roomy = taken(whole, volume.id, {1: block_of("roomy")})
    tight = LvmSnapshotSubstrate(substrate.group.name, snapshot_percent=1)
    lost = taken(tight, volume.id, {1: block_of("tight")})
    overflow(substrate, volume.id)
    target = taken(whole, volume.id, {2: block_of("target")})
    for act in (
        lambda: content(substrate, lost.id),
        lambda: substrate.changed(lost.id, target.id),
        lambda: substrate.changed(roomy.id, lost.id),
        lambda: substrate.refuse_written(lost.id),
        lambda: substrate.begin(Workspace(volume.id, uuid4(), WorkspaceKind.LANDING), lost.id),
    ):
        with pytest.raises(GenerationInvalid, match="gave up"):
            act()
    assert content(substrate, roomy.id)[BLOCK_BYTES:][:BLOCK_BYTES] == block_of("roomy")
    assert len(blocks_of(substrate.changed(roomy.id, target.id))) == BLOCKS
    with substrate.operational(volume.id) as device:
        assert read(device, 2, 1) == block_of("target")
    substrate.drop(lost.id)
    assert substrate.generations(volume.id)[1:] == (roomy, target)


def test_E9_a_snapshot_that_overflows_while_it_is_read_voids_what_was_read(
    substrate: LvmSnapshotSubstrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = record()
    substrate.create(volume)
    tight = LvmSnapshotSubstrate(substrate.group.name, snapshot_percent=1)
    one, two = taken(tight, volume.id, {1: block_of("one")}), taken(tight, volume.id, {1: block_of("two")})
    real = chunks.refined

    def late(*arguments: object) -> ChangedRuns:
        found = real(*arguments)  # type: ignore[arg-type]
        overflow(substrate, volume.id)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(chunks, "refined", late)
        with pytest.raises(GenerationInvalid):
            substrate.changed(one.id, two.id)
    three = taken(tight, volume.id, {})
    reading = substrate.reading(three.id)
    read(reading.__enter__(), 0, 10)
    overflow(substrate, volume.id)
    with pytest.raises(GenerationInvalid):
        reading.__exit__(None, None, None)


def test_E8_a_workspace_that_overflows_is_gone_and_its_base_is_not(substrate: LvmSnapshotSubstrate) -> None:
    volume = secondary(substrate)
    base = committed(substrate, volume, {1: block_of("base")})
    landing = Workspace(volume, uuid4(), WorkspaceKind.LANDING)
    substrate.begin(landing, base.id, BLOCK_BYTES)
    with suppress(GenerationInvalid), substrate.writing(landing) as device, pytest.raises(OSError, match="Input/output"):
        _fill(device)
    assert not substrate.exists(landing)
    with pytest.raises(GenerationInvalid, match="gave up"):
        substrate.commit(landing, facts_after(substrate, volume, GenerationKind.COMMITTED))
    assert substrate.generations(volume)[-1] == base
    assert content(substrate, base.id)[BLOCK_BYTES:][:BLOCK_BYTES] == block_of("base")
    substrate.discard(landing)


def test_a_landing_volume_has_room_for_exactly_what_is_to_come(substrate: LvmSnapshotSubstrate) -> None:
    volume = secondary(substrate)
    landing = Workspace(volume, uuid4(), WorkspaceKind.LANDING)
    coming = 1500
    substrate.begin(landing, empty_generation(volume), coming * BLOCK_BYTES)
    assert substrate.free_bytes(landing) >= coming * BLOCK_BYTES
    with substrate.writing(landing) as device:
        for block in range(0, 2 * coming, 2):
            write(device, block, block_of(f"{block}"))
    facts = facts_after(substrate, volume, GenerationKind.COMMITTED)
    substrate.commit(landing, facts)
    assert is_merged(substrate, facts.id)


def test_E5_no_room_in_the_group_leaves_everything_as_it_was(substrate: LvmSnapshotSubstrate) -> None:
    volume = secondary(substrate)
    base = committed(substrate, volume, {1: block_of("base")})
    substrate.create(record(Role.SECONDARY, size_bytes=(substrate.free_bytes() >> 22) - 1 << 22))
    before = lvm.volumes(substrate.group)
    with pytest.raises(NoSpace):
        substrate.begin(Workspace(volume, uuid4(), WorkspaceKind.LANDING), base.id, VOLUME_BYTES)
    with pytest.raises(NoSpace):
        substrate.create(record())
    assert substrate.generations(volume)[-1] == base
    assert lvm.volumes(substrate.group) == before


def test_an_older_generation_gets_room_for_what_changes_after_the_next(substrate: LvmSnapshotSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    tight = LvmSnapshotSubstrate(substrate.group.name, snapshot_percent=10)
    image = {block: os.urandom(BLOCK_BYTES) for block in range(BLOCKS)}
    first = taken(tight, volume.id, image)
    for number in range(4):  # 1.5 MiB each, and the slack of a snapshot is 4
        taken(tight, volume.id, {block: block_of(f"{number}") for block in range(number * 384, (number + 1) * 384)})
    assert content(tight, first.id) == b"".join(image.values())
