"""One prepared differential, and what follows a crash: salvage on one copy of what is left, resume on the other, both checked.

``prepare`` leaves two folders of durable state: the base is replicated, the target is frozen on NAS 1 and its DMI is built. Every
test begins from copies of them. ``follow`` is the oracle: I1 (the newest generation of NAS 2 is base or target, byte for byte), I3
to I5 (the independent checker), I6 (a resume converges), I8 (no loop device, mount or workspace is left over).
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

from agent.contract import messages as m
from agent.contract.arrival import decode as decode_arrival
from agent.contract.columns import identity
from agent.contract.dmi import Dmi
from agent.contract.errors import LandfallError, NoSuchTransfer
from agent.contract.identity import FilesystemKind, GenerationId, GenerationKind, empty_generation
from agent.system.clock import wait_until
from mgmt.authority import Authority
from mgmt.determination import Policy, determine
from mgmt.drill import workload
from mgmt.drill.evidence import checker_statement
from mgmt.report import Circumstances, LossStatement, Seconds, state
from tests.faults.rig import MIB, NodeProcess, Pair, Pool, copy_tree

SIZES = {FilesystemKind.EXT4: 96 * MIB, FilesystemKind.XFS: 320 * MIB}


@dataclass(frozen=True)
class Case:
    """A differential that is ready to be sent, and the folders to begin from."""

    filesystem: FilesystemKind
    pool1: Pool
    pool2: Pool
    authority: Authority
    transfer: UUID
    base: GenerationId
    target: GenerationId

    @property
    def folder1(self) -> Path:
        return self.pool1.mount_point / str(self.filesystem)

    @property
    def folder2(self) -> Path:
        return self.pool2.mount_point / str(self.filesystem)

    def fresh(self) -> Pair:
        """Return both nodes, not running, as they were before the transfer."""
        copy_tree(self.folder1 / "origin", self.folder1 / "run1")
        copy_tree(self.folder2 / "origin", self.folder2 / "run2")
        return Pair(NodeProcess(self.folder1 / "run1", "nas1"), NodeProcess(self.folder2 / "run2", "nas2"), self.authority)

    def send(self, pair: Pair, differential: m.Differential, **options: object) -> m.Sent:
        """Send the differential between two running nodes."""
        return pair.receive_and_send(self.transfer, self.base, self.target, differential, **options)  # type: ignore[arg-type]

    def source_image(self, generation: GenerationId) -> Path:
        """Return NAS 1's frozen image."""
        return NodeProcess(self.folder1 / "origin", "nas1").image(generation)


def prepare(filesystem: FilesystemKind, pool1: Pool, pool2: Pool, authority: Authority, *, files: int, seed: int) -> Case:
    """Return a case: a volume of ``files`` real files replicated once, then changed."""
    folder1, folder2 = pool1.mount_point / str(filesystem), pool2.mount_point / str(filesystem)
    pair = Pair(NodeProcess(folder1 / "origin", "nas1"), NodeProcess(folder2 / "origin", "nas2"), authority)
    pair.nas1.start()
    pair.nas2.start()
    try:
        volume = pair.create("case", filesystem, SIZES[filesystem])
        root = Path(served(pair.nas1, volume).mount_point)
        workload.fill(root, files, 20 * MIB, seed, _nobody)
        base = pair.take(volume)
        first = pair.build(empty_generation(volume), base)
        pair.receive_and_send(first, empty_generation(volume), base, m.Differential.VERIFY)
        workload.change(root, files // 5, seed + 1, _nobody)
        target = pair.take(volume)
        transfer = pair.build(base, target)
        pair.nas1.ask(m.StopServing(volume))
    finally:
        pair.nas1.kill()
        pair.nas2.kill()
    return Case(filesystem, pool1, pool2, authority, transfer, base, target)


def _nobody(done: int, total: int) -> None:
    """Hear how far something is."""


def served(node: NodeProcess, volume: UUID) -> m.VolumeFacts:
    """Return a node's facts of a volume."""
    volumes: m.Volumes = node.ask(m.ListVolumes())
    return next(facts for facts in volumes.volumes if facts.id == volume)


@dataclass(frozen=True)
class Followed:
    """What came of a crash."""

    committed: bool  # NAS 2 had committed the target before we looked
    salvaged: bool  # there was something to salvage
    recovered: int
    changed: int
    arrived_pieces: int
    sent_on_resume: m.Sent | None


def follow(case: Case, pair: Pair, differential: m.Differential) -> Followed:
    """Salvage on a copy of NAS 2, resume on the original, check both. No agent runs before or after."""
    pair.nas1.kill()
    pair.nas2.kill()
    copy_tree(pair.nas2.folder, case.folder2 / "salvage")
    with ThreadPoolExecutor(1) as executor:
        salvaging = executor.submit(_salvage, case, NodeProcess(case.folder2 / "salvage", "nas2"))
        sent = resume(case, pair, differential)
    return replace(salvaging.result(), sent_on_resume=sent)


def _salvage(case: Case, nas2: NodeProcess) -> Followed:
    nas2.start()
    try:
        newest = served(nas2, case.base.volume).generations[-1]
        if newest.id == case.target:
            assert images_equal(nas2.image(case.target), case.source_image(case.target))
            return Followed(True, False, 0, 0, 0, None)
        assert newest.id == case.base, "the newest generation is neither base nor target"
        assert images_equal(nas2.image(case.base), case.source_image(case.base))
        try:
            dmi_bytes, arrival_bytes = nas2.ask(m.FetchDmi(case.transfer)), nas2.ask(m.FetchArrival(case.transfer))
        except NoSuchTransfer:
            return Followed(False, False, 0, 0, 0, None)
        return _salvage_known(case, nas2, dmi_bytes, arrival_bytes)
    finally:
        nas2.kill()
        release(nas2)


def _salvage_known(case: Case, nas2: NodeProcess, dmi_bytes: bytes, arrival_bytes: bytes) -> Followed:
    dmi = Dmi.decode(dmi_bytes)
    digest = identity(memoryview(dmi_bytes))
    arrival = decode_arrival(arrival_bytes, transfer=case.transfer, dmi_digest=digest, pieces=dmi.piece_total)
    verdicts = determine(dmi, arrival, Policy())
    done: m.Salvaged = nas2.ask(
        m.UpdateInstruction(case.transfer, digest.hex(), tuple(verdicts.designated.tolist()), verdicts.deletions, verdicts.complete)
    )
    assert done.generation.kind is GenerationKind.SALVAGED
    loss = check_salvaged(case, nas2, done.generation.id, done)
    assert images_equal(nas2.image(case.base), case.source_image(case.base)), "the base is not readable any more"
    return Followed(False, True, loss.files.recovered, loss.files.changed, int(arrival.complete.sum()), None)


def check_salvaged(case: Case, nas2: NodeProcess, generation: GenerationId, done: m.Salvaged | None = None) -> LossStatement:
    """Let the independent checker look at a salvaged generation; ``done`` is NAS 2's word on it, if it lived to say it."""
    dmi_bytes, arrival_bytes = nas2.ask(m.FetchDmi(case.transfer)), nas2.ask(m.FetchArrival(case.transfer))
    dmi, digest = Dmi.decode(dmi_bytes), identity(memoryview(dmi_bytes))
    arrival = decode_arrival(arrival_bytes, transfer=case.transfer, dmi_digest=digest, pieces=dmi.piece_total)
    circumstances = Circumstances("nas1", "nas2", "test", 0, "test")
    loss = state(dmi, arrival, determine(dmi, arrival, Policy()), circumstances, Seconds(0, 0, 0), salvaged=done)
    opened: m.Opened = nas2.ask(m.OpenGeneration(generation))
    work = nas2.folder
    (work / "loss.json").write_text(json.dumps(checker_statement(loss)))
    (work / "dmi").write_bytes(dmi_bytes)
    (work / "arrival").write_bytes(arrival_bytes)
    check(case, Path(opened.path), work)
    nas2.ask(m.CloseGeneration(generation))
    return loss


def check(case: Case, result: Path, work: Path) -> None:
    """Let the independent checker look at ``result``; its findings are the failure's message."""
    arguments = {
        "base": case.source_image(case.base),
        "target": case.source_image(case.target),
        "filesystem": case.filesystem,
        "result": result,
        "loss": work / "loss.json",
        "dmi": work / "dmi",
        "arrival": work / "arrival",
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    checked = subprocess.run([sys.executable, "-m", "mgmt.drill.checker", *words], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def images_equal(first: Path, second: Path) -> bool:
    """Whether two images are the same, holes being zeros."""
    return subprocess.run(["cmp", "-s", first, second], check=False).returncode == 0


def resume(case: Case, pair: Pair, differential: m.Differential) -> m.Sent:
    """Send the differential again between two nodes that do not run: it converges within two tries, and nothing is left over."""
    pair.nas1.start()
    pair.nas2.start()
    try:
        try:
            sent = case.send(pair, differential)
        except LandfallError:
            sent = case.send(pair, differential)  # I6: at most two tries
        newest = served(pair.nas2, case.base.volume).generations[-1]
        assert newest.id == case.target
        assert images_equal(pair.nas2.image(case.target), case.source_image(case.target)), "a resume did not converge"
        assert images_equal(pair.nas2.image(case.base), case.source_image(case.base))
        workspaces = list((pair.nas2.folder / "pool" / "volumes" / str(case.base.volume) / "workspaces").glob("*"))
        assert not workspaces, f"left over: {workspaces}"
        return sent
    finally:
        pair.nas1.kill()
        pair.nas2.kill()
        release(pair.nas1)
        release(pair.nas2)


def release(node: NodeProcess) -> None:
    """Unmount what a killed agent left mounted below its folder; fail if a loop device of it lives on afterwards."""
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        where = line.split()[1]
        if where.startswith(f"{node.folder}/"):
            subprocess.run(["umount", where], check=True)
    # Whoever lists the machine's block devices holds a loop device for a moment longer.
    assert wait_until(lambda: not _loops_below(node.folder), 10.0), f"loop devices left over: {_loops_below(node.folder)}"


def _loops_below(folder: Path) -> list[str]:
    files = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # it was let go meanwhile
            files.append(path.read_text().strip())
    return [file for file in files if file.startswith(f"{folder}/")]
