"""What a drill is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from agent.contract.identity import FilesystemKind
from agent.contract.messages import Differential

MIB = 1 << 20


class LabKind(StrEnum):
    """Where the drill is held."""

    LOCAL = "local"  # three network namespaces on this machine
    VM = "vm"  # three virtual machines on this machine

    @property
    def patience(self) -> float:
        """How often as long a scenario may take there as it says: machines boot, and may be emulated."""
        return 5.0 if self is LabKind.VM else 1.0


@dataclass(frozen=True, slots=True)
class Options:
    """One drill. ``at`` is the share of the transfer's bytes after which the scenario's last fault comes."""

    filesystem: FilesystemKind = FilesystemKind.EXT4
    at: float = 0.5
    scenario: str = "source-killed"
    differential: Differential = Differential.SEND
    seed: int = 1
    files: int = 20_000
    size_bytes: int = 2048 * MIB
    changes: int = 2_000
    rate_bytes_s: int = 0  # of the interrupted transfer; 0: as fast as it goes
    folder: Path = Path("build/drill")
    keep_lab: bool = False
    lab: LabKind = LabKind.LOCAL
    substrate: str = "reflink"

    @property
    def content_bytes(self) -> int:
        """How much the volume is filled with: everything may be written anew beside it. Where machines are emulated every byte is slow."""
        return self.size_bytes * (20 if self.lab is LabKind.VM else 45) // 100
