"""How a volume stands, as `landfall status` shows it."""

from __future__ import annotations

from typing import Any

from agent.contract.messages import to_document
from mgmt.run import Standing, gauge_of
from mgmt.terminal import Sheet
from mgmt.view import bytes_words, moment


def document(standing: Standing) -> dict[str, Any]:
    """Return a standing as one JSON document, with the gauge of each open transfer."""
    transfers = [{**to_document(facts), "gauge": to_document(gauge_of(facts))} for facts in standing.open_transfers]
    return {**to_document(standing), "open_transfers": transfers, "sentence": standing.sentence}


def sheets(standing: Standing) -> list[Sheet]:
    """Return a standing as tables: the nodes, the open transfers, what waits for the operator."""
    entry, nodes = standing.volume, []
    for view in (standing.primary, standing.secondary):
        facts = view.facts
        if facts is None:
            nodes.append((entry.name, view.node, "-", "-", "-", "-", view.problem or "does not hold it"))
            continue
        newest = facts.generations[-1] if facts.generations else None
        nodes.append(
            (
                entry.name,
                view.node,
                facts.role.value,
                facts.state.value,
                f"{newest.id.name} ({newest.kind})" if newest else "-",
                moment(newest.taken_ns) if newest else "-",
                f"serves {facts.mount_point}" if facts.serving else "",
            )
        )
    sheets = [
        Sheet(("volume", "node", "role", "state", "newest generation", "taken", ""), tuple(nodes), f"{entry.name}: {standing.sentence}.")
    ]
    if standing.open_transfers:
        rows = tuple(
            (
                str(facts.id),
                facts.state.value,
                f"{facts.base.name} to {facts.target.name}",
                f"{bytes_words(facts.bytes_arrived)} of {bytes_words(facts.bytes_total)}",
                gauge_of(facts).sentence,
            )
            for facts in standing.open_transfers
        )
        sheets.append(Sheet(("open transfer", "state", "generations", "arrived", "if the primary died now"), rows))
    if standing.pending:
        said = tuple(
            (seen.node, seen.notification.kind, moment(seen.notification.at_ns), seen.notification.message) for seen in standing.pending
        )
        sheets.append(Sheet(("node", "notification", "at", "message"), said))
    return sheets
