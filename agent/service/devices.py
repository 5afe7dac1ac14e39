"""What block devices this node sees."""

from __future__ import annotations

from agent.contract import messages as m
from agent.service.node import Node, ProgressCall
from agent.volume.devices import devices


def list_devices(node: Node, arguments: m.ListDevices, progress: ProgressCall) -> m.Devices:
    """Return them all, with what identifies each."""
    return m.Devices(devices())
