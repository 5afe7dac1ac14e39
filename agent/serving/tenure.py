"""Who may serve, as this node knows it since its last boot: one small file a volume, in a folder that does not outlive the boot.

A primary's epoch is durable in its volume's record, but after a boot nobody knows whether another node was promoted meanwhile. So serving
wants a tenure, and a tenure is written only by the order to serve. Each file names the boot it was written in: where the folder is not a
tmpfs, what an earlier boot wrote counts for nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

from agent.contract.errors import RequestRefused
from agent.contract.messages import from_document, to_document
from agent.system.clock import boot_id
from agent.system.files import remove_durably, sweep, write_durably


@dataclass(frozen=True, slots=True)
class Tenure:
    """This node's permission to serve a volume at an epoch.

    ``rests_after`` is the counter of the newest generation when it was last made unwritable: what was taken since then holds all of it.
    """

    volume: UUID
    epoch: int
    boot: str
    rests_after: int | None = None


class Tenures:
    """The tenures of a node, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep(folder)
        self._folder = folder

    def of(self, volume: UUID) -> Tenure | None:
        """Return the tenure of a volume; None if nobody confirmed one since the last boot, or what is written cannot be read."""
        try:
            tenure = from_document(json.loads(self._path(volume).read_bytes()), Tenure)
        except (FileNotFoundError, ValueError, RequestRefused):
            return None
        return tenure if tenure.boot == boot_id() else None

    def confirm(self, volume: UUID, epoch: int) -> Tenure:
        """Return the tenure of a volume at ``epoch``, from now on the one in force. If we die here, the old one or the new one is."""
        tenure = Tenure(volume, epoch, boot_id())
        if self.of(volume) != tenure:
            self._write(tenure)
        return tenure

    def rest(self, volume: UUID, after: int) -> None:
        """Note that a volume which has a tenure cannot be written to any more, after generation ``after`` was taken."""
        if (tenure := self.of(volume)) is not None and tenure.rests_after is None:
            self._write(replace(tenure, rests_after=after))

    def end(self, volume: UUID) -> None:
        """Let there be no tenure of a volume."""
        remove_durably(self._path(volume))

    def _write(self, tenure: Tenure) -> None:
        write_durably(self._path(tenure.volume), json.dumps(to_document(tenure)).encode())

    def _path(self, volume: UUID) -> Path:
        return self._folder / f"{volume}.json"
