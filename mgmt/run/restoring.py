"""Single files from a generation, on the node that serves the volume."""

from __future__ import annotations

import contextlib
from uuid import UUID

from agent.contract import messages as m
from agent.contract.errors import LandfallError, NoSuchGeneration
from mgmt.run.site import Site
from mgmt.run.volumes import facts_of


def restore(site: Site, name: str, generation: str, paths: tuple[str, ...], *, folder: str, node: str | None = None) -> m.Restored:
    """Return what came of copying files from a generation (by its name) beneath ``folder`` of the volume; empty: in place.

    Without ``node`` it is the one that serves the volume. NoSuchGeneration if that node does not hold it.
    """
    entry = site.catalog.volume(name)
    server = node or server_of(site, entry.id, (entry.primary, entry.secondary))
    held = facts_of(site.node(server), entry.id).generations
    chosen = next((facts.id for facts in held if facts.id.name == generation), None)
    if chosen is None:
        fix = f"It holds {', '.join(facts.id.name for facts in held if facts.id.counter)}."
        raise NoSuchGeneration(f"{server} does not hold generation {generation} of volume {name}", fix=fix)
    files = tuple(m.PlacedFile(path, f"{folder}/{path}" if folder else path) for path in paths)
    return site.node(server).ask(m.RestoreFiles(chosen, files))


def server_of(site: Site, volume: UUID, nodes: tuple[str, str]) -> str:
    """Return the node that serves a volume, the first where none does or it does not answer: that one says so."""
    for name in nodes:
        with contextlib.suppress(LandfallError):
            if facts_of(site.node(name), volume).serving:
                return name
    return nodes[0]
