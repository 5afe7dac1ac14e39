"""What the drill does to a volume: fill it, change it, and let real SMB clients change it."""

from mgmt.drill.changes import ChangeCounts, KindCount, change
from mgmt.drill.clients import OpenWrite, SmbClient, deleted_while_open, smb_changes
from mgmt.drill.fill import DATABASE, IMMUTABLE, ODD, Filled, Progress, fill

__all__ = [
    "DATABASE",
    "IMMUTABLE",
    "ODD",
    "ChangeCounts",
    "Filled",
    "KindCount",
    "OpenWrite",
    "Progress",
    "SmbClient",
    "change",
    "deleted_while_open",
    "fill",
    "smb_changes",
]
