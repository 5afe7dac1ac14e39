"""Scenarios: what goes wrong in a drill, when, what is done about it, and what must come of it. Data, read strictly.

A scenario is a file ``playbooks/scenarios/NAME.yml``::

    says: nas1's agent is killed while it sends; nas2 recovers what arrived, and serves it
    labs: [local]                                   # where it can be held: local, vm
    steps:                                          # in this order; one without particulars is its name alone
      - interrupt:                                  # files change and are replicated; things go wrong at shares of the transfer's bytes
          - {at: 0.5, fault: source-agent-killed}
      - strike: source-power-cut                    # something goes wrong while nothing is sent
      - notified                                    # nas2 notices, and the management node hears of it
      - repair: heal-link
      - resume                                      # the transfer goes on, and both volumes must be equal block by block
      - failover: {declare_dead: true}              # `landfall failover`, as an operator says it; dies_after: a step after which it is
                                                    # killed; refused: the code with which it must be refused
    expect:
      verdict: recovered                            # or resumed
      serves: nas2                                  # this node, and no other
      gaps: 1                                       # how often an SMB client may lose its files; above 0 it must, once at least
      rpo_s: 600                                    # of recovered files, at most; 0: nothing may be lost
      rto_s: 30                                     # without a service, at most, the recovery of the data itself not counted

Keys that are not known, values of another type and steps that make no sense together are refused with their place.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import cattrs
import yaml

from agent.contract.errors import ConfigInvalid
from mgmt.drill.options import LabKind
from mgmt.failover.plan import Step as FailoverStep
from mgmt.inventory import exactly

FOLDER: Final = Path(__file__).resolve().parents[2] / "playbooks" / "scenarios"


class Fault(StrEnum):
    """What goes wrong. nas1 is the source, nas2 the receiver."""

    SOURCE_AGENT_KILLED = "source-agent-killed"  # SIGKILL to nas1's agent
    SOURCE_POWER_CUT = "source-power-cut"  # all of nas1, silently
    SOURCE_PAUSED = "source-paused"  # nothing of nas1 runs and no packet of it passes, as of a virtual machine that is paused
    SOURCE_DISK_FAILED = "source-disk-failed"  # whatever nas1 reads or writes where its volumes are ends in an I/O error
    LINK_CUT = "link-cut"  # no packet passes between nas1 and nas2; the management node and clients reach both
    RECEIVER_AGENT_KILLED = "receiver-agent-killed"  # SIGKILL to nas2's agent
    RECEIVER_POWER_CUT = "receiver-power-cut"  # all of nas2, without flushing
    MANAGEMENT_POWER_CUT = "management-power-cut"  # the management node, with the command that ordered the transfer


class Repair(StrEnum):
    """What is put right again."""

    START_SOURCE = "start-source"
    WAKE_SOURCE = "wake-source"
    HEAL_LINK = "heal-link"
    START_RECEIVER_AGENT = "start-receiver-agent"
    START_RECEIVER = "start-receiver"
    START_MANAGEMENT = "start-management"


class Verdict(StrEnum):
    """What came of a drill."""

    RECOVERED = "recovered"  # the whole files of the transfer that broke off are served, and the checker found nothing amiss
    RESUMED = "resumed"  # the transfer went on to its end, and both volumes are equal block by block
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Blow:
    """A fault after a share of the transfer's bytes."""

    at: float
    fault: Fault


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Files change, and are replicated until the last of these."""

    blows: tuple[Blow, ...]


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault while nothing is sent."""

    fault: Fault


@dataclass(frozen=True, slots=True)
class Notified:
    """The receiver's notification reaches the management node."""


@dataclass(frozen=True, slots=True)
class Mend:
    """Something is put right."""

    repair: Repair


@dataclass(frozen=True, slots=True)
class Resume:
    """The transfer goes on to its end."""


@dataclass(frozen=True, slots=True)
class Failover:
    """`landfall failover`. ``refused``: the error's code that it must end with; ``dies_after``: the step after which it is killed."""

    declare_dead: bool = False
    dies_after: str = ""
    refused: str = ""

    @property
    def ends_well(self) -> bool:
        """Whether the secondary serves afterwards."""
        return not (self.dies_after or self.refused)


Step = Interrupt | Strike | Notified | Mend | Resume | Failover


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must come of it."""

    verdict: Verdict
    serves: str
    gaps: int
    rpo_s: float
    rto_s: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario."""

    name: str
    says: str
    steps: tuple[Step, ...]
    expect: Expectation
    labs: tuple[LabKind, ...] = field(default=(LabKind.LOCAL,))

    @property
    def share(self) -> float:
        """The share of the bytes after which the last blow of the last interruption comes."""
        return [step.blows[-1].at for step in self.steps if isinstance(step, Interrupt)][-1]

    def at(self, share: float) -> Scenario:
        """Return the scenario with every transfer broken off at this share; ConfigInvalid where several things happen to one transfer."""
        if any(isinstance(step, Interrupt) and len(step.blows) > 1 for step in self.steps):
            raise ConfigInvalid(f"scenario {self.name} lays down itself when what happens to its transfer", fix="Leave --at away.")
        moved = (Interrupt((replace(step.blows[0], at=share),)) if isinstance(step, Interrupt) else step for step in self.steps)
        return replace(self, steps=tuple(moved))


def names(folder: Path = FOLDER) -> tuple[str, ...]:
    """Return the names of all scenarios; none where this is no checkout."""
    return tuple(sorted(path.stem for path in folder.glob("*.yml")))


def read(name: str, folder: Path = FOLDER) -> Scenario:
    """Return a scenario; ConfigInvalid names the file and the place of whatever is wrong with it."""
    path = folder / f"{name}.yml"
    if name not in names(folder):
        known = ", ".join(names(folder))
        raise ConfigInvalid(f"there is no scenario {name!r}", fix=f"One of {known}." if known else f"Drills need a checkout: {folder}.")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Strict)  # noqa: S506 - a SafeLoader
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigInvalid(f"{path} cannot be read as YAML", cause=" ".join(str(error).split())) from error
    if not isinstance(document, dict):
        raise ConfigInvalid(f"{path}: must be a mapping")
    try:
        found = _CONVERTER.structure({**document, "name": name}, Scenario)
    except cattrs.BaseValidationError as error:
        raise ConfigInvalid(f"{path}: " + "; ".join(cattrs.transform_error(error, format_exception=_in_words))) from error
    if wrong := _senseless(found):
        raise ConfigInvalid(f"{path}: {wrong}")
    return found


class _Strict(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML ships no annotations
    """Refuses a key that stands twice, of which YAML's own loader takes the second."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]} stands twice, {node.start_mark}")
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


def _senseless(scenario: Scenario) -> str:
    """Return what does not fit together; empty if all does."""
    steps, expect = scenario.steps, scenario.expect
    if not any(isinstance(step, Interrupt) for step in steps):
        return "steps: nothing is interrupted"
    for number, step in enumerate(steps):
        where = f"steps[{number}]"
        match step:
            case Interrupt(blows):
                shares = [blow.at for blow in blows]
                if not blows or shares != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] < 1:
                    return f"{where}: at must rise, between 0 and 1"
            case Failover(_, dies_after, refused):
                if dies_after and dies_after not in set(FailoverStep):
                    return f"{where}.dies_after: must be one of {', '.join(FailoverStep)}"
                if dies_after and refused:
                    return f"{where}: a failover that is refused cannot be killed"
            case _:
                pass
    ends = [step for step in steps if isinstance(step, Resume) or (isinstance(step, Failover) and step.ends_well)]
    wanted = Resume if expect.verdict is Verdict.RESUMED else Failover
    if expect.verdict is Verdict.FAILED or not ends or not isinstance(ends[-1], wanted):
        return f"expect.verdict: {expect.verdict} is not what the steps lead to"
    if expect.serves not in {"nas1", "nas2"}:
        return "expect.serves: must be nas1 or nas2"
    if min(expect.gaps, expect.rpo_s, expect.rto_s) < 0:
        return "expect: nothing can be below 0"
    return ""


_STEPS: Final[dict[str, type[Step]]] = {
    "interrupt": Interrupt,
    "strike": Strike,
    "notified": Notified,
    "repair": Mend,
    "resume": Resume,
    "failover": Failover,
}


def _step(value: Any, _: Any) -> Step:
    name: str
    particulars: Any
    match value:
        case str():
            name, particulars = value, {}
        case dict() if len(value) == 1:
            ((name, particulars),) = value.items()
        case _:
            raise TypeError("must be the name of a step, or a mapping with that name as its only key")
    if name not in _STEPS:
        raise ValueError(f"{name!r} is no step; there are {', '.join(_STEPS)}")
    match name:
        case "interrupt":
            particulars = {"blows": particulars}
        case "strike":
            particulars = {"fault": particulars}
        case "repair":
            particulars = {"repair": particulars}
        case _:
            pass
    if not isinstance(particulars, dict):
        raise TypeError(f"{name} must be a mapping")
    made: Step = _CONVERTER.structure(particulars, _STEPS[name])
    return made


def _word(value: Any, kind: type[StrEnum]) -> StrEnum:
    if value not in set(kind):
        raise ValueError(f"{value!r} must be one of {', '.join(kind)}")
    return kind(value)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for kind, allowed in ((bool, (bool,)), (int, (int,)), (str, (str,)), (float, (int, float))):
        converter.register_structure_hook(kind, exactly(allowed))
    for words in (Fault, Repair, Verdict, LabKind):
        converter.register_structure_hook(words, _word)
    converter.register_structure_hook_func(lambda kind: kind == Step, _step)
    return converter


_CONVERTER: Final = _converter()


def _in_words(error: BaseException, kind: type[Any] | None) -> str:
    match error:
        case cattrs.ForbiddenExtraKeysError():
            return "unknown key " + ", ".join(sorted(map(str, error.extra_fields)))
        case KeyError():
            return f"key {error.args[0]} is missing"
        case TypeError() if "not iterable" in str(error):
            return "must be a list"
        case _:
            return str(error)
