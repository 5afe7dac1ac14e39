"""What block devices this node sees, and what becomes of those below its volumes."""

from __future__ import annotations

import logging

from agent.contract import messages as m
from agent.contract.errors import LandfallError
from agent.service.node import Node, ProgressCall
from agent.volume.devices import devices
from agent.volume.watch import DeviceEvent, DeviceWatch, devices_below

log = logging.getLogger("landfall.devices")

DEVICE_CHANGED = "device-changed"


def list_devices(node: Node, arguments: m.ListDevices, progress: ProgressCall) -> m.Devices:
    """Return them all, with what identifies each."""
    return m.Devices(devices())


def watch(node: Node) -> DeviceWatch:
    """Return the watch over the devices below this node's volumes; each change becomes a notification for every volume."""

    def below() -> frozenset[str]:
        disk = node.substrate.disk
        return devices_below(disk) if disk is not None else frozenset()

    def heard(event: DeviceEvent) -> None:
        try:
            for record in node.substrate.volumes():
                node.outbox.put(DEVICE_CHANGED, record.id, None, event.message)
        except (LandfallError, OSError) as error:  # the disk that changed may be the one that remembers; `volume.list` says it anyway
            log.warning("a notification could not be kept: %s", error)

    return DeviceWatch(below, heard)
