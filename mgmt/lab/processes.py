"""A lab's processes, found by the network namespace they are in, and their end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

from mgmt.lab import network
from mgmt.lab.layout import Lab, NodeName


def first_process(lab: Lab, node: NodeName) -> int | None:
    """Return the pid, as the machine counts, of a node's first process; None while the node does not run."""
    return next((pid for pid in inside(lab, [lab.namespace(node)]) if _is_first(pid)), None)


def inside(lab: Lab, namespaces: Iterable[str] | None = None) -> list[int]:
    """Return the pids of the processes in these (or all) network namespaces of the lab, without ourselves and our ancestors."""
    wanted = {network.inode(name) for name in (lab.namespaces if namespaces is None else namespaces)} - {None}
    if not wanted:
        return []
    ours = set(_ancestors(os.getpid()))
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in ours:
            # A process that has just gone, or has given up its namespaces on its way out, is not one of them any more.
            with contextlib.suppress(OSError):
                if (entry / "ns/net").stat().st_ino in wanted:
                    found.append(int(entry.name))
    return found


def kill(pids: Iterable[int], limit_s: float) -> list[int]:
    """Send SIGKILL and return the pids of those that did not go within the limit (each); a writer to a frozen filesystem does not."""
    waiting: list[tuple[int, int]] = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            waiting.append((pid, descriptor))
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    try:
        return [pid for pid, descriptor in waiting if not _gone(descriptor, limit_s)]
    finally:
        for pid, descriptor in waiting:
            os.close(descriptor)
            # Where the one who kills is the one who started it, nobody else will ever ask how it ended.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def signal_node(lab: Lab, node: NodeName, number: signal.Signals) -> None:
    """Send a signal to every process of a node, the first one first, so that it starts none meanwhile.

    Who waits for the first process outside (unshare) is spared: it would hold the node's mounts after the node's death.
    """
    of_node = [pid for pid in inside(lab, [lab.namespace(node)]) if _inner_pid(pid)]
    for pid in sorted(of_node, key=lambda pid: not _is_first(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def command_line(pid: int) -> list[bytes]:
    """Return a process's words; none if it is gone, as one that was just listed may be."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal; False if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] == "T"
    return False


def _gone(descriptor: int, limit_s: float) -> bool:
    readable, _, _ = select.select([descriptor], [], [], limit_s)
    return bool(readable)


def _is_first(pid: int) -> bool:
    return _inner_pid(pid) == "1"


def _inner_pid(pid: int) -> str:
    """Return a process's pid as its node counts; empty if it is in no PID namespace but ours, or is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("NSpid:"):
                return "".join(line.split()[2:][-1:])
    return ""


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 0:
        yield pid
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        pid = int(status.rpartition(")")[2].split()[1])
