"""The kernel's NFS client reads and writes what the kernel's NFS server exports, on one machine: a guest of our own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from agent.serving import nfs as serving
from agent.serving.exports import Share
from agent.serving.nfs import CLOSE_LIMIT_S, Nfs
from agent.system.clock import monotonic_s, wait_until
from agent.system.run import run
from agent.volume import filesystem
from tests.nfs_client import Held, mounted

pytestmark = pytest.mark.nfs_server

SERVED = Path("/run/served")
"""Every filesystem on the way to it can be exported, which those that a guest has from its host cannot."""
LIMIT_S = 120.0
BOUND_S = CLOSE_LIMIT_S
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


def client_of(volume: Volume, folder: Path, **options: str) -> contextlib.AbstractContextManager[Path]:
    return mounted("127.0.0.1", volume.share.path, folder / f"client-{volume.share.name}", **options)


@contextlib.contextmanager
def held(path: Path) -> Iterator[Held]:
    holder = Held(path)
    try:
        yield holder
    finally:
        holder.end()


def test_clients_read_and_write_what_is_exported_and_root_is_nobody(nfs: Nfs, volumes: Callable[[str], Volume], tmp_path: Path) -> None:
    media = volumes("media")
    nfs.open(media.share, media.id)
    assert nfs.is_open(media.share)
    assert nfs.problem((media.share,)) is None
    begun = monotonic_s()
    with client_of(media, tmp_path) as client:
        (client / "new").write_bytes(b"by a client")
        assert monotonic_s() - begun < 60, "it waited for a grace period"
        assert (media.share.path / "new").read_bytes() == b"by a client"
        assert (media.share.path / "new").stat().st_uid == 65534
        (media.share.path / "secret").write_bytes(b"")
        (media.share.path / "secret").chmod(0o600)
        with pytest.raises(PermissionError):
            (client / "secret").read_bytes()


def test_J10_nothing_listens_but_the_server(nfs: Nfs, volumes: Callable[[str], Volume]) -> None:
    media = volumes("media")
    nfs.open(media.share, media.id)
    listed = run(["ss", "--no-header", "--listening", "--tcp", "--udp", "--numeric", "--processes"]).text
    assert f":{serving.PORT} " in listed
    assert "rpc.mountd" not in listed


def test_J10_who_is_not_named_mounts_nothing(nfs: Nfs, volumes: Callable[[str], Volume], tmp_path: Path) -> None:
    media = volumes("media")
    Nfs(nfs.folder, ("127.0.0.0/8", "198.51.100.0/24", "2001:db8::/32")).open(media.share, media.id)
    assert len(serving.listed(serving.ETAB.read_text())) == 3
    Nfs(nfs.folder, ("198.51.100.0/24",)).open(media.share, media.id)
    assert [name for _, name in serving.listed(serving.ETAB.read_text())] == ["198.51.100.0/24"], "of an earlier configuration"
    argv = ["mount", "-t", "nfs", "-o", "vers=4.2,soft,timeo=20,retrans=1,retry=0", f"127.0.0.1:{media.share.path}", str(tmp_path)]
    assert subprocess.run(argv, check=False, timeout=LIMIT_S).returncode != 0


def test_I14_open_files_and_locks_of_clients_keep_no_volume(nfs: Nfs, volumes: Callable[[str], Volume], tmp_path: Path) -> None:
    media, other = volumes("media"), volumes("other")
    for volume in (media, other):
        nfs.open(volume.share, volume.id)
    with contextlib.ExitStack() as stack:
        client, beside = (stack.enter_context(client_of(volume, tmp_path)) for volume in (media, other))
        gone = stack.enter_context(held(client / "gone"))
        locked = stack.enter_context(held(client / 'x", superblock: "00:00:1'))
        left = stack.enter_context(held(beside / "left"))
        assert [one.ask(words) for one, words in ((gone, "write 1"), (locked, "lock"), (left, "write before"))] == ["ok"] * 3

        begun = monotonic_s()
        nfs.close(media.share)
        media.unmount()
        assert monotonic_s() - begun < BOUND_S
        assert (nfs.is_open(media.share), nfs.is_open(other.share)) == (False, True)
        assert left.ask("append , meanwhile") == "ok"
        assert (other.share.path / "left").read_bytes() == b"before, meanwhile"
        assert gone.ask("write 2") in {"ESTALE", "EIO", "EBADF"}, "a server that has it no more says so"

        begun = monotonic_s()
        nfs.close(other.share)
        other.unmount()
        assert monotonic_s() - begun < BOUND_S
        assert (serving.NFSD / "threads").read_text() == "0\n", "the last export ends the server"
        left.tell("append , after")
        assert left.answer(3.0) == "", "who hears nothing waits"
        other.mount()
        nfs.open(other.share, other.id)
        assert left.answer(LIMIT_S) == "ok"
        assert (other.share.path / "left").read_bytes() == b"before, meanwhile, after"


def test_I14_clients_wait_for_a_volume_that_is_not_mounted_yet(nfs: Nfs, volumes: Callable[[str], Volume], tmp_path: Path) -> None:
    media, other = volumes("media"), volumes("other")
    for volume in (media, other):
        nfs.open(volume.share, volume.id)
    with client_of(media, tmp_path) as client, held(client / "file") as holder:
        assert holder.ask("write 1") == "ok"
        nfs.close(media.share)
        media.unmount()
        nfs.prepare(media.share, media.id)
        holder.tell("write 2")
        assert holder.answer(5.0) == ""
        assert list(media.share.path.iterdir()) == []
        media.mount()
        nfs.open(media.share, media.id)
        assert holder.answer(LIMIT_S) == "ok"
        assert (media.share.path / "file").read_bytes() == b"2"


def test_a_new_agent_finds_the_server_of_the_old_one(nfs: Nfs, volumes: Callable[[str], Volume], tmp_path: Path) -> None:
    media = volumes("media")
    nfs.open(media.share, media.id)
    heir = Nfs(nfs.folder, nfs.clients)
    assert heir.is_open(media.share)
    heir.open(media.share, media.id)
    assert len(run(["pgrep", "-x", "rpc.mountd"]).text.split()) == 1
    os.kill(int((nfs.folder / "mountd.pid").read_text()), signal.SIGKILL)
    assert wait_until(lambda: not heir.is_open(media.share), LIMIT_S)
    problem = heir.problem((media.share,))
    assert problem
    assert "landfall serve media" in problem.fix_now
    heir.open(media.share, media.id)
    with client_of(media, tmp_path) as client:
        (client / "file").write_bytes(b"1")
