"""What a failover cost: how long the volume was away, and how much of its time was lost. Pure; everything else prints it."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from mgmt.failover.journal import FailoverEntry, StepEntry
from mgmt.failover.plan import HAND_OVER, FailoverKind, Step


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds from the loss to the served volume. A planned failover's begin when clients are cut off."""

    detect: float  # from the primary's last sign to the decision
    fence: float
    determine: float
    recover: float
    serve: float  # promotion, address, exports
    waited: float  # while nobody worked on it: between a failover that was broken off and its resumption

    @property
    def total(self) -> float:
        """The recovery time: all of it."""
        return self.detect + self.fence + self.determine + self.recover + self.serve + self.waited


@dataclass(frozen=True, slots=True)
class Lost:
    """How far back in time the served content is, of the volume and of its files: the recovery point.

    In seconds before the old primary was known to be fenced: up to then it may have taken changes, and no more are lost than this says.
    """

    volume: float  # of the oldest changed file
    recovered: float  # of files that are as the newest generation has them
    others: float  # of files that changed since the generation before, and are as that one has them; the same where there are none


@dataclass(frozen=True, slots=True)
class Account:
    """One failover, done."""

    id: UUID
    volume: UUID
    name: str
    kind: FailoverKind
    source: str
    target: str
    epoch: int
    address: str
    mount_point: str  # on the target
    generation: str  # that is served
    transfer: UUID | None  # that was salvaged
    files_changed: int
    files_recovered: int
    fence: str
    proof: str
    split_brain: bool
    operator: str
    served_ns: int
    seconds: Phases
    lost: Lost

    @property
    def sentence(self) -> str:
        """It in one sentence, for the history."""
        if self.kind is FailoverKind.PLANNED:
            return f"{self.target} took {self.name} over from {self.source} as planned, without loss: away for {self.seconds.total:.1f} s"
        what = (
            f"{self.files_recovered:,} of {self.files_changed:,} changed files recovered" if self.transfer else f"as of {self.generation}"
        )
        proof = "WITHOUT PROOF that it is fenced: split brain" if self.split_brain else f"fenced by {self.fence}"
        return (
            f"{self.target} took {self.name} over from {self.source} ({proof}): {what}; "
            f"served after {self.seconds.total:.1f} s, up to {self.lost.volume:.1f} s of changes lost"
        )


def account(entry: FailoverEntry, lost_ns: int | None = None) -> Account:
    """Return the account of a failover whose volume is served. ``lost_ns``: when the primary was lost, for who knows it to the moment."""
    plan = entry.plan
    done = {found.step: found for found in entry.steps if found.ended_ns is not None}
    served = done[Step.SERVE]
    salvage = done[Step.SALVAGE].facts if Step.SALVAGE in done else {}
    fence = (done.get(Step.FENCE) or done[Step.DEMOTE]).facts
    served_ns = served.ended_ns or 0
    seconds = (
        _planned(done, served_ns)
        if plan.kind is FailoverKind.PLANNED
        else _unplanned(entry, done, salvage, served_ns, entry.lost_ns if lost_ns is None else lost_ns)
    )
    return Account(
        entry.id,
        plan.volume,
        plan.name,
        plan.kind,
        plan.source,
        plan.target,
        plan.epoch,
        plan.address,
        served.facts["mount_point"],
        done[Step.PROMOTE].facts["generation"],
        plan.transfer if salvage.get("generation") else None,
        salvage.get("changed", 0),
        salvage.get("recovered", 0),
        plan.fence or ("demotion" if plan.kind is FailoverKind.PLANNED else ""),
        fence["words"],
        not fence["proved"],
        entry.operator,
        served_ns,
        seconds,
        _lost(entry, salvage, done, lost_ns),
    )


def _unplanned(entry: FailoverEntry, done: dict[Step, StepEntry], salvage: dict[str, float], served_ns: int, lost_ns: int) -> Phases:
    detect = max(0.0, (entry.begun_ns - lost_ns) / 1e9)
    fence = done[Step.FENCE].seconds
    determine, recover = salvage.get("determine_s", 0.0), salvage.get("recover_s", 0.0)
    serve = sum(done[step].seconds for step in (Step.PROMOTE, Step.ADDRESS, Step.SERVE))
    whole = (served_ns - lost_ns) / 1e9
    return Phases(detect, fence, determine, recover, serve, max(0.0, whole - detect - fence - determine - recover - serve))


def _planned(done: dict[Step, StepEntry], served_ns: int) -> Phases:
    recover = done[Step.FINISH].seconds + done[Step.VERIFY].seconds
    fence = done[Step.QUIESCE].seconds + done[Step.DEMOTE].seconds
    serve = sum(done[step].seconds for step in (Step.PROMOTE, Step.ADDRESS, Step.SERVE))
    whole = (served_ns - done[Step.QUIESCE].begun_ns) / 1e9
    return Phases(0.0, fence, 0.0, recover, serve, max(0.0, whole - fence - recover - serve))


def _lost(entry: FailoverEntry, salvage: dict[str, int], done: dict[Step, StepEntry], lost_ns: int | None) -> Lost:
    if HAND_OVER[0] in entry.plan.steps:
        return Lost(0.0, 0.0, 0.0)
    last_write_ns = (done[Step.FENCE].ended_ns or 0) if lost_ns is None else lost_ns

    def before(taken_ns: int) -> float:
        return max(0.0, (last_write_ns - taken_ns) / 1e9)

    if not salvage.get("generation"):
        taken = before(done[Step.PROMOTE].facts["taken_ns"])
        return Lost(taken, taken, taken)
    recovered, others = before(salvage["target_taken_ns"]), before(salvage["base_taken_ns"])
    return Lost(recovered if salvage["complete"] else others, recovered, recovered if salvage["complete"] else others)
