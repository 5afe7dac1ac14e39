"""The lvm-thin substrate: the conformance suite, and what is particular to thin volumes. `make vm-test` runs it in a guest."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.contract.errors import LayoutUnsupported
from agent.system.clock import wait_until
from agent.volume import mapper
from agent.volume.lvm_thin import LvmThinSubstrate
from agent.volume.substrate import Substrate
from tests.storage.conformance import Bench, SubstrateConformance, record
from tests.storage.volume_groups import volume_group

pytestmark = pytest.mark.device_mapper


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with volume_group(tmp_path_factory.mktemp("disk")) as name:
        LvmThinSubstrate.initialise(name)
        yield name


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come soon: nobody else is waited for longer than a passing look takes."""
    monkeypatch.setattr(mapper, "_GRACE_S", 1.0)


@pytest.fixture
def bench(group: str) -> Iterator[Bench]:
    yield Bench(lambda: LvmThinSubstrate(group), f"from agent.volume.lvm_thin import *; substrate = LvmThinSubstrate({group!r})")
    survivor = LvmThinSubstrate(group)
    survivor.recover()
    assert wait_until(lambda: not mapper._devices("LANDFALL-"), 30.0)
    subprocess.run(["lvremove", "-ff", "-y", "-S", f"pool_lv_uuid={survivor.pool_volume.uuid}", group], check=True, capture_output=True)


def unaccounted(substrate: LvmThinSubstrate) -> list[str]:
    """Thin volumes that mean nothing, and a metadata snapshot that nobody released."""
    held = [volume.name for volume in substrate._held().meaningless]
    return held + (["metadata snapshot"] if mapper.pool_status(substrate._pool()).held else [])


class TestLvmThin(SubstrateConformance):
    CRASHES = tuple(crash for crash in SubstrateConformance.CRASHES if crash[1] != "files.before_rename")

    @pytest.mark.parametrize(("operation", "point"), CRASHES)
    def test_A11_a_crash_leaves_the_state_before_or_after(self, bench: Bench, tmp_path: Path, operation: str, point: str) -> None:
        super().test_A11_a_crash_leaves_the_state_before_or_after(bench, tmp_path, operation, point)

    def test_E21_sectors_of_4096_bytes(self, substrate: Substrate) -> None:
        with pytest.raises(LayoutUnsupported):
            substrate.create(record(sector_bytes=4096))

    def leftovers(self, substrate: Substrate) -> list[str]:
        assert isinstance(substrate, LvmThinSubstrate)
        return unaccounted(substrate)
