"""What every substrate must do, whatever it is made of. A module with a `substrate` fixture subclasses these and runs them.

``Bench`` is a substrate on a pool of its own; ``again()`` opens it anew in this process, and ``in_child`` runs one operation in a process
that a failpoint kills.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest

from agent.contract.dmi import HOLE
from agent.contract.errors import (
    BaseMismatch,
    DeviceBusy,
    LandfallError,
    LayoutUnsupported,
    NameRefused,
    NoSuchGeneration,
    NoSuchTransfer,
    NoSuchVolume,
    RequestRefused,
    VolumeExists,
)
from agent.contract.identity import (
    BLOCK_BYTES,
    FilesystemKind,
    GenerationId,
    GenerationKind,
    empty_generation,
    next_generation,
)
from agent.contract.messages import GenerationFacts, Role, newest
from agent.volume import filesystem
from agent.volume.substrate import ChangedRuns, Substrate, Take, VolumeRecord, Workspace, WorkspaceKind

VOLUME_BYTES = 16 << 20
GROWN_BYTES = 24 << 20
BLOCKS = VOLUME_BYTES // BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Bench:
    """A substrate under test, how to open it anew, and what was left of its pool's room."""

    open: Callable[[], Substrate]
    opener: str  # Python that defines `substrate`, for a child process


def record(role: Role = Role.PRIMARY, **changes: Any) -> VolumeRecord:
    made = VolumeRecord(uuid4(), f"v{os.urandom(4).hex()}", FilesystemKind.EXT4, VOLUME_BYTES, 512, role, 1)
    return replace(made, **changes)


def facts_after(substrate: Substrate, volume: UUID, kind: GenerationKind = GenerationKind.FROZEN) -> GenerationFacts:
    return GenerationFacts(next_generation(volume, 1, substrate.generations(volume)[-1].id.counter), kind, 1)


def write(device: Path, block: int, content: bytes) -> None:
    with open(device, "r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), content, block * BLOCK_BYTES) == len(content)
        os.fsync(file.fileno())


def read(device: Path, block: int = 0, blocks: int | None = None) -> bytes:
    with open(device, "rb", buffering=0) as file:
        size = os.lseek(file.fileno(), 0, os.SEEK_END)
        parts, at, end = [], block * BLOCK_BYTES, size if blocks is None else (block + blocks) * BLOCK_BYTES
        while at < end:
            parts.append(os.pread(file.fileno(), end - at, at))
            assert parts[-1], "short device"
            at += len(parts[-1])
    return b"".join(parts)


def block_of(text: str) -> bytes:
    return text.encode().ljust(BLOCK_BYTES, b".")


def content(substrate: Substrate, generation: GenerationId) -> bytes:
    with substrate.reading(generation) as device:
        return read(device)


def blocks_of(runs: ChangedRuns) -> set[int]:
    return {first + n for first, count in zip(runs.first.tolist(), runs.blocks.tolist(), strict=True) for n in range(count)}


def differing(one: bytes, other: bytes) -> set[int]:
    pair = (np.frombuffer(raw, np.uint8).reshape(-1, BLOCK_BYTES) for raw in (one, other))
    return set(np.flatnonzero((next(pair) != next(pair)).any(axis=1)).tolist())


def taken(substrate: Substrate, volume: UUID, changes: dict[int, bytes]) -> GenerationFacts:
    """Writes blocks into the operational volume and takes a generation of it."""
    with substrate.operational(volume) as device:
        for block, new in changes.items():
            write(device, block, new)
    facts = facts_after(substrate, volume)
    substrate.take(volume, None, facts)
    return facts


class SubstrateConformance:
    """One class for all: a subclass gives the fixture ``bench``."""

    DISCARD: tuple[str, ...] = ("blkdiscard",)
    GROWS_IN_USE = True

    @pytest.fixture
    def substrate(self, bench: Bench) -> Substrate:
        return bench.open()

    # --- volumes ---

    def test_a_new_volume_has_g0_and_a_primary_has_an_operational_image(self, substrate: Substrate) -> None:
        primary, secondary = record(), record(Role.SECONDARY)
        substrate.create(primary)
        substrate.create(secondary)
        assert {held.id: held for held in substrate.volumes()} == {primary.id: primary, secondary.id: secondary}
        assert [held.id for held in substrate.generations(primary.id)] == [empty_generation(primary.id)]
        assert content(substrate, empty_generation(primary.id)) == bytes(VOLUME_BYTES)
        with substrate.operational(primary.id) as device:
            assert read(device) == bytes(VOLUME_BYTES)
        with pytest.raises(NoSuchVolume), substrate.operational(secondary.id):
            pass

    def test_a_volume_is_refused_twice_and_by_name(self, substrate: Substrate) -> None:
        first = record()
        substrate.create(first)
        with pytest.raises(VolumeExists):
            substrate.create(first)
        with pytest.raises(VolumeExists):
            substrate.create(record(name=first.name))
        with pytest.raises(NameRefused):
            substrate.create(record(name="../x"))
        assert substrate.volumes() == (first,)

    def test_E20_E21_sizes_and_sectors_that_cannot_be_are_refused(self, substrate: Substrate) -> None:
        for refused in (record(size_bytes=0), record(size_bytes=VOLUME_BYTES + 512), record(sector_bytes=1024)):
            with pytest.raises(LayoutUnsupported):
                substrate.create(refused)
        assert substrate.volumes() == ()

    def test_E21_sectors_of_4096_bytes(self, substrate: Substrate) -> None:
        volume = record(sector_bytes=4096)
        substrate.create(volume)
        with substrate.operational(volume.id) as device, open(device, "rb", buffering=0) as file:
            from agent.system import block

            assert block.sector_bytes(file.fileno()) == 4096

    def test_what_is_not_held_is_refused_by_name_of_the_fact(self, substrate: Substrate) -> None:
        volume = record()
        workspace = Workspace(volume.id, uuid4(), WorkspaceKind.LANDING)
        with pytest.raises(NoSuchVolume):
            substrate.generations(volume.id)
        with pytest.raises(NoSuchVolume):
            substrate.remove(volume.id)
        with pytest.raises(NoSuchVolume):
            substrate.begin(workspace, empty_generation(volume.id))
        substrate.create(volume)
        other = next_generation(volume.id, 1, 3)
        with pytest.raises(NoSuchGeneration), substrate.reading(other):
            pass
        with pytest.raises(NoSuchGeneration):
            substrate.drop(other)
        with pytest.raises(NoSuchTransfer), substrate.writing(workspace):
            pass
        with pytest.raises(NoSuchTransfer):
            substrate.commit(workspace, facts_after(substrate, volume.id))

    def test_a_generation_is_held_only_if_all_four_fields_agree(self, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        held = taken(substrate, volume.id, {0: block_of("a")}).id
        for other in (replace(held, epoch=2), replace(held, nonce=held.nonce[:8] + "0" * 24)):
            with pytest.raises(NoSuchGeneration):
                substrate.drop(other)

    def test_role_and_epoch_are_remembered(self, bench: Bench, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        substrate.set_role(volume.id, Role.SECONDARY, 7)
        assert bench.open().volumes() == (replace(volume, role=Role.SECONDARY, epoch=7),)

    def test_removal_waits_for_users_and_leaves_nothing(self, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        with substrate.reading(empty_generation(volume.id)), pytest.raises(DeviceBusy):
            substrate.remove(volume.id)
        assert substrate.volumes() == (volume,)
        substrate.remove(volume.id)
        assert substrate.volumes() == ()
        substrate.create(volume)

    def test_E20_a_volume_grows_by_zeros_and_the_next_generation_has_the_base_it_had(self, bench: Bench, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        older = taken(substrate, volume.id, {0: block_of("older"), BLOCKS - 1: block_of("older")}).id
        base = taken(substrate, volume.id, {1: block_of("base")}).id
        before = {generation: content(substrate, generation) for generation in (older, base)}
        substrate.grow(volume.id, GROWN_BYTES)
        assert bench.open().volumes() == (replace(volume, size_bytes=GROWN_BYTES),)
        substrate.grow(volume.id, GROWN_BYTES)
        end = GROWN_BYTES // BLOCK_BYTES - 1
        target = taken(substrate, volume.id, {1: block_of("target"), BLOCKS: block_of("past the old end"), end: block_of("end")}).id
        for generation, whole in before.items():
            assert content(substrate, generation) == whole + bytes(GROWN_BYTES - VOLUME_BYTES)
            substrate.refuse_written(generation)
        assert content(substrate, empty_generation(volume.id)) == bytes(GROWN_BYTES)
        runs = substrate.changed(base, target)
        assert blocks_of(runs) == {1, BLOCKS, end}
        assert runs.diff_block[runs.first >= BLOCKS].tolist() == [HOLE, HOLE]
        assert blocks_of(substrate.changed(older, target)) == {1, BLOCKS, end}
        assert content(substrate, target)[BLOCKS * BLOCK_BYTES :][:BLOCK_BYTES] == block_of("past the old end")

    def test_E20_a_replica_grows_and_the_next_transfer_lands_behind_its_old_end(self, substrate: Substrate) -> None:
        volume = record(Role.SECONDARY)
        substrate.create(volume)
        held: list[GenerationFacts] = []
        end = GROWN_BYTES // BLOCK_BYTES - 1
        for changes in ({1: "one"}, {1: "two"}, {2: "three", end: "three"}, {end: "four"}):
            if len(held) == 2:
                substrate.grow(volume.id, GROWN_BYTES)
            workspace = Workspace(volume.id, uuid4(), WorkspaceKind.LANDING)
            substrate.begin(workspace, substrate.generations(volume.id)[-1].id)
            with substrate.writing(workspace) as device:
                for block, text in changes.items():
                    write(device, block, block_of(text))
            held.append(facts_after(substrate, volume.id, GenerationKind.COMMITTED))
            substrate.commit(workspace, held[-1])
        one, two, three, four = map(block_of, ("one", "two", "three", "four"))
        zeros = bytes(BLOCK_BYTES)
        expected = [[one, zeros, zeros], [two, zeros, zeros], [two, three, three], [two, three, four]]
        for facts, blocks in zip(held, expected, strict=True):
            with substrate.reading(facts.id) as device:
                assert [read(device, block, 1) for block in (1, 2, end)] == blocks
            substrate.refuse_written(facts.id)

    def test_E20_what_cannot_grow_is_refused_and_left_as_it_was(self, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        base = taken(substrate, volume.id, {1: block_of("base")}).id
        for act in (substrate.refuse_growth, substrate.grow):
            for wrong in (VOLUME_BYTES - BLOCK_BYTES, VOLUME_BYTES // 2, GROWN_BYTES + 512):
                with pytest.raises(LayoutUnsupported):
                    act(volume.id, wrong)
            with pytest.raises(NoSuchVolume):
                act(uuid4(), GROWN_BYTES)
        with substrate.operational(volume.id):
            if self.GROWS_IN_USE:
                substrate.grow(volume.id, GROWN_BYTES)
                assert substrate.volumes() == (replace(volume, size_bytes=GROWN_BYTES),)
                return
            for act in (substrate.refuse_growth, substrate.grow):
                with pytest.raises(DeviceBusy, match="unserve"):
                    act(volume.id, GROWN_BYTES)
        with substrate.reading(base), pytest.raises(DeviceBusy):
            substrate.grow(volume.id, GROWN_BYTES)
        assert substrate.volumes() == (volume,)
        substrate.refuse_growth(volume.id, GROWN_BYTES)
        assert substrate.volumes() == (volume,), "asking changes nothing"

    # --- generations ---

    def test_a_generation_stays_what_it_was(self, bench: Bench, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        one = taken(substrate, volume.id, {3: block_of("one"), 9: block_of("same")})
        two = taken(substrate, volume.id, {3: block_of("two"), BLOCKS - 1: block_of("last")})
        assert substrate.generations(volume.id)[1:] == (one, two)
        assert bench.open().generations(volume.id) == substrate.generations(volume.id)
        first, second = content(substrate, one.id), content(substrate, two.id)
        assert first[3 * BLOCK_BYTES :][:BLOCK_BYTES] == block_of("one")
        assert second[3 * BLOCK_BYTES :][:BLOCK_BYTES] == block_of("two")
        assert differing(first, second) == {3, BLOCKS - 1}

    def test_a_generation_cannot_be_written(self, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        with substrate.reading(empty_generation(volume.id)) as device, pytest.raises(OSError, match=r"not permitted|Read-only"):
            write(device, 0, block_of("x"))

    def test_taking_needs_the_operational_volume_to_itself(self, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        with substrate.operational(volume.id), pytest.raises(DeviceBusy):
            substrate.take(volume.id, None, facts_after(substrate, volume.id))
        with substrate.operational(volume.id), pytest.raises(DeviceBusy), substrate.operational(volume.id):
            pass
        assert len(substrate.generations(volume.id)) == 1

    def test_a_generation_is_not_taken_twice(self, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        facts = taken(substrate, volume.id, {0: block_of("a")})
        with pytest.raises(RequestRefused):
            substrate.take(volume.id, None, facts)

    def test_A10_dropping_one_leaves_the_others_comparable(self, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        kept = [taken(substrate, volume.id, {n: block_of(f"{n}")}).id for n in range(3)]
        with substrate.reading(kept[0]), pytest.raises(DeviceBusy):
            substrate.drop(kept[0])
        substrate.drop(kept[0])
        with pytest.raises(NoSuchGeneration):
            content(substrate, kept[0])
        assert blocks_of(substrate.changed(kept[1], kept[2])) == {2}
        with pytest.raises(RequestRefused):
            substrate.drop(empty_generation(volume.id))

    # --- what changed ---

    def test_changed_runs_are_exact_and_name_the_pre_image(self, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        random = np.random.default_rng(1)
        before = {int(block): random.bytes(BLOCK_BYTES) for block in random.integers(0, BLOCKS, 300)}
        after = {int(block): random.bytes(BLOCK_BYTES) for block in random.integers(0, BLOCKS, 300)}
        base, target = taken(substrate, volume.id, before).id, taken(substrate, volume.id, after).id
        runs = substrate.changed(base, target)
        assert (runs.first[1:] >= runs.first[:-1] + runs.blocks[:-1]).all()
        assert blocks_of(runs) == set(after)
        assert not runs.target_hole.any()
        with substrate.differential(base) as differential, open(differential, "rb", buffering=0) as pool:
            for first, count, address in zip(runs.first.tolist(), runs.blocks.tolist(), runs.diff_block.tolist(), strict=True):
                for n in range(count):
                    if address == HOLE:
                        assert first + n not in before
                    else:
                        assert os.pread(pool.fileno(), BLOCK_BYTES, (address + n) * BLOCK_BYTES) == before[first + n]

    def test_against_g0_everything_the_target_has_is_changed(self, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        target = taken(substrate, volume.id, {n: block_of(f"{n}") for n in (0, 1, 2, 700)}).id
        runs = substrate.changed(empty_generation(volume.id), target)
        assert blocks_of(runs) == {0, 1, 2, 700}
        assert set(runs.diff_block.tolist()) == {HOLE}

    def test_nothing_changed(self, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        base, target = taken(substrate, volume.id, {1: block_of("a")}).id, taken(substrate, volume.id, {}).id
        assert len(substrate.changed(base, target).first) == 0

    def test_E25_discarded_blocks_are_holes_of_the_target(self, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        base = taken(substrate, volume.id, {n: block_of(f"{n}") for n in range(64)}).id
        with substrate.operational(volume.id) as device:
            subprocess.run([*self.DISCARD, "-o", str(16 * BLOCK_BYTES), "-l", str(16 * BLOCK_BYTES), device], check=True)
        target = taken(substrate, volume.id, {}).id
        runs = substrate.changed(base, target)
        assert blocks_of(runs) == set(range(16, 32))
        assert runs.target_hole.all()
        assert content(substrate, target)[16 * BLOCK_BYTES :][: 16 * BLOCK_BYTES] == bytes(16 * BLOCK_BYTES)

    def test_E18_generations_of_two_volumes_are_never_compared_or_mixed(self, substrate: Substrate) -> None:
        one, other = record(), record()
        substrate.create(one)
        substrate.create(other)
        with pytest.raises(BaseMismatch):
            substrate.changed(empty_generation(one.id), empty_generation(other.id))
        workspace = Workspace(one.id, uuid4(), WorkspaceKind.LANDING)
        with pytest.raises(BaseMismatch):
            substrate.begin(workspace, empty_generation(other.id))
        substrate.begin(workspace, empty_generation(one.id))
        with pytest.raises(BaseMismatch):
            substrate.commit(workspace, facts_after(substrate, other.id))

    def test_what_is_kept_of_an_overtaken_primary_stands_beside_the_line(self, bench: Bench, substrate: Substrate) -> None:
        """Generations go by epoch before counter: the line of a later epoch may begin at a lower counter than the earlier one reached."""
        volume = record()
        substrate.create(volume)
        shared = taken(substrate, volume.id, {1: block_of("shared")})
        with substrate.operational(volume.id) as device:
            write(device, 1, block_of("kept"))
        kept = GenerationFacts(next_generation(volume.id, 1, shared.id.counter + 7), GenerationKind.KEPT, 1)
        substrate.take(volume.id, None, kept)
        assert bench.open().generations(volume.id)[1:] == (shared, kept)
        assert newest(substrate.generations(volume.id)) == shared
        workspace = Workspace(volume.id, uuid4(), WorkspaceKind.LANDING)
        substrate.begin(workspace, shared.id)
        follows = GenerationFacts(next_generation(volume.id, 2, shared.id.counter), GenerationKind.COMMITTED, 1)
        substrate.commit(workspace, follows)
        assert bench.open().generations(volume.id)[1:] == (shared, kept, follows)
        assert newest(substrate.generations(volume.id)) == follows
        assert blocks_of(substrate.changed(shared.id, kept.id)) == {1}
        assert content(substrate, kept.id)[BLOCK_BYTES:][:BLOCK_BYTES] == block_of("kept")

    # --- workspaces ---

    def test_a_workspace_becomes_a_generation_and_the_base_stays(self, bench: Bench, substrate: Substrate) -> None:
        volume = record(Role.SECONDARY)
        substrate.create(volume)
        workspace = Workspace(volume.id, uuid4(), WorkspaceKind.LANDING)
        assert not substrate.exists(workspace)
        substrate.begin(workspace, empty_generation(volume.id))
        assert substrate.exists(workspace)
        with substrate.writing(workspace) as device:
            write(device, 5, block_of("landed"))
        facts = facts_after(substrate, volume.id, GenerationKind.COMMITTED)
        substrate.commit(workspace, facts)
        assert not substrate.exists(workspace)
        assert bench.open().generations(volume.id)[-1] == facts
        assert content(substrate, facts.id)[5 * BLOCK_BYTES :][:BLOCK_BYTES] == block_of("landed")
        assert content(substrate, empty_generation(volume.id)) == bytes(VOLUME_BYTES)
        assert blocks_of(substrate.changed(empty_generation(volume.id), facts.id)) == {5}

    def test_E19_a_workspace_has_one_writer_and_is_not_committed_under_it(self, substrate: Substrate) -> None:
        volume = record(Role.SECONDARY)
        substrate.create(volume)
        workspace = Workspace(volume.id, uuid4(), WorkspaceKind.LANDING)
        substrate.begin(workspace, empty_generation(volume.id))
        with substrate.writing(workspace):
            with pytest.raises(DeviceBusy), substrate.writing(workspace):
                pass
            with pytest.raises(DeviceBusy):
                substrate.commit(workspace, facts_after(substrate, volume.id))
            with pytest.raises(DeviceBusy):
                substrate.discard(workspace)
            with pytest.raises(DeviceBusy):
                substrate.begin(workspace, empty_generation(volume.id))
        assert len(substrate.generations(volume.id)) == 1
        assert substrate.exists(workspace)

    def test_beginning_again_replaces_the_workspace(self, substrate: Substrate) -> None:
        volume = record(Role.SECONDARY)
        substrate.create(volume)
        workspace = Workspace(volume.id, uuid4(), WorkspaceKind.SALVAGE)
        substrate.begin(workspace, empty_generation(volume.id))
        with substrate.writing(workspace) as device:
            write(device, 1, block_of("old"))
        substrate.begin(workspace, empty_generation(volume.id))
        with substrate.writing(workspace) as device:
            assert read(device) == bytes(VOLUME_BYTES)
        substrate.discard(workspace)
        substrate.discard(workspace)
        assert not substrate.exists(workspace)

    def test_a_branch_is_its_source_and_goes_its_own_way(self, substrate: Substrate) -> None:
        volume = record(Role.SECONDARY)
        substrate.create(volume)
        landing, salvage = (Workspace(volume.id, uuid4(), kind) for kind in (WorkspaceKind.LANDING, WorkspaceKind.SALVAGE))
        substrate.begin(landing, empty_generation(volume.id))
        with substrate.writing(landing) as device:
            write(device, 1, block_of("landed"))
            if substrate.branches:
                with pytest.raises(DeviceBusy):
                    substrate.branch(salvage, landing)
        if not substrate.branches:
            with pytest.raises(RequestRefused):
                substrate.branch(salvage, landing)
            return
        substrate.begin(salvage, empty_generation(volume.id))
        substrate.branch(salvage, landing)
        with substrate.writing(salvage) as device:
            assert read(device, 1, 1) == block_of("landed")
            write(device, 1, block_of("undone"))
        with substrate.writing(landing) as device:
            assert read(device, 1, 1) == block_of("landed")
        facts = facts_after(substrate, volume.id, GenerationKind.SALVAGED)
        substrate.commit(salvage, facts)
        assert content(substrate, facts.id)[BLOCK_BYTES:][:BLOCK_BYTES] == block_of("undone")
        assert substrate.workspaces(volume.id) == (landing,)

    def test_a_healed_base_takes_the_place_of_the_damaged_one(self, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        facts = taken(substrate, volume.id, {2: block_of("rotten"), 3: block_of("sound")})
        workspace = Workspace(volume.id, uuid4(), WorkspaceKind.HEALED)
        substrate.begin(workspace, facts.id)
        with substrate.writing(workspace) as device:
            write(device, 2, block_of("healed"))
        substrate.replace(workspace, facts.id)
        assert not substrate.exists(workspace)
        assert substrate.generations(volume.id)[-1] == facts
        assert content(substrate, facts.id)[2 * BLOCK_BYTES :][: 2 * BLOCK_BYTES] == block_of("healed") + block_of("sound")

    def test_the_operational_image_is_cloned_from_a_generation(self, substrate: Substrate) -> None:
        volume = record(Role.SECONDARY)
        substrate.create(volume)
        workspace = Workspace(volume.id, uuid4(), WorkspaceKind.LANDING)
        substrate.begin(workspace, empty_generation(volume.id))
        with substrate.writing(workspace) as device:
            write(device, 4, block_of("served"))
        facts = facts_after(substrate, volume.id, GenerationKind.COMMITTED)
        substrate.commit(workspace, facts)
        substrate.clone_operational(volume.id, facts.id)
        with substrate.operational(volume.id) as device:
            assert read(device, 4, 1) == block_of("served")
            write(device, 4, block_of("changed"))
            with pytest.raises(DeviceBusy):
                substrate.clone_operational(volume.id, facts.id)
        assert content(substrate, facts.id)[4 * BLOCK_BYTES :][:BLOCK_BYTES] == block_of("served")

    # --- several volumes ---

    def test_generations_of_several_volumes_are_of_one_moment(self, substrate: Substrate, tmp_path: Path) -> None:
        volumes = [record(), record()]
        with ExitStack() as mounted:
            roots = []
            for volume in volumes:
                substrate.create(volume)
                roots.append(tmp_path / volume.name)
                roots[-1].mkdir()
                with substrate.operational(volume.id) as device:
                    filesystem.make(device, volume.filesystem)
                    filesystem.mount(device, roots[-1], volume.filesystem, read_only=False)
                mounted.callback(filesystem.unmount, roots[-1])
            takes = [Take(volume.id, root, facts_after(substrate, volume.id)) for volume, root in zip(volumes, roots, strict=True)]
            with pytest.raises(LandfallError):
                substrate.take_together([takes[0], replace(takes[1], mount_point=tmp_path)])
            assert [len(substrate.generations(volume.id)) for volume in volumes] == [1, 1], "all of an order or nothing"
            for root in roots:
                (root / "written").write_bytes(b"after what failed")
            assert 0 < substrate.take_together(takes) < 10_000
            for root in roots:
                (root / "written").write_bytes(b"after the freeze")
        for take, root in zip(takes, roots, strict=True):
            with substrate.reading(take.facts.id) as device:
                filesystem.mount(device, root, FilesystemKind.EXT4, read_only=True)
            try:
                assert (root / "written").read_bytes() == b"after what failed"
            finally:
                filesystem.unmount(root)

    # --- crashes ---

    CRASHES: tuple[tuple[str, str], ...] = (
        ("create", "substrate.create.before_rename"),
        ("create", "substrate.create.after"),
        ("remove", "substrate.remove.before"),
        ("remove", "substrate.remove.renamed"),
        ("take", "substrate.take.before_record"),
        ("take", "substrate.take.before_rename"),
        ("take", "files.before_rename"),
        ("take", "substrate.take.after"),
        ("drop", "substrate.drop.before"),
        ("drop", "substrate.drop.half"),
        ("drop", "substrate.drop.after"),
        ("begin", "substrate.begin.before"),
        ("begin", "substrate.begin.before_rename"),
        ("begin", "substrate.begin.after"),
        ("commit", "files.before_rename"),
        ("commit", "substrate.commit.before_rename"),
        ("commit", "substrate.commit.after_rename"),
        ("replace", "substrate.replace.before"),
        ("replace", "substrate.replace.after"),
        ("discard", "substrate.discard.before"),
        ("discard", "substrate.discard.after"),
        ("clone_operational", "substrate.operational.before"),
        ("clone_operational", "substrate.operational.before_rename"),
        ("clone_operational", "substrate.operational.after"),
        ("grow", "substrate.grow.before"),
        ("grow", "substrate.grow.half"),
        ("grow", "substrate.grow.after"),
    )

    @pytest.mark.parametrize(("operation", "point"), CRASHES)
    def test_A11_a_crash_leaves_the_state_before_or_after(self, bench: Bench, tmp_path: Path, operation: str, point: str) -> None:
        substrate = bench.open()
        volume = record()
        substrate.create(volume)
        base = taken(substrate, volume.id, {1: block_of("base")})
        workspace = Workspace(volume.id, UUID(int=7), WorkspaceKind.LANDING)
        substrate.begin(workspace, base.id)
        with substrate.writing(workspace) as device:
            write(device, 1, block_of("landed"))
        arguments: dict[str, tuple[Any, ...]] = {
            "create": (record(),),
            "remove": (volume.id,),
            "take": (volume.id, None, facts_after(substrate, volume.id)),
            "drop": (base.id,),
            "begin": (replace(workspace, kind=WorkspaceKind.SALVAGE), base.id),
            "commit": (workspace, facts_after(substrate, volume.id)),
            "replace": (workspace, base.id),
            "discard": (workspace,),
            "clone_operational": (volume.id, base.id),
            "grow": (volume.id, GROWN_BYTES),
        }
        call = Call(operation, arguments[operation])
        before = state(substrate)
        trace = tmp_path / "trace"
        status = in_child(bench, call, f"{point}=kill", trace)
        assert status == -9, "the failpoint was not reached"
        assert trace.read_text().splitlines()[-1] == point
        survivor = bench.open()
        survivor.recover()
        crashed = state(survivor)
        survivor.recover()
        assert state(survivor) == crashed
        assert self.leftovers(survivor) == []
        if crashed == before:
            assert in_child(bench, call) == 0
            assert state(survivor) != before or operation == "clone_operational"
        else:
            assert after_of(operation, before, crashed, volume.id, workspace)

    def leftovers(self, substrate: Substrate) -> list[str]:
        """What lies in the pool that no record accounts for; a substrate's own tests say how to look."""
        return []


def state(substrate: Substrate) -> dict[str, Any]:
    """Everything a user of the substrate can see, with contents."""
    seen: dict[str, Any] = {}
    for volume in substrate.volumes():
        seen[f"{volume.id}"] = volume
        for facts in substrate.generations(volume.id):
            seen[f"{volume.id}/{facts.id.name}"] = (facts, hash(content(substrate, facts.id)))
        for kind in WorkspaceKind:
            workspace = Workspace(volume.id, UUID(int=7), kind)
            if substrate.exists(workspace):
                with substrate.writing(workspace) as device:
                    seen[f"{volume.id}/{kind}"] = hash(read(device))
        try:
            with substrate.operational(volume.id) as device:
                seen[f"{volume.id}/operational"] = hash(read(device))
        except LandfallError:
            pass
    return seen


def after_of(operation: str, before: dict[str, Any], after: dict[str, Any], volume: UUID, workspace: Workspace) -> bool:
    """Whether ``after`` is what the whole operation makes of ``before``."""
    gone, new = before.keys() - after.keys(), after.keys() - before.keys()
    changed = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    landing = f"{volume}/{workspace.kind}"
    match operation:
        case "create":
            return not gone and not changed and len(new) == 3
        case "remove":
            return all(key.startswith(str(volume)) for key in gone) and str(volume) in gone and not new and not changed
        case "take":
            return not gone and not changed and len(new) == 1
        case "drop":
            return len(gone) == 1 and not new and not changed
        case "begin":
            return new == {f"{volume}/salvage"} and not gone and not changed
        case "commit":
            return gone == {landing} and len(new) == 1 and not changed and after[new.pop()][1] == before[landing]
        case "replace":
            return gone == {landing} and not new and len(changed) == 1 and after[changed.pop()][1] == before[landing]
        case "discard":
            return gone == {landing} and not new and not changed
        case "grow":
            return not gone and not new and changed == before.keys()
        case _:
            return False


@dataclass(frozen=True, slots=True)
class Call:
    """One operation of a substrate."""

    method: str
    arguments: tuple[Any, ...]


def in_child(bench: Bench, call: Call, failpoints: str = "", trace: Path | None = None) -> int:
    """Runs one operation in a process of its own and returns its status."""
    packed = pickle.dumps(call.arguments)
    program = f"{bench.opener}\nimport pickle; substrate.{call.method}(*pickle.loads({packed!r}))"
    environment = {
        **os.environ,
        "LANDFALL_ALLOW_FAILPOINTS": "1",
        "LANDFALL_FAILPOINTS": failpoints,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    if trace:
        environment["LANDFALL_FAILPOINT_TRACE"] = str(trace)
    return subprocess.run([sys.executable, "-c", program], env=environment, timeout=120, check=False).returncode
