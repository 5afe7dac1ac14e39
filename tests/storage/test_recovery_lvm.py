"""A differential on each kind of LVM snapshots, landed on the same and salvaged there, in part and whole. `make vm-test` runs it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from agent.contract.identity import BLOCK_BYTES, FilesystemKind
from agent.recovery.salvage import Way
from agent.volume.lvm_snapshot import LvmSnapshotSubstrate
from agent.volume.lvm_thin import LvmThinSubstrate
from agent.volume.reflink import ReflinkSubstrate
from tests.storage.salvage_scene import Scene
from tests.storage.volume_groups import volume_group

pytestmark = pytest.mark.device_mapper


class ThinScene(Scene):
    """A scene on a volume group, whose name stands for the pool's path."""

    @staticmethod
    def substrate_on(pool: Path) -> ReflinkSubstrate:
        return cast(ReflinkSubstrate, LvmThinSubstrate.initialise(pool.name))

    def bytes_of(self, generation: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        with self.substrate.reading(generation.id) as device:
            return np.fromfile(device, np.uint8).reshape(-1, BLOCK_BYTES)


class ClassicScene(ThinScene):
    """The same on classic snapshots."""

    @staticmethod
    def substrate_on(pool: Path) -> ReflinkSubstrate:
        return cast(ReflinkSubstrate, LvmSnapshotSubstrate(pool.name))


@pytest.fixture(
    params=[(kind, on) for on in (ThinScene, ClassicScene) for kind in FilesystemKind], ids=lambda pair: f"{pair[0]}-{pair[1].__name__}"
)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    kind, on = request.param
    with volume_group(tmp_path, size_bytes=2 << 30) as name:
        made = on(Path(name), kind, tmp_path)
        yield made
        made.remove()


def fill(root: Path) -> None:
    (root / "folder").mkdir()
    for number in range(40):
        (root / "folder" / f"f{number}").write_bytes(os.urandom(3 * BLOCK_BYTES + number))


def change(root: Path) -> None:
    for number in range(0, 40, 3):
        with open(root / "folder" / f"f{number}", "r+b") as file:
            os.pwrite(file.fileno(), os.urandom(100), BLOCK_BYTES + 5)
    (root / "new").write_bytes(os.urandom(20 * BLOCK_BYTES))
    (root / "folder" / "f1").unlink()
    (root / "folder" / "f2").rename(root / "moved")


@pytest.mark.parametrize("way", list(Way))
def test_what_arrived_whole_is_salvaged_and_what_did_not_stays_as_it_was(scene: Scene, way: Way, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    scene.fill(fill)
    scene.change(change)
    built = scene.build_as_the_agent_does()
    lost = (b"new", b"folder/f3")
    job = scene.job(built, scene.land(built, [built.pieces(path)[-1] for path in lost]))
    result, tree = scene.salvaged(replace(job, way=way))
    assert "rolling back failed" not in caplog.text
    assert ("cannot clone a landing volume" in caplog.text) is (way is Way.BACK and not scene.substrate.branches)
    assert result.exceptions == ()
    assert b"new" not in tree.paths
    assert tree.node(b"folder/f3").content == built.base.node(b"folder/f3").content
    assert tree.node(b"folder/f6") == built.target.node(b"folder/f6")
    assert tree.node(b"moved").content == built.target.node(b"moved").content
    unchanged = [b"folder/f%d" % number for number in range(40) if number % 3 and number > 2]
    assert [path for path in unchanged if tree.node(path) != built.base.node(path)] == []


def test_everything_that_arrived_makes_the_target(scene: Scene) -> None:
    scene.fill(fill)
    scene.change(change)
    built = scene.build_as_the_agent_does()
    result, tree = scene.salvaged(scene.job(built, scene.land(built)))
    assert result.exceptions == ()
    assert tree.facts() == built.target.facts()
