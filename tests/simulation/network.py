"""Links that are cut one way or both; requests that come late, or whose answer gets lost after they took effect."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from agent.contract import messages as m
from agent.contract.errors import DeviceFailed, LandfallError, NodeUnreachable
from mgmt.reach import Node
from tests.simulation.agent import Agent
from tests.simulation.machine import Host
from tests.simulation.world import Mailbox, S, World, pause

GIVES_UP_S: Final = 15.0
"""How long the kernel of a sender repeats what nobody confirms (TCP_USER_TIMEOUT, mgmt.reach.GONE_AFTER_MS)."""
REPEATS_S: Final = 0.5
CONNECT_LIMIT_S: Final = 10.0

Way = tuple[str, str]


class Network:
    """Who reaches whom, in each direction."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cut: set[Way] = set()

    def reaches(self, one: Host, other: Host) -> bool:
        """Whether a packet of one comes to the other."""
        return one is other or (one.name, other.name) not in self.cut

    def connects(self, one: Host, other: Host) -> bool:
        """Whether one gets a connection to the other's kernel."""
        return other.answers and self.reaches(one, other) and self.reaches(other, one)

    def transmit(self, one: Host, other: Host, act: Callable[[], None], lost: Callable[[], None]) -> None:
        """Let something come over a connection that there is: soon, late, or never; then the connection is ``lost``."""
        rng = self.world.rng
        delay_s = rng.uniform(0.1, 3.0) if rng.random() < 0.02 else rng.uniform(0.001, 0.01)
        until_ns = self.world.now_ns + round(GIVES_UP_S * S)

        def come() -> None:
            if self.reaches(one, other) and other.answers:
                act()
            elif self.world.now_ns < until_ns and other.powered:
                self.world.after(REPEATS_S, come)
            else:
                lost()

        self.world.after(delay_s, come)


class NodeOverNetwork(Node):
    """A management node's view of an agent; what it asks goes over the network of the simulation."""

    def __init__(self, network: Network, here: Host, agent: Agent) -> None:
        super().__init__(agent.host.name, _NoDoor())
        self._network = network
        self._here = here
        self._agent = agent

    def ask(self, arguments: Any, on_progress: object = None, *, limit_s: float | None = None) -> Any:
        """Return the agent's result, as the real one does; NodeUnreachable says nothing of whether it was done."""
        network, here, there = self._network, self._here, self._agent.host
        if not network.connects(here, there) and network.world.rng.random() < 0.5:  # there is no connection, and none is made
            pause(CONNECT_LIMIT_S if not (there.answers and network.reaches(here, there)) else CONNECT_LIMIT_S / 2)
            raise NodeUnreachable(f"{self.name} cannot be reached")
        box = Mailbox()
        lost = partial(box.bring, NodeUnreachable(f"the connection to {self.name} broke"))
        network.transmit(here, there, lambda: self._arrives(arguments, box, lost), lost)
        return self._answered(box, m.VERB_OF[type(arguments)], limit_s or 600.0)

    def fetch(self, arguments: Any, on_progress: object = None) -> bytes:
        return bytes(self.ask(arguments))

    def close(self) -> None:
        """Nothing is open."""

    def _arrives(self, arguments: Any, box: Mailbox, lost: Callable[[], None]) -> None:
        agent, network = self._agent, self._network

        def back(answer: Any) -> None:
            network.transmit(agent.host, self._here, lambda: box.bring(answer), lost)

        agent.asked(arguments, self.term, back)

    def _answered(self, box: Mailbox, verb: str, limit_s: float) -> Any:
        network, there = self._network, self._agent.host
        world, boots = network.world, there.clock.boots
        until_ns = world.now_ns + round(limit_s * S)
        apart_ns: int | None = None
        while not (brought := box.wait(min(5.0, max(0.0, (until_ns - world.now_ns) / S)))):
            apart_ns = None if network.connects(self._here, there) else apart_ns or world.now_ns
            is_another = there.answers and there.clock.boots != boots  # it knows nothing of the connection
            if is_another or world.now_ns >= until_ns or (apart_ns is not None and world.now_ns - apart_ns > GIVES_UP_S * S):
                raise NodeUnreachable(f"the agent on {self.name} fell silent during {verb}")
        (answer,) = brought
        if isinstance(answer, LandfallError):
            raise LandfallError.from_wire(answer.to_wire()) if not isinstance(answer, NodeUnreachable) else answer
        if isinstance(answer, OSError):
            raise DeviceFailed(f"{verb} failed on a disk of this node", cause=str(answer))
        return answer


class _NoDoor:
    """The door of a node that is reached otherwise."""

    def open(self) -> Any:
        raise AssertionError("what is asked goes over the simulated network")

    def close(self) -> None:
        """There is none."""
