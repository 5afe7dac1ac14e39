"""An agent and its keeper on a simulated NAS: the verbs of the product, its leases, its lookout, its term."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NoReturn

from agent.config import Config
from agent.contract import messages as m
from agent.contract.errors import (
    DeviceBusy,
    LandfallError,
    NodeUnreachable,
)
from agent.service import HANDLERS, transfers
from agent.service.addresses import Lookout
from agent.service.leases import LeaseWatch
from agent.service.node import Node
from agent.serving import keeper
from agent.serving.keeper import KeeperOrder
from agent.system import clock
from agent.system.files import held_elsewhere, lock_for_life
from agent.system.neighbour import Heard, Link
from tests.simulation import data_path
from tests.simulation.machine import Host, Nas
from tests.simulation.world import KilledError, Process, World, current, pause

KEEPER_EVERY_S: Final = 2.0
LEASES_EVERY_S: Final = 5.0
"""Less often than they do it: the margin of a lease has room for that, and a run of a thousand has none for more."""

Answer = Callable[[Any], None]


class Agent:
    """The agent of a NAS: it is started, killed, stopped, and started again on what its disk has."""

    def __init__(self, world: World, host: Nas, connects: Callable[[Host, Host], bool], margin_s: float) -> None:
        self.world = world
        self.host = host
        self.peer: Agent = self
        self.margin_s = margin_s
        self.process: Process | None = None
        self.keeper: Process | None = None
        self.node: Node | None = None
        self.passing: Callable[[Process, str], None] = lambda process, name: None
        self.connects = connects
        self._lookout: Lookout | None = None
        self._open: dict[int, Answer] = {}
        self._number = 0
        host.hears = self._hears

    @property
    def runs(self) -> bool:
        """Whether there is a process."""
        return self.process is not None and self.process.alive

    def start(self) -> None:
        """Start it, if it does not run and its machine does."""
        if self.runs or not self.host.powered:
            return
        process = self.host.process("agent")
        process.passing = lambda name: self.passing(process, name)
        process.at_death.append(self._connections_end)
        self.process, self.node = process, None
        self.world.say(process.name, "starts")
        process.start(self._serve, "start")

    def kill(self) -> None:
        """Kill it, as by SIGKILL."""
        if self.process is not None and self.process.alive:
            self.world.say(self.process.name, "is killed")
            self.process.die()

    def asked(self, arguments: Any, term: int, answer: Answer) -> None:
        """Take a request that came over the network; one that comes where no agent is is refused at once."""
        process, node = self.process, self.node
        if process is None or not process.alive or node is None:
            answer(NodeUnreachable(f"the agent on {self.host.name} is not there"))
            return
        self._number += 1
        number = self._number
        self._open[number] = answer

        def handle() -> None:
            try:
                result = self._handled(node, arguments, term)
            except (LandfallError, OSError) as error:
                result = error
            if self._open.pop(number, None) is not None:
                answer(result)

        process.start(handle, m.VERB_OF[type(arguments)])

    def _handled(self, node: Node, arguments: Any, term: int) -> Any:
        verb = m.VERB_OF[type(arguments)]
        node.term.admit(term, looking=verb in m.LOOKING)
        replaced = data_path.HANDLERS.get(type(arguments))
        handler = partial(replaced, self) if replaced else HANDLERS[type(arguments)]
        result = handler(node, arguments, lambda step, done, total: None)
        if verb not in m.LOOKING and verb != "outbox.acknowledge":
            self.world.say(current().process.name, f"did {verb}")
        return result

    def _serve(self) -> None:
        folder = self.host.folder
        config = Config(
            self.host.name,
            self.host.address,
            state_dir=folder / "state",
            run_dir=folder / "run",
            mount_dir=folder / "srv",
            pool_dir=folder / "pool",
            lease_margin_s=self.margin_s,
            lab=True,
        )
        pause(self.world.rng.uniform(0.1, 1.5))
        current().process.own(lock_for_life(folder / "state" / "lock"))
        node = Node(config, self.host.kernel, substrate=self.host.disk, keep=self._keep)
        node.recover()
        transfers.recover(node)
        self._lookout = Lookout(node)
        LeaseWatch(node, every_s=LEASES_EVERY_S)
        self.node = node

    def _connections_end(self) -> None:
        """Whoever waits for an answer is told by the kernel, if that lives."""
        waiting, self._open = self._open, {}
        for answer in waiting.values() if self.host.powered else ():
            answer(NodeUnreachable(f"the agent on {self.host.name} went away"))

    def _hears(self, link: Link, said: Heard) -> None:
        process, lookout = self.process, self._lookout
        if process is not None and process.alive and self.node is not None and lookout is not None:
            process.start(lambda: lookout.hear(link, said), "lookout")

    # --- the keeper ---

    def _keep(self, order: KeeperOrder) -> None:
        if held_elsewhere(order.folder / "keeper"):
            return
        process = self.host.process("keeper")
        process.start(lambda: self._keeper(process, order), "keeper")
        self.keeper = process
        if not clock.wait_until(lambda: held_elsewhere(order.folder / "keeper"), 60.0, every_s=0.2):
            raise DeviceBusy("the keeper of the leases did not start")

    def _keeper(self, process: Process, order: KeeperOrder) -> None:
        pause(self.world.rng.uniform(0.1, 1.0))
        try:
            process.own(lock_for_life(order.folder / "keeper", wait_s=keeper.HANDS_S))
        except DeviceBusy:
            process.die()
            return

        def leave() -> NoReturn:
            process.die()
            raise KilledError

        keeper.keep(order, self.host.kernel, leave, every_s=KEEPER_EVERY_S)
