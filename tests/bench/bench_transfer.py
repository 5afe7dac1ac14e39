"""A whole transfer over TLS on loopback, each side in a process of its own, beside a copy of the same bytes with no network.

``python -m tests.bench.bench_transfer [--size-mib 512] [--rounds 3]``. The data does not compress; the time is from connecting to the
acknowledged commit, with every piece synced, recorded, and read back. Root.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from agent.blockio.copy import copy
from agent.contract.messages import Differential, TlsMaterial
from agent.system.clock import monotonic_s
from agent.transfer.receiver import Receiver
from agent.transfer.sender import send
from tests.bench.harness import Figure, keep, machine, parsed, parser
from tests.storage.loop_devices import attached
from tests.transfer_scene import NAS1, NAS2, Differential1, Scene, make_differential

SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Measured:
    """Median MB/s of data that travelled, by mode and streams, and the share of a plain copy's speed that is."""

    size_mib: int
    rounds: int
    copy_mb_per_s: float
    mb_per_s: dict[str, float]
    share_of_copy: dict[str, float]


def main(arguments: Sequence[str] = ()) -> int:
    """Measure, print, and write build/bench/transfer.json; return the exit status."""
    options = parser(__doc__)
    options.set_defaults(rounds=3)
    options.add_argument("--size-mib", type=int, default=512)
    asked = parsed(options, arguments)
    if asked.short:
        asked.size_mib, asked.rounds = 64, 2
    described = machine()
    measured = measure(asked.size_mib, asked.rounds, asked.folder)
    found = [
        Figure(f"transfer over TLS: speed of a plain copy, {name}", share, gross=0.03) for name, share in measured.share_of_copy.items()
    ]
    return keep(asked, "transfer", measured, found, described)


def measure(size_mib: int, rounds: int, folder: Path) -> Measured:
    """Return the medians over a differential of nearly all of a volume of ``size_mib``."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        made = make_differential(work, blocks=size_mib * 256, pieces=size_mib)
        target, base = (stack.enter_context(attached(image, read_only=True)) for image in (made.target, made.base))
        copies: list[float] = []
        speeds: dict[str, list[float]] = {}
        for number in range(rounds):
            copied = work / "copy"
            copied.write_bytes(made.base.read_bytes())
            with attached(copied) as onto:
                begun = monotonic_s()
                copy(target, onto, digest=True)
                copies.append(size_mib * 1.048576 / (monotonic_s() - begun))
            for differential in Differential:
                for streams in (1, 2, 4):
                    run_folder = work / f"{number}-{differential}-{streams}"
                    run_folder.mkdir()
                    speed = transfer(run_folder, made, target, base, differential, streams)
                    speeds.setdefault(f"{differential}, {streams} streams", []).append(speed)
    medians = {name: round(statistics.median(each), 1) for name, each in speeds.items()}
    plain = statistics.median(copies)
    return Measured(size_mib, rounds, round(plain, 1), medians, {name: round(speed / plain, 2) for name, speed in medians.items()})


def transfer(folder: Path, made: Differential1, target: Path, base: Path, differential: Differential, streams: int) -> float:
    """Return MB/s of one transfer onto fresh images in ``folder``, which are removed again."""
    scene = Scene(folder, made)
    scene.landing.write_bytes(scene.replica.read_bytes())
    heard, told = SPAWN.Pipe(duplex=False)
    with attached(scene.landing) as landing, attached(scene.replica, read_only=True) as replica:
        material = scene.authority.material(NAS2, NAS1)
        child = SPAWN.Process(target=receive, args=(folder, made, material, told, landing, replica, differential, streams))
        child.start()
        job = scene.send_job(
            heard.recv(), target=target, base=base, differential=differential, streams=streams, batch_bytes=1 << 20, connect_limit_s=60.0
        )
        begun = monotonic_s()
        sent = send(job)
        seconds = monotonic_s() - begun
        child.join()
    scene.landing.unlink()
    scene.replica.unlink()
    return sent.bytes_sent / 1e6 / seconds


def receive(
    folder: Path,
    made: Differential1,
    material: TlsMaterial,
    told: Connection,
    landing: Path,
    replica: Path,
    differential: Differential,
    streams: int,
) -> None:
    scene = Scene(folder, made)
    scene.landing, scene.replica = landing, replica
    receiver = Receiver(scene.receive_job(tls=material, differential=differential, streams=streams, connect_limit_s=60.0))
    told.send(receiver.port)
    receiver.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
