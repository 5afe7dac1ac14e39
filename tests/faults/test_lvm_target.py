"""NAS 2 on a volume group loses power at any flush: the arrival record never leads the data, and the volume is base or target.

That these tests see a flush that is missing is tested too (E12): with it taken away from the agent, the same replay must find the loss.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from agent.contract.errors import LandfallError
from mgmt.drill.checker.blocks import read_arrival
from tests.faults.disks import GROUP_AT, Disk, command, dmsetup, generation_tag
from tests.faults.lvm_case import LvmCase, landed_as_recorded
from tests.faults.rig import Pair
from tests.faults.write_log import Entry, Flag, entries, replay

pytestmark = pytest.mark.device_mapper

POINTS = 9
VERY_SLOWLY = 128 << 10
LOG_BYTES = 2 << 30


# --- what is taken away from the agent ---


def without_sync() -> None:
    """The landing volume is never flushed."""
    from agent.blockio.device import Device

    Device.sync = lambda self: None  # type: ignore[method-assign]


def without_flush_of_the_group() -> None:
    """What LVM commits is never flushed."""
    from agent.volume import lvm

    lvm._make_durable = lambda of: None


# --- recording and replaying ---


@contextmanager
def log_device(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield a file for a log, and a loop device over it."""
    log = folder / "log"
    with log.open("wb") as file:
        file.truncate(LOG_BYTES)
    loop = command("losetup", "--find", "--show", "--direct-io=on", log).strip()
    try:
        yield log, loop
    finally:
        command("losetup", "--detach", loop)


@dataclass
class Replay:
    """A disk that is brought to later and later moments of a log; what is replayed begins at ``begins_at`` of it."""

    disk: Disk
    log: Path
    entries: list[Entry]
    image: Path
    begins_at: int = 0
    done: int = 0

    def __post_init__(self) -> None:
        subprocess.run(["cp", "--reflink=always", self.disk.image.with_suffix(".origin"), self.image], check=True)

    @contextmanager
    def after(self, number: int) -> Iterator[None]:
        """Let the disk be as a power loss after entry ``number`` leaves it, attached."""
        replay(self.log, self.entries[self.done : number + 1], self.image, self.begins_at)
        self.done = number + 1
        subprocess.run(["cp", "--reflink=always", self.image, self.disk.image], check=True)
        self.disk.attach()
        try:
            yield
        finally:
            self.disk.detach()


def state_after_power_loss(case: LvmCase, disk: Disk) -> tuple[int, bool]:
    """Return how many pieces are recorded as arrived, all of which are proved to stand there, and whether the target is committed."""
    tags = ",".join(disk.tags().values())
    assert disk.digest(case.base) == case.digests[case.base], "the base is not what it was"
    committed = generation_tag(case.target) in tags
    if committed:
        assert disk.digest(case.target) == case.digests[case.target], "what is committed is not the target"
        folder = disk.state / "state" / "transfers" / str(case.transfer)
        return (int(read_arrival(folder / "dmi", folder / "arrival").arrived.sum()) if (folder / "arrival").exists() else 0), True
    return landed_as_recorded(case, disk), False


def power_lost_at_flushes(case: LvmCase, pair: Pair, folder: Path, points: int) -> list[tuple[int, bool]]:
    """Send under a log of NAS 2's whole disk; return what is there after a power loss at each of so many flushes, in order."""
    disk = case.disks[1]
    disk.detach()
    subprocess.run(["cp", "--reflink=always", disk.image.with_suffix(".origin"), disk.image], check=True)
    with log_device(folder) as (log, loop):
        disk.attach(mounted=False)
        disk.put(f"0 {disk.sectors} log-writes {disk.loop} {loop}")
        command("mount", f"/dev/mapper/{disk.name}-state", disk.state)
        pair.nas1.start()
        pair.nas2.start()
        case.send(pair, rate_limit_bytes_s=VERY_SLOWLY)
        pair.nas1.kill()
        pair.nas2.kill()
        dmsetup("message", disk.name, "0", "mark", "end")
        disk.detach()
    logged = entries(log)
    flushes = [number for number, entry in enumerate(logged) if entry.settles]
    assert len(flushes) > points
    replayed, seen = Replay(disk, log, logged, folder / "replayed"), []
    for at in np.linspace(len(flushes) // 4, len(flushes) - 1, points, dtype=int).tolist():
        with replayed.after(flushes[at]):
            seen.append(state_after_power_loss(case, disk))
    return seen


@pytest.mark.timeout(1200)
def test_B4_B6_B7_E12_after_power_loss_at_a_flush_the_record_does_not_lead_the_data(
    thin_case: LvmCase, thin_pair: Pair, tmp_path: Path
) -> None:
    seen = power_lost_at_flushes(thin_case, thin_pair, tmp_path, POINTS)
    assert [had for had, committed in seen if not committed] == sorted(had for had, committed in seen if not committed)
    assert any(had and not committed for had, committed in seen), f"no power loss fell into the middle: {seen}"
    assert seen[-1][1], "what was acknowledged is lost"


@pytest.mark.timeout(1200)
def test_E12_without_our_flush_of_the_landing_volume_the_replay_finds_what_is_lost(
    thin_case: LvmCase, thin_pair: Pair, tmp_path: Path
) -> None:
    """On classic snapshots there is nothing to find: the kernel flushes each new block of a COW device before it says it is written."""
    thin_pair.nas2.sabotage = without_sync
    with pytest.raises(AssertionError, match="recorded, but not there"):
        power_lost_at_flushes(thin_case, thin_pair, tmp_path, 3 * POINTS)


def acknowledged_on_a_disk_of_its_own(case: LvmCase, pair: Pair, folder: Path) -> None:
    """Assert that the target survives NAS 2's power loss right after its acknowledgement, no flush of other files helping it."""
    disk = case.disks[1]
    pair.nas1.start()
    with log_device(folder) as (log, loop):
        disk.log_group(loop)
        pair.nas2.start_armed("dst.before_ack=kill")
        with pytest.raises((LandfallError, OSError)):
            case.send(pair)
        pair.nas2.died_by("dst.before_ack=kill")
        dmsetup("message", f"{disk.name}-group", "0", "mark", "acknowledged")
        pair.nas1.kill()
        disk.detach()
    logged = entries(log)
    marked = next(number for number, entry in enumerate(logged) if entry.flags & Flag.MARK)
    with Replay(disk, log, logged, folder / "replayed", GROUP_AT).after(marked):
        assert generation_tag(case.target) in ",".join(disk.tags().values()), "what is acknowledged is lost"
        assert disk.digest(case.target) == case.digests[case.target]


@pytest.mark.timeout(600)
def test_E12_what_is_acknowledged_is_on_the_disk(thin_case: LvmCase, thin_pair: Pair, tmp_path: Path) -> None:
    acknowledged_on_a_disk_of_its_own(thin_case, thin_pair, tmp_path)


@pytest.mark.timeout(600)
def test_E12_without_our_flush_of_the_groups_metadata_the_replay_finds_that_the_commit_is_lost(
    thin_case: LvmCase, thin_pair: Pair, tmp_path: Path
) -> None:
    thin_pair.nas2.sabotage = without_flush_of_the_group
    with pytest.raises(AssertionError, match="what is acknowledged is lost"):
        acknowledged_on_a_disk_of_its_own(thin_case, thin_pair, tmp_path)
