"""What a lab, alive or broken, has left on the machine, and taking it away.

Order: processes, device-mapper devices, loop devices, network, files, and the marker last: whatever step we die in, the next
`down` begins again. Nothing is touched but what the lab's directory leads to: processes in its namespaces, loop devices of its
images and what device-mapper has put on them, namespaces whose loopback link carries its marker.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from agent.contract.errors import LabMissing
from mgmt.lab import groups, loops, network, processes
from mgmt.lab.layout import NAS_NODES, Lab, NodeName

KILL_S = 1.0
ROUNDS = 20


def clear(lab: Lab) -> bool:
    """Take away everything of the lab and its directory; return whether there was anything. NotOurs without the marker."""
    found = clear_content(lab)
    if lab.directory.is_dir():
        lab.directory.rmdir()
    return found


def clear_content(lab: Lab) -> bool:
    """Take away everything of the lab, the marker last, and leave its directory empty."""
    marked = lab.read_marker() is not None
    _end_processes(lab)
    _free_disks(lab, NAS_NODES)
    removed = network.remove(lab)
    if marked:
        for entry in lab.directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry != lab.marker_path:
                entry.unlink()
        lab.marker_path.unlink()
    return marked or bool(removed)


def clear_node(lab: Lab, node: NodeName) -> bool:
    """Kill a node as if by pulling its plug; return, with its processes gone and its disks free, whether it ran."""
    nodes = [node] if node in NAS_NODES else []
    first = processes.first_process(lab, node)
    if first is not None:
        _kill(lab, [first], nodes)
    _free_disks(lab, nodes)
    return first is not None


def _free_disks(lab: Lab, nodes: Sequence[NodeName]) -> None:
    for node in nodes:
        network.end_nfs(lab, node)
    groups.release(lab, nodes)
    loops.release([image for node in nodes for image in (lab.disk_image(node), lab.pool_image(node))])


def _end_processes(lab: Lab) -> None:
    for node in NodeName:
        if (first := processes.first_process(lab, node)) is not None:
            _kill(lab, [first], NAS_NODES)
    for _ in range(ROUNDS):
        left = processes.inside(lab)
        if not left:
            return
        _kill(lab, left, NAS_NODES)
    raise LabMissing(f"processes in the lab's network do not end: {processes.inside(lab)}")


def _kill(lab: Lab, pids: list[int], nodes: Sequence[NodeName]) -> None:
    """Kill; whoever does not go waits for a frozen filesystem or a suspended device, so thaw and wait again."""
    for _ in range(ROUNDS):
        pids = processes.kill(pids, KILL_S)
        if not pids:
            return
        for node in nodes:
            for mapping in groups.mappings(lab.disk_image(node)):
                groups.thaw(mapping)
            for loop in loops.on_pool(lab.pool_image(node)):
                loops.thaw(loop.path)
    raise LabMissing(f"processes do not end by SIGKILL: {pids}")
