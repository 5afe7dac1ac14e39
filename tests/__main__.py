"""``python -m tests [PYTEST ARGUMENTS]``: all tests, in three lanes side by side, since most of them wait for disks and for time limits.

Each lane is a pytest of its own in a mount namespace of its own: nothing else on the machine, the other lane included, can keep a test's
filesystem busy, and whatever a killed test leaves goes with the lane. The exit status is 0 if every lane's is; a lane in which the
arguments select nothing is no failure, unless none selects anything.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
LANES: Final = {
    "storage": ("tests/unit", "tests/simulation", "tests/storage"),
    "faults": ("tests/faults", "tests/drills"),
    "lab": ("tests/lab",),
}
WIDTH: Final = max(map(len, LANES))
NOTHING_SELECTED: Final = 5


@dataclass(frozen=True, slots=True)
class Lane:
    """One pytest."""

    name: str
    process: subprocess.Popen[str]


def main(arguments: list[str]) -> int:
    """Return the exit status."""
    with tempfile.TemporaryDirectory(prefix="landfall-", ignore_cleanup_errors=True) as folder:  # a short path: sockets are made below it
        return _run([_start(name, paths, Path(folder), arguments) for name, paths in LANES.items()])


def _run(lanes: list[Lane]) -> int:
    """Return the exit status of lanes that have been started; Ctrl-C and SIGTERM stop all of them.

    A lane gets SIGINT either way: of SIGTERM pytest would die without taking down what tests have up.
    """

    def pass_on(*_: object) -> None:
        for lane in lanes:
            lane.process.send_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    said = threading.Lock()
    readers = [threading.Thread(target=_pass_on, args=(lane, said), name=lane.name) for lane in lanes]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    statuses = [lane.process.wait() for lane in lanes]
    failed = [status for status in statuses if status not in {0, NOTHING_SELECTED}]
    return failed[0] if failed else min(statuses)


def _start(name: str, paths: tuple[str, ...], folder: Path, arguments: list[str]) -> Lane:
    argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "pytest", *paths]
    argv += [f"--basetemp={folder / name}", "-o", f"cache_dir={ROOT / 'build' / 'pytest' / name}", *arguments]
    # A group of its own: Ctrl-C reaches it once, from here.
    process = subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0
    )
    return Lane(name, process)


def _pass_on(lane: Lane, said: threading.Lock) -> None:
    """Repeat what a lane says, a line at a time."""
    assert lane.process.stdout is not None
    for line in lane.process.stdout:
        with said:
            sys.stdout.write(f"{lane.name:<{WIDTH}} | {line}")
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
