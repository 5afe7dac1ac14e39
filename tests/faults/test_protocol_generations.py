"""Group F: a base that is not the base, a differential that is not the one, records and counts that lie."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest

from agent.contract import frames
from agent.contract import identity as identities
from agent.contract import messages as m
from agent.contract.dmi import Change, Dmi, FileKind, Side
from agent.contract.errors import (
    BaseMismatch,
    DmiMalformed,
    LandfallError,
    LinkLost,
    NoSuchTransfer,
    ProtocolViolated,
    TransferBusy,
    VersionUnknown,
)
from agent.contract.frames import FrameType, Part
from agent.contract.identity import GenerationId, empty_generation, next_generation
from agent.system.clock import wait_until
from agent.system.priority import IoPriority
from agent.transfer.receiver import Receiver
from tests.faults.case import SIZES, Case, follow, images_equal, release, served
from tests.faults.phases import (
    await_interruption,
    changed_block,
    converged,
    expect_death,
    fresh,
    instruction,
    interrupted,
    rot,
    running,
    state_of,
    transfer_files,
    untouched,
    workspaces,
)
from tests.faults.rig import Keeping, Pair
from tests.transfer_scene import BLOCK, Scene, make_differential
from tests.unit.test_transfer_tls import greet, refusal

VERIFY, SEND = m.Differential.VERIFY, m.Differential.SEND


def another(case: Case, pair: Pair) -> GenerationId:
    """Return one more generation of NAS 1's volume, with a change in it."""
    root = Path(pair.nas1.ask(m.ServeVolume(case.base.volume, 1)).mount_point)
    (root / "one more").write_bytes(b"more" * 5000)
    taken = pair.take(case.base.volume)
    pair.nas1.ask(m.StopServing(case.base.volume))
    return taken


def test_F1_a_differential_of_a_base_that_is_not_held_is_refused_before_anything_is_written(ext4_case: Case) -> None:
    with fresh(ext4_case) as pair:
        pair.nas2.ask(m.DropGeneration(ext4_case.base))
        with pytest.raises(BaseMismatch, match="not the newest generation"):
            ext4_case.send(pair, VERIFY)
        assert transfer_files(pair.nas2, ext4_case) == {}
        assert workspaces(pair.nas2, ext4_case) == []
        older = served(pair.nas2, ext4_case.base.volume).generations[-1].id
        assert older == empty_generation(ext4_case.base.volume)
        pair.receive_and_send(pair.build(older, ext4_case.target), older, ext4_case.target, VERIFY)
        assert images_equal(pair.nas2.image(ext4_case.target), ext4_case.source_image(ext4_case.target))


@pytest.mark.parametrize("field", ["epoch", "counter", "nonce"])
def test_F1_a_base_matches_only_if_all_of_its_identity_does(ext4_case: Case, field: str) -> None:
    base = ext4_case.base
    other = {
        "epoch": replace(base, epoch=base.epoch + 1),
        "counter": replace(base, counter=0),
        "nonce": replace(base, nonce="f" * 32),
    }[field]
    with fresh(ext4_case) as pair:
        with pytest.raises(BaseMismatch):
            pair.receive_and_send(ext4_case.transfer, other, ext4_case.target, VERIFY)
        assert transfer_files(pair.nas2, ext4_case) == {}


def test_F2_a_base_that_somebody_wrote_to_is_refused(ext4_case: Case) -> None:
    with fresh(ext4_case) as pair:
        with pair.nas2.image(ext4_case.base).open("r+b") as file:
            file.seek(-1, 2)
            byte = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(BaseMismatch, match="wrote to generation"):
            ext4_case.send(pair, VERIFY)
        assert transfer_files(pair.nas2, ext4_case) == {}
        assert workspaces(pair.nas2, ext4_case) == []


@pytest.mark.parametrize("differential", list(m.Differential))
def test_F2_a_byte_of_the_base_that_rotted_is_healed(xfs_case: Case, differential: m.Differential) -> None:
    with fresh(xfs_case) as pair:
        rot(xfs_case, pair.nas2, changed_block(xfs_case, pair))
        assert not images_equal(pair.nas2.image(xfs_case.base), xfs_case.source_image(xfs_case.base))
        xfs_case.send(pair, differential)
        converged(xfs_case, pair.nas2)
        transfer = pair.build(xfs_case.target, after := another(xfs_case, pair))
        pair.receive_and_send(transfer, xfs_case.target, after, differential)
        assert images_equal(pair.nas2.image(after), pair.nas1.image(after)), "a healed base is a base like any other"


def test_F3_a_differential_whose_base_never_came_is_refused(ext4_case: Case) -> None:
    with fresh(ext4_case) as pair:
        after = another(ext4_case, pair)
        transfer = pair.build(ext4_case.target, after)
        with pytest.raises(BaseMismatch):
            pair.receive_and_send(transfer, ext4_case.target, after, VERIFY)
        untouched(ext4_case, pair.nas2)
        assert workspaces(pair.nas2, ext4_case) == []
        ext4_case.send(pair, VERIFY)
        pair.receive_and_send(transfer, ext4_case.target, after, VERIFY)
        assert images_equal(pair.nas2.image(after), pair.nas1.image(after))


def test_F4_F5_the_same_transfer_twice_is_done_once_and_is_refused_when_it_is_history(xfs_case: Case) -> None:
    with fresh(xfs_case) as pair:
        first = xfs_case.send(pair, SEND)
        again = xfs_case.send(pair, SEND)
        assert (again.pieces_sent, again.pieces_skipped) == (0, first.pieces_sent)
        assert again.bytes_sent < first.bytes_sent // 10
        converged(xfs_case, pair.nas2)
        after = another(xfs_case, pair)
        pair.receive_and_send(pair.build(xfs_case.target, after), xfs_case.target, after, SEND)
        held = served(pair.nas2, xfs_case.base.volume).generations
        with pytest.raises(BaseMismatch):
            xfs_case.send(pair, SEND)
        assert served(pair.nas2, xfs_case.base.volume).generations == held
        assert images_equal(pair.nas2.image(after), pair.nas1.image(after))


def test_F6_a_differential_of_one_volume_is_not_taken_for_another(ext4_case: Case) -> None:
    with fresh(ext4_case) as pair:
        other = uuid4()
        pair.nas2.ask(m.AdmitReplica(other, "other", ext4_case.filesystem, SIZES[ext4_case.filesystem]))
        target = next_generation(other, 1, 0)
        with pytest.raises(BaseMismatch, match="another base"):
            pair.receive_and_send(ext4_case.transfer, empty_generation(other), target, VERIFY)
        assert wait_until(lambda: set(transfer_files(pair.nas2, ext4_case)) == {"transfer.json"}, 10.0)
        assert not list((pair.nas2.folder / "pool/volumes" / str(other) / "workspaces").iterdir())
        assert [facts.id for facts in served(pair.nas2, other).generations] == [empty_generation(other)]
        untouched(ext4_case, pair.nas2)
        assert wait_until(lambda: state_of(pair.nas2, ext4_case) is m.TransferState.INTERRUPTED, 10.0)
        pair.nas2.ask(m.DiscardTransfer(ext4_case.transfer))
        ext4_case.send(pair, VERIFY)
        converged(ext4_case, pair.nas2)


def test_F7_a_target_that_is_given_up_is_said_so_and_one_command_makes_way_for_the_next(ext4_case: Case) -> None:
    pair = interrupted(ext4_case, VERIFY, whole=False)
    with running(pair):
        pair.nas1.ask(m.DiscardTransfer(ext4_case.transfer))
        with pytest.raises(NoSuchTransfer):
            ext4_case.send(pair, VERIFY)
        after = another(ext4_case, pair)
        assert after.counter == ext4_case.target.counter
        assert after != ext4_case.target
        transfer = pair.build(ext4_case.base, after)
        with pytest.raises(BaseMismatch):  # the partial one is not continued with something else
            pair.receive_and_send(ext4_case.transfer, ext4_case.base, after, VERIFY)
        with pytest.raises(TransferBusy):
            pair.receive_and_send(transfer, ext4_case.base, after, VERIFY)
        assert wait_until(lambda: _discarded(ext4_case, pair), 10.0)
        assert workspaces(pair.nas2, ext4_case) == []
        pair.receive_and_send(transfer, ext4_case.base, after, VERIFY)
        assert images_equal(pair.nas2.image(after), pair.nas1.image(after))
        assert images_equal(pair.nas2.image(ext4_case.base), ext4_case.source_image(ext4_case.base))
    release(pair.nas1)
    release(pair.nas2)


def _discarded(case: Case, pair: Pair) -> bool:
    """Whether NAS 2 forgot the transfer; it may still be listening for the source that did not come."""
    try:
        pair.nas2.ask(m.DiscardTransfer(case.transfer))
    except TransferBusy:
        listening = pair.nas2.ask(m.ReceiveTransfer(case.transfer, case.base, case.target, VERIFY, 1, *_passes(pair), silence_limit_s=1.0))
        with socket.create_connection((listening.address, listening.port)):
            return False
    return True


def _passes(pair: Pair) -> tuple[str, m.TlsMaterial]:
    passes = pair.authority.passes("nas1", "nas2")
    return passes.token, passes.receiver


@pytest.mark.parametrize("lie", ["one less", "one more", "one twice"])
def test_F8_another_number_of_pieces_than_announced_is_not_committed(tmp_path: Path, lie: str) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=256, pieces=12))
    dmi, target = scene.differential.dmi, scene.differential.target.read_bytes()
    rows = list(range(dmi.piece_total))
    rows = {"one less": rows[:-1], "one more": [*rows, dmi.piece_total], "one twice": [*rows, 3]}[lie]

    def batch(row: int) -> list[bytes]:
        known = min(row, dmi.piece_total - 1)
        first, count = int(dmi.op_block[known]), int(dmi.block_count[known])
        data = b"" if dmi.target_hole[known] else target[first * BLOCK : (first + count) * BLOCK]
        numbers, parts = np.array([row], dtype=np.uint32), np.array([Part.UPDATE], dtype=np.uint8)
        return [bytes(part) for part in frames.encode_batch(numbers, parts, len(data), data, compressed=False)]

    receiver = Receiver(scene.receive_job())
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receiver.run)
        stream = greet(scene, receiver.port)
        assert stream.receive().type is FrameType.WELCOME
        stream.send(frames.encode(FrameType.DMI, [scene.differential.raw]))
        assert [stream.receive().type for _ in range(3)] == [FrameType.DMI_STORED, FrameType.STATE, FrameType.PROGRESS]
        try:
            for row in rows:
                stream.send(batch(row))
            stream.send(frames.encode(FrameType.FINISH))
        except LinkLost:
            assert lie == "one more", "it is refused before the end"
        if lie == "one twice":
            while stream.receive(20).type is not FrameType.COMMITTED:
                pass
            stream.close()
            received.result(timeout=10)
            scene.check_landed()
        else:
            assert isinstance(received.exception(timeout=20), ProtocolViolated)
            stream.close()
            assert scene.committed == 0
            scene.check_recorded()


def test_F9_a_wrong_map_of_blocks_gives_damaged_files_and_never_recovered_ones(xfs_case: Case) -> None:
    """Two files' extents are exchanged in the DMI: all their pieces arrive, and what is read there is not what their digests say."""
    pair = xfs_case.fresh()
    path = pair.nas1.folder / "state/transfers" / str(xfs_case.transfer) / "dmi"
    dmi = Dmi.decode(path.read_bytes())
    wrong, lied = _exchanged(dmi)
    path.write_bytes(b"".join(map(bytes, lied.encode())))
    with running(pair, nas2=("dst.before_verify=kill",)):
        expect_death(pair.nas2, lambda: xfs_case.send(pair, SEND), "dst.before_verify=kill")
        pair.nas2.start()
        ordered = instruction(xfs_case, pair.nas2)
        assert set(wrong) <= set(ordered.files), "nothing in the record speaks against them"
        done = pair.nas2.ask(ordered)
        assert {said.file for said in done.exceptions if said.outcome is m.Outcome.DAMAGED} == set(wrong)
        opened = Path(pair.nas2.ask(m.OpenGeneration(done.generation.id)).path)
        base = Path(pair.nas2.ask(m.OpenGeneration(xfs_case.base)).path)
        for row in wrong:
            for name in (Path(os.fsdecode(path)) for _, path in dmi.names(row, Side.BASE)):
                assert (opened / name).read_bytes() == (base / name).read_bytes(), "it keeps its base"
        for generation in (done.generation.id, xfs_case.base):
            pair.nas2.ask(m.CloseGeneration(generation))
    release(pair.nas2)


def _exchanged(dmi: Dmi) -> tuple[list[int], Dmi]:
    """Return two files that stay where they are, and a DMI with the places of their content exchanged."""
    fit: dict[int, tuple[int, int]] = {}
    settled = (dmi.change & int(Change.NEW | Change.DELETED | Change.NAMES | Change.NAMELESS)) == 0
    for row in np.flatnonzero(settled & (dmi.kind == FileKind.REGULAR) & ((dmi.change & int(Change.CONTENT)) != 0)).tolist():
        for extent in range(int(dmi.extent_start[row]), int(dmi.extent_start[row + 1])):
            other, at = fit.setdefault(int(dmi.extent_blocks[extent]), (row, extent))
            if other != row and len(dmi.needs(row)) and len(dmi.needs(other)):
                physical = dmi.extent_physical.copy()
                physical[[at, extent]] = physical[[extent, at]]
                return [other, row], replace(dmi, extent_physical=physical)
    raise AssertionError("no two files of one size changed")


def cut(raw: bytes) -> bytes:
    return raw[:-5]


def flip(raw: bytes) -> bytes:
    return raw[:-5] + bytes([raw[-5] ^ 0x10]) + raw[-4:]


def grow(raw: bytes) -> bytes:
    return raw + raw[-40:]


@pytest.mark.parametrize("damage", [cut, flip, grow])
def test_F10_a_damaged_tail_of_the_record_is_not_read_and_its_pieces_come_again(ext4_case: Case, damage: Callable[[bytes], bytes]) -> None:
    pair = interrupted(ext4_case, SEND)
    arrival = pair.nas2.folder / "state/transfers" / str(ext4_case.transfer) / "arrival"
    arrival.write_bytes(damage(arrival.read_bytes()))
    followed = follow(ext4_case, pair, SEND)
    assert followed.sent_on_resume is not None
    assert (followed.sent_on_resume.pieces_sent > 0) is (damage is not grow)
    assert followed.sent_on_resume.pieces_skipped == followed.arrived_pieces


def test_F11_a_volume_has_one_transfer_at_a_time(ext4_case: Case) -> None:
    pair = ext4_case.fresh()
    with running(pair, nas1=("src.before_batch=stop:2",)), ThreadPoolExecutor(1) as executor:
        sending = executor.submit(ext4_case.send, pair, VERIFY, silence_limit_s=30.0)
        assert wait_until(pair.nas1.stopped, 30.0)
        second = uuid4()
        order = m.ReceiveTransfer(second, ext4_case.base, ext4_case.target, VERIFY, 1, *_passes(pair))
        with pytest.raises(TransferBusy, match=str(ext4_case.transfer)):
            pair.nas2.ask(order)
        for verb in (m.DiscardTransfer(ext4_case.transfer), m.PromoteVolume(ext4_case.base.volume, 2), instruction_of_nothing(ext4_case)):
            with pytest.raises(LandfallError):
                pair.nas2.ask(verb)
        pair.nas1.kill()
        assert isinstance(sending.exception(timeout=30), OSError)
        await_interruption(ext4_case, pair)
        with pytest.raises(TransferBusy, match="unfinished"):
            pair.nas2.ask(order)
        assert {facts.id for facts in pair.nas2.ask(m.ListTransfers()).transfers} == {ext4_case.transfer}
    release(pair.nas2)
    follow(ext4_case, pair, VERIFY)


def test_threads_that_send_and_receive_are_behind_the_clients_and_no_others(ext4_case: Case) -> None:
    pair = ext4_case.fresh()
    for node in (pair.nas1, pair.nas2):
        node.keeping = Keeping(io_priority=IoPriority.IDLE)
    with running(pair, nas1=("src.before_batch=stop:2",)), ThreadPoolExecutor(1) as executor:
        sending = executor.submit(ext4_case.send, pair, VERIFY, silence_limit_s=30.0)
        assert wait_until(pair.nas1.stopped, 30.0)
        for node in (pair.nas1, pair.nas2):
            assert node.process is not None
            told = priorities(node.process.pid)
            assert "idle" in told.values()
            assert told[node.process.pid] != "idle", "who listens for orders"
        pair.nas1.go_on()
        sending.result(timeout=60)
    release(pair.nas2)


def priorities(agent: int | None) -> dict[int | None, str]:
    """Return what ionice says of each thread of an agent."""
    threads = [int(task.name) for task in Path(f"/proc/{agent}/task").iterdir()]
    told = {thread: subprocess.run(["ionice", "-p", str(thread)], capture_output=True, text=True, check=False) for thread in threads}
    return {thread: asked.stdout.strip() for thread, asked in told.items() if not asked.returncode}


def instruction_of_nothing(case: Case) -> m.UpdateInstruction:
    return m.UpdateInstruction(case.transfer, "00" * 16, (), m.Deletions.HOLD, complete=False)


def test_F12_another_version_of_the_control_plane_is_refused(ext4_case: Case) -> None:
    with fresh(ext4_case) as pair, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(pair.nas2.folder / "run/agent.sock"))
        answers = connection.makefile("rb")
        for request, code in (
            ({"v": m.PROTOCOL + 1, "id": 1, "verb": "hello", "args": {}, "term": 1}, VersionUnknown.code),
            ({"v": m.PROTOCOL, "id": 2, "verb": "hello", "args": {"more": 1}, "term": 1}, "request-refused"),
            ({"v": m.PROTOCOL, "id": 3, "verb": "hello", "args": {}, "term": 1, "urgent": True}, "request-refused"),
            ({"v": m.PROTOCOL, "id": 4, "verb": "hello", "args": {}}, "request-refused"),
            ({"v": m.PROTOCOL, "id": 5, "verb": "hello", "args": {}, "term": -1}, "request-refused"),
            ({"v": m.PROTOCOL, "id": 6, "verb": "hello", "args": {}, "term": True}, "request-refused"),
        ):
            connection.sendall(m.encode_line(request))
            answer = m.decode_line(answers.readline())
            assert (answer["error"]["code"], answer["id"] in {request["id"], None}) == (code, True)


def test_F12_another_version_of_the_data_plane_is_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=64, pieces=4))
    receiver = Receiver(scene.receive_job())
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receiver.run)
        assert isinstance(refusal(greet(scene, receiver.port, protocol=2)), VersionUnknown)
        receiver.cancel()
        assert isinstance(received.exception(timeout=10), LinkLost)
    assert not scene.store.has_dmi(scene.differential.dmi.head.transfer)


def test_F13_generations_are_counted_and_never_dated(xfs_case: Case) -> None:
    volume = UUID(int=5)
    assert [next_generation(volume, 1, newest).counter for newest in (0, 41, 2**63 - 1)] == [1, 42, 2**63]
    assert next_generation(volume, 1, 7) != next_generation(volume, 1, 7), "two nodes that count alike do not mean the same"
    source = Path(identities.__file__).read_text()
    assert not [word for word in ("time", "clock", "datetime") if f"import {word}" in source or f"from {word}" in source]
    with fresh(xfs_case) as pair:
        first, second = another(xfs_case, pair), another(xfs_case, pair)
        assert (first.counter, second.counter) == (xfs_case.target.counter + 1, xfs_case.target.counter + 2)


def test_F13_a_counter_of_more_than_64_bits_is_refused(tmp_path: Path) -> None:
    dmi = make_differential(tmp_path, blocks=64, pieces=4).dmi
    for counter, fits in ((2**63 - 1, True), (2**64, False)):
        head = replace(dmi.head, target=replace(dmi.head.target, counter=counter))
        raw = b"".join(map(bytes, replace(dmi, head=head).encode()))
        if fits:
            assert Dmi.decode(raw).head.target.counter == counter
        else:
            with pytest.raises(DmiMalformed):
                Dmi.decode(raw)
