"""The reflink substrate on XFS and on btrfs: the conformance suite, and what is particular to image files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from agent.volume.reflink import ReflinkSubstrate
from agent.volume.substrate import Substrate
from tests.storage.conformance import Bench, SubstrateConformance, pool_on


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def mounted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pool_on(request.param, tmp_path_factory.mktemp("pool")) as mount_point:
        yield mount_point


class TestReflink(SubstrateConformance):
    @pytest.fixture
    def bench(self, mounted: Path) -> Bench:
        pool = mounted / uuid4().hex
        ReflinkSubstrate.initialise(pool)
        opener = f"from pathlib import *; from agent.volume.reflink import *; substrate = ReflinkSubstrate(Path({str(pool)!r}))"
        return Bench(lambda: ReflinkSubstrate(pool), opener)

    def leftovers(self, substrate: Substrate) -> list[str]:
        assert isinstance(substrate, ReflinkSubstrate)
        found = [path for path in substrate.pool.path.rglob(".*") if path.name.startswith(".new-")]
        for image in substrate.pool.volumes.glob("*/generations/*.img"):
            if not image.with_suffix(".json").exists():
                found.append(image)
        for record in substrate.pool.volumes.glob("*/generations/*.json"):
            if not record.with_suffix(".img").exists():
                found.append(record)
        return [str(path) for path in found]
