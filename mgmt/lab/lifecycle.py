"""Up, down, kill, start, pause, wake, cut, heal: what one does with a lab.

Every function works from the lab's directory alone, so that each may run in another process than the one before.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from agent.contract.errors import KernelLacks, LabMissing, NotRoot
from agent.system.clock import wait_until
from agent.system.failpoint import failpoint
from agent.system.run import run, start
from mgmt.lab import control, groups, network, processes, remains
from mgmt.lab.control import ServiceStatus
from mgmt.lab.cuts import Pair, pair, read_cuts, write_cuts
from mgmt.lab.enrolment import enrol
from mgmt.lab.layout import NAS_NODES, Lab, LabSubstrate, Marker, NodeName, PoolFilesystem

if TYPE_CHECKING:
    from subprocess import Popen

DEFAULT_POOL_BYTES = 12 << 30
STATE_BYTES = 1 << 30
"""Size of a pool that holds no volumes, only what the agent remembers."""
START_S = 30.0


class Outcome(StrEnum):
    """What a command found or did."""

    DONE = "done"
    ALREADY = "already"


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node; pid as the machine counts, None while it does not run."""

    name: NodeName
    pid: int | None
    address: str
    namespace: str
    services: tuple[ServiceStatus, ...]


@dataclass(frozen=True, slots=True)
class LabStatus:
    """A lab as it stands; without a marker it is not there."""

    directory: str
    marker: Marker | None
    cut: tuple[tuple[NodeName, ...], ...]
    nodes: tuple[NodeStatus, ...]

    @property
    def up(self) -> bool:
        """Whether the lab was made completely and all of its nodes run."""
        return self.marker is not None and self.marker.complete and all(node.pid is not None for node in self.nodes)


def up(
    lab: Lab,
    pool_fs: PoolFilesystem = PoolFilesystem.XFS,
    pool_size_bytes: int = DEFAULT_POOL_BYTES,
    *,
    agents: bool = True,
    substrate: LabSubstrate = LabSubstrate.REFLINK,
) -> Outcome:
    """Guarantee that the lab is up and every service of it can be spoken to.

    What a broken-off run left is taken down first; a complete lab keeps its disks and gets those of its nodes started that do
    not run. On any failure, Ctrl-C included, a lab that was being made is taken down again.
    """
    _require_kernel()
    groups.require(substrate)
    with _alone(lab):
        if (marker := lab.read_marker()) is not None and marker.complete and network.present(lab):
            missing = [node for node in NodeName if processes.first_process(lab, node) is None]
            _boot(lab, missing)
            return Outcome.DONE if missing else Outcome.ALREADY
        remains.clear_content(lab)
        if substrate is not LabSubstrate.REFLINK:
            for node in NAS_NODES:
                groups.refuse_taken(lab, node)
        marker = Marker(pool_fs, pool_size_bytes, agents, complete=False, substrate=substrate)
        try:
            lab.write_marker(marker)
            failpoint("lab.marked")
            network.create(lab)
            failpoint("lab.network")
            enrol(lab, substrate)
            for node in NAS_NODES:
                _make_pool(lab, node, marker)
                if substrate is not LabSubstrate.REFLINK:
                    groups.make(lab, node, pool_size_bytes)
            failpoint("lab.disks")
            _boot(lab, list(NodeName))
            failpoint("lab.booted")
            lab.write_marker(replace(marker, complete=True))
        except BaseException:
            remains.clear(lab)
            raise
    return Outcome.DONE


def down(lab: Lab) -> Outcome:
    """Guarantee that nothing of the lab is on the machine: no namespace, mount, loop device, process or file."""
    if not lab.directory.is_dir():
        return Outcome.DONE if remains.clear(lab) else Outcome.ALREADY
    with _alone(lab):
        return Outcome.DONE if remains.clear(lab) else Outcome.ALREADY


def kill(lab: Lab, node: NodeName) -> Outcome:
    """Guarantee that the node is dead, as if its plug had been pulled; its disks stay as they are."""
    _require_up(lab)
    did = remains.clear_node(lab, node)
    network.forget_services(lab, node)
    _switch(lab, off=frozenset({node}))  # its namespace stays, and the kernel would still refuse connections in its name
    return Outcome.DONE if did else Outcome.ALREADY


def cut_off(lab: Lab, node: NodeName) -> None:
    """Guarantee that no packet passes the node's port, until it is started, woken, or a cut is made or healed."""
    _require_up(lab)
    _switch(lab, off=frozenset({node}))


def start_node(lab: Lab, node: NodeName) -> Outcome:
    """Guarantee that the node runs, with the disks it had."""
    _require_up(lab)
    if processes.first_process(lab, node) is not None:
        return Outcome.ALREADY
    _boot(lab, [node])
    return Outcome.DONE


def pause(lab: Lab, node: NodeName) -> None:
    """Guarantee that no process of the node runs and no packet of it passes, as of a virtual machine that is paused."""
    _require_up(lab)
    processes.signal_node(lab, node, signal.SIGSTOP)
    _switch(lab, off=frozenset({node}))


def wake(lab: Lab, node: NodeName) -> None:
    """Guarantee that a node which was paused goes on where it was."""
    _require_up(lab)
    processes.signal_node(lab, node, signal.SIGCONT)
    _switch(lab, on=frozenset({node}))


def cut(lab: Lab, one: NodeName, other: NodeName) -> Outcome:
    """Guarantee that the two nodes cannot exchange a packet; each still reaches a third it is not cut from."""
    return _change_cuts(lab, add=frozenset({pair(one, other)}), remove=frozenset())


def heal(lab: Lab, one: NodeName, other: NodeName) -> Outcome:
    """Guarantee that the two nodes are not cut from each other."""
    return _change_cuts(lab, add=frozenset(), remove=frozenset({pair(one, other)}))


def status(lab: Lab) -> LabStatus:
    """Return what is there of the lab; NotOurs for a directory with something else in it."""
    marker = lab.read_marker()
    cuts = tuple(tuple(sorted(cut_pair)) for cut_pair in sorted(read_cuts(lab.cuts_path), key=sorted))
    return LabStatus(str(lab.directory), marker, cuts, tuple(_node_status(lab, node) for node in NodeName))


def inside(lab: Lab, node: NodeName, argv: Sequence[str]) -> list[str]:
    """Return the argument list that runs ``argv`` on a running node: in all of its namespaces, its folder at NODE_ROOT."""
    pid = processes.first_process(lab, node)
    if pid is None:
        raise LabMissing(f"{node} is not running")
    return ["nsenter", "--target", str(pid), "--root", "--mount", "--uts", "--ipc", "--net", "--pid", "--", *argv]


def _require_kernel() -> None:
    if os.geteuid() != 0:
        raise NotRoot("a lab makes namespaces, mounts and loop devices")
    if not Path("/dev/loop-control").exists():
        raise KernelLacks("there are no loop devices", fix="Load the module loop; in a container, run it privileged.")


def _require_up(lab: Lab) -> None:
    marker = lab.read_marker()
    if marker is None or not marker.complete:
        raise LabMissing(f"the lab in {lab.directory} is not up")


@contextlib.contextmanager
def _alone(lab: Lab) -> Iterator[None]:
    """Keep two commands from making and unmaking the same lab at the same time; the lock ends with its holder."""
    lab.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(lab.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabMissing(f"another command is at work on {lab.directory}", fix="Wait for it to end.") from None
        yield
    finally:
        os.close(descriptor)


def _make_pool(lab: Lab, node: NodeName, marker: Marker) -> None:
    image = str(lab.pool_image(node))
    size_bytes = marker.pool_size_bytes if marker.substrate is LabSubstrate.REFLINK else STATE_BYTES
    run(["truncate", "--size", str(size_bytes), image])
    if marker.pool_fs is PoolFilesystem.XFS:
        run(["mkfs.xfs", "-q", "-m", "reflink=1", "-L", "landfall", image])
    else:
        run(["mkfs.btrfs", "-q", "-L", "landfall", image])


def _boot(lab: Lab, nodes: list[NodeName]) -> None:
    """Start the nodes side by side, and return when every service of them can be spoken to."""
    _switch(lab, on=frozenset(nodes))
    booting = [(node, _spawn(lab, node)) for node in nodes]
    for node, child in booting:
        _wait_for_first_process(lab, node, child)
        control.wait_ready(lab, node)


def _spawn(lab: Lab, node: NodeName) -> Popen[bytes]:
    (lab.node(node) / "control.sock").unlink(missing_ok=True)
    network_file = network.path_of(lab.namespace(node))
    with open(_log(lab, node), "wb") as log:
        return start(
            [
                *("nsenter", f"--net={network_file}", "--"),
                *("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("--ipc", "--uts", "--"),
                *(sys.executable, "-m", "mgmt.lab.node", "--directory", str(lab.directory), "--node", node),
            ],
            stdout=log.fileno(),
            stderr=log.fileno(),
        )


def _wait_for_first_process(lab: Lab, node: NodeName, child: Popen[bytes]) -> None:
    wait_until(lambda: child.poll() is not None or control.reachable(lab, node), START_S)
    if not control.reachable(lab, node):
        words = _log(lab, node).read_text(errors="replace").strip().splitlines()
        raise LabMissing(f"{node} did not start", cause=words[-1] if words else "it said nothing")
    # The node outlives this process; who kills it asks how it ended (processes.kill).
    child.returncode = 0


def _log(lab: Lab, node: NodeName) -> Path:
    return lab.node(node) / "log" / "node.log"


def _change_cuts(lab: Lab, *, add: frozenset[Pair], remove: frozenset[Pair]) -> Outcome:
    _require_up(lab)
    before = read_cuts(lab.cuts_path)
    after = (before | add) - remove
    # The record first: if we die in between, the next cut or heal makes the switch what the record says.
    write_cuts(lab.cuts_path, after)
    _switch(lab)
    return Outcome.ALREADY if after == before else Outcome.DONE


def _switch(lab: Lab, *, on: frozenset[NodeName] = frozenset(), off: frozenset[NodeName] = frozenset()) -> None:
    """Let the switch be as the record of cuts says; a node that is paused or without power, or about to be (``off``), is silent."""
    first = {node: processes.first_process(lab, node) for node in NodeName}
    silent = {node for node, pid in first.items() if pid is None or processes.is_stopped(pid)}
    network.apply_cuts(lab, read_cuts(lab.cuts_path), frozenset((silent | off) - on))


def _node_status(lab: Lab, node: NodeName) -> NodeStatus:
    pid = processes.first_process(lab, node)
    found: tuple[ServiceStatus, ...] = ()
    if pid is not None:
        with contextlib.suppress(LabMissing):
            found = tuple(control.services(lab, node))
    return NodeStatus(node, pid, node.address, lab.namespace(node), found)
