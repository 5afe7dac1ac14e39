"""The copy path on real block devices: past the page cache, in both sector sizes, to the last odd byte, and never onto a device in use."""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from agent.blockio.buffers import aligned
from agent.blockio.copy import copy
from agent.blockio.device import Device
from agent.blockio.scatter import digest_runs, gather, read_runs
from agent.contract.digest import block_digests
from agent.contract.errors import DeviceBusy, DeviceFailed
from agent.contract.messages import Differential, Sent
from agent.system.run import run
from agent.transfer.receiver import Received, Receiver
from agent.transfer.sender import send
from tests.storage.loop_devices import attached, forget
from tests.transfer_scene import Scene, make_differential

BLOCK = 4096
MIB = 1 << 20


def make_image(path: Path, size: int, seed: int | None = 1) -> bytes:
    content = bytes(size) if seed is None else np.random.default_rng(seed).bytes(size)
    path.write_bytes(content)
    return content


def resident_pages(path: Path) -> int:
    """Return how many pages of a file or block device the page cache holds (mincore(2)); looking at it reads none."""
    fd = os.open(path, os.O_RDWR)
    try:
        length = os.lseek(fd, 0, os.SEEK_END)
        with mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
            pages = (ctypes.c_ubyte * (-(-length // mmap.PAGESIZE)))()
            here = ctypes.c_char.from_buffer(mapping)
            libc = ctypes.CDLL(None, use_errno=True)
            result = libc.mincore(ctypes.c_void_p(ctypes.addressof(here)), ctypes.c_size_t(length), pages)
            del here
            assert result == 0, os.strerror(ctypes.get_errno())
            return sum(page & 1 for page in pages)
    finally:
        os.close(fd)


class Watch:
    """Looks, at every read and write that the agent makes, at every descriptor of the data devices that this process has open."""

    def __init__(self, patch: pytest.MonkeyPatch, devices: list[Path]) -> None:
        self.paths = {str(device) for device in devices}
        self.seen: set[tuple[str, bool]] = set()  # device, whether it was O_DIRECT
        for name in ("preadv", "pwrite"):
            patch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, call: Callable[..., int]) -> Callable[..., int]:
        def watched(*arguments: object) -> int:
            for entry in os.listdir("/proc/self/fd"):
                try:
                    path = os.readlink(f"/proc/self/fd/{entry}")
                    info = Path(f"/proc/self/fdinfo/{entry}").read_text() if path in self.paths else ""
                except FileNotFoundError:
                    continue
                if info:
                    self.seen.add((path, bool(int(info.split("flags:")[1].split()[0], 8) & os.O_DIRECT)))
            return call(*arguments)

        return watched


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_a_copy_goes_past_the_page_cache_on_every_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sector_bytes: int) -> None:
    content = make_image(tmp_path / "source", 64 * MIB)
    make_image(tmp_path / "target", 64 * MIB, None)
    with (
        attached(tmp_path / "source", sector_bytes=sector_bytes, read_only=True) as source,
        attached(tmp_path / "target", sector_bytes=sector_bytes) as target,
    ):
        watch = Watch(monkeypatch, [source, target])
        copied = copy(source, target, digest=True)
        monkeypatch.undo()
        assert watch.seen == {(str(source), True), (str(target), True)}
        assert resident_pages(target) == 0
        assert resident_pages(tmp_path / "source") == resident_pages(tmp_path / "target") == 0
        assert copied.digests is not None
        assert copied.digests.tolist() == block_digests(content).tolist()
    assert (tmp_path / "target").read_bytes() == content


def test_the_watch_and_the_count_of_pages_see_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_image(tmp_path / "source", MIB)
    forget(tmp_path / "source")
    assert resident_pages(tmp_path / "source") == 0
    watch = Watch(monkeypatch, [tmp_path / "source"])
    with open(tmp_path / "source", "rb", buffering=0) as file:
        os.preadv(file.fileno(), [bytearray(BLOCK)], 0)
    assert watch.seen == {(str(tmp_path / "source"), False)}
    assert resident_pages(tmp_path / "source") > 0


@pytest.mark.parametrize("differential", list(Differential))
def test_a_transfer_goes_past_the_page_cache_on_every_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, differential: Differential
) -> None:
    made = make_differential(tmp_path, blocks=8192, pieces=100)
    scene = Scene(tmp_path, made)
    scene.landing.write_bytes(scene.replica.read_bytes())
    with (
        attached(made.target, read_only=True) as target,
        attached(made.base, read_only=True) as base,
        attached(scene.replica, read_only=True) as replica,
        attached(scene.landing) as landing,
    ):
        files = [made.target, made.base, scene.replica, scene.landing]
        scene.landing, scene.replica = landing, replica
        watch = Watch(monkeypatch, [target, base, replica, landing])
        receiver = Receiver(scene.receive_job(differential=differential))
        with ThreadPoolExecutor(1) as executor:
            received = executor.submit(receiver.run)
            sent = send(scene.send_job(receiver.port, differential=differential, target=target, base=base))
            assert isinstance(received.result(timeout=60), Received)
        monkeypatch.undo()
        assert isinstance(sent, Sent)
        assert watch.seen == {(str(path), True) for path in (target, base, replica, landing)}
        assert [resident_pages(path) for path in files] == [0] * 4
        assert resident_pages(landing) == 0
    assert files[3].read_bytes() == files[0].read_bytes()


@pytest.mark.parametrize(("sector_bytes", "tail"), [(512, 512), (512, 1536), (512, 3584), (4096, 0)])
def test_E21_sectors_and_odd_tails_of_block_devices(tmp_path: Path, sector_bytes: int, tail: int) -> None:
    size = 3 * MIB + tail
    content = make_image(tmp_path / "source", size)
    make_image(tmp_path / "target", size, None)
    padded = content + bytes(-size % BLOCK)
    with (
        attached(tmp_path / "source", sector_bytes=sector_bytes) as source,
        attached(tmp_path / "target", sector_bytes=sector_bytes) as target,
    ):
        assert copy(source, target, chunk_bytes=MIB, digest=False).size_bytes == size
        with Device.open_writing(target) as device:
            assert (device.size_bytes, device.sector_bytes, device.size_blocks) == (size, sector_bytes, len(padded) // BLOCK)
            first = np.array([device.size_blocks - 2, 5], dtype=np.uint64)
            blocks = np.array([2, 3], dtype=np.uint64)
            wanted = padded[-2 * BLOCK :] + padded[5 * BLOCK : 8 * BLOCK]
            assert b"".join(bytes(stretch.data) for stretch in read_runs(device, first, blocks)) == wanted
            assert digest_runs(device, first, blocks).tolist() == block_digests(wanted).tolist()
            device.write_zeros(device.size_blocks - 1, 1)
            device.sync()
            assert bytes(device.read(device.size_blocks - 1, 1)) == bytes(BLOCK)
    last = (len(padded) // BLOCK - 1) * BLOCK
    assert (tmp_path / "target").read_bytes() == content[:last] + bytes(size - last)


def test_zeros_become_a_hole_of_the_image(tmp_path: Path) -> None:
    make_image(tmp_path / "image", 16 * MIB)
    with attached(tmp_path / "image") as path, Device.open_writing(path) as device:
        before = (tmp_path / "image").stat().st_blocks
        device.write_zeros(256, 2048)
        device.sync()
        assert bytes(device.read(256, 2048)) == bytes(8 * MIB)
        assert (tmp_path / "image").stat().st_blocks == before - 8 * MIB // 512


def test_E19_a_mounted_device_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "image", "wb") as file:
        file.truncate(64 * MIB)
    run(["mkfs.ext4", "-q", "-F", str(tmp_path / "image")])
    (tmp_path / "mnt").mkdir()
    with attached(tmp_path / "image") as path:
        run(["mount", str(path), str(tmp_path / "mnt")])
        try:
            with pytest.raises(DeviceBusy):
                Device.open_writing(path)
        finally:
            run(["umount", str(tmp_path / "mnt")])
        with Device.open_writing(path), pytest.raises(DeviceBusy):
            Device.open_writing(path)  # nor one that is open for writing here already


def test_E23_a_read_only_device_is_refused_for_writing(tmp_path: Path) -> None:
    make_image(tmp_path / "image", MIB)
    with attached(tmp_path / "image", read_only=True) as path:
        with pytest.raises(DeviceFailed, match="read-only"):
            Device.open_writing(path)
        with Device.open_reading(path) as device:
            assert len(device.read(0, 1)) == BLOCK


def test_memory_does_not_grow_with_the_volume(tmp_path: Path) -> None:
    peaks = {}
    for size in (32 * MIB, 256 * MIB):
        with open(tmp_path / f"{size}", "wb") as file:
            file.truncate(size)
        program = (
            "import resource, sys, numpy as np; from pathlib import Path; from agent.blockio.device import Device;"
            "from agent.blockio.scatter import read_runs\n"
            "with Device.open_reading(Path(sys.argv[1])) as device:\n"
            "    runs = np.array([0], dtype=np.uint64), np.array([device.size_blocks], dtype=np.uint64)\n"
            "    assert sum(len(stretch.data) for stretch in read_runs(device, *runs)) == device.size_bytes\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = run(["env", f"PYTHONPATH={Path(__file__).parents[2]}", sys.executable, "-c", program, str(tmp_path / f"{size}")])
        peaks[size] = int(done.text)
    assert peaks[256 * MIB] < peaks[32 * MIB] + 16 * 1024


def test_E1_an_asynchronous_read_that_fails_names_device_and_errno(tmp_path: Path) -> None:
    image = tmp_path / "image"
    content = make_image(image, MIB)
    with attached(image) as path, Device.open_reading(path) as device:
        os.truncate(image, MIB // 2)  # a disk that has lost its second half: reads there fail
        first, ones = np.array([1, 200, 2], dtype=np.uint64), np.ones(3, dtype=np.uint64)
        with pytest.raises(DeviceFailed, match="reading") as failed:
            gather(device, first, ones, aligned(3 * BLOCK))
        assert failed.value.cause == f"EIO Input/output error at byte {200 * BLOCK}, length {BLOCK}"
        buffer = aligned(2 * BLOCK)
        gather(device, first[[0, 2]], ones[:2], buffer)
        assert bytes(buffer) == content[BLOCK : 3 * BLOCK]
