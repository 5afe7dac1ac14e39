"""What happened in a drill, whichever lab it was held in."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.contract import messages as m
from mgmt.drill.evidence import Findings
from mgmt.drill.onlooker import Seen
from mgmt.failover.account import Account
from mgmt.report import LossStatement


@dataclass(slots=True)
class Course:
    """Filled in as it happens."""

    killed_at: float = 0.0  # share of the expected bytes that had passed
    bytes_sent: int = 0  # upstream bytes on the wire, all sessions of the last transfer
    detect_s: float = 0.0
    resumed: list[dict[str, int]] = field(default_factory=list)
    statement: LossStatement | None = None
    failover: Account | None = None
    findings: Findings | None = None
    facts: m.TransferFacts | None = None
    serves: tuple[str, ...] | None = None  # the nodes that serve the volume in the end; None: nobody looked
    client: Seen | None = None
    shortfalls: tuple[str, ...] = ()  # what is not as the scenario expects it
