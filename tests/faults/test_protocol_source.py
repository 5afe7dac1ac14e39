"""Group A: NAS 1 dies, or stops, at each step of the protocol."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from agent.contract import frames
from agent.contract import messages as m
from agent.contract.arrival import Arrived
from agent.contract.arrival import decode as decode_arrival
from agent.contract.columns import identity
from agent.contract.dmi import Dmi
from agent.contract.errors import LandfallError, LinkLost, NoSuchTransfer, TransferBusy
from agent.contract.frames import FrameType
from agent.system.clock import wait_until
from agent.transfer.receiver import Receiver
from mgmt.lab.proxy import Action, Direction, Trigger
from tests.faults.case import Case, follow, release, resume
from tests.faults.phases import (
    SLOWLY,
    await_interruption,
    changed_block,
    converged,
    expect_death,
    facts_of,
    fresh,
    instruction,
    rot,
    running,
    state_of,
    transfer_files,
    untouched,
    workspaces,
)
from tests.faults.rig import Link, NodeProcess
from tests.transfer_scene import Scene, make_differential
from tests.unit.test_transfer_tls import greet

VERIFY, SEND = m.Differential.VERIFY, m.Differential.SEND


def only_known(nas2: NodeProcess, case: Case) -> bool:
    """Whether NAS 2 knows the transfer, has nothing of it, and is not just writing down where it stands."""
    return set(transfer_files(nas2, case)) == {"transfer.json"}


def test_A1_a_source_that_dies_before_it_connects_leaves_nothing_and_is_retried(ext4_case: Case) -> None:
    with fresh(ext4_case) as pair:
        pair.nas1.kill()
        pair.nas1.start_armed("src.before_connect=kill")
        expect_death(pair.nas1, lambda: ext4_case.send(pair, VERIFY), "src.before_connect=kill")
        assert workspaces(pair.nas2, ext4_case) == []
        assert set(transfer_files(pair.nas2, ext4_case)) == {"transfer.json"}
        untouched(ext4_case, pair.nas2)
        pair.nas1.start()
        assert state_of(pair.nas1, ext4_case) is m.TransferState.INTERRUPTED
        ext4_case.send(pair, VERIFY)
        converged(ext4_case, pair.nas2)


def test_A2_a_handshake_that_is_cut_leaves_the_port_to_the_next(ext4_case: Case) -> None:
    with fresh(ext4_case) as pair:
        for position in (0, 1, 5, 100, 300, 700, 1200, 1600):
            with Link(Trigger(position, Action.CUT)) as link, pytest.raises(LinkLost):
                ext4_case.send(pair, VERIFY, route=link.route)
            assert wait_until(lambda: only_known(pair.nas2, ext4_case), 10.0)
            assert workspaces(pair.nas2, ext4_case) == []
        untouched(ext4_case, pair.nas2)
        ext4_case.send(pair, VERIFY)
        converged(ext4_case, pair.nas2)


def test_A3_without_management_information_there_is_nothing_to_salvage(ext4_case: Case) -> None:
    with fresh(ext4_case) as pair:
        pair.nas1.kill()
        pair.nas1.start_armed("src.before_mgmtinfo=kill")
        expect_death(pair.nas1, lambda: ext4_case.send(pair, VERIFY), "src.before_mgmtinfo=kill")
        await_interruption(ext4_case, pair)
        for ask in (m.FetchDmi, m.FetchArrival):
            with pytest.raises(NoSuchTransfer):
                pair.nas2.ask(ask(ext4_case.transfer))
        with pytest.raises(NoSuchTransfer):
            pair.nas2.ask(m.UpdateInstruction(ext4_case.transfer, "00" * 16, (), m.Deletions.HOLD, complete=False))
        assert workspaces(pair.nas2, ext4_case) == []
        untouched(ext4_case, pair.nas2)
        pair.nas2.ask(m.DiscardTransfer(ext4_case.transfer))
        assert transfer_files(pair.nas2, ext4_case) == {}


def test_A4_a_cut_within_the_management_information_leaves_none_of_it(ext4_case: Case) -> None:
    with fresh(ext4_case) as pair:
        length = len(pair.nas1.ask(m.FetchDmi(ext4_case.transfer)))
        handshake = 2500  # at most: below it the cut is in the handshake, which is as good
        for number in range(24):
            with Link(Trigger(handshake + number * (length - 200) // 24, Action.CUT)) as link, pytest.raises(LandfallError):
                ext4_case.send(pair, VERIFY, route=link.route)
            assert wait_until(lambda: only_known(pair.nas2, ext4_case), 10.0)
            assert workspaces(pair.nas2, ext4_case) == []
        untouched(ext4_case, pair.nas2)
        with pytest.raises(NoSuchTransfer):
            pair.nas2.ask(m.FetchDmi(ext4_case.transfer))
        ext4_case.send(pair, VERIFY)
        converged(ext4_case, pair.nas2)


@pytest.mark.slow
def test_A4_a_cut_at_every_byte_of_the_management_information_leaves_none_of_it(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=16, pieces=1, files=1))
    raw = scene.differential.raw
    folder = scene.store.folder(scene.differential.dmi.head.transfer)

    def cut_at(receiver: Receiver, cut: int) -> None:
        stream = greet(scene, receiver.port)
        assert stream.receive().type is FrameType.WELCOME
        # A frame for every cut but the first, so that all bytes before it have come whole and none after it.
        if cut:
            stream.send(frames.encode(FrameType.DMI, [raw[:cut]]))
        stream.close()

    with ThreadPoolExecutor(1) as executor:
        for cut in range(len(raw)):
            receiver = Receiver(scene.receive_job())
            received = executor.submit(receiver.run)
            cut_at(receiver, cut)
            assert isinstance(received.exception(timeout=10), LinkLost)
            assert [path.name for path in folder.iterdir()] == ["transfer.json"]


def test_A5_after_the_management_information_every_changed_file_is_known_and_none_has_its_data(xfs_case: Case) -> None:
    with fresh(xfs_case) as pair:
        pair.nas1.kill()
        pair.nas1.start_armed("src.after_dmi_stored=kill")
        expect_death(pair.nas1, lambda: xfs_case.send(pair, SEND), "src.after_dmi_stored=kill")
        await_interruption(xfs_case, pair)
        facts = facts_of(pair.nas2, xfs_case)
        assert (facts.pieces_arrived, facts.bytes_arrived) == (0, 0)
        assert facts.files_whole < facts.files_total
        dmi = Dmi.decode(pair.nas2.ask(m.FetchDmi(xfs_case.transfer)))
        assert all(not len(dmi.needs(row)) for row in instruction(xfs_case, pair.nas2).files), "only files without data are whole"
        untouched(xfs_case, pair.nas2)
    assert follow(xfs_case, pair, SEND).arrived_pieces == 0


@pytest.mark.parametrize("differential", list(m.Differential))
def test_A6_a_torn_block_is_not_counted_and_those_before_it_are_kept(xfs_case: Case, differential: m.Differential) -> None:
    pair = xfs_case.fresh()
    with running(pair, nas1=("src.within_batch=kill:4",)):
        options = {"rate_limit_bytes_s": SLOWLY, "streams": 1}
        expect_death(pair.nas1, lambda: xfs_case.send(pair, differential, **options), "src.within_batch=kill:4")
        await_interruption(xfs_case, pair)
        total = facts_of(pair.nas2, xfs_case).pieces_total
    followed = follow(xfs_case, pair, differential)
    assert 0 < followed.arrived_pieces < total
    assert followed.sent_on_resume is not None
    assert followed.sent_on_resume.pieces_sent == total - followed.arrived_pieces
    assert followed.sent_on_resume.pieces_skipped == followed.arrived_pieces


def test_A7_update_and_differential_data_of_a_piece_come_together_or_not_at_all(ext4_case: Case) -> None:
    """Data and differential data are no two phases here: both stand in one frame, so a source that dies between them has sent neither."""
    pair = ext4_case.fresh()
    with running(pair, nas1=("src.within_batch=kill:3",)):
        options = {"rate_limit_bytes_s": SLOWLY}
        expect_death(pair.nas1, lambda: ext4_case.send(pair, SEND, **options), "src.within_batch=kill:3")
        await_interruption(ext4_case, pair)
        raw, arrival = pair.nas2.ask(m.FetchDmi(ext4_case.transfer)), pair.nas2.ask(m.FetchArrival(ext4_case.transfer))
    digest = identity(memoryview(raw))
    bits = decode_arrival(arrival, transfer=ext4_case.transfer, dmi_digest=digest, pieces=Dmi.decode(raw).piece_total).bits
    assert set(bits.tolist()) <= {0, int(Arrived.UPDATE | Arrived.DIFFERENTIAL)}
    follow(ext4_case, pair, SEND)


def test_A7_a_file_whose_differential_data_was_wanted_and_never_came_is_not_salvaged(ext4_case: Case) -> None:
    """The base rotted and the source dies before it hears that its pre-image is wanted."""
    pair = ext4_case.fresh()
    block = changed_block(ext4_case, pair)
    rot(ext4_case, pair.nas2, block)
    with running(pair), Link() as link:

        def deaf(said: m.Progress) -> None:
            if said.step == "pieces":
                link.proxy.arm(Trigger(0, Action.BLACKHOLE_ONE_WAY, Direction.DOWNSTREAM))

        with pytest.raises(LinkLost):
            ext4_case.send(pair, VERIFY, route=link.route, on_progress=deaf, silence_limit_s=2.0, rate_limit_bytes_s=SLOWLY)
        pair.nas1.kill()
        await_interruption(ext4_case, pair)
        dmi = Dmi.decode(pair.nas2.ask(m.FetchDmi(ext4_case.transfer)))
        row = dmi.op_block.tolist().index(block)
        concerned = {file for file in range(dmi.file_total) if row in dmi.needs(file)}
        ordered = instruction(ext4_case, pair.nas2)
        assert concerned
        assert not concerned & set(ordered.files)
        assert ordered.files, "the others are recovered"
        done = pair.nas2.ask(ordered)
        assert not concerned & {said.file for said in done.exceptions if said.outcome is m.Outcome.RECOVERED}
        pair.nas2.ask(m.UndoSalvage(ext4_case.base.volume))
    release(pair.nas2)
    resume(ext4_case, pair, VERIFY)


def test_A8_a_transfer_that_is_whole_is_not_committed_without_a_word_of_the_source(xfs_case: Case) -> None:
    pair = xfs_case.fresh()
    with running(pair, nas1=("src.before_commit=kill",)):
        expect_death(pair.nas1, lambda: xfs_case.send(pair, SEND), "src.before_commit=kill")
        await_interruption(xfs_case, pair)
        facts = facts_of(pair.nas2, xfs_case)
        assert facts.state is m.TransferState.INTERRUPTED
        assert facts.pieces_arrived == facts.pieces_total
        assert facts.files_whole == facts.files_total
        untouched(xfs_case, pair.nas2)
    followed = follow(xfs_case, pair, SEND)
    assert followed.salvaged
    assert followed.sent_on_resume is not None
    assert followed.sent_on_resume.pieces_sent == 0


def test_A9_ack_lost_the_same_transfer_says_that_it_is_committed_and_nothing_is_sent_again(ext4_case: Case) -> None:
    pair = ext4_case.fresh()
    with running(pair, nas2=("dst.before_commit=stop",)), Link() as link, ThreadPoolExecutor(1) as executor:
        sending = executor.submit(ext4_case.send, pair, SEND, route=link.route, silence_limit_s=4.0)
        assert wait_until(pair.nas2.stopped, 30.0)
        link.proxy.arm(Trigger(0, Action.BLACKHOLE_ONE_WAY, Direction.DOWNSTREAM))
        pair.nas2.go_on()
        assert isinstance(sending.exception(timeout=30.0), LinkLost)
        assert wait_until(lambda: state_of(pair.nas2, ext4_case) is m.TransferState.COMMITTED, 30.0)
        assert state_of(pair.nas1, ext4_case) is m.TransferState.INTERRUPTED
        converged(ext4_case, pair.nas2)
        sent = ext4_case.send(pair, SEND)
        assert (sent.pieces_sent, sent.pieces_skipped) == (0, facts_of(pair.nas2, ext4_case).pieces_total)
        assert sent.bytes_sent < 2000
        assert state_of(pair.nas1, ext4_case) is m.TransferState.COMMITTED
        converged(ext4_case, pair.nas2)
        outbox: m.Outbox = pair.nas2.ask(m.ReadOutbox())
        assert outbox.notifications == (), "a transfer that is committed did not fail"


@pytest.mark.parametrize("salvaged_meanwhile", [False, True], ids=["resumed", "salvaged meanwhile"])
def test_A13_a_source_that_stops_is_given_up_and_comes_too_late(ext4_case: Case, salvaged_meanwhile: bool) -> None:
    pair = ext4_case.fresh()
    outcome: queue.SimpleQueue[object] = queue.SimpleQueue()

    def send() -> None:
        try:
            outcome.put(ext4_case.send(pair, SEND, silence_limit_s=1.5, rate_limit_bytes_s=SLOWLY))
        except (LandfallError, OSError) as error:
            outcome.put(error)

    with running(pair, nas1=("src.before_batch=stop:3",)):
        sending = threading.Thread(target=send)
        sending.start()
        assert wait_until(pair.nas1.stopped, 30.0)
        await_interruption(ext4_case, pair)
        before = transfer_files(pair.nas2, ext4_case)
        if salvaged_meanwhile:
            pair.nas2.ask(instruction(ext4_case, pair.nas2))
            before = transfer_files(pair.nas2, ext4_case)
        pair.nas1.go_on()
        assert isinstance(outcome.get(timeout=30.0), LinkLost)
        sending.join(30.0)
        assert transfer_files(pair.nas2, ext4_case) == before, "what comes too late changes nothing"
        if salvaged_meanwhile:
            with pytest.raises(TransferBusy, match="salvaged"):
                ext4_case.send(pair, SEND)
            assert transfer_files(pair.nas2, ext4_case) == before
            pair.nas2.ask(m.UndoSalvage(ext4_case.base.volume))
        untouched(ext4_case, pair.nas2)
    with suppress(LandfallError):
        release(pair.nas2)
    follow(ext4_case, pair, SEND)
