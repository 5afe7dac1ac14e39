"""The local lab's nodes, as what things happen to."""

from __future__ import annotations

import os
from dataclasses import dataclass

from agent.system.block import go_down
from mgmt.drill.disks import within_node
from mgmt.lab import control, lifecycle
from mgmt.lab.layout import NODE_ROOT, Lab, NodeName


@dataclass(frozen=True, slots=True)
class LabNodes:
    """See strikes.Nodes."""

    lab: Lab

    def kill_agent(self, node: str) -> None:
        control.kill_service(self.lab, NodeName(node), "agent")

    def start_agent(self, node: str) -> None:
        control.start_service(self.lab, NodeName(node), "agent")

    def cut_power(self, node: str) -> None:
        """See strikes.Nodes. What nas2 had not flushed is gone; nas1's generations, which are evidence, had been flushed."""
        if NodeName(node) is NodeName.NAS2:
            self.fail_disk(node)
        lifecycle.cut_off(self.lab, NodeName(node))  # a machine without power does not say goodbye, as processes that are killed do
        lifecycle.kill(self.lab, NodeName(node))

    def start(self, node: str) -> None:
        lifecycle.start_node(self.lab, NodeName(node))

    def pause(self, node: str) -> None:
        lifecycle.pause(self.lab, NodeName(node))

    def wake(self, node: str) -> None:
        lifecycle.wake(self.lab, NodeName(node))

    def fail_disk(self, node: str) -> None:
        """See strikes.Nodes: the filesystem of its pool goes down without flushing, as when its disk is gone."""
        pool = os.open(within_node(self.lab, NodeName(node), NODE_ROOT / "pool"), os.O_RDONLY | os.O_DIRECTORY)
        try:
            go_down(pool)
        finally:
            os.close(pool)

    def cut_link(self) -> None:
        lifecycle.cut(self.lab, NodeName.NAS1, NodeName.NAS2)

    def heal_link(self) -> None:
        lifecycle.heal(self.lab, NodeName.NAS1, NodeName.NAS2)
