"""What replication costs the clients: fio on the served volume alone, while cycles run one after another, while they are limited in their
rate, and while they have the I/O priority `idle`.

``python -m tests.bench foreground [--fs ext4] [--seconds 20] [--rounds 5] [--limit-mb 10] [--short]``

The foreground is 70 % reads and 30 % writes of 4 KiB past the page cache, at depth 4, at random over one file; what it writes is what the
cycles replicate. In every phase the file shares all its blocks with a generation when the phase begins, so that the first write to a block
costs the same in each; that a cycle makes a new generation, whose blocks are shared again, is a part of its cost. The limit is that of
``landfall replicate --rate``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agent.contract.identity import FilesystemKind
from agent.system.priority import IoPriority
from tests.bench.cycle_scene import NAS1, Scene, scene
from tests.bench.harness import Figure, keep, machine, medians, parsed, parser, turn
from tests.bench.workloads import MIB

ALONE: Final = "alone"
CYCLES: Final = "while cycles run"
LIMITED: Final = "while limited cycles run"
IDLE: Final = "while cycles of idle priority run"
_FILE_MIB: Final = 256


@dataclass(frozen=True)
class Measured:
    """Foreground operations a second and the 99th percentile of their latency, in each round of each phase; cycles that ended in it."""

    filesystem: str
    seconds: int
    limit_mb_s: int
    iops: dict[str, list[float]]
    p99_ms: dict[str, list[float]]
    cycles: dict[str, list[int]]


def main(arguments: Sequence[str] = ()) -> int:
    """Measure, print, and write build/bench/foreground.json; return the exit status."""
    options = parser(__doc__)
    options.add_argument("--fs", type=FilesystemKind, default=FilesystemKind.EXT4)
    options.add_argument("--seconds", type=int, default=20)
    options.add_argument("--limit-mb", type=int, default=10)
    asked = parsed(options, arguments)
    if asked.short:
        asked.seconds, asked.rounds = 4, 2
    described = machine()
    with (
        tempfile.TemporaryDirectory(dir=asked.folder, prefix="foreground-") as work,
        scene(Path(work), asked.fs, 16 * _FILE_MIB * MIB) as made,
    ):
        root = made.add_volume(4 * _FILE_MIB * MIB)
        with (root / "foreground").open("wb") as file:
            for number in range(_FILE_MIB):
                file.write(number.to_bytes(8, "little") * (MIB // 8))
        made.cycle()
        measured = measure(made, asked.fs, asked.rounds, asked.seconds, asked.limit_mb)
    rate, late = medians(measured.iops), medians(measured.p99_ms)
    found = [
        figure
        for phase in (CYCLES, LIMITED, IDLE)
        for figure in (
            Figure(f"foreground operations {phase}, of those alone", rate[phase] / rate[ALONE], gross=0.05),
            Figure(f"foreground latency (99th percentile) {phase}, times that alone", late[phase] / late[ALONE], more_is_better=False),
        )
    ]
    return keep(asked, "foreground", measured, found, described)


def measure(made: Scene, filesystem: str, rounds: int, seconds: int, limit_mb: int) -> Measured:
    """Return what the phases gave, in turns."""
    limits = {ALONE: None, CYCLES: 0, LIMITED: limit_mb * 1_000_000, IDLE: 0}
    measured = Measured(filesystem, seconds, limit_mb, {}, {}, {})
    for number in range(rounds):
        for phase in turn(list(limits), number):
            made.prioritise(IoPriority.IDLE if phase == IDLE else IoPriority.NORMAL)
            made.cycle()
            made.settle()
            limit, ended = limits[phase], 0
            with ThreadPoolExecutor(1) as aside:
                foreground = aside.submit(_fio, made, seconds)
                while limit is not None and not foreground.done():
                    made.cycle(limit)
                    ended += 1
                found = foreground.result()
            measured.iops.setdefault(phase, []).append(found["read"]["iops"] + found["write"]["iops"])
            measured.p99_ms.setdefault(phase, []).append(
                max(found[way]["clat_ns"]["percentile"]["99.000000"] for way in ("read", "write")) / 1e6
            )
            measured.cycles.setdefault(phase, []).append(ended)
            sys.stdout.write(f"  {number} {phase:<26} {measured.iops[phase][-1]:8.0f} /s, {ended} cycles\n")
            sys.stdout.flush()
    return measured


def _fio(made: Scene, seconds: int) -> dict[str, Any]:
    argv = [
        *("fio", "--name=foreground", f"--filename={made.served / 'foreground'}", f"--size={_FILE_MIB}m", "--rw=randrw", "--rwmixread=70"),
        *("--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=4", "--time_based", f"--runtime={seconds}", "--output-format=json"),
    ]
    found: dict[str, Any] = json.loads(made.inside(NAS1, *argv))["jobs"][0]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
