"""For how long a generation holds the filesystem still, by how fragmented its image is, beside a clone of the whole image under the freeze.

``python -m tests.bench freeze [--fs ext4] [--extents 1000,10000,75000,300000] [--changed 1000] [--rounds 5] [--short]``

A served volume on the substrate `reflink`. Blocks of a file are rewritten at random after a generation, until its image has so many
extents; then, for each generation, ``--changed`` more. Landfall clones ahead and catches up inside the freeze; ``cp --reflink`` between
fsfreeze(8)'s freeze and thaw is what a script would do. They take turns. Root.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

from agent.contract.identity import FilesystemKind, GenerationKind, next_generation
from agent.contract.messages import GenerationFacts, Role
from agent.system.clock import monotonic_s, wall_ns
from agent.volume import filesystem
from agent.volume.reflink import ReflinkSubstrate
from agent.volume.substrate import VolumeRecord
from tests.bench.harness import Figure, keep, machine, parsed, parser, turn
from tests.bench.workloads import MIB
from tests.storage.pools import pool_on

LANDFALL, WHOLE = "landfall", "cp --reflink"
AT_GOAL: Final = 75_000
GOAL_MS: Final = 100.0
BLOCK: Final = 4096


@dataclass(frozen=True)
class Point:
    """Milliseconds of each freeze, of an image with so many extents."""

    extents: int
    frozen_ms: dict[str, list[float]]


@dataclass(frozen=True)
class Measured:
    """The curve."""

    filesystem: str
    changed: int
    points: list[Point]


def main(arguments: Sequence[str] = ()) -> int:
    """Measure, print, and write build/bench/freeze.json; return the exit status."""
    options = parser(__doc__)
    options.add_argument("--fs", type=FilesystemKind, default=FilesystemKind.EXT4)
    options.add_argument("--extents", default="1000,10000,75000,300000")
    options.add_argument("--changed", type=int, default=1000)
    asked = parsed(options, arguments)
    wanted = [2_000] if asked.short else [int(word) for word in asked.extents.split(",")]
    rounds = 3 if asked.short else asked.rounds
    described = machine()
    file_mib = max(64, 4 * max(wanted) * BLOCK // MIB)
    with (
        tempfile.TemporaryDirectory(dir=asked.folder, prefix="freeze-") as work,
        pool_on("xfs", Path(work), 6 * file_mib * MIB) as pool,
        Served(Path(work), pool, asked.fs, file_mib).mounted() as served,
    ):
        points = [served.measured(extents, asked.changed, rounds) for extents in wanted]
    figures = []
    for point in points:
        median = {way: statistics.median(values) for way, values in point.frozen_ms.items()}
        goal = GOAL_MS if AT_GOAL <= point.extents < 2 * AT_GOAL else None
        figures += [
            Figure(f"freeze at {point.extents:,} extents", median[LANDFALL], goal, "ms", more_is_better=False),
            Figure(f"freeze at {point.extents:,} extents, of a clone of the whole", median[LANDFALL] / median[WHOLE], more_is_better=False),
        ]
    return keep(asked, "freeze", Measured(asked.fs, asked.changed, points), figures, described)


class Served:
    """A mounted volume with one file all over it."""

    def __init__(self, work: Path, pool: Path, kind: FilesystemKind, file_mib: int) -> None:
        self._kind, self._blocks = kind, file_mib * MIB // BLOCK
        self._mount_point, self._spare = work / "served", pool / "spare.img"
        self._substrate = ReflinkSubstrate.initialise(pool / "pool")
        self._volume = VolumeRecord(uuid4(), "bench", kind, file_mib * MIB * 5 // 4, 512, Role.PRIMARY, 1)
        self._substrate.create(self._volume)
        self._image = next((pool / "pool" / "volumes").glob("*/operational.img"))
        self._random = random.Random(5)

    @contextmanager
    def mounted(self) -> Iterator[Served]:
        """Give it mounted, and filled."""
        self._mount_point.mkdir()
        with self._substrate.operational(self._volume.id) as device:
            filesystem.make(device, self._kind)
            filesystem.mount(device, self._mount_point, self._kind, read_only=False)
            try:
                with (self._mount_point / "file").open("wb") as file:
                    for _ in range(self._blocks * BLOCK // MIB):
                        file.write(self._random.randbytes(MIB))
                self._landfall()
                yield self
            finally:
                filesystem.unmount(self._mount_point)

    def measured(self, extents: int, changed: int, rounds: int) -> Point:
        """Return the freezes of an image with at least so many extents."""
        while (found := self._extents()) < extents:
            self._landfall()  # all is shared, so that each rewritten block gets a place of its own
            self._rewrite(max(100, (extents - found) // 2))
        self._landfall()
        ways = {LANDFALL: self._landfall, WHOLE: self._whole}
        frozen_ms: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in turn(list(ways), number):
                self._rewrite(changed)
                frozen_ms[way].append(ways[way]())
        sys.stdout.write(f"  {found} extents: {frozen_ms}\n")
        sys.stdout.flush()
        return Point(found, frozen_ms)

    def _rewrite(self, blocks: int) -> None:
        fd = os.open(self._mount_point / "file", os.O_WRONLY)
        try:
            for block in self._random.sample(range(self._blocks), blocks):
                os.pwrite(fd, self._random.randbytes(BLOCK), block * BLOCK)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _landfall(self) -> float:
        """Take a generation, drop the one before the newest; return the freeze in milliseconds."""
        held = self._substrate.generations(self._volume.id)
        facts = GenerationFacts(next_generation(self._volume.id, 1, held[-1].id.counter), GenerationKind.FROZEN, wall_ns())
        took = self._substrate.take(self._volume.id, self._mount_point, facts)
        if len(held) > 2:
            self._substrate.drop(held[1].id)
        return took

    def _whole(self) -> float:
        """Clone the whole image under the freeze, and remove the clone; return the freeze in milliseconds."""
        os.sync()
        subprocess.run(["fsfreeze", "--freeze", self._mount_point], check=True)
        begun = monotonic_s()
        try:
            subprocess.run(["cp", "--reflink=always", self._image, self._spare], check=True)
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", self._mount_point], check=True)
        took = (monotonic_s() - begun) * 1000
        self._spare.unlink()
        return took

    def _extents(self) -> int:
        os.sync()
        words = subprocess.run(["filefrag", self._image], capture_output=True, text=True, check=True).stdout.split()
        return int(words[words.index("extents") - 1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
