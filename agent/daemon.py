"""The agent daemon: listens on a Unix socket, answers requests, one thread per connection, and goes on when the management node goes away.

A connection that ends does not end what it asked for. Each answer is one line (or a line and a blob); a request that fails answers with the
error as its class says it, and the connection goes on.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import threading
from pathlib import Path
from typing import Any

from agent.config import Config
from agent.contract.errors import DeviceFailed, LandfallError, NotOurs, RequestRefused, VersionUnknown
from agent.contract.messages import (
    LOOKING,
    MAX_LINE_BYTES,
    PROTOCOL,
    VERBS,
    Blob,
    Progress,
    decode_line,
    encode_line,
    from_document,
    to_document,
)
from agent.service import Service
from agent.system.files import lock_for_life

log = logging.getLogger("landfall.agent")


def serve(config: Config) -> None:
    """Run the daemon until SIGTERM or SIGINT; DeviceBusy if another agent works on this node's state."""
    alone = lock_for_life(config.state_dir / "lock")
    service = Service(config)
    service.recover()
    listener = _listen(config.socket)
    stopping = threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        listener.close()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log.info("landfall-agent of node %s listens on %s", config.node, config.socket)
    while not stopping.is_set():
        try:
            connection, _ = listener.accept()
        except OSError:
            break
        threading.Thread(target=_converse, args=(service, connection), name="connection", daemon=True).start()
    service.close()
    os.close(alone)


def _listen(path: Path) -> socket.socket:
    """Return the listening socket; its folder must be ours alone, since whoever reaches the socket commands the node."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = path.parent.stat()
    if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o022:
        raise NotOurs(f"{path.parent} can be written by others", fix="Give it to root with mode 0700.")
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(64)
    return listener


def _converse(service: Service, connection: socket.socket) -> None:
    """Answer the requests of one connection until it ends."""
    with connection, connection.makefile("rb") as reader:
        while line := reader.readline(MAX_LINE_BYTES + 1):
            number: Any = None
            try:
                request = decode_line(line) if line.endswith(b"\n") else _refuse_long(line)
                number = request.get("id")
                document, blob = _answer(service, connection, number, request)
                connection.sendall(encode_line({"id": number, "result": document}) + blob)
            except LandfallError as error:
                log.warning("%s", error, exc_info=type(error) is LandfallError)
                if not _say(connection, {"id": number, "error": error.to_wire()}):
                    return
            except OSError as error:
                log.info("a connection ended: %s", error)
                return
            except Exception as error:
                log.exception("a request failed in a way nobody foresaw")
                wrapped = LandfallError("the agent failed in a way nobody foresaw", cause=f"{type(error).__name__}: {error}")
                if not _say(connection, {"id": number, "error": wrapped.to_wire()}):
                    return


def _answer(service: Service, connection: socket.socket, number: Any, request: dict[str, Any]) -> tuple[Any, bytes]:
    """Return the result document and the blob that follows it."""
    if set(request) != {"v", "id", "verb", "args", "term"}:
        raise RequestRefused("a request has the keys v, id, verb, args and term")
    if request["v"] != PROTOCOL:
        raise VersionUnknown(f"the request speaks protocol {request['v']!r}, this agent {PROTOCOL}")
    verb = VERBS.get(request["verb"]) if isinstance(request["verb"], str) else None
    if verb is None:
        raise RequestRefused(f"there is no verb {request['verb']!r}")
    arguments = from_document(request["args"], verb[0])
    service.admit(request["term"], looking=request["verb"] in LOOKING)
    heard = True

    def progress(step: str, done: int, total: int) -> None:
        nonlocal heard  # a management node that went away is not told any more, and nothing stops for it
        heard = heard and _say(connection, {"id": number, "progress": to_document(Progress(step, done, total))})

    try:
        result = service.handle(arguments, progress)
    except OSError as error:  # ours, not the connection's: whoever asked is told
        raise DeviceFailed(f"{request['verb']} failed on a disk of this node", cause=str(error), fix="Look at dmesg.") from error
    if isinstance(result, bytes):
        return to_document(Blob(len(result))), result
    return to_document(result), b""


def _refuse_long(line: bytes) -> dict[str, Any]:
    raise RequestRefused(f"a request of more than {MAX_LINE_BYTES} bytes, or cut short", cause=f"{len(line)} bytes")


def _say(connection: socket.socket, document: Any) -> bool:
    try:
        connection.sendall(encode_line(document))
    except OSError:
        return False
    return True
