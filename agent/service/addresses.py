"""Verbs on service addresses, and the lookout: who else says that he has one of ours, and whether the link carries.

Held twice, the higher epoch keeps an address: a node that hears a proved claim of a higher one ends its exports, gives up the address and
unmounts. Whoever else says that he has it is told of to the management node, and everybody is told again where it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Final

from agent.contract import messages as m
from agent.contract.errors import LandfallError, LeaseEnded, RequestRefused
from agent.service.node import Node, ProgressCall
from agent.service.serving import require_primary, stop_serving
from agent.serving import address as addresses
from agent.serving.address import Claim, Interface
from agent.serving.links import Events
from agent.serving.tenure import Tenure
from agent.system.clock import monotonic_s
from agent.system.failpoint import failpoint
from agent.system.neighbour import Heard, Link, listening
from agent.volume.substrate import VolumeRecord

QUIET_S: Final = 10.0
"""For so long the same stranger is not told of again, and a defence not repeated more than once a second."""

log = logging.getLogger("landfall.agent")


def take(node: Node, arguments: m.TakeAddress, progress: ProgressCall) -> m.Done:
    """Have a volume's address and tell everybody; AddressTaken if another node answers for it, NotPrimary on a secondary.

    Order: recorded, NFS clients let wait, added, announced, smbd. If we die after it is recorded, asking again goes on; dropping it works
    in any state.
    """
    wanted = addresses.parse(arguments.address)
    with node.address_lock:
        record = node.record(arguments.volume)
        require_primary(node, record, record.epoch)
        tenure = node.tenures.of(record.id)
        if tenure is not None and node.tenures.ended(tenure) is not None:
            raise LeaseEnded(f"node {node.config.node} gave volume {record.name} up", fix="Order it to serve again first.")
        _refuse_another(node, record, wanted)
        link = node.link()
        failpoint("address.before_take")
        if not node.machine.addresses.is_held(wanted):
            node.machine.addresses.refuse_taken(link, wanted)
        node.tenures.have_address(record.id, record.name, record.epoch, str(wanted))
        failpoint("address.recorded")
        node.exports.prepare(node.share(record), record.id)
        node.machine.addresses.add(link, wanted)
        failpoint("address.after_take")
        node.exports.follow()
    _announce(node, link, wanted, Claim(record.id, record.epoch))
    return m.Done()


def drop(node: Node, arguments: m.DropAddress, progress: ProgressCall) -> m.Done:
    """Have an address no more. RequestRefused for one that this node has for another volume, or that is its own."""
    wanted = addresses.parse(arguments.address)
    with node.address_lock:
        record = node.record(arguments.volume)
        _refuse_another(node, record, wanted, own_only=True)
        if str(wanted.ip) == node.config.replication_address:
            raise RequestRefused(f"{wanted.ip} is the replication address of node {node.config.node}")
        node.drop_address(record, wanted)
        if not node.serving(record):
            node.exports.close(node.share(record))  # prepared with the address, and never opened
    return m.Done()


def decide(own: int, claimed: int | None) -> bool:
    """Whether to give an address up: to whom proves a higher epoch, and to nobody else."""
    return claimed is not None and claimed > own


class Lookout:
    """Threads that watch the link of the service addresses for as long as the agent runs."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._ending = node.machine.threads.event()
        self._told: dict[tuple[str, bytes], float] = {}
        self._defended = 0.0

    def begin(self) -> None:
        """Listen, and follow the link."""
        for work in (self._hear, self._follow_link):
            self._node.machine.threads.start(partial(self._keep_on, work), work.__name__)

    def close(self) -> None:
        """End soon."""
        self._ending.set()

    def _keep_on(self, work: Callable[[Link], None]) -> None:
        """Do it again and again: an interface may be missing for a while, and what fails is said once a minute at the most."""
        while not self._ending.wait(1.0):
            try:
                work(self._node.link())
            except (LandfallError, OSError) as error:
                log.info("%s: %s", work.__name__, error)
                self._ending.wait(30.0)

    def _hear(self, link: Link) -> None:
        if len(link.mac) != 6 or not any(link.mac):
            self._ending.wait(3600.0)  # a loopback: nobody else is there
            return
        with listening(link) as ears:
            while not self._ending.is_set():
                for said in ears.within(1.0):
                    self.hear(link, said)

    def hear(self, link: Link, said: Heard) -> None:
        """Take note of what somebody else says of an address."""
        for tenure in self._node.tenures.all():
            if tenure.address and addresses.parse(tenure.address).ip == said.address:
                self._meet(link, tenure, said)

    def _meet(self, link: Link, tenure: Tenure, said: Heard) -> None:
        """Answer somebody who says that he has an address of ours."""
        wanted = addresses.parse(tenure.address)
        if not self._node.machine.addresses.is_held(wanted):
            return
        claimed = addresses.epoch_of(said, tenure.volume)
        if decide(tenure.epoch, claimed):
            words = f"{said.mac.hex(':')} has {wanted.ip} for volume {tenure.name} at epoch {claimed}, this node at epoch {tenure.epoch}"
            log.warning("overtaken: %s", words)
            self._node.outbox.put("overtaken", tenure.volume, None, f"{words}: it gives up")
            stop_serving(self._node, self._node.record(tenure.volume))
            self._node.tenures.end(tenure.volume)
            return
        now = monotonic_s()
        if now - self._defended >= 1.0:
            self._defended = now
            self._node.machine.addresses.announce(link, wanted, Claim(tenure.volume, tenure.epoch))
        if now - self._told.get((tenure.address, said.mac), -QUIET_S) >= QUIET_S:
            self._told[tenure.address, said.mac] = now
            words = f"{said.mac.hex(':')} on {link.name} says that it has {wanted.ip} of volume {tenure.name}"
            claim = f"it claims epoch {claimed}" if claimed is not None else "it proves no epoch"
            self._node.outbox.put("address-conflict", tenure.volume, None, f"{words}; {claim}, this node keeps it at epoch {tenure.epoch}")

    def _follow_link(self, link: Link) -> None:
        with Events() as events:
            for state in events.changes(link.index, 1.0):
                if self._ending.is_set():
                    return
                if state is not None:
                    kind, words = ("link-up", "carries again") if state else ("link-down", "carries no more")
                    for record in self._node.substrate.volumes():
                        self._node.outbox.put(kind, record.id, None, f"interface {link.name} of node {self._node.config.node} {words}")
                    if state:
                        self._say_again(link)

    def _say_again(self, link: Link) -> None:
        for tenure in self._node.tenures.all():
            if tenure.address:
                self._node.machine.addresses.announce(link, addresses.parse(tenure.address), Claim(tenure.volume, tenure.epoch))


def _refuse_another(node: Node, record: VolumeRecord, wanted: Interface, *, own_only: bool = False) -> None:
    """Refuse an address that is held for another volume, or a second one for this volume."""
    for tenure in node.tenures.all():
        if tenure.address and tenure.volume == record.id and not own_only and addresses.parse(tenure.address) != wanted:
            raise RequestRefused(f"volume {record.name} has the address {tenure.address} here", fix="Drop that one first.")
        if tenure.address and tenure.volume != record.id and addresses.parse(tenure.address).ip == wanted.ip:
            raise RequestRefused(f"{wanted.ip} is the address of volume {tenure.name}", fix="Give each volume an address of its own.")


def _announce(node: Node, link: Link, wanted: Interface, claim: Claim) -> None:
    """Say it once now, and again in the background: a single frame can get lost, and clients would go on asking the old node."""

    def again() -> None:
        for _ in range(addresses.ANNOUNCEMENTS - 1):
            if node.ending.wait(addresses.ANNOUNCE_EVERY_S) or not node.machine.addresses.is_held(wanted):
                return
            node.machine.addresses.announce(link, wanted, claim)

    node.machine.addresses.announce(link, wanted, claim)
    node.machine.threads.start(again, "announce")
