"""Salvage killed at every step, also while it begins again: then it runs to its end; nothing is left behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agent.contract.errors import DeviceBusy, FailpointHit, LandfallError, NoSuchGeneration, VerifyFailed
from agent.contract.identity import FilesystemKind, GenerationKind
from agent.contract.messages import GenerationFacts
from agent.recovery.salvage import SalvageJob, Way, recover, salvage, undo
from tests.storage import recovery_fixtures
from tests.storage.recovery_fixtures import MakeScene
from tests.storage.salvage_model import compare, expected
from tests.storage.salvage_scene import Built, Scene

pool = recovery_fixtures.pool
make_scene = recovery_fixtures.make_scene
scene = recovery_fixtures.scene

ROOT = Path(__file__).resolve().parents[2]
POINTS = (
    "before_clone", "after_clone", "before_mount", "file", "before_namespace", "after_namespace", "before_verify", "after_verify",
    "before_commit", "after_commit",
)  # fmt: skip
CHILD = """
import pickle, sys
from pathlib import Path
from agent.contract.arrival import decode
from agent.contract.dmi import Dmi
from agent.recovery.salvage import SalvageJob, recover, salvage
from agent.volume.reflink import ReflinkSubstrate
folder = Path(sys.argv[1])
pool, transfer, digest, instruction, mounts, way = pickle.loads((folder / "job").read_bytes())
dmi = Dmi.decode((folder / "dmi").read_bytes())
arrival = decode((folder / "arrival").read_bytes(), transfer=transfer, dmi_digest=digest, pieces=dmi.piece_total)
substrate = ReflinkSubstrate(pool)
substrate.recover()
recover(substrate, mounts)
salvage(SalvageJob(substrate, dmi, arrival, instruction, mounts, way=way))
"""


def fill(root: Path) -> None:
    for name in ("a", "b", "gone"):
        (root / name).write_bytes(os.urandom(9000))


def change(root: Path) -> None:
    (root / "a").write_bytes(os.urandom(9000))
    (root / "b").rename(root / "c")
    (root / "gone").unlink()
    for number in range(5):
        (root / f"new{number}").write_bytes(os.urandom(9000))


def prepared(scene: Scene, way: Way = Way.FORWARD) -> tuple[Built, SalvageJob]:
    """A transfer of which everything arrived. That a roll back has files to undo, some are not designated."""
    scene.fill(fill)
    scene.change(change)
    built = scene.build()
    left_out = [built.row(path) for path in (b"a", b"new1")] if way is Way.BACK else []
    job = scene.job(built, scene.land(built), files=[row for row in built.judged() if row not in left_out])
    return built, replace(job, way=way)


def as_it_must_be(scene: Scene, built: Built, job: SalvageJob, generation: GenerationFacts) -> bool:
    whole = {identity for identity, row in built.rows.items() if row in job.instruction.files}
    return compare(scene.walked(generation), expected(built.base, built.target, whole, hold=not job.instruction.complete)) == []


def child(scene: Scene, job: SalvageJob, failpoints: str) -> int:
    """Runs a salvage as a node does after a start, in a process of its own."""
    folder = scene.tmp / "child"
    folder.mkdir(exist_ok=True)
    facts = (scene.substrate.pool.path, job.dmi.head.transfer, job.arrival.dmi_digest, job.instruction, job.mount_folder, job.way)
    (folder / "job").write_bytes(pickle.dumps(facts))
    (folder / "dmi").write_bytes(b"".join(job.dmi.encode()))
    (folder / "arrival").write_bytes(scene.arrival_bytes)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LANDFALL_ALLOW_FAILPOINTS": "1",
        "LANDFALL_FAILPOINTS": failpoints,
        "LANDFALL_FAILPOINT_TRACE": str(folder / "trace"),
    }
    argv = [sys.executable, "-c", CHILD, str(folder)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def nothing_left(scene: Scene, job: SalvageJob) -> None:
    assert str(job.mount_folder) not in Path("/proc/self/mountinfo").read_text()
    assert not scene.substrate.exists(job.workspace)
    assert scene.substrate.exists(job.landing)
    assert not job.mount_folder.exists() or list(job.mount_folder.iterdir()) == []


@pytest.mark.parametrize("way", list(Way))
@pytest.mark.parametrize("point", POINTS)
def test_B9_killed_at_any_step_it_is_the_base_or_done_and_runs_again(make_scene: MakeScene, point: str, way: Way) -> None:
    scene = make_scene(FilesystemKind.EXT4)
    built, job = prepared(scene, way)
    before = scene.substrate.generations(scene.volume)
    nth = ":2" if point == "file" else ""
    assert child(scene, job, f"recovery.{point}=kill{nth}") == -signal.SIGKILL
    held = scene.substrate.generations(scene.volume)
    committed = [facts for facts in held if facts not in before]
    assert bool(committed) is (point == "after_commit")
    recover(scene.substrate, job.mount_folder)
    nothing_left(scene, job)
    if not committed:
        result = salvage(job)
        committed = [result.generation]
    assert as_it_must_be(scene, built, job, committed[0])
    assert scene.walked(scene.base).facts() == built.base.facts()
    nothing_left(scene, job)


@pytest.mark.parametrize("way", list(Way))
def test_B10_killed_three_times_in_a_row_it_still_ends_well(scene: Scene, way: Way) -> None:
    built, job = prepared(scene, way)
    for failpoints in ("recovery.after_namespace=kill", "recovery.file=kill:2", "recovery.before_commit=kill"):
        assert child(scene, job, failpoints) == -signal.SIGKILL
    assert child(scene, job, "") == 0
    newest = scene.substrate.generations(scene.volume)[-1]
    assert newest.kind is GenerationKind.SALVAGED
    assert as_it_must_be(scene, built, job, newest)
    nothing_left(scene, job)


def test_B10_the_sweep_itself_can_be_repeated(scene: Scene) -> None:
    _, job = prepared(scene)
    assert child(scene, job, "recovery.after_namespace=kill") == -signal.SIGKILL
    for _ in range(3):
        recover(scene.substrate, job.mount_folder)
    nothing_left(scene, job)


@pytest.mark.parametrize("way", list(Way))
def test_every_failpoint_is_passed(scene: Scene, way: Way) -> None:
    _, job = prepared(scene, way)
    assert child(scene, job, "") == 0
    passed = set((scene.tmp / "child/trace").read_text().split())
    assert {f"recovery.{point}" for point in POINTS} <= passed


@pytest.mark.parametrize("way", list(Way))
@pytest.mark.parametrize("point", ["file", "after_namespace", "before_commit"])
def test_B9_an_error_at_any_step_leaves_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch, point: str, way: Way) -> None:
    _, job = prepared(scene, way)
    monkeypatch.setenv("LANDFALL_ALLOW_FAILPOINTS", "1")
    monkeypatch.setenv("LANDFALL_FAILPOINTS", ";".join(f"recovery.{point}=raise:{n}" for n in range(1, 99)))
    with pytest.raises(FailpointHit):
        salvage(job)
    nothing_left(scene, job)
    assert scene.substrate.generations(scene.volume)[-1] == scene.target


def test_what_does_not_read_back_is_not_committed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    built, job = prepared(scene)
    physical: list[int] = []

    def spoil(device: Path) -> None:
        with open(device, "r+b") as file:
            for at in physical:
                file.seek(at)
                file.write(b"rot")
            file.flush()
            os.fsync(file.fileno())

    real_failpoint = sys.modules["agent.recovery.salvage"].failpoint

    def between(name: str) -> None:
        if name == "recovery.before_verify":
            content = built.target.node(b"new3").content[:64]
            with scene.substrate.writing(job.workspace) as device:
                image = device.read_bytes()
                physical.append(image.index(content))
                spoil(device)
        real_failpoint(name)

    monkeypatch.setattr("agent.recovery.salvage.failpoint", between)
    with pytest.raises(VerifyFailed, match="new3"):
        salvage(job)
    nothing_left(scene, job)
    assert scene.substrate.generations(scene.volume)[-1] == scene.target


def test_attributes_that_do_not_read_back_are_caught(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    _, job = prepared(scene)
    monkeypatch.setattr("agent.recovery.inode.set_mtime", lambda fd, state: None)
    with pytest.raises(VerifyFailed, match="does not read back"):
        salvage(job)
    nothing_left(scene, job)


def test_undo_gives_the_base_back_and_keeps_the_transfer(scene: Scene) -> None:
    built, job = prepared(scene)
    with pytest.raises(NoSuchGeneration):
        undo(job)
    result = salvage(job)
    assert result.generation.salvaged_from == job.dmi.head.target
    assert result.generation.id.counter == scene.target.id.counter + 1
    with scene.opened(result.generation), pytest.raises(DeviceBusy):
        undo(job)
    undo(job)
    assert scene.substrate.generations(scene.volume)[-1] == scene.target
    assert scene.substrate.exists(job.landing)
    again = salvage(job)
    assert again.generation.id.nonce != result.generation.id.nonce
    assert scene.walked(again.generation).facts() == built.target.facts()


def test_a_mount_of_ours_that_a_crash_left_is_taken_away(scene: Scene) -> None:
    _, job = prepared(scene)
    job.mount_point.mkdir(parents=True)
    scene.substrate.begin(job.workspace, job.dmi.head.base)
    with scene.substrate.writing(job.workspace) as device:
        option = "nouuid" if scene.kind is FilesystemKind.XFS else "rw"
        subprocess.run(["mount", "-t", scene.kind.value, "-o", option, device, job.mount_point], check=True)
    other = job.mount_folder / "not ours"
    other.mkdir()
    recover(scene.substrate, job.mount_folder)
    assert list(job.mount_folder.iterdir()) == [other]
    other.rmdir()
    nothing_left(scene, job)


def test_nothing_is_done_while_somebody_else_has_the_landing_volume(scene: Scene) -> None:
    _, job = prepared(scene)
    with scene.substrate.writing(job.landing), pytest.raises(LandfallError):
        salvage(job)
    nothing_left(scene, job)
