"""One run: a schedule is played, the observer looks on, and at the end everything is mended and has to come to rest."""

from __future__ import annotations

import contextlib
import gc
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from agent.contract import messages as m
from agent.contract.identity import FilesystemKind, GenerationId, GenerationKind, empty_generation
from agent.volume.substrate import VolumeRecord
from mgmt import run as operations
from mgmt.catalog import Catalog, VolumeEntry
from mgmt.failover import failback
from mgmt.failover.driver import failover
from mgmt.failover.plan import Wish
from mgmt.fencing.kinds import FenceKind
from mgmt.fencing.protocol import FenceCode
from mgmt.run import Site
from tests.simulation.agent import Agent
from tests.simulation.machine import Host, Nas
from tests.simulation.management import Management, Policy, PowerSwitch
from tests.simulation.network import Network
from tests.simulation.observer import Observer, Seen
from tests.simulation.schedule import FAULTS_S, MGMT, NAS, Act, Happening, Schedule
from tests.simulation.world import Process, S, World

REST_S: Final = 40.0
LONGEST_REST_S: Final = 240.0
MARGIN_S: Final = 10.0
VOLUME: Final = "media"
NUMBER: Final = UUID(int=0x4C46)
SIZE_BYTES: Final = 1 << 30
MEMORY: Final = Path("/dev/shm")
"""Where files cost least; what is kept there is gone with the run."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run. ``wrong`` is empty if all was well."""

    schedule: Schedule
    wrong: tuple[str, ...]
    log: tuple[str, ...]
    digest: str
    seconds: float  # of the world
    changes: int  # of the writer
    said: str  # by the service in charge, at the end


def play(schedule: Schedule, *, margin_s: float = MARGIN_S, sabotage: Callable[[Stage], None] = lambda stage: None) -> Outcome:
    """Return what came of a schedule. ``sabotage`` breaks something of the product's own, to prove that the observer sees it."""
    with tempfile.TemporaryDirectory(prefix="landfall-sim-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
        stage = Stage(schedule, Path(folder), margin_s)
        sabotage(stage)
        gc.disable()  # a fifth of the time otherwise; a run leaves two megabytes
        try:
            return stage.play()
        finally:
            stage.world.close()
            gc.enable()


class Stage:
    """Two NAS, two management nodes, and what happens to them."""

    def __init__(self, schedule: Schedule, folder: Path, margin_s: float) -> None:
        self.schedule = schedule
        self.world = World(schedule.seed)
        self.network = Network(self.world)
        self.nas = {name: Nas(self.world, name, number, folder / name) for number, name in enumerate(NAS, 1)}
        self.agents = {name: Agent(self.world, host, self.network.connects, margin_s) for name, host in self.nas.items()}
        for one, other in (NAS, NAS[::-1]):
            self.agents[one].peer = self.agents[other]
            self.nas[one].others = [self.nas[other]]
            self.nas[one].reaches = self.network.reaches
        self.switch = PowerSwitch(self.world, dict(self.nas))
        policy = Policy(FenceKind(schedule.fence), schedule.automatic, schedule.lease_s)
        catalog = _catalog(folder)
        self.management = {
            name: Management(self.network, Host(self.world, name, folder / name), self.agents, policy, self.switch, catalog)
            for name in MGMT
        }
        self.hosts: dict[str, Host] = {**self.nas, **{name: found.host for name, found in self.management.items()}}
        self._were_in_charge = {MGMT[0]}
        self.observer = Observer(self._is_forced)
        self._seen_version = -1
        self._armed: dict[tuple[str, str], list[Happening]] = defaultdict(list)
        self._reasons = 0
        self._booting: set[str] = set()
        self._cuts: dict[tuple[str, str], int] = defaultdict(int)
        self.world.watchers.append(self._look)
        _replicated(self.nas)
        for agent in self.agents.values():
            agent.passing = self._passes
        for management in self.management.values():
            management.passing = self._passes

    def play(self) -> Outcome:
        """Play it to its end."""
        world = self.world
        for agent in self.agents.values():
            agent.start()
        self.management[MGMT[0]].start_service()
        for happening in self.schedule.happenings:
            world.at(round(happening.at_s * S), lambda happening=happening: self._happens(happening))  # type: ignore[misc]
        world.run(round(FAULTS_S * S))
        world.say("all", "is mended")
        self._mend()
        world.run(world.now_ns + round(REST_S * S))
        until_ns = world.now_ns + round((LONGEST_REST_S - REST_S) * S)
        world.run(until_ns, self._rests)
        wrong = [*self.observer.wrong, *world.unforeseen]
        if not self._rests():
            wrong.append(f"{world.now_ns / S:.3f} s: it came to no rest: {self._said() or 'nobody says anything'}")
        return Outcome(self.schedule, tuple(wrong), tuple(world.log), world.digest, world.now_ns / S, self.observer.changes, self._said())

    # --- what is seen ---

    def _look(self) -> None:
        version = sum(nas.version for nas in self.nas.values())
        if version != self._seen_version:
            self._seen_version = version
            self.observer.look(self.world.now_ns / S, self._seen())

    def _seen(self) -> list[Seen]:
        return [
            Seen(
                name,
                nas.answers,
                VOLUME in nas.shared,
                any(writable and path == nas.shared.get(VOLUME) for path, writable in nas.mounted.items()),
                nas.disk.records[NUMBER].epoch,
            )
            for name, nas in self.nas.items()
        ]

    @property
    def _in_charge(self) -> str:
        """The management node of the highest term."""
        terms = {name: _asked(found.state / "catalog.sqlite", "SELECT number FROM term") for name, found in self.management.items()}
        return max(MGMT, key=lambda name: (terms[name], name == MGMT[0]))

    def _said(self) -> str:
        return self.management[self._in_charge].said

    def _rests(self) -> bool:
        return self.observer.came_to_rest(self._seen(), self._said())

    def _is_forced(self) -> bool:
        count = "SELECT count(*) FROM split_brain"
        return any(_asked(found.state / "catalog.sqlite", count) for found in self.management.values())

    # --- what happens ---

    def _happens(self, happening: Happening) -> None:
        self.world.say("then", str(happening))
        node, seconds = happening.node, happening.seconds
        match happening.act:
            case Act.CUT | Act.CUT_ONE_WAY:
                ways = [(node, happening.other), (happening.other, node)]
                self._cut(ways if happening.act is Act.CUT else ways[:1], seconds)
            case Act.KILL_AGENT:
                self.agents[node].kill()
                self.world.after(seconds, self.agents[node].start)
            case Act.STOP_AGENT:
                self._stop(self.agents[node].process, seconds)
            case Act.KILL_KEEPER:
                keeper = self.agents[node].keeper
                if keeper is not None and self.agents[node].runs:
                    keeper.die()
            case Act.POWER_CUT:
                self._lose_power(node, seconds)
            case Act.FREEZE:
                self.hosts[node].freeze()
                self.world.after(seconds, lambda: self.hosts[node].thaw(clock_stood=happening.detail == "clock-stands"))
            case Act.KILL_WATCH:
                self.management[node].kill_service()
                self.world.after(seconds, lambda: self._watch_again(node))
            case Act.STOP_WATCH:
                self._stop(self.management[node].service, seconds)
            case Act.DIE_AT | Act.STOP_AT | Act.CUT_AT:
                self._armed[node, happening.detail].append(happening)
            case Act.CLOCK_JUMP:
                self.hosts[node].clock.wall_offset_ns += round((seconds if self.world.rng.random() < 0.5 else -seconds) * S)
            case Act.FENCE_FAILS:
                self.switch.moods.append(FenceCode(int(happening.detail)))
            case _:
                self._operate(happening)

    def _operate(self, happening: Happening) -> None:
        management = self.management[happening.node]
        if not management.host.answers or (happening.act is not Act.TAKE_OVER and happening.node not in self._were_in_charge):
            return  # a catalog that was never in charge is a copy, and `landfall takeover` comes before everything else there
        said: dict[Act, Callable[[Site], Any]] = {
            Act.FAIL_OVER: lambda site: failover(site, VOLUME, Wish()),
            Act.DECLARE_DEAD: lambda site: failover(site, VOLUME, Wish(declare_dead=True)),
            Act.PLANNED: lambda site: failover(site, VOLUME, Wish(planned=True)),
            Act.FORCE: lambda site: failover(site, VOLUME, Wish(declare_dead=True, force=True)),
            Act.REPLICATE: lambda site: operations.replicate(site, VOLUME),
            Act.FAIL_BACK: lambda site: failback.failback(site, VOLUME),
            Act.RESYNC: lambda site: failback.resync(site, VOLUME),
            Act.SERVE: lambda site: operations.serve(site, VOLUME),
            Act.TAKE_OVER: lambda site: self._take_over(management, site),
        }
        management.operate(happening.act.value, said[happening.act])

    def _take_over(self, management: Management, site: Site) -> None:
        site.take_over()
        self._were_in_charge.add(management.host.name)
        if management.service is None or not management.service.alive:
            management.start_service()

    def _cut(self, ways: list[tuple[str, str]], seconds: float) -> None:
        def heal() -> None:
            for way in ways:
                self._cuts[way] -= 1
                if self._cuts[way] <= 0:
                    self.network.cut.discard(way)

        for way in ways:
            self._cuts[way] += 1
            self.network.cut.add(way)
        self.world.after(seconds, heal)

    def _stop(self, process: Process | None, seconds: float) -> None:
        if process is None or not process.alive:
            return
        self._reasons += 1
        reason = f"signal {self._reasons}"
        process.stop(reason)
        self.world.after(seconds, lambda: process.go_on(reason))

    def _lose_power(self, node: str, seconds: float) -> None:
        self.hosts[node].lose_power()
        self.world.after(seconds, lambda: self._power_on(node))

    def _power_on(self, node: str) -> None:
        host = self.hosts[node]
        if not host.powered:
            host.powered = True
            host.clock.boot()
            self.world.say(node, "boots")
        if node in self.agents:
            self.agents[node].start()
        else:
            self._watch_again(node)

    def _watch_again(self, node: str) -> None:
        management = self.management[node]
        if management.watches and (management.service is None or not management.service.alive):
            management.start_service()

    def _passes(self, process: Process, name: str) -> None:
        """A process passes a failpoint: that takes its time, and it may not get any further."""
        node = process.name.split()[0]
        armed = self._armed.get((node, name))
        if not armed:
            return
        happening = armed.pop(0)
        self.world.say(process.name, f"passes {name}: {happening.act}")
        if happening.act is Act.STOP_AT:
            self._stop(process, happening.seconds)
            return
        if happening.act is Act.CUT_AT:
            self._cut([way for other in self.hosts if other != node for way in ((node, other), (other, node))], happening.seconds)
            return
        process.die()
        if node in self.agents:
            self.world.after(happening.seconds, self.agents[node].start)
        else:
            self.world.after(happening.seconds, lambda: self._watch_again(node))

    def _mend(self) -> None:
        """Let nothing be broken any more, and nobody do anything but the services."""
        self._armed.clear()
        self.switch.moods.clear()
        self.network.cut.clear()
        self._cuts.clear()
        for name, host in self.hosts.items():
            host.thaw(clock_stood=False)
            for process in host.processes:
                for reason in range(1, self._reasons + 1):
                    process.go_on(f"signal {reason}")
            self._power_on(name)
        self._were_in_charge.add(self._in_charge)
        if self.management[self._in_charge].service is None:  # whoever took over did not come to starting it
            self.management[self._in_charge].start_service()
        self.world.watchers.append(self._switch_on)

    def _switch_on(self) -> None:
        """Whom a fence switches off now is switched on again after a while."""
        for name, nas in self.nas.items():
            if not nas.powered and name not in self._booting:
                self._booting.add(name)

                def boot(name: str = name) -> None:
                    self._booting.discard(name)
                    self._power_on(name)

                self.world.after(5.0, boot)


def _catalog(folder: Path) -> Path:
    """Return a catalog that has the volume."""
    path = folder / "catalog.sqlite"
    catalog = Catalog(path)
    catalog.add_volume(VolumeEntry(NUMBER, VOLUME, *NAS, FilesystemKind.XFS, SIZE_BYTES, address="192.0.2.100/24"))
    catalog.set_volume(VolumeEntry(NUMBER, VOLUME, *NAS, FilesystemKind.XFS, SIZE_BYTES, address="192.0.2.100/24"))
    catalog.close()
    return path


def _replicated(nas: dict[str, Nas]) -> None:
    """Let both nodes hold the volume, and its first generation."""
    empty = m.GenerationFacts(empty_generation(NUMBER), GenerationKind.EMPTY, 0)
    first = GenerationId(NUMBER, 1, 1, "1" * 32)
    roles = zip(nas.values(), (m.Role.PRIMARY, m.Role.SECONDARY), (GenerationKind.FROZEN, GenerationKind.COMMITTED), strict=True)
    for node, role, kind in roles:
        node.disk.records[NUMBER] = VolumeRecord(NUMBER, VOLUME, FilesystemKind.XFS, SIZE_BYTES, 512, role, 1)
        node.disk.held[NUMBER] = [empty, m.GenerationFacts(first, kind, 1)]
        node.disk.content |= {empty.id: 0, first: 1}
        node.disk.operational_content[NUMBER] = 1


def _asked(path: Path, query: str) -> int:
    """Return the number that a catalog has for a query."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        (number,) = db.execute(query).fetchone()
    return int(number)
