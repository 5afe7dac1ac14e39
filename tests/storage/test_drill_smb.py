"""Real SMB clients against an smbd of the test's own, on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.contract.errors import CommandFailed
from mgmt.drill.workload import OpenWrite, SmbClient, deleted_while_open, smb_changes
from tests.storage.checker_scene import checker, copy, make, writable

CONFIG = """[global]
    map to guest = Bad User
    server role = standalone server
    smb ports = {port}
    interfaces = 127.0.0.1/8
    bind interfaces only = yes
    disable netbios = yes
    load printers = no
    disable spoolss = yes
    pid directory = {home}
    lock directory = {home}
    state directory = {home}
    cache directory = {home}
    private dir = {home}
    ncalrpc dir = {home}/ncalrpc
    passdb backend = tdbsam:{home}/passdb.tdb
    log file = {home}/log
[share]
    path = {served}
    read only = no
    guest ok = yes
    force user = root
"""


@dataclass(frozen=True, slots=True)
class Served:
    """A mounted volume and how a client reaches it."""

    root: Path
    image: Path
    client: SmbClient


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 30
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None
        assert time.monotonic() < limit
        os.sched_yield()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    image = tmp_path / "volume.img"
    make(image, "ext4")
    home = tmp_path / "samba"
    home.mkdir()
    with writable(image, tmp_path / "served", "ext4") as root:
        port = free_port()
        config = home / "smb.conf"
        config.write_text(CONFIG.format(port=port, home=home, served=root))
        argv = ["smbd", "--foreground", "--no-process-group", f"--configfile={config}"]
        server = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            wait_for(port, server)
            yield Served(root, image, SmbClient("127.0.0.1", "share", prefix=("env",), options=("-N", "-p", str(port))))
        finally:
            # Its own session: the processes that serve clients go with it.
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


def test_clients_fill_and_change_a_share(served: Served) -> None:
    filled = smb_changes(served.client, 2, 30)
    assert filled.files == 30
    before = {path.name: path.read_bytes() for path in (served.root / "smb clients").iterdir()}
    assert len(before) == 30
    changed = smb_changes(served.client, 3, 30)
    assert {kind.kind for kind in changed.kinds} == {"smb_put", "smb_overwrite", "smb_rename", "smb_delete", "smb_mkdir", "smb_safe_save"}
    after = served.root / "smb clients"
    assert (after / "report 000.doc").read_bytes() != before["report 000.doc"]
    assert (after / "later" / "001.doc").read_bytes() == before["report 001.doc"]
    assert not (after / "report 002.doc").exists()
    assert (after / "report 004.doc").read_bytes() != before["report 004.doc"]
    assert not list(after.glob("~*"))


def test_a_refused_command_is_an_error(served: Served) -> None:
    with pytest.raises(CommandFailed, match="NT_STATUS"):
        served.client.delete("is not there")


def test_H16_a_file_is_open_and_being_written(served: Served) -> None:
    writing = OpenWrite(served.client, "open.db", served.root / "open.db")
    writing.begin(1 << 20)
    try:
        assert 1 << 20 <= (served.root / "open.db").stat().st_size < 3 << 20
        writing.write(b"x" * (2 << 20))
    finally:
        writing.end()
    assert (served.root / "open.db").read_bytes().endswith(b"x" * (2 << 20))


def test_a_client_that_cannot_write_is_an_error_and_is_ended(served: Served) -> None:
    writing = OpenWrite(served.client, "no/such/directory", served.root / "nothing")
    with pytest.raises(CommandFailed):
        writing.begin(1 << 20, timeout_s=10)


def test_a_file_is_deleted_while_it_is_open(served: Served) -> None:
    path = served.root / "doomed"
    path.write_bytes(b"d" * 50_000)
    free = os.statvfs(served.root).f_ffree
    with deleted_while_open(served.client, "doomed", path):
        assert not path.exists()
        assert os.statvfs(served.root).f_ffree == free
    assert os.statvfs(served.root).f_ffree == free + 1


def test_the_checker_reads_files_back_over_SMB(served: Served, tmp_path: Path) -> None:
    for number in range(30):
        (served.root / f"file {number}").write_bytes(os.urandom(1000 * number))
    os.sync()
    frozen = copy(served.image, tmp_path / "frozen.img")
    argv: list[str | Path] = [
        "--base",
        frozen,
        "--target",
        frozen,
        "--filesystem",
        "ext4",
        "--result",
        served.root,
        "--smb",
        "//127.0.0.1/share",
    ]
    client = ["--smb-client", " ".join(["env", "smbclient", *served.client.options])]
    answer = checker(*argv, *client)
    assert answer.document["findings"] == []
    assert answer.document["smb_files"] == 25
    assert checker(*argv, "file 3", "file 29", *client).document["smb_files"] == 2

    # Another file is exported than the tree that is compared: only the client sees it.
    elsewhere = tmp_path / "elsewhere"
    with writable(copy(frozen, tmp_path / "twin.img"), elsewhere, "ext4"):
        (served.root / "file 7").write_bytes(b"not this")
        answer = checker(*argv[:7], elsewhere, *argv[8:], "file 7", "file 8", *client)
    assert answer.figures == {"false_recovered": 1}
    assert answer.document["findings"][0]["path"] == "file 7"
