"""One cycle for each volume, or set that is replicated together: both nodes are asked, the decision is made, what it says is done, and the
history has the sentence."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol
from uuid import UUID

from agent.contract.errors import FailoverBusy, LandfallError
from agent.system.clock import monotonic_s, wall_ns
from mgmt import run
from mgmt.catalog import VolumeEntry
from mgmt.failover.driver import failover
from mgmt.failover.journal import Journal
from mgmt.failover.plan import Sight, Step, Wish
from mgmt.failover.witness import look
from mgmt.run import Site, Standing, leases
from mgmt.watch.decision import Act, Decision, Facts, Failure, Member, Unfinished, decide, in_step, is_at_rest
from mgmt.watch.schedule import next_due_ns

CYCLE: Final = "cycle"
"""The kind of history entries that come from here."""


class Starter(Protocol):
    """Runs a job beside the cycles: a thread in the service, at once in a simulation."""

    def __call__(self, job: Callable[[], None], name: str) -> None: ...


@dataclass(slots=True)
class _Memory:
    """What is remembered of a volume between cycles, and forgotten with the service."""

    silent_since_s: float | None = None
    failure: Failure | None = None
    working: str = ""  # what a job beside the cycles is doing


@dataclass(frozen=True, slots=True)
class Observed:
    """A volume as the last cycle saw it."""

    facts: Facts
    act: Act
    last_success_ns: int | None


@dataclass(slots=True)
class Tally:
    """What happened to a volume since the service began; the figures only grow."""

    replications: int = 0
    bytes_sent: int = 0
    sessions_repeated: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # by code of the error


@dataclass(slots=True)
class Watch:
    """The volumes of one management node under watch. ``open_site`` gives each job its own connections."""

    open_site: Callable[[], Site]
    start: Starter
    now_ns: Callable[[], int] = wall_ns
    now_s: Callable[[], float] = monotonic_s
    observed: dict[str, Observed] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    _memory: dict[UUID, _Memory] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cycle(self, site: Site) -> list[str]:
        """Return what was done for each volume and why, one sentence each; all are in the history."""
        entries = run.list_volumes(site)
        said = [sentence for members in _sets(entries) for sentence in self._set(site, members)]
        for gone in self.observed.keys() - {entry.name for entry in entries}:
            del self.observed[gone]
        return said

    def _set(self, site: Site, entries: list[VolumeEntry]) -> list[str]:
        """Do for volumes that are replicated together, or for one that is by itself, what is to be done."""
        with self._lock:
            working = [self._memory.setdefault(entry.id, _Memory()).working for entry in entries]
        found = [self._decided(site, entry, entries, words) for entry, words in zip(entries, working, strict=True)]
        members = tuple(member for member, _ in found)
        decisions = in_step(members)
        if any(not member.hinders and decision.act is Act.REPLICATE for member, decision in zip(members, decisions, strict=True)):
            self._begin(entries, decisions, lambda: self._replicate(entries))
        said = []
        for entry, words, (_, facts), decision in zip(entries, working, found, decisions, strict=True):
            if facts is not None:
                self.observed[entry.name] = Observed(facts, decision.act, site.catalog.last_committed_ns(entry.id))
            if not words and decision.act is Act.FAILOVER:
                self._begin([entry], (decision,), partial(self._fail_over, entry))
            elif decision.act is Act.SERVE:
                decision = _serve(site, entry, decision)
            said.append(self._say(site, entry, decision.sentence))
        return said

    def _decided(self, site: Site, entry: VolumeEntry, entries: list[VolumeEntry], working: str) -> tuple[Member, Facts | None]:
        """Return what is to be done for a volume of a set, and by which facts; what a job is doing goes on."""
        try:
            facts = self._facts(site, entry, entries)
        except LandfallError as error:
            return Member(entry.name, Decision(Act.HOLD, f"holds still: {error}"), hinders=True), None
        decision = Decision(Act.REPLICATE, working) if working else decide(facts)
        return Member(entry.name, decision, hinders=bool(working) or not (decision.act is Act.REPLICATE or is_at_rest(facts))), facts

    def _facts(self, site: Site, entry: VolumeEntry, entries: list[VolumeEntry]) -> Facts:
        memory = self._memory[entry.id]
        standing = run.standing(site, entry.name)
        primary_answers = standing.primary.facts is not None or not standing.primary.problem
        if primary_answers:
            memory.silent_since_s = None
        elif memory.silent_since_s is None:
            memory.silent_since_s = self.now_s()
        silent_s = 0.0 if memory.silent_since_s is None else self.now_s() - memory.silent_since_s
        if primary_answers:
            _renew_lease(site, standing)
        return Facts(
            now_ns=self.now_ns(),
            standing=standing,
            due_ns=_due_ns(site, entries),
            failure=memory.failure,
            silent_s=silent_s,
            patience_s=site.inventory.silence_limit_s,
            seen=_look(site, entry) if silent_s >= site.inventory.silence_limit_s else None,
            automatic=site.inventory.automatic_failover,
            failover=_unfinished(site, entry),
            term=site.catalog.term,
        )

    def _begin(self, entries: list[VolumeEntry], decisions: tuple[Decision, ...], work: Callable[[], None]) -> None:
        """Let a job do ``work`` beside the cycles, for all of these volumes."""
        memories = [self._memory[entry.id] for entry in entries]

        def job() -> None:
            failure = None
            try:
                work()
            except Exception as error:  # whatever it is, the next cycle must know of it and try again
                known = error if isinstance(error, LandfallError) else LandfallError(f"{type(error).__name__}: {error}")
                times = max(memory.failure.times if memory.failure else 0 for memory in memories)
                failure = Failure(known, self.now_ns(), 1 + times)
                for entry in entries:
                    self._tally(entry).failures[known.code] += 1
            finally:
                with self._lock:
                    for memory in memories:
                        memory.failure, memory.working = failure, ""

        with self._lock:
            for memory, decision in zip(memories, decisions, strict=True):
                memory.working = decision.sentence
        self.start(job, f"{decisions[0].act} {' '.join(entry.name for entry in entries)}")

    def _fail_over(self, entry: VolumeEntry) -> None:
        with self.open_site() as site:
            failover(site, entry.name, Wish())
            self._say(site, entry, f"failed over to {entry.secondary}")

    def _replicate(self, entries: list[VolumeEntry]) -> None:
        names = tuple(entry.name for entry in entries)
        with self.open_site() as site:
            done = run.replicate_together(site, names)[1] if len(entries) > 1 else (run.replicate(site, *names),)
            for entry in entries:
                for one in (one for one in done if one.target.volume == entry.id):
                    tally = self._tally(entry)
                    tally.replications += 1
                    tally.bytes_sent += one.sent.bytes_sent
                    tally.sessions_repeated += one.sessions - 1
                    self._say(site, entry, f"replicated {one.target.name} in {one.seconds:.1f} s, {one.sent.bytes_sent:,} bytes sent")

    def _tally(self, entry: VolumeEntry) -> Tally:
        return self.tallies.setdefault(entry.name, Tally())

    def _say(self, site: Site, entry: VolumeEntry, sentence: str) -> str:
        sentence = f"{sentence.rstrip('.')}."
        site.catalog.note(entry.id, CYCLE, sentence, self.now_ns())
        return f"{entry.name} {sentence}"


def _sets(entries: list[VolumeEntry]) -> list[list[VolumeEntry]]:
    """Return the volumes that are replicated together, and each other one by itself.

    After a failover of one the others have another primary: until it is back, better by itself than not at all.
    """
    found: dict[tuple[str, str], list[VolumeEntry]] = {}
    for entry in entries:
        found.setdefault((entry.together, entry.primary) if entry.together else ("", entry.name), []).append(entry)
    return list(found.values())


def _due_ns(site: Site, entries: list[VolumeEntry]) -> int | None:
    """When the first of a set is due again after they were last tried; at once if one never was."""
    schedules = {entry.schedule for entry in entries if entry.schedule}
    if not schedules:
        return None
    last_ns = [site.catalog.last_begun_ns(entry.id) for entry in entries]
    begun_ns = [moment_ns for moment_ns in last_ns if moment_ns is not None]
    if len(begun_ns) < len(entries):
        return 0
    due = [next_due_ns(schedule, min(begun_ns) // 10**9) for schedule in schedules]
    return min((moment_ns for moment_ns in due if moment_ns is not None), default=None)


def _serve(site: Site, entry: VolumeEntry, decision: Decision) -> Decision:
    try:
        run.serve(site, entry.name, node=entry.primary)
    except LandfallError as error:
        return Decision(Act.HOLD, f"holds still: {error}")
    return decision


def _look(site: Site, entry: VolumeEntry) -> Sight | None:
    try:
        return look(site, entry.primary, entry.secondary)
    except LandfallError:
        return None  # the second witness cannot be asked


def _renew_lease(site: Site, standing: Standing) -> None:
    """Let a primary that is fenced by its lease serve on for a while; never during a failover, which waits for the lease to end.

    What cannot be renewed now is renewed in the next cycle, or ends, as it should.
    """
    entry, facts = standing.volume, standing.primary.facts
    if not leases.is_leased(site, entry.primary) or facts is None or not facts.serving:
        return
    with suppress(LandfallError), site.alone(entry.id):
        if not site.catalog.failover_open(entry.id):
            leases.renew(site, entry, entry.primary, facts.epoch)


def _unfinished(site: Site, entry: VolumeEntry) -> Unfinished | None:
    """Return the failover that is not done, and whether somebody is at it."""
    current = Journal(site.catalog).open_entry(entry.id)
    if current is None:
        return None
    try:
        with site.alone(entry.id):
            is_worked_on = False
    except FailoverBusy:
        is_worked_on = True
    return Unfinished(current.plan.kind, current.next_step or Step.RECORD, is_worked_on)
