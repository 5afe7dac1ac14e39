"""Either side dies at every step of the protocol: nothing is recorded that is not there, and the next run finishes what is left."""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from agent.contract.errors import LandfallError, LinkLost
from agent.contract.messages import Differential, Sent, TlsMaterial
from agent.transfer.receiver import Received, Receiver
from agent.transfer.sender import send
from tests.transfer_scene import NAS1, NAS2, Differential1, Scene, make_differential

SOURCE_STEPS = [
    "src.before_connect",
    "src.after_connect",
    "src.before_mgmtinfo",
    "src.within_mgmtinfo",
    "src.after_mgmtinfo",
    "src.after_dmi_stored",
    "src.before_batch:4",
    "src.within_batch:4",
    "src.after_batch:4",
    "src.before_commit",
    "src.after_finish",
    "src.after_commit",
]
TARGET_STEPS = [
    "dst.after_accept",
    "dst.before_dmi_durable",
    "files.before_rename:1",
    "dst.after_dmi_durable",
    "dst.before_prepare",
    "dst.after_prepare",
    "dst.before_write:4",
    "dst.after_write:4",
    "dst.before_datasync:2",
    "dst.after_datasync:2",
    "dst.before_record:2",
    "dst.after_record:2",
    "dst.before_verify",
    "dst.after_verify",
    "dst.before_commit",
    "dst.after_commit",
    "dst.before_ack",
    "dst.after_ack",
]
SLOWLY = {"rate_limit_bytes_s": 1 << 20}  # so that pieces come in several groups
SPAWN = multiprocessing.get_context("spawn")


def test_every_failpoint_of_the_transfer_is_passed_here() -> None:
    sources = (Path(__file__).parents[2] / "agent" / "transfer").glob("*.py")
    named = {name for source in sources for name in re.findall(r'failpoint(?:\(|, )"([a-z_.]+)"', source.read_text())}
    assert named == {step.partition(":")[0] for step in SOURCE_STEPS + TARGET_STEPS} - {"files.before_rename"}


def send_in_child(folder: Path, made: Differential1, material: TlsMaterial, port: int, changes: dict[str, Any]) -> None:
    try:
        send(Scene(folder, made).send_job(port, tls=material, **SLOWLY, **changes))
    except LandfallError as error:
        sys.exit(error.exit_code)


def receive_in_child(folder: Path, made: Differential1, material: TlsMaterial, told: Connection, changes: dict[str, Any]) -> None:
    receiver = Receiver(Scene(folder, made).receive_job(tls=material, **changes))
    told.send(receiver.port)
    try:
        receiver.run()
    except LandfallError as error:
        sys.exit(error.exit_code)


@contextlib.contextmanager
def child(target: Any, *arguments: Any, failpoints: str) -> Iterator[BaseProcess]:
    """Run ``target`` in a process of its own with ``failpoints`` armed; it is gone when the context ends."""
    armed = {"LANDFALL_ALLOW_FAILPOINTS": "1", "LANDFALL_FAILPOINTS": failpoints}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in armed.items():
            patch.setenv(name, value)
        process = SPAWN.Process(target=target, args=arguments)
        process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def armed(step: str, action: str) -> str:
    name, _, nth = step.partition(":")
    return f"{name}={action}:{nth or 1}"


def finish(scene: Scene, had: int, changes: dict[str, Any]) -> None:
    """Run the transfer again: what was recorded is not sent again, and the result is the target, committed once."""
    was_committed = scene.committed > 0
    sent, received = scene.transfer(both=changes, receiving={"committed": was_committed})
    assert isinstance(sent, Sent), sent
    assert isinstance(received, Received), received
    assert sent.pieces_skipped == (scene.differential.dmi.piece_total if was_committed else had)
    scene.check_landed()
    assert scene.committed == 1


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, make_differential(tmp_path, blocks=1024, pieces=40))


@pytest.mark.parametrize("step", SOURCE_STEPS)
def test_A_the_source_dies(scene: Scene, step: str) -> None:
    changes = {"differential": Differential.SEND if len(step) % 2 else Differential.VERIFY}
    receiver = Receiver(scene.receive_job(connect_limit_s=3.0, **changes))
    material = scene.authority.material(NAS1, NAS2)
    arguments = (scene.folder, scene.differential, material, receiver.port, changes)
    with ThreadPoolExecutor(1) as executor, child(send_in_child, *arguments, failpoints=armed(step, "kill")) as process:
        received = executor.submit(receiver.run)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        outcome = received.exception(timeout=30)
    if step in {"src.after_finish", "src.after_commit"}:
        assert outcome is None
        assert scene.committed == 1
    else:
        assert isinstance(outcome, LinkLost), outcome
        assert scene.committed == 0
    finish(scene, scene.check_recorded(), changes)


@pytest.mark.parametrize("step", TARGET_STEPS)
def test_B_the_target_dies(scene: Scene, step: str) -> None:
    changes = {"differential": Differential.SEND if len(step) % 2 else Differential.VERIFY}
    heard, told = SPAWN.Pipe(duplex=False)
    arguments = (scene.folder, scene.differential, scene.authority.material(NAS2, NAS1), told, changes)
    with child(receive_in_child, *arguments, failpoints=armed(step, "kill")) as process:
        assert heard.poll(60)
        try:
            outcome: Any = send(scene.send_job(heard.recv(), **SLOWLY, **changes))
        except LandfallError as error:
            outcome = error
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    assert isinstance(outcome, Sent if step == "dst.after_ack" else LinkLost), outcome
    assert scene.committed == (step in {"dst.after_commit", "dst.before_ack", "dst.after_ack"})
    finish(scene, scene.check_recorded(), changes)


def test_B10_the_target_dies_in_every_run_and_progress_never_goes_back(scene: Scene) -> None:
    had = [0]
    for step in ("dst.after_record:1", "dst.after_write:3", "dst.after_record:2", "dst.before_datasync:2"):
        heard, told = SPAWN.Pipe(duplex=False)
        arguments: tuple[Any, ...] = (scene.folder, scene.differential, scene.authority.material(NAS2, NAS1), told, {})
        with child(receive_in_child, *arguments, failpoints=armed(step, "kill")) as process:
            assert heard.poll(60)
            with pytest.raises(LinkLost):
                send(scene.send_job(heard.recv(), **SLOWLY))
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
        had.append(scene.check_recorded())
    assert had == sorted(had)
    assert had[-1] > 0
    finish(scene, had[-1], {})


def test_A13_a_source_that_was_stopped_and_goes_on_later_changes_nothing_any_more(scene: Scene) -> None:
    receiver = Receiver(scene.receive_job(silence_limit_s=2.5))
    material = scene.authority.material(NAS1, NAS2)
    arguments: tuple[Any, ...] = (scene.folder, scene.differential, material, receiver.port, {})
    with ThreadPoolExecutor(1) as executor, child(send_in_child, *arguments, failpoints="src.before_batch=stop:4") as process:
        assert isinstance(executor.submit(receiver.run).exception(timeout=60), LinkLost)
        had, before = scene.check_recorded(), scene.landing.read_bytes()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode == LinkLost.exit_code
    assert scene.landing.read_bytes() == before
    finish(scene, had, {})
