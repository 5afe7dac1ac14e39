"""A device reads and writes whole blocks, names what failed, and is not trusted after a failed sync."""

import os
from pathlib import Path

import numpy as np
import pytest

from agent.blockio.buffers import BufferPool, aligned
from agent.blockio.copy import copy
from agent.blockio.device import Device
from agent.blockio.queues import Queues
from agent.blockio.scatter import NEAR_BLOCKS, digest_runs, gather, read_runs
from agent.contract.digest import ZERO_BLOCK, block_digests
from agent.contract.errors import DeviceFailed

BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(np.random.default_rng(1).bytes(512 * BLOCK))
    return path


def test_reads_are_the_bytes_and_writes_come_back(image: Path) -> None:
    content = bytearray(image.read_bytes())
    with Device.open_writing(image) as device:
        assert device.size_blocks == 512
        assert bytes(device.read(7, 3)) == content[7 * BLOCK : 10 * BLOCK]
        device.write(8, b"x" * BLOCK)  # not aligned
        device.write(9, aligned(BLOCK))
        device.write_zeros(100, 300)
        device.sync()
    content[8 * BLOCK : 10 * BLOCK] = b"x" * BLOCK + bytes(BLOCK)
    content[100 * BLOCK : 400 * BLOCK] = bytes(300 * BLOCK)
    assert image.read_bytes() == bytes(content)


def test_E21_an_odd_tail_reads_as_zeros_and_is_cut_off_when_written(tmp_path: Path) -> None:
    image = tmp_path / "odd"
    image.write_bytes(b"a" * (2 * BLOCK) + b"t" * 1536)
    with Device.open_writing(image) as device:
        assert device.size_blocks == 3
        assert bytes(device.read(1, 2)) == b"a" * BLOCK + b"t" * 1536 + bytes(BLOCK - 1536)
        device.write(2, b"u" * 1536 + bytes(BLOCK - 1536))
        with pytest.raises(DeviceFailed, match="past the end"):
            device.write(2, b"u" * BLOCK)
        device.sync()
    assert image.read_bytes() == b"a" * (2 * BLOCK) + b"u" * 1536


def test_blocks_outside_the_device_are_refused(image: Path) -> None:
    with Device.open_writing(image) as device:
        for first, blocks in ((512, 1), (511, 2), (-1, 1)):
            with pytest.raises(DeviceFailed, match="outside"):
                device.read(first, blocks)
            with pytest.raises(DeviceFailed, match="outside"):
                device.write(first, bytes(blocks * BLOCK))


def test_E16_a_device_that_is_not_there_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(DeviceFailed, match="cannot be opened"):
        Device.open_writing(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_E1_a_failed_read_names_path_offset_length_and_errno(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with Device.open_reading(image) as device:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(DeviceFailed) as caught:
            device.read(3, 2)
    assert str(image) in caught.value.message
    assert "EIO" in caught.value.cause
    assert "byte 12288" in caught.value.cause
    assert "length 8192" in caught.value.cause


def test_E3_after_a_failed_sync_nothing_of_the_device_is_trusted(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with Device.open_writing(image) as device:
        device.write(0, bytes(BLOCK))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(DeviceFailed, match="syncing"):
                device.sync()
        for act in (device.sync, lambda: device.write(0, bytes(BLOCK)), lambda: device.read(0, 1)):
            with pytest.raises(DeviceFailed, match="not trusted"):
                act()


def test_E10_short_reads_and_writes_are_continued(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = image.read_bytes()
    preadv, pwrite = os.preadv, os.pwrite

    def short_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][:2048]], offset)

    def short_write(fd: int, view: memoryview, offset: int) -> int:
        return pwrite(fd, view[:1024], offset)

    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "pwrite", short_write)
    with Device.open_writing(image) as device:
        assert bytes(device.read(5, 4)) == content[5 * BLOCK : 9 * BLOCK]
        buffer = aligned(2 * BLOCK)
        buffer[:] = b"s" * 2 * BLOCK
        device.write(20, buffer)
        assert bytes(device.read(20, 2)) == b"s" * 2 * BLOCK


def random_runs(seed: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    cuts = np.unique(generator.integers(0, total, 80))
    first, blocks = cuts[:-1:2], np.diff(cuts)[::2]
    order = generator.permutation(len(first)) if seed % 2 else np.arange(len(first))
    return first[order].astype(np.uint64), np.minimum(blocks, 40)[order].astype(np.uint64)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("batch_blocks", [1, 7, 64, 1024])
def test_scattered_reads_equal_the_bytes_in_the_order_asked(image: Path, seed: int, batch_blocks: int) -> None:
    content = image.read_bytes()
    first, blocks = random_runs(seed, 512)
    wanted = b"".join(content[at * BLOCK : (at + count) * BLOCK] for at, count in zip(first.tolist(), blocks.tolist(), strict=True))
    with Device.open_reading(image) as device:
        got = bytearray()
        for stretch in read_runs(device, first, blocks, workers=3, batch_bytes=batch_blocks * BLOCK):
            assert stretch.position * BLOCK == len(got)
            got += stretch.data
        assert bytes(got) == wanted
        digests = digest_runs(device, first, blocks, batch_bytes=batch_blocks * BLOCK)
        assert digests.tolist() == block_digests(wanted).tolist()
        holes = np.arange(len(first)) % 3 == 0
        with_holes = digest_runs(device, first, blocks, holes=holes, batch_bytes=batch_blocks * BLOCK)
    of_hole = np.repeat(holes, blocks.astype(np.int64))
    assert (with_holes[of_hole] == ZERO_BLOCK).all()
    assert (with_holes[~of_hole] == digests[~of_hole]).all()


def test_near_runs_are_read_in_one_call_and_far_ones_are_not(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Queues, "take", lambda self: None)  # as where the kernel has no asynchronous reads
    calls: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset // BLOCK)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    first = np.array([40, 0, 1, 3, 3 + 1 + NEAR_BLOCKS, 100], dtype=np.uint64)
    with Device.open_reading(image) as device:
        gather(device, first, np.ones(6, dtype=np.uint64), aligned(6 * BLOCK))
    assert calls == [0, 40, 100]


def test_a_bad_block_between_two_runs_does_not_fail_them(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Queues, "take", lambda self: None)  # as where the kernel has no asynchronous reads
    content = image.read_bytes()
    preadv = os.preadv

    def bad_block_11(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= 11 * BLOCK < offset + sum(map(len, buffers)):
            raise OSError(5, "Input/output error")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", bad_block_11)
    buffer = aligned(2 * BLOCK)
    with Device.open_reading(image) as device:
        gather(device, np.array([10, 12], dtype=np.uint64), np.ones(2, dtype=np.uint64), buffer)
        assert bytes(buffer) == content[10 * BLOCK : 11 * BLOCK] + content[12 * BLOCK : 13 * BLOCK]
        with pytest.raises(DeviceFailed):
            gather(device, np.array([10, 11], dtype=np.uint64), np.ones(2, dtype=np.uint64), buffer)


def test_no_runs_are_no_data(image: Path) -> None:
    nothing = np.array([], dtype=np.uint64)
    with Device.open_reading(image) as device:
        assert list(read_runs(device, nothing, nothing)) == []
        assert len(digest_runs(device, nothing, nothing)) == 0


@pytest.mark.parametrize("digest", [False, True])
def test_a_copy_equals_its_source(image: Path, tmp_path: Path, digest: bool) -> None:
    target = tmp_path / "target"
    target.write_bytes(bytes(512 * BLOCK))
    copied = copy(image, target, workers=3, chunk_bytes=5 * BLOCK, digest=digest)
    assert target.read_bytes() == image.read_bytes()
    assert (copied.digests is not None) is digest
    if copied.digests is not None:
        assert copied.digests.tolist() == block_digests(image.read_bytes()).tolist()


def test_E20_a_target_of_another_size_is_refused_untouched(image: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"z" * 100 * BLOCK)
    with pytest.raises(DeviceFailed, match="another size"):
        copy(image, target, digest=False)
    assert target.read_bytes() == b"z" * 100 * BLOCK


def test_a_failing_copy_ends_and_says_why(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.write_bytes(bytes(512 * BLOCK))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DeviceFailed, match="writing") as caught:
        copy(image, target, chunk_bytes=BLOCK, digest=False)
    assert "ENOSPC" in caught.value.cause


def test_a_pool_hands_out_no_more_buffers_than_it_has() -> None:
    pool = BufferPool(2, BLOCK)
    one, two = pool.take(), pool.take()
    assert one.obj is not two.obj
    pool.give(one)
    assert pool.take().obj is one.obj
