"""Content from the landing volume, and the writing of what differs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.blockio.device import Device
from agent.contract.dmi import ExtentFlag
from agent.contract.errors import DeviceFailed
from agent.contract.identity import BLOCK_BYTES
from agent.recovery import inode
from agent.recovery.content import Chunk, Ending, data_ranges, hole_ranges, read_files
from tests.unit.dmi_samples import block_of, sample_dmi

CONTENT = (block_of(8) + block_of(9) + block_of(12))[:-7]


@pytest.fixture
def landing(tmp_path: Path) -> Iterator[Device]:
    path = tmp_path / "landing"
    path.write_bytes(b"".join(block_of(number) for number in range(64)))
    with Device.open_reading(path) as device:
        yield device


def read(device: Device, rows: list[int]) -> tuple[dict[int, bytes], list[Ending]]:
    contents: dict[int, bytes] = {}
    endings = []
    for item in read_files(device, sample_dmi(), rows):
        if isinstance(item, Chunk):
            held = contents.get(item.row, b"").ljust(item.offset, b"\0")
            contents[item.row] = held + bytes(item.data)
        else:
            endings.append(item)
    return contents, endings


def test_content_comes_from_the_extents_cut_at_the_size(landing: Device) -> None:
    contents, (ending,) = read(landing, [1])
    assert contents[1] == CONTENT
    assert ending.damage == ""
    assert ending.length_bytes == len(CONTENT)


def test_G13_a_block_that_is_another_is_damage(landing: Device) -> None:
    with open(landing.path, "r+b") as file:
        file.seek(9 * BLOCK_BYTES)
        file.write(b"x")
    _, (ending,) = read(landing, [1])
    assert "digest" in ending.damage


def test_a_file_that_cannot_be_read_does_not_stop_the_others(landing: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Iterator[object]:
        raise DeviceFailed("no", cause="EIO at byte 7")
        yield

    monkeypatch.setattr("agent.recovery.content.read_runs", fail)
    _, endings = read(landing, [1, 2])
    assert [(ending.row, bool(ending.damage)) for ending in endings] == [(1, True), (2, False)]
    assert "EIO at byte 7" in endings[0].damage


def test_ranges_of_data_and_holes() -> None:
    dmi = replace(
        sample_dmi(),
        size=np.array([4096, 9 * BLOCK_BYTES + 1, 3, 5], np.uint64),
        extent_logical=np.array([2, 5], np.uint64),
        extent_flags=np.array([0, 0], np.uint32),
    )
    assert data_ranges(dmi, 1) == [(2 * BLOCK_BYTES, 2 * BLOCK_BYTES), (5 * BLOCK_BYTES, BLOCK_BYTES)]
    assert hole_ranges(data_ranges(dmi, 1), int(dmi.size[1])) == [
        (0, 2 * BLOCK_BYTES),
        (4 * BLOCK_BYTES, BLOCK_BYTES),
        (6 * BLOCK_BYTES, 3 * BLOCK_BYTES + 1),
    ]
    unwritten = replace(dmi, extent_flags=np.array([ExtentFlag.UNWRITTEN, 0], np.uint32))
    assert data_ranges(unwritten, 1) == [(5 * BLOCK_BYTES, BLOCK_BYTES)]


changes = st.lists(st.tuples(st.integers(0, 40_000), st.binary(min_size=1, max_size=50)), max_size=5)


@given(old=st.integers(0, 40_000), new=st.integers(1, 40_000), changes=changes)
def test_only_what_differs_is_written_and_the_result_is_the_same(old: int, new: int, changes: list[tuple[int, bytes]]) -> None:
    before = bytearray(os.urandom(1) * old)
    wanted = bytearray(before[:new].ljust(new, b"z"))
    for at, data in changes:
        wanted[at : at + len(data)] = data[: max(0, len(wanted) - at)]
    fd = os.memfd_create("file")
    try:
        os.pwrite(fd, before, 0)
        inode.write_changed(fd, 0, memoryview(bytes(wanted)))
        os.ftruncate(fd, len(wanted))
        assert os.pread(fd, len(wanted) + 1, 0) == wanted
    finally:
        os.close(fd)
