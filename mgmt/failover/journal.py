"""The journal of failovers: which steps are done and what came of them, in the catalog, each in one transaction.

A failover is open from its plan to its end; a volume has one open failover at most, which the database itself enforces. A step that was
begun and not done is done again: every step is such that this does no harm (mgmt.failover.steps says why, for each).
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from agent.contract.errors import FailoverBusy
from agent.contract.messages import from_document, to_document
from agent.system.clock import wall_ns
from mgmt.catalog import Catalog
from mgmt.failover.plan import Plan, Step
from mgmt.fencing.proof import Evidence


@dataclass(frozen=True, slots=True)
class StepEntry:
    """A step as the journal has it; ``ended_ns`` is None while it is not done. ``facts`` is what later steps and the account need."""

    step: Step
    begun_ns: int
    ended_ns: int | None
    facts: dict[str, Any]

    @property
    def seconds(self) -> float:
        """How long it took, from its first beginning; 0 while it is not done."""
        return 0.0 if self.ended_ns is None else (self.ended_ns - self.begun_ns) / 1e9


@dataclass(frozen=True, slots=True)
class FailoverEntry:
    """A failover as the journal has it. ``lost_ns`` is the primary's last sign of life, or for a planned one its beginning."""

    id: UUID
    plan: Plan
    operator: str
    lost_ns: int
    begun_ns: int
    ended_ns: int | None
    ending: str  # done, or the code of the error that it was given up for
    steps: tuple[StepEntry, ...]

    def entry(self, step: Step) -> StepEntry | None:
        """Return what the journal has of a step."""
        return next((found for found in self.steps if found.step is step), None)

    @property
    def next_step(self) -> Step | None:
        """The step at which it goes on; None when all are done."""
        done = {found.step for found in self.steps if found.ended_ns is not None}
        return next((step for step in self.plan.steps if step not in done), None)


@dataclass(frozen=True, slots=True)
class Journal:
    """The failovers in a catalog."""

    catalog: Catalog

    def begin(self, plan: Plan, operator: str, lost_ns: int) -> FailoverEntry:
        """Open a failover; FailoverBusy if the volume has one. If we die here it is open, and nothing of it is done."""
        row = (str(uuid4()), str(plan.volume), json.dumps(to_document(plan)), operator, lost_ns, wall_ns())
        try:
            with self.catalog.change() as db:
                db.execute("INSERT INTO failover (id, volume, plan, operator, lost_ns, begun_ns) VALUES (?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError as error:
            raise FailoverBusy(f"a failover of volume {plan.name} is open already") from error
        return self.entry(UUID(row[0]))

    def begin_step(self, failover: UUID, step: Step) -> None:
        """Note that a step is being done; one that was begun before keeps its beginning."""
        with self.catalog.change() as db:
            db.execute("INSERT OR IGNORE INTO failover_step (failover, step, begun_ns) VALUES (?, ?, ?)", (str(failover), step, wall_ns()))

    def end_step(self, failover: UUID, step: Step, facts: dict[str, Any]) -> None:
        """Note that a step is done and what came of it."""
        with self.catalog.change() as db:
            row = (wall_ns(), json.dumps(facts), str(failover), step)
            db.execute("UPDATE failover_step SET ended_ns = ?, facts = ? WHERE failover = ? AND step = ?", row)

    def end(self, failover: UUID, ending: str) -> None:
        """Close a failover; one that is closed stays as it was."""
        with self.catalog.change() as db:
            row = (wall_ns(), ending, str(failover))
            db.execute("UPDATE failover SET ended_ns = ?, ending = ? WHERE id = ? AND ended_ns IS NULL", row)

    def entry(self, failover: UUID) -> FailoverEntry:
        """Return a failover that the journal has."""
        (found,) = self._entries("id = ?", str(failover))
        return found

    def open_entry(self, volume: UUID) -> FailoverEntry | None:
        """Return the volume's open failover."""
        return next(iter(self._entries("volume = ? AND ended_ns IS NULL", str(volume))), None)

    def entries(self, volume: UUID) -> list[FailoverEntry]:
        """Return a volume's failovers, oldest first."""
        return self._entries("volume = ?", str(volume))

    def note_evidence(self, evidence: Evidence) -> None:
        """Keep what a fence said, proof or not."""
        row = (
            str(evidence.volume),
            evidence.node,
            evidence.epoch,
            evidence.agent,
            int(evidence.code),
            evidence.proved,
            evidence.words,
            evidence.at_ns,
            evidence.seconds,
        )
        with self.catalog.change() as db:
            columns = "volume, node, epoch, agent, code, proved, words, at_ns, seconds"
            db.execute(f"INSERT INTO fence ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)  # noqa: S608 - names of ours

    def evidence(self, volume: UUID) -> list[Evidence]:
        """Return what fences said about a volume's nodes, oldest first."""
        columns = "agent, node, volume, epoch, code, proved, words, at_ns, seconds"
        rows = self.catalog.rows(f"SELECT {columns} FROM fence WHERE volume = ? ORDER BY number", str(volume))  # noqa: S608 - names of ours
        return [
            Evidence(agent, node, UUID(about), epoch, code, bool(proved), *said) for agent, node, about, epoch, code, proved, *said in rows
        ]

    def _entries(self, which: str, value: str) -> list[FailoverEntry]:
        columns = "id, plan, operator, lost_ns, begun_ns, ended_ns, ending"
        rows = self.catalog.rows(f"SELECT {columns} FROM failover WHERE {which} ORDER BY begun_ns", value)  # noqa: S608 - words of ours
        found = []
        for number, plan, operator, lost_ns, begun_ns, ended_ns, ending in rows:
            steps = self.catalog.rows(
                "SELECT step, begun_ns, ended_ns, facts FROM failover_step WHERE failover = ? ORDER BY begun_ns, rowid", number
            )
            entries = tuple(StepEntry(Step(step), begun, ended, json.loads(facts)) for step, begun, ended, facts in steps)
            made = from_document(json.loads(plan), Plan)
            found.append(FailoverEntry(UUID(number), made, operator, lost_ns, begun_ns, ended_ns, ending, entries))
        return found
