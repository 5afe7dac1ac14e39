"""How long the determination of 1,000,000 files takes, with 10,000,000 pieces and with 100,000,000, and its peak of memory.

The DMI is made as columns, without names and with digest columns of no stride (every row is the same zero bytes): the determination
reads neither. The peak is of a process of its own, with the columns it was given and all of numpy in it.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from uuid import UUID

import numpy as np

from agent.contract.arrival import ArrivalRecord
from agent.contract.dmi import SPECS, Change, Dmi, Head
from agent.contract.identity import FilesystemKind, GenerationId, empty_generation
from agent.system.clock import monotonic_s
from agent.system.run import run
from mgmt.determination import Policy, determine, gauge
from tests.bench.harness import Figure, keep, machine, parsed, parser

FILES = 1_000_000
RUNS = 5
GOALS = {10_000_000: (1.0, 2 << 30), 100_000_000: (3.0, 4 << 30)}
"""Seconds and bytes for so many pieces."""


@dataclass(frozen=True, slots=True)
class One:
    """Median seconds of several runs, and the peak of the process."""

    files: int
    pieces: int
    recovered: int
    determine_s: float
    gauge_s: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Every size that was measured."""

    sizes: list[One]


def make(files: int, pieces: int) -> tuple[Dmi, ArrivalRecord]:
    """Return a DMI in which every file needs ten pieces scattered over the volume, and a record of nearly all of them."""
    random = np.random.default_rng(7)
    volume, transfer = UUID(int=1), UUID(int=2)
    target = GenerationId(volume, 1, 1, "0" * 31 + "1")
    head = Head(transfer, empty_generation(volume), target, 0, 1, "bench", pieces * 8192, 512, FilesystemKind.EXT4, (), 2, "pool")
    per_file, per_piece = {}, {}
    for spec in SPECS[1:]:
        per_file[spec.name] = np.broadcast_to(np.zeros(1, dtype=spec.dtype), (files,))
        per_piece[spec.name] = np.broadcast_to(np.zeros(1, dtype=spec.dtype), (pieces,))
    columns = {spec.name: per_file[spec.name] for spec in SPECS[1:]}
    for name in ("diff_block", "owner", "target_hole", "update_digest", "diff_digest"):
        columns[name] = per_piece[name]
    columns["op_block"] = np.arange(pieces, dtype=np.uint64) * np.uint64(2)
    columns["block_count"] = np.ones(pieces, dtype=np.uint32)
    columns["change"] = random.choice(
        np.array([Change.CONTENT, Change.CONTENT | Change.NEW, Change.DELETED], dtype=np.uint8), files, p=[0.6, 0.3, 0.1]
    )
    columns["need"] = random.permutation(pieces).astype(np.uint32)
    columns["need_start"] = np.linspace(0, pieces, files + 1).astype(np.uint64)
    columns["name_start"] = np.zeros(files + 1, dtype=np.uint64)
    columns["name_side"] = np.zeros(0, dtype=np.uint8)
    bits = np.where(random.random(pieces) < 0.97, 3, random.integers(0, 8, pieces)).astype(np.uint8)
    return Dmi(head, **columns), ArrivalRecord(transfer, bytes(16), bits, 0, 0)


def measure(files: int, pieces: int) -> One:
    """Return the measurement, made in this process."""
    dmi, arrival = make(files, pieces)
    determining, gauging, recovered = [], [], 0
    for _ in range(RUNS):
        begun = monotonic_s()
        recovered = len(determine(dmi, arrival, Policy()).designated)
        determining.append(monotonic_s() - begun)
        begun = monotonic_s()
        gauge(dmi, arrival)
        gauging.append(monotonic_s() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return One(files, pieces, recovered, statistics.median(determining), statistics.median(gauging), peak)


def main(arguments: Sequence[str] = ()) -> int:
    """Measure, each in a process of its own, print, and write build/bench/determination.json; return the exit status."""
    asked = parsed(parser(__doc__), arguments)
    described = machine()
    wanted = {1_000_000: (0.1, 1 << 30)} if asked.short else GOALS
    found, figures = [], []
    for pieces, (seconds, peak_bytes) in wanted.items():
        files = min(FILES, pieces // 10)
        output = run([sys.executable, "-m", "tests.bench.bench_determination", "--one", str(files), str(pieces)], timeout_s=600)
        measured = One(**json.loads(output.text))
        what = f"determination of {files:,} files and {pieces:,} pieces"
        figures += [
            Figure(what, measured.determine_s, seconds, "s", more_is_better=False),
            Figure(f"{what}: peak of memory", measured.peak_bytes / 2**30, peak_bytes / 2**30, "GiB", more_is_better=False),
            Figure(f"{what}: the gauge", measured.gauge_s, unit="s"),
        ]
        found.append(measured)
    return keep(asked, "determination", Measured(found), figures, described)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--one", files, pieces]:
            sys.stdout.write(json.dumps(asdict(measure(int(files), int(pieces)))))
        case arguments:
            sys.exit(main(arguments))
