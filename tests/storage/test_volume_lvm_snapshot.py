"""The lvm-snapshot substrate: the conformance suite. `make vm-test` runs it in a guest."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.contract.errors import LayoutUnsupported
from agent.system.clock import wait_until
from agent.volume import lvm, mapper
from agent.volume.lvm_snapshot import LvmSnapshotSubstrate
from agent.volume.substrate import Substrate
from tests.storage.conformance import Bench, SubstrateConformance, record
from tests.storage.volume_groups import volume_group

pytestmark = pytest.mark.device_mapper


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with volume_group(tmp_path_factory.mktemp("disk")) as name:
        yield name


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come soon: nobody else is waited for longer than a passing look takes."""
    monkeypatch.setattr(mapper, "_GRACE_S", 0.3)


@pytest.fixture
def bench(group: str) -> Iterator[Bench]:
    yield Bench(
        lambda: LvmSnapshotSubstrate(group), f"from agent.volume.lvm_snapshot import *; substrate = LvmSnapshotSubstrate({group!r})"
    )
    survivor = LvmSnapshotSubstrate(group)
    survivor.recover()
    assert wait_until(lambda: not mapper._devices("LANDFALL-"), 2.0)
    for found in lvm.volumes(survivor.group):
        if not found.origin:  # an origin takes its snapshots with it
            subprocess.run(["lvremove", "-ff", "-y", f"{group}/{found.name}"], check=True, capture_output=True)


class TestLvmSnapshot(SubstrateConformance):
    CRASHES = tuple(crash for crash in SubstrateConformance.CRASHES if crash[1] != "files.before_rename")
    DISCARD = ("blkdiscard", "--zeroout")  # dm-snapshot's origin takes no discards, so nothing of a volume is ever unmapped but by zeros

    @pytest.mark.parametrize(("operation", "point"), CRASHES)
    def test_A11_a_crash_leaves_the_state_before_or_after(self, bench: Bench, tmp_path: Path, operation: str, point: str) -> None:
        super().test_A11_a_crash_leaves_the_state_before_or_after(bench, tmp_path, operation, point)

    def test_E21_sectors_of_4096_bytes(self, substrate: Substrate) -> None:
        with pytest.raises(LayoutUnsupported):
            substrate.create(record(sector_bytes=4096))

    def leftovers(self, substrate: Substrate) -> list[str]:
        assert isinstance(substrate, LvmSnapshotSubstrate)
        return [volume.name for volume in substrate._held().meaningless]
