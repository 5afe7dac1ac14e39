"""Who may connect: the peer's certificate, its authority, its name, its use, its time; then the token, once."""

import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from agent.contract import frames
from agent.contract.columns import identity
from agent.contract.errors import LandfallError, LinkLost, PeerRefused, ProtocolViolated
from agent.contract.frames import FrameType, Hello
from agent.contract.messages import Differential, Sent, TlsMaterial
from agent.transfer import tls
from agent.transfer.receiver import Received, Receiver
from agent.transfer.sender import send
from agent.transfer.stream import Stream
from tests.transfer_scene import NAS1, NAS2, Authority, Scene, make_differential, transfer_threads


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, make_differential(tmp_path, blocks=64, pieces=4), patience_s=0.5)


def certificates_that_are_not_the_sources(scene: Scene) -> dict[str, TlsMaterial]:
    stranger = Authority()
    return {
        "J3 expired": scene.authority.material(NAS1, NAS2, begins_days=-3, ends_days=-1),
        "J3 not yet valid": scene.authority.material(NAS1, NAS2, begins_days=2, ends_days=3),
        "J4 another authority": stranger.material(NAS1, NAS2, authority_pem=scene.authority.pem),
        "J4 another node": scene.authority.material("landfall://nas9/source", NAS2, usage=ExtendedKeyUsageOID.CLIENT_AUTH),
        "J4 no name": scene.authority.material("", NAS2, usage=ExtendedKeyUsageOID.CLIENT_AUTH),
        "J4 a server's": scene.authority.material(NAS1, NAS2, usage=ExtendedKeyUsageOID.SERVER_AUTH),
    }


@pytest.mark.parametrize(
    "which", ["J3 expired", "J3 not yet valid", "J4 another authority", "J4 another node", "J4 no name", "J4 a server's"]
)
def test_J3_J4_a_source_that_is_not_the_one_ordered_is_refused(scene: Scene, which: str) -> None:
    material = certificates_that_are_not_the_sources(scene)[which]
    sent, received = scene.transfer(sending={"tls": material})
    assert isinstance(sent, PeerRefused | LinkLost), sent
    assert isinstance(received, LinkLost), received
    assert not scene.store.has_dmi(scene.differential.dmi.head.transfer)
    assert scene.committed == 0
    assert transfer_threads() == []


@pytest.mark.parametrize(
    ("node", "usage"),
    [
        ("landfall://nas9/target", ExtendedKeyUsageOID.SERVER_AUTH),
        (NAS2, ExtendedKeyUsageOID.CLIENT_AUTH),
    ],
)
def test_D14_a_target_that_is_not_the_one_ordered_is_told_nothing(scene: Scene, node: str, usage: Any) -> None:
    sent, received = scene.transfer(receiving={"tls": scene.authority.material(node, NAS1, usage=usage)})
    assert isinstance(sent, PeerRefused), sent
    assert isinstance(received, LinkLost), received


def test_a_wrong_token_is_refused_and_the_right_one_still_works(scene: Scene) -> None:
    receiver = Receiver(scene.receive_job())
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receiver.run)
        with pytest.raises(PeerRefused, match="token"):
            send(scene.send_job(receiver.port, token="wrong"))
        assert isinstance(send(scene.send_job(receiver.port)), Sent)
        assert len(received.result(timeout=10).refused) == 1
    scene.check_landed()


def greet(scene: Scene, port: int, **changes: Any) -> Stream:
    """Connect as the source does and greet; the stream is the caller's."""
    job = scene.send_job(port)
    raw = socket.create_connection(("127.0.0.1", port), timeout=5)
    stream = Stream.open(raw, tls.connecting(job.tls), peer=NAS2, server_side=False, limit_s=5, silence_limit_s=5)
    hello = Hello(1, job.transfer, "right", 0, 2, Differential.VERIFY, len(job.dmi_bytes), identity(job.dmi_bytes).hex())
    stream.send(frames.encode_hello(replace(hello, **changes)))
    return stream


def refusal(stream: Stream) -> LandfallError:
    frame = stream.receive(5)
    assert frame.type is FrameType.ERROR
    stream.close()
    return frames.decode_error(frame.payload)


def test_J9_a_token_is_good_for_each_stream_once(scene: Scene) -> None:
    receiver = Receiver(scene.receive_job())
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receiver.run)
        first = greet(scene, receiver.port)
        assert first.receive().type is FrameType.WELCOME
        assert isinstance(refusal(greet(scene, receiver.port)), PeerRefused)
        assert isinstance(refusal(greet(scene, receiver.port, stream=1)), ProtocolViolated)  # before the DMI
        first.close()
        assert isinstance(received.exception(timeout=10), LinkLost)
    # The port is closed with the transfer: nothing is left that would take the token again.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", receiver.port), timeout=5)


@pytest.mark.parametrize("changes", [{"streams": 3}, {"differential": Differential.SEND}, {"transfer": UUID(int=9)}], ids=str)
def test_J8_a_peer_with_other_orders_is_refused(scene: Scene, changes: dict[str, Any]) -> None:
    receiver = Receiver(scene.receive_job())
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receiver.run)
        assert isinstance(refusal(greet(scene, receiver.port, **changes)), PeerRefused | ProtocolViolated)
        receiver.cancel()
        assert isinstance(received.exception(timeout=10), LinkLost)


def test_G8_a_dmi_announced_larger_than_is_taken_is_refused_at_once(scene: Scene) -> None:
    receiver = Receiver(scene.receive_job(max_dmi_bytes=1 << 20))
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receiver.run)
        stream = greet(scene, receiver.port, dmi_bytes=2**62)
        assert stream.receive().type is FrameType.WELCOME
        assert isinstance(refusal(stream), ProtocolViolated)
        assert isinstance(received.exception(timeout=10), ProtocolViolated)


def test_G22_a_finish_before_everything_came_is_refused(scene: Scene) -> None:
    receiver = Receiver(scene.receive_job())
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receiver.run)
        stream = greet(scene, receiver.port)
        assert stream.receive().type is FrameType.WELCOME
        stream.send(frames.encode(FrameType.DMI, [scene.differential.raw]))
        assert [stream.receive().type for _ in range(3)] == [FrameType.DMI_STORED, FrameType.STATE, FrameType.PROGRESS]
        stream.send(frames.encode(FrameType.FINISH))
        assert isinstance(refusal(stream), ProtocolViolated)
        assert isinstance(received.exception(timeout=10), ProtocolViolated)
    assert scene.committed == 0


@pytest.mark.parametrize("cut", [1, 100, 1000, -1])
def test_A4_part_of_a_dmi_is_never_kept(scene: Scene, cut: int) -> None:
    receiver = Receiver(scene.receive_job())
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receiver.run)
        stream = greet(scene, receiver.port)
        assert stream.receive().type is FrameType.WELCOME
        stream.send(frames.encode(FrameType.DMI, [scene.differential.raw[:cut]]))
        stream.close()
        assert isinstance(received.exception(timeout=10), LinkLost)
    folder = scene.store.folder(scene.differential.dmi.head.transfer)
    assert sorted(path.name for path in folder.iterdir()) == ["transfer.json"]


@pytest.mark.parametrize("what", ["plain text", "an older TLS", "no certificate", "silence", "a flood"])
def test_J6_J7_D15_strangers_are_turned_away_before_a_frame_is_read(scene: Scene, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "decode_head", lambda _: pytest.fail("a stranger's bytes reached the parser"))
    receiver = Receiver(scene.receive_job(handshake_limit_s=1.0))
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receiver.run)
        with socket.create_connection(("127.0.0.1", receiver.port), timeout=5) as raw:
            misbehave(raw, what, scene)
        monkeypatch.undo()
        # The source is not kept out by it.
        assert isinstance(send(scene.send_job(receiver.port)), Sent)
        result = received.result(timeout=10)
    assert isinstance(result, Received)
    assert len(result.refused) == 1


def misbehave(raw: socket.socket, what: str, scene: Scene) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=scene.authority.pem)
    with suppress(OSError):
        match what:
            case "plain text":
                raw.sendall(b"GET / HTTP/1.0\r\n\r\n")
            case "an older TLS":
                context.maximum_version = ssl.TLSVersion.TLSv1_2
                context.wrap_socket(raw)
            case "no certificate":
                context.wrap_socket(raw).recv(1)
            case "a flood":
                for _ in range(1000):
                    raw.sendall(bytes(1 << 20))
            case _:
                pass
        # Turned away: the other side closes, within its handshake limit.
        while raw.recv(4096):
            pass


def test_no_more_connections_than_streams_and_a_few_are_in_their_handshake_at_once(scene: Scene) -> None:
    receiver = Receiver(scene.receive_job(handshake_limit_s=30.0))
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receiver.run)
        silent = [socket.create_connection(("127.0.0.1", receiver.port), timeout=5) for _ in range(6)]
        with socket.create_connection(("127.0.0.1", receiver.port), timeout=5) as one_more:
            assert one_more.recv(1) == b""
        assert sum(thread.name == "admit" for thread in threading.enumerate()) == 6
        receiver.cancel()
        assert isinstance(received.exception(timeout=10), LinkLost)
        for raw in silent:
            raw.close()
    assert transfer_threads() == []


def test_J13_the_key_is_in_no_text(scene: Scene) -> None:
    material = scene.authority.material(NAS1, NAS2)
    assert material.key_pem not in repr(material)
    broken = replace(material, key_pem=material.key_pem.replace("MIG", "SECRET"))
    with pytest.raises(PeerRefused) as caught:
        tls.connecting(broken)
    assert "SECRET" not in f"{caught.value} {caught.value.__cause__}"
