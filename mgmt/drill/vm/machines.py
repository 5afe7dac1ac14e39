"""A virtual machine as its host sees it: commands over SSH, bytes counted at its interface, its power.

Runs where the machines can be reached (``vagrant/host run``).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import zstandard

from agent.contract.errors import CommandFailed, LandfallError
from agent.system.clock import monotonic_s
from agent.system.run import run, start
from mgmt.drill.strikes import Nodes

NETWORK: Final = "landfall-lab"
DOMAIN_PREFIX: Final = "landfall-"
COMMAND_LIMIT_S: Final = 300.0
COPY_LIMIT_S: Final = 900.0
BOOT_LIMIT_S: Final = 600.0
AGENT: Final = "landfall-agent.service"
_CHUNK: Final = 1 << 20
_FAIL_DISK: Final = """
volumes=$(dmsetup info --columns --noheadings --options name)
[ -n "$volumes" ] || exec xfs_io -x -c shutdown /var/lib/landfall/pool
for volume in $volumes; do dmsetup wipe_table --force --noflush --nolockfs "$volume"; done
"""
_CUT: Final = """table inet drill {
  chain in { type filter hook input priority -300; ip saddr nas2 drop; }
  chain out { type filter hook output priority -300; ip daddr nas2 drop; }
}
"""


class Machines(Protocol):
    """What the drill asks of machines. Tests put other things behind it."""

    def run(self, node: str, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = COMMAND_LIMIT_S) -> str:
        """Return what a command, run by the node's root, printed; CommandFailed if it failed."""

    def copy_out(self, node: str, argv: Sequence[str], to: Path) -> None:
        """Store what a command of the node's root prints, with holes where it is zeros."""

    def bytes_sent(self, node: str) -> int:
        """Return how many bytes have left the node towards the other nodes, counted outside it."""


class Struck(Machines, Nodes, Protocol):
    """Machines that things happen to."""


class LibvirtMachines:
    """Machines of libvirt, reached with the SSH configuration that the lab wrote when it came up."""

    def __init__(self, ssh_config: Path) -> None:
        self._ssh_config = ssh_config
        self._interfaces: dict[str, str] = {}

    def run(self, node: str, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = COMMAND_LIMIT_S) -> str:
        """See Machines."""
        return run(self._ssh(node, shlex.join(argv)), stdin=stdin, timeout_s=timeout_s).text

    def copy_out(self, node: str, argv: Sequence[str], to: Path) -> None:
        """See Machines. It travels compressed; if we die here, what is there of the file is overwritten by the next copy."""
        packed, words = (to.with_name(to.name + suffix) for suffix in (".zst", ".words"))
        # Without pipefail a command that fails would leave a short file that looks whole.
        command = shlex.join(["bash", "-c", f"set -o pipefail; {shlex.join(argv)} | zstd -1 -q -c"])
        with packed.open("wb") as output, words.open("wb") as errors:
            process = start(self._ssh(node, command), stdout=output.fileno(), stderr=errors.fileno())
            try:
                status = process.wait(COPY_LIMIT_S)
            finally:
                process.kill()
                process.wait()
        if status:
            cause = words.read_text("utf-8", "replace")[-1000:]
            raise CommandFailed(f"`{shlex.join(argv)}` ended with status {status} on {node}", cause=cause)
        words.unlink()
        _unpack(packed, to)
        packed.unlink()

    def bytes_sent(self, node: str) -> int:
        """See Machines; libvirt counts at the host's end of the interface."""
        words = run(["virsh", "--quiet", "domifstat", DOMAIN_PREFIX + node, self._interface(node)]).text.split()
        return int(words[words.index("tx_bytes") + 1])

    def kill_agent(self, node: str) -> None:
        """See strikes.Nodes; systemd, which would start it again, is told not to."""
        self.run(node, ["sh", "-c", f"systemctl kill --signal=KILL {AGENT}; systemctl stop {AGENT}"])

    def start_agent(self, node: str) -> None:
        """See strikes.Nodes."""
        self.run(node, ["systemctl", "start", AGENT])

    def cut_power(self, node: str) -> None:
        """See strikes.Nodes."""
        _virsh("destroy", node)

    def start(self, node: str) -> None:
        """See strikes.Nodes; CommandFailed if it does not come up in time."""
        _virsh("start", node)
        until = monotonic_s() + BOOT_LIMIT_S
        while True:
            try:
                self.run(node, ["systemctl", "is-active", "--quiet", "multi-user.target"], timeout_s=30.0)
                return
            except LandfallError:
                if monotonic_s() > until:
                    raise

    def pause(self, node: str) -> None:
        """See strikes.Nodes."""
        _virsh("suspend", node)

    def wake(self, node: str) -> None:
        """See strikes.Nodes."""
        _virsh("resume", node)

    def fail_disk(self, node: str) -> None:
        """See strikes.Nodes: the group's logical volumes lead to errors from now on; without a group, the pool's filesystem goes down."""
        self.run(node, ["sh", "-c", _FAIL_DISK])

    def cut_link(self) -> None:
        """See strikes.Nodes; nas1 drops what it gets from nas2, and what it would send there."""
        self.run("nas1", ["nft", "-f", "-"], stdin=_CUT.encode())

    def heal_link(self) -> None:
        """See strikes.Nodes."""
        self.run("nas1", ["nft", "delete", "table", "inet", "drill"])

    def _interface(self, node: str) -> str:
        if node not in self._interfaces:
            rows = [line.split() for line in run(["virsh", "--quiet", "domiflist", DOMAIN_PREFIX + node]).text.splitlines()]
            found = [row[0] for row in rows if len(row) > 2 and row[2] == NETWORK]
            if len(found) != 1:
                raise CommandFailed(f"{node} has {len(found)} interfaces in the network {NETWORK}", cause=str(rows))
            self._interfaces[node] = found[0]
        return self._interfaces[node]

    def _ssh(self, node: str, command: str) -> list[str]:
        return ["ssh", "-F", str(self._ssh_config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", node, "sudo", "-n", "--", command]


def _virsh(verb: str, node: str) -> None:
    run(["virsh", "--quiet", verb, DOMAIN_PREFIX + node])


def _unpack(packed: Path, to: Path) -> None:
    """Write what was compressed, leaving out what is zeros."""
    zeros = bytes(_CHUNK)
    with packed.open("rb") as source, to.open("wb") as file, zstandard.ZstdDecompressor().stream_reader(source) as stream:
        at = 0
        while chunk := stream.read(_CHUNK):
            if chunk != zeros[: len(chunk)]:
                file.seek(at)
                file.write(chunk)
            at += len(chunk)
        file.truncate(at)
