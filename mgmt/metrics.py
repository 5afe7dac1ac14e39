"""What Prometheus reads of the management node: volumes as the last cycle saw them, and what happened since the service began.

The time of the last success comes first: an alert on its age needs nothing else to work. Names and units follow Prometheus's own rules
("Metric and label naming"); times are seconds since the epoch, so that the age is the reader's to compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.contract import messages as m
from mgmt import proofs
from mgmt.run import NodeView
from mgmt.watch.cycle import Observed, Watch
from mgmt.watch.decision import Act

_SECOND_NS: Final = 1e9


class Exposition(Collector):
    """The metrics of one watch; nothing is asked of the agents when Prometheus comes."""

    def __init__(self, watch: Watch, folder: Path) -> None:
        """``folder`` is the management node's state, where the proofs that recovery works are kept."""
        self._watch, self._folder = watch, folder

    def collect(self) -> Iterable[Metric]:
        """Yield every metric with a sample for each volume, node and error."""
        observed = sorted(self._watch.observed.items())
        yield from _of_replication(observed)
        yield from _of_nodes(observed)
        yield from _of_transfers(observed)
        yield from self._since_the_beginning()
        yield from _of_drills(proofs.kept(self._folder))

    def _since_the_beginning(self) -> Iterator[Metric]:
        replications = CounterMetricFamily("landfall_replications", "Replications that were committed.", labels=["volume"])
        sent = CounterMetricFamily("landfall_sent_bytes", "Bytes sent, after compression.", labels=["volume"])
        repeated = CounterMetricFamily("landfall_sessions_repeated", "Sessions that broke off and were taken up again.", labels=["volume"])
        failures = CounterMetricFamily("landfall_failures", "Orders that failed, by the error's code.", labels=["volume", "code"])
        for volume, tally in sorted(self._watch.tallies.items()):
            replications.add_metric([volume], tally.replications)
            sent.add_metric([volume], tally.bytes_sent)
            repeated.add_metric([volume], tally.sessions_repeated)
            for code, times in sorted(tally.failures.items()):
                failures.add_metric([volume, code], times)
        yield from (replications, sent, repeated, failures)


def serve(watch: Watch, folder: Path, address: str, port: int) -> None:
    """Serve the metrics over HTTP from now on, in a thread of their own. OSError if the address is not ours or taken."""
    registry = CollectorRegistry()
    registry.register(Exposition(watch, folder))
    start_http_server(port, address, registry)


def text(watch: Watch, folder: Path) -> str:
    """Return the metrics as Prometheus reads them."""
    registry = CollectorRegistry()
    registry.register(Exposition(watch, folder))
    return generate_latest(registry).decode()


def _of_replication(observed: list[tuple[str, Observed]]) -> Iterator[Metric]:
    success = GaugeMetricFamily(
        "landfall_last_success_timestamp_seconds", "When a replication was committed last; 0: never.", labels=["volume"]
    )
    point = GaugeMetricFamily(
        "landfall_replica_point_in_time_seconds", "The point in time that the secondary holds; 0: none.", labels=["volume"]
    )
    due = GaugeMetricFamily("landfall_due_timestamp_seconds", "When the volume is due by its schedule.", labels=["volume"])
    act = GaugeMetricFamily("landfall_act", "What the service does for a volume now.", labels=["volume", "act"])
    pending = GaugeMetricFamily("landfall_notifications_pending", "Notifications that nobody has answered.", labels=["volume"])
    for volume, seen in observed:
        success.add_metric([volume], (seen.last_success_ns or 0) / _SECOND_NS)
        held = seen.facts.standing.secondary.facts
        if held is not None:
            point.add_metric([volume], max((found.taken_ns for found in held.generations), default=0) / _SECOND_NS)
        if seen.facts.due_ns is not None:
            due.add_metric([volume], seen.facts.due_ns / _SECOND_NS)
        for kind in Act:
            act.add_metric([volume, kind], seen.act is kind)
        pending.add_metric([volume], len(seen.facts.standing.pending))
    yield from (success, point, due, act, pending)


def _of_nodes(observed: list[tuple[str, Observed]]) -> Iterator[Metric]:
    labels = ["volume", "node"]
    up = GaugeMetricFamily("landfall_node_answers", "Whether the node answered in the last cycle.", labels=labels)
    role = GaugeMetricFamily("landfall_role", "What the node is to the volume.", labels=[*labels, "role"])
    state = GaugeMetricFamily("landfall_replica_state", "The state of what the node holds.", labels=[*labels, "state"])
    serving = GaugeMetricFamily("landfall_serving", "Whether the node serves the volume.", labels=labels)
    epoch = GaugeMetricFamily("landfall_epoch", "The epoch that the node knows.", labels=labels)
    generations = GaugeMetricFamily("landfall_generations", "Generations that the node holds.", labels=labels)
    for volume, view in ((volume, view) for volume, seen in observed for view in _views(seen)):
        up.add_metric([volume, view.node], not view.problem)
        if view.facts is None:
            continue
        for kind in m.Role:
            role.add_metric([volume, view.node, kind], view.facts.role is kind)
        for condition in m.ReplicaState:
            state.add_metric([volume, view.node, condition], view.facts.state is condition)
        serving.add_metric([volume, view.node], view.facts.serving)
        epoch.add_metric([volume, view.node], view.facts.epoch)
        generations.add_metric([volume, view.node], len(view.facts.generations))
    yield from (up, role, state, serving, epoch, generations)


def _of_transfers(observed: list[tuple[str, Observed]]) -> Iterator[Metric]:
    lag = GaugeMetricFamily("landfall_lag_bytes", "Bytes of open transfers that have not arrived.", labels=["volume"])
    recoverable = GaugeMetricFamily(
        "landfall_would_recover_files", "Changed files of the open transfer that a salvage would recover now.", labels=["volume"]
    )
    changed = GaugeMetricFamily("landfall_changed_files", "Changed files of the open transfer.", labels=["volume"])
    for volume, seen in observed:
        transfers = seen.facts.standing.open_transfers
        lag.add_metric([volume], sum(facts.bytes_total - facts.bytes_arrived for facts in transfers))
        gauge = seen.facts.standing.gauge(transfers[-1]) if transfers else None
        if gauge is not None:
            recoverable.add_metric([volume], gauge.files_whole)
            changed.add_metric([volume], gauge.files_total)
    yield from (lag, recoverable, changed)


def _of_drills(drilled: list[proofs.Proof]) -> Iterator[Metric]:
    """Yield what drills and rehearsals ended in; nothing of what was never held."""
    labels = ["scenario", "volume"]
    success = GaugeMetricFamily(
        "landfall_drill_last_success_timestamp_seconds",
        "When a drill or rehearsal proved last that recovery works; 0: never.",
        labels=labels,
    )
    passed = GaugeMetricFamily("landfall_drill_passed", "Whether the newest one did.", labels=labels)
    for (scenario, volume), newest in sorted(proofs.newest(drilled).items()):
        successes = [one.at_ns for one in drilled if one.passed and (one.scenario, one.volume) == (scenario, volume)]
        success.add_metric([scenario, volume], max(successes, default=0) / _SECOND_NS)
        passed.add_metric([scenario, volume], newest.passed)
    yield from (success, passed)


def _views(seen: Observed) -> tuple[NodeView, NodeView]:
    return seen.facts.standing.primary, seen.facts.standing.secondary
