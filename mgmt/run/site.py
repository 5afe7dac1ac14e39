"""What operations work on: the configuration, the catalog, the authority and the nodes."""

from __future__ import annotations

import os
import pwd
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID

from agent.contract import messages as m
from agent.contract.errors import ConfigInvalid, DeviceBusy, FailoverBusy, NodeUnreachable, VersionUnknown
from agent.contract.messages import Progress
from agent.system.files import lock_for_life
from agent.system.run import run as run_program
from agent.system.threads import Threads
from mgmt.authority import Authority
from mgmt.catalog import Catalog
from mgmt.fencing.proof import Program
from mgmt.inventory import Inventory
from mgmt.reach import Node, knock, ssh_node

Teller = Callable[[str, Progress], None]
"""Told, with the name of the node that is at work, how far a long step is."""

Knock = Callable[[str, int, float], bool]
"""Whether a machine answers at an address and port, within seconds."""

HELLO_LIMIT_S = 20.0
"""At least; who gives nodes longer to be reached has slow ones, where starting the program that answers takes its time as well."""


TERM_STEP = 10**6
"""What a term is above the one before, at least about: the digits below are the chance by which two terms differ."""


def nobody(node: str, progress: Progress) -> None:
    """Be told and say nothing."""


class Site:
    """The management node at work. ``nodes`` and ``knock`` are the network, ``program`` runs fences; tests have others."""

    def __init__(
        self,
        inventory: Inventory,
        nodes: dict[str, Node] | None = None,
        knock: Knock = knock,
        *,
        program: Program = run_program,
        threads: Threads | None = None,
        draw: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        inventory.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.inventory = inventory
        self.knock = knock
        self.program = program
        self.draw = draw
        self.threads = threads or Threads()
        self.catalog = Catalog(inventory.state_dir / "catalog.sqlite")
        self._authority: Authority | None = None
        self._nodes: dict[str, Node] = dict(nodes or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        for node in self._nodes.values():
            node.close()
        self.catalog.close()

    @property
    def authority(self) -> Authority:
        """The private certificate authority, made at its first use."""
        if self._authority is None:
            self._authority = Authority(self.inventory.state_dir / "authority")
        return self._authority

    def node(self, name: str) -> Node:
        """Return a node, to be ordered in the term of now; nothing is connected before it is asked something.

        The term is looked up each time: a service that goes on while `landfall takeover` is called beside it is in charge with it.
        """
        if name not in self._nodes:
            inventory = self.inventory
            self._nodes[name] = ssh_node(
                inventory.entry(name), connect_limit_s=inventory.connect_limit_s, answer_limit_s=inventory.answer_limit_s
            )
        self._nodes[name].term = self.catalog.term
        return self._nodes[name]

    def alive(self, name: str) -> bool:
        """Whether a node's agent answers now. A changed host key is no death: HostKeyChanged goes through."""
        try:
            self.hello(name)
        except NodeUnreachable:
            return False
        return True

    def hello(self, name: str) -> m.NodeFacts:
        """Return who answers at a node's address; ConfigInvalid if it calls itself otherwise, VersionUnknown if it speaks otherwise."""
        facts = self.node(name).ask(m.Hello(), limit_s=max(HELLO_LIMIT_S, self.inventory.connect_limit_s))
        if facts.protocol != m.PROTOCOL:
            raise VersionUnknown(f"{name} speaks protocol {facts.protocol}, this release {m.PROTOCOL}")
        if facts.node != name:
            raise ConfigInvalid(f"the node at {name}'s address calls itself {facts.node}")
        return facts

    @contextmanager
    def alone(self, volume: UUID) -> Iterator[None]:
        """Keep two commands of this management node from deciding who writes a volume at the same time; FailoverBusy.

        Whoever renews a lease holds it too, so that none is renewed while one is waited out. It ends with its holder.
        """
        try:
            descriptor = lock_for_life(self.inventory.state_dir / "locks" / str(volume))
        except DeviceBusy as error:
            raise FailoverBusy("another command decides now who writes this volume") from error
        try:
            yield
        finally:
            os.close(descriptor)

    def take_over(self) -> int:
        """Put this management node in charge and return its term: above every agent's that answers; each is told at once.

        Of two that take over at the same time, each of them reaching other agents, both would have the same term if that were only
        counted. So its last digits are chance: one of the two is above, wherever it is heard of.

        NodeUnreachable if none answers: a term above those of nobody is no proof of anything. A node that is away obeys whoever reaches it
        first. If we die here some have been told; taking over again goes above them.
        """
        terms, away = {}, []
        for entry in self.inventory.node:
            try:
                terms[entry.name] = self.hello(entry.name).term
            except NodeUnreachable as error:
                away.append(error)
        if not terms:
            raise away[0] if away else ConfigInvalid("the inventory names no node")
        self.catalog.set_term(next_term(max(self.catalog.term, *terms.values()), self.draw))
        for name in terms:
            with suppress(NodeUnreachable):  # it went away meanwhile, and is told when it is asked something
                self.hello(name)
        return self.catalog.term

    def evidence_folder(self, transfer: UUID) -> Path:
        """Return where a transfer's DMI and arrival record are kept: the management computer's own memory."""
        folder = self.inventory.state_dir / "transfers" / str(transfer)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder


def operator() -> str:
    """Return who gives the orders: the user and machine of this process."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def next_term(known: int, draw: Callable[[int], int]) -> int:
    """Return a term above ``known`` that nobody else is likely to draw."""
    return (known // TERM_STEP + 1) * TERM_STEP + draw(TERM_STEP)


def release() -> str:
    """Return the release of this installation."""
    try:
        return version("landfall")
    except PackageNotFoundError:
        return "unknown"
