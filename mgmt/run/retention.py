"""Retention: which generations each node keeps. Only the management node lets one go; a source cannot, nor can a transfer.

What a salvage made is never let go here, nor what was kept of an overtaken primary, nor the empty generation, nor what somebody holds, nor
what an open transfer needs.
"""

from __future__ import annotations

import contextlib

from agent.contract import messages as m
from agent.contract.errors import DeviceBusy, NodeUnreachable, NoSuchGeneration, TransferBusy
from agent.contract.identity import GenerationId, GenerationKind
from agent.system.clock import wall_ns
from mgmt.catalog import Hold, VolumeEntry
from mgmt.keep import Keep, let_go
from mgmt.run.site import Site
from mgmt.run.volumes import facts_of

LEAST = 2
"""A base and a target."""

KEPT_KINDS = frozenset({GenerationKind.EMPTY, GenerationKind.SALVAGED, GenerationKind.KEPT})


def retain(site: Site, entry: VolumeEntry) -> list[GenerationId]:
    """Return the generations let go: on each node those that neither the volume's rule nor a hold keeps.

    A node that does not answer or is busy keeps what it has until the next time.
    """
    gone = []
    for name in (entry.secondary, entry.primary):
        with contextlib.suppress(NodeUnreachable):
            gone += _retain_on(site, entry, name)
    return gone


def hold(site: Site, name: str, generation: str, reason: str) -> None:
    """Keep a generation, named as `landfall status` does, whatever the volume's rule says; NoSuchGeneration if neither node holds it."""
    entry = site.catalog.volume(name)
    held = set()
    for node in (entry.primary, entry.secondary):
        with contextlib.suppress(NodeUnreachable):
            held |= {facts.id.name for facts in facts_of(site.node(node), entry.id).generations}
    if generation not in held:
        raise NoSuchGeneration(f"no node that answers holds generation {generation} of volume {entry.name}")
    site.catalog.hold(entry.id, Hold(generation, reason, wall_ns()))


def release_hold(site: Site, name: str, generation: str) -> None:
    """Let retention have a generation again; NoSuchGeneration if it was not held."""
    if not site.catalog.release(site.catalog.volume(name).id, generation):
        raise NoSuchGeneration(f"generation {generation} of volume {name} is not held", fix="`landfall hold VOLUME` lists what is.")


def _retain_on(site: Site, entry: VolumeEntry, name: str) -> list[GenerationId]:
    node, gone = site.node(name), []
    held = [(facts.id, facts.taken_ns) for facts in facts_of(node, entry.id).generations if facts.kind not in KEPT_KINDS]
    keep = entry.keep if entry.keep != Keep() else Keep(last=site.inventory.keep_generations)
    holds = {hold.generation for hold in site.catalog.holds(entry.id)}
    excess = [generation for generation in let_go(held, keep, LEAST) if generation.name not in holds]
    if not excess:
        return []
    committed = [facts for facts in node.ask(m.ListTransfers()).transfers if facts.volume == entry.id]
    for facts in committed:
        # The record of a transfer that is long committed would hold its generations for ever.
        if facts.state is m.TransferState.COMMITTED and not {facts.base, facts.target}.isdisjoint(excess):
            node.ask(m.DiscardTransfer(facts.id))
    for generation in excess:
        with contextlib.suppress(DeviceBusy, TransferBusy):
            node.ask(m.DropGeneration(generation))
            gone.append(generation)
    return gone
