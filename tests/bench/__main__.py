"""``python -m tests.bench [NAME] [ARGUMENTS]``: every benchmark, or the one that is named; JSON and index.html under build/bench/.

Each is a process of its own, so that its memory is its own, in a mount namespace of its own, so that what it mounts is gone with it.
``--short`` takes a few minutes for all of them and fails only where a ratio is grossly worse than anywhere before: never for an absolute
time, never for a goal.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Final

BENCHES: Final = ("copy", "scattered", "determination", "transfer", "order", "freeze", "foreground", "owners", "cycle", "recovery")


def main(arguments: list[str]) -> int:
    """Return the exit status: the last that is not 0."""
    names, rest = ((arguments[0],), arguments[1:]) if arguments and arguments[0] in {*BENCHES, "page"} else (BENCHES, arguments)
    status = 0
    for name in names:
        if name != "page":
            sys.stdout.write(f"--- {name}\n")
            sys.stdout.flush()
            argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", f"tests.bench.bench_{name}", *rest]
            status = subprocess.run(argv, check=False).returncode or status
    subprocess.run([sys.executable, "-m", "tests.bench.page"], check=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
