"""Reaching an agent: SSH to its node with a pinned host key, JSON lines to the agent behind the forced command.

All of paramiko's exceptions end here. A node is NodeUnreachable, or shows another key than the pinned one (HostKeyChanged); what
the agent itself answers as an error is raised as the same class. Nothing is asked twice: whether a request took effect before its
connection broke is for the caller to find out.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar, overload

import paramiko
from paramiko.hostkeys import HostKeyEntry

from agent.contract import messages as m
from agent.contract.errors import ConfigInvalid, HostKeyChanged, LandfallError, NodeUnreachable, ProtocolViolated
from mgmt.inventory import NodeEntry

COMMAND = "landfall-agent connect"
KEEPALIVE_S = 5
GONE_AFTER_MS = 15_000
WINDOW_BYTES = 16 << 20
MAX_BLOB_BYTES = 8 << 30

OnProgress = Callable[[m.Progress], None]
R = TypeVar("R")


class Stream(Protocol):
    """Bytes to and from an agent. Every method raises OSError when the way is broken; TimeoutError when nothing came."""

    def send(self, data: bytes) -> None:
        """Send all of ``data``."""

    def receive(self, most: int, limit_s: float) -> bytes:
        """Return at least one byte, or none at the end."""

    def alive(self) -> bool:
        """Whether the other end is, as far as known, still there."""

    def last_words(self) -> str:
        """What the other end said beside the stream before it ended."""

    def close(self) -> None:
        """End it; never raises."""


class Door(Protocol):
    """How a node is reached: opens streams to its agent."""

    def open(self) -> Stream:
        """Return a new stream; NodeUnreachable or HostKeyChanged."""

    def close(self) -> None:
        """Close the way and every stream."""


class Node:
    """One node's agent. May be used by several threads: each request has a stream of its own, and streams are used again."""

    def __init__(self, name: str, door: Door, *, answer_limit_s: float = 600.0, term: int = 0) -> None:
        """``term`` is that of the management node; one of 0 was never in charge and may only look."""
        self.name = name
        self.term = term
        self._door = door
        self._answer_limit_s = answer_limit_s
        self._idle: list[_Conversation] = []
        self._lock = threading.Lock()

    @overload
    def ask(self, arguments: m.Hello, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.NodeFacts: ...
    @overload
    def ask(self, arguments: m.AskHealth, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Health: ...
    @overload
    def ask(self, arguments: m.TryPath, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.PathTried: ...
    @overload
    def ask(self, arguments: m.ListDevices, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Devices: ...
    @overload
    def ask(
        self,
        arguments: m.CreateVolume | m.AdoptVolume | m.GrowVolume | m.AdmitReplica | m.PromoteVolume | m.ServeVolume | m.StopServing,
        on_progress: OnProgress | None = ...,
        *,
        limit_s: float | None = ...,
    ) -> m.VolumeFacts: ...
    @overload
    def ask(self, arguments: m.AppraiseVolume, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Appraised: ...
    @overload
    def ask(self, arguments: m.ListVolumes, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Volumes: ...
    @overload
    def ask(self, arguments: m.TakeGeneration, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Taken: ...
    @overload
    def ask(self, arguments: m.TakeTogether, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.TakenTogether: ...
    @overload
    def ask(self, arguments: m.OpenGeneration, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Opened: ...
    @overload
    def ask(self, arguments: m.ExamineGeneration, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Examined: ...
    @overload
    def ask(
        self, arguments: m.RestoreFiles | m.SendFiles, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...
    ) -> m.Restored: ...
    @overload
    def ask(self, arguments: m.FindOwners, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Owners: ...
    @overload
    def ask(
        self, arguments: m.BuildTransfer | m.BuildMend, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...
    ) -> m.Built: ...
    @overload
    def ask(
        self,
        arguments: m.ReceiveTransfer | m.ReceiveFiles | m.OpenPath,
        on_progress: OnProgress | None = ...,
        *,
        limit_s: float | None = ...,
    ) -> m.Listening: ...
    @overload
    def ask(self, arguments: m.SendTransfer, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Sent: ...
    @overload
    def ask(self, arguments: m.ListTransfers, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Transfers: ...
    @overload
    def ask(self, arguments: m.UpdateInstruction, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Salvaged: ...
    @overload
    def ask(self, arguments: m.DemoteVolume, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Demoted: ...
    @overload
    def ask(self, arguments: m.RenewLease, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Lease: ...
    @overload
    def ask(self, arguments: m.ProbePeer, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Probed: ...
    @overload
    def ask(self, arguments: m.ReadOutbox, on_progress: OnProgress | None = ..., *, limit_s: float | None = ...) -> m.Outbox: ...
    @overload
    def ask(
        self,
        arguments: m.RemoveVolume
        | m.DropGeneration
        | m.CloseGeneration
        | m.DiscardTransfer
        | m.UndoSalvage
        | m.AcknowledgeOutbox
        | m.TakeAddress
        | m.DropAddress,
        on_progress: OnProgress | None = ...,
        *,
        limit_s: float | None = ...,
    ) -> m.Done: ...

    def ask(self, arguments: Any, on_progress: OnProgress | None = None, *, limit_s: float | None = None) -> Any:
        """Return the agent's result. ``limit_s`` bounds the silence between two of its words.

        Raises what the agent answered as its error, NodeUnreachable when the connection or the agent went away meanwhile,
        ProtocolViolated when what came is no answer.
        """
        with self._conversation() as conversation:
            return conversation.ask(arguments, on_progress, limit_s or self._answer_limit_s, self.term)

    def fetch(self, arguments: m.FetchDmi | m.FetchArrival | m.FetchDigests, on_progress: OnProgress | None = None) -> bytes:
        """Return the blob that the agent answers; ``on_progress`` hears of its bytes."""
        with self._conversation() as conversation:
            answer: m.Blob = conversation.ask(arguments, on_progress, self._answer_limit_s, self.term)
            return conversation.blob(answer.blob_bytes, on_progress, self._answer_limit_s)

    def close(self) -> None:
        """Close the way to the node."""
        with self._lock:
            idle, self._idle = self._idle, []
        for conversation in idle:
            conversation.close()
        self._door.close()

    @contextmanager
    def _conversation(self) -> Iterator[_Conversation]:
        """Lend a conversation; it is used again only if it was left in good order."""
        conversation = self._take_idle() or _Conversation(self.name, self._door.open())
        try:
            yield conversation
        except LandfallError:
            if not conversation.in_order:
                conversation.close()
            raise
        except BaseException:
            conversation.in_order = False
            conversation.close()
            raise
        finally:
            if conversation.in_order:
                with self._lock:
                    self._idle.append(conversation)

    def _take_idle(self) -> _Conversation | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                conversation = self._idle.pop()
            if conversation.alive():
                return conversation
            conversation.close()


class _Conversation:
    """Requests and answers on one stream, one at a time."""

    def __init__(self, name: str, stream: Stream) -> None:
        self._name = name
        self._stream = stream
        self._buffer = bytearray()
        self._number = 0
        self.in_order = True

    def alive(self) -> bool:
        return self._stream.alive()

    def close(self) -> None:
        self._stream.close()

    def ask(self, arguments: Any, on_progress: OnProgress | None, limit_s: float, term: int) -> Any:
        verb = m.VERB_OF[type(arguments)]
        self._number += 1
        request = {"v": m.PROTOCOL, "id": self._number, "verb": verb, "args": m.to_document(arguments), "term": term}
        self.in_order = False
        with self._unreachable(verb):
            self._stream.send(m.encode_line(request))
        while True:
            answer = self._answer(verb, limit_s)
            if "progress" in answer:
                progress = self._typed(answer["progress"], m.Progress)
                if on_progress is not None:
                    on_progress(progress)
                continue
            # An error ends the answer too: the next request may follow on the same stream.
            if "error" in answer:
                self.in_order = True
                raise self._raised(answer["error"])
            result = self._typed(answer["result"], m.VERBS[verb][1])
            self.in_order = not isinstance(result, m.Blob)
            return result

    def blob(self, size: int, on_progress: OnProgress | None, limit_s: float) -> bytes:
        if not 0 <= size <= MAX_BLOB_BYTES:
            raise ProtocolViolated(f"{self._name} announces {size} bytes")
        whole = bytearray(self._buffer[:size])
        del self._buffer[:size]
        while len(whole) < size:
            whole += self._more("a blob", min(size - len(whole), 1 << 20), limit_s)
            if on_progress is not None:
                on_progress(m.Progress("fetch", len(whole), size))
        self.in_order = True
        return bytes(whole)

    def _answer(self, verb: str, limit_s: float) -> dict[str, Any]:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            if len(self._buffer) > m.MAX_LINE_BYTES:
                raise ProtocolViolated(f"{self._name} answers a line without an end")
            searched = len(self._buffer)
            self._buffer += self._more(verb, 1 << 16, limit_s)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProtocolViolated(f"{self._name} answers no JSON", cause=str(error)) from error
        if not isinstance(answer, dict) or set(answer) not in ({"id", "progress"}, {"id", "result"}, {"id", "error"}):
            raise ProtocolViolated(f"{self._name} answers neither progress nor result nor error")
        # An agent that could not read the request does not know its number either.
        if answer["id"] != self._number and not (answer["id"] is None and "error" in answer):
            raise ProtocolViolated(f"{self._name} answers request {answer['id']!r}, not {self._number}")
        return answer

    def _more(self, what: str, most: int, limit_s: float) -> bytes:
        with self._unreachable(what):
            data = self._stream.receive(most, limit_s)
        if not data:
            raise NodeUnreachable(f"the agent on {self._name} went away during {what}", cause=self._stream.last_words())
        return data

    def _typed(self, document: Any, kind: type[R]) -> R:
        try:
            return m.from_document(document, kind)
        except LandfallError as error:
            raise ProtocolViolated(f"{self._name} answers no {kind.__name__}", cause=error.cause) from error

    def _raised(self, document: Any) -> LandfallError:
        if not isinstance(document, dict):
            return ProtocolViolated(f"{self._name} answers an error that is none")
        error = LandfallError.from_wire(document)
        error.add_note(f"answered by the agent on {self._name}")
        return error

    @contextmanager
    def _unreachable(self, what: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise NodeUnreachable(f"the agent on {self._name} fell silent during {what}") from error
        except OSError as error:
            raise NodeUnreachable(f"the connection to {self._name} broke during {what}", cause=str(error)) from error


def knock(address: str, port: int, limit_s: float) -> bool:
    """Whether a machine answers there: a connection that is refused is refused by somebody."""
    try:
        socket.create_connection((address, port), limit_s).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def ssh_node(entry: NodeEntry, *, connect_limit_s: float = 10.0, answer_limit_s: float = 600.0, term: int = 0) -> Node:
    """Return the agent of a node, reached over SSH when it is first asked something."""
    return Node(entry.name, _SshDoor(entry, connect_limit_s), answer_limit_s=answer_limit_s, term=term)


class _Pinned(paramiko.RejectPolicy):
    """Rejects, as its parent does, a host that shows a key of another type than the pinned one."""

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> NoReturn:
        raise HostKeyChanged(f"{hostname} shows a host key that is not pinned", cause=f"{key.get_name()} {key.fingerprint}")


class _SshDoor:
    """One SSH connection to a node, made when needed and again after it broke; a channel per stream."""

    def __init__(self, entry: NodeEntry, connect_limit_s: float) -> None:
        self._entry = entry
        self._limit_s = connect_limit_s
        self._client: paramiko.SSHClient | None = None
        self._lock = threading.Lock()

    def open(self) -> Stream:
        with self._lock:
            client = self._connected()
        transport = client.get_transport()
        try:
            if transport is None:
                raise paramiko.SSHException("the connection is closed")
            channel = transport.open_session(window_size=WINDOW_BYTES, timeout=self._limit_s)
            channel.exec_command(COMMAND)
        except (paramiko.SSHException, OSError, EOFError) as error:
            self.close()
            raise NodeUnreachable(f"{self._entry.name} takes no command over SSH", cause=str(error)) from error
        return _SshStream(channel)

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connected(self) -> paramiko.SSHClient:
        if self._client is not None:
            transport = self._client.get_transport()
            if transport is not None and transport.is_active():
                return self._client
            self._client.close()
            self._client = None
        self._client = self._connect()
        return self._client

    def _connect(self) -> paramiko.SSHClient:
        entry, name = self._entry, self._entry.name
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(_Pinned())
        host = entry.address if entry.ssh_port == 22 else f"[{entry.address}]:{entry.ssh_port}"
        pinned = _pinned_key(entry, host)
        client.get_host_keys().add(host, pinned.get_name(), pinned)
        connection: socket.socket | None = None
        try:
            connection = socket.create_connection((entry.address, entry.ssh_port), timeout=self._limit_s)
            # A node whose plug was pulled sends nothing: without this the kernel would go on for a quarter of an hour.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_AFTER_MS)
            client.connect(
                entry.address,
                entry.ssh_port,
                entry.ssh_user,
                pkey=_own_key(entry),
                sock=connection,
                timeout=self._limit_s,
                banner_timeout=self._limit_s,
                auth_timeout=self._limit_s,
                allow_agent=False,
                look_for_keys=False,
            )
        except paramiko.BadHostKeyException as error:
            _abandon(client, connection)
            shown = f"{error.key.get_name()} {error.key.fingerprint}, pinned {pinned.get_name()} {pinned.fingerprint}"
            raise HostKeyChanged(f"{name} shows another host key", cause=shown) from error
        except paramiko.AuthenticationException as error:
            _abandon(client, connection)
            fix = f"Put the public half of {entry.ssh_key.name} into the node's authorized_keys, with the forced command."
            raise NodeUnreachable(f"{name} does not take our SSH key", cause=str(error), fix=fix) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            _abandon(client, connection)
            raise NodeUnreachable(f"{name} cannot be reached at {entry.address} port {entry.ssh_port}", cause=str(error)) from error
        except BaseException:
            _abandon(client, connection)
            raise
        transport = client.get_transport()
        if transport is not None:
            transport.set_keepalive(KEEPALIVE_S)
        return client


class _SshStream:
    """One channel of an SSH connection."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel

    def send(self, data: bytes) -> None:
        self._channel.settimeout(60.0)
        try:
            self._channel.sendall(data)
        except paramiko.SSHException as error:
            raise OSError(str(error)) from error

    def receive(self, most: int, limit_s: float) -> bytes:
        self._channel.settimeout(limit_s)
        try:
            return self._channel.recv(most)
        except (paramiko.SSHException, EOFError) as error:
            raise OSError(str(error)) from error

    def alive(self) -> bool:
        transport = self._channel.get_transport()
        return not (self._channel.closed or self._channel.eof_received) and transport is not None and transport.is_active()

    def last_words(self) -> str:
        self._channel.settimeout(2.0)
        with contextlib.suppress(OSError, paramiko.SSHException, EOFError):
            return self._channel.recv_stderr(4096).decode("utf-8", "replace").strip()
        return ""

    def close(self) -> None:
        with contextlib.suppress(OSError, paramiko.SSHException, EOFError):
            self._channel.close()


def _pinned_key(entry: NodeEntry, host: str) -> paramiko.PKey:
    found = HostKeyEntry.from_line(f"{host} {entry.host_key}")
    if found is None or found.key is None:
        raise ConfigInvalid(f"the host_key of node {entry.name} is no key")
    return found.key


def _own_key(entry: NodeEntry) -> paramiko.PKey:
    try:
        return paramiko.PKey.from_path(entry.ssh_key)
    except (OSError, ValueError, paramiko.SSHException) as error:
        raise ConfigInvalid(f"the ssh_key of node {entry.name} cannot be used", cause=str(error)) from error


def _abandon(client: paramiko.SSHClient, connection: socket.socket | None) -> None:
    client.close()
    if connection is not None:
        connection.close()
