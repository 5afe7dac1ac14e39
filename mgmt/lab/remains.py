"""What a lab, alive or broken, has left on the machine, and taking it away.

Order: processes, loop devices, network, files, and the marker last: whatever step we die in, the next `down` begins again.
Nothing is touched but what the lab's directory leads to: processes in its namespaces, loop devices of its pools' images,
namespaces whose loopback link carries its marker.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from agent.contract.errors import LabMissing
from mgmt.lab import loops, network, processes
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
    images = [lab.pool_image(node) for node in NAS_NODES]
    _end_processes(lab, images)
    loops.release(images)
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
    images = [lab.pool_image(node)] if node in NAS_NODES else []
    first = processes.first_process(lab, node)
    if first is not None:
        _kill([first], images)
    loops.release(images)
    return first is not None


def _end_processes(lab: Lab, images: list[Path]) -> None:
    for node in NodeName:
        if (first := processes.first_process(lab, node)) is not None:
            _kill([first], images)
    for _ in range(ROUNDS):
        left = processes.inside(lab)
        if not left:
            return
        _kill(left, images)
    raise LabMissing(f"processes in the lab's network do not end: {processes.inside(lab)}")


def _kill(pids: list[int], images: list[Path]) -> None:
    """Kill; whoever does not go waits for a frozen filesystem, so thaw and wait again."""
    for _ in range(ROUNDS):
        pids = processes.kill(pids, KILL_S)
        if not pids:
            return
        for image in images:
            for loop in loops.on_pool(image):
                loops.thaw(loop)
    raise LabMissing(f"processes do not end by SIGKILL: {pids}")
