"""Random trees, random changes, a random part of them arrived: the result is what the model says, and the filesystem is sound."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from agent.contract.dmi import FileKind
from agent.contract.identity import FilesystemKind
from agent.contract.messages import Deletions
from tests.storage import recovery_fixtures
from tests.storage.random_changes import Changes
from tests.storage.recovery_fixtures import MakeScene
from tests.storage.salvage_model import compare, expected
from tests.storage.salvage_scene import Built, Scene

make_scene = recovery_fixtures.make_scene
pool = recovery_fixtures.pool

FIRST = int(os.environ.get("LANDFALL_SEED", "0"))
STEPS = int(os.environ.get("LANDFALL_STEPS", "60"))
SEEDS = range(FIRST, FIRST + int(os.environ.get("LANDFALL_SEEDS", "4")))


def torn(built: Built, chance: random.Random) -> list[int]:
    """Chooses files, and of each a piece that does not arrive."""
    missing = []
    for row in built.judged():
        needs = built.dmi.needs(row).tolist()
        if needs and built.dmi.kind[row] == FileKind.REGULAR and chance.random() < 0.4:
            missing.append(chance.choice(needs))
    return missing


@pytest.mark.parametrize("kind", list(FilesystemKind))
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("builder", [Scene.build, Scene.build_as_the_agent_does])
def test_I3_I4_I5_a_random_part_of_random_changes(
    make_scene: MakeScene, kind: FilesystemKind, seed: int, builder: Callable[[Scene], Built]
) -> None:
    chance = random.Random(seed)
    scene = make_scene(kind)
    from_nothing = seed % 4 == 3
    (scene.change if from_nothing else scene.fill)(lambda root: Changes(root, chance, kind).grow(STEPS))
    if not from_nothing:
        scene.change(lambda root: Changes(root, chance, kind).change(STEPS))
    built = builder(scene)
    arrival = scene.land(built, torn(built, chance))
    deletions = chance.choice(list(Deletions))
    job = scene.job(built, arrival, deletions=deletions)
    _, tree = scene.salvaged(job)
    whole = {identity for identity, row in built.rows.items() if row in job.instruction.files}
    hold = deletions is Deletions.HOLD and not job.instruction.complete
    assert compare(tree, expected(built.base, built.target, whole, hold=hold)) == []
