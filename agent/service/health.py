"""Verbs of the preflight: what this node has and serves, and whether a transfer would reach another node."""

from __future__ import annotations

import os

from agent.contract import messages as m
from agent.service.node import Node, ProgressCall
from agent.serving import path
from agent.system.clock import wall_ns


def health(node: Node, arguments: m.AskHealth, progress: ProgressCall) -> m.Health:
    """Return what a preflight must know of this node."""
    served = tuple(record.name for record in node.substrate.volumes() if node.serving(record))
    state = os.statvfs(node.config.state_dir)
    return m.Health(wall_ns(), node.substrate.free_bytes(), state.f_bavail * state.f_frsize, served, not served or node.samba.answers())


def open_path(node: Node, arguments: m.OpenPath, progress: ProgressCall) -> m.Listening:
    """Listen for one ``path.try``."""
    address = node.config.replication_address
    return m.Listening(address, path.listen(address, min(arguments.limit_s, 60.0)))


def try_path(node: Node, arguments: m.TryPath, progress: ProgressCall) -> m.PathTried:
    """Return whether full packets reach a port that another node opened."""
    tried = path.attempt(arguments.address, arguments.port, min(arguments.limit_s, 60.0))
    return m.PathTried(tried.source, tried.interface, tried.mtu, tried.seconds, tried.problem)
