"""Copies of what a node keeps: a frozen generation, found by LVM's own report or as a file, and the volume that it serves.

The agent is not asked: what the checker compares is not to come from what it checks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.contract.errors import NoSuchGeneration
from agent.contract.identity import GenerationId
from mgmt.drill.vm.machines import Machines

_READ: Final = ("dd", "bs=1M", "iflag=direct", "status=none")
_REPORT: Final = ("lvs", "--all", "--reportformat", "json", "-o", "vg_name,lv_name,lv_uuid,lv_tags,lv_active")


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """A row of lvs(8)."""

    group: str
    name: str
    uuid: str
    tags: frozenset[str]
    active: bool

    @property
    def path(self) -> str:
        """What lvm's commands call it, which is where its device is as well."""
        return f"/dev/{self.group}/{self.name}"


def logical_volumes(machines: Machines, node: str) -> tuple[LogicalVolume, ...]:
    """Return every logical volume of a node, hidden ones included."""
    rows = json.loads(machines.run(node, _REPORT))["report"][0]["lv"]
    return tuple(
        LogicalVolume(
            row["vg_name"],
            row["lv_name"].strip("[]"),
            row["lv_uuid"],
            frozenset(filter(None, row["lv_tags"].split(","))),
            row["lv_active"] == "active",
        )
        for row in rows
    )


def copy_generation(machines: Machines, node: str, pool: Path, generation: GenerationId, to: Path) -> None:
    """Store a frozen generation's bytes, from a file in ``pool`` or from a logical volume; NoSuchGeneration if the node does not keep it.

    A logical volume that was inactive is so again afterwards, also when the copy failed.
    """
    file = pool / "volumes" / str(generation.volume) / "generations" / f"{generation.name}.img"
    if machines.run(node, ["sh", "-c", '[ ! -e "$0" ] || echo there', str(file)]).strip():
        machines.copy_out(node, [*_READ, f"if={file}"], to)
        return
    start = f"landfall/generation/1/{generation.volume}/{generation.epoch}/{generation.counter}/{generation.nonce}/"
    found = [volume for volume in logical_volumes(machines, node) if any(tag.startswith(start) for tag in volume.tags)]
    if len(found) != 1:
        raise NoSuchGeneration(f"{node} keeps generation {generation.name} {len(found)} times, as LVM reports it")
    (volume,) = found
    if not volume.active:
        machines.run(node, ["lvchange", "--yes", "--activate", "y", "--ignoreactivationskip", volume.path])
    try:
        machines.copy_out(node, [*_READ, f"if={volume.path}"], to)
    finally:
        if not volume.active:
            machines.run(node, ["lvchange", "--yes", "--activate", "n", volume.path])


def copy_served(machines: Machines, node: str, mount_point: str, to: Path) -> None:
    """Store what a node serves, as it is now: frozen while it is read, thawed by the program that froze it."""
    device = machines.run(node, ["findmnt", "--noheadings", "--output", "SOURCE", "--mountpoint", mount_point]).strip()
    words = 'trap \'fsfreeze --unfreeze "$0"\' EXIT; fsfreeze --freeze "$0"; dd bs=1M iflag=direct status=none if="$1"'
    machines.copy_out(node, ["bash", "-c", words, mount_point, device], to)
