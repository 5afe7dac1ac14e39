"""Single files of a node that returned, brought to the node that serves: from what was kept of it, as the stored list names them.

Nothing is taken away from the kept generation, and nothing at the volume that was changed meanwhile is replaced unless somebody says so:
the agent that serves looks at each file itself, just before it is replaced. If we die here, each file is the old or the new one, and the
same command does the rest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final
from uuid import UUID, uuid4

from agent.contract import messages as m
from agent.contract.errors import NothingKept, NotListed, RequestRefused
from agent.contract.identity import GenerationKind
from agent.system.clock import wall_ns
from mgmt.catalog import VolumeEntry
from mgmt.failover.returned import DIRECTORY, HeldFile, Here, Returned, There
from mgmt.run.restoring import server_of
from mgmt.run.site import Site, Teller, nobody, operator
from mgmt.run.volumes import facts_of

HISTORY_KIND: Final = "rescue"
BATCH_FILES: Final = 10_000
"""Files of one order: its line has to be shorter than a request may be, with paths of 1,000 bytes each."""

LONGEST_NAME_BYTES: Final = 255
LONGEST_SUFFIX_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Destination:
    """Where rescued files go: in place of what is there, beneath a folder of the volume, or, for neither, beside the originals."""

    in_place: bool = False
    folder: str = ""


@dataclass(frozen=True, slots=True)
class RescuePlan:
    """What is to be brought, from where to where."""

    volume: str
    lists: Returned
    server: str
    files: tuple[m.PlacedFile, ...]
    conflicts: tuple[HeldFile, ...]  # those that would replace what was changed meanwhile
    deleted: tuple[str, ...]  # below what was asked for, and of the same kind: deleted there, so there is nothing to bring


@dataclass(frozen=True, slots=True)
class Rescued:
    """What a rescue brought. ``refused`` were not brought, each with its reason."""

    volume: str
    node: str
    server: str
    generation: str
    in_place: bool
    files: int
    bytes: int
    placed: tuple[m.PlacedFile, ...]
    refused: tuple[m.RefusedPath, ...]
    operator: str

    @property
    def sentence(self) -> str:
        """It in one sentence, for the history; it names no file."""
        how = "in place" if self.in_place else "to the side"
        missing = f"; {len(self.refused):,} were refused" if self.refused else ""
        return f"{self.operator} brought {self.files:,} files of {self.node}'s {self.generation} to {self.server}, {how}{missing}"


Agreement = Callable[[RescuePlan], bool]
"""Told what is to be brought; False stops it before anything is changed."""


def kept_lists(site: Site, name: str, generation: str | None = None) -> Returned:
    """Return the newest list of what a node that returned still holds, or that of a kept ``generation``; NothingKept."""
    entry = site.catalog.volume(name)
    found = sorted(_stored(site, entry.id), key=lambda lists: (lists.kept.epoch, lists.kept.counter))
    chosen = [lists for lists in found if lists.kept.counter and generation in {None, lists.kept.name}]
    if not chosen:
        what = f"generation {generation}" if generation else "nothing"
        raise NothingKept(
            f"{what} of volume {name} is {'not ' if generation else ''}kept of a node that was overtaken",
            fix=f"When {entry.secondary} is back, `landfall resync {name} --discard-from {entry.secondary}` keeps and lists what it holds.",
        )
    return chosen[-1]


def rescue(
    site: Site,
    name: str,
    paths: tuple[str, ...],
    destination: Destination,
    *,
    generation: str | None = None,
    replace: bool = False,
    agree: Agreement = lambda plan: True,
    tell: Teller = nobody,
) -> Rescued | None:
    """Return what came of bringing the listed files at ``paths`` or below them; no paths: all. None if ``agree`` said no.

    ``replace``: what was changed at its place since both nodes had the same is replaced as well; else only the conflicts that ``agree``
    was told of. NothingKept, NotListed, NodeUnreachable for a node that is not there, before anything is changed.
    """
    lists = kept_lists(site, name, generation)
    entry = site.catalog.volume(name)
    plan = _plan(site, entry, lists, paths, destination)
    if not agree(plan):
        return None
    known = {found.path for found in plan.conflicts} if destination.in_place else set()
    files = tuple(m.PlacedFile(found.path, found.at, replace or found.replace or found.path in known) for found in plan.files)
    done = [_carried(site, plan, files[at : at + BATCH_FILES], tell) for at in range(0, len(files), BATCH_FILES)]
    rescued = Rescued(
        entry.name,
        lists.node,
        plan.server,
        lists.kept.name,
        destination.in_place,
        sum(part.files for part in done),
        sum(part.bytes for part in done),
        files,
        tuple(found for part in done for found in part.refused),
        operator(),
    )
    facts = {"operator": rescued.operator, "files": rescued.files, "bytes": rescued.bytes, "refused": len(rescued.refused), "paths": paths}
    site.catalog.note(entry.id, HISTORY_KIND, rescued.sentence, wall_ns(), facts)
    return rescued


def _plan(site: Site, entry: VolumeEntry, lists: Returned, paths: tuple[str, ...], destination: Destination) -> RescuePlan:
    placed: dict[str, m.PlacedFile] = {}
    chosen: list[HeldFile] = []
    deleted: list[str] = []
    for path in paths or ("",):
        wanted = path.strip("/")
        below = [found for found in lists.comparison.held if not wanted or found.path == wanted or found.path.startswith(f"{wanted}/")]
        if not below:
            raise NotListed(
                f"{lists.node} has nothing at {wanted!r} of volume {entry.name} that {lists.primary} lacks",
                fix=f"`landfall rescue {entry.name}` lists what there is.",
            )
        there = [found for found in below if found.there is not There.DELETED]
        if not there:
            raise NotListed(f"{lists.node} deleted {wanted!r} of volume {entry.name}: there is nothing to bring")
        deleted += [found.path for found in below if found.there is There.DELETED]
        is_folder = any(found.path != wanted or found.kind == DIRECTORY for found in below)
        for found in there:
            if found.path not in placed:
                at = place_of(found.path, wanted, lists, destination, is_folder=is_folder)
                is_ours = found.kind == DIRECTORY and (not destination.in_place or found.here is Here.UNTOUCHED)
                placed[found.path] = m.PlacedFile(found.path, at, replace=is_ours)
                chosen.append(found)
    held = facts_of(site.node(lists.node), entry.id).generations
    if not any(facts.id == lists.kept and facts.kind is GenerationKind.KEPT for facts in held):
        raise NothingKept(f"{lists.node} does not hold {lists.kept.name} of volume {entry.name} any more")
    server = server_of(site, entry.id, (entry.primary, entry.secondary))
    conflicts = tuple(found for found in chosen if destination.in_place and found.here is Here.CHANGED and found.kind != DIRECTORY)
    # Directories last, those above others after them: what is made in one changes its time.
    chosen.sort(key=lambda found: (found.kind == DIRECTORY, -found.path.count("/") if found.kind == DIRECTORY else 0))
    return RescuePlan(entry.name, lists, server, tuple(placed[found.path] for found in chosen), conflicts, tuple(deleted))


def place_of(path: str, wanted: str, lists: Returned, destination: Destination, *, is_folder: bool) -> str:
    """Return where a listed file goes that was asked for by ``wanted``, itself or a folder above it; empty: all."""
    if destination.in_place:
        return path
    if destination.folder:
        return f"{destination.folder.strip('/')}/{path}"
    label = f"{lists.node}-{lists.kept.name}"
    if not wanted:
        return f"rescued.{label}/{path}"
    above, _, name = wanted.rpartition("/")
    beside = _labelled(name, label, is_folder=is_folder)
    return f"{above}/{beside}{path[len(wanted) :]}" if above else f"{beside}{path[len(wanted) :]}"


def _labelled(name: str, label: str, *, is_folder: bool) -> str:
    """Return a name that says where a file is from and still ends as the original does, so that programs know what it is."""
    suffix = "" if is_folder else PurePosixPath(name).suffix
    if len(os.fsencode(suffix)) > LONGEST_SUFFIX_BYTES:
        suffix = ""
    stem = name.removesuffix(suffix) if suffix else name
    while len(os.fsencode(f"{stem}.{label}{suffix}")) > LONGEST_NAME_BYTES:
        stem = stem[:-1]
    return f"{stem}.{label}{suffix}"


def _carried(site: Site, plan: RescuePlan, files: tuple[m.PlacedFile, ...], tell: Teller) -> m.Restored:
    """Have some of the files brought; what is there is kept unless it is as it was in the base of the lists, or to be replaced."""
    lists = plan.lists
    if plan.server == lists.node:
        return site.node(plan.server).ask(m.RestoreFiles(lists.kept, files, with_below=False, untouched_since=lists.base))
    number, silence = uuid4(), site.inventory.silence_limit_s
    passes = site.authority.passes(lists.node, plan.server)
    receive = m.ReceiveFiles(number, lists.base.volume, files, lists.base, passes.token, passes.receiver, silence)
    listening = site.node(plan.server).ask(receive)
    send = m.SendFiles(
        number,
        lists.kept,
        files,
        listening.address,
        listening.port,
        passes.token,
        passes.sender,
        silence,
        site.inventory.rate_limit_bytes_s,
    )
    return site.node(lists.node).ask(send, lambda progress: tell(lists.node, progress))


def _stored(site: Site, volume: UUID) -> Iterator[Returned]:
    for path in sorted(lists_folder(site, volume).glob("*.json")):
        with contextlib.suppress(RequestRefused):  # of a release that stored less: it is made again at the next resync
            yield Returned.from_json(path.read_text())


def lists_folder(site: Site, volume: UUID) -> Path:
    """Return where a volume's lists are kept: they outlive both nodes."""
    return site.inventory.state_dir / "returned" / str(volume)
