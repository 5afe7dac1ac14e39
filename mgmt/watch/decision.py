"""What is to be done for a volume now: a pure function of what both nodes said, what was tried, and the clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from agent.contract import messages as m
from agent.contract.errors import LandfallError, Retry
from mgmt.failover.plan import FailoverKind, Life, Sight, Step
from mgmt.run import Standing
from mgmt.view import moment

FIRST_PAUSE_S: Final = 15.0
LONGEST_PAUSE_S: Final = 900.0


class Act(StrEnum):
    """What a cycle does for a volume. Waiting is an act of its own, and so is holding still until an operator decides."""

    REPLICATE = "replicate"
    SERVE = "serve"
    FAILOVER = "failover"
    WAIT = "wait"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do and why, in one sentence without its subject."""

    act: Act
    sentence: str


@dataclass(frozen=True, slots=True)
class Failure:
    """How the last order for a volume failed, and how many did in a row."""

    error: LandfallError
    at_ns: int
    times: int

    @property
    def again_ns(self) -> int:
        """When it may be tried again, if its class allows that at all."""
        return self.at_ns + int(min(FIRST_PAUSE_S * 2 ** (self.times - 1), LONGEST_PAUSE_S) * 1e9)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A failover that was begun and is not done."""

    kind: FailoverKind
    step: Step  # at which it goes on
    is_worked_on: bool  # a command is at it now


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of a volume in one cycle."""

    now_ns: int
    standing: Standing
    due_ns: int | None  # when it is due; None: nobody laid down when
    failure: Failure | None
    silent_s: float  # for how long the primary has not answered; 0 while it does
    patience_s: float  # how long it may be silent
    seen: Sight | None  # what both paths say of a primary that was silent for too long; None: the other could not be asked
    automatic: bool  # whether a failover wants no operator
    failover: Unfinished | None = None
    term: int = 0  # of this management node


@dataclass(frozen=True, slots=True)
class Member:
    """A volume of a set that is replicated together. ``hinders``: as long as that is so, none of the set can be."""

    name: str
    decision: Decision
    hinders: bool


def decide(facts: Facts) -> Decision:
    """Return the first that applies; what only waits says so where nobody serves the volume, and nobody but an operator can end that."""
    if decision := _pressing(facts):
        return decision
    decision, primary = _scheduled(facts), facts.standing.primary
    if decision.act is Act.WAIT and primary.facts is not None and primary.facts.rests:
        told = f"{primary.node} was told to stop serving it, `landfall serve {facts.standing.volume.name}` lets it"
        return Decision(Act.WAIT, f"{decision.sentence}; {told}")
    return decision


def is_at_rest(facts: Facts) -> bool:
    """Whether there is nothing about a volume but its schedule."""
    return _pressing(facts) is None


def in_step(members: tuple[Member, ...]) -> tuple[Decision, ...]:
    """Return what is done for the volumes of a set: all that is to be replicated is, together, or nothing of it is.

    What has arrived waits for what has not: the set is of one moment only when all of it is on the other node.
    """
    hindering = next((member for member in members if member.hinders), None)
    sent = [member for member in members if not member.hinders and member.decision.act is Act.REPLICATE]
    found = []
    for member in members:
        decision = member.decision
        if member in sent and hindering is not None:
            decision = _behind(hindering)
        elif member in sent and len(members) > 1:
            others = " and ".join(other.name for other in members if other is not member)
            decision = Decision(Act.REPLICATE, f"{decision.sentence}, together with {others}")
        elif not member.hinders and sent and hindering is None and member not in sent:
            decision = _behind(sent[0])
        found.append(decision)
    return tuple(found)


def _behind(other: Member) -> Decision:
    return Decision(Act.WAIT, f"waits for {other.name}, which {other.decision.sentence}")


def _pressing(facts: Facts) -> Decision | None:
    """What comes before the schedule."""
    found = (look(facts) for look in (_overruled, _contested, _refused, _silent, _unconfirmed, _unfinished))
    return next((decision for decision in found if decision), None)


def _overruled(facts: Facts) -> Decision | None:
    """Another management node took over: a node that heard of it takes no order of this one."""
    heard = max(facts.standing.primary.term, facts.standing.secondary.term)
    if heard <= facts.term:
        return None
    return Decision(Act.WAIT, f"waits: another management node is in charge, in term {heard}; `landfall takeover` puts this one in charge")


def _contested(facts: Facts) -> Decision | None:
    """A failover is not done: until it is, nobody may be let serve, since what it fenced is fenced only as long as nobody does."""
    if facts.failover is None:
        return None
    name, step = facts.standing.volume.name, facts.failover.step
    if facts.failover.is_worked_on:
        return Decision(Act.WAIT, f"waits: a failover is at the step {step}")
    is_planned = facts.failover.kind is FailoverKind.PLANNED
    if facts.automatic and not is_planned:
        return _unless_failed(facts, f"goes on with the failover that broke off at the step {step}", Act.FAILOVER)
    command = f"`landfall failover {name}{' --planned' if is_planned else ''}` goes on with it"
    return Decision(Act.HOLD, f"holds still: a failover broke off at the step {step}; {command}")


def _refused(facts: Facts) -> Decision | None:
    """What only an operator can decide, whoever answers."""
    standing, name = facts.standing, facts.standing.volume.name
    one, other = standing.primary.node, standing.secondary.node
    if any(found.state is m.TransferState.SALVAGED for found in standing.secondary.transfers):
        choice = f"`landfall failover {name}` serves it, `landfall salvage {name} --undo` takes it back"
        return Decision(Act.HOLD, f"holds still: {other} holds a salvaged generation; {choice}")
    if standing.secondary.facts is not None and standing.secondary.facts.role is m.Role.PRIMARY:
        if standing.primary.facts is None:
            return Decision(Act.WAIT, f"waits for {one} to come back: {other} has taken the volume over")
        if standing.secondary.facts.epoch < standing.primary.facts.epoch:
            return Decision(Act.HOLD, f"holds still: {other} is back and was overtaken; `landfall failback {name}`")
        return Decision(Act.HOLD, f"holds still: {other} has taken the volume over, and {one} is back; `landfall failback {name}`")
    return None


def _silent(facts: Facts) -> Decision | None:
    """A node does not answer."""
    standing, name = facts.standing, facts.standing.volume.name
    one, other = standing.primary.node, standing.secondary.node
    if standing.primary.facts is None and not standing.primary.problem:
        return Decision(Act.HOLD, f"holds still: {one} answers and does not hold the volume")
    if standing.primary.facts is None:
        if facts.silent_s < facts.patience_s:
            return Decision(Act.WAIT, f"waits: {one} does not answer, and may be silent for {facts.patience_s:g} s")
        if standing.secondary.facts is None:
            return Decision(Act.WAIT, f"waits: neither {one} nor {other} answers")
        if facts.seen is None or facts.seen.life is not Life.GONE:
            said = facts.seen.words if facts.seen else f"{other} could not be asked"
            return Decision(Act.HOLD, f"holds still: {one} does not answer, and is not gone ({said})")
        if facts.automatic:
            return Decision(Act.FAILOVER, f"fails over: {one} answers neither here nor to {other}")
        return Decision(Act.HOLD, f"holds still: {one} does not answer; `landfall failover {name}` is an operator's to say")
    if standing.secondary.facts is None:
        return Decision(Act.WAIT, f"waits: {other} does not answer ({standing.secondary.problem or 'it does not hold the volume'})")
    return None


def _unconfirmed(facts: Facts) -> Decision | None:
    """The primary came up and serves nothing until it is told that no other node was promoted meanwhile; both have answered here."""
    one, other = facts.standing.primary, facts.standing.secondary
    if one.facts is None or other.facts is None or one.facts.confirmed or one.facts.role is not m.Role.PRIMARY:
        return None
    if other.facts.epoch > one.facts.epoch:
        return Decision(Act.HOLD, f"holds still: {other.node} is at epoch {other.facts.epoch}, {one.node} at {one.facts.epoch}")
    return Decision(Act.SERVE, f"lets {one.node} serve: it came up, and {other.node} was not promoted meanwhile")


def _unfinished(facts: Facts) -> Decision | None:
    """A transfer runs, or broke off and can go on."""
    transfers = facts.standing.open_transfers
    if not transfers:
        return None
    newest = transfers[-1]
    if newest.state is m.TransferState.RUNNING:
        return Decision(Act.WAIT, f"waits: {newest.target.name} is being sent")
    return _unless_failed(facts, f"goes on with {newest.target.name}, which broke off")


def _scheduled(facts: Facts) -> Decision:
    if facts.due_ns is None:
        return Decision(Act.WAIT, "waits to be told: it has no schedule")
    if facts.now_ns < facts.due_ns:
        return Decision(Act.WAIT, f"waits until {moment(facts.due_ns)}")
    since = f"was due at {moment(facts.due_ns)}" if facts.due_ns else "was never replicated"
    return _unless_failed(facts, f"replicates: it {since}")


def _unless_failed(facts: Facts, sentence: str, act: Act = Act.REPLICATE) -> Decision:
    """Return the order (to replicate, where it is not named), unless the last one failed in a way that wants a pause, or a person."""
    failed = facts.failure
    if failed is None:
        return Decision(act, sentence)
    if failed.error.retry in {Retry.OPERATOR, Retry.NEVER}:
        # What was due again since may meet other circumstances; before that, nothing has changed.
        if facts.due_ns is None or facts.due_ns <= failed.at_ns or facts.now_ns < facts.due_ns:
            return Decision(Act.HOLD, f"holds still: {failed.error}")
    elif facts.now_ns < failed.again_ns:
        return Decision(Act.WAIT, f"waits until {moment(failed.again_ns)} to try again: {failed.error.message.rstrip('.')}")
    return Decision(act, sentence)
