"""Roll forward on real filesystems: what arrived whole is the target's, everything else is the base's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.contract.messages import Deletions
from tests.storage import recovery_fixtures
from tests.storage.salvage_scene import Scene

make_scene = recovery_fixtures.make_scene
pool = recovery_fixtures.pool
scene = recovery_fixtures.scene


def fill(root: Path) -> None:
    for name in ("kept", "rewritten", "appended", "cut", "gone", "renamed", "swap1", "swap2", "safe", "torn"):
        (root / name).write_bytes(os.urandom(20_000))
    (root / "d").mkdir()
    (root / "d/inner").write_bytes(b"inner")
    os.link(root / "kept", root / "d/link")


def change(root: Path) -> None:
    with open(root / "rewritten", "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(4096))
    with open(root / "appended", "ab") as file:
        file.write(os.urandom(10_000))
    os.truncate(root / "cut", 5_001)
    (root / "gone").unlink()
    (root / "renamed").rename(root / "d/renamed now")
    (root / "swap1").rename(root / "tmp")
    (root / "swap2").rename(root / "swap1")
    (root / "tmp").rename(root / "swap2")
    (root / ".safe.new").write_bytes(os.urandom(30_000))
    (root / ".safe.new").rename(root / "safe")
    (root / "torn").write_bytes(os.urandom(40_000))
    (root / "new").write_bytes(os.urandom(50_001))
    (root / "e").mkdir(mode=0o750)
    (root / "e/new torn").write_bytes(os.urandom(50_000))
    os.symlink("nowhere", root / "e/symlink")
    (root / "d").rename(root / "e/d")


def test_everything_arrived_makes_the_target(scene: Scene) -> None:
    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    result, tree = scene.salvaged(scene.job(built, scene.land(built)))
    assert result.exceptions == ()
    assert tree.facts() == built.target.facts()


@pytest.mark.parametrize("deletions", list(Deletions))
def test_H11_H12_a_part_that_arrived_is_recovered_and_the_rest_is_the_bases(scene: Scene, deletions: Deletions) -> None:
    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    missing = [built.pieces(path)[-1] for path in (b"torn", b"e/new torn", b"safe")]
    _, tree = scene.salvaged(scene.job(built, scene.land(built, missing), deletions=deletions))
    wanted = built.target.facts()
    del wanted[b"e/new torn"]
    wanted[b"torn"], wanted[b"safe"] = built.base.node(b"torn"), built.base.node(b"safe")
    if deletions is Deletions.HOLD:
        wanted[b"gone"] = built.base.node(b"gone")
    assert tree.facts() == wanted
