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
Listing = dict[str, dict[str, Any]]


def listing(document: str) -> Listing:
    """Return what the program of digests printed; the root's path is empty, as loss statements have it."""
    found: Listing = json.loads(document)
    return {"" if path == "." else path: told for path, told in found.items()}


@dataclass(frozen=True, slots=True)
class Run:
    """A drill's own account and, per path, what the source's frozen generations held before the kill."""

    report: dict[str, Any]
    statement: dict[str, Any]
    served: dict[str, Any]
    base: Listing
    target: Listing

    @staticmethod
    def read(folder: Path) -> Run:
        """Return the drill in a folder."""
        told = (json.loads((folder / f"{name}.json").read_text()) for name in ("report", "loss", "served"))
        return Run(*told, *(listing((folder / f"{name}.json").read_text()) for name in ("base", "target")))

    @property
    def volume(self) -> str:
        """The volume's UUID."""
        return str(self.statement["volume"])

    @property
    def name(self) -> str:
        return str(self.statement["volume_name"])

    @property
    def mount_point(self) -> str:
        return str(self.served["mount_point"])

    @property
    def address(self) -> str:
        """Where clients find the volume."""
        return str(self.served["address"]).partition("/")[0]

    @property
    def accounts(self) -> list[dict[str, Any]]:
        """What the loss statement says of each changed file."""
        return list(self.statement["accounts"])

    def tag_of(self, generation: str) -> str:
        """Return how the tag of ``base``, ``target`` or ``generation`` begins."""
        found = self.statement[generation]
        return f"landfall/generation/1/{self.volume}/{found['epoch']}/{found['counter']}/{found['nonce']}/"


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
