"""What the drill does to a volume: fill it, change it, and let real SMB clients change it.

As a program, for a node that is another machine (``python -m mgmt.drill.workload``), each a step of its own:

fill ROOT FILES BYTES SEED     real and odd files below ROOT
change ROOT FILES SEED         at least FILES of them changed in every way
smb HOST SHARE SEED            changes by a real SMB client; an even SEED first, then an odd one
"""

from __future__ import annotations

import sys
from pathlib import Path

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


def main(argv: list[str]) -> int:
    """Return the exit status: 0, or 2 for wrong use; what was done is printed."""
    match argv:
        case ["fill", root, files, limit, seed]:
            done: object = fill(Path(root), int(files), int(limit), int(seed), lambda done, total: None)
        case ["change", root, files, seed]:
            done = change(Path(root), int(files), int(seed), lambda done, total: None)
        case ["smb", host, share, seed]:
            done = smb_changes(SmbClient(host, share), int(seed))
        case _:
            sys.stderr.write(__doc__ or "")
            return 2
    sys.stdout.write(f"{done}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
