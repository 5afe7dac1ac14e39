"""Names, addresses and paths of a lab, and the marker without which nothing is destroyed.

A lab is a directory. Everything else (network namespaces, loop devices, processes) is found from it, so that a lab whose
maker crashed can be taken down by anybody who knows the directory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from agent.contract.errors import NotOurs
from agent.system.files import write_durably

DEFAULT_DIRECTORY = Path("/var/lib/landfall-lab")
MARKER = "landfall-lab"
NODE_ROOT = Path("/run/landfall/node")
"""Where a node finds its own folder of the lab."""
NAMESPACES = Path("/run/netns")


class NodeName(StrEnum):
    """The nodes of a lab."""

    MGMT = "mgmt"
    NAS1 = "nas1"
    NAS2 = "nas2"

    @property
    def address(self) -> str:
        """The node's IPv4 address; the network is 10.77.0.0/24 and exists in the lab only."""
        return {"mgmt": "10.77.0.1", "nas1": "10.77.0.11", "nas2": "10.77.0.12"}[self.value]

    @property
    def address6(self) -> str:
        """The node's IPv6 address in fd77::/64."""
        return {"mgmt": "fd77::1", "nas1": "fd77::11", "nas2": "fd77::12"}[self.value]


CLIENTS_ADDRESS = "10.77.0.200"
"""Where the lab's clients are; they are no node, and nothing of Landfall runs there."""
NAS_NODES = (NodeName.NAS1, NodeName.NAS2)


class PoolFilesystem(StrEnum):
    """The filesystems with reflink on which a pool can lie."""

    XFS = "xfs"
    BTRFS = "btrfs"


class LabSubstrate(StrEnum):
    """What the nodes' agents keep volumes on: images in the pool, or a volume group on a disk of the node's own."""

    REFLINK = "reflink"
    LVM_THIN = "lvm-thin"
    LVM_SNAPSHOT = "lvm-snapshot"


@dataclass(frozen=True, slots=True)
class Marker:
    """What `up` was asked for (without agents, theirs are started by hand only); `complete` once it ended well."""

    pool_fs: PoolFilesystem
    pool_size_bytes: int
    agents: bool
    complete: bool
    substrate: LabSubstrate = LabSubstrate.REFLINK


@dataclass(frozen=True, slots=True)
class Lab:
    """A lab's directory (resolved) and the names that follow from it."""

    directory: Path

    @staticmethod
    def at(directory: Path = DEFAULT_DIRECTORY) -> Lab:
        """Return the lab of a directory, whether it is there or not."""
        return Lab(directory.resolve())

    @property
    def prefix(self) -> str:
        """The beginning of the names of its namespaces; several labs can be up at the same time."""
        if self.directory == DEFAULT_DIRECTORY:
            return "landfall"
        return f"landfall-{hashlib.sha256(bytes(self.directory)).hexdigest()[:8]}"

    def namespace(self, node: NodeName) -> str:
        """Return the name of a node's network namespace, as in `ip netns`."""
        return f"{self.prefix}-{node}"

    @property
    def switch(self) -> str:
        """The name of the namespace that holds the bridge and nothing else."""
        return f"{self.prefix}-switch"

    @property
    def clients(self) -> str:
        """The name of the namespace in which clients live: on the nodes' network, cut from nobody that has power."""
        return f"{self.prefix}-clients"

    @property
    def namespaces(self) -> list[str]:
        """The names of all its namespaces."""
        return [self.switch, *(self.namespace(node) for node in NodeName), self.clients]

    @property
    def alias(self) -> str:
        """What `lo` of each of its namespaces is called: the namespace's marker."""
        return f"{MARKER} {self.directory}"

    def node(self, node: NodeName) -> Path:
        """Return the folder that a node sees as /run/landfall/node."""
        return self.directory / node

    def pool_image(self, node: NodeName) -> Path:
        """Return the file that holds a node's pool."""
        return self.node(node) / "pool.img"

    def disk_image(self, node: NodeName) -> Path:
        """Return the file that holds a node's volume group."""
        return self.node(node) / "disk.img"

    def volume_group(self, node: NodeName) -> str:
        """Return the name of a node's volume group; such names are the machine's, so they tell labs apart."""
        return f"{self.prefix}-{node}"

    @property
    def marker_path(self) -> Path:
        """The file that makes a directory a lab."""
        return self.directory / MARKER

    @property
    def cuts_path(self) -> Path:
        """The file with the pairs of nodes that are cut."""
        return self.directory / "cuts.json"

    def read_marker(self) -> Marker | None:
        """Return the marker, None where there is no lab; NotOurs for a directory with something else in it."""
        try:
            document = json.loads(self.marker_path.read_bytes())
            return Marker(
                PoolFilesystem(document["pool_fs"]),
                document["pool_size_bytes"],
                document["agents"],
                document["complete"],
                LabSubstrate(document.get("substrate", LabSubstrate.REFLINK)),
            )
        except FileNotFoundError:
            if self.directory.is_dir() and any(self.directory.iterdir()):
                raise NotOurs(f"{self.directory} is not empty and carries no marker {MARKER}") from None
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise NotOurs(f"{self.marker_path} is not a lab's marker", cause=str(error)) from error

    def write_marker(self, marker: Marker) -> None:
        """Make the directory a lab, or record how far it has come."""
        write_durably(self.marker_path, json.dumps(asdict(marker)).encode() + b"\n")
