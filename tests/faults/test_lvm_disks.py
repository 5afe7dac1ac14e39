"""Disks below volume groups that fail: no byte is invented, nothing is trusted that was not made durable, and the next try converges."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from agent.contract.errors import DeviceBusy, DeviceFailed, GenerationInvalid, LandfallError
from agent.contract.frames import Batch
from agent.transfer.landing import Recorded
from tests.faults.disks import CHUNK_SECTORS, command, create, dmsetup, remove
from tests.faults.lvm_case import LIMIT_S, MARK, VERY_SLOWLY, LvmCase, landed_as_recorded, meanwhile, settled
from tests.faults.rig import MIB, Pair

pytestmark = pytest.mark.device_mapper


def one_batch_first() -> None:
    """What comes first is recorded before anything else is written, however slow the machine."""
    from agent.transfer.landing import Landing

    first, recorded, take, record = threading.Lock(), threading.Event(), Landing.take, Landing.record

    def take_in_turn(self: Landing, batch: Batch, buffer: memoryview) -> None:
        if not first.acquire(blocking=False):
            assert recorded.wait(LIMIT_S)
        take(self, batch, buffer)

    def record_and_say(self: Landing, timeout_s: float) -> Recorded | None:
        done = record(self, timeout_s)
        if done is not None:
            recorded.set()
        return done

    Landing.take, Landing.record = take_in_turn, record_and_say  # type: ignore[method-assign]


def running(pair: Pair) -> Pair:
    pair.nas1.start()
    pair.nas2.start()
    return pair


def refused(case: LvmCase, pair: Pair, **options: object) -> LandfallError:
    """Send, and return the error in which it ends."""
    with pytest.raises(LandfallError) as ended:
        case.send(pair, **options)
    return ended.value


def test_E1_a_source_that_cannot_be_read_is_said_with_its_place_and_no_zeros_are_sent(group_case: LvmCase, group_pair: Pair) -> None:
    disk = group_case.disks[0]
    places = disk.places_of(MARK)
    disk.put(f"0 {disk.sectors} dust {disk.loop} 0 512")
    for place in places[len(places) // 2 :][:2]:
        dmsetup("message", disk.name, "0", "addbadblock", str(place))
    dmsetup("message", disk.name, "0", "enable")
    pair = running(group_pair)
    error = refused(group_case, pair)
    assert isinstance(error, DeviceFailed), error
    assert "Input/output error" in str(error)
    assert any(word.isdigit() for word in str(error).replace(",", " ").split()), f"the place is not named: {error}"
    settled(group_case, pair)
    landed_as_recorded(group_case, group_case.disks[1])
    group_case.untouched(pair)
    disk.heal()
    group_case.converge(pair)


def test_E2_what_cannot_be_written_is_not_acknowledged(group_case: LvmCase, group_pair: Pair) -> None:
    """A classic snapshot that cannot be written is given up by the kernel, so there everything comes again."""
    disk, pair = group_case.disks[1], group_pair
    pair.nas1.start()
    pair.nas2.sabotage = one_batch_first
    pair.nas2.start_armed("dst.after_record=stop")
    error = meanwhile(group_case, pair, pair.nas2, lambda: disk.put(disk.with_parts(disk.landing_room(), "error")))
    assert isinstance(error, DeviceFailed), error
    assert "writing" in str(error)
    assert "Input/output error" in str(error)
    settled(group_case, pair)
    had = group_case.arrived(pair)
    assert had > 0
    group_case.untouched(pair)
    if group_case.substrate == "lvm-thin":
        assert landed_as_recorded(group_case, disk) == had
    disk.heal()
    sent = group_case.converge(pair)
    assert sent.pieces_skipped == (had if group_case.substrate == "lvm-thin" else 0)


def test_E3_after_a_flush_that_failed_nothing_since_the_last_one_is_trusted(group_case: LvmCase, group_pair: Pair) -> None:
    """The thin pool goes back to its last good commit and takes no writes, a sound disk or not, until the agent is started anew.

    Whichever of the kernel's own flushes fails first, a classic snapshot is given up by it or not; if it is, everything comes again.
    """
    disk, pair = group_case.disks[1], group_pair
    pair.nas1.start()
    pair.nas2.sabotage = one_batch_first
    pair.nas2.start_armed("dst.after_record=stop")
    error = meanwhile(group_case, pair, pair.nas2, disk.fail_flushes)
    assert isinstance(error, DeviceFailed | GenerationInvalid), error
    settled(group_case, pair)
    had, stands = group_case.arrived(pair), disk.landing_stands()
    assert had > 0
    refused(group_case, pair)
    settled(group_case, pair)
    assert group_case.arrived(pair) == (had if stands else 0)
    disk.heal_flushes()
    if group_case.substrate == "lvm-thin":
        assert stands
        error = refused(group_case, pair)
        assert isinstance(error, DeviceFailed), error
        assert "takes no writes" in str(error)
        assert "start the agent anew" in str(error)
        settled(group_case, pair)
        assert group_case.arrived(pair) == had
    pair.nas2.kill()
    pair.nas2.start()
    if stands:
        assert landed_as_recorded(group_case, disk) == had
    group_case.untouched(pair)
    assert group_case.converge(pair).pieces_skipped == (had if stands else 0)


def test_E4_a_base_that_cannot_be_read_commits_nothing_and_is_said(thin_case: LvmCase, thin_pair: Pair) -> None:
    disk = thin_case.disks[1]
    pair = running(thin_pair)
    disk.put(disk.in_pool_data("error"))
    error = refused(thin_case, pair)
    assert "Input/output error" in str(error) or "read" in str(error), error
    disk.heal()
    settled(thin_case, pair)
    thin_case.untouched(pair)
    thin_case.converge(pair)


def test_E11_writes_that_the_disk_dropped_are_found_before_the_commit(thin_case: LvmCase, thin_pair: Pair) -> None:
    disk, pair = thin_case.disks[1], thin_pair
    pair.nas1.start()
    pair.nas2.start_armed("dst.before_write=stop:2")
    dropping = disk.in_pool_data("flakey {disk} 0 3600 1 drop_writes")
    error = meanwhile(thin_case, pair, pair.nas2, lambda: disk.put(dropping))
    assert error is not None, "a lying disk was believed"
    assert "read back" in str(error), error
    disk.heal()
    settled(thin_case, pair)
    thin_case.untouched(pair)
    thin_case.converge(pair)


def test_E16_a_disk_that_vanishes_is_an_error_and_no_file_takes_its_place(group_case: LvmCase, group_pair: Pair) -> None:
    disk, pair = group_case.disks[0], group_pair
    before = set(Path("/dev").iterdir()) | set(Path("/dev/mapper").iterdir())
    pair.nas2.start()
    pair.nas1.start_armed("src.before_batch=stop:2")
    error = meanwhile(group_case, pair, pair.nas1, lambda: disk.put(f"0 {disk.sectors} error"))
    assert isinstance(error, DeviceFailed), error
    pair.nas1.kill()
    made = (set(Path("/dev").iterdir()) | set(Path("/dev/mapper").iterdir())) - before
    assert not [path for path in made if stat.S_ISREG(path.lstat().st_mode)]
    settled(group_case, pair)
    group_case.untouched(pair)
    disk.detach()
    disk.attach()
    pair.nas1.start()
    group_case.converge(pair)


def test_E19_a_landing_volume_that_somebody_has_opened_is_not_written(group_case: LvmCase, group_pair: Pair) -> None:
    disk, pair = group_case.disks[1], group_pair
    pair.nas1.start()
    pair.nas2.start_armed("dst.after_record=kill")
    with pytest.raises((OSError, LandfallError)):
        group_case.send(pair, rate_limit_bytes_s=VERY_SLOWLY)
    pair.nas2.died_by("dst.after_record=kill")
    pair.nas2.start()
    had = group_case.arrived(pair)
    assert had > 0
    with disk.device("landfall/workspace/1/") as device:
        device_fd = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            before = device.read_bytes()
            assert isinstance(refused(group_case, pair), DeviceBusy)
            settled(group_case, pair)
            os.posix_fadvise(device_fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert device.read_bytes() == before
        finally:
            os.close(device_fd)
    assert group_case.converge(pair).pieces_skipped == had


def test_E24_a_disk_that_takes_seconds_is_no_death(group_case: LvmCase, group_pair: Pair) -> None:
    """Only the next little that is written to the landing volume is slow: each of its writes takes longer than silence is borne."""
    disk, pair = group_case.disks[1], group_pair
    pair.nas1.start()
    pair.nas2.start_armed("dst.after_prepare=stop")

    def slow_down() -> None:
        parts = [(first, min(length, 2 * CHUNK_SECTORS)) for first, length in disk.landing_room()]
        disk.put(disk.with_parts(parts, "delay {disk} 0 {disk} 7000 {disk} 0"))

    begun = time.monotonic()
    assert meanwhile(group_case, pair, pair.nas2, slow_down, silence_limit_s=5.0) is None
    assert time.monotonic() - begun > 7.0, "the disk was not slow"
    disk.heal()
    assert group_case.converge(pair).pieces_sent == 0


def test_E6_a_pool_that_runs_full_ends_the_transfer_and_the_base_stays(thin_case: LvmCase, thin_pair: Pair) -> None:
    """The rest of NAS 2's pool is taken by somebody else; the kernel's default would be to let writers hang for a minute."""
    disk, pair = thin_case.disks[1], running(thin_pair)
    pool = next(name for name, tags in disk.tags().items() if tags == "landfall/pool/1")
    taken = f"{disk.group}/glutton"
    disk.lvm("lvcreate", "-V", f"{disk.pool_data()[1] * 512 + 64 * MIB}b", "--thinpool", pool, "-n", "glutton", disk.group)
    try:
        with open(f"/dev/{taken}", "r+b", buffering=0) as file, pytest.raises(OSError, match=r"No space|Input/output"):
            _fill(file.fileno())
        begun = time.monotonic()
        error = refused(thin_case, pair)
        assert time.monotonic() - begun < 45.0
        assert "room" in str(error) or "full" in str(error) or "space" in str(error), error
        thin_case.untouched(pair)
    finally:
        disk.lvm("lvremove", "--yes", "--force", taken)
    thin_case.converge(pair)


def _fill(device_fd: int) -> None:
    for at in range(0, 1 << 40, 4 * MIB):
        os.pwrite(device_fd, b"\x55" * (4 * MIB), at)
        os.fsync(device_fd)


def test_E22_two_disks_that_both_say_they_are_the_group_are_refused(thin_case: LvmCase, thin_pair: Pair, tmp_path: Path) -> None:
    disk, pair = thin_case.disks[1], thin_pair
    twin = tmp_path / "twin.img"
    command("cp", "--reflink=always", disk.image, twin)
    loop = command("losetup", "--find", "--show", twin).strip()
    try:
        create(f"{disk.name}-twin", f"0 {disk.sectors - 131072} linear {loop} 131072")
        text = (disk.settings / "lvm.conf").read_text()
        (disk.settings / "lvm.conf").write_text(text.replace('-group$|"', '-(group|twin)$|"'))
        before = disk.image.read_bytes()[131072 * 512 :]
        with pytest.raises(AssertionError, match=r"[Dd]uplicate|two disks"):
            pair.nas2.start()
        assert disk.image.read_bytes()[131072 * 512 :] == before, "something was written"
        (disk.settings / "lvm.conf").write_text(text)
    finally:
        remove(f"{disk.name}-twin")
        command("losetup", "--detach", loop)
    thin_case.converge(running(pair))
