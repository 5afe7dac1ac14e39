"""A virtual machine as its host sees it: commands over SSH, bytes counted at its interface, its power.

Runs where the machines can be reached (``vagrant/host run``).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import zstandard

from agent.contract.errors import CommandFailed
from agent.system.run import run, start

NETWORK: Final = "landfall-lab"
DOMAIN_PREFIX: Final = "landfall-"
COMMAND_LIMIT_S: Final = 300.0
COPY_LIMIT_S: Final = 900.0
_CHUNK: Final = 1 << 20


class Machines(Protocol):
    """What the drill asks of machines. Tests put other things behind it."""

    def run(self, node: str, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = COMMAND_LIMIT_S) -> str:
        """Return what a command, run by the node's root, printed; CommandFailed if it failed."""

    def copy_out(self, node: str, argv: Sequence[str], to: Path) -> None:
        """Store what a command of the node's root prints, with holes where it is zeros."""

    def bytes_sent(self, node: str) -> int:
        """Return how many bytes have left the node towards the other nodes, counted outside it."""

    def kill(self, node: str) -> None:
        """Switch the node's power off: nothing is flushed, nobody is told."""


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

    def kill(self, node: str) -> None:
        """See Machines."""
        run(["virsh", "--quiet", "destroy", DOMAIN_PREFIX + node])

    def _interface(self, node: str) -> str:
        if node not in self._interfaces:
            rows = [line.split() for line in run(["virsh", "--quiet", "domiflist", DOMAIN_PREFIX + node]).text.splitlines()]
            found = [row[0] for row in rows if len(row) > 2 and row[2] == NETWORK]
            if len(found) != 1:
                raise CommandFailed(f"{node} has {len(found)} interfaces in the network {NETWORK}", cause=str(rows))
            self._interfaces[node] = found[0]
        return self._interfaces[node]

    def _ssh(self, node: str, command: str) -> list[str]:
        return ["ssh", "-F", str(self._ssh_config), "-o", "BatchMode=yes", node, "sudo", "-n", "--", command]


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
