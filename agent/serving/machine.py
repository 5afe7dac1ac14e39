"""What serving a volume touches of the machine it runs on: mounts, addresses, exports. One object, so that there can be another machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from agent.contract.identity import FilesystemKind
from agent.serving import address
from agent.serving.address import Claim, Interface
from agent.serving.exports import Exporter, Share
from agent.serving.samba import Samba
from agent.serving.unwritable import make_unwritable
from agent.system.neighbour import Link
from agent.system.threads import Threads
from agent.volume import filesystem


class Mounts(Protocol):
    """The kernel's mounts, as agent.volume.filesystem has them."""

    def is_mounted(self, mount_point: Path) -> bool: ...
    def is_writable(self, mount_point: Path) -> bool: ...
    def device_of(self, mount_point: Path) -> Path | None: ...
    def mount(self, device: Path, mount_point: Path, kind: FilesystemKind, *, read_only: bool) -> None: ...
    def remount(self, mount_point: Path, *, read_only: bool) -> None: ...
    def unmount(self, mount_point: Path) -> None: ...
    def unmount_below(self, folder: Path) -> None: ...
    def thaw(self, mount_point: Path) -> bool: ...


class Addresses(Protocol):
    """The kernel's addresses and what is said of them on the link, as agent.serving.address has them."""

    def link_with(self, replication_address: str, name: str = "") -> Link: ...
    def is_held(self, address: Interface) -> bool: ...
    def refuse_taken(self, link: Link, address: Interface) -> None: ...
    def add(self, link: Link, address: Interface) -> None: ...
    def remove(self, address: Interface) -> None: ...
    def announce(self, link: Link, address: Interface, claim: Claim) -> None: ...


class Smb(Exporter, Protocol):
    """The server of SMB, as agent.serving.samba has it."""

    def shares(self) -> tuple[Share, ...]: ...
    def export_all(self, shares: tuple[Share, ...], *, limit_s: float = ...) -> None: ...
    def stop(self, *, limit_s: float = ...) -> None: ...


SmbOf = Callable[[Path, str, int, bool, Callable[[], tuple[str, ...]]], Smb]
"""The server whose files are in a folder: of an address, a port, for guests or not, and at service addresses besides."""


class Unwritable(Protocol):
    """Makes what is mounted unwritable, as agent.serving.unwritable does."""

    def __call__(self, mount_point: Path, *, limit_s: float) -> str: ...


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine under the agent and its keeper; without more, this one."""

    mounts: Mounts = filesystem
    addresses: Addresses = address
    smb: SmbOf = Samba
    make_unwritable: Unwritable = make_unwritable
    threads: Threads = field(default_factory=Threads)
