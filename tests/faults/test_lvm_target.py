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
from tests.faults.lvm_case import LvmCase, landed_as_recorded, meanwhile
from tests.faults.rig import Pair
from tests.faults.write_log import Entry, Flag, entries, replay

pytestmark = pytest.mark.device_mapper

POINTS = 9
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


@dataclass(frozen=True)
class State:
    """What a power loss leaves: how many pieces are recorded as arrived, all of which are proved to stand there; whether the target is
    committed, and, on classic snapshots, not merged yet."""

    had: int
    committed: bool
    merges: bool


def state_after_power_loss(case: LvmCase, disk: Disk) -> State:
    """Return what there is, after proving that it is the base, and the target if that is committed."""
    tags = ",".join(disk.tags().values())
    merges = "landfall/becoming/" in tags
    assert disk.digest(case.base) == case.digests[case.base], "the base is not what it was"
    committed = generation_tag(case.target) in tags
    if committed:
        assert disk.digest(case.target) == case.digests[case.target], "what is committed is not the target"
        folder = disk.state / "state" / "transfers" / str(case.transfer)
        had = int(read_arrival(folder / "dmi", folder / "arrival").arrived.sum()) if (folder / "arrival").exists() else 0
        return State(had, committed, merges)
    return State(landed_as_recorded(case, disk), committed, merges)


def power_lost_at_flushes(case: LvmCase, pair: Pair, folder: Path, points: int) -> list[State]:
    """Send under a log of NAS 2's whole disk; return what is there after a power loss at each of so many flushes, in order.

    Where that is amid a merge, the agent is started on it too, which ends it.
    """
    disk = case.disks[1]
    disk.detach()
    subprocess.run(["cp", "--reflink=always", disk.image.with_suffix(".origin"), disk.image], check=True)
    with log_device(folder) as (log, loop):
        disk.attach(mounted=False)
        disk.put(f"0 {disk.sectors} log-writes {disk.loop} {loop}")
        command("mount", f"/dev/mapper/{disk.name}-state", disk.state)
        pair.nas1.start()
        pair.nas2.start_armed("substrate.commit.before_rename=stop")
        error = meanwhile(case, pair, pair.nas2, lambda: mark(disk.name))
        assert error is None, error
        pair.nas1.kill()
        pair.nas2.kill()
        mark(disk.name)
        disk.detach()
    logged = entries(log)
    all_there = next(number for number, entry in enumerate(logged) if entry.flags & Flag.MARK)
    flushes = [number for number, entry in enumerate(logged) if entry.settles]
    landing, committing = ([at for at in flushes if (at < all_there) is before] for before in (True, False))
    chosen = [*_spread(landing[len(landing) // 4 :], points * 2 // 3), *_spread(committing, points // 3)]
    replayed, seen = Replay(disk, log, logged, folder / "replayed"), []
    for at in chosen:
        with replayed.after(at):
            seen.append(state_after_power_loss(case, disk))
            if seen[-1].merges:
                redone(case, pair)
    return seen


def mark(device: str) -> None:
    """Mark in the log of a device what has been written to it so far."""
    dmsetup("message", device, "0", "mark", "so-far")


def _spread(numbers: list[int], count: int) -> list[int]:
    """Return so many of the numbers, evenly, the last one among them."""
    return [numbers[at] for at in sorted({*np.linspace(0, len(numbers) - 1, count, dtype=int).tolist()})]


def redone(case: LvmCase, pair: Pair) -> None:
    """Start NAS 2, and assert that it has the target, with no merge left to do."""
    disk = case.disks[1]
    pair.nas2.start()
    assert case.newest(pair.nas2) == case.target
    pair.nas2.kill()
    assert not disk.merging()
    assert "landfall/becoming/" not in ",".join(disk.tags().values())
    for generation in (case.base, case.target):
        assert disk.digest(generation) == case.digests[generation]


@pytest.mark.timeout(1200)
def test_B4_B6_B7_E12_after_power_loss_at_a_flush_the_record_does_not_lead_the_data(
    group_case: LvmCase, group_pair: Pair, tmp_path: Path
) -> None:
    seen = power_lost_at_flushes(group_case, group_pair, tmp_path, POINTS)
    before = [state.had for state in seen if not state.committed]
    assert before == sorted(before)
    assert any(before), f"no power loss fell into the middle: {seen}"
    assert seen[-1].committed, "what was acknowledged is lost"
    if group_case.substrate == "lvm-snapshot":
        assert any(state.merges for state in seen), f"no power loss fell into the merge: {seen}"


MERGE = ("substrate.merge.kept=kill", "substrate.merge.journalled=kill", "substrate.merge.merged=kill", "substrate.merge.after=kill:3")
"""The last is also passed at the start of the agent, and when the landing volume is begun."""


@pytest.mark.parametrize("point", MERGE)
def test_B6_a_target_that_dies_while_it_merges_what_it_committed_ends_that_and_says_committed(
    snapshot_case: LvmCase, snapshot_pair: Pair, point: str
) -> None:
    case, pair = snapshot_case, snapshot_pair
    pair.nas1.start()
    pair.nas2.start_armed(point)
    with pytest.raises((LandfallError, OSError)):
        case.send(pair)
    pair.nas2.died_by(point)
    for generation in (case.base, case.target):
        assert case.disks[1].digest(generation) == case.digests[generation], "what is read before the restart"
    redone(case, pair)
    pair.nas2.start()
    assert case.converge(pair).pieces_sent == 0


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
        mark(f"{disk.name}-group")
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
