"""Who may mount, what the NFS server's programs are told, and what is read of the kernel's lists."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from agent.config import read_config
from agent.contract.errors import CommandFailed, ConfigInvalid, KernelLacks, LandfallError, ProgramMissing, RequestRefused
from agent.serving import nfs
from agent.serving.exports import Exports, Share
from agent.serving.nfs import Nfs, Security, Squash

VOLUME = UUID("8990c773-2ba7-4414-a98c-8b15a72ff666")
GOOD = 'node = "nas1"\nreplication_address = "192.0.2.11"\n'


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ("192.0.2.0/24", "192.0.2.0/24"),
        ("192.0.2.7", "192.0.2.7/32"),
        ("2001:DB8::/32", "2001:db8::/32"),
        ("2001:db8::7", "2001:db8::7/128"),
    ],
)
def test_a_client_is_an_address_or_a_network(said: str, taken: str) -> None:
    assert nfs.client(said) == taken


@pytest.mark.parametrize(
    "said",
    [
        *("", "*", "0.0.0.0/0", "::/0", "0.0.0.0", "224.0.0.0/4", "192.0.2.7/24", "nas.example", "@trusted", "-o"),
        *("192.0.2.7:/etc", "192.0.2.7(rw)", "192.0.2.7 *", "192.0.2.7\t*", "192.0.2.7\n/etc *", "192.0.2.7,rw"),
    ],
)
def test_J10_names_wildcards_and_everybody_are_refused(tmp_path: Path, said: str) -> None:
    with pytest.raises(RequestRefused):
        nfs.client(said)
    path = tmp_path / "agent.toml"
    quoted = said.replace("\t", "\\t").replace("\n", "\\n")
    path.write_text(f'{GOOD}nfs_clients = ["192.0.2.0/24", "{quoted}"]\n')
    with pytest.raises(ConfigInvalid, match="nfs_clients"):
        read_config(path)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('nfs_clients = "192.0.2.0/24"', "nfs_clients"),
        ("nfs_clients = [1]", "nfs_clients"),
        ('nfs_security = ["none"]', "nfs_security"),
        ("nfs_security = []", "nfs_security"),
        ('nfs_squash = "no_root_squash"', "nfs_squash"),
        ('mount_dir = "/srv/land fall"\nnfs_clients = ["192.0.2.7"]', "mount_dir"),
    ],
)
def test_a_key_that_nfs_cannot_work_with_is_named(tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f"{GOOD}{line}\n")
    with pytest.raises(ConfigInvalid, match=named):
        read_config(path)


def test_what_is_configured_is_what_is_exported(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'{GOOD}nfs_clients = ["192.0.2.7", "192.0.2.7/32"]\nnfs_security = ["krb5p", "sys"]\nnfs_squash = "all"\n')
    config = read_config(path)
    assert (config.nfs_clients, config.nfs_security, config.nfs_squash) == (
        ("192.0.2.7/32",),
        (Security.KRB5P, Security.SYS),
        Squash.ALL,
    )
    made = Nfs(tmp_path, config.nfs_clients, config.nfs_security, config.nfs_squash)
    assert made.options(VOLUME) == f"rw,sync,no_subtree_check,all_squash,sec=krb5p:sys,fsid={VOLUME},mountpoint"


def test_the_programs_get_lists_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    listed = f"{tmp_path}/media\t203.0.113.0/24(rw)\n{tmp_path}/media\t192.0.2.0/24(rw)\n{tmp_path}/other\t203.0.113.0/24(rw)\n"
    threads = iter((0, 8))
    (tmp_path / "etab").write_text(listed)
    monkeypatch.setattr(nfs, "ETAB", tmp_path / "etab")
    monkeypatch.setattr(nfs, "NFSD", tmp_path)
    monkeypatch.setattr(nfs, "refuse_lacking", lambda: None)
    monkeypatch.setattr(nfs, "run", lambda argv, **_: ran.append(list(argv)))
    monkeypatch.setattr(nfs, "_threads", lambda: next(threads))
    monkeypatch.setattr(Nfs, "_pid", lambda _: 1)
    monkeypatch.setattr(Nfs, "_stop_answering", lambda *_: None)
    made = Nfs(tmp_path, ("192.0.2.0/24", "2001:db8::/32"))
    made.open(Share("media", tmp_path / "media"), VOLUME)
    assert ran == [
        ["exportfs", "-u", f"203.0.113.0/24:{tmp_path}/media"],
        ["exportfs", "-o", made.options(VOLUME), f"192.0.2.0/24:{tmp_path}/media", f"[2001:db8::]/32:{tmp_path}/media"],
        ["rpc.nfsd", "--no-nfs-version", "3", "--no-nfs-version", "4.0", "--grace-time", "10", "8"],
    ]
    assert (tmp_path / "v4_end_grace").read_bytes() == b"Y\n"


def test_nobody_configured_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nfs, "run", None)
    monkeypatch.setattr(nfs, "refuse_lacking", None)
    made = Nfs(tmp_path, ())
    made.prepare(Share("media", tmp_path / "media"), VOLUME)
    made.open(Share("media", tmp_path / "media"), VOLUME)
    assert list(tmp_path.iterdir()) == []


STATES = """- 0x0000000161e5036b: { type: open, access: -w, deny: --, superblock: "07:00:15", filename: "/open", owner: "open id:\\x00" }
- 0x0000000261e5036b: { type: lock, superblock: "fd:1a:16", filename: "/locked", owner: "lock id:\\x00" }
- 0x0000000361e5036b: { type: open, access: rw, deny: --, superblock: "07:01:17", filename: "/x\\", superblock: \\"08:00:1\\"\\n- 0x1: {" }
"""


def test_J10_the_devices_that_a_client_holds_files_of_are_the_kernels_word_not_the_files_names() -> None:
    assert nfs.superblocks(STATES) == {os.makedev(7, 0), os.makedev(0xFD, 0x1A), os.makedev(7, 1)}
    assert nfs.superblocks("") == set()
    assert nfs.superblocks('- 0x1: { type: deleg, access: r, filename: "superblock: "') == set()


def test_an_etab_names_paths_and_clients() -> None:
    line = "/srv/landfall/media\t192.0.2.0/24(rw,sync,fsid=8990c773-2ba7-4414-a98c-8b15a72ff666,mountpoint,sec=sys,rw)\n"
    assert nfs.listed(f"{line}{line.replace('192.0.2.0/24', '2001:db8::/32')}") == [
        ("/srv/landfall/media", "192.0.2.0/24"),
        ("/srv/landfall/media", "2001:db8::/32"),
    ]


def test_a_node_without_the_server_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Nfs(tmp_path, ("192.0.2.0/24",))
    (tmp_path / "filesystems").write_text("nodev\tnfs\n\text4\n")
    monkeypatch.setattr(nfs, "FILESYSTEMS", tmp_path / "filesystems")
    monkeypatch.setattr(nfs, "NFSD", tmp_path / "nfsd")
    monkeypatch.setattr(nfs, "run", lambda *_, **__: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    problem = made.problem(())
    assert isinstance(problem, ProgramMissing)
    assert "apt-get install nfs-kernel-server" in problem.fix_now
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/sbin/it")
    problem = made.problem(())
    assert isinstance(problem, KernelLacks)
    assert "modprobe nfsd" in problem.fix_now


class Noted:
    """A server that notes what it is told, and can fail."""

    def __init__(self, protocol: str, told: list[str], failing: str = "") -> None:
        self.protocol, self.wanted = protocol, True
        self._told, self._failing = told, failing

    def __getattr__(self, verb: str) -> Any:
        def told(*_: object) -> None:
            self._told.append(f"{self.protocol} {verb}")
            if verb == self._failing:
                raise CommandFailed(f"{self.protocol} {verb}")

        return told


def test_one_server_that_fails_keeps_the_others_from_nothing(tmp_path: Path) -> None:
    share, told = Share("media", tmp_path), list[str]()
    both: Any = (Noted("SMB", told, "open"), Noted("NFS", told))
    with pytest.raises(LandfallError, match="SMB open"):
        Exports(both).open(share, VOLUME)
    assert told == ["SMB open", "NFS open"]
    both = (Noted("SMB", told), Noted("NFS", told, "prepare"))
    Exports(both).prepare(share, VOLUME)
    assert told[2:] == ["SMB prepare", "NFS prepare"]
