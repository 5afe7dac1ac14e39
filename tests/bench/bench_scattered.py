"""Scattered 4 KiB reads, beside fio with io_uring and libaio at the same depth on the same device.

``python -m tests.bench scattered [--size-mib 2048] [--reads 100000] [--rounds 5] [--short]``

One thread with a queue of 32, two that share such a depth, and the threads that read where the kernel has no asynchronous reads. Root;
needs fio.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from agent.blockio.device import Device
from agent.blockio.queues import DEPTH, Queues
from agent.blockio.scatter import read_runs
from agent.contract.identity import BLOCK_BYTES
from agent.system.clock import monotonic_s
from agent.system.run import run
from tests.bench.bench_copy import make
from tests.bench.harness import Figure, keep, machine, medians, parsed, parser, turn
from tests.storage.loop_devices import attached

URING: Final = "fio io_uring"
OURS: Final = "landfall"
THREADS: Final = "landfall without asynchronous reads"
GOAL: Final = 0.9


@dataclass(frozen=True)
class Measured:
    """Reads a second of each tool, in each round and as medians."""

    size_mib: int
    reads: int
    depth: int
    per_s: dict[str, list[float]]
    median_per_s: dict[str, float]


def main(arguments: Sequence[str] = ()) -> int:
    """Measure, print, and write build/bench/scattered.json; return the exit status."""
    options = parser(__doc__)
    options.add_argument("--size-mib", type=int, default=2048)
    options.add_argument("--reads", type=int, default=100_000)
    asked = parsed(options, arguments)
    if asked.short:
        asked.size_mib, asked.reads, asked.rounds = 256, 20_000, 3
    described = machine()
    measured = measure(asked.size_mib, asked.reads, asked.rounds, asked.folder)
    found = [
        Figure(
            f"scattered reads: as many as {peer}", round(measured.median_per_s[OURS] / measured.median_per_s[peer], 2), goal, gross=gross
        )
        for peer, goal, gross in ((URING, GOAL, 0.4), ("fio libaio", None, None), (THREADS, None, None))
    ]
    return keep(asked, "scattered", measured, found, described)


def measure(size_mib: int, reads: int, rounds: int, folder: Path) -> Measured:
    """Return the rates over an image of ``size_mib`` made in ``folder``."""
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        path = stack.enter_context(attached(make(work / "image", size_mib)))
        for number in range(rounds):
            first = np.random.default_rng(number).integers(0, size_mib * 256, reads).astype(np.uint64)
            tools = _tools(path, first, size_mib)
            for name in turn(list(tools), number):
                rates.setdefault(name, []).append(tools[name]())
    return Measured(size_mib, reads, DEPTH, rates, medians(rates))


def _tools(path: Path, first: np.ndarray[tuple[int], np.dtype[np.uint64]], size_mib: int) -> dict[str, Callable[[], float]]:
    def ours(workers: int, queues: Queues | None = None, batch_bytes: int = 1 << 20) -> float:
        with Device.open_reading(path) as device:
            if queues is not None:
                device._queues = queues
            begun = monotonic_s()
            for _ in read_runs(device, first, np.ones(len(first), np.uint64), workers=workers, batch_bytes=batch_bytes):
                pass
            return len(first) / (monotonic_s() - begun)

    def fio(engine: str) -> float:
        argv = [
            *("fio", "--name=scattered", f"--filename={path}", "--readonly", "--rw=randread", "--bs=4k", "--direct=1"),
            *(f"--ioengine={engine}", f"--iodepth={DEPTH}", f"--size={size_mib}m", f"--io_size={len(first) * BLOCK_BYTES}"),
            "--output-format=json",
        ]
        return float(json.loads(run(argv, timeout_s=600.0).text)["jobs"][0]["read"]["iops"])

    return {
        OURS: lambda: ours(1),
        "landfall, two threads that share the depth": lambda: ours(2, Queues(DEPTH // 2)),
        THREADS: lambda: ours(DEPTH, _NoQueues(), 64 * BLOCK_BYTES),
        URING: lambda: fio("io_uring"),
        "fio libaio": lambda: fio("libaio"),
    }


class _NoQueues(Queues):
    """As where the kernel refuses."""

    def take(self) -> None:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
