"""The kernel's NFS client reads and writes what the kernel's NFS server exports, on one machine: a guest of our own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from agent.serving import nfs as serving
from agent.serving.exports import Share
from agent.serving.nfs import Nfs
from agent.system.clock import monotonic_s, wait_until
from agent.system.run import run
from agent.volume import filesystem

pytestmark = pytest.mark.nfs_server

SERVED = Path("/run/served")
"""Every filesystem on the way to it can be exported, which those that a guest has from its host cannot."""
LIMIT_S = 120.0
BOUND_S = 20.0
"""For so long a volume that clients use may take to be given up, on a guest that has half a slow core."""


class Volume:
    """A filesystem in an image, mounted where an agent mounts it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.id: UUID = uuid4()
        self.share = Share(name, SERVED / name)
        self.image = folder / f"{name}.img"
        self.share.path.mkdir(parents=True, exist_ok=True)
        run(["truncate", "--size=64M", str(self.image)])
        run(["mkfs.ext4", "-q", "-b", "4096", str(self.image)])
        self.mount()
        self.share.path.chmod(0o777)

    def mount(self) -> None:
        run(["mount", "-o", "loop", str(self.image), str(self.share.path)])

    def unmount(self) -> None:
        filesystem.unmount(self.share.path)


@pytest.fixture
def nfs(tmp_path: Path) -> Iterator[Nfs]:
    """Yield a server, which ends with its last export."""
    yield Nfs(tmp_path / "nfs", ("127.0.0.0/8",))
    assert (serving.listed(serving.ETAB.read_text()), (serving.NFSD / "threads").read_text()) == ([], "0\n")


@pytest.fixture
def volumes(tmp_path: Path, nfs: Nfs) -> Iterator[Callable[[str], Volume]]:
    made: list[Volume] = []

    def make(name: str) -> Volume:
        made.append(Volume(tmp_path, name))
        return made[-1]

    yield make
    for volume in made:
        nfs.close(volume.share)
        if filesystem.is_mounted(volume.share.path):
            volume.unmount()


@contextlib.contextmanager
def mounted(volume: Volume, folder: Path, *, server: str = "127.0.0.1", options: str = "hard") -> Iterator[Path]:
    """Yield where a client has mounted it."""
    point = folder / f"client-{volume.share.name}"
    point.mkdir(exist_ok=True)
    run(["mount", "-t", "nfs", "-o", f"vers=4.2,{options}", f"{server}:{volume.share.path}", str(point)], timeout_s=LIMIT_S)
    try:
        yield point
    finally:
        run(["umount", "-f", "-l", str(point)], timeout_s=LIMIT_S)


def test_clients_read_and_write_what_is_exported_and_root_is_nobody(nfs: Nfs, volumes: Callable[[str], Volume], tmp_path: Path) -> None:
    media = volumes("media")
    nfs.open(media.share, media.id)
    assert nfs.is_open(media.share)
    assert nfs.problem((media.share,)) is None
    begun = monotonic_s()
    with mounted(media, tmp_path) as client:
        (client / "new").write_bytes(b"by a client")
        assert monotonic_s() - begun < 60, "it waited for a grace period"
        assert (media.share.path / "new").read_bytes() == b"by a client"
        assert (media.share.path / "new").stat().st_uid == 65534
        (media.share.path / "secret").write_bytes(b"")
        (media.share.path / "secret").chmod(0o600)
        with pytest.raises(PermissionError):
            (client / "secret").read_bytes()


def test_who_is_not_named_mounts_nothing(nfs: Nfs, volumes: Callable[[str], Volume], tmp_path: Path) -> None:
    media = volumes("media")
    Nfs(nfs.folder, ("127.0.0.0/8", "198.51.100.0/24", "2001:db8::/32")).open(media.share, media.id)
    assert len(serving.listed(serving.ETAB.read_text())) == 3
    nfs = Nfs(nfs.folder, ("198.51.100.0/24",))
    nfs.open(media.share, media.id)
    assert [name for _, name in serving.listed(serving.ETAB.read_text())] == ["198.51.100.0/24"], "of an earlier configuration"
    argv = ["mount", "-t", "nfs", "-o", "vers=4.2,soft,timeo=20,retrans=1,retry=0", f"127.0.0.1:{media.share.path}", str(tmp_path)]
    assert subprocess.run(argv, check=False, timeout=LIMIT_S).returncode != 0


def test_I14_open_files_and_locks_of_clients_keep_no_volume(nfs: Nfs, volumes: Callable[[str], Volume], tmp_path: Path) -> None:
    media, other = volumes("media"), volumes("other")
    for volume in (media, other):
        nfs.open(volume.share, volume.id)
    with contextlib.ExitStack() as stack:
        client, beside = (stack.enter_context(mounted(volume, tmp_path)) for volume in (media, other))
        held = stack.enter_context(open(client / "held", "wb", buffering=0))
        locked = stack.enter_context(open(client / 'x", superblock: "00:00:1', "wb", buffering=0))
        left = stack.enter_context(open(beside / "left", "wb", buffering=0))
        held.write(b"before ")
        fcntl.lockf(locked, fcntl.LOCK_EX)
        left.write(b"before ")

        begun = monotonic_s()
        nfs.close(media.share)
        media.unmount()
        assert monotonic_s() - begun < BOUND_S
        assert not nfs.is_open(media.share)
        assert nfs.is_open(other.share)
        left.write(b"meanwhile")
        os.fsync(left.fileno())
        assert (other.share.path / "left").read_bytes() == b"before meanwhile"

        begun = monotonic_s()
        nfs.close(other.share)
        other.unmount()
        assert monotonic_s() - begun < BOUND_S
        assert (serving.NFSD / "threads").read_text() == "0\n", "the last export ends the server"

        # The same server again: a client that was not told anything goes on.
        other.mount()
        nfs.open(other.share, other.id)
        left.write(b" after")
        os.fsync(left.fileno())
        assert (other.share.path / "left").read_bytes() == b"before meanwhile after"
        media.mount()
        nfs.open(media.share, media.id)


def test_I14_clients_wait_for_a_volume_that_is_not_mounted_yet(nfs: Nfs, volumes: Callable[[str], Volume], tmp_path: Path) -> None:
    media, other = volumes("media"), volumes("other")
    for volume in (media, other):
        nfs.open(volume.share, volume.id)
    with mounted(media, tmp_path) as client:
        (client / "file").write_bytes(b"1")
        file_fd = os.open(client / "file", os.O_RDWR)
        nfs.close(media.share)
        media.unmount()
        nfs.prepare(media.share, media.id)
        said: list[object] = []

        def write() -> None:
            try:
                os.pwrite(file_fd, b"2", 0)
                os.fsync(file_fd)
                said.append("written")
            except OSError as error:
                said.append(error)

        writing = threading.Thread(target=write)
        writing.start()
        assert not wait_until(lambda: bool(said), 5.0), said
        assert list(media.share.path.iterdir()) == []
        media.mount()
        nfs.open(media.share, media.id)
        writing.join(LIMIT_S)
        os.close(file_fd)
        assert said == ["written"]
        assert (media.share.path / "file").read_bytes() == b"2"


def test_what_is_given_up_takes_no_write(nfs: Nfs, volumes: Callable[[str], Volume], tmp_path: Path) -> None:
    media, other = volumes("media"), volumes("other")
    for volume in (media, other):
        nfs.open(volume.share, volume.id)
    with mounted(media, tmp_path, options="soft,timeo=20,retrans=1") as client:
        file_fd = os.open(client / "file", os.O_RDWR | os.O_CREAT)
        nfs.close(media.share)
        with contextlib.suppress(OSError):  # the kernel takes it into its memory first
            os.pwrite(file_fd, b"late", 0)
        with pytest.raises(OSError, match=r"Stale|Input/output|denied"):
            os.fsync(file_fd)
        with contextlib.suppress(OSError):
            os.close(file_fd)
    assert (media.share.path / "file").read_bytes() == b""


def test_a_new_agent_finds_the_server_of_the_old_one(nfs: Nfs, volumes: Callable[[str], Volume], tmp_path: Path) -> None:
    media = volumes("media")
    nfs.open(media.share, media.id)
    heir = Nfs(nfs.folder, nfs.clients)
    assert heir.is_open(media.share)
    pid = int((nfs.folder / "mountd.pid").read_text())
    heir.open(media.share, media.id)
    assert int((nfs.folder / "mountd.pid").read_text()) == pid
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not heir.is_open(media.share), LIMIT_S)
    problem = heir.problem((media.share,))
    assert problem
    assert "landfall serve media" in problem.fix_now
    heir.open(media.share, media.id)
    with mounted(media, tmp_path) as client:
        (client / "file").write_bytes(b"1")
