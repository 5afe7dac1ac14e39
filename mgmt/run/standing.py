"""How a volume stands: what both nodes say of it, its open transfers with their gauge, and what waits for the operator."""

from __future__ import annotations

from dataclasses import dataclass

from agent.contract import messages as m
from agent.contract.errors import LandfallError, NodeUnreachable
from agent.contract.identity import GenerationKind
from mgmt.catalog import SeenNotification, VolumeEntry
from mgmt.determination import Gauge
from mgmt.run import notices
from mgmt.run.replication import OPEN_STATES
from mgmt.run.site import Site


@dataclass(frozen=True, slots=True)
class NodeView:
    """What one node says of a volume; ``problem`` says why it says nothing."""

    node: str
    facts: m.VolumeFacts | None
    transfers: tuple[m.TransferFacts, ...]
    problem: str = ""
    unreadable: tuple[m.Unreadable, ...] = ()  # of this volume, or of nobody knows which
    troubles: tuple[str, ...] = ()  # with the disks below it
    term: int = 0  # the highest that the node has heard of


@dataclass(frozen=True, slots=True)
class Standing:
    """A volume's standing. ``pending`` are the notifications that nobody has answered yet."""

    volume: VolumeEntry
    primary: NodeView
    secondary: NodeView
    pending: tuple[SeenNotification, ...]

    @property
    def open_transfers(self) -> list[m.TransferFacts]:
        """The transfers that are not committed, as the secondary knows them; the primary's word where the secondary has none."""
        known = {facts.id for facts in self.secondary.transfers}
        listed = [*self.secondary.transfers, *(facts for facts in self.primary.transfers if facts.id not in known)]
        return [facts for facts in listed if facts.state in OPEN_STATES]

    def gauge(self, facts: m.TransferFacts) -> Gauge | None:
        """What would survive of an open transfer; None where only the secondary could say it, and does not answer."""
        return None if facts.sending and self.secondary.facts is None else gauge_of(facts)

    @property
    def never_replicated(self) -> bool:
        """Whether the secondary holds the empty generation alone."""
        held = self.secondary.facts.generations if self.secondary.facts else ()
        return all(facts.kind is GenerationKind.EMPTY for facts in held)

    @property
    def sentence(self) -> str:
        """The standing in one sentence, and what to do if there is something to do; trouble with a disk stands before it."""
        troubles = [f"{view.node}: {trouble}" for view in (self.primary, self.secondary) for trouble in view.troubles]
        return "; ".join([*troubles, self._sentence])

    @property
    def _sentence(self) -> str:
        name, behind = self.volume.name, self.open_transfers
        salvaged = [facts for facts in self.secondary.transfers if facts.state is m.TransferState.SALVAGED]
        if self.secondary.facts is None:
            return f"{self.secondary.node} says nothing of {name}: {self.secondary.problem or 'it does not hold it'}"
        if salvaged:
            return f"{self.secondary.node} holds what was salvaged of transfer {salvaged[-1].id}"
        if self.primary.facts is None and behind:
            return f"{self.primary.node} does not answer: if it stays so, `landfall failover {name}` brings {gauge_of(behind[-1]).sentence}"
        if behind:
            return f"a transfer is {behind[-1].state}: if {self.primary.node} died now, {gauge_of(behind[-1]).sentence} would survive"
        if self.never_replicated:
            gone = f"{self.primary.node} says nothing of it ({self.primary.problem}), and " if self.primary.facts is None else ""
            return f"{gone}{self.secondary.node} holds nothing of it: it was never replicated"
        if self.primary.facts is None:
            return f"{self.primary.node} does not answer; {self.secondary.node} holds the last generation that was committed"
        if self.secondary.facts.role is m.Role.PRIMARY and self.primary.facts.epoch > self.secondary.facts.epoch:
            return (
                f"{self.secondary.node} is back, and was overtaken at epoch {self.primary.facts.epoch}: `landfall failback {name}` keeps "
                "what it holds and lets it follow"
            )
        if self.secondary.facts.role is m.Role.PRIMARY:
            return f"{self.secondary.node} has taken it over; what {self.primary.node} holds is older and is not replicated any more"
        if not (self.primary.facts.serving or self.secondary.facts.serving):
            return f"nothing is open, and no node serves it: `landfall serve {name} --node {self.primary.node}` does"
        return "nothing is open"


def standing(site: Site, name: str) -> Standing:
    """Return how a volume stands now, asked of both nodes; notifications are fetched on the way."""
    entry = site.catalog.volume(name)
    notices.collect(site)
    primary, secondary = _view(site, entry, entry.primary), _view(site, entry, entry.secondary)
    return Standing(entry, primary, secondary, tuple(site.catalog.notifications(entry.id, pending_only=True)))


def gauge_of(facts: m.TransferFacts) -> Gauge:
    """Return the gauge as the agent keeps it."""
    return Gauge(facts.files_whole, facts.files_total, facts.bytes_arrived, facts.bytes_total)


def _view(site: Site, entry: VolumeEntry, name: str) -> NodeView:
    try:
        held = site.node(name).ask(m.ListVolumes(), limit_s=30)
        listed = site.node(name).ask(m.ListTransfers(), limit_s=30).transfers
    except NodeUnreachable as error:
        return NodeView(name, None, (), error.message)
    except LandfallError as error:
        return NodeView(name, None, (), str(error))
    facts = next((found for found in held.volumes if found.id == entry.id), None)
    unreadable = tuple(found for found in held.unreadable if found.volume in {entry.id, None})
    problem = "its record of it cannot be read" if facts is None and unreadable else ""
    if facts is not None and not held.troubles:
        site.catalog.mark_over(name, entry.id, notices.DEVICE_CHANGED)
    transfers = tuple(found for found in listed if found.volume == entry.id)
    return NodeView(name, facts, transfers, problem, unreadable, held.troubles, held.term)
