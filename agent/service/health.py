"""Verbs of the preflight: what this node has and serves, and whether a transfer would reach another node."""

from __future__ import annotations

import os

from agent.contract import messages as m
from agent.service.node import Node, ProgressCall
from agent.serving import path
from agent.serving.exports import Exporter, Share
from agent.system.clock import wall_ns


def health(node: Node, arguments: m.AskHealth, progress: ProgressCall) -> m.Health:
    """Return what a preflight must know of this node."""
    shares = tuple(node.share(record) for record in node.substrate.volumes() if node.serving(record))
    state = os.statvfs(node.config.state_dir)
    exports = tuple(_export_health(exporter, shares) for exporter in node.exports.by if exporter.wanted)
    return m.Health(wall_ns(), node.substrate.free_bytes(), state.f_bavail * state.f_frsize, tuple(share.name for share in shares), exports)


def _export_health(exporter: Exporter, shares: tuple[Share, ...]) -> m.ExportHealth:
    problem = exporter.problem(shares)
    return m.ExportHealth(exporter.protocol, problem.message if problem else "", problem.fix_now if problem else "")


def open_path(node: Node, arguments: m.OpenPath, progress: ProgressCall) -> m.Listening:
    """Listen for one ``path.try``."""
    address = node.config.replication_address
    return m.Listening(address, path.listen(address, min(arguments.limit_s, 60.0)))


def try_path(node: Node, arguments: m.TryPath, progress: ProgressCall) -> m.PathTried:
    """Return whether full packets reach a port that another node opened."""
    tried = path.attempt(arguments.address, arguments.port, min(arguments.limit_s, 60.0))
    return m.PathTried(tried.source, tried.interface, tried.mtu, tried.seconds, tried.problem)
