"""What clients reach a served volume by: SMB and NFS behind one interface, in the order in which their clients lose and find it.

A client of SMB that loses its connection connects again; so its connections end while the address is still there to say so. A client of NFS
waits for a server that is silent, and gives its files up (ESTALE) when it is told by one that it does not export them; so an export ends
only when nobody can ask at the address any more, and is there, waiting for the volume, before the address is.

    to begin: prepare, address, open        to end: dismiss, address, close
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import UUID

from agent.contract.errors import LandfallError

log = logging.getLogger("landfall.agent")


@dataclass(frozen=True, slots=True)
class Share:
    """One exported folder."""

    name: str
    path: Path


class Exporter(Protocol):
    """One protocol's server. Every verb can be asked again; what is done already is left as it is."""

    @property
    def protocol(self) -> str:
        """What it is called: SMB, NFS."""

    @property
    def wanted(self) -> bool:
        """Whether this node is configured to export by it."""

    def prepare(self, share: Share, volume: UUID) -> None:
        """Let whoever asks for a share that is not open yet wait for it, where the protocol has such a thing."""

    def open(self, share: Share, volume: UUID) -> None:
        """Export a mounted share; on return the server answers for it. Nothing happens where it is not wanted."""

    def dismiss(self, share: Share) -> None:
        """End the connections of clients that are to come back elsewhere; the address is still there."""

    def close(self, share: Share) -> None:
        """Export the share no more; on return no client's write is under way and no client keeps the filesystem busy."""

    def follow(self) -> None:
        """Answer at the service addresses as they are now."""

    def is_open(self, share: Share) -> bool:
        """Whether clients that reach the server reach the share."""

    def problem(self, shares: tuple[Share, ...]) -> LandfallError | None:
        """Return why this node does not export ``shares``, or, where there are none, could not; with what to do. None if all is well."""


@dataclass(frozen=True, slots=True)
class Exports:
    """All of a node's servers."""

    by: tuple[Exporter, ...]

    def prepare(self, share: Share, volume: UUID) -> None:
        """See ``Exporter.prepare``. What fails here fails in ``open`` too and is told then; the address does not wait for it."""
        for exporter in self.by:
            try:
                exporter.prepare(share, volume)
            except (LandfallError, OSError) as error:
                log.warning("%s: %s", exporter.protocol, error)

    def open(self, share: Share, volume: UUID) -> None:
        """See ``Exporter.open``; every server that can opens, then the first error is raised."""
        _each(self.by, lambda exporter: exporter.open(share, volume))

    def dismiss(self, share: Share) -> None:
        """See ``Exporter.dismiss``."""
        _each(self.by, lambda exporter: exporter.dismiss(share))

    def close(self, share: Share) -> None:
        """See ``Exporter.close``."""
        _each(self.by, lambda exporter: exporter.close(share))

    def follow(self) -> None:
        """See ``Exporter.follow``."""
        _each(self.by, lambda exporter: exporter.follow())

    def protocols(self, share: Share) -> tuple[str, ...]:
        """Return the protocols by which a share is exported now."""
        return tuple(exporter.protocol for exporter in self.by if exporter.is_open(share))


def _each(by: tuple[Exporter, ...], work: Callable[[Exporter], None]) -> None:
    failed: list[LandfallError | OSError] = []
    for exporter in by:
        try:
            work(exporter)
        except (LandfallError, OSError) as error:
            failed.append(error)
    if failed:
        raise failed[0]
