"""``python -m tests.bench [NAME [ARGUMENTS]]``: every benchmark, or the one that is named; JSON under build/bench/.

Each is a process of its own, so that memory is its own, in a mount namespace of its own, so that what it mounts is gone with it.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Final

BENCHES: Final = ("copy", "scattered", "determination", "transfer", "order", "cycle")


def main(arguments: list[str]) -> int:
    """Return the exit status: the first that is not 0."""
    names, rest = ((arguments[0],), arguments[1:]) if arguments and arguments[0] in BENCHES else (BENCHES, arguments)
    status = 0
    for name in names:
        sys.stdout.write(f"--- {name}\n")
        sys.stdout.flush()
        argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", f"tests.bench.bench_{name}", *rest]
        status = subprocess.run(argv, check=False).returncode or status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
