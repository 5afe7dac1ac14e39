"""The differential cycle, from the freeze to the acknowledged commit, beside what people would use instead.

``python -m tests.bench cycle [--fs ext4] [--workload drill,small,large,database] [--files 20000] [--mib 2048] [--rounds 5] [--short]``

In every round the volume is changed once; then Landfall and the peers, taking turns in being first and each with cold caches, bring their
replicas to the new state. Two peers read the generation that Landfall takes, so they come after it. Root; needs rsync, btrfs-progs, ssh.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from agent.contract.identity import FilesystemKind
from agent.system.clock import monotonic_s
from tests.bench import workloads
from tests.bench.cycle_scene import Cycle, scene
from tests.bench.harness import Figure, keep, machine, medians, parsed, parser, turn
from tests.bench.peers import Btrfs, Digests, Ranges, Rsync, Ssh
from tests.bench.workloads import MIB, Workload

LANDFALL: Final = "landfall"
GROSS: Final = {Rsync.name: 0.4, Btrfs.name: 0.25, Digests.name: 0.4, Ranges.name: 0.02}
GOALS: Final = {Rsync.name: 5.0, Btrfs.name: 2.5, Digests.name: 10.0, Ranges.name: None}
MANY_FILES: Final = 500_000
MANY_FILES_GOALS: Final = {Rsync.name: 10.0}


class Peer(Protocol):
    """Something that keeps a replica of its own."""

    name: str

    def change(self, workload: Workload, seed: int) -> None: ...
    def prepare(self) -> None: ...
    def run(self) -> None: ...


@dataclass(frozen=True)
class Compared:
    """One workload: seconds and bytes on the wire of each tool in each round, medians, and Landfall's cycles in detail."""

    workload: str
    says: str
    filesystem: str
    rounds: int
    seconds: dict[str, list[float]]
    wire_bytes: dict[str, list[int]]
    median_s: dict[str, float]
    landfall_is_faster: dict[str, float]
    cycles: list[Cycle]


@dataclass(frozen=True)
class Measured:
    """Every workload that was measured."""

    workloads: list[Compared]


def main(arguments: Sequence[str] = ()) -> int:
    """Measure, print, and write build/bench/cycle.json; return the exit status."""
    options = parser(__doc__)
    options.add_argument("--fs", type=FilesystemKind, default=FilesystemKind.EXT4)
    options.add_argument("--workload", default="drill,small,large,database")
    options.add_argument("--files", type=int, default=20_000, help="files of the drill tree")
    options.add_argument("--small-files", type=int, default=1_000_000)
    options.add_argument("--mib", type=int, default=8192, help="MiB of the large files; the database has a quarter of it")
    options.add_argument("--name", default="cycle", help="of the file of results")
    asked = parsed(options, arguments)
    if asked.short:
        asked.rounds, asked.files, asked.workload = min(asked.rounds, 3), 2000, "drill"
    made = {
        "drill": lambda: workloads.drill_tree(asked.files),
        "small": lambda: workloads.small_files(asked.small_files),
        "large": lambda: workloads.large_files(asked.mib),
        "database": lambda: workloads.database(asked.mib // 4),
    }
    described = machine()
    found = [compare(made[name](), asked.fs, asked.rounds, asked.folder) for name in asked.workload.split(",")]
    return keep(asked, asked.name, Measured(found), [figure for each in found for figure in figures(each)], described)


def compare(workload: Workload, filesystem: FilesystemKind, rounds: int, folder: Path) -> Compared:
    """Return one workload's comparison, measured in a lab of its own."""
    say(f"{workload.name}: {workload.says}, on {filesystem}")
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="cycle-") as work,
        scene(Path(work), filesystem, 10 * workload.volume_bytes + (4 << 30)) as made,
    ):
        root = made.add_volume(workload.volume_bytes)
        workload.fill(root)
        made.cycle()
        ssh = Ssh(made)
        before: list[Peer] = [Rsync(made, ssh, workload.volume_bytes), Btrfs(made, ssh, 2 * workload.volume_bytes, workload)]
        after: list[Peer] = [Digests(made, ssh), Ranges(made)]
        seconds: dict[str, list[float]] = {}
        wire: dict[str, list[int]] = {}
        cycles: list[Cycle] = []
        for number in range(rounds):
            workload.change(root, 100 + number)
            for peer in before:
                peer.change(workload, 100 + number)
            peers = {peer.name: peer for peer in (*before, *after)}
            for name in _order(number, [peer.name for peer in before], [peer.name for peer in after]):
                if name != LANDFALL:
                    peers[name].prepare()
                made.settle()
                on_wire, begun = made.on_wire(), monotonic_s()
                if name == LANDFALL:
                    cycles.append(made.cycle())
                    seconds.setdefault(name, []).append(cycles[-1].seconds)
                else:
                    peers[name].run()
                    seconds.setdefault(name, []).append(monotonic_s() - begun)
                wire.setdefault(name, []).append(made.on_wire() - on_wire)
                say(f"  {number} {name:<26} {seconds[name][-1]:8.2f} s {wire[name][-1] / MIB:9.1f} MiB on the wire")
    median = medians(seconds)
    faster = {name: round(median[name] / median[LANDFALL], 2) for name in median if name != LANDFALL}
    return Compared(workload.name, workload.says, filesystem, rounds, seconds, wire, median, faster, cycles)


def figures(of: Compared) -> list[Figure]:
    """Return the figures of one workload with their goals."""
    is_drill = of.workload == "drill tree"
    goals = GOALS if is_drill else MANY_FILES_GOALS if of.workload == "small files" else {}
    found = [
        Figure(f"{of.workload}: times as fast as {name}", value, goals.get(name), gross=GROSS[name])
        for name, value in of.landfall_is_faster.items()
    ]
    allowed = statistics.median(1.03 * cycle.changed_bytes + 512 * cycle.changed_files for cycle in of.cycles)
    raw = statistics.median(cycle.raw_bytes for cycle in of.cycles)
    found.append(
        Figure(
            f"{of.workload}: bytes before compression, of 1.03 x changed + 512 a file",
            raw / allowed,
            1.0,
            "x",
            more_is_better=False,
            gross=1.3,
        )
    )
    frozen = statistics.median(cycle.frozen_ms for cycle in of.cycles)
    found.append(Figure(f"{of.workload}: freeze", frozen, 100.0, "ms", more_is_better=False))
    for stage in of.cycles[0].stages:
        found.append(Figure(f"{of.workload}: {stage}", statistics.median(cycle.stages.get(stage, 0.0) for cycle in of.cycles), None, "s"))
    return found


def say(sentence: str) -> None:
    """Say how far it is."""
    sys.stdout.write(sentence + "\n")
    sys.stdout.flush()


def _order(number: int, before: list[str], after: list[str]) -> list[str]:
    """Return who runs when in a round: Landfall before those who read its generation."""
    first = turn([LANDFALL, *before], number)
    return first + turn(after, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
