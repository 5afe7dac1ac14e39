"""Roll back: from the landing volume to the very tree that roll forward makes from the base."""

from __future__ import annotations

import logging
import os
import random
from dataclasses import replace

import numpy as np
import pytest

from agent.contract.dmi import FileKind, Owner
from agent.contract.identity import BLOCK_BYTES, FilesystemKind
from agent.contract.messages import Deletions, Salvaged
from agent.recovery.salvage import SalvageJob, Way, undo
from tests.storage import recovery_fixtures
from tests.storage.random_changes import Changes
from tests.storage.recovery_fixtures import MakeScene
from tests.storage.salvage_model import HELD
from tests.storage.salvage_scene import Built, Scene
from tests.storage.seen_tree import Seen, differences, seen
from tests.storage.test_recovery_random import SEEDS, STEPS
from tests.storage.test_recovery_roll_forward import change, fill

make_scene = recovery_fixtures.make_scene
pool = recovery_fixtures.pool
scene = recovery_fixtures.scene

TORN = (b"torn", b"e/new torn", b"safe")


def salvaged(scene: Scene, job: SalvageJob, way: Way) -> tuple[Salvaged, dict[bytes, Seen]]:
    """Salvages one way, looks at the tree, and takes it back."""
    result, _ = scene.salvaged(replace(job, way=way))
    with scene.opened(result.generation) as root:
        tree = seen(root)
    undo(job)
    return result, tree


def both(scene: Scene, job: SalvageJob, caplog: pytest.LogCaptureFixture) -> dict[bytes, Seen]:
    """Salvages both ways and returns the tree, which is one; fails if it was not really rolled back."""
    caplog.set_level(logging.WARNING)
    forward, one = salvaged(scene, job, Way.FORWARD)
    back, other = salvaged(scene, job, Way.BACK)
    assert [record.getMessage() for record in caplog.records] == []
    assert differences(one, other, made=HELD) == []
    assert (back.exceptions, back.verified_files, back.verified_bytes) == (
        forward.exceptions, forward.verified_files, forward.verified_bytes
    )  # fmt: skip
    return other


def torn(built: Built) -> list[int]:
    return [built.pieces(path)[-1] for path in TORN]


@pytest.mark.parametrize("deletions", list(Deletions))
def test_H11_H12_what_is_not_whole_is_the_bases_again(scene: Scene, caplog: pytest.LogCaptureFixture, deletions: Deletions) -> None:
    scene.fill(fill)
    scene.change(change)
    built = scene.build_as_the_agent_does()
    both(scene, scene.job(built, scene.land(built, torn(built)), deletions=deletions), caplog)


def test_whole_files_are_proved_where_they_lie_and_damaged_ones_are_left_out(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.fill(fill)
    scene.change(change)
    built = scene.build_as_the_agent_does()
    arrival = scene.land(built)
    job = scene.job(built, arrival)
    row = built.row(b"appended")
    spoil(scene, job, built.dmi.extents(row)[0][1])
    tree = both(scene, job, caplog)
    with scene.opened(scene.base) as root:
        assert tree[b"appended"].digest == seen(root)[b"appended"].digest


def test_metadata_that_does_not_read_back_is_not_gone_by(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.fill(fill)
    scene.change(change)
    built = scene.build_as_the_agent_does()
    job = scene.job(built, scene.land(built, torn(built)))
    spoil(scene, job, int(built.dmi.op_block[np.flatnonzero(built.dmi.owner == Owner.METADATA)[-1]]))
    salvaged(scene, job, Way.BACK)
    assert "1 pieces of metadata do not read back" in caplog.text
    assert "it is rolled forward" in caplog.text


def test_without_all_metadata_it_is_rolled_forward(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.fill(fill)
    scene.change(change)
    built = scene.build_as_the_agent_does()
    missing = int(np.flatnonzero(built.dmi.owner == Owner.METADATA)[0])
    salvaged(scene, scene.job(built, scene.land(built, [missing])), Way.BACK)
    assert "1 pieces of the filesystem's metadata did not arrive" in caplog.text


def spoil(scene: Scene, job: SalvageJob, block: int) -> None:
    with scene.substrate.writing(job.landing) as device, open(device, "r+b") as file:
        file.seek(block * BLOCK_BYTES + 100)
        file.write(b"rot")
        file.flush()
        os.fsync(file.fileno())


def lost(built: Built, chance: random.Random) -> list[int]:
    """Chooses pieces that did not arrive: some of files, and any of what nobody needs, ext4's journal included."""
    missing = []
    for row in built.judged():
        needs = built.dmi.needs(row).tolist()
        if needs and built.dmi.kind[row] == FileKind.REGULAR and chance.random() < 0.4:
            missing += chance.sample(needs, chance.randrange(1, len(needs) + 1))
    spare = [Owner.FREE] if built.dmi.head.filesystem is FilesystemKind.XFS else [Owner.FREE, Owner.JOURNAL]
    missing += [row for row in np.flatnonzero(np.isin(built.dmi.owner, spare)).tolist() if chance.random() < 0.5]
    return missing


@pytest.mark.parametrize("kind", list(FilesystemKind))
@pytest.mark.parametrize("seed", SEEDS)
def test_I3_I4_I5_both_ways_make_the_same_tree_of_random_changes(
    make_scene: MakeScene, kind: FilesystemKind, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(seed)
    scene = make_scene(kind)
    scene.fill(lambda root: Changes(root, chance, kind).grow(STEPS))
    scene.change(lambda root: Changes(root, chance, kind).change(STEPS))
    built = scene.build_as_the_agent_does()
    arrival = scene.land(built, lost(built, chance))
    whole = built.whole(arrival)
    files = whole if chance.random() < 0.5 else [row for row in whole if chance.random() < 0.8]
    both(scene, scene.job(built, arrival, files=files, deletions=chance.choice(list(Deletions))), caplog)
