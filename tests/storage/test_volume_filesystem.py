"""Filesystems made, judged, made again and mounted; loop devices and the freeze below them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.contract.errors import DeviceBusy, DeviceFailed, FreezeFailed, LayoutUnsupported, NotOurs
from agent.contract.identity import FilesystemKind
from agent.system import block
from agent.volume import filesystem, loop
from agent.volume.devices import devices
from agent.volume.freeze import frozen, thaw_if_frozen
from agent.volume.loop import attach, backs
from agent.volume.superblock import kind_of, read_ext4, read_xfs

EXT4, XFS = FilesystemKind.EXT4, FilesystemKind.XFS
SIZES = {EXT4: 64 << 20, XFS: 320 << 20}


def sparse(folder: Path, size_bytes: int, name: str = "volume.img") -> Path:
    image = folder / name
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    return image


def attached(image: Path) -> list[str]:
    """Loop devices over an image, by inode."""
    bound = [Path("/dev") / folder.parent.name for folder in Path("/sys/block").glob("loop*/loop")]
    return [str(device) for device in bound if backs(device, image)]


def wait_until(condition: object, limit_s: float = 10.0) -> None:
    assert callable(condition)
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        threading.Event().wait(0.005)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come soon: nobody else is waited for longer than a passing look takes."""
    monkeypatch.setattr(loop, "_GRACE_S", 0.3)


@pytest.fixture(params=[EXT4, XFS], ids=str)
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    kind = request.param
    image, mount_point = sparse(tmp_path, SIZES[kind]), tmp_path / "mount"
    mount_point.mkdir()
    with attach(image, writable=True) as device:
        filesystem.make(device, kind)
        filesystem.mount(device, mount_point, kind, read_only=False)
    try:
        yield mount_point
    finally:
        thaw_if_frozen(mount_point)
        filesystem.unmount(mount_point)


# --- loop devices ---


def test_a_device_goes_with_its_context(tmp_path: Path) -> None:
    image = sparse(tmp_path, 1 << 20)
    with attach(image, writable=True) as device:
        assert backs(device, image)
        assert attached(image) == [str(device)]
    wait_until(lambda: attached(image) == [])


def test_a_device_goes_with_a_killed_process(tmp_path: Path) -> None:
    image = sparse(tmp_path, 1 << 20)
    program = f"""
from pathlib import Path
from agent.volume.loop import attach
with attach(Path({str(image)!r}), writable=True) as device:
    print(device, flush=True)
    input()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        assert child.stdout
        assert child.stdout.readline().startswith(b"/dev/loop")
        assert len(attached(image)) == 1
        with pytest.raises(DeviceBusy), attach(image):
            pass
    finally:
        child.kill()
        child.communicate()
    wait_until(lambda: attached(image) == [])
    with attach(image, writable=True):
        pass


def test_readers_share_and_a_writer_excludes(tmp_path: Path) -> None:
    image = sparse(tmp_path, 1 << 20)
    with attach(image) as one, attach(image) as other:
        assert one != other
        with pytest.raises(DeviceBusy), attach(image, writable=True):
            pass
    with attach(image, writable=True), pytest.raises(DeviceBusy), attach(image):
        pass


def test_E23_a_reading_device_refuses_writes(tmp_path: Path) -> None:
    with attach(sparse(tmp_path, 1 << 20)) as device:
        with pytest.raises(PermissionError), open(device, "r+b", buffering=0) as file:
            file.write(bytes(4096))
        with open(device, "rb", buffering=0) as file:
            assert block.is_read_only(file.fileno())


def test_E23_a_device_number_that_was_set_read_only_is_writable_again(tmp_path: Path) -> None:
    image = sparse(tmp_path, 1 << 20)
    with attach(image, writable=True) as device, open(device, "rb", buffering=0) as file:
        block.set_read_only(file.fileno(), True)
    with attach(image, writable=True) as device, open(device, "r+b", buffering=0) as file:
        assert file.write(bytes(4096)) == 4096


@pytest.mark.parametrize("sector", [512, 4096])
def test_E21_sectors_are_what_was_asked_for(tmp_path: Path, sector: int) -> None:
    with attach(sparse(tmp_path, 1 << 20), writable=True, sector_bytes=sector) as device, open(device, "rb") as file:
        assert block.sector_bytes(file.fileno()) == sector
        assert block.size_bytes(file.fileno()) == 1 << 20


def test_E16_what_is_no_image_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "link.img").symlink_to(sparse(tmp_path, 1 << 20))
    (tmp_path / "folder.img").mkdir()
    os.mkfifo(tmp_path / "fifo.img")
    for name in ("link.img", "folder.img", "fifo.img", "null"):
        path = tmp_path / name if name != "null" else Path("/dev/null")
        with pytest.raises(NotOurs), attach(path):
            pass
    with pytest.raises(FileNotFoundError), attach(tmp_path / "absent.img"):
        pass
    assert not (tmp_path / "absent.img").exists()


def test_many_attach_at_once_and_each_gets_its_own(tmp_path: Path) -> None:
    images = [sparse(tmp_path, (n + 1) << 20, f"{n}.img") for n in range(12)]
    wrong: list[str] = []
    inside = threading.Barrier(len(images))

    def use(image: Path) -> None:
        try:
            with attach(image, writable=True) as device:
                inside.wait(60)
                if not backs(device, image):
                    wrong.append(f"{device} is not over {image}")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=use, args=(image,)) for image in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    wait_until(lambda: not any(attached(image) for image in images))


def test_nodes_are_made_where_nobody_makes_them(tmp_path: Path) -> None:
    private = tmp_path / "dev"
    private.mkdir()
    with attach(sparse(tmp_path, 1 << 20), devices=private) as device:
        assert device.parent == private
        assert device.is_block_device()


def test_a_mount_keeps_its_device_and_unmounting_frees_it(mounted: Path) -> None:
    image = mounted.parent / "volume.img"
    assert attached(image) == [str(filesystem.device_of(mounted))]
    with pytest.raises(DeviceBusy), attach(image, writable=True):
        pass
    with open(mounted / "held", "wb"), pytest.raises(DeviceBusy):
        filesystem.unmount(mounted)
    filesystem.unmount(mounted)
    with attach(image, writable=True) as device:  # at once
        filesystem.mount(device, mounted, EXT4 if kind_of(device) is EXT4 else XFS, read_only=False)


def test_devices_are_known_by_the_file_behind_them(mounted: Path) -> None:
    image = (mounted.parent / "volume.img").stat()
    found = [device for device in devices() if device.path == str(filesystem.device_of(mounted))]
    assert [device.kind for device in found] == ["loop"]
    assert found[0].size_bytes == image.st_size
    assert found[0].identity == f"file:{os.major(image.st_dev)}:{os.minor(image.st_dev)}:{image.st_ino}"
    assert found[0].holder == f"mounted on {mounted}"
    assert not found[0].read_only


# --- layouts ---

LAYOUTS: dict[str, tuple[FilesystemKind, tuple[str, ...]]] = {
    "ext4": (EXT4, ()),
    "ext4-inline": (EXT4, ("-O", "inline_data,project,quota,ea_inode,^resize_inode", "-I", "512", "-L", "a label")),
    "ext4-plain": (EXT4, ("-O", "^has_journal,^64bit,^flex_bg,^metadata_csum", "-N", "5000")),
    "ext4-orphan-file": (EXT4, ("-O", "orphan_file,metadata_csum_seed,large_dir", "-J", "size=8")),
    "xfs": (XFS, ()),
    "xfs-rmapbt": (XFS, ("-m", "rmapbt=1,reflink=0,bigtime=0,inobtcount=0", "-i", "size=1024,sparse=0", "-L", "label")),
    "xfs-shape": (XFS, ("-n", "size=8192", "-d", "agcount=3,sunit=128,swidth=256", "-l", "size=64m,sunit=64", "-i", "maxpct=40")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_filesystem_is_made_again_with_the_same_layout(tmp_path: Path, layout: str) -> None:
    kind, options = LAYOUTS[layout]
    read = read_ext4 if kind is EXT4 else read_xfs
    first, second = sparse(tmp_path, SIZES[kind], "first.img"), sparse(tmp_path, SIZES[kind], "second.img")
    filesystem.make(first, kind, options)
    filesystem.refuse_unsupported(first, kind)
    filesystem.make_like(second, kind, filesystem.mkfs_arguments(first, kind))
    assert read(second) == read(first)
    listing = {
        EXT4: ("dumpe2fs", "-h"),
        XFS: ("xfs_info",),
    }[kind]
    words = [subprocess.run([*listing, image], capture_output=True, text=True, check=True).stdout for image in (first, second)]
    kept = [
        [
            line
            for line in text.splitlines()
            if not line.startswith(("meta-data", "Filesystem created", "Last w", "Last c", "Directory Hash Seed"))
        ]
        for text in words
    ]
    volatile = ("Journal checksum", "Checksum:", "Lifetime writes", "Filesystem state", "Checksum seed", "Free ", "Overhead")
    assert [line for line in kept[0] if not line.startswith(volatile)] == [line for line in kept[1] if not line.startswith(volatile)]


REFUSED: dict[str, tuple[FilesystemKind, tuple[str, ...], str]] = {
    "ext4-blocks": (EXT4, ("-b", "1024"), "blocks of 1024"),
    "ext4-no-extents": (EXT4, ("-O", "^extents,^64bit"), "no extents"),
    "ext4-bigalloc": (EXT4, ("-O", "bigalloc"), "bigalloc"),
    "ext4-encrypt": (EXT4, ("-O", "encrypt"), "encrypt"),
    "ext4-verity": (EXT4, ("-O", "verity"), "verity"),
    "ext4-casefold": (EXT4, ("-O", "casefold"), "casefold"),
    "xfs-v4": (XFS, ("-m", "crc=0"), "version 4"),
    "xfs-blocks": (XFS, ("-b", "size=1024", "-m", "reflink=0"), "blocks of 1024"),
    "xfs-sectors": (XFS, ("-s", "size=1024"), "sectors of 1024"),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_layouts_that_cannot_be_replicated_are_refused(tmp_path: Path, layout: str) -> None:
    kind, options, reason = REFUSED[layout]
    image = sparse(tmp_path, SIZES[kind])
    filesystem.make(image, kind, options)
    with pytest.raises(LayoutUnsupported, match=reason) as refusal:
        filesystem.refuse_unsupported(image, kind)
    assert reason in refusal.value.cause


def test_external_logs_and_realtime_are_refused(tmp_path: Path) -> None:
    image, other = sparse(tmp_path, SIZES[XFS]), sparse(tmp_path, SIZES[XFS], "other.img")
    subprocess.run(["mkfs.xfs", "-q", "-f", "-l", f"logdev={other}", image], check=True)
    with pytest.raises(LayoutUnsupported, match="external log"):
        filesystem.refuse_unsupported(image, XFS)
    subprocess.run(["mkfs.xfs", "-q", "-f", "-m", "reflink=0", "-r", f"rtdev={other}", image], check=True)
    with pytest.raises(LayoutUnsupported, match="realtime"):
        filesystem.refuse_unsupported(image, XFS)
    with attach(other, writable=True) as journal:
        subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "journal_dev", journal], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", "-J", f"device={journal}", image], check=True)
    with pytest.raises(LayoutUnsupported, match="external journal"):
        filesystem.refuse_unsupported(image, EXT4)


def test_E18_another_filesystem_than_the_volume_has_is_refused(tmp_path: Path) -> None:
    image, mount_point = sparse(tmp_path, SIZES[EXT4]), tmp_path / "mount"
    mount_point.mkdir()
    with attach(image, writable=True) as device:
        for kind in (EXT4, XFS):
            with pytest.raises(LayoutUnsupported):
                filesystem.refuse_unsupported(device, kind)
        filesystem.make(device, EXT4)
        with pytest.raises(LayoutUnsupported):
            filesystem.refuse_unsupported(device, XFS)
        with pytest.raises(LayoutUnsupported):
            filesystem.mount(device, mount_point, XFS, read_only=False)
    assert not filesystem.is_mounted(mount_point)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("rm", "-rf"),
        ("mkfs.xfs", "-q"),
        ("mkfs.ext4", "-J", "device=x"),
        ("mkfs.ext4", "-d", "etc"),
        ("mkfs.ext4", "-b"),
        ("mkfs.ext4", "-O", "a;b"),
        ("mkfs.ext4", "-O", "../x"),
        ("mkfs.ext4", "-L", "-F"),
        ("mkfs.ext4", "other.img"),
    ],
)
def test_G_words_of_a_peer_that_do_more_than_lay_out_a_filesystem_are_not_run(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    image = sparse(tmp_path, SIZES[EXT4])
    with pytest.raises(LayoutUnsupported):
        filesystem.make_like(image, EXT4, arguments)
    assert kind_of(image) is None


# --- generations ---


def test_H19_a_generation_mounts_beside_its_volume_and_is_not_written(mounted: Path) -> None:
    image, beside = mounted.parent / "volume.img", mounted.parent / "beside"
    kind = EXT4 if kind_of(image) is EXT4 else XFS
    beside.mkdir()
    with open(mounted / "nameless", "wb") as orphan:
        orphan.write(bytes(1 << 20))
        (mounted / "named").write_bytes(b"named")
        (mounted / "nameless").unlink()
        with frozen(mounted):
            copy = Path(subprocess.run(["cp", image, mounted.parent / "copy.img"], check=True).args[2])
        before = copy.read_bytes()
        with attach(copy) as device:
            filesystem.mount(device, beside, kind, read_only=True)
        try:
            assert (beside / "named").read_bytes() == b"named"
            with pytest.raises(OSError, match="Read-only"):
                (beside / "new").touch()
        finally:
            filesystem.unmount(beside)
        assert copy.read_bytes() == before
        with attach(copy, writable=True) as device, pytest.raises(DeviceFailed):
            filesystem.mount(device, beside, kind, read_only=True)


# --- the freeze ---


def test_a_frozen_filesystem_holds_writers_until_the_context_ends(mounted: Path) -> None:
    wrote = threading.Event()

    def write() -> None:
        (mounted / "file").write_bytes(b"x")
        wrote.set()

    with frozen(mounted) as freeze:
        writer = threading.Thread(target=write)
        writer.start()
        assert not wrote.wait(0.2)
    assert wrote.wait(10)
    writer.join()
    assert freeze.milliseconds >= 200
    assert not thaw_if_frozen(mounted)


def test_an_error_under_the_freeze_thaws(mounted: Path) -> None:
    with pytest.raises(ZeroDivisionError), frozen(mounted):
        raise ZeroDivisionError
    (mounted / "file").write_bytes(b"x")


def test_the_guard_thaws_when_the_time_is_over_and_says_so(mounted: Path) -> None:
    with pytest.raises(FreezeFailed), frozen(mounted, limit_s=0.3):
        (mounted / "file").write_bytes(b"returns when the guard has thawed")
    assert not thaw_if_frozen(mounted)


def test_what_is_frozen_already_is_left_to_who_froze_it(mounted: Path) -> None:
    with frozen(mounted):
        with pytest.raises(FreezeFailed), frozen(mounted):
            pass
        assert thaw_if_frozen(mounted), "the other's freeze was ended"
        mount_fd = os.open(mounted, os.O_RDONLY)
        block.freeze(mount_fd)
        os.close(mount_fd)


FREEZER = """
import sys
from pathlib import Path
from agent.volume.freeze import frozen
with frozen(Path(sys.argv[1])):
    print("frozen", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("victim", ["agent", "guard"])
def test_writers_go_on_within_a_second_when_the_freezer_is_killed(mounted: Path, victim: str) -> None:
    # The quickest of three: that the machine has something else to do for a second is no fault of the guard's.
    assert min(_waited_s(mounted, victim) for _ in range(3)) < 1.0


def _waited_s(mounted: Path, victim: str) -> float:
    """Return how long a writer waits after the victim was killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", FREEZER, str(mounted)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        assert child.stdout
        assert child.stdout.readline() == b"frozen\n"
        if victim == "agent":
            os.kill(child.pid, signal.SIGKILL)
        else:
            guards = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
            os.kill(int(guards[0]), signal.SIGKILL)
            assert child.stdin
            child.stdin.write(b"go on\n")
            child.stdin.flush()
        began = time.monotonic()
        (mounted / "file").write_bytes(b"x")
        return time.monotonic() - began
    finally:
        child.kill()
        child.communicate()


def test_a_start_thaws_what_both_left_behind(mounted: Path) -> None:
    mount_fd = os.open(mounted, os.O_RDONLY)
    try:
        block.freeze(mount_fd)
        assert thaw_if_frozen(mounted)
        assert not thaw_if_frozen(mounted)
    finally:
        os.close(mount_fd)


def test_many_filesystems_are_unmounted_below_a_folder(tmp_path: Path) -> None:
    with ExitStack() as after:
        for n in range(3):
            mount_point = tmp_path / "below" / f"{n} with a space"
            mount_point.mkdir(parents=True)
            with attach(sparse(tmp_path, SIZES[EXT4], f"{n}.img"), writable=True) as device:
                filesystem.make(device, EXT4)
                filesystem.mount(device, mount_point, EXT4, read_only=False)
            after.callback(lambda path: filesystem.unmount(path) if filesystem.is_mounted(path) else None, mount_point)
        filesystem.unmount_below(tmp_path / "below")
        assert not any(filesystem.is_mounted(tmp_path / "below" / f"{n} with a space") for n in range(3))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (XFS, ("-l", "logdev=/dev/null,size=64m")),
        (XFS, ("-l", "logdev=null")),
        (XFS, ("-r", "rtdev=/dev/null")),
        (XFS, ("-d", "file,name=other.img,size=400m")),
        (XFS, ("-p", "/etc/passwd")),
        (XFS, ("-c", "options=/etc/passwd")),
        (EXT4, ("-J", "device=/dev/null")),
        (EXT4, ("-d", "/usr/bin")),
        (EXT4, ("-E", "nodiscard,offset=4096")),
        (EXT4, ("-l", "/etc/passwd")),
        (EXT4, ("/dev/null",)),
        (EXT4, ("-n",)),
        (EXT4, ("-O",)),
        (EXT4, ("-O", "-n")),
    ],
)
def test_J10_options_of_mkfs_that_reach_beyond_the_volume_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: FilesystemKind, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr(filesystem, "run", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(LayoutUnsupported) as refused:
        filesystem.make(tmp_path / "volume.img", kind, options)
    assert options[0] in refused.value.message


def test_options_of_mkfs_that_lay_out_the_volume_are_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(filesystem, "run", lambda argv, **_: ran.append(argv))
    filesystem.make(tmp_path, EXT4, ("-O", "^64bit,inline_data", "-I", "256", "-m", "0", "-E", "lazy_itable_init=0"))
    filesystem.make(tmp_path, XFS, ("-m", "rmapbt=0,reflink=1", "-l", "size=64m", "-d", "su=64k,sw=4", "-K"))
    assert [words[0] for words in ran] == ["mkfs.ext4", "mkfs.xfs"]
