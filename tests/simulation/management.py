"""A management node of the simulation: the service, what operators say, and the fences that are run from there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.contract.errors import LandfallError
from agent.system.files import lock_for_life
from agent.system.run import Output
from mgmt.fencing import lease
from mgmt.fencing.kinds import FenceKind
from mgmt.fencing.protocol import FenceCode, FenceRequest, NotFencedError, answer
from mgmt.inventory import FenceOptions, Inventory, NodeEntry
from mgmt.run import Site
from mgmt.watch.cycle import Watch
from tests.simulation.agent import Agent
from tests.simulation.machine import Host
from tests.simulation.network import Network, NodeOverNetwork
from tests.simulation.world import Mailbox, Process, SimThreads, World, current, pause

Operation = Callable[[Site], Any]


@dataclass(frozen=True, slots=True)
class Policy:
    """What the administrator laid down in this run."""

    fence: FenceKind
    automatic: bool
    lease_s: float
    cycle_s: float = 4.0
    silence_limit_s: float = 8.0


class PowerSwitch:
    """What the operator's own fence reaches: it switches a NAS off. ``moods`` says how the next calls of it go."""

    def __init__(self, world: World, hosts: dict[str, Host]) -> None:
        self.world = world
        self.hosts = hosts
        self.moods: list[FenceCode] = []

    def fence(self, request: FenceRequest) -> str:
        """Switch a node off and return that it is; a switch out of order does that or does not, and cannot say it."""
        pause(self.world.rng.uniform(0.3, 4.0))
        mood = self.moods.pop(0) if self.moods else FenceCode.FENCED
        if mood is not FenceCode.ALIVE and (mood is FenceCode.FENCED or self.world.rng.random() < 0.5):
            self.hosts[request.node].lose_power()
        if mood is not FenceCode.FENCED:
            raise NotFencedError(mood, "the switch is out of order")
        return "its power is off"


class Management:
    """A management node: its catalog outlives its processes."""

    def __init__(self, network: Network, host: Host, agents: dict[str, Agent], policy: Policy, switch: PowerSwitch, catalog: Path) -> None:
        self.network = network
        self.host = host
        self.agents = agents
        self.policy = policy
        self.switch = switch
        self.world: World = network.world
        self.passing: Callable[[Process, str], None] = lambda process, name: None
        self.service: Process | None = None
        self.watches = False  # whether its service is to run
        self.said = ""  # by the service, in its newest cycle
        self.state = host.folder / "state"
        self.state.mkdir()
        shutil.copy(catalog, self.state / "catalog.sqlite")

    @property
    def inventory(self) -> Inventory:
        """What its configuration says."""
        policy = self.policy
        nodes = tuple(
            NodeEntry(name, agent.host.address, Path("key"), "", fence=policy.fence, fence_options=FenceOptions(program=("switch",)))
            for name, agent in self.agents.items()
        )
        return Inventory(
            state_dir=self.state,
            node=nodes,
            silence_limit_s=policy.silence_limit_s,
            cycle_s=policy.cycle_s,
            automatic_failover=policy.automatic,
            lease_s=policy.lease_s,
        )

    def start_service(self) -> None:
        """Start the service, if the machine runs; a second one waits for the first."""
        self.watches = True
        if self.host.powered:
            self.service = self._process("watch")
            self.world.say(self.service.name, "starts")
            self.service.start(self._watch, "watch")

    def kill_service(self) -> None:
        """Kill the service."""
        if self.service is not None and self.service.alive:
            self.world.say(self.service.name, "is killed")
            self.service.die()

    def operate(self, words: str, operation: Operation) -> Process:
        """Let an operator do something here."""
        process = self._process(words)

        def act() -> None:
            self.world.say(process.name, "is called")
            try:
                with self._site() as site:
                    operation(site)
            except LandfallError as error:
                self.world.say(process.name, f"is refused: {error}")
            else:
                self.world.say(process.name, "is done")
            process.die()

        process.start(act, words)
        return process

    def _process(self, name: str) -> Process:
        process = self.host.process(name)
        process.passing = lambda point: self.passing(process, point)
        return process

    def _watch(self) -> None:
        process = current().process
        while True:
            try:
                process.own(lock_for_life(self.state / "watch.lock"))
                break
            except LandfallError:
                pause(self.policy.cycle_s)
        with self._site() as site:
            watching = Watch(self._site, process.start)
            while True:
                for sentence in watching.cycle(site):
                    if sentence != self.said:
                        self.world.say(process.name, sentence)
                    self.said = sentence
                self.host.clock.sleep(self.policy.cycle_s)

    def _site(self) -> Site:
        process = current().process
        nodes: dict[str, Any] = {name: NodeOverNetwork(self.network, self.host, agent) for name, agent in self.agents.items()}
        site = Site(
            self.inventory, nodes, self._knock, program=self._program, threads=SimThreads(self.world), draw=self.world.rng.randrange
        )
        process.at_death.append(site.catalog.close)
        return site

    def _knock(self, address: str, port: int, limit_s: float) -> bool:
        there = next(agent.host for agent in self.agents.values() if agent.host.address == address)
        answers = self.network.connects(self.host, there)
        pause(0.002 if answers else limit_s)
        return answers

    def _program(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes, ok: Sequence[int]) -> Output:
        """Run a fence as a process of its own, which outlives whoever called it."""
        fence = lease.fence if self.policy.fence is FenceKind.LEASE else self.switch.fence
        box = Mailbox()
        process = self.host.process("fence")

        def act() -> None:
            said, code = answer(fence, stdin)
            self.world.say(process.name, f"ends with {int(code)}: {said.strip()}")
            self.world.after(0, lambda: box.bring(Output(tuple(argv), int(code), said.encode(), b"")))
            process.die()

        process.start(act, "fence")
        (output,) = box.wait(None)
        return output  # type: ignore[no-any-return]
