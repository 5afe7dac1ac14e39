"""Schedules of the simulation, for real: three nodes of a lab, a fifth of the time, and the same observer looking at what the kernel has.

A lab has one management node, cuts links both ways only, and has one clock: what needs more is left out. ``python -m tests.drills.schedules
--runs 50`` plays fifty.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

from agent.contract.errors import LandfallError
from agent.contract.identity import FilesystemKind
from agent.system.clock import monotonic_s, sleep
from agent.system.run import start as start_program
from mgmt import run
from mgmt.inventory import read_inventory
from mgmt.lab import control, lifecycle, processes
from mgmt.lab.layout import NODE_ROOT, Lab, NodeName
from mgmt.lab.namespace import within
from tests.simulation.observer import Observer, Seen
from tests.simulation.schedule import FAULTS_S, NAS, Act, Happening, Schedule, schedule

MGMT: Final = NodeName.MGMT
SCALE: Final = 0.2
LOOK_EVERY_S: Final = 0.1
REST_S: Final = 240.0
"""A loaded machine takes its time; when all is well, a few seconds are enough."""
POLICY: Final = "cycle_s = 0.5\nsilence_limit_s = 2.0\nconnect_limit_s = 6.0\nprobe_limit_s = 1.0\nlease_s = 8.0\n"
MARGIN: Final = "lease_margin_s = 2.0\n"
PATIENT: Final = "connect_limit_s = 60.0\n"
"""While nothing is to go wrong yet, a slow machine may be slow."""
SAMBA: Final = "run/landfall/samba"

COMMANDS: Final = {
    Act.FAIL_OVER: ("failover", "--yes"),
    Act.DECLARE_DEAD: ("failover", "--yes", "--declare-dead"),
    Act.PLANNED: ("failover", "--yes", "--planned"),
    Act.SERVE: ("serve",),
    Act.REPLICATE: ("replicate",),
    Act.FAIL_BACK: ("failback", "--yes"),
    Act.RESYNC: ("resync", "--yes"),
}
BY_SIGNALS: Final = (Act.KILL_AGENT, Act.STOP_AGENT, Act.POWER_CUT, Act.FREEZE, Act.KILL_WATCH, Act.STOP_WATCH, Act.DIE_AT)
PLAYED: Final = frozenset({*COMMANDS, *BY_SIGNALS, Act.CUT, Act.CUT_ONE_WAY})
UP_AGAIN_S: Final = 2.0
"""After which an init system starts what died by itself, and somebody switches a node on that was fenced."""


@dataclass(frozen=True, slots=True)
class Played:
    """What came of a schedule."""

    seed: int
    wrong: tuple[str, ...]
    log: tuple[str, ...]
    seconds: float
    changes: int
    said: str


@contextlib.contextmanager
def lab_for_schedules() -> Iterator[Lab]:
    """Yield a lab that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="landfall-schedules-", dir="/var/tmp") as folder:
        made = Lab.at(Path(folder) / "lab")
        try:
            lifecycle.up(made, pool_size_bytes=2 << 30)
            for node in map(NodeName, NAS):
                with open(made.node(node) / "etc" / "agent.toml", "a", encoding="utf-8") as settings:
                    settings.write(MARGIN)
                control.kill_service(made, node, "agent")
                control.start_service(made, node, "agent")
            yield made
        finally:
            lifecycle.down(made)


def play(lab: Lab, found: Schedule, configuration: str) -> Played:
    """Return what came of a schedule on a lab; ``configuration`` is the landfall.toml that the lab came with."""
    stage = Stage(lab, found, configuration)
    try:
        return stage.play()
    finally:
        stage.mend()
        stage.clear()


@dataclass
class Stage:
    """One schedule on the nodes of a lab."""

    lab: Lab
    schedule: Schedule
    configuration: str
    log: list[str] = field(default_factory=list)
    _volume: UUID | None = None
    _began_s: float = 0.0
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _watch: subprocess.Popen[bytes] | None = None
    _commands: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _epochs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAS, 0))
    _armed: dict[str, list[str]] = field(default_factory=dict)
    _down: Counter[str] = field(default_factory=Counter)  # what is not to be raised now

    @property
    def name(self) -> str:
        """The volume's name."""
        return f"seed{self.schedule.seed}"

    def play(self) -> Played:
        """Play it to its end."""
        self._set_out()
        observer = Observer(self._is_forced)
        self._began_s = monotonic_s()
        for happening in self.schedule.happenings:
            if happening.act in PLAYED and "mgmt2" not in {happening.node, happening.other}:
                self._after(happening.at_s * SCALE, lambda happening=happening: self._happens(happening))  # type: ignore[misc]
        self._watch_on()
        while self._now_s < FAULTS_S * SCALE:
            self._next(observer)
        self.mend()
        self._say("all is mended")
        rested_s = self._now_s + REST_S
        quiet_since_s = self._now_s
        while self._now_s < rested_s and self._now_s - quiet_since_s < 3.0:
            seen = self._next(observer)
            if not observer.came_to_rest(seen, self._said()):
                quiet_since_s = self._now_s
        wrong = list(observer.wrong)
        if not observer.came_to_rest(self._seen(), self._said()):
            wrong.append(f"it came to no rest: {self._said() or 'nobody says anything'}")
        return Played(self.schedule.seed, tuple(wrong), tuple(self.log), self._now_s, observer.changes, self._said())

    def mend(self) -> None:
        """Let nothing be broken any more."""
        self._due.clear()
        self._down.clear()
        for one, other in itertools.combinations(NodeName, 2):
            lifecycle.heal(self.lab, one, other)
        for node in map(NodeName, NAS):
            processes.signal_node(self.lab, node, signal.SIGCONT)
            self._power_on(node)
            self._agent_on(node)
        self._watch_on()

    def clear(self) -> None:
        """Let nothing of it go on; what it wrote stays until the lab goes."""
        for child in (*self._commands, self._watch):
            if child is not None:
                child.send_signal(signal.SIGCONT)
                child.kill()
                child.wait(60)
        for node in NAS:
            with contextlib.suppress(LandfallError):
                self._at_site(lambda site, node=node: run.unserve(site, self.name, node=node))  # type: ignore[misc]
        for node in map(NodeName, NAS):  # what was armed and not passed goes with the process
            self._ignore(control.stop_service, self.lab, node, "agent")
            self._ignore(control.start_service, self.lab, node, "agent", {})

    # --- the volume ---

    def _set_out(self) -> None:
        """A volume of its own, replicated; a catalog of its own."""
        fence = self.configuration.replace('fence = "lab"', 'fence = "lease"') if self.schedule.fence == "lease" else self.configuration
        automatic = f"automatic_failover = {str(self.schedule.automatic).lower()}\n"
        path = self.lab.node(MGMT) / "etc" / "landfall.toml"
        path.write_text(PATIENT + fence)
        shutil.rmtree(self.lab.node(MGMT) / "state", ignore_errors=True)
        address = f"10.77.0.{100 + self.schedule.seed % 90}/24"

        def add(site: run.Site) -> UUID:
            facts = run.add_volume(
                site, self.name, filesystem=FilesystemKind.EXT4, size_bytes=64 << 20, primary=NAS[0], secondary=NAS[1], address=address
            )
            run.replicate(site, self.name)
            return facts.id

        self._volume = self._at_site(add)
        path.write_text(POLICY + automatic + fence)
        for happening in self.schedule.happenings:
            if happening.act is Act.DIE_AT:
                self._armed.setdefault(happening.node, []).append(f"{happening.detail}=kill")
        for node in NAS:
            if node in self._armed:
                control.stop_service(self.lab, NodeName(node), "agent")
                self._agent_on(NodeName(node))

    def _at_site(self, work: Callable[[run.Site], object]) -> UUID | None:
        def inside() -> object:
            with run.Site(read_inventory(self.lab.node(MGMT) / "etc" / "landfall.toml")) as site:
                return work(site)

        found = within(self.lab.namespace(MGMT), inside)
        return found if isinstance(found, UUID) else None

    # --- what happens ---

    @property
    def _now_s(self) -> float:
        return monotonic_s() - self._began_s

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        now_s = self._now_s if self._began_s else 0.0
        heapq.heappush(self._due, (now_s + seconds, next(self._numbers), act))

    def _next(self, observer: Observer) -> list[Seen]:
        """Do what is due, and look."""
        while self._due and self._due[0][0] <= self._now_s:
            heapq.heappop(self._due)[2]()
        self._raise_the_dead()
        seen = self._seen()
        observer.look(self._now_s, seen)
        sleep(LOOK_EVERY_S)
        return seen

    def _say(self, words: str) -> None:
        self.log.append(f"{self._now_s:8.2f} {words}")

    def _happens(self, happening: Happening) -> None:
        self._say(str(happening))
        seconds = happening.seconds * SCALE
        is_nas = happening.node in NAS
        match happening.act:
            case Act.CUT | Act.CUT_ONE_WAY:
                one, other = (NodeName(name.removesuffix("1") if name == "mgmt1" else name) for name in (happening.node, happening.other))
                lifecycle.cut(self.lab, one, other)
                self._after(seconds, lambda: self._ignore(lifecycle.heal, self.lab, one, other))
            case Act.KILL_AGENT:
                self._ignore(control.kill_service, self.lab, NodeName(happening.node), "agent")
                self._later(happening.node, seconds, lambda: self._agent_on(NodeName(happening.node)))
            case Act.STOP_AGENT:
                self._signal_agent(NodeName(happening.node), signal.SIGSTOP)
                self._after(seconds, lambda: self._signal_agent(NodeName(happening.node), signal.SIGCONT))
            case Act.POWER_CUT if is_nas:
                lifecycle.kill(self.lab, NodeName(happening.node))
                self._later(happening.node, seconds, lambda: self._power_on(NodeName(happening.node)))
            case Act.FREEZE if is_nas:
                processes.signal_node(self.lab, NodeName(happening.node), signal.SIGSTOP)
                self._later(happening.node, seconds, lambda: processes.signal_node(self.lab, NodeName(happening.node), signal.SIGCONT))
            case Act.KILL_WATCH | Act.POWER_CUT | Act.FREEZE:
                if self._watch is not None:
                    self._watch.kill()
                self._later("watch", seconds, self._watch_on)
            case Act.STOP_WATCH:
                if (service := self._watch) is not None:
                    service.send_signal(signal.SIGSTOP)
                    self._after(seconds, lambda: service.send_signal(signal.SIGCONT))
            case Act.DIE_AT:
                pass  # armed from the beginning
            case _:
                verb, *more = COMMANDS[happening.act]
                self._commands.append(self._landfall(f"{happening.act}.log", verb, self.name, *more))

    def _ignore(self, act: Callable[..., object], *arguments: object) -> None:
        """Do something to a node that may have lost its power."""
        with contextlib.suppress(LandfallError):
            act(*arguments)

    def _landfall(self, log: str, *words: str, armed: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        failpoints = ["LANDFALL_ALLOW_FAILPOINTS=1", f"LANDFALL_FAILPOINTS={';'.join(armed)}"] if armed else []
        with (self.lab.directory / f"{self.name}-{log}").open("ab") as said:
            argv = ["env", *failpoints, sys.executable, "-m", "mgmt.cli", "--lab", str(self.lab.directory), *words]
            return start_program(argv, stdout=said.fileno(), stderr=said.fileno())

    def _watch_on(self) -> None:
        if self._watch is not None and self._watch.poll() is None:
            self._watch.send_signal(signal.SIGCONT)
            return
        armed = tuple(self._armed.pop("mgmt1", ()))
        self._watch = self._landfall("watch.log", "watch", armed=armed)

    def _agent_on(self, node: NodeName) -> None:
        armed = ";".join(self._armed.pop(node, ()))
        environment = {"LANDFALL_ALLOW_FAILPOINTS": "1", "LANDFALL_FAILPOINTS": armed} if armed else {}
        self._ignore(control.start_service, self.lab, node, "agent", environment)

    def _power_on(self, node: NodeName) -> None:
        self._ignore(lifecycle.start_node, self.lab, node)

    def _later(self, what: str, seconds: float, up: Callable[[], None]) -> None:
        """Let something be down, and nobody raise it, for so long."""
        self._down[what] += 1

        def act() -> None:
            self._down[what] -= 1
            up()

        self._after(seconds, act)

    def _raise_the_dead(self) -> None:
        """What died at a failpoint is started again, as by an init system; a node that was fenced gets its power back after a while."""
        if not self._down["watch"] and self._watch is not None and self._watch.poll() is not None:
            self._later("watch", UP_AGAIN_S, self._watch_on)
        for node in map(NodeName, NAS):
            if self._down[node]:
                continue
            if processes.first_process(self.lab, node) is None:
                self._later(node, UP_AGAIN_S, lambda node=node: self._power_on(node))  # type: ignore[misc]
            elif not self._agent_runs(node):
                self._later(node, UP_AGAIN_S, lambda node=node: self._agent_on(node))  # type: ignore[misc]

    def _agent_runs(self, node: NodeName) -> bool:
        with contextlib.suppress(LandfallError):
            return any(service.name == "agent" and service.pid is not None for service in control.services(self.lab, node))
        return True  # it cannot be told now

    def _signal_agent(self, node: NodeName, number: signal.Signals) -> None:
        for pid in processes.inside(self.lab, [self.lab.namespace(node)]):
            words = processes.command_line(pid)
            if b"daemon" in words and any(word.endswith(b"landfall-agent") for word in words):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    # --- what is seen ---

    def _seen(self) -> list[Seen]:
        return [self._seen_on(NodeName(node)) for node in NAS]

    def _seen_on(self, node: NodeName) -> Seen:
        """Return a node as its kernel has it: its processes, its mounts, the share in the configuration of a living smbd."""
        first = processes.first_process(self.lab, node)
        if first is None:
            return Seen(node, False, False, False, self._epochs[node])
        root = Path(f"/proc/{first}/root")
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = root / NODE_ROOT.relative_to("/") / "pool" / "volumes" / str(self._volume) / "volume.json"
            self._epochs[node] = int(json.loads(record.read_text())["epoch"])
        exported = writable = False
        with contextlib.suppress(OSError):
            exported = f"[{self.name}]" in (root / SAMBA / "smb.conf").read_text() and self._has_smbd(node)
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{first}/mountinfo").read_text().splitlines():
                left, _, right = line.partition(" - ")
                if left.split()[4] == f"{NODE_ROOT}/srv/{self.name}":
                    writable = all("rw" in options.split(",") for options in (left.split()[5], right.split()[2]))
        return Seen(node, not processes.is_stopped(first), exported, writable, self._epochs[node])

    def _has_smbd(self, node: NodeName) -> bool:
        for pid in processes.inside(self.lab, [self.lab.namespace(node)]):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "smbd":
                    return True
        return False

    def _said(self) -> str:
        """Return the service's newest words of this volume."""
        with contextlib.suppress(OSError):
            lines = (self.lab.directory / f"{self.name}-watch.log").read_text(errors="replace").splitlines()
            return next((line for line in reversed(lines) if self.name in line), "")
        return ""

    def _is_forced(self) -> bool:
        return False  # nobody forces anything here


def main() -> int:
    """Return 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.drills.schedules", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first schedule's")
    parser.add_argument("--runs", type=int, default=50, help="how many, each with the seed that follows")
    parser.add_argument("--verbose", action="store_true", help="print what happened in each")
    asked = parser.parse_args()
    failed = 0
    with lab_for_schedules() as lab:
        configuration = (lab.node(MGMT) / "etc" / "landfall.toml").read_text()
        for seed in range(asked.seed, asked.seed + asked.runs):
            played = play(lab, schedule(seed), configuration)
            failed += bool(played.wrong)
            _print(played, asked.verbose)
    sys.stdout.write(f"{asked.runs} schedules, {failed} of them wrong\n")
    return 1 if failed else 0


def _print(played: Played, verbose: bool) -> None:
    sys.stdout.write(f"seed {played.seed}: {played.seconds:.0f} s, the writer changed {played.changes} times; {played.said}\n")
    lines = (*played.log, *played.wrong) if verbose or played.wrong else ()
    sys.stdout.write("".join(f"  {line}\n" for line in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
