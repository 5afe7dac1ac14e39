"""The plan of a failover: pure. Facts in, steps out, or the refusal that says what to do instead.

The order is law: fence, data, address, exports. Giving up goes the other way round: exports, address, role.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from uuid import UUID

from agent.contract import messages as m
from agent.contract.errors import EpochStale, FenceMissing, NodeUnreachable, NoSuchGeneration, PrimaryAlive, SplitBrain, TransferBusy
from agent.contract.identity import GenerationKind
from mgmt.catalog import VolumeEntry


class Life(StrEnum):
    """What two paths say of the primary."""

    ALIVE = "alive"  # its agent answers the management node
    SILENT = "silent"  # its agent does not answer, but somebody still reaches the node
    GONE = "gone"  # neither the management node nor its peer reaches it


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen of the primary: whether its agent answers us, whether we and its peer get a connection to the node."""

    agent: bool
    ours: bool
    peers: bool
    words: str = ""

    @property
    def life(self) -> Life:
        """What follows from it; one witness is never enough for `gone`."""
        if self.agent:
            return Life.ALIVE
        return Life.SILENT if self.ours or self.peers else Life.GONE


class FailoverKind(StrEnum):
    """How a volume changes sides."""

    UNPLANNED = "unplanned"  # the primary is lost
    PLANNED = "planned"  # both nodes live: nothing is lost


class Step(StrEnum):
    """The steps of a failover; their order in a plan is the order of the journal."""

    REPLICATE = "replicate"  # planned: the bulk of it, while clients still work
    QUIESCE = "quiesce"  # planned: exports end, the volume is read-only, its address is given up
    FINISH = "finish"  # planned: what was written since
    VERIFY = "verify"  # planned: both nodes hold the same generation, and the old one has nothing newer
    DEMOTE = "demote"  # planned: the old primary becomes secondary; its own word is the fence
    FENCE = "fence"  # unplanned
    SALVAGE = "salvage"  # unplanned, if a transfer is unfinished
    PROMOTE = "promote"
    ADDRESS = "address"
    SERVE = "serve"
    RECORD = "record"


TAKE_OVER: Final = (Step.PROMOTE, Step.ADDRESS, Step.SERVE, Step.RECORD)
HAND_OVER: Final = (Step.REPLICATE, Step.QUIESCE, Step.FINISH, Step.VERIFY, Step.DEMOTE)
UNFINISHED: Final = frozenset({m.TransferState.WAITING, m.TransferState.RUNNING, m.TransferState.INTERRUPTED})


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator, or the policy, asks for."""

    planned: bool = False
    declare_dead: bool = False  # fail over although the primary is seen: it is fenced first, as always
    force: bool = False  # promote without proof: a split brain is recorded


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a plan is made from. ``source`` is None where the primary does not answer; ``transfers`` are the target's receptions."""

    volume: VolumeEntry
    sight: Sight
    source: m.VolumeFacts | None
    target: m.VolumeFacts
    transfers: tuple[m.TransferFacts, ...]
    fence: str  # of the primary; empty: none
    split_brain: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A failover that is decided. ``epoch`` is the one it promotes to; the fence ends the one before."""

    kind: FailoverKind
    volume: UUID
    name: str
    source: str
    target: str
    epoch: int
    address: str
    fence: str
    transfer: UUID | None  # to salvage
    generation: str  # the newest that the target holds
    forced: bool
    steps: tuple[Step, ...]

    def sentence(self, step: Step) -> str:
        """What a step does, for a person."""
        how = f"by {self.fence}" if self.fence else "no fence is configured: without proof"
        return {
            Step.REPLICATE: f"replicate {self.name} from {self.source} to {self.target} while clients work",
            Step.QUIESCE: f"{self.source} ends its exports, gives up the address and writes no more",
            Step.FINISH: f"replicate what was written since, from {self.source} to {self.target}",
            Step.VERIFY: "prove that both nodes hold the same generation and nothing newer",
            Step.DEMOTE: f"{self.source} becomes secondary at epoch {self.epoch}",
            Step.FENCE: f"fence {self.source} ({how}): it must not write at epoch {self.epoch - 1} or below",
            Step.SALVAGE: f"recover on {self.target} every whole file of transfer {self.transfer}",
            Step.PROMOTE: f"{self.target} becomes primary at epoch {self.epoch}",
            Step.ADDRESS: f"{self.target} takes the address {self.address}" if self.address else "the volume has no address of its own",
            Step.SERVE: f"{self.target} mounts and exports {self.name}",
            Step.RECORD: "record what it took and what was lost",
        }[step]


def plan(facts: Facts, wish: Wish) -> Plan:
    """Return the plan, or raise the refusal.

    PrimaryAlive, FenceMissing, SplitBrain, EpochStale, NoSuchGeneration, NodeUnreachable, TransferBusy.
    """
    volume, target = facts.volume, facts.target
    if not (wish.planned or wish.declare_dead or wish.force):
        _refuse_living(facts)
    _refuse_unfit_target(facts, wish)
    if wish.planned:
        return _planned(facts)
    if not facts.fence and not wish.force:
        raise FenceMissing(f"node {volume.primary} has no fence: nothing could prove that it does not write volume {volume.name} any more")
    unfinished = [found for found in facts.transfers if found.state in UNFINISHED]
    newest = max(unfinished, key=lambda found: (found.target.epoch, found.target.counter), default=None)
    steps = (Step.FENCE, *((Step.SALVAGE,) if newest else ()), *TAKE_OVER)
    return _made(facts, FailoverKind.UNPLANNED, target.epoch + 1, newest.id if newest else None, wish.force, steps)


def _planned(facts: Facts) -> Plan:
    volume = facts.volume
    if facts.sight.life is not Life.ALIVE or facts.source is None:
        fix = f"`landfall failover {volume.name}` without --planned fences it and recovers what arrived."
        raise NodeUnreachable(
            f"a planned failover needs both nodes, and {volume.primary} does not answer", cause=facts.sight.words, fix=fix
        )
    salvaged = [found.id for found in facts.transfers if found.state is m.TransferState.SALVAGED]
    if salvaged:
        raise TransferBusy(
            f"{volume.secondary} holds what was salvaged of transfer {salvaged[0]}, and {volume.primary} lives",
            fix=f"`landfall salvage {volume.name} --undo` makes its transfer resumable again.",
        )
    return _made(facts, FailoverKind.PLANNED, facts.target.epoch + 1, None, False, (*HAND_OVER, *TAKE_OVER))


def _made(facts: Facts, kind: FailoverKind, epoch: int, transfer: UUID | None, forced: bool, steps: tuple[Step, ...]) -> Plan:
    volume = facts.volume
    fence = "" if kind is FailoverKind.PLANNED else facts.fence
    newest = m.newest(facts.target.generations).id.name
    return Plan(
        kind, volume.id, volume.name, volume.primary, volume.secondary, epoch, volume.address, fence, transfer, newest, forced, steps
    )


def _refuse_unfit_target(facts: Facts, wish: Wish) -> None:
    volume, target = facts.volume, facts.target
    if facts.split_brain and not wish.force:
        raise SplitBrain(f"volume {volume.name} is recorded as a split brain: {volume.secondary} may hold what nobody else does")
    if target.role is m.Role.PRIMARY:
        raise EpochStale(
            f"{volume.secondary} takes itself for the primary of volume {volume.name}, at epoch {target.epoch}",
            fix=f"`landfall failback {volume.name}` keeps what it holds and lets it follow {volume.primary}.",
        )
    known = max(volume.epoch, facts.source.epoch if facts.source else 0)
    if target.epoch < known:
        raise EpochStale(
            f"{volume.secondary} stands at epoch {target.epoch} of volume {volume.name}, which is at epoch {known}",
            fix=f"`landfall replicate {volume.name}` brings it up, if {volume.primary} lives.",
        )
    if m.newest(target.generations).kind is GenerationKind.EMPTY and not wish.planned:
        raise NoSuchGeneration(f"{volume.secondary} holds no generation of volume {volume.name}: it was never replicated")


def _refuse_living(facts: Facts) -> None:
    volume, life = facts.volume, facts.sight.life
    if life is Life.ALIVE:
        raise PrimaryAlive(
            f"{volume.primary} answers",
            fix=f"`landfall failover {volume.name} --planned` loses nothing; `--declare-dead` gives it up, and fences it first.",
        )
    if life is Life.SILENT:
        raise PrimaryAlive(
            f"{volume.primary}'s agent does not answer, but the node is not gone: it may still serve",
            cause=facts.sight.words,
            fix=f"Look at {volume.primary} and its network; `--declare-dead` gives it up, and fences it first.",
        )
