"""A replication through a proxy that counts bytes, and what happens at some of them."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from agent.contract import messages as m
from agent.contract.dmi import Dmi
from agent.contract.errors import DrillFailed
from mgmt import run as operations
from mgmt.drill.disks import frozen_on
from mgmt.drill.scenario import Blow, Fault
from mgmt.drill.sending import COMMITTED, Sending
from mgmt.drill.strikes import WIRE, Wire
from mgmt.drill.wire import expected_bytes as expected_on_wire
from mgmt.inventory import read_inventory
from mgmt.lab.layout import Lab, NodeName
from mgmt.lab.proxy import Action, Direction, Endpoint, Event, Proxy, Trigger

BYTE_LIMIT_S: Final = 300.0
END_LIMIT_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Ordered:
    """What is replicated."""

    lab: Lab
    configuration: Path
    volume: str
    differential: m.Differential
    rate_bytes_s: int


class Interruption:
    """One replication and its blows. The proxy stays until `close`, so that what is late can still arrive."""

    def __init__(
        self,
        ordered: Ordered,
        blows: Sequence[Blow],
        deal: Callable[[Fault], None],
        taken: Callable[[], None],
        advance: Callable[[int, int], None],
    ) -> None:
        """``taken`` is called once the generation is taken."""
        self._ordered, self._blows, self._deal, self._taken, self._advance = ordered, blows, deal, taken, advance
        self._reached: queue.SimpleQueue[Event | str] = queue.SimpleQueue()  # a byte's turn, or the code with which the replication ended
        self._sending: Sending | None = None
        self._proxy: Proxy | None = None
        self.expected_bytes = 0
        self.transfer = UUID(int=0)
        self.killed_at = 0.0
        self.bytes_sent = 0

    def run(self) -> None:
        """Return when everything has happened. The order to replicate may not have ended then: an operator need not wait for that."""
        of = self._ordered
        sending = self._sending = Sending(
            of.configuration,
            of.volume,
            of.differential,
            of.rate_bytes_s,
            on_order=self._on_order,
            route=self._route,
            advance=self._advance,
            on_end=self._reached.put,
        )
        for number, blow in enumerate(self._blows):
            proxy = self._await_byte(sending)
            following = self._blows[number + 1 :]
            if following:
                proxy.arm(self._trigger(following[0]))
            if blow.fault is Fault.MANAGEMENT_POWER_CUT:
                sending.kill()
            self._deal(blow.fault)
            match WIRE[blow.fault]:
                case Wire.RESET:
                    proxy.cut()
                case Wire.OPEN:
                    proxy.resume()
                case Wire.SILENT:
                    pass

    def finish(self) -> None:
        """Return when the replication has failed of what happened to it; DrillFailed if it does not end, or was committed."""
        if self._sending is not None and not self._sending.ended(END_LIMIT_S):
            raise DrillFailed("the management node did not notice that the transfer failed")
        if self._last_word() == COMMITTED:
            raise DrillFailed("the transfer was committed in spite of what happened to it", fix="Take a lower --at, or more --changes.")

    def let_go(self) -> None:
        """Let what is held pass."""
        if self._proxy is not None:
            self._proxy.resume()

    def close(self) -> None:
        """End the order to replicate, the proxy, and every connection through it."""
        if self._sending is not None:
            self._sending.kill()
        proxy, self._proxy = self._proxy, None
        if proxy is not None:
            proxy.__exit__(None, None, None)

    def _await_byte(self, sending: Sending) -> Proxy:
        """Return once the next blow's byte has come."""
        while True:
            try:
                event = self._reached.get(timeout=BYTE_LIMIT_S)
            except queue.Empty:
                raise DrillFailed("the byte at which something was to happen never came") from None
            if isinstance(event, Event) and self._proxy is not None:
                self.bytes_sent = event.upstream_bytes
                self.killed_at = event.upstream_bytes / self.expected_bytes
                return self._proxy
            if sending.failure is not None or not self.bytes_sent:
                raise DrillFailed("the transfer ended before its byte came", cause=str(sending.failure or event))

    def _last_word(self) -> str:
        said = ""
        while not self._reached.empty():
            event = self._reached.get()
            said = event if isinstance(event, str) else said
        return said

    def _on_order(self, transfer: UUID) -> None:
        self._taken()
        self.transfer = transfer
        of = self._ordered
        with operations.Site(read_inventory(of.configuration)) as site:
            raw = site.node(NodeName.NAS1).fetch(m.FetchDmi(transfer))
        with frozen_on(of.lab, NodeName.NAS1) as image_of:
            self.expected_bytes = len(raw) + expected_on_wire(Dmi.decode(raw), image_of, of.differential)

    def _route(self, address: str, port: int) -> tuple[str, int]:
        """Put the proxy on NAS 2's own address, so that cutting the link cuts what leads to it."""
        proxy = Proxy(
            Endpoint(address, 0),
            Endpoint(address, port),
            namespace=self._ordered.lab.namespace(NodeName.NAS2),
            on_event=lambda event: self._reached.put(event) if event.action is Action.SIGNAL else None,
            trigger=self._trigger(self._blows[0]),
        )
        self._proxy = proxy.__enter__()
        return proxy.endpoint.host, proxy.endpoint.port

    def _trigger(self, blow: Blow) -> Trigger:
        return Trigger(max(1, int(blow.at * self.expected_bytes)), Action.SIGNAL, Direction.UPSTREAM)
