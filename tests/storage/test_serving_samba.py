"""A real client reads and writes the shares of a real smbd."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from agent.serving.exports import Share
from agent.serving.samba import Samba

PORT = 4459
VOLUME = uuid4()


@pytest.fixture
def samba(tmp_path: Path) -> Iterator[Samba]:
    """Yield an smbd of our own on loopback, gone afterwards."""
    served = Samba(tmp_path / "samba", "127.0.0.1", PORT, guest=True)
    yield served
    served.stop()
    assert served.shares() == ()


def client(share: str, command: str) -> subprocess.CompletedProcess[str]:
    words = ["smbclient", f"//127.0.0.1/{share}", "-N", "-p", str(PORT), "-c", command]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def share(folder: Path, name: str) -> Share:
    (folder / name).mkdir()
    return Share(name, folder / name)


def test_clients_read_and_write_what_is_exported(samba: Samba, tmp_path: Path) -> None:
    media = share(tmp_path, "media")
    (media.path / "hello").write_bytes(b"from the server")
    samba.open(media, VOLUME)
    assert client("media", f"get hello {tmp_path}/got; put {tmp_path}/got back").returncode == 0
    assert (tmp_path / "got").read_bytes() == (media.path / "back").read_bytes() == b"from the server"
    assert (media.path / "back").stat().st_mode & 0o111 == 0, "smbd maps the archive bit to a mode bit"


def test_another_share_leaves_the_first_connected(samba: Samba, tmp_path: Path) -> None:
    first, second = share(tmp_path, "one"), share(tmp_path, "two")
    samba.open(first, VOLUME)
    samba.open(second, VOLUME)
    assert samba.shares() == (first, second)
    assert client("one", "ls").returncode == client("two", "ls").returncode == 0
    samba.dismiss(first)
    assert samba.shares() == (second,)
    assert client("one", "ls").returncode != 0
    assert client("two", "ls").returncode == 0


def test_a_new_agent_finds_the_smbd_of_the_old_one(samba: Samba, tmp_path: Path) -> None:
    media = share(tmp_path, "media")
    samba.open(media, VOLUME)
    heir = Samba(samba.folder, samba.address, samba.port, guest=True)
    assert [found.name for found in heir.shares()] == ["media"]
    heir.dismiss(media)
    assert samba.shares() == ()
    assert client("media", "ls").returncode != 0


def test_without_a_port_nothing_is_exported(tmp_path: Path) -> None:
    closed = Samba(tmp_path / "samba", "127.0.0.1", 0, guest=True)
    closed.open(share(tmp_path, "media"), VOLUME)
    assert closed.shares() == ()
