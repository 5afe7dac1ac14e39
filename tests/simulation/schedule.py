"""What happens when, from a seed: the same for the simulation and for a lab."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Final

FAULTS_S: Final = 120.0
"""For so long something may go wrong; after that everything is mended, and it has to come to rest."""

NAS: Final = ("nas1", "nas2")
MGMT: Final = ("mgmt1", "mgmt2")


class Act(StrEnum):
    """What can happen."""

    CUT = "cut"  # a link, for some seconds
    CUT_ONE_WAY = "cut-one-way"
    KILL_AGENT = "kill-agent"  # it is started again after some seconds
    STOP_AGENT = "stop-agent"  # SIGSTOP; what its kernel serves goes on
    KILL_KEEPER = "kill-keeper"
    POWER_CUT = "power-cut"  # of a node, which comes up again after some seconds
    FREEZE = "freeze"  # a whole node stands still, its clock perhaps with it
    KILL_WATCH = "kill-watch"
    STOP_WATCH = "stop-watch"
    DIE_AT = "die-at"  # the next process on a node that passes a certain failpoint dies there
    STOP_AT = "stop-at"  # or stands still there, for some seconds
    CUT_AT = "cut-at"  # or is cut off from everybody there
    CLOCK_JUMP = "clock-jump"  # of a wall clock
    FENCE_FAILS = "fence-fails"  # the next call of it
    FAIL_OVER = "fail-over"  # an operator's word, on a management node
    DECLARE_DEAD = "declare-dead"
    PLANNED = "planned"
    FORCE = "force"
    SERVE = "serve"
    REPLICATE = "replicate"
    FAIL_BACK = "fail-back"
    RESYNC = "resync"
    TAKE_OVER = "take-over"  # another management node is put in charge


@dataclass(frozen=True, slots=True)
class Happening:
    """One thing that happens. ``detail`` is the failpoint, or the code of a fence."""

    at_s: float
    act: Act
    node: str = ""
    other: str = ""
    seconds: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        where = "-".join(filter(None, (self.node, self.other)))
        return " ".join(filter(None, (self.act.value, where, self.detail, f"for {self.seconds:.1f} s" if self.seconds else "")))


@dataclass(frozen=True, slots=True)
class Schedule:
    """One run: what was laid down, and what happens. A lease fences only where no node is paused as a whole."""

    seed: int
    fence: str
    automatic: bool
    lease_s: float
    happenings: tuple[Happening, ...]


FAILPOINTS: Final = {
    "nas": (
        *("promote.before_role", "promote.after_role", "serve.before_mount", "serve.after_mount", "serve.before_export"),
        *("serve.after_export", "unserve.before_export", "unserve.after_export", "unserve.before_mount", "address.before_take"),
        *("address.recorded", "address.after_take", "address.before_drop", "address.after_drop", "term.before_record"),
        *("term.after_record", "files.before_rename", "files.after_rename"),
    ),
    "mgmt": tuple(f"failover.{when}_{step}" for step in ("fence", "promote", "address", "serve", "record") for when in ("before", "after")),
}

_WEIGHTS: Final = {
    Act.CUT: 6,
    Act.CUT_ONE_WAY: 4,
    Act.KILL_AGENT: 3,
    Act.STOP_AGENT: 3,
    Act.POWER_CUT: 3,
    Act.KILL_WATCH: 3,
    Act.STOP_WATCH: 2,
    Act.DIE_AT: 4,
    Act.STOP_AT: 2,
    Act.CUT_AT: 2,
    Act.CLOCK_JUMP: 1,
    Act.FENCE_FAILS: 1,
    Act.FAIL_OVER: 2,
    Act.DECLARE_DEAD: 2,
    Act.SERVE: 1,
    Act.FORCE: 1,
    Act.PLANNED: 2,
    Act.REPLICATE: 2,
    Act.FAIL_BACK: 2,
    Act.RESYNC: 1,
    Act.TAKE_OVER: 2,
}


def schedule(seed: int) -> Schedule:
    """Return the run of a seed. Pure."""
    rng = Random(f"landfall {seed}")
    fence = rng.choice(("lease", "command"))
    weights = dict(_WEIGHTS)
    if fence == "command":
        weights[Act.FREEZE] = 3
    else:
        del weights[Act.FENCE_FAILS]
    acts, weight = list(weights), list(weights.values())
    found = [_happening(rng, rng.choices(acts, weight)[0]) for _ in range(rng.randint(3, 9))]
    found += _worst(rng, fence) if rng.random() < 0.8 else []
    return Schedule(seed, fence, rng.random() < 0.8, rng.choice((24.0, 32.0)), tuple(sorted(found, key=lambda each: each.at_s)))


def _worst(rng: Random, fence: str) -> list[Happening]:
    """The primary is not reached for long: by both that judge it, or gone altogether. So that a failover is tried."""
    at_s = rng.uniform(8, 30)
    seconds = rng.uniform(20, 110)
    match rng.randrange(7 if fence == "lease" else 8):
        case 0:
            return [Happening(at_s, Act.CUT, "nas1", other, seconds) for other in ("nas2", *MGMT[: rng.randint(1, 2)])]
        case 1:
            return [Happening(at_s, Act.POWER_CUT, "nas1", seconds=seconds)]
        case 2:
            stop = Happening(at_s, Act.STOP_AGENT, "nas1", seconds=seconds)
            return [stop, Happening(at_s + rng.uniform(10, 20), Act.DECLARE_DEAD, rng.choice(MGMT))]
        case 3:  # it comes back while it is being given up
            cut = Happening(at_s + rng.uniform(0, 25), Act.POWER_CUT, "nas1", seconds=rng.uniform(2, 15))
            return [Happening(at_s, Act.DECLARE_DEAD, MGMT[0]), cut, *_dies_in_between(rng)]
        case 4:  # it is cut off as soon as it serves
            point = rng.choice(("serve.after_export", "serve.before_export", "address.after_take"))
            power = Happening(at_s, Act.POWER_CUT, "nas1", seconds=rng.uniform(2, 10))
            return [Happening(at_s, Act.CUT_AT, "nas1", "", seconds, point), power]
        case 5:  # another management node takes over, and does not reach it
            cuts = [Happening(at_s, Act.CUT, "nas1", other, seconds) for other in ("nas2", MGMT[1])]
            return [*cuts, Happening(at_s + rng.uniform(0, 10), Act.TAKE_OVER, MGMT[1])]
        case 6:  # both take over, each reaches another NAS
            cuts = [Happening(at_s, Act.CUT, nas, mgmt, seconds) for nas, mgmt in zip(NAS, MGMT, strict=True)]
            takes = [Happening(at_s + rng.uniform(0, 10), Act.TAKE_OVER, mgmt) for mgmt in MGMT]
            return [*cuts, *takes, Happening(at_s, Act.CUT, *NAS, seconds), *_dies_in_between(rng)]
        case _:
            return [Happening(at_s, Act.FREEZE, "nas1", seconds=seconds, detail=rng.choice(("clock-stands", "clock-goes")))]


def _dies_in_between(rng: Random) -> list[Happening]:
    """Perhaps, a management node does not come to the end of a failover, and its service starts again."""
    if rng.random() < 0.5:
        return []
    point = rng.choice(("failover.after_fence", "failover.before_promote", "failover.after_promote", "failover.after_address"))
    return [Happening(0.0, Act.DIE_AT, rng.choice(MGMT), "", rng.uniform(0.5, 15), point)]


def _happening(rng: Random, act: Act) -> Happening:
    at_s = rng.uniform(3, FAULTS_S - 10)
    match act:
        case Act.CUT | Act.CUT_ONE_WAY:
            one, other = rng.sample((*NAS, *MGMT), 2)
            while one in MGMT and other in MGMT:
                one, other = rng.sample((*NAS, *MGMT), 2)
            return Happening(at_s, act, one, other, rng.choice((rng.uniform(0.5, 10), rng.uniform(10, 90))))
        case Act.KILL_AGENT:
            return Happening(at_s, act, rng.choice(NAS), seconds=rng.uniform(0.5, 15))
        case Act.STOP_AGENT:
            return Happening(at_s, act, rng.choice(NAS), seconds=rng.uniform(1, 70))
        case Act.POWER_CUT:
            return Happening(at_s, act, rng.choice((*NAS, *NAS, *MGMT)), seconds=rng.uniform(2, 60))
        case Act.FREEZE:
            return Happening(at_s, act, rng.choice((*NAS, *NAS, *MGMT)), "", rng.uniform(2, 70), rng.choice(("clock-stands", "clock-goes")))
        case Act.KILL_WATCH | Act.STOP_WATCH:
            return Happening(at_s, act, rng.choice(MGMT), seconds=rng.uniform(0.5, 40))
        case Act.DIE_AT | Act.STOP_AT | Act.CUT_AT:
            kind, nodes = rng.choice((("nas", NAS), ("mgmt", MGMT)))
            seconds = rng.uniform(1, 20) if act is Act.DIE_AT else rng.uniform(1, 60)
            return Happening(rng.uniform(0, 30), act, rng.choice(nodes), "", seconds, rng.choice(FAILPOINTS[kind]))
        case Act.CLOCK_JUMP:
            return Happening(at_s, act, rng.choice((*NAS, *MGMT)), seconds=rng.uniform(1, 86400))
        case Act.FENCE_FAILS:
            return Happening(at_s, act, detail=rng.choice(("3", "4", "5", "6")))
        case _:
            return Happening(at_s, act, rng.choice(MGMT))
