"""How a volume stands, as `landfall status` shows it."""

from __future__ import annotations

from typing import Any

from agent.contract import messages as m
from agent.contract.messages import to_document
from mgmt.determination import Gauge
from mgmt.run import Standing
from mgmt.terminal import Sheet
from mgmt.view import bytes_words, moment


def document(standing: Standing) -> dict[str, Any]:
    """Return a standing as one JSON document, with the gauge of each open transfer."""
    transfers = [{**to_document(facts), "gauge": _gauge_document(standing.gauge(facts))} for facts in standing.open_transfers]
    return {**to_document(standing), "open_transfers": transfers, "sentence": standing.sentence}


def sheets(standing: Standing) -> list[Sheet]:
    """Return a standing as tables: the nodes, the open transfers, what waits for the operator."""
    entry, nodes = standing.volume, []
    for view in (standing.primary, standing.secondary):
        facts = view.facts
        if facts is None:
            nodes.append((entry.name, view.node, "-", "-", "-", "-", view.problem or "does not hold it"))
            continue
        newest = m.newest(facts.generations) if facts.generations else None
        nodes.append(
            (
                entry.name,
                view.node,
                facts.role.value,
                facts.state.value,
                f"{newest.id.name} ({newest.kind})" if newest else "-",
                moment(newest.taken_ns) if newest else "-",
                f"serves {facts.mount_point} by {' and '.join(facts.exports) or 'no protocol'}" if facts.serving else "",
            )
        )
    sheets = [
        Sheet(("volume", "node", "role", "state", "newest generation", "taken", ""), tuple(nodes), f"{entry.name}: {standing.sentence}.")
    ]
    if standing.open_transfers:
        rows = tuple(_transfer_row(facts, standing.gauge(facts)) for facts in standing.open_transfers)
        sheets.append(Sheet(("open transfer", "state", "generations", "arrived", "if the primary died now"), rows))
    views = (standing.primary, standing.secondary)
    if unreadable := tuple((view.node, found.where, found.reason) for view in views for found in view.unreadable):
        sheets.append(Sheet(("node", "cannot be read", "because"), unreadable))
    if standing.pending:
        said = tuple(
            (seen.node, seen.notification.kind, moment(seen.notification.at_ns), seen.notification.message) for seen in standing.pending
        )
        sheets.append(Sheet(("node", "notification", "at", "message"), said))
    return sheets


def _gauge_document(gauge: Gauge | None) -> dict[str, Any] | None:
    return None if gauge is None else to_document(gauge)


def _transfer_row(facts: m.TransferFacts, gauge: Gauge | None) -> tuple[str, ...]:
    total = bytes_words(facts.bytes_total)
    arrived = f"{bytes_words(facts.bytes_arrived)} of {total}" if gauge else f"not known, of {total}"
    return (
        str(facts.id),
        facts.state.value,
        f"{facts.base.name} to {facts.target.name}",
        arrived,
        gauge.sentence if gauge else "not known",
    )
