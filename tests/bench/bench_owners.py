"""Whose the changed blocks are, and what these files are called: Landfall's way beside walks over all files.

``python -m tests.bench owners [--fs ext4] [--files 1000000] [--rounds 5] [--short]``

Of many small files 1 % were rewritten between two generations, whose changed blocks are known. Landfall reads the inode tables that
differ, and the index of names that it kept of the base. ``walk`` asks every file of the newer generation for its extents and keeps those
with a changed block. ``find`` only prints every file's inode and path: the least that any walk does. All with cold caches. Root.
"""

from __future__ import annotations

import bisect
import fcntl
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from agent.contract.dmi import FileKind
from agent.contract.identity import BLOCK_BYTES, FilesystemKind
from agent.differential.build import BuildRequest, build, index_path, survey
from tests.bench import workloads
from tests.bench.harness import Figure, alternating, cold, keep, machine, medians, parsed, parser
from tests.bench.two_generations import TwoGenerations
from tests.storage.pools import pool_on

LANDFALL, WALK, FIND = "landfall", "walk", "find"
GOALS: Final = {FilesystemKind.EXT4: (2.0, 10.0), FilesystemKind.XFS: (5.0, 6.0)}
"""At most so many seconds, at least so many times as fast as the walk."""
GROSS: Final = 0.5
MANY_FILES: Final = 500_000
SHORT_FILES: Final = 10_000


@dataclass(frozen=True)
class Measured:
    """Seconds of each way in each round; ``found`` of the changed files by Landfall, and by the walk."""

    filesystem: str
    files: int
    pieces: int
    found: dict[str, int]
    seconds: dict[str, list[float]]


def main(arguments: Sequence[str] = ()) -> int:
    """Measure, print, and write build/bench/owners.json; return the exit status."""
    options = parser(__doc__)
    options.add_argument("--files", type=int, default=1_000_000)
    options.add_argument("--fs", type=FilesystemKind, default=FilesystemKind.EXT4)
    options.add_argument("--name", default="owners", help="of the file of results")
    asked = parsed(options, arguments)
    described = machine()
    count, rounds = (SHORT_FILES, 3) if asked.short else (asked.files, asked.rounds)
    workload = workloads.small_files(count)
    with (
        tempfile.TemporaryDirectory(dir=asked.folder, prefix="owners-") as work,
        pool_on("xfs", Path(work), 4 * workload.volume_bytes) as pool,
        TwoGenerations(Path(work), pool, asked.fs, workload).request() as request,
    ):
        measured = measure(request, count, rounds)
    median = medians(measured.seconds)
    limit_s, times = GOALS[asked.fs] if count >= MANY_FILES else (None, None)
    figures = [
        Figure("owners and names of what changed", median[LANDFALL], limit_s, "s", more_is_better=False),
        Figure("owners and names: times as fast as a walk", median[WALK] / median[LANDFALL], times, gross=GROSS),
        Figure("owners and names: times as fast as find alone", median[FIND] / median[LANDFALL]),
    ]
    return keep(asked, asked.name, measured, figures, described)


def measure(request: BuildRequest, files: int, rounds: int) -> Measured:
    """Return the seconds of all ways, and that the walk finds the files that Landfall does."""
    assert request.base is not None
    build(request)  # leaves the base's index of names, as the cycle before would have
    found: dict[str, set[int]] = {}

    def landfall() -> None:
        known = survey(request)
        found[LANDFALL] = set(known.changes.inode[(known.changes.kind == FileKind.REGULAR) & known.changes.in_target].tolist())

    def walk() -> None:
        found[WALK] = walked(request)

    def find() -> None:
        with (request.state / "found").open("wb") as to:
            subprocess.run(["find", request.target.mount_point, "-printf", "%i %P\\n"], stdout=to, check=True)

    def before() -> None:
        index_path(request.state, request.target_id).unlink(missing_ok=True)
        os.sync()
        cold()

    seconds = alternating({LANDFALL: landfall, WALK: walk, FIND: find}, rounds, before=before)
    assert found[WALK] <= found[LANDFALL], "a file with a changed block is not among those that Landfall found"
    return Measured(
        request.filesystem, files, len(survey(request).pieces.op_block), {way: len(each) for way, each in found.items()}, seconds
    )


def walked(request: BuildRequest) -> set[int]:
    """Return the inodes of the regular files that have a changed block, by asking each for its extents."""
    first = request.changed.first.astype(np.int64).tolist()
    after = (request.changed.first + request.changed.blocks).astype(np.int64).tolist()
    owners: set[int] = set()
    for folder, _, listed in os.walk(request.target.mount_point):
        for name in listed:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                for begin, blocks in _extents(fd):
                    at = bisect.bisect_right(after, begin)
                    if at < len(first) and first[at] < begin + blocks:
                        owners.add(os.fstat(fd).st_ino)
            finally:
                os.close(fd)
    return owners


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    """Yield first block and number of blocks of the extents of a small file, by linux/fiemap.h."""
    asked = bytearray(32 + 8 * 56)
    struct.pack_into("<QQIIII", asked, 0, 0, 2**64 - 1, 0, 0, 8, 0)
    fcntl.ioctl(fd, 0xC020660B, asked)
    for number in range(struct.unpack_from("<I", asked, 20)[0]):
        _, physical, length = struct.unpack_from("<QQQ", asked, 32 + 56 * number)
        yield physical // BLOCK_BYTES, -(-length // BLOCK_BYTES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
