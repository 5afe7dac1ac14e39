"""Exports of served volumes by the kernel's NFS server, NFSv4.1 and later: one TCP port, sessions, no lock daemon beside it.

Made with nfs-utils: exportfs(8) keeps the list of exports (its etab, never /etc/exports), rpc.mountd(8) answers the kernel's questions
about it, rpc.nfsd(8) starts and ends the kernel's threads. All three outlive the agent.

A client knows a file by its handle: the export's number, which is the volume's UUID and so the same on both nodes, the inode's number and
its generation. A generation that was replicated has the source's inodes, so every handle of a file that it holds goes on; a salvaged one
has the base's inodes and new ones for files that are new, whose handles, like those of files that were lost, answer ESTALE, never another
file. The new server knows nothing of the clients' opens and locks; it ends its grace period at once, so clients open their files again
without waiting 90 s for others, and a lock that was held is lost, which the client says to its holder by EIO (nfs(5), recover_lost_locks).

Each export has the option `mountpoint`: while nothing is mounted there, rpc.mountd does not answer and clients wait, so neither what lies
below a mount point nor an ESTALE gets out. To end: the list, then what keeps the filesystem busy. Locks go by `unlock_filesystem`, since
Linux 6.9 opens too; before that the clients that hold them are expired, and open what they have on other volumes again. The last export
ends the server, and with it everything.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final
from uuid import UUID

from agent.contract.errors import CommandFailed, KernelLacks, LandfallError, ProgramMissing, RequestRefused
from agent.serving.exports import Share
from agent.system.clock import monotonic_s, wait_until
from agent.system.files import remove_durably, write_durably
from agent.system.run import finishes, run, start
from agent.volume import filesystem

PORT: Final = 2049
ETAB: Final = Path("/var/lib/nfs/etab")
NFSD: Final = Path("/proc/fs/nfsd")
FILESYSTEMS: Final = Path("/proc/filesystems")
RPC: Final = Path("/proc/net/rpc")
PACKAGE: Final = "nfs-kernel-server"
PROGRAMS: Final = ("exportfs", "rpc.mountd", "rpc.nfsd")
THREADS: Final = 8
GRACE_S: Final = 10
"""The shortest that the kernel takes."""
START_LIMIT_S: Final = 60.0
CLOSE_LIMIT_S: Final = 60.0

_VERSIONS: Final = ("--no-nfs-version", "3", "--no-nfs-version", "4.0")
_NO_PORTS: Final = ("--no-nfs-version", "2", "--no-nfs-version", "3")
"""Without these rpc.mountd listens at ports of its own for clients of versions that are not served."""
_FLUSHED_S: Final = 1.1
_KEPT: Final = "the kernel keeps an export"
_SUPERBLOCK: Final = re.compile(r'^- \S+: \{[^"]*superblock: "([0-9a-f]+):([0-9a-f]+):', re.MULTILINE)
_LISTED: Final = re.compile(r"^(/\S*)\t(\S+?)\(", re.MULTILINE)
_FOLDER: Final = re.compile(r"/[A-Za-z0-9_./-]+")


class Squash(StrEnum):
    """Whose rights clients' users have here (exports(5), "User ID Mapping")."""

    ROOT = "root"  # root is nobody
    ALL = "all"  # everybody is nobody
    NONE = "none"


class Security(StrEnum):
    """How clients say who they are: by their word, or by Kerberos, which the node's rpc.svcgssd must know."""

    SYS = "sys"
    KRB5 = "krb5"
    KRB5I = "krb5i"
    KRB5P = "krb5p"


_SQUASH: Final = {Squash.ROOT: "root_squash", Squash.ALL: "all_squash", Squash.NONE: "no_root_squash"}


def client(text: str) -> str:
    """Return who may mount, as exportfs names it; RequestRefused unless it is an address or a network with nothing set below its prefix.

    No names (whoever answers for the name's address would be let in), no wildcards, and not everybody.
    """
    try:
        network = ipaddress.ip_network(text, strict=True)
    except ValueError as error:
        raise RequestRefused(f"{text!r} is no address and no network", cause=str(error), fix="Such as 192.0.2.0/24.") from error
    if not network.prefixlen or network.is_multicast or network.network_address.is_unspecified:
        raise RequestRefused(f"{text} is everybody, or nobody", fix="Name the networks of the clients, such as 192.0.2.0/24.")
    return str(network)


@dataclass(frozen=True, slots=True)
class Nfs:
    """The node's NFS server; ``folder`` for what must go with a boot, ``clients`` as ``client`` returns them, none: no NFS."""

    folder: Path
    clients: tuple[str, ...]
    security: tuple[Security, ...] = (Security.SYS,)
    squash: Squash = Squash.ROOT

    @property
    def protocol(self) -> str:
        """NFS."""
        return "NFS"

    @property
    def wanted(self) -> bool:
        """Whether somebody may mount."""
        return bool(self.clients)

    def prepare(self, share: Share, volume: UUID) -> None:
        """Let clients wait for a share that is not mounted yet: the server runs, and answers nothing for it."""
        self._begin(share, volume, is_mounted=False)

    def open(self, share: Share, volume: UUID) -> None:
        """Export ``share``; on return the kernel answers for it. ProgramMissing, KernelLacks, CommandFailed.

        Order: list, who answers the kernel, the kernel's threads; whoever asks a server that has no list is told that his files are gone.
        If we die here, asking again does what is missing; the list alone exports nothing.
        """
        self._begin(share, volume, is_mounted=True)

    def dismiss(self, share: Share) -> None:
        """Nothing: a client of NFS waits, and is not to be told that its files are gone."""

    def follow(self) -> None:
        """Nothing: the server answers at every address of the node, to ``clients`` alone."""

    def close(self, share: Share, *, limit_s: float = CLOSE_LIMIT_S) -> None:
        """End the export, what clients hold open, and with the last export the server; CommandFailed if that takes longer than ``limit_s``.

        If we die here, asking again does the rest. A step that hangs in the kernel is left behind: it can do no harm later.
        """
        if not self._pid_file.exists() and str(share.path) not in {path for path, _ in _listed()}:
            return
        until_s = monotonic_s() + limit_s
        device = os.stat(share.path).st_dev if filesystem.is_mounted(share.path) else None
        if names := [name for path, name in _listed() if path == str(share.path)]:
            ending = [_argument(name, share.path) for name in names]
            _ends(["exportfs", "-u", *ending], until_s, f"{share.path} is exported still")
        if not _listed() and self._pid_file.exists():  # without it the server is somebody else's
            self._stop(until_s)
        elif _threads() and device is not None:
            _ends(["tee", str(NFSD / "unlock_filesystem")], until_s, "locks could not be ended", f"{share.path}\n".encode())
            for holder in _holders(device):
                _ends(["tee", str(holder / "ctl")], until_s, "a client's open files could not be ended", b"expire\n")
            _forget(share.path, until_s)
            if left := [holder.name for holder in _holders(device)]:
                raise CommandFailed("NFS clients hold files open still", cause=f"clients {', '.join(left)} in {NFSD}/clients")

    def is_open(self, share: Share) -> bool:
        """Whether the share is on the list, and the server runs."""
        return self._pid() is not None and _threads() > 0 and any(path == str(share.path) for path, _ in _listed())

    def problem(self, shares: tuple[Share, ...]) -> LandfallError | None:
        """Return what keeps the node from exporting by NFS; where nothing is to be exported, what would keep it."""
        try:
            refuse_lacking()
        except LandfallError as error:
            return error
        for share in shares:
            if not self.is_open(share):
                return CommandFailed(f"{share.name} is not exported", fix=f"`landfall serve {share.name}` exports it again.")
        return None

    def _begin(self, share: Share, volume: UUID, *, is_mounted: bool) -> None:
        if not self.wanted:
            return
        refuse_lacking()
        ETAB.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        ETAB.touch(mode=0o644)  # exportfs does not begin one
        names = [name for path, name in _listed() if path == str(share.path)]
        if earlier := [name for name in names if name not in self.clients]:
            run(["exportfs", "-u", *(_argument(name, share.path) for name in earlier)])
        share.path.mkdir(mode=0o755, parents=True, exist_ok=True)
        wanted = [_argument(name, share.path) for name in self.clients]
        # Status 1 for a folder that cannot be exported, which is what lies below most mount points.
        run(["exportfs", "-o", self.options(volume), *wanted], ok=(0,) if is_mounted else (0, 1))
        if is_mounted and names:  # the kernel asks once; what was not answered is on the queue for whoever answers next
            self._stop_answering(monotonic_s() + START_LIMIT_S)
        if self._pid() is None:
            self._start_answering()
        if not _threads():
            run(["rpc.nfsd", *_VERSIONS, "--grace-time", str(GRACE_S), str(THREADS)], timeout_s=START_LIMIT_S)
            with suppress(OSError):  # a kernel that keeps no record of clients, as in a container, waits so long
                (NFSD / "v4_end_grace").write_bytes(b"Y\n")
        if not _threads():
            raise CommandFailed("the kernel's NFS server did not start", fix=f"See the kernel's log; is TCP port {PORT} free?")

    def options(self, volume: UUID) -> str:
        """Return the options of an export (exports(5))."""
        security = ":".join(self.security)
        return f"rw,sync,no_subtree_check,{_SQUASH[self.squash]},sec={security},fsid={volume},mountpoint"

    def _start_answering(self) -> None:
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with open(self.folder / "mountd.log", "ab") as said:
            argv = ["rpc.mountd", "--foreground", *_NO_PORTS]
            child = start(argv, stdout=said.fileno(), stderr=said.fileno())
        write_durably(self._pid_file, f"{child.pid}\n".encode())
        if not wait_until(lambda: child.poll() is not None or self._answers(), START_LIMIT_S) or child.returncode is not None:
            raise CommandFailed("rpc.mountd did not start", cause=str(self.folder / "mountd.log"))
        child.returncode = 0  # it outlives this process

    def _answers(self) -> bool:
        """Whether the kernel has somebody to ask: before that it takes every export for missing."""
        pid = self._pid()
        with suppress(OSError):
            return any(os.readlink(opened).endswith("/nfsd.fh/channel") for opened in Path(f"/proc/{pid}/fd").iterdir())
        return False

    def _stop(self, until_s: float) -> None:
        """End the threads, then who answers them: the other way round clients would be told that nothing is exported."""
        if _threads():
            _ends(["rpc.nfsd", "0"], until_s, "the kernel's NFS server did not end")
        self._stop_answering(until_s)

    def _stop_answering(self, until_s: float) -> None:
        """End rpc.mountd, which has nothing of its own to lose; asked politely it first looks, for a minute, for a portmapper to leave."""
        pid = self._pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            if not wait_until(lambda: self._pid() is None, until_s - monotonic_s()):
                raise CommandFailed("rpc.mountd did not end", cause=f"process {pid}")
            with suppress(ChildProcessError):  # an agent before us started it
                os.waitpid(pid, os.WNOHANG)
        if self._pid_file.exists():
            remove_durably(self._pid_file)

    @property
    def _pid_file(self) -> Path:
        return self.folder / "mountd.pid"

    def _pid(self) -> int | None:
        """Return the pid of our rpc.mountd, if the process of the pid file is one."""
        try:
            pid = int(self._pid_file.read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if words[0].rpartition(b"/")[2] == b"rpc.mountd" else None


def is_available() -> bool:
    """Whether the kernel's NFS server can be spoken to."""
    return (NFSD / "threads").exists()


def refuse_lacking() -> None:
    """ProgramMissing or KernelLacks, with what to do, unless this node has what it takes; the kernel's server is made ready to be asked."""
    for program in PROGRAMS:
        if not shutil.which(program):
            raise ProgramMissing(f"{program} is not installed", fix=f"Install {PACKAGE} (apt-get install {PACKAGE}).")
    if is_available():
        return
    if not _is_in_kernel():
        with suppress(ProgramMissing):
            run(["modprobe", "nfsd"], ok=range(256))
    if not _is_in_kernel():
        raise KernelLacks("this kernel has no NFS server", fix="`modprobe nfsd`; in a container load it on the host, or empty nfs_clients.")
    run(["mount", "-n", "-t", "nfsd", "nfsd", str(NFSD)])


def _is_in_kernel() -> bool:
    return "\tnfsd\n" in FILESYSTEMS.read_text()


def folder_problem(folder: Path) -> str:
    """Return why volumes below a folder cannot be exported; empty if they can."""
    return "" if _FOLDER.fullmatch(str(folder)) else f"{folder}: only letters, digits, `_`, `.`, `-` and `/` go into a list of exports"


def superblocks(states: str) -> set[int]:
    """Return the devices that a client holds something open on, from the kernel's list of its states (/proc/fs/nfsd/clients/*/states).

    A file's name in that list cannot pass for a line of it: the kernel quotes newlines and quotation marks, and the superblock goes first.
    """
    return {os.makedev(int(major, 16), int(minor, 16)) for major, minor in _SUPERBLOCK.findall(states)}


def listed(etab: str) -> list[tuple[str, str]]:
    """Return path and client of each export in the text of an etab."""
    return _LISTED.findall(etab)


def _listed() -> list[tuple[str, str]]:
    try:
        return listed(ETAB.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError:
        return []


def _argument(name: str, path: Path) -> str:
    """Return client and path as exportfs takes them; an IPv6 address goes in brackets."""
    if ":" not in name:
        return f"{name}:{path}"
    address, slash, prefix = name.partition("/")
    return f"[{address}]{slash}{prefix}:{path}"


def _threads() -> int:
    try:
        return int((NFSD / "threads").read_text())
    except (OSError, ValueError):
        return 0


def _holders(device: int) -> Iterator[Path]:
    for states in (NFSD / "clients").glob("*/states"):
        with suppress(OSError):  # the client has just gone
            if device in superblocks(states.read_text(encoding="utf-8", errors="surrogateescape")):
                yield states.parent


def _forget(path: Path, until_s: float) -> None:
    """Have the kernel let go of an export, which keeps it mounted.

    What is flushed is not used from then on, but let go of only in a second in which nothing was flushed before (net/sunrpc/cache.c,
    write_flush: it sets the time of the next look ahead), or up to half a minute later.
    """
    _ends(["exportfs", "-f"], until_s, _KEPT)
    while _is_remembered(path):
        if monotonic_s() > until_s:
            raise CommandFailed(_KEPT, cause=str(path))
        wait_until(lambda: False, _FLUSHED_S, every_s=_FLUSHED_S)
        _ends(["exportfs", "-f"], until_s, _KEPT)


def _is_remembered(path: Path) -> bool:
    exports = (RPC / "nfsd.export" / "content").read_text(encoding="utf-8", errors="surrogateescape")
    handles = (RPC / "nfsd.fh" / "content").read_text(encoding="utf-8", errors="surrogateescape")
    return f" {path}\t" in exports or any(line.endswith(f" {path}") for line in handles.splitlines())


def _ends(argv: list[str], until_s: float, otherwise: str, stdin: bytes = b"") -> None:
    if not finishes(argv, until_s - monotonic_s(), stdin=stdin):
        raise CommandFailed(otherwise, cause=f"{' '.join(argv)} failed, or did not end in time")
