"""Disks below volume groups that fail: no byte is invented, nothing is trusted that was not made durable, and the next try converges."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from agent.contract import messages as m
from agent.contract.errors import DeviceFailed, LandfallError
from agent.system.clock import wait_until
from mgmt.drill.checker.blocks import read_arrival
from tests.faults.disks import Disk, command, create, dmsetup, remove
from tests.faults.rig import MIB, NodeProcess, Pair
from tests.faults.thin import MARK, ThinCase

pytestmark = pytest.mark.device_mapper

BLOCK = 4096
CHUNK_SECTORS = 128  # of the pool
LIMIT_S = 120.0
VERY_SLOWLY = 128 << 10  # bytes in a second: pieces come in several groups


def running(pair: Pair) -> Pair:
    pair.nas1.start()
    pair.nas2.start()
    return pair


def refused(case: ThinCase, pair: Pair, **options: object) -> LandfallError:
    """Send, and return the error in which it ends."""
    with pytest.raises(LandfallError) as ended:
        case.send(pair, **options)
    return ended.value


def meanwhile(case: ThinCase, pair: Pair, node: NodeProcess, act: Callable[[], None]) -> LandfallError | None:
    """Send; once ``node`` stands still at its failpoint, act and let it go on. Return the error in which the transfer ends."""

    def send() -> LandfallError | None:
        try:
            case.send(pair, rate_limit_bytes_s=VERY_SLOWLY, silence_limit_s=60.0)
        except LandfallError as error:
            return error
        return None

    with ThreadPoolExecutor(1) as executor:
        ended: Future[LandfallError | None] = executor.submit(send)
        try:
            assert wait_until(lambda: node.stopped() or ended.done(), LIMIT_S)
            assert not ended.done(), ended.result()
            act()
        finally:
            node.go_on()
        return ended.result(timeout=LIMIT_S)


def settled(case: ThinCase, pair: Pair) -> None:
    """Wait until NAS 2's reception has ended."""

    def ended() -> bool:
        known: m.Transfers = pair.nas2.ask(m.ListTransfers())
        return all(facts.state is not m.TransferState.RUNNING for facts in known.transfers if facts.id == case.transfer)

    assert wait_until(ended, LIMIT_S)


def record_never_leads(case: ThinCase, disk: Disk) -> int:
    """Assert that every piece recorded as arrived stands on the landing volume, by plain reads; return how many those are."""
    folder = disk.state / "state" / "transfers" / str(case.transfer)
    if not (folder / "arrival").exists():
        return 0
    arrival = read_arrival(folder / "dmi", folder / "arrival")
    if not arrival.arrived.any():
        return 0
    landed = np.frombuffer(disk.content(f"landfall/workspace/1/{case.volume}/{case.transfer}/landing"), np.uint8).reshape(-1, BLOCK)
    wanted = np.frombuffer(case.target_bytes, np.uint8).reshape(-1, BLOCK)
    for first, count in zip(arrival.first[arrival.arrived].tolist(), arrival.count[arrival.arrived].tolist(), strict=True):
        assert np.array_equal(landed[first : first + count], wanted[first : first + count]), f"recorded, but not there: block {first}"
    return int(arrival.arrived.sum())


def test_E1_a_source_that_cannot_be_read_is_said_with_its_place_and_no_zeros_are_sent(thin_case: ThinCase, thin_pair: Pair) -> None:
    disk = thin_case.disks[0]
    places = disk.places_of(MARK)
    disk.put(f"0 {disk.sectors} dust {disk.loop} 0 512")
    for place in places[len(places) // 2 :][:2]:
        dmsetup("message", disk.name, "0", "addbadblock", str(place))
    dmsetup("message", disk.name, "0", "enable")
    pair = running(thin_pair)
    error = refused(thin_case, pair)
    assert isinstance(error, DeviceFailed), error
    assert "Input/output error" in str(error)
    assert any(word.isdigit() for word in str(error).replace(",", " ").split()), f"the place is not named: {error}"
    settled(thin_case, pair)
    record_never_leads(thin_case, thin_case.disks[1])
    thin_case.untouched(pair)
    disk.heal()
    thin_case.converge(pair)


def test_E4_a_base_that_cannot_be_read_commits_nothing_and_is_said(thin_case: ThinCase, thin_pair: Pair) -> None:
    disk = thin_case.disks[1]
    pair = running(thin_pair)
    disk.put(disk.in_pool_data("error"))
    error = refused(thin_case, pair)
    assert "Input/output error" in str(error) or "read" in str(error), error
    disk.heal()
    settled(thin_case, pair)
    thin_case.untouched(pair)
    thin_case.converge(pair)


def test_E11_writes_that_the_disk_dropped_are_found_before_the_commit(thin_case: ThinCase, thin_pair: Pair) -> None:
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


def test_E16_a_disk_that_vanishes_is_an_error_and_no_file_takes_its_place(thin_case: ThinCase, thin_pair: Pair) -> None:
    disk, pair = thin_case.disks[0], thin_pair
    before = set(Path("/dev").iterdir()) | set(Path("/dev/mapper").iterdir())
    pair.nas2.start()
    pair.nas1.start_armed("src.before_batch=stop:2")
    error = meanwhile(thin_case, pair, pair.nas1, lambda: disk.put(f"0 {disk.sectors} error"))
    assert isinstance(error, DeviceFailed), error
    pair.nas1.kill()
    made = (set(Path("/dev").iterdir()) | set(Path("/dev/mapper").iterdir())) - before
    assert not [path for path in made if stat.S_ISREG(path.lstat().st_mode)]
    settled(thin_case, pair)
    thin_case.untouched(pair)
    disk.detach()
    disk.attach()
    pair.nas1.start()
    thin_case.converge(pair)


def test_E24_a_disk_that_takes_seconds_is_no_death(thin_case: ThinCase, thin_pair: Pair) -> None:
    """Only the next few chunks that the pool gives out are slow: each of their writes takes longer than silence is borne."""
    disk = thin_case.disks[1]
    pair = running(thin_pair)
    start, length = disk.pool_data()
    first, slow = start + disk.chunks_used() * CHUNK_SECTORS, 4 * CHUNK_SECTORS
    end = first + slow
    assert end < start + length
    slowly = f"{first} {slow} delay {disk.loop} {first} 0 {disk.loop} {first} 4000"
    disk.put(f"0 {first} linear {disk.loop} 0\n{slowly}\n{end} {disk.sectors - end} linear {disk.loop} {end}")
    begun = time.monotonic()
    sent = thin_case.send(pair, silence_limit_s=3.0, streams=1)
    assert time.monotonic() - begun > 4.0, "the disk was not slow"
    assert sent.pieces_sent
    disk.heal()
    assert thin_case.converge(pair).pieces_sent == 0


def test_E6_a_pool_that_runs_full_ends_the_transfer_and_the_base_stays(thin_case: ThinCase, thin_pair: Pair) -> None:
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


def test_E22_two_disks_that_both_say_they_are_the_group_are_refused(thin_case: ThinCase, thin_pair: Pair, tmp_path: Path) -> None:
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
