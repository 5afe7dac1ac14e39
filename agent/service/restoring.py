"""The verb that brings single files back from a generation."""

from __future__ import annotations

import os

from agent.contract import messages as m
from agent.contract.errors import DeviceBusy
from agent.recovery.restore import restore
from agent.service.generations import view
from agent.service.node import Node, ProgressCall, open_mount


def restore_files(node: Node, arguments: m.RestoreFiles, progress: ProgressCall) -> m.Restored:
    """Copy files from a generation that this node holds into the volume that it serves; DeviceBusy unless it serves it.

    The volume's job is not taken: replication and clients go on. If we die here each file is the old or the new one.
    """
    record = node.record(arguments.generation.volume)
    node.generation(arguments.generation)
    if not node.serving(record):
        raise DeviceBusy(
            f"node {node.config.node} does not serve volume {record.name}", fix="Serve it, or name the node that does with --node."
        )
    paths = [os.fsencode(path) for path in arguments.paths]
    with view(node, record, arguments.generation, "restore") as found, open_mount(node.mount_point(record)) as target_fd:
        done = restore(found.mount_fd, target_fd, paths, os.fsencode(arguments.folder))
    return m.Restored(done.files, done.length_bytes, tuple(m.RefusedPath(os.fsdecode(path), reason) for path, reason in done.refused))
