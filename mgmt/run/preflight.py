"""The preflight: everything that must be right before the bad night, each with a hint. People and playbooks read the same list.

It asks and never changes anything. What cannot be found out is FAILED, not left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from agent.contract import messages as m
from agent.contract.errors import HostKeyChanged, LandfallError, NodeUnreachable
from agent.contract.identity import GenerationKind, empty_generation
from agent.system.clock import wall_ns
from mgmt.catalog import VolumeEntry
from mgmt.run.replication import newest_common
from mgmt.run.site import HELLO_LIMIT_S, Site, release
from mgmt.view import bytes_words

CLOCKS_WARNING_S: Final = 5.0
CLOCKS_FAILED_S: Final = 1800.0
"""Half of what a certificate's beginning is set back by."""
AUTHORITY_WARNING_DAYS: Final = 60.0
STATE_WARNING_BYTES: Final = 256 << 20
POOL_FAILED_BYTES: Final = 64 << 20
POOL_WARNING_SHARE: Final = 0.1
"""Of the largest volume: what may be written before somebody looks again."""
DEFAULT_AGE_S: Final = 26 * 3600.0
"""A daily replication, and two hours for it to take."""


class CheckState(StrEnum):
    """How one thing stands."""

    OK = "OK"
    WARNING = "WARNING"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the list. ``subject`` is a node, a pair, a volume or the management node; ``hint`` says what to do, if anything."""

    subject: str
    what: str
    state: CheckState
    said: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class _Node:
    """What a node answered."""

    health: m.Health
    held: m.Volumes
    transfers: tuple[m.TransferFacts, ...]


def preflight(site: Site, names: tuple[str, ...] = (), *, oldest_s: float = DEFAULT_AGE_S) -> list[Finding]:
    """Return the list for these volumes and their nodes, without names for all. NoSuchVolume for a name that is not known."""
    entries = [site.catalog.volume(name) for name in names] or site.catalog.volumes()
    wanted = {node for entry in entries for node in (entry.primary, entry.secondary)} if names else set(site.inventory.names)
    found = list(_management(site))
    nodes: dict[str, _Node] = {}
    for name in site.inventory.names:
        if name in wanted:
            found += _reached(site, name, nodes)
            found.append(_fence(site, name))
    for name, node in nodes.items():
        found += _of_node(name, node, entries)
    for pair in sorted({(entry.primary, entry.secondary) for entry in entries}):
        if all(name in nodes for name in pair):
            found += _paths(site, *pair)
    for entry in entries:
        found += _of_volume(site, entry, nodes, oldest_s)
    return found


def worst(found: list[Finding]) -> CheckState:
    """Return the worst state of a list."""
    states = {finding.state for finding in found}
    return next((state for state in (CheckState.FAILED, CheckState.WARNING) if state in states), CheckState.OK)


def _management(site: Site) -> Iterator[Finding]:
    days = site.authority.days_left
    yield _graded(
        "management", "certificate authority", days < 1, days < AUTHORITY_WARNING_DAYS, f"good for {days:,.0f} days",
        f"Move {site.inventory.state_dir / 'authority'} away: a new one is made at the next replication.",
    )  # fmt: skip
    if not site.inventory.node:
        yield Finding("management", "nodes", CheckState.FAILED, "none is configured", "Enrol both nodes in landfall.toml.")


def _reached(site: Site, name: str, nodes: dict[str, _Node]) -> Iterator[Finding]:
    try:
        about = site.hello(name)
        before = wall_ns()
        health = site.node(name).ask(m.AskHealth(), limit_s=HELLO_LIMIT_S)
        after = wall_ns()
        held, transfers = site.node(name).ask(m.ListVolumes(), limit_s=30), site.node(name).ask(m.ListTransfers(), limit_s=30)
    except LandfallError as error:
        hint = error.fix_now
        if isinstance(error, NodeUnreachable | HostKeyChanged):
            hint += " What could not be asked of it is not checked."
        yield Finding(name, "agent", CheckState.FAILED, f"{error.message}{f': {error.cause}' if error.cause else ''}", hint)
        return
    nodes[name] = _Node(health, held, transfers.transfers)
    yield Finding(name, "agent", CheckState.OK, f"answers, substrate {', '.join(about.substrates)}")
    same = about.release == release()
    yield _graded(name, "release", False, not same, about.release if same else f"{about.release}, here {release()}", "Update both sides.")
    apart_s = max(0.0, abs(health.wall_ns - (before + after) / 2) / 1e9 - (after - before) / 2e9)
    yield _graded(
        name, "clock", apart_s > CLOCKS_FAILED_S, apart_s > CLOCKS_WARNING_S, f"{apart_s:.1f} s from the management node's",
        "Let chrony or systemd-timesyncd set it: certificates are good for hours, and points in time are for people.",
    )  # fmt: skip


def _fence(site: Site, name: str) -> Finding:
    fence = site.inventory.entry(name).fence
    said = fence or "none: nothing can prove that it does not write any more"
    return _graded(name, "fence", False, not fence, said, "Give the node a `fence` in landfall.toml; without one there is no failover.")


def _of_node(name: str, node: _Node, entries: list[VolumeEntry]) -> Iterator[Finding]:
    free, largest = (
        node.health.pool_free_bytes,
        max((entry.size_bytes for entry in entries if name in (entry.primary, entry.secondary)), default=0),
    )
    yield _graded(
        name, "pool", free < POOL_FAILED_BYTES, free < POOL_WARNING_SHARE * largest, f"{bytes_words(free)} free",
        "Grow the pool, or keep fewer generations.",
    )  # fmt: skip
    room = node.health.state_free_bytes
    yield _graded(
        name, "state folder", room < STATE_WARNING_BYTES // 8, room < STATE_WARNING_BYTES, f"{bytes_words(room)} free",
        "Make room on its filesystem: arrival records and management information lie there.",
    )  # fmt: skip
    for export in node.health.exports:
        serves = ", ".join(node.health.serves)
        if serves or export.problem:
            yield _graded(name, export.protocol, bool(export.problem), False, export.problem or f"answers for {serves}", export.fix)
    for unreadable in node.held.unreadable:
        yield Finding(name, "records", CheckState.FAILED, f"{unreadable.where} cannot be read", "Replicate again; look at the node's disk.")


def _paths(site: Site, primary: str, secondary: str) -> Iterator[Finding]:
    """Try the way of transfers, and the way back."""
    mtus = {}
    for sender, receiver in ((primary, secondary), (secondary, primary)):
        way = f"{sender} to {receiver}"
        try:
            listening = site.node(receiver).ask(m.OpenPath(), limit_s=HELLO_LIMIT_S)
            tried = site.node(sender).ask(m.TryPath(listening.address, listening.port), limit_s=60)
        except LandfallError as error:
            yield Finding(way, "network", CheckState.FAILED, error.message, error.fix_now)
            continue
        mtus[sender] = tried.mtu
        said = tried.problem or f"{tried.source} by {tried.interface}, MTU {tried.mtu}, {1000 * tried.seconds:.0f} ms"
        hint = f"Open all TCP ports of {listening.address} for {sender}; let packets of the MTU through."
        yield _graded(way, "network", bool(tried.problem), False, said, hint)
    if len(set(mtus.values())) > 1:
        said = ", ".join(f"{name} {mtu}" for name, mtu in mtus.items())
        yield Finding(f"{primary} and {secondary}", "MTU", CheckState.WARNING, said, "Give both ends and the switch between them one MTU.")


def _of_volume(site: Site, entry: VolumeEntry, nodes: dict[str, _Node], oldest_s: float) -> Iterator[Finding]:
    held = {name: _held(entry, nodes[name]) for name in (entry.primary, entry.secondary) if name in nodes}
    for name, facts in held.items():
        if facts is None:
            yield Finding(entry.name, "copies", CheckState.FAILED, f"{name} does not hold it", f"`landfall volume add {entry.name}` again.")
    one, other = held.get(entry.primary), held.get(entry.secondary)
    if one is not None and other is not None:
        yield _roles(entry, one, other)
        yield from _age(entry, one, other, oldest_s)
    if other is not None:
        yield from _salvage_room(entry, nodes[entry.secondary])
    waiting = len(site.catalog.notifications(entry.id, pending_only=True))
    yield _graded(
        entry.name, "notifications", False, waiting > 0, f"{waiting} unanswered", f"`landfall status {entry.name}` shows them."
    )  # fmt: skip


def _roles(entry: VolumeEntry, one: m.VolumeFacts, other: m.VolumeFacts) -> Finding:
    primaries = [name for name, facts in ((entry.primary, one), (entry.secondary, other)) if facts.role is m.Role.PRIMARY]
    serving = [name for name, facts in ((entry.primary, one), (entry.secondary, other)) if facts.serving]
    said = f"primary {' and '.join(primaries) or 'nobody'}, served by {' and '.join(serving) or 'nobody'}"
    hint = f"`landfall status {entry.name}` says what to do."
    return _graded(entry.name, "roles", len(serving) > 1, primaries != [entry.primary] or serving != primaries, said, hint)


def _age(entry: VolumeEntry, one: m.VolumeFacts, other: m.VolumeFacts, oldest_s: float) -> Iterator[Finding]:
    common = newest_common(one, other)
    replicate = f"`landfall replicate {entry.name}`."
    there = {facts.id for facts in other.generations if facts.kind not in {GenerationKind.EMPTY, GenerationKind.KEPT}}
    both = [facts for facts in one.generations if facts.id in there]
    if common == empty_generation(entry.id):
        yield Finding(entry.name, "replication", CheckState.WARNING, "no generation is on both nodes", replicate)
        return
    yield Finding(entry.name, "common generations", CheckState.OK, f"{len(both)}, newest {common.name}")
    taken_ns = next(facts.taken_ns for facts in both if facts.id == common)
    age_s = (wall_ns() - taken_ns) / 1e9
    yield _graded(entry.name, "replication", False, age_s > oldest_s, f"{age_s / 3600:.1f} hours old", replicate)


def _salvage_room(entry: VolumeEntry, secondary: _Node) -> Iterator[Finding]:
    """A salvage stores whole files anew, at most as much as the transfer brings."""
    sizes = [facts.bytes_total for facts in secondary.transfers if facts.volume == entry.id and not facts.sending]
    if not sizes:
        return
    free = secondary.health.pool_free_bytes
    said = f"{bytes_words(free)} free, the last transfer had {bytes_words(max(sizes))}"
    yield _graded(entry.name, "room for a salvage", free < max(sizes), free < 2 * max(sizes), said, f"Grow the pool of {entry.secondary}.")


def _held(entry: VolumeEntry, node: _Node) -> m.VolumeFacts | None:
    return next((facts for facts in node.held.volumes if facts.id == entry.id), None)


def _graded(subject: str, what: str, failed: bool, warning: bool, said: str, hint: str) -> Finding:
    state = CheckState.FAILED if failed else CheckState.WARNING if warning else CheckState.OK
    return Finding(subject, what, state, said, "" if state is CheckState.OK else hint)
