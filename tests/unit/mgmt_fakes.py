"""A node without a machine: an agent that answers by script, behind a pair of sockets in memory."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

from agent.contract import messages as m
from agent.contract.errors import LandfallError, NodeUnreachable, RequestRefused
from mgmt.reach import Node, Stream

Handler = Callable[[Any], Any]


class SocketStream:
    """A Stream over a socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self.closed = False

    def send(self, data: bytes) -> None:
        self._end.sendall(data)

    def receive(self, most: int, limit_s: float) -> bytes:
        self._end.settimeout(limit_s)
        return self._end.recv(most)

    def alive(self) -> bool:
        return not self.closed

    def last_words(self) -> str:
        return "its last words"

    def close(self) -> None:
        self.closed = True
        self._end.close()


class FakeAgent:
    """Answers each kind of arguments by its handler and remembers what it was asked.

    A handler returns the result, or a list of Progress lines with the result (or bytes: a blob) last; it raises the error to answer. While
    ``dead``, the node cannot be reached; a handler that raises EOFError makes the agent die in the middle of the request.
    """

    def __init__(self, name: str, handlers: dict[type[Any], Handler] | None = None) -> None:
        self.name = name
        self.handlers: dict[type[Any], Handler] = {
            m.Hello: lambda _: m.NodeFacts(name, "0", m.PROTOCOL, True, ("reflink",), self.term),
            **(handlers or {}),
        }
        self.asked: list[Any] = []
        self.dead = False
        self.term = 0
        self.opened = 0
        self._ends: list[socket.socket] = []

    @property
    def node(self) -> Node:
        """The node as the management node has it."""
        return Node(self.name, self, answer_limit_s=5)

    def said(self, kind: type[Any]) -> list[Any]:
        """Return what was asked of this kind."""
        return [arguments for arguments in self.asked if isinstance(arguments, kind)]

    def open(self) -> Stream:
        if self.dead:
            raise NodeUnreachable(f"{self.name} cannot be reached")
        ours, theirs = socket.socketpair()
        self.opened += 1
        self._ends.append(ours)
        threading.Thread(target=self._serve, args=(theirs,), daemon=True).start()
        return SocketStream(ours)

    def close(self) -> None:
        for end in self._ends:
            end.close()

    def _handler(self, kind: type[Any]) -> Handler:
        """Return what answers such a request; without one, it is answered as by an agent that does not know the verb."""

        def refuse(_: Any) -> None:
            raise RequestRefused(f"there is no verb {m.VERB_OF[kind]}")

        return self.handlers.get(kind, refuse)

    def _serve(self, end: socket.socket) -> None:
        with end, end.makefile("rb") as lines:
            for line in lines:
                request = json.loads(line)
                self.term = max(self.term, request["term"])
                arguments = m.from_document(request["args"], m.VERBS[request["verb"]][0])
                self.asked.append(arguments)
                try:
                    said = self._handler(type(arguments))(arguments)
                except EOFError:
                    self.dead = True
                    return
                except LandfallError as error:
                    end.sendall(m.encode_line({"id": request["id"], "error": error.to_wire()}))
                    continue
                for step in said[:-1] if isinstance(said, list) else []:
                    end.sendall(m.encode_line({"id": request["id"], "progress": m.to_document(step)}))
                result = said[-1] if isinstance(said, list) else said
                blob = result if isinstance(result, bytes) else b""
                document = m.to_document(m.Blob(len(blob)) if isinstance(result, bytes) else result)
                with contextlib.suppress(BrokenPipeError):  # the asker may have gone
                    end.sendall(m.encode_line({"id": request["id"], "result": document}) + blob)
