"""Bad links: cut, damaged, silent one way or both, at any byte; a resume sends what is missing and nothing else."""

import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from agent.blockio.device import Device
from agent.contract import frames
from agent.contract.columns import identity
from agent.contract.errors import LinkLost, Retry
from agent.contract.frames import Batch, FrameType, Hello
from agent.contract.messages import Differential, Sent
from agent.system.clock import monotonic_s
from agent.transfer import tls
from agent.transfer.landing import Landing
from agent.transfer.receiver import Received, Receiver
from agent.transfer.sender import send
from agent.transfer.stream import Stream
from mgmt.lab.proxy import Action, Direction, Endpoint, Proxy, Trigger
from tests.relay import Relay
from tests.transfer_scene import NAS2, Scene, make_differential, transfer_threads


@pytest.mark.parametrize("differential", list(Differential))
@pytest.mark.parametrize("seed", range(12))
def test_A6_D1_a_cut_at_any_byte_leaves_what_was_recorded_and_a_resume_sends_only_the_rest(
    tmp_path: Path, seed: int, differential: Differential
) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, seed=seed, blocks=1024, pieces=40))
    dmi = scene.differential.dmi
    relay = Relay(cut_at=int(np.random.default_rng(seed).integers(0, scene.data_bytes())))
    both = {"differential": differential, "streams": 1 + seed % 3}
    sent, received = scene.transfer(both=both, through=relay.before)
    assert isinstance(sent, LinkLost), sent
    assert isinstance(received, LinkLost), received
    assert "cancelled" not in received.message
    assert scene.committed == 0
    assert transfer_threads() == []
    had = scene.check_recorded()

    sent, received = scene.transfer(both=both)
    assert isinstance(sent, Sent), sent
    assert (sent.pieces_skipped, sent.pieces_sent) == (had, dmi.piece_total - had)
    scene.check_landed()
    assert scene.committed == 1


@pytest.mark.parametrize("seed", range(6))
def test_D10_a_changed_byte_breaks_the_link_and_lands_nowhere(tmp_path: Path, seed: int) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, seed=seed, blocks=512, pieces=20))
    relay = Relay(flip_at=int(np.random.default_rng(seed).integers(3000, scene.data_bytes())))
    sent, received = scene.transfer(through=relay.before)
    assert isinstance(sent, LinkLost), sent
    assert isinstance(received, LinkLost), received
    assert "cancelled" not in received.message
    scene.check_recorded()
    sent, _ = scene.transfer()
    assert isinstance(sent, Sent), sent
    scene.check_landed()


@pytest.mark.parametrize("way", ["stall", "mute"])
def test_D2_D3_a_link_that_goes_silent_is_noticed_by_both_sides(tmp_path: Path, way: str) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=1024, pieces=40))
    relay = Relay(stall_at=300_000) if way == "stall" else Relay(mute_at=300_000)
    begun = monotonic_s()
    sent, received = scene.transfer(both={"silence_limit_s": 2.5}, through=relay.before)
    assert isinstance(sent, LinkLost), sent
    assert isinstance(received, LinkLost), received
    assert "cancelled" not in received.message
    assert monotonic_s() - begun < 15
    assert scene.committed == 0


def test_A9_an_acknowledgement_lost_after_the_commit_leaves_the_target_committed(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=256, pieces=10))
    relay = Relay()
    commit = scene.receive_job().commit

    def commit_and_mute() -> None:
        commit()
        relay.mute_at = 0

    sent, received = scene.transfer(both={"silence_limit_s": 2.0}, receiving={"commit": commit_and_mute}, through=relay.before)
    assert isinstance(sent, LinkLost), sent
    assert isinstance(received, Received), received
    sent, _ = scene.transfer(receiving={"committed": True})
    assert isinstance(sent, Sent), sent
    assert (sent.pieces_sent, scene.committed) == (0, 1)


@pytest.mark.parametrize("connection", [0, 1, 2])
def test_D8_one_stream_of_several_dies_and_only_what_is_missing_is_sent_again(tmp_path: Path, connection: int) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=1024, pieces=40))
    relay = Relay(cut_at=100_000, only_connection=connection)
    sent, received = scene.transfer(both={"streams": 3}, through=relay.before)
    assert isinstance(sent, LinkLost), sent
    assert isinstance(received, LinkLost), received
    assert "cancelled" not in received.message
    assert scene.committed == 0
    had = scene.check_recorded()
    sent, _ = scene.transfer(both={"streams": 3})
    assert isinstance(sent, Sent), sent
    assert sent.pieces_skipped == had
    scene.check_landed()


def test_D4_what_a_link_lets_go_of_after_its_time_lands_nowhere(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=1024, pieces=40))
    with ExitStack() as held:

        @contextmanager
        def stalling(port: int) -> Iterator[int]:
            trigger = Trigger(300_000, Action.PAUSE, Direction.UPSTREAM)
            proxy = held.enter_context(Proxy(Endpoint("127.0.0.1", 0), Endpoint("127.0.0.1", port), trigger=trigger))
            late.append(proxy)
            yield proxy.endpoint.port

        late: list[Proxy] = []
        sent, received = scene.transfer(both={"silence_limit_s": 2.0}, through=stalling)
        assert isinstance(sent, LinkLost), sent
        assert isinstance(received, LinkLost), received
        had = scene.check_recorded()
        late[0].resume()
        sent, _ = scene.transfer()
        assert isinstance(sent, Sent), sent
        assert sent.pieces_skipped == had
    assert scene.committed == 1
    scene.check_landed()


def test_D7_streams_that_overtake_each_other_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=1024, pieces=40))
    take, chance = Landing.take, random.Random(7)

    def late(landing: Landing, batch: Batch, buffer: memoryview) -> None:
        threading.Event().wait(chance.random() * 0.03)
        assert scene.committed == 0, "committed before all of it was there"
        take(landing, batch, buffer)

    monkeypatch.setattr(Landing, "take", late)
    sent, received = scene.transfer(both={"streams": 4})
    assert isinstance(sent, Sent), sent
    assert isinstance(received, Received), received
    assert scene.committed == 1
    scene.check_landed()


def test_D12_a_port_that_is_closed_is_said_and_tried_again_later(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=64, pieces=4))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    begun = monotonic_s()
    with pytest.raises(LinkLost, match="refused") as closed:
        send(scene.send_job(port))
    assert closed.value.retry is Retry.RECONNECT
    assert monotonic_s() - begun < 10
    assert transfer_threads() == []


def test_D13_a_link_that_flaps_lets_every_session_get_further(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=1024, pieces=40))
    had, sessions, total = 0, 0, scene.data_bytes()
    while True:
        sent, received = scene.transfer(through=Relay(cut_at=total // 4).before)
        sessions += 1
        if isinstance(sent, Sent):
            break
        assert isinstance(received, LinkLost), received
        before, had = had, scene.check_recorded()
        assert had > before, "a session that brought nothing"
    assert 3 <= sessions <= 12
    assert scene.committed == 1
    scene.check_landed()


@pytest.mark.parametrize("cut", [1, 5, 100, 300, 517, 600, 900])
def test_A2_a_cut_within_the_handshake_leaves_nothing_and_keeps_nobody_out(tmp_path: Path, cut: int) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=64, pieces=4))
    receiver = Receiver(scene.receive_job(handshake_limit_s=2.0))
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receiver.run)
        with Relay(cut_at=cut).before(receiver.port) as port, pytest.raises(LinkLost):
            send(scene.send_job(port))
        assert isinstance(send(scene.send_job(receiver.port)), Sent)
        assert isinstance(received.result(timeout=30), Received)
    scene.check_landed()


def test_E24_a_slow_disk_is_not_taken_for_a_dead_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=512, pieces=20))
    silence_s, sync = 2.5, Device.sync

    def slow(device: Device) -> None:
        threading.Event().wait(2 * silence_s)
        sync(device)

    monkeypatch.setattr(Device, "sync", slow)
    sent, received = scene.transfer(both={"silence_limit_s": silence_s})
    assert isinstance(sent, Sent), sent
    assert isinstance(received, Received), received


def test_D6_a_slow_target_makes_the_source_wait_and_its_own_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=16384, pieces=300))
    receiver = Receiver(scene.receive_job())
    take, stuck, full = Landing.take, threading.Event(), threading.Event()
    entered: list[int] = []

    def slow(landing: Landing, batch: Batch, buffer: memoryview) -> None:
        entered.append(batch.raw_bytes)
        if len(entered) == 8:
            full.set()
        stuck.wait(30)
        take(landing, batch, buffer)

    monkeypatch.setattr(Landing, "take", slow)
    with ThreadPoolExecutor(2) as executor:
        received = executor.submit(receiver.run)
        sent = executor.submit(send, scene.send_job(receiver.port, batch_bytes=1 << 20))
        assert full.wait(30)
        assert not sent.done()
        stuck.wait(1.5)  # what could still come in comes in
        held = sum(stream.bytes_received for stream in receiver._streams.values())
        stuck.set()
        assert isinstance(sent.result(timeout=60), Sent)
        assert isinstance(received.result(timeout=60), Received)
    # 8 batches with the workers, 4 that wait, one in the hand of each stream, and the DMI.
    assert 8 << 20 < held < 16 << 20
    assert held < 0.6 * scene.data_bytes()
    scene.check_landed()


def test_D15_a_peer_that_trickles_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.transfer.stream._FRAME_S", 1.0)
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=64, pieces=4))
    receiver = Receiver(scene.receive_job())
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receiver.run)
        job = scene.send_job(receiver.port)
        raw = socket.create_connection(("127.0.0.1", receiver.port), timeout=5)
        stream = Stream.open(raw, tls.connecting(job.tls), peer=NAS2, server_side=False, limit_s=5, silence_limit_s=5)
        hello = Hello(1, job.transfer, "right", 0, 2, Differential.VERIFY, len(job.dmi_bytes), identity(job.dmi_bytes).hex())
        stream.send(frames.encode_hello(hello))
        assert stream.receive().type is FrameType.WELCOME
        begun = monotonic_s()
        with pytest.raises(LinkLost):
            trickle(stream, b"".join(map(bytes, frames.encode(FrameType.DMI, [scene.differential.raw]))), received)
        assert monotonic_s() - begun > 0.9
        assert monotonic_s() - begun < 8
        stream.close()
        assert isinstance(received.exception(timeout=10), LinkLost)


def trickle(stream: Stream, frame: bytes, received: Future[Received]) -> None:
    """Send a frame ten bytes a second until the other side has had enough."""
    for at in range(len(frame)):
        stream._send_all(memoryview(frame)[at : at + 1])
        with suppress(TimeoutError):
            received.exception(timeout=0.1)
            stream.receive()
