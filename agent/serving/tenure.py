"""Who may serve, as this node knows it since its last boot: one small file a volume, in a folder that does not outlive the boot.

A primary's epoch is durable in its volume's record, but after a boot nobody knows whether another node was promoted meanwhile. So a node
serves only what it was told to serve since then: that is its tenure. Each file names the boot it was written in: where the folder is not a
tmpfs, what an earlier boot wrote counts for nothing.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from agent.contract.errors import RequestRefused
from agent.contract.messages import from_document, to_document
from agent.system.clock import boot_id
from agent.system.files import remove_durably, sweep, write_durably


@dataclass(frozen=True, slots=True)
class Tenure:
    """What this node may do for a volume at an epoch.

    ``rests_after`` is the counter of the newest generation when it was last made unwritable: what was taken since then holds all of it.
    ``served``: the order to serve was carried out to its end; where it is not, as after a death on the way, it has to be given again.
    """

    volume: UUID
    name: str
    epoch: int
    boot: str
    confirmed: bool = False
    address: str = ""
    rests_after: int | None = None
    lease_until_ns: int | None = None  # of CLOCK_BOOTTIME; None: it serves without a lease
    served: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """A tenure whose lease ran out: from this mark on no renewal helps, only a new order to serve."""

    epoch: int
    boot: str
    reason: str
    told: bool = False


def is_over(tenure: Tenure, now_ns: int, margin_s: float) -> bool:
    """Whether a node must give a volume up: the margin before the end of the lease has begun."""
    return tenure.lease_until_ns is not None and now_ns >= tenure.lease_until_ns - round(margin_s * 1e9)


def remaining_s(tenure: Tenure, now_ns: int) -> float | None:
    """Return how long the lease lasts; None without one."""
    return None if tenure.lease_until_ns is None else max(0.0, (tenure.lease_until_ns - now_ns) / 1e9)


class Tenures:
    """The tenures of a node, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()

    def recover(self) -> None:
        """Sweep what a writer left that died."""
        sweep(self._folder)

    def of(self, volume: UUID) -> Tenure | None:
        """Return the tenure of a volume; None if there is none of this boot, or what is written cannot be read."""
        return self._read(self._path(volume))

    def all(self) -> tuple[Tenure, ...]:
        """Return every tenure of this boot."""
        return tuple(found for path in sorted(self._folder.glob("[!.]*.json")) if (found := self._read(path)) is not None)

    def confirm(self, volume: UUID, name: str, epoch: int, lease_until_ns: int | None) -> Tenure:
        """Return the tenure of a volume that is to be served at ``epoch``. If we die here, the old one or the new one is in force.

        What ended before has ended: whoever ended it gave up the address. The mark goes last, so that a tenure that ended is never taken
        for one in force. The keeper must be kept out meanwhile.
        """
        known = self.of(volume)
        lost = {"address": ""} if known is not None and self.ended(known) is not None else {}
        tenure = self._change(volume, name, epoch, confirmed=True, rests_after=None, lease_until_ns=lease_until_ns, served=False, **lost)
        remove_durably(self._mark(volume))
        return tenure

    def lease(self, volume: UUID, name: str, epoch: int, until_ns: int) -> Tenure:
        """Return the tenure with a lease until then."""
        return self._change(volume, name, epoch, lease_until_ns=until_ns)

    def ended(self, tenure: Tenure) -> Ended | None:
        """Return the mark of a tenure whose lease ran out."""
        try:
            mark = from_document(json.loads(self._mark(tenure.volume).read_bytes()), Ended)
        except (OSError, ValueError, RequestRefused):
            return None
        return mark if (mark.boot, mark.epoch) == (tenure.boot, tenure.epoch) else None

    def mark_ended(self, tenure: Tenure, reason: str, *, told: bool = False) -> None:
        """Mark a tenure as ended. If we die here it is ended or not; whoever keeps it looks again."""
        mark = Ended(tenure.epoch, tenure.boot, reason, told)
        write_durably(self._mark(tenure.volume), json.dumps(to_document(mark)).encode())

    def have_address(self, volume: UUID, name: str, epoch: int, address: str) -> Tenure:
        """Return the tenure with which an address is held; empty: none is."""
        return self._change(volume, name, epoch, address=address)

    def serve(self, tenure: Tenure) -> None:
        """Note that everything is up that a tenure is for."""
        self._change(tenure.volume, tenure.name, tenure.epoch, served=True)

    def rest(self, volume: UUID, after: int) -> None:
        """Note that a volume which has a tenure cannot be written to any more, after generation ``after`` was taken."""
        tenure = self.of(volume)
        if tenure is not None and tenure.rests_after is None:
            self._change(volume, tenure.name, tenure.epoch, rests_after=after, lease_until_ns=None)

    def end(self, volume: UUID) -> None:
        """Let there be no tenure of a volume."""
        with self._lock:
            remove_durably(self._path(volume))
            remove_durably(self._mark(volume))

    def _change(self, volume: UUID, name: str, epoch: int, **changes: Any) -> Tenure:
        with self._lock:
            known = self.of(volume)
            if known is None or known.epoch != epoch:
                known = Tenure(volume, name, epoch, boot_id(), address=known.address if known else "")
            tenure = replace(known, **changes)
            write_durably(self._path(volume), json.dumps(to_document(tenure)).encode())
            return tenure

    def _read(self, path: Path) -> Tenure | None:
        try:
            tenure = from_document(json.loads(path.read_bytes()), Tenure)
        except (OSError, ValueError, RequestRefused):
            return None
        return tenure if tenure.boot == boot_id() else None

    def _path(self, volume: UUID) -> Path:
        return self._folder / f"{volume}.json"

    def _mark(self, volume: UUID) -> Path:
        return self._folder / f"{volume}.ended"
