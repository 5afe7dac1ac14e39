"""The proofs that recovery works: what every drill and every rehearsal ended in, one JSON line each in a file that is only added to.

A failure is kept like a success: what is not proved must be seen as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agent.contract.errors import RequestRefused
from agent.contract.messages import from_document, to_document
from agent.system.files import append_durably
from mgmt.terminal import Sheet
from mgmt.view import moment, span

FILE: Final = "drills.jsonl"
REHEARSAL: Final = "rehearsal"
"""The scenario of a `landfall failover --test`, of a real volume."""


@dataclass(frozen=True, slots=True)
class Proof:
    """How one drill or rehearsal ended."""

    at_ns: int
    scenario: str
    volume: str  # that was rehearsed; empty: a drill's own
    verdict: str
    passed: bool
    rpo_s: float | None  # None: it did not come to that
    rto_s: float | None
    report: str  # the path of the report; empty: there is none
    words: str  # in a sentence


def keep(folder: Path, proof: Proof) -> None:
    """Add a proof to those in ``folder``; durable on return. If we die here a part of its line is left, which is no proof of anything."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    append_durably(folder / FILE, json.dumps(to_document(proof)).encode())


def kept(folder: Path) -> list[Proof]:
    """Return the proofs in ``folder``, oldest first; what cannot be read is none."""
    try:
        lines = (folder / FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [proof for line in lines if (proof := _read(line)) is not None]


def newest(proofs: list[Proof]) -> dict[tuple[str, str], Proof]:
    """Return the newest proof of each scenario and volume."""
    return {(proof.scenario, proof.volume): proof for proof in proofs}


def sheet(proofs: list[Proof]) -> Sheet:
    """Return proofs as a table, one row each."""
    rows = tuple(
        (moment(one.at_ns), one.scenario, one.volume or "-", one.verdict, _span(one.rpo_s), _span(one.rto_s), one.report or one.words)
        for one in proofs
    )
    return Sheet(("held", "scenario", "volume", "verdict", "RPO", "RTO", "report"), rows)


def _span(seconds: float | None) -> str:
    return "-" if seconds is None else span(seconds)


def _read(line: bytes) -> Proof | None:
    try:
        document: Any = json.loads(line)
        return from_document(document, Proof) if isinstance(document, dict) else None
    except (ValueError, RecursionError, RequestRefused):
        return None
