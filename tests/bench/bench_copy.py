"""The copy path beside dd, qemu-img, nbdcopy and a bare probe, from loop device to loop device, all past the page cache.

``python -m tests.bench.bench_copy [--size-mib 2048] [--rounds 5]``: in each round every tool copies once, in turn, so that what else the
machine does hits all of them alike. Reported are the medians and the ratios to each peer. Root; needs qemu-utils and libnbd-bin, and
leaves out what is not installed. The probe is the least that copies in parallel, no digest, no lock, no error handling: what the device
and Python allow.
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from agent.blockio.copy import copy
from agent.system.run import run
from tests.bench.harness import Figure, alternating, keep, machine, parsed, parser
from tests.storage.loop_devices import attached


@dataclass(frozen=True)
class Measured:
    """Median MB/s of each tool, and how many times the peers' speed ours is."""

    size_mib: int
    rounds: int
    mb_per_s: dict[str, float]
    ratio_to: dict[str, float]
    ratio_to_with_digests: dict[str, float]


def main(arguments: Sequence[str] = ()) -> int:
    """Measure, print, and write build/bench/copy.json; return the exit status."""
    options = parser(__doc__)
    options.add_argument("--size-mib", type=int, default=2048)
    asked = parsed(options, arguments)
    if asked.short:
        asked.size_mib, asked.rounds = 256, 3
    described = machine()
    measured = measure(asked.size_mib, asked.rounds, asked.folder)
    rivals = [name for name in measured.ratio_to if name != "probe"]
    found = [
        Figure(
            "sequential copy: times as fast as the best of dd, qemu-img and nbdcopy",
            min(measured.ratio_to[name] for name in rivals),
            1.0,
            gross=0.4,
        )
    ]
    found += [Figure(f"sequential copy: times as fast as {name}", measured.ratio_to[name]) for name in measured.ratio_to]
    found += [
        Figure(f"sequential copy with digests: times as fast as {name}", measured.ratio_to_with_digests[name]) for name in measured.ratio_to
    ]
    return keep(asked, "copy", measured, found, described)


def measure(size_mib: int, rounds: int, folder: Path) -> Measured:
    """Return the medians of ``rounds`` rounds over images of ``size_mib`` made in ``folder``."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        source, target = (stack.enter_context(attached(make(work / name, size_mib))) for name in ("source", "target"))
        tools = {name: tool for name, tool in copiers(source, target).items() if tool is not None}
        seconds = alternating(tools, rounds)
    speed = {name: round(size_mib * 1.048576 / statistics.median(each), 1) for name, each in seconds.items()}
    peers = [name for name in speed if not name.startswith("landfall")]
    return Measured(
        size_mib,
        rounds,
        speed,
        {peer: round(speed["landfall"] / speed[peer], 2) for peer in peers},
        {peer: round(speed["landfall with digests"] / speed[peer], 2) for peer in peers},
    )


def copiers(source: Path, target: Path) -> dict[str, Callable[[], object] | None]:
    """Return each tool's way of copying ``source`` onto ``target``; None where it is not installed."""

    def program(*argv: str) -> Callable[[], object] | None:
        return (lambda: run(argv, timeout_s=600.0)) if shutil.which(argv[0]) else None

    return {
        "landfall": lambda: copy(source, target, digest=False),
        "landfall with digests": lambda: copy(source, target, digest=True),
        "dd": program("dd", f"if={source}", f"of={target}", "bs=4M", "iflag=direct", "oflag=direct", "conv=fdatasync", "status=none"),
        "qemu-img": program(
            "qemu-img", "convert", "-n", "-W", "-m", "8", "-t", "none", "-T", "none", "-f", "raw", "-O", "raw", str(source), str(target)
        ),
        "nbdcopy": program("nbdcopy", "--flush", "--requests=8", "--threads=2", str(source), str(target)),
        "probe": lambda: probe(source, target),
    }


def probe(source: Path, target: Path, workers: int = 4, chunk_bytes: int = 4 << 20) -> None:
    """Copy with ``workers`` threads, each every ``workers``-th chunk."""
    reading, writing = os.open(source, os.O_RDONLY | os.O_DIRECT), os.open(target, os.O_WRONLY | os.O_DIRECT)
    size_bytes = os.lseek(reading, 0, os.SEEK_END)

    def work(number: int) -> None:
        buffer = memoryview(mmap.mmap(-1, chunk_bytes))
        for at in range(number * chunk_bytes, size_bytes, workers * chunk_bytes):
            os.pwrite(writing, buffer[: os.preadv(reading, [buffer], at)], at)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.fdatasync(writing)
    os.close(reading)
    os.close(writing)


def make(image: Path, size_mib: int) -> Path:
    """Return an image of random bytes, none of them a hole."""
    run(["dd", "if=/dev/urandom", f"of={image}", "bs=4M", f"count={-(-size_mib // 4)}", "iflag=fullblock", "status=none"], timeout_s=600.0)
    with open(image, "r+b") as file:
        file.truncate(size_mib << 20)
    return image


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
