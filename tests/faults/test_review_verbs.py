"""Verbs against each other and against what a crash left: locks, roles, records that cannot be read, volumes that were not unmounted."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from agent.config import Config
from agent.contract import messages as m
from agent.contract.columns import identity
from agent.contract.dmi import Change, Dmi, Side
from agent.contract.errors import BaseMismatch, DeviceBusy, FreezeFailed, LandfallError, TransferBusy, VolumeExists
from agent.contract.identity import FilesystemKind, GenerationId
from agent.service.node import Node
from agent.system.block import go_down
from agent.system.clock import wait_until
from agent.volume import freeze
from tests.faults.case import served
from tests.faults.phases import promote_and_serve
from tests.faults.rig import FORKS, MIB, NodeProcess, Pair

SIZE = {FilesystemKind.EXT4: 64 * MIB, FilesystemKind.XFS: 320 * MIB}


def interrupted(pair: Pair, kind: FilesystemKind = FilesystemKind.EXT4) -> tuple[UUID, GenerationId, GenerationId]:
    """Return a transfer of which everything arrived, and whose target died before it committed; NAS 2 runs again."""
    volume = pair.create("v", kind, SIZE[kind])
    root = Path(served(pair.nas1, volume).mount_point)
    base = pair.replicate(volume)
    (root / "new").write_bytes(os.urandom(300_000))
    target = pair.take(volume)
    transfer = pair.build(base, target)
    pair.nas2.kill()
    pair.nas2.start_armed("dst.before_commit=kill:1")
    with pytest.raises((LandfallError, OSError)):
        pair.receive_and_send(transfer, base, target, m.Differential.VERIFY)
    pair.nas2.wait_dead()
    pair.nas2.start()
    return transfer, base, target


def instruction(pair: Pair, transfer: UUID) -> m.UpdateInstruction:
    """Return the order to store every file of the transfer."""
    raw = pair.nas2.ask(m.FetchDmi(transfer))
    dmi = Dmi.decode(raw)
    rows = tuple(row for row in range(dmi.file_total) if not dmi.change[row] & (Change.DELETED | Change.NAMELESS))
    return m.UpdateInstruction(transfer, identity(raw).hex(), rows, m.Deletions.HOLD, complete=True)


def test_K5_a_verb_excludes_itself(pair: Pair) -> None:
    folder = pair.nas1.folder
    pair.nas1.kill()
    node = Node(Config("nas1", "127.0.0.1", folder / "state", folder / "pool", folder / "run", folder / "run" / "s", folder / "srv"))
    volume, what = uuid4(), "generation.take"  # a constant of a verb is one object, whoever asks
    with node.job(volume, what), pytest.raises(TransferBusy, match=what):
        node.claim(volume, what)
    with node.job(volume, what):
        pass


def test_K5_two_generations_are_never_taken_at_once(pair: Pair) -> None:
    volume = pair.create("v", FilesystemKind.EXT4, SIZE[FilesystemKind.EXT4])

    def take(_: int) -> GenerationId | None:
        try:
            return pair.take(volume)
        except TransferBusy:
            return None

    with ThreadPoolExecutor(4) as together:
        taken = [found for found in together.map(take, range(8)) if found]
    counters = [found.counter for found in taken]
    assert sorted(counters) == list(range(1, len(taken) + 1))


@pytest.mark.parametrize("kind", list(FilesystemKind), ids=str)
def test_H14_a_generation_of_a_volume_that_was_not_unmounted_has_what_its_journal_had(pair: Pair, kind: FilesystemKind) -> None:
    volume = pair.create("v", kind, SIZE[kind])
    root = Path(served(pair.nas1, volume).mount_point)
    base = pair.replicate(volume)
    fd = os.open(root / "new", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"synced" * 1000)
    os.fsync(fd)  # on return it is in the journal, and need not be anywhere else
    os.close(fd)
    root_fd = os.open(root, os.O_RDONLY)
    go_down(root_fd)
    os.close(root_fd)
    pair.nas1.kill()
    subprocess.run(["umount", root], check=True)
    pair.nas1.start()
    assert not served(pair.nas1, volume).serving
    target = pair.take(volume)
    transfer = pair.build(base, target)
    dmi = Dmi.decode(pair.nas1.ask(m.FetchDmi(transfer)))
    sizes = {path: int(dmi.size[row]) for row in range(dmi.file_total) for _, path in dmi.names(row, Side.TARGET)}
    assert sizes[b"new"] == 6000
    pair.receive_and_send(transfer, base, target, m.Differential.VERIFY)


def test_salvage_after_promotion_is_refused(pair: Pair) -> None:
    """What a node serves since it was made the primary is not cloned anew: a salvage would be reported and never be seen."""
    transfer, base, _ = interrupted(pair)
    order = instruction(pair, transfer)
    pair.nas2.ask(m.PromoteVolume(base.volume, 2))
    with pytest.raises(BaseMismatch, match="made the primary"):
        pair.nas2.ask(order)
    assert served(pair.nas2, base.volume).generations[-1].id == base


def test_I8_what_a_salvage_was_made_of_can_be_given_up_when_it_cannot_be_undone_any_more(pair: Pair) -> None:
    transfer, base, _ = interrupted(pair)
    pair.nas2.ask(instruction(pair, transfer))
    workspaces = pair.nas2.folder / "pool" / "volumes" / str(base.volume) / "workspaces"
    with pytest.raises(DeviceBusy):
        pair.nas2.ask(m.DiscardTransfer(transfer))
    facts = promote_and_serve(pair.nas2, base.volume)
    assert list(workspaces.iterdir())
    pair.nas2.ask(m.DiscardTransfer(transfer))
    assert not list(workspaces.iterdir())
    assert (Path(facts.mount_point) / "new").stat().st_size == 300_000
    pair.nas2.kill()
    pair.nas2.start()
    assert served(pair.nas2, base.volume).serving


@pytest.mark.parametrize("damaged", ["dmi", "arrival"])
def test_F10_a_transfer_whose_records_are_damaged_is_listed_and_can_be_discarded(pair: Pair, damaged: str) -> None:
    transfer, base, target = interrupted(pair)
    pair.nas2.kill()
    path = pair.nas2.folder / "state" / "transfers" / str(transfer) / damaged
    raw = bytearray(path.read_bytes())
    raw[2] ^= 0xFF
    path.write_bytes(raw)
    pair.nas2.start()
    (facts,) = (facts for facts in pair.nas2.ask(m.ListTransfers()).transfers if facts.id == transfer)
    assert (facts.state, facts.files_whole) == (m.TransferState.INTERRUPTED, 0)
    pair.nas2.ask(m.DiscardTransfer(transfer))
    again = pair.build(base, target)
    pair.receive_and_send(again, base, target, m.Differential.VERIFY)


@pytest.mark.parametrize("kind", list(FilesystemKind), ids=str)
def test_a_volume_whose_making_broke_off_is_finished_by_asking_again(pair: Pair, kind: FilesystemKind) -> None:
    pair.nas1.kill()
    pair.nas1.start_armed("substrate.create.after=kill:1")
    order = m.CreateVolume(uuid4(), "v", kind, SIZE[kind])
    with pytest.raises(ConnectionResetError):
        pair.nas1.ask(order)
    pair.nas1.wait_dead()
    pair.nas1.start()
    root = Path(pair.nas1.ask(order).mount_point)
    (root / "kept").write_bytes(b"by clients")
    with pytest.raises(VolumeExists):
        pair.nas1.ask(order)
    pair.nas1.ask(m.StopServing(order.volume))
    assert (Path(pair.nas1.ask(order).mount_point) / "kept").read_bytes() == b"by clients"


def test_somebody_who_looks_into_a_generation_does_not_keep_the_agent_from_starting(pair: Pair) -> None:
    volume = pair.create("v", FilesystemKind.EXT4, SIZE[FilesystemKind.EXT4])
    order = m.OpenGeneration(pair.take(volume))
    inside = os.open(pair.nas1.ask(order).path, os.O_RDONLY)
    try:
        pair.nas1.kill()
        pair.nas1.start()
        assert pair.nas1.ask(order).path
    finally:
        os.close(inside)
    pair.nas1.ask(m.CloseGeneration(order.generation))


def test_a_guard_that_is_killed_before_it_answers_leaves_nothing_frozen(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(served(pair.nas1, pair.create("v", FilesystemKind.EXT4, SIZE[FilesystemKind.EXT4])).mount_point)
    dying = tmp_path / "guard.py"
    dying.write_text(Path(freeze.__file__).with_name("guard.py").read_text().replace('os.write(0, b"f")', "os.kill(os.getpid(), 9)"))
    monkeypatch.setattr(freeze, "_GUARD", dying)
    with pytest.raises(FreezeFailed), freeze.frozen(root):
        pass
    assert not freeze.thaw_if_frozen(root)


def test_E5_a_reception_whose_end_finds_no_room_to_be_recorded_is_told_when_there_is_room(pair: Pair) -> None:
    volume = pair.create("v", FilesystemKind.EXT4, SIZE[FilesystemKind.EXT4])
    root = Path(served(pair.nas1, volume).mount_point)
    base = pair.replicate(volume)
    (root / "new").write_bytes(os.urandom(24 * MIB))
    target = pair.take(volume)
    transfer = pair.build(base, target)
    pair.nas2.kill()
    pair.nas2.start_armed("dst.after_record=stop:1")
    hogs = pair.nas2.folder.parent / "hogs"
    with ThreadPoolExecutor(1) as aside:
        sending = aside.submit(pair.receive_and_send, transfer, base, target, m.Differential.VERIFY)
        assert wait_until(pair.nas2.stopped, 30.0)
        fill_up(hogs)
        pair.nas2.go_on()
        with pytest.raises(LandfallError):
            sending.result()
    state = pair.nas2.folder / "state"
    with pytest.raises(OSError, match="No space"):
        (state / "proof").write_bytes(b"there is no room")
    (state / "proof").unlink(missing_ok=True)
    shutil.rmtree(hogs)

    def interrupted_and_told() -> bool:
        (facts,) = (facts for facts in pair.nas2.ask(m.ListTransfers()).transfers if facts.id == transfer)
        told = [said.transfer for said in pair.nas2.ask(m.ReadOutbox(0, 0)).notifications]
        return facts.state is m.TransferState.INTERRUPTED and told == [transfer]

    assert wait_until(interrupted_and_told, 20.0)
    pair.receive_and_send(transfer, base, target, m.Differential.VERIFY)


def fill_up(folder: Path) -> None:
    """Take every block of the filesystem that ``folder`` is made on."""
    folder.mkdir()
    there = os.statvfs(folder)
    subprocess.run(["fallocate", "-l", str(there.f_bavail * there.f_frsize - 16 * MIB), folder / "most"], check=True)
    for size in (MIB, 4096):
        with suppress(OSError):
            for number in count():
                with open(folder / f"{size}-{number}", "wb") as file:
                    file.write(bytes(size))
                    file.flush()
                    os.fsync(file.fileno())


def test_two_agents_never_work_on_one_state(pair: Pair) -> None:
    second = NodeProcess(pair.nas1.folder, "nas1")
    process = FORKS.Process(target=serve_quietly, args=(str(second.folder), "nas1"))
    process.start()
    process.join(30.0)
    assert process.exitcode == 1
    assert "another agent works on" in pair.nas1.log()
    assert pair.nas1.ask(m.Hello()).node == "nas1"


def serve_quietly(folder: str, name: str) -> None:
    from tests.faults.rig import Keeping, _serve

    _serve(folder, name, Keeping(), {}, None)


def test_a_transfer_of_a_volume_that_is_gone_does_not_keep_the_agent_from_starting(pair: Pair) -> None:
    transfer, base, _ = interrupted(pair)
    pair.nas2.kill()
    shutil.rmtree(pair.nas2.folder / "pool" / "volumes" / str(base.volume))
    pair.nas2.start()
    pair.nas2.ask(m.DiscardTransfer(transfer))
    assert pair.nas2.ask(m.ListTransfers()).transfers == ()


def test_I8_a_discarded_transfer_leaves_nothing_of_its_target(pair: Pair) -> None:
    volume = pair.create("v", FilesystemKind.EXT4, SIZE[FilesystemKind.EXT4])
    base = pair.replicate(volume)
    transfer = pair.build(base, pair.take(volume))
    pair.nas1.ask(m.DiscardTransfer(transfer))
    kept = {path.name.split(".")[0] for path in (pair.nas1.folder / "state" / "differential" / str(volume)).iterdir()}
    assert kept == {base.name}
