"""Speaking with an agent: answers, blobs, errors, silence; and the SSH door against a server made with paramiko."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import paramiko
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_SUCCEEDED

from agent.contract import messages as m
from agent.contract.errors import DmiMalformed, HostKeyChanged, LandfallError, NodeUnreachable, NoSuchTransfer, ProtocolViolated, by_code
from mgmt.inventory import NodeEntry
from mgmt.reach import COMMAND, Node, ssh_node
from tests.unit.mgmt_dmis import BASE, TARGET
from tests.unit.mgmt_fakes import FakeAgent, SocketStream

ANY = UUID(int=5)


def test_a_result_comes_back_as_its_dataclass_after_its_progress() -> None:
    steps = [m.Progress("compare", 1, 2), m.Progress("compare", 2, 2)]
    agent = FakeAgent("nas1", {m.BuildTransfer: lambda _: [*steps, m.Built(1, 2, 3, 4, "ab")]})
    heard: list[m.Progress] = []
    built = agent.node.ask(m.BuildTransfer(ANY, BASE, TARGET, (("db", 1),)), heard.append)
    assert built == m.Built(1, 2, 3, 4, "ab")
    assert heard == steps
    assert agent.asked == [m.BuildTransfer(ANY, BASE, TARGET, (("db", 1),))]


def test_an_error_comes_back_as_the_same_class_and_the_stream_is_used_again() -> None:
    def refuse(_: m.FetchDmi) -> bytes:
        raise NoSuchTransfer("never heard of it", cause="why", fix="so")

    agent = FakeAgent("nas2", {m.FetchDmi: refuse})
    node = agent.node
    with pytest.raises(NoSuchTransfer) as caught:
        node.fetch(m.FetchDmi(ANY))
    assert (caught.value.message, caught.value.cause, caught.value.fix_now) == ("never heard of it", "why", "so")
    assert node.ask(m.Hello()).node == "nas2"
    assert agent.opened == 1


def test_blobs_come_whole_and_the_next_answer_is_found_behind_them() -> None:
    blob = os.urandom(3 << 20) + b'{"id":2}\n'
    agent = FakeAgent("nas2", {m.FetchDmi: lambda _: blob, m.FetchArrival: lambda _: b""})
    node = agent.node
    heard: list[m.Progress] = []
    assert node.fetch(m.FetchDmi(ANY), heard.append) == blob
    assert heard[-1] == m.Progress("fetch", len(blob), len(blob))
    assert node.fetch(m.FetchArrival(ANY)) == b""
    assert node.ask(m.Hello()).node == "nas2"
    assert agent.opened == 1


def test_an_agent_that_dies_in_the_middle_is_unreachable_then_and_later_and_reachable_when_it_is_back() -> None:
    def die(_: m.ListVolumes) -> m.Volumes:
        raise EOFError

    agent = FakeAgent("nas1", {m.ListVolumes: die})
    node = agent.node
    with pytest.raises(NodeUnreachable, match="its last words"):
        node.ask(m.ListVolumes())
    with pytest.raises(NodeUnreachable):
        node.ask(m.Hello())
    agent.dead = False
    assert node.ask(m.Hello()).node == "nas1"


def test_silence_ends_in_unreachable() -> None:
    done = threading.Event()

    def wait(_: m.ListVolumes) -> m.Volumes:
        done.wait(5)
        return m.Volumes(())

    node = FakeAgent("nas1", {m.ListVolumes: wait}).node
    with pytest.raises(NodeUnreachable, match="silent"):
        node.ask(m.ListVolumes(), limit_s=0.05)
    done.set()


def answer_once(end: socket.socket, answer: bytes) -> None:
    end.recv(4096)
    with contextlib.suppress(OSError):
        end.sendall(answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"hello\n",
        b"[]\n",
        b'{"id": 2, "result": {}}\n',
        b'{"id": null, "result": {}}\n',
        b'{"id": 1, "result": {"node": "nas1"}}\n',
        b'{"id": 1, "result": {"node": 1, "release": "", "protocol": 1, "lab": true, "substrates": []}}\n',
        b'{"id": 1, "result": {}, "error": {}}\n',
        b'{"id": 1, "error": "no"}\n',
        b'{"id": 1, "progress": {"step": "x", "done": "1", "total": 2}}\n',
        b"[" * 100_000 + b"\n",
        b"x" * (m.MAX_LINE_BYTES + 70_000),
    ],
)
def test_G16_what_is_no_answer_is_refused(answer: bytes) -> None:
    ours, theirs = socket.socketpair()

    class Scripted:
        def open(self) -> SocketStream:
            return SocketStream(ours)

        def close(self) -> None:
            ours.close()

    threading.Thread(target=answer_once, args=(theirs, answer), daemon=True).start()
    with pytest.raises(ProtocolViolated):
        Node("nas1", Scripted()).ask(m.Hello(), limit_s=5)
    theirs.close()


def test_an_unreadable_request_is_answered_without_its_number() -> None:
    ours, theirs = socket.socketpair()

    class Scripted:
        def open(self) -> SocketStream:
            return SocketStream(ours)

        def close(self) -> None:
            ours.close()

    line = m.encode_line({"id": None, "error": DmiMalformed("no").to_wire()})
    threading.Thread(target=answer_once, args=(theirs, line), daemon=True).start()
    with pytest.raises(DmiMalformed):
        Node("nas1", Scripted()).ask(m.Hello(), limit_s=5)
    theirs.close()


def test_two_threads_get_a_stream_each() -> None:
    both = threading.Barrier(2, timeout=5)

    def together(_: m.ListVolumes) -> m.Volumes:
        both.wait()
        return m.Volumes(())

    agent = FakeAgent("nas1", {m.ListVolumes: together})
    node = agent.node
    threads = [threading.Thread(target=lambda: node.ask(m.ListVolumes())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert agent.opened == 2
    assert node.ask(m.Hello()).node == "nas1"
    assert agent.opened == 2


class SshServer(paramiko.ServerInterface):
    """An SSH server on the loopback that takes one key and one command, and answers hello."""

    def __init__(self, allowed: paramiko.PKey, host_key: paramiko.PKey) -> None:
        self._allowed = allowed
        self._host_key = host_key
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.commands: list[bytes] = []
        self._transports: list[paramiko.Transport] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return AUTH_SUCCESSFUL if key.asbytes() == self._allowed.asbytes() else AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self.commands.append(command)
        threading.Thread(target=self._converse, args=(channel,), daemon=True).start()
        return True

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept
        self._listener.close()
        for transport in self._transports:
            transport.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.add_server_key(self._host_key)
            self._transports.append(transport)
            try:
                transport.start_server(server=self)
            except (paramiko.SSHException, EOFError, OSError):
                transport.close()

    def _converse(self, channel: paramiko.Channel) -> None:
        with channel.makefile("rb") as lines:
            for line in lines:
                request = m.decode_line(line)
                if request["verb"] == "volume.list":
                    channel.sendall_stderr(b"the agent does not run")
                    channel.close()
                    return
                result = m.to_document(m.NodeFacts("nas1", "0", m.PROTOCOL, True, ()))
                channel.sendall(m.encode_line({"id": request["id"], "result": result}))


@dataclasses.dataclass
class Enrolled:
    server: SshServer
    entry: NodeEntry


def new_key(path: Path) -> paramiko.PKey:
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    return paramiko.PKey.from_path(path)


def line_of(key: paramiko.PKey) -> str:
    return f"{key.get_name()} {key.get_base64()}"


@pytest.fixture
def enrolled(tmp_path: Path) -> Iterator[Enrolled]:
    own, host = new_key(tmp_path / "own"), new_key(tmp_path / "host")
    server = SshServer(own, host)
    yield Enrolled(server, NodeEntry("nas1", "127.0.0.1", tmp_path / "own", line_of(host), server.port))
    with contextlib.suppress(OSError):
        server.close()


def test_J11_one_fixed_command_and_everything_else_on_its_input(enrolled: Enrolled) -> None:
    node = ssh_node(enrolled.entry)
    assert node.ask(m.Hello()).node == "nas1"
    assert node.ask(m.Hello()).node == "nas1"
    assert enrolled.server.commands == [COMMAND.encode()]
    node.close()


def test_J1_another_host_key_is_refused(enrolled: Enrolled, tmp_path: Path) -> None:
    entry = dataclasses.replace(enrolled.entry, host_key=line_of(new_key(tmp_path / "other")))
    with pytest.raises(HostKeyChanged):
        ssh_node(entry).ask(m.Hello())
    assert enrolled.server.commands == []


def test_J2_a_host_key_of_another_type_is_refused(enrolled: Enrolled) -> None:
    rsa = paramiko.RSAKey.generate(2048)
    with pytest.raises((HostKeyChanged, NodeUnreachable)):
        ssh_node(dataclasses.replace(enrolled.entry, host_key=line_of(rsa))).ask(m.Hello())
    assert enrolled.server.commands == []


def test_a_key_that_the_node_does_not_take_is_unreachable(enrolled: Enrolled, tmp_path: Path) -> None:
    new_key(tmp_path / "stranger")
    with pytest.raises(NodeUnreachable, match="does not take our SSH key"):
        ssh_node(dataclasses.replace(enrolled.entry, ssh_key=tmp_path / "stranger")).ask(m.Hello())


def test_nobody_listening_is_unreachable(enrolled: Enrolled) -> None:
    enrolled.server.close()
    with pytest.raises(NodeUnreachable, match="cannot be reached"):
        ssh_node(enrolled.entry, connect_limit_s=2).ask(m.Hello())


def test_the_words_beside_the_stream_are_the_cause(enrolled: Enrolled) -> None:
    node = ssh_node(enrolled.entry)
    with pytest.raises(NodeUnreachable, match="the agent does not run"):
        node.ask(m.ListVolumes())
    node.close()


def test_every_error_class_survives_the_way() -> None:
    for kind in by_code().values():

        def fail(_: m.ListVolumes, kind: type[LandfallError] = kind) -> m.Volumes:
            raise kind("sentence")

        with pytest.raises(kind) as caught:
            FakeAgent("nas1", {m.ListVolumes: fail}).node.ask(m.ListVolumes())
        assert type(caught.value) is kind
