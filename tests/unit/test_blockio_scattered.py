"""Scattered reads by asynchronous I/O: the bytes of plain reads, the errors of plain reads, and threads where the kernel refuses."""

from __future__ import annotations

import errno
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agent.blockio import queues
from agent.blockio.buffers import aligned
from agent.blockio.device import Device
from agent.blockio.scatter import gather, read_runs
from agent.contract.errors import DeviceFailed
from agent.system import aio

BLOCK = 4096
BLOCKS = 300
TAIL = 1536


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(np.random.default_rng(1).bytes(BLOCKS * BLOCK + TAIL))
    return path


@pytest.mark.parametrize("seed", range(6))
def test_the_bytes_are_those_of_plain_reads_in_the_order_asked(image: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    first = random.integers(0, BLOCKS - 8, 120).astype(np.uint64)
    first[40:44] = np.array([7, 8, 9, 10])  # neighbours, and in the order of the device
    blocks = random.integers(1, 8, 120).astype(np.uint64)
    content = image.read_bytes()
    wanted = b"".join(content[a * BLOCK : (a + n) * BLOCK] for a, n in zip(first.tolist(), blocks.tolist(), strict=True))
    with Device.open_reading(image) as device:
        assert b"".join(bytes(part.data) for part in read_runs(device, first, blocks, batch_bytes=64 * BLOCK)) == wanted
        buffer = aligned(len(wanted))
        gather(device, first, blocks, buffer)
        assert bytes(buffer) == wanted


def test_the_queue_is_what_reads(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aio.Queue(4).close()
    monkeypatch.setattr(os, "preadv", None)  # whoever reads the plain way fails
    with Device.open_reading(image) as device:
        buffer = aligned(2 * BLOCK)
        gather(device, np.array([9, 3], dtype=np.uint64), np.ones(2, dtype=np.uint64), buffer)
    assert bytes(buffer[:BLOCK]) == image.read_bytes()[9 * BLOCK : 10 * BLOCK]


def test_the_last_block_is_filled_with_zeros(image: Path) -> None:
    with Device.open_reading(image) as device:
        buffer = aligned(3 * BLOCK)
        buffer[:] = b"x" * len(buffer)
        gather(device, np.array([BLOCKS - 1, 0], dtype=np.uint64), np.array([2, 1], dtype=np.uint64), buffer)
    content = image.read_bytes()
    assert bytes(buffer) == content[-(BLOCK + TAIL) :] + bytes(BLOCK - TAIL) + content[:BLOCK]


@pytest.mark.parametrize("outside", [BLOCKS + 1, 2**62])
def test_blocks_past_the_end_are_refused(image: Path, outside: int) -> None:
    with Device.open_reading(image) as device, pytest.raises(DeviceFailed, match="outside"):
        gather(device, np.array([0, outside], dtype=np.uint64), np.ones(2, dtype=np.uint64), aligned(2 * BLOCK))


def test_a_queue_gives_each_read_its_own_result_whatever_its_depth(image: Path) -> None:
    content, fd = image.read_bytes(), os.open(image, os.O_RDONLY)
    queue = aio.Queue(8)
    try:
        buffer = aligned(1000 * 16)
        address = np.uint64(np.frombuffer(buffer, dtype=np.uint8).ctypes.data) + np.arange(1000, dtype=np.uint64) * np.uint64(16)
        offset = np.random.default_rng(2).integers(0, len(content) - 16, 1000)
        offset[500] = len(content) - 5
        length = np.full(1000, 16)
        result = queue.read(fd, address, offset, length)
        assert result[500] == 5
        assert set(np.delete(result, 500).tolist()) == {16}
        assert all(bytes(buffer[16 * n : 16 * n + 16]) == content[at : at + 16] for n, at in enumerate(offset.tolist()) if n != 500)
        assert queue.read(fd, address[:0], offset[:0], length[:0]).tolist() == []
    finally:
        queue.close()
        os.close(fd)


def test_a_read_that_fails_fails_alone(image: Path) -> None:
    fd, queue = os.open(image, os.O_RDONLY), aio.Queue(8)
    try:
        buffer = aligned(BLOCK)
        good = np.uint64(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)
        result = queue.read(fd, np.array([8, good], dtype=np.uint64), np.zeros(2, dtype=np.int64), np.full(2, BLOCK))
    finally:
        queue.close()
        os.close(fd)
    assert result.tolist() == [-errno.EFAULT, BLOCK]


def test_a_submission_that_fails_leaves_nothing_in_flight(image: Path) -> None:
    """A closed descriptor in the middle ends the submission; what was submitted before has ended when the error comes."""
    fd, queue = os.open(image, os.O_RDONLY), aio.Queue(4)
    os.close(fd)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            queue.read(fd, np.zeros(9, dtype=np.uint64), np.zeros(9, dtype=np.int64), np.full(9, BLOCK))
    finally:
        queue.close()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("by", ["queue", "plain"])
def test_scattered_writes_are_where_they_belong_and_nothing_else_changes(
    image: Path, seed: int, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "plain":
        monkeypatch.setattr(queues.Queues, "take", lambda self: None)
    random = np.random.default_rng(seed)
    first = np.sort(random.choice(BLOCKS // 4, 40, replace=False)) * 4  # runs of at most four blocks
    random.shuffle(first)
    blocks = random.integers(1, 5, 40)
    place = np.cumsum(blocks + random.integers(0, 2, 40)) - blocks  # some of the data is for nobody
    data = aligned(int(place[-1] + blocks[-1]) * BLOCK)
    data[:] = random.bytes(len(data))
    wanted = bytearray(image.read_bytes())
    for at, source, count in zip(first.tolist(), place.tolist(), blocks.tolist(), strict=True):
        wanted[at * BLOCK : (at + count) * BLOCK] = data[source * BLOCK : (source + count) * BLOCK]
    with Device.open_writing(image) as device:
        device.write_scattered(first, place, blocks, data)
        device.sync()
    assert image.read_bytes() == wanted


def test_a_write_into_the_odd_tail_is_cut_off_and_the_image_is_not_longer(image: Path) -> None:
    data = aligned(2 * BLOCK)
    data[:BLOCK], data[BLOCK : BLOCK + TAIL] = b"a" * BLOCK, b"b" * TAIL
    with Device.open_writing(image) as device:
        device.write_scattered(np.array([5, BLOCKS]), np.array([0, 1]), np.array([1, 1]), data)
    content = image.read_bytes()
    assert (len(content), content[5 * BLOCK : 6 * BLOCK], content[BLOCKS * BLOCK :]) == (BLOCKS * BLOCK + TAIL, b"a" * BLOCK, b"b" * TAIL)
    with Device.open_writing(image) as device, pytest.raises(DeviceFailed, match="outside"):
        device.write_scattered(np.array([5, BLOCKS + 1]), np.array([0, 1]), np.array([1, 1]), data)


@pytest.mark.parametrize("result", [-errno.EIO, -errno.ENOSPC, 512])
def test_E1_a_scattered_write_that_failed_is_written_the_plain_way_or_its_error_is_raised(
    image: Path, result: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    aio.Queue(4).close()
    data = aligned(2 * BLOCK)
    data[:] = b"x" * len(data)
    monkeypatch.setattr(aio.Queue, "write", lambda self, fd, address, offset, length: np.array([result, BLOCK]))
    rows = np.array([7, 9]), np.array([0, 1]), np.array([1, 1])
    with Device.open_writing(image) as device:
        device.write_scattered(*rows, data)
        assert image.read_bytes()[7 * BLOCK : 8 * BLOCK] == b"x" * BLOCK

        def fail(fd: int, view: memoryview, offset: int) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(DeviceFailed, match="writing"):
            device.write_scattered(*rows, data)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EAGAIN])
def test_where_the_kernel_refuses_threads_read_and_that_is_said_once(
    image: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(depth: int) -> aio.Queue:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(aio, "Queue", refused)
    with caplog.at_level(logging.WARNING), Device.open_reading(image) as device:
        for _ in range(3):
            buffer = aligned(2 * BLOCK)
            gather(device, np.array([9, 3], dtype=np.uint64), np.ones(2, dtype=np.uint64), buffer)
            assert bytes(buffer[BLOCK:]) == image.read_bytes()[3 * BLOCK : 4 * BLOCK]
    assert [record.message for record in caplog.records] == [
        f"no asynchronous reads here ({errno.errorcode[number]}); threads read instead"
    ]


FORBIDDEN = """
import ctypes, struct, sys
from pathlib import Path
import numpy as np
from agent.blockio import queues
from agent.blockio.buffers import aligned
from agent.blockio.device import Device
from agent.blockio.scatter import gather
load, equal, allow, refuse = (0x20, 0, 0, 0), (0x15, 0, 1, int(sys.argv[2])), (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | 1)
program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in (load, equal, refuse, allow)))
class Filter(ctypes.Structure):
    _fields_ = [("lines", ctypes.c_ushort), ("program", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(program))), 0, 0) == 0, ctypes.get_errno()
with Device.open_reading(Path(sys.argv[1])) as device:
    buffer = aligned(8192)
    gather(device, np.array([9, 3], dtype=np.uint64), np.ones(2, dtype=np.uint64), buffer)
assert bytes(buffer[4096:]) == Path(sys.argv[1]).read_bytes()[3 * 4096 : 4 * 4096]
"""


def test_where_seccomp_forbids_it_threads_read(image: Path) -> None:
    number = {"x86_64": 206, "aarch64": 0}[platform.machine()]
    root = Path(__file__).parents[2]
    argv = [sys.executable, "-c", FORBIDDEN, str(image), str(number)]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "no asynchronous reads here (EPERM); threads read instead" in done.stderr
