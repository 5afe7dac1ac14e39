"""Asking a node's first process for something, over its control socket."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from agent.contract.errors import LabMissing
from mgmt.lab.layout import Lab, NodeName

ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One service of a node: its pid as the node counts, None while it does not run; how it ended last."""

    name: str
    pid: int | None
    ended: int | None


def services(lab: Lab, node: NodeName) -> list[ServiceStatus]:
    """Return the services of a running node."""
    return _ask(lab, node, {"verb": "status"})


def wait_ready(lab: Lab, node: NodeName) -> list[ServiceStatus]:
    """Return once every service of the node can be spoken to; LabMissing says which one cannot, and its last words."""
    return _ask(lab, node, {"verb": "ready"})


def start_service(lab: Lab, node: NodeName, service: str, environment: Mapping[str, str] | None = None) -> None:
    """Start a service with these variables added to its environment; return when it can be spoken to."""
    _ask(lab, node, {"verb": "start", "service": service, "environment": dict(environment or {})})


def stop_service(lab: Lab, node: NodeName, service: str) -> None:
    """End a service by SIGTERM; return when it is gone."""
    _ask(lab, node, {"verb": "stop", "service": service})


def kill_service(lab: Lab, node: NodeName, service: str) -> None:
    """End a service by SIGKILL; return when it is gone."""
    _ask(lab, node, {"verb": "kill", "service": service})


def reachable(lab: Lab, node: NodeName) -> bool:
    """Whether the node's first process takes requests yet."""
    try:
        _connect(lab, node).close()
    except OSError:
        return False
    return True


def _ask(lab: Lab, node: NodeName, request: Mapping[str, object]) -> list[ServiceStatus]:
    try:
        with _connect(lab, node) as connection, connection.makefile("rwb") as stream:
            stream.write(json.dumps(request).encode() + b"\n")
            stream.flush()
            answer = json.loads(stream.readline())
    except (OSError, ValueError) as error:
        raise LabMissing(f"{node} does not answer", cause=str(error)) from error
    if "error" in answer:
        raise LabMissing(f"{node}: {answer['error']}", fix=f"Read {lab.node(node)}/log.")
    return [ServiceStatus(name, found["pid"], found["ended"]) for name, found in answer["services"].items()]


def _connect(lab: Lab, node: NodeName) -> socket.socket:
    # A socket's address holds 107 bytes, a lab's path may be longer: go through the folder's descriptor.
    folder = os.open(lab.node(node), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(ANSWER_S)
        connection.connect(f"/proc/self/fd/{folder}/control.sock")
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(folder)
    return connection
