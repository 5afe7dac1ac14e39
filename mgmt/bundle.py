"""A support bundle: what somebody who helps must know of this installation, without its secrets and without its users' names of files.

Everything in it is chosen: no file of this machine is copied. Of the configuration only keys that cannot hold a secret come with their
values. As a last door, a bundle in which a private key would stand is not written.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import platform
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from agent.contract import messages as m
from agent.contract.errors import LandfallError
from agent.contract.messages import to_document
from agent.system.clock import wall_ns
from agent.system.files import write_durably
from mgmt import run
from mgmt.catalog import VolumeEntry
from mgmt.inventory import Inventory, NodeEntry
from mgmt.run import Site
from mgmt.run.site import release
from mgmt.standing import document

REDACTED: Final = "(redacted)"
_NEWEST: Final = 200
_NODE_KEYS: Final = ("name", "address", "host_key", "ssh_port", "ssh_user", "fence", "pausable")
_KEY_MARK: Final = b"PRIVATE KEY-----"


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a bundle."""

    name: str
    content: bytes


def collected(site: Site, *, with_names: bool) -> list[Part]:
    """Return the parts of a bundle. What cannot be had is there as the error that it was. ``with_names``: names of files too."""
    entries = run.list_volumes(site)
    asked: list[tuple[str, Any]] = [("about", _about()), ("configuration", _configuration(site.inventory))]
    asked.append(("volumes", [_volume(entry, with_names) for entry in entries]))
    asked.append(("check", _or_error(lambda: [to_document(finding) for finding in run.preflight(site)])))
    for entry in entries:
        asked.append((f"standing-{entry.name}", _or_error(lambda entry=entry: _standing(site, entry, with_names))))
        asked.append((f"history-{entry.name}", [_said(found) for found in site.catalog.history(entry.id, newest=_NEWEST)]))
        asked.append((f"transfers-{entry.name}", [to_document(found) for found in site.catalog.transfers(entry.id)[-_NEWEST:]]))
        asked.append((f"salvages-{entry.name}", list(_salvages(site, entry, with_names))))
    for name in site.inventory.names:
        asked.append((f"node-{name}", {verb: _or_error(lambda ask=ask: to_document(ask())) for verb, ask in _of_node(site, name)}))
    return [Part(f"{name}.json", json.dumps(what, indent=1, sort_keys=True).encode()) for name, what in asked]


def write_bundle(path: Path, parts: list[Part]) -> int:
    """Write the parts as one compressed archive, for its owner alone, in one step; return its bytes. LandfallError for a key in it."""
    for part in parts:
        if _KEY_MARK in part.content:
            raise LandfallError(f"a private key would stand in {part.name} of the bundle", fix="Nothing was written; report this.")
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as squeezed, tarfile.open(fileobj=squeezed, mode="w") as archive:
        for part in parts:
            about = tarfile.TarInfo(f"landfall-support/{part.name}")
            about.size, about.mode, about.mtime = len(part.content), 0o600, wall_ns() // 10**9
            archive.addfile(about, io.BytesIO(part.content))
    write_durably(path, packed.getvalue())
    return len(packed.getvalue())


def _about() -> dict[str, str]:
    kernel = os.uname()
    return {"release": release(), "python": platform.python_version(), "kernel": f"{kernel.sysname} {kernel.release} {kernel.machine}"}


def _configuration(inventory: Inventory) -> dict[str, Any]:
    found = {key: value for key, value in asdict(inventory).items() if isinstance(value, int | float | bool)}
    return {**found, "state_dir": str(inventory.state_dir), "node": [_node(entry) for entry in inventory.node]}


def _node(entry: NodeEntry) -> dict[str, Any]:
    options = REDACTED if entry.fence_options != type(entry.fence_options)() else "none"
    return {**{key: getattr(entry, key) for key in _NODE_KEYS}, "fence_options": options}


def _volume(entry: VolumeEntry, with_names: bool) -> dict[str, Any]:
    """Priorities and patterns name files."""
    found: dict[str, Any] = to_document(entry)
    if not with_names:
        found["priorities"] = [[REDACTED, level] for _, level in entry.priorities]
        found["policy"]["atomic_sets"] = [{"name": REDACTED, "patterns": len(atomic.patterns)} for atomic in entry.policy.atomic_sets]
    return found


def _standing(site: Site, entry: VolumeEntry, with_names: bool) -> dict[str, Any]:
    return {**document(run.standing(site, entry.name)), "volume": _volume(entry, with_names)}


def _salvages(site: Site, entry: VolumeEntry, with_names: bool) -> Iterator[dict[str, Any]]:
    for salvage in site.catalog.salvages(entry.id):
        found = to_document(salvage.statement)
        if not with_names:
            del found["accounts"]
            found["broken_sets"] = len(salvage.statement.broken_sets)
        yield {**found, "undone_ns": salvage.undone_ns}


def _said(entry: Any) -> dict[str, Any]:
    return {"kind": entry.kind, "sentence": entry.sentence, "at_ns": entry.at_ns, "last_ns": entry.last_ns, "times": entry.times}


def _of_node(site: Site, name: str) -> Iterator[tuple[str, Any]]:
    for ask in (m.Hello(), m.AskHealth(), m.ListDevices(), m.ListVolumes(), m.ListTransfers()):
        yield m.VERB_OF[type(ask)], lambda ask=ask: site.node(name).ask(ask, limit_s=30.0)


def _or_error(ask: Any) -> Any:
    try:
        return ask()
    except LandfallError as error:
        return {"error": error.to_wire()}
