"""Fixtures of the recovery tests: a pool per module, a scene per test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.contract.identity import FilesystemKind
from tests.storage.pools import pool_on
from tests.storage.salvage_scene import Scene

MakeScene = Callable[..., Scene]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pool_on("xfs", tmp_path_factory.mktemp("pool")) as mount_point:
        yield mount_point


@pytest.fixture
def make_scene(pool: Path, tmp_path: Path) -> Iterator[MakeScene]:
    made: list[Scene] = []

    def make(kind: FilesystemKind, *mkfs: str) -> Scene:
        made.append(Scene(pool, kind, tmp_path, mkfs))
        return made[-1]

    yield make
    for scene in made:
        scene.remove()


@pytest.fixture(params=list(FilesystemKind))
def scene(request: pytest.FixtureRequest, make_scene: MakeScene) -> Scene:
    return make_scene(request.param)
