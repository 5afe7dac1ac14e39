"""What Prometheus reads of a NAS node: a file for node_exporter's textfile collector, written anew every so often and in one step.

The agent opens no port for it. A file that gets old says that the agent is gone (`node_textfile_mtime_seconds`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.contract.errors import LandfallError
from agent.contract.messages import TransferState
from agent.service.node import Node

PERIOD_S: Final = 30.0

log = logging.getLogger("landfall.agent")


class Exposition(Collector):
    """The metrics of one node, asked of its substrate and its records when they are collected."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; LandfallError where the substrate cannot be read."""
        node, facts = self._node, self._node.facts()
        about = InfoMetricFamily("landfall_agent", "The agent that wrote this.")
        about.add_metric([], {"node": facts.node, "release": facts.release, "substrate": ",".join(facts.substrates)})
        free = GaugeMetricFamily("landfall_differential_free_bytes", "Room in the differential volume.", value=node.substrate.free_bytes())
        serving = GaugeMetricFamily("landfall_agent_serving", "Whether this node serves the volume.", labels=["volume"])
        exported = GaugeMetricFamily(
            "landfall_agent_exported",
            "Whether clients reach the volume by a protocol that the node is configured for.",
            labels=["volume", "protocol"],
        )
        epoch = GaugeMetricFamily("landfall_agent_epoch", "The volume's epoch here.", labels=["volume"])
        generations = GaugeMetricFamily("landfall_agent_generations", "Generations of the volume held here.", labels=["volume"])
        for record in node.substrate.volumes():
            serving.add_metric([record.name], node.serving(record))
            by = node.exports.protocols(node.share(record)) if node.serving(record) else ()
            for exporter in node.exports.by:
                if exporter.wanted:
                    exported.add_metric([record.name, exporter.protocol], exporter.protocol in by)
            epoch.add_metric([record.name], record.epoch)
            generations.add_metric([record.name], len(node.substrate.generations(record.id)))
        transfers = GaugeMetricFamily("landfall_agent_transfers", "Transfers of this node, by state.", labels=["state"])
        states = [node.store.load(number).state for number in node.store.list()]
        for state in TransferState:
            transfers.add_metric([state], states.count(state))
        unread = GaugeMetricFamily(
            "landfall_agent_notifications", "Notifications that the management node has not fetched.", value=len(node.outbox.read(0, 0.0))
        )
        yield from (about, free, serving, exported, epoch, generations, transfers, unread)


class TextFile:
    """Writes a node's metrics to ``path`` until ``close``."""

    def __init__(self, node: Node, path: Path) -> None:
        self._path = path
        self._registry = CollectorRegistry(auto_describe=False)  # nothing is asked of the node before the first file is written
        self._registry.register(Exposition(node))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write no more."""
        self._closing.set()
        self._thread.join(PERIOD_S)

    def _run(self) -> None:
        while True:
            try:
                write_to_textfile(str(self._path), self._registry)
            except (LandfallError, OSError) as error:
                log.warning("metrics are not written to %s: %s", self._path, error)
            if self._closing.wait(PERIOD_S):
                return
