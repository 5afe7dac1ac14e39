"""Where the local lab's nodes keep what a drill looks at, as this machine's root reaches it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.contract.errors import CommandFailed
from agent.contract.identity import GenerationId
from agent.system.run import run
from mgmt.lab import groups
from mgmt.lab.layout import NODE_ROOT, Lab, LabSubstrate, NodeName
from mgmt.lab.processes import first_process


@contextmanager
def frozen_on(lab: Lab, node: NodeName) -> Iterator[Callable[[GenerationId], Path]]:
    """Yield what gives the path of a generation that a node, alive or dead, holds: a file, or a read-only device."""
    marker = lab.read_marker()
    if marker is not None and marker.substrate is not LabSubstrate.REFLINK:
        with groups.activating(lab, node) as activate:
            yield lambda generation: activate(_tag_of(generation))
        return
    with _pool_of(lab, node) as pool:
        yield lambda generation: pool / "volumes" / str(generation.volume) / "generations" / f"{generation.name}.img"


def _tag_of(generation: GenerationId) -> str:
    """Return how the tag of the logical volume begins that is this generation."""
    return f"landfall/generation/1/{generation.volume}/{generation.epoch}/{generation.counter}/{generation.nonce}/"


@contextmanager
def _pool_of(lab: Lab, node: NodeName) -> Iterator[Path]:
    """Yield a node's pool as this machine's root sees it: the living node's own mount, or the dead one's disk, read-only.

    Its device is not: a filesystem whose disk failed under it wants its log replayed first, as at the node's next start.
    """
    pid = first_process(lab, node)
    if pid is not None:
        yield within_node(lab, node, NODE_ROOT / "pool")
        return
    mount_point = lab.directory / f"{node}-disk"
    mount_point.mkdir(mode=0o700, exist_ok=True)
    loop = run(["losetup", "--find", "--show", str(lab.pool_image(node))]).text.strip()
    try:
        run(["mount", "-o", "ro", loop, str(mount_point)])
    finally:
        run(["losetup", "--detach", loop])  # with its last user: the mount, if it came to be
    try:
        yield mount_point
    finally:
        run(["umount", str(mount_point)])
        mount_point.rmdir()


def within_node(lab: Lab, node: NodeName, path: Path) -> Path:
    """Return a living node's ``path`` as this machine's root reaches it."""
    pid = first_process(lab, node)
    if pid is None:
        raise CommandFailed(f"{node} does not run")
    return Path(f"/proc/{pid}/root") / os.path.relpath(path, "/")
