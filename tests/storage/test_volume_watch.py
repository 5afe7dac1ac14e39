"""Disks below volumes that are taken away, change their size or become read-only: events, and what `landfall status` is told."""

from __future__ import annotations

import fcntl
import os
import queue
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.contract import messages as m
from agent.contract.identity import FilesystemKind
from agent.system.clock import wait_until
from agent.volume.watch import DeviceChange, DeviceEvent, DeviceWatch, devices_below
from mgmt.authority import Authority
from tests.faults.rig import NodeProcess, Pair, pool

LIMIT_S = 60.0
MIB = 1 << 20
LOOP_CTL_REMOVE = 0x4C81  # include/uapi/linux/loop.h


class Loop:
    """A loop device over a file, and what was heard of it."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "disk"
        self.image.write_bytes(bytes(16 * MIB))
        # A name of its own: whoever else looks for a free device takes the first, and would take this one while it is away.
        self.device = Path(f"/dev/loop{10_000 + os.getpid() % 10_000}")
        self.attach()
        self.heard: queue.SimpleQueue[DeviceEvent] = queue.SimpleQueue()

    def next(self) -> DeviceEvent:
        return self.heard.get(timeout=LIMIT_S)

    def attach(self) -> None:
        _run("losetup", str(self.device), str(self.image))

    def remove(self) -> None:
        with open("/dev/loop-control", "rb") as control:
            fcntl.ioctl(control, LOOP_CTL_REMOVE, int(self.device.name.removeprefix("loop")))

    def detach(self) -> None:
        subprocess.run(["losetup", "--detach", str(self.device)], capture_output=True, check=False)


def _run(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(tmp_path)
    try:
        yield made
    finally:
        made.detach()
        made.remove()


@pytest.fixture
def watch(loop: Loop) -> Iterator[DeviceWatch]:
    made = DeviceWatch(lambda: devices_below(loop.device), loop.heard.put, period_s=0.5)
    try:
        yield made
    finally:
        made.close()


def test_a_sound_device_is_no_event(loop: Loop, watch: DeviceWatch) -> None:
    watch.look()
    assert loop.heard.empty()
    assert watch.troubles() == ()


def test_E23_a_device_that_becomes_read_only_is_said_until_it_is_writable_again(loop: Loop, watch: DeviceWatch) -> None:
    _run("blockdev", "--setro", str(loop.device))
    event = loop.next()
    assert (event.device, event.change) == (str(loop.device), DeviceChange.READ_ONLY)
    assert watch.troubles() == (event.message,)
    assert f"{loop.device}, below the volumes, became read-only at 20" in event.message
    _run("blockdev", "--setrw", str(loop.device))
    assert loop.next().change is DeviceChange.WRITABLE
    assert watch.troubles() == ()


def test_E20_a_device_that_changes_its_size_is_said(loop: Loop, watch: DeviceWatch) -> None:
    os.truncate(loop.image, 24 * MIB)
    _run("losetup", "--set-capacity", str(loop.device))
    event = loop.next()
    assert event.change is DeviceChange.RESIZED
    assert f"from {16 * MIB} to {24 * MIB} bytes" in event.message


def test_E16_a_device_that_goes_is_said_until_it_comes_back(loop: Loop, watch: DeviceWatch) -> None:
    loop.detach()
    event = loop.next()
    assert event.change is DeviceChange.REMOVED
    assert "went away" in watch.troubles()[0]
    loop.attach()
    assert loop.next().change is DeviceChange.RETURNED
    assert watch.troubles() == ()


def test_a_device_that_is_read_only_from_the_start_is_said(loop: Loop) -> None:
    _run("blockdev", "--setro", str(loop.device))
    made = DeviceWatch(lambda: devices_below(loop.device), loop.heard.put)
    try:
        assert loop.next().change is DeviceChange.READ_ONLY
    finally:
        made.close()
        _run("blockdev", "--setrw", str(loop.device))


def test_what_is_no_block_device_has_nothing_below(tmp_path: Path) -> None:
    assert devices_below(tmp_path) == frozenset()
    assert devices_below(tmp_path / "not there") == frozenset()


def test_E23_a_disk_below_a_pool_reaches_the_volume_list_and_the_outbox(tmp_path: Path) -> None:
    with pool(tmp_path / "p", size_bytes=512 * MIB) as held:
        device = _run("findmnt", "--noheadings", "--output", "SOURCE", str(held.mount_point)).strip()
        pair = Pair(NodeProcess(held.mount_point, "nas1"), NodeProcess(held.mount_point / "two", "nas2"), Authority(tmp_path / "ca"))
        pair.nas1.start()
        try:
            pair.nas2.start()
            pair.create("media", FilesystemKind.EXT4, 32 * MIB)
            _run("blockdev", "--setro", device)
            try:
                _wait(lambda: any("read-only" in trouble for trouble in _volumes(pair.nas1).troubles))
                assert device in _volumes(pair.nas1).troubles[0]
            finally:
                _run("blockdev", "--setrw", device)
            _wait(lambda: _volumes(pair.nas1).troubles == ())
            outbox: m.Outbox = pair.nas1.ask(m.ReadOutbox(0, 0.0))
            assert "device-changed" in {said.kind for said in outbox.notifications}
        finally:
            pair.nas1.kill()
            pair.nas2.kill()


def _volumes(node: NodeProcess) -> m.Volumes:
    found: m.Volumes = node.ask(m.ListVolumes())
    return found


def _wait(condition: Callable[[], bool]) -> None:
    assert wait_until(condition, LIMIT_S)
