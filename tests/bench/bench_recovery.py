"""Recovery of a transfer of which nearly all arrived: by roll back beside by roll forward, on the same landing volume.

``python -m tests.bench recovery [--fs ext4] [--files 100000] [--missing 1] [--rounds 5] [--short]``

Of many small files 1 % were rewritten; of ``--missing`` per cent of these a piece did not arrive, nor did ext4's journal, which goes last.
Both ways take turns on the same landing volume, with cold caches, up to the committed generation, which is then taken back. Root.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from agent.blockio.device import Device
from agent.contract.arrival import COMPLETE, ArrivalRecord
from agent.contract.dmi import Dmi, Owner
from agent.contract.identity import BLOCK_BYTES, FilesystemKind
from agent.contract.messages import Deletions, Progress, UpdateInstruction
from agent.differential.build import build
from agent.recovery.salvage import SalvageJob, Way, salvage, undo
from agent.system.clock import monotonic_s
from agent.volume.substrate import Workspace, WorkspaceKind
from tests.bench import workloads
from tests.bench.harness import Figure, alternating, cold, keep, machine, medians, parsed, parser
from tests.bench.two_generations import TwoGenerations
from tests.storage.pools import pool_on

GOAL: Final = 10.0
GROSS: Final = 0.5
MANY_FILES: Final = 500_000
SHORT_FILES: Final = 10_000


@dataclass(frozen=True)
class Measured:
    """Seconds of each way in each round, and in which steps they went; ``bytes_changed`` of all pieces."""

    filesystem: str
    files: int
    changed: int
    not_whole: int
    pieces: int
    bytes_changed: int
    seconds: dict[str, list[float]]
    median_s: dict[str, float]
    steps: dict[str, dict[str, float]]


def main(arguments: Sequence[str] = ()) -> int:
    """Measure, print, and write build/bench/recovery.json; return the exit status."""
    options = parser(__doc__)
    options.add_argument("--files", type=int, default=100_000)
    options.add_argument("--fs", type=FilesystemKind, default=FilesystemKind.EXT4)
    options.add_argument("--missing", type=float, default=1.0, help="per cent of the changed files that are not whole")
    asked = parsed(options, arguments)
    described = machine()
    files, rounds = (SHORT_FILES, 2) if asked.short else (asked.files, asked.rounds)
    workload = workloads.small_files(files)
    with (
        tempfile.TemporaryDirectory(dir=asked.folder, prefix="recovery-") as work,
        pool_on("xfs", Path(work), 4 * workload.volume_bytes) as on,
    ):
        made = Broken(Path(work), on, asked.fs, workload)
        measured = measure(made, files, asked.missing / 100, rounds)
    faster = measured.median_s[Way.FORWARD] / measured.median_s[Way.BACK]
    figures = [Figure("roll back is faster than roll forward by", faster, GOAL if files >= MANY_FILES else None, gross=GROSS)]
    figures += [Figure(f"seconds, {way}", seconds, unit="s", more_is_better=False) for way, seconds in measured.median_s.items()]
    return keep(asked, "recovery", measured, figures, described)


def measure(made: Broken, files: int, missing: float, rounds: int) -> Measured:
    """Return the seconds of both ways."""
    dmi = made.dmi
    random = np.random.default_rng(3)
    judged = np.flatnonzero(np.diff(dmi.need_start) > 0)
    torn = random.choice(judged, max(1, int(len(judged) * missing)), replace=False)
    arrived = dmi.owner != Owner.JOURNAL if dmi.head.filesystem is FilesystemKind.EXT4 else np.ones(dmi.piece_total, dtype=np.bool_)
    arrived[[int(dmi.needs(row)[-1]) for row in torn.tolist()]] = False
    job = made.landed(arrived)
    steps: dict[str, dict[str, float]] = {way: {} for way in Way}

    def salvaged(way: Way) -> Callable[[], None]:
        return lambda: made.salvaged(job, way, steps[way])

    seconds = alternating({way: salvaged(way) for way in Way}, rounds, before=made.settle)
    changed = int(dmi.block_count.sum(dtype=np.int64)) * BLOCK_BYTES
    return Measured(
        dmi.head.filesystem, files, len(judged), len(torn), dmi.piece_total, changed, seconds, medians(seconds),
        {way: {step: spent / rounds for step, spent in of.items()} for way, of in steps.items()},
    )  # fmt: skip


class Broken(TwoGenerations):
    """The DMI of both generations, and the landing volume of a transfer that broke off."""

    def __init__(self, work: Path, pool: Path, kind: FilesystemKind, workload: workloads.Workload) -> None:
        super().__init__(work, pool, kind, workload)
        self._to_undo: list[SalvageJob] = []
        with self.request() as request:
            self.dmi = Dmi.decode(b"".join(build(request).encode()))

    def landed(self, arrived: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> SalvageJob:
        """Make the landing volume with the pieces that arrived; return the job that salvages what is whole by them."""
        dmi = self.dmi
        landing = Workspace(self.volume.id, dmi.head.transfer, WorkspaceKind.LANDING)
        self.substrate.begin(landing, self.base)
        with (
            self.substrate.reading(self.target) as target,
            self.substrate.writing(landing) as device,
            Device.open_reading(target) as source,
            Device.open_writing(device) as to,
        ):
            for first, blocks in zip(dmi.op_block[arrived].tolist(), dmi.block_count[arrived].tolist(), strict=True):
                to.write(first, source.read(first, blocks))
            to.sync()
        record = ArrivalRecord(dmi.head.transfer, bytes(16), np.where(arrived, np.uint8(COMPLETE), np.uint8(0)), 0, 1)
        whole = tuple(row for row in range(dmi.file_total) if bool(np.all(arrived[dmi.needs(row)])))
        instruction = UpdateInstruction(dmi.head.transfer, bytes(16).hex(), whole, Deletions.HOLD, complete=False)
        return SalvageJob(self.substrate, dmi, record, instruction, self.work / "mounts")

    def salvaged(self, job: SalvageJob, way: Way, steps: dict[str, float]) -> None:
        """Salvage one way, adding to ``steps`` the seconds from the begin of each to that of the next."""
        begun, step = monotonic_s(), "begin"

        def tell(said: Progress) -> None:
            nonlocal begun, step
            if said.step != step:
                steps[step] = steps.get(step, 0.0) + monotonic_s() - begun
                begun, step = monotonic_s(), said.step

        salvage(replace(job, way=way, progress=tell))
        self._to_undo.append(job)

    def settle(self) -> None:
        """Take back what was salvaged last, and drop the caches."""
        while self._to_undo:
            undo(self._to_undo.pop())
        os.sync()
        cold()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
