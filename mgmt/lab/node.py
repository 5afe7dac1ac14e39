"""A node's first process: furnishes its namespaces, runs its services, reaps what dies, and is the node's life.

`python -m mgmt.lab.node --directory LAB --node NAME`, started in namespaces of its own (network, mount, PID, IPC, UTS). Its
death is the node's: the kernel kills every process of its PID namespace and ends its mounts.

Control: JSON lines on the Unix socket `control.sock` in the node's folder, one request, one answer::

    {"verb": "status"}
    {"verb": "ready"}                                         answers when every service that should run does
    {"verb": "start", "service": "agent", "environment": {}}  answers when it can be spoken to
    {"verb": "stop" | "kill", "service": "agent"}             answers when it is gone

An answer is `{"services": {"agent": {"state": "running", "pid": 7, "ended": null}, ...}}`, pid as the node counts, `ended`
as os.waitstatus_to_exitcode says; or `{"error": "..."}`. A service that ends by itself is not started again: a kill is meant.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from agent.contract.errors import LabMissing
from agent.system.run import start
from mgmt.lab.enrolment import AGENT_SOCKET, SSH_PORT, agent_program
from mgmt.lab.furnish import furnish
from mgmt.lab.layout import NAS_NODES, NODE_ROOT, Lab, NodeName

CONTROL_SOCKET = "control.sock"
READY_S = 30.0
STOP_S = 20.0
PROBE_S = 0.02


class State(StrEnum):
    """Whether a service runs."""

    STOPPED = "stopped"
    RUNNING = "running"


@dataclass(slots=True)
class Service:
    """One of the node's services: whether it is meant to run, whether it does; ``gone`` is set once it has ended."""

    name: str
    argv: list[str]
    address: str | Path
    meant: bool = False
    pid: int | None = None
    ended: int | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def describe(self) -> dict[str, object]:
        state = State.STOPPED if self.pid is None else State.RUNNING
        return {"state": state, "pid": self.pid, "ended": self.ended}


def main() -> None:
    """Be the node until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--node", type=NodeName, required=True)
    arguments = parser.parse_args()
    lab = Lab.at(arguments.directory)
    marker = lab.read_marker()
    if marker is None or os.getpid() != 1:
        raise LabMissing(f"{lab.directory} is no lab, or this is not a node's first process")
    with contextlib.ExitStack() as held:
        furnish(lab, arguments.node, marker, held)
        asyncio.run(_serve(_services(arguments.node), started={"sshd", "agent"} if marker.agents else {"sshd"}))


def _services(node: NodeName) -> list[Service]:
    """Return what can run on this node."""
    services = [Service("sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", str(NODE_ROOT / "etc/sshd_config")], node.address)]
    if node in NAS_NODES:
        config = str(NODE_ROOT / "etc/agent.toml")
        services.append(Service("agent", [str(agent_program()), "daemon", "--config", config], AGENT_SOCKET))
    return services


async def _serve(services: list[Service], started: set[str]) -> None:
    by_name = {service.name: service for service in services}
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGCHLD, _reap, services)
    Path("/run/sshd").mkdir(mode=0o755)
    for service in services:
        if service.name in started:
            _start(service, {})
    path = NODE_ROOT / CONTROL_SOCKET
    path.unlink(missing_ok=True)

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                writer.write(json.dumps(await _answer(by_name, json.loads(line))).encode() + b"\n")
                await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(converse, path)
    async with server:
        await server.serve_forever()


async def _answer(services: dict[str, Service], request: Mapping[str, Any]) -> dict[str, object]:
    verb, name = request.get("verb"), request.get("service")
    if verb == "ready":
        failures = [await _ready(service) for service in services.values() if service.meant]
    elif verb == "status":
        failures = []
    elif name not in services:
        failures = [f"there is no service {name!r} on this node"]
    elif verb == "start":
        if services[name].pid is None:
            _start(services[name], request.get("environment", {}))
        failures = [await _ready(services[name])]
    elif verb == "stop":
        failures = [await _end(services[name], signal.SIGTERM)]
    elif verb == "kill":
        failures = [await _end(services[name], signal.SIGKILL)]
    else:
        failures = [f"there is no verb {verb!r}"]
    answer: dict[str, object] = {"services": {service.name: service.describe() for service in services.values()}}
    if any(failures):
        answer["error"] = "; ".join(filter(None, failures))
    return answer


def _start(service: Service, environment: Mapping[str, str]) -> None:
    variables = [f"{name}={value}" for name, value in environment.items()]
    with open(NODE_ROOT / "log" / f"{service.name}.log", "ab") as log:
        child = start(["env", *variables, *service.argv], stdout=log.fileno(), stderr=log.fileno())
    service.meant, service.pid, service.ended = True, child.pid, None
    service.gone.clear()
    # This process reaps whatever dies in its PID namespace, so the child's own book-keeping has nothing left to wait for.
    child.returncode = 0


def _reap(services: list[Service]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        for service in services:
            if service.pid == pid:
                service.pid, service.ended = None, os.waitstatus_to_exitcode(status)
                service.gone.set()


async def _ready(service: Service) -> str | None:
    """Return None once the service can be spoken to, else why it cannot."""
    try:
        async with asyncio.timeout(READY_S):
            while service.pid is not None:
                with contextlib.suppress(OSError):
                    await _connect(service.address)
                    return None
                await asyncio.sleep(PROBE_S)
    except TimeoutError:
        return f"{service.name} does not answer"
    log = (NODE_ROOT / "log" / f"{service.name}.log").read_text(errors="replace").strip().splitlines()
    return f"{service.name} ended with status {service.ended}: {log[-1] if log else 'no word'}"


async def _connect(address: str | Path) -> None:
    if isinstance(address, Path):
        _, writer = await asyncio.open_unix_connection(address)
    else:
        _, writer = await asyncio.open_connection(address, SSH_PORT)
    writer.close()


async def _end(service: Service, number: signal.Signals) -> str | None:
    service.meant = False
    if service.pid is None:
        return None
    os.kill(service.pid, number)
    try:
        async with asyncio.timeout(STOP_S):
            await service.gone.wait()
    except TimeoutError:
        return f"{service.name} does not end"
    return None


if __name__ == "__main__":
    main()
