"""What a drill left on the host, and what LVM says on a machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[2]
DIGESTS = ROOT / "mgmt" / "drill" / "checker" / "digests.py"
"""A program for any Python that prints what lies below a folder."""
ADDRESS = "10.78.0.100"
"""Where clients find the drill's volume, before and after."""
OWN_ADDRESSES = {"mgmt": "10.78.0.10", "nas1": "10.78.0.11", "nas2": "10.78.0.12"}
Listing = dict[str, dict[str, Any]]


def listing(document: str) -> Listing:
    """Return what the program of digests printed; the root's path is empty, as loss statements have it."""
    found: Listing = json.loads(document)
    return {"" if path == "." else path: told for path, told in found.items()}


CONTENT = ("kind", "size", "sha256", "sha256_of_blocks", "target", "device")
"""What a file that was kept at its base keeps of it; the rest may be the base's or the target's."""


def content(told: dict[str, Any] | None) -> dict[str, Any]:
    """Return of what was listed of a file what it holds."""
    return {name: value for name, value in (told or {}).items() if name in CONTENT}


@dataclass(frozen=True, slots=True)
class Run:
    """A drill's own account and, per path, what the source's frozen generations held before the fault."""

    report: dict[str, Any]
    added: dict[str, Any]  # the volume, as it was made
    prepared: dict[str, Any]  # the last transfer that was broken off
    base: Listing
    target: Listing
    statement: dict[str, Any]  # empty where nothing had to be recovered: the transfer was resumed

    @staticmethod
    def read(folder: Path) -> Run:
        """Return the drill in a folder."""
        report, added, prepared = (json.loads((folder / f"{name}.json").read_text()) for name in ("report", "added", "prepared"))
        base, target = (listing((folder / f"{name}.json").read_text()) for name in ("base", "target"))
        return Run(report, added, prepared, base, target, json.loads((folder / "loss.json").read_text()) if recovered(folder) else {})

    @property
    def volume(self) -> str:
        """The volume's UUID."""
        return str(self.added["id"])

    @property
    def name(self) -> str:
        return str(self.added["name"])

    @property
    def mount_point(self) -> str:
        """Where the node that serves it has it, nas1 before the fault or nas2 after it."""
        return str(self.added["mount_point"])

    @property
    def server(self) -> str:
        """The node that is to serve in the end."""
        return "nas2" if self.statement else "nas1"

    @property
    def epoch(self) -> int:
        """The epoch in which it serves: a new one for a node that took over."""
        return int(self.prepared["target"]["epoch"]) + bool(self.statement)

    @property
    def accounts(self) -> list[dict[str, Any]]:
        """What the loss statement says of each changed file."""
        return list(self.statement["accounts"])

    @property
    def newest(self) -> dict[str, dict[str, Any]]:
        """Per node the generation that its newest one has to be; both have the base, too."""
        sent = self.prepared["target"]
        return {"nas1": sent, "nas2": self.statement["generation"] if self.statement else sent}

    def tag_of(self, generation: dict[str, Any]) -> str:
        """Return how the tag of a generation begins."""
        return f"landfall/generation/1/{self.volume}/{generation['epoch']}/{generation['counter']}/{generation['nonce']}/"


def recovered(folder: Path) -> bool:
    """Whether the drill ended in a recovery, and not in a transfer that was resumed."""
    return bool(json.loads((folder / "report.json").read_text())["verdict"] == "recovered")


@dataclass(frozen=True, slots=True)
class Volume:
    """A row of lvs(8)."""

    group: str
    name: str
    tags: tuple[str, ...]
    kind: str
    permissions: str
    when_full: str

    def says(self, word: str) -> bool:
        """Whether one of its tags is Landfall's of that kind."""
        return any(tag.startswith(f"landfall/{word}/1") for tag in self.tags)


def logical_volumes(host: Host) -> list[Volume]:
    """Return every logical volume, those that LVM hides included."""
    fields = "vg_name,lv_name,lv_tags,segtype,lv_permissions,lv_when_full"
    rows = json.loads(host.check_output(f"lvs --all --reportformat json --options {fields}"))["report"][0]["lv"]
    return [
        Volume(
            row["vg_name"],
            row["lv_name"].strip("[]"),
            tuple(filter(None, row["lv_tags"].split(","))),
            row["segtype"],
            row["lv_permissions"],
            row["lv_when_full"],
        )
        for row in rows
    ]
