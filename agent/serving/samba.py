"""Shares of served volumes, by one smbd of the agent's own, apart from the system's.

smbd outlives the agent: clients keep their connections when the agent is restarted, and the new agent finds it by its pid file. The list of
shares is the configuration file, so there is no other state. If we die between writing the file and the reload, the next call reloads.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from agent.contract.errors import CommandFailed, LandfallError
from agent.serving.exports import Share
from agent.system.clock import wait_until
from agent.system.files import write_durably
from agent.system.run import run

START_LIMIT_S = 20.0
_CONNECT_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Samba:
    """The node's smbd, its files in ``folder``."""

    folder: Path
    address: str
    port: int
    guest: bool
    more: Callable[[], tuple[str, ...]] = tuple  # service addresses, as they are now

    def shares(self) -> tuple[Share, ...]:
        """Return the shares of a running smbd."""
        if self._pid() is None or not self._config.exists():
            return ()
        found = re.findall(r"^\[([^\]]+)\]\n  path = (.*)$", self._config.read_text(), re.MULTILINE)
        return tuple(Share(name, Path(path)) for name, path in found)

    @property
    def protocol(self) -> str:
        """SMB."""
        return "SMB"

    @property
    def wanted(self) -> bool:
        """Whether there is a port."""
        return bool(self.port)

    def prepare(self, share: Share, volume: UUID) -> None:
        """Nothing: a client of SMB that is refused tries again."""

    def open(self, share: Share, volume: UUID) -> None:
        """Serve ``share``; on return smbd accepts connections. Without a port nothing is exported."""
        if not self.wanted:
            return
        others = tuple(other for other in self.shares() if other.name != share.name)
        self._apply((*others, share))

    def export_all(self, shares: tuple[Share, ...], *, limit_s: float = START_LIMIT_S) -> None:
        """Serve exactly these; CommandFailed if smbd does not answer within ``limit_s``, which it may do later."""
        self._apply(shares, limit_s)

    def dismiss(self, share: Share) -> None:
        """End a share and its clients' connections to it; the last share ends smbd."""
        left = tuple(other for other in self.shares() if other.name != share.name)
        if self._pid() is not None:
            run(["smbcontrol", f"--configfile={self._config}", "smbd", "close-share", share.name], ok=(0, 1))
        if left:
            self._apply(left)
        else:
            self.stop()

    def close(self, share: Share) -> None:
        """Nothing: with its connections an export of SMB has ended."""

    def follow(self) -> None:
        """Answer at the service addresses as they are now. smbd begins anew for that, and clients connect again."""
        if self.shares():
            self._apply(self.shares())

    def stop(self, *, limit_s: float = START_LIMIT_S) -> None:
        """End smbd and every connection; CommandFailed if that takes longer than ``limit_s``."""
        pid = self._pid()
        if pid is None:
            return
        _signal(pid, signal.SIGSTOP)  # it takes no more connections, each of which is a process
        for child in _descendants(pid):
            _signal(child, signal.SIGKILL)
        _signal(pid, signal.SIGKILL)
        _wait(lambda: self._pid() is None, "smbd did not end", limit_s)

    def is_open(self, share: Share) -> bool:
        """Whether smbd runs, and has the share."""
        return any(other.name == share.name for other in self.shares())

    def problem(self, shares: tuple[Share, ...]) -> LandfallError | None:
        """Return that smbd does not take connections though something is shared."""
        if not shares or self._takes_connections():
            return None
        names = ", ".join(share.name for share in shares)
        return CommandFailed(f"smbd does not answer for {names}", fix="Look at log.smbd in the agent's run folder; serve the volume again.")

    def _apply(self, shares: tuple[Share, ...], limit_s: float = START_LIMIT_S) -> None:
        for name in ("private", "lock", "state", "cache", "ncalrpc", "pid"):
            (self.folder / name).mkdir(mode=0o755, parents=True, exist_ok=True)
        text = self._text(shares)
        if self._pid() is not None and self._interfaces() not in text:
            self.stop()
        write_durably(self._config, text.encode(), mode=0o644)
        if self._pid() is None:
            run(["smbd", "--daemon", f"--configfile={self._config}", f"--log-basename={self.folder}"])
            _wait(self._answers, "smbd did not start", limit_s)
        else:
            run(["smbcontrol", f"--configfile={self._config}", "smbd", "reload-config"])

    def _text(self, shares: tuple[Share, ...]) -> str:
        guest = "  guest ok = yes\n  force user = root\n" if self.guest else ""
        head = f"""[global]
  server role = standalone server
  smb ports = {self.port}
  interfaces = {" ".join(("lo", self.address, *self.more()))}
  bind interfaces only = yes
  map to guest = {"Bad User" if self.guest else "Never"}
  private dir = {self.folder}/private
  lock directory = {self.folder}/lock
  state directory = {self.folder}/state
  cache directory = {self.folder}/cache
  ncalrpc dir = {self.folder}/ncalrpc
  pid directory = {self.folder}/pid
  log file = {self.folder}/log.smbd
  max log size = 1000
  disable spoolss = yes
  load printers = no
  printing = bsd
  printcap name = /dev/null
  disable netbios = yes
  server min protocol = SMB2_02
  store dos attributes = no
  map archive = no
  map hidden = no
  map system = no
  kernel oplocks = yes
  unix extensions = no
  follow symlinks = yes
  wide links = no
"""
        return head + "".join(f"[{share.name}]\n  path = {share.path}\n  read only = no\n{guest}" for share in shares)

    def _interfaces(self) -> str:
        """Return the line that says where the running smbd listens."""
        return next((f"{line}\n" for line in self._config.read_text().splitlines() if line.startswith("  interfaces = ")), "")

    def _takes_connections(self) -> bool:
        try:
            socket.create_connection((self.address, self.port), timeout=_CONNECT_LIMIT_S).close()
        except OSError:
            return False
        return self._answers()

    def _answers(self) -> bool:
        pid = self._pid()
        return pid is not None and run(["smbcontrol", f"--configfile={self._config}", "smbd", "ping"], ok=(0, 1)).status == 0

    @property
    def _config(self) -> Path:
        return self.folder / "smb.conf"

    def _pid(self) -> int | None:
        """Return smbd's pid if the process in the pid file is a living smbd of this configuration."""
        try:
            pid = int((self.folder / "pid" / f"smbd-{self._config.name}.pid").read_text())
        except (FileNotFoundError, ValueError):
            try:
                pid = int((self.folder / "pid" / "smbd.pid").read_text())
            except (FileNotFoundError, ValueError):
                return None
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
        return pid if f"--configfile={self._config}".encode() in words else None


def _descendants(pid: int) -> list[int]:
    """Return a process's children and theirs, from one look at all processes: there may be a client behind each of them."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_bytes().rpartition(b")")[2].split()  # a name can be any bytes
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _wait(condition: Callable[[], bool], sentence: str, limit_s: float) -> None:
    if not wait_until(condition, limit_s):
        raise CommandFailed(sentence, cause=f"not within {limit_s:g} s")
