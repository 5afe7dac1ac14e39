"""The drill: a volume of real files, a replication that dies in the middle, a failover, and an independent check of the result.

In the order of events: the lab; fill, replicate; change (by programs on the server and by SMB clients); replicate through a proxy that
counts bytes; at the chosen byte something dies; what the kind of death asks for: the transfer resumes, or nas2 takes over; the check; the
report.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final
from uuid import UUID

from pyroute2.netns import setns

from agent.contract import messages as m
from agent.contract.dmi import Dmi
from agent.contract.errors import DrillFailed, LandfallError
from agent.system.block import go_down
from agent.system.clock import monotonic_s, wall_ns
from mgmt import run as operations
from mgmt.drill import evidence, workload
from mgmt.drill.course import Course
from mgmt.drill.disks import frozen_on, within_node
from mgmt.drill.evidence import Evidence, Findings
from mgmt.drill.options import MIB, Kill, Options
from mgmt.drill.report import keep
from mgmt.drill.stage import Stage, teller
from mgmt.drill.wire import expected_bytes
from mgmt.failover.driver import failover
from mgmt.failover.plan import Wish
from mgmt.inventory import Inventory, read_inventory
from mgmt.lab import control, lifecycle
from mgmt.lab.layout import NAMESPACES, NODE_ROOT, Lab, LabSubstrate, NodeName
from mgmt.lab.namespace import enter
from mgmt.lab.proxy import Action, Direction, Endpoint, Event, Proxy, Trigger
from mgmt.report import LossStatement

VOLUME: Final = "drill"
ADDRESS: Final = "10.77.0.100/24"
"""Where clients find the volume, before and after."""
SILENCE_LIMIT_S: Final = 3.0
DEATH_LIMIT_S: Final = 300.0
DETECT_LIMIT_S: Final = 60.0


class Drill:
    """One drill in one lab."""

    def __init__(self, options: Options, stage: Stage) -> None:
        self.options, self.stage, self.course = options, stage, Course()
        self.folder = options.folder.resolve()
        self.lab = Lab.at(self.folder / "lab")
        self._stack = ExitStack()
        self._died_ns = 0

    def run(self) -> Course:
        """Return the course of the drill; the lab is gone afterwards, also after Ctrl-C or an error, unless it is to be kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with self.stage.step("lab: three nodes, their pools and their agents"):
                lifecycle.down(self.lab)
                lifecycle.up(self.lab, substrate=LabSubstrate(self.options.substrate))
            with self._stack:
                self._play()
        finally:
            if not self.options.keep_lab:
                lifecycle.down(self.lab)
        return self.course

    # --- the steps, in order ---

    def _play(self) -> None:
        options = self.options
        self._stack.enter_context(_inside(self.lab.namespace(NodeName.MGMT)))
        inventory = read_inventory(self.lab.node(NodeName.MGMT) / "etc" / "landfall.toml")
        site = self._stack.enter_context(operations.Site(_impatient(inventory)))
        operations.add_volume(
            site,
            VOLUME,
            filesystem=options.filesystem,
            size_bytes=options.size_bytes,
            primary=NodeName.NAS1,
            secondary=NodeName.NAS2,
            address=ADDRESS,
        )
        root = self._served(NodeName.NAS1)
        client = self._client()
        with self.stage.step(f"nas1: {options.files:,} files on {options.filesystem}") as advance:
            workload.fill(root, options.files, options.content_bytes, options.seed, advance)
            workload.smb_changes(client, 2 * options.seed)
        with self.stage.step("nas1 -> nas2: first generation, all of it") as advance:
            operations.replicate(site, VOLUME, differential=options.differential, tell=teller(advance))
        match options.kill:
            case Kill.LINK:
                self._interrupted(site, root, client, "the link is cut", self._cut_link, turn=0)
                self._heal_and_resume(site)
                self._interrupted(site, root, client, "the link is cut for good", self._cut_link, turn=1)
                self._fail_over(site, declare_dead=True)
            case Kill.RECEIVER:
                self._interrupted(site, root, client, "nas2's agent is killed", self._kill_receiver, turn=0)
                control.start_service(self.lab, NodeName.NAS2, "agent")
                self._heal_and_resume(site)
            case Kill.POWER:
                self._interrupted(site, root, client, "nas2 loses power", self._cut_power, turn=0)
                lifecycle.kill(self.lab, NodeName.NAS1)
                self._died_ns = wall_ns()
                lifecycle.start_node(self.lab, NodeName.NAS2)
                self._fail_over(site, declare_dead=False)
            case Kill.AGENT:
                self._interrupted(site, root, client, "nas1's agent is killed", self._kill_agent, turn=0)
                self._fail_over(site, declare_dead=True)  # its machine still answers
            case Kill.NODE:
                self._interrupted(site, root, client, "nas1 dies", self._kill_node, turn=0)
                self._fail_over(site, declare_dead=False)

    def _interrupted(
        self, site: operations.Site, root: Path, client: workload.SmbClient, what: str, die: Callable[[], None], *, turn: int
    ) -> None:
        """Change the volume, replicate it, and let ``die`` happen at the chosen byte. Returns when NAS 2 has said that it noticed."""
        options = self.options
        with self.stage.step(f"nas1: {options.changes:,} files changed, some of them by SMB clients") as advance:
            if not turn:
                workload.smb_changes(client, 2 * options.seed + 1)
            workload.change(root, options.changes, options.seed + 1000 * turn, advance)
        writing = workload.OpenWrite(client, f"open at the freeze {turn}", root / f"open at the freeze {turn}")
        (root / f"deleted while open {turn}").write_bytes(os.urandom(200_000))
        with ExitStack() as held, self.stage.step(f"nas1 -> nas2: the differential, until {what}") as advance:
            held.callback(writing.end, 0.0)
            writing.begin()
            name = f"deleted while open {turn}"
            held.enter_context(workload.deleted_while_open(client, name, root / name))
            # A dead node's programs hold no files; they are needed until the generation is taken, and no longer.
            order = _Interruption(self, site, die, held.close, advance)
            order.run()
        self.course.killed_at = order.killed_at
        self._died_ns = order.died_ns
        self.course.bytes_sent = order.bytes_sent
        self.stage.say(f"  killed after {order.bytes_sent / MIB:.1f} MiB on the wire")
        if self.options.kill in (Kill.RECEIVER, Kill.POWER):
            return  # whoever should have noticed was the one who died
        with self.stage.step("nas2: notices, and notifies the management node"):
            operations.wait_for_failure(site, NodeName.NAS2, order.transfer, DETECT_LIMIT_S)
        self.course.detect_s = monotonic_s() - order.died_s

    def _heal_and_resume(self, site: operations.Site) -> None:
        """Let the transfer resume, and prove that it converges: the image on NAS 2 is the image on NAS 1."""
        lifecycle.heal(self.lab, NodeName.NAS1, NodeName.NAS2)
        recorded = self._reception(site).pieces_arrived
        with self.stage.step("nas1 -> nas2: resumed, only what is missing") as advance:
            done = operations.replicate(site, VOLUME, differential=self.options.differential, tell=teller(advance))
        self.course.resumed.append({"pieces_sent": done.sent.pieces_sent, "pieces_skipped": done.sent.pieces_skipped})
        self.stage.say(f"  {done.sent.pieces_skipped:,} pieces had arrived before, {done.sent.pieces_sent:,} were sent")
        with (
            self.stage.step("check: both images, block by block"),
            frozen_on(self.lab, NodeName.NAS1) as source,
            frozen_on(self.lab, NodeName.NAS2) as copy,
        ):
            if not evidence.generations_equal(source(done.target), copy(done.target)):
                raise DrillFailed("after a resume the volume on nas2 is not the one on nas1")
        if done.sent.pieces_skipped != recorded:
            raise DrillFailed(f"{recorded} pieces were recorded as arrived, and {done.sent.pieces_skipped} were not sent again")
        self.course.facts = self._reception(site)

    def _reception(self, site: operations.Site) -> m.TransferFacts:
        """Return the newest transfer as NAS 2 knows it."""
        return max(site.node(NodeName.NAS2).ask(m.ListTransfers()).transfers, key=lambda facts: facts.target.counter)

    def _fail_over(self, site: operations.Site, *, declare_dead: bool) -> None:
        with self.stage.step("nas2 takes over: fence, determination, recovery, address, exports") as advance:
            done = failover(site, VOLUME, Wish(declare_dead=declare_dead), lost_ns=self._died_ns, tell=teller(advance))
        if done is None or done.transfer is None:
            raise DrillFailed("nothing was recovered of the transfer")
        self.course.failover = done
        statement = site.catalog.newest_salvage(done.volume).statement
        self.course.statement = statement
        keep(self.folder, statement)
        with self.stage.step("check: every file against nas1's frozen generations"):
            self.course.findings = self._check(site, statement)

    def _check(self, site: operations.Site, statement: LossStatement) -> Findings:
        files = site.evidence_folder(statement.transfer)
        namespace = NAMESPACES / self.lab.namespace(NodeName.MGMT)
        with frozen_on(self.lab, NodeName.NAS1) as source:
            return evidence.check(
                Evidence(
                    base=source(statement.base),
                    target=source(statement.target),
                    filesystem=self.options.filesystem,
                    result=self._served(NodeName.NAS2),
                    dmi=files / "dmi",
                    arrival=files / "arrival",
                    smb=f"//{ADDRESS.partition('/')[0]}/{VOLUME}",
                    smb_client=f"nsenter --net={namespace} smbclient -N",
                ),
                statement,
                self.folder,
            )

    # --- what dies ---

    def _kill_agent(self) -> None:
        control.kill_service(self.lab, NodeName.NAS1, "agent")

    def _kill_node(self) -> None:
        self._cut_link()  # a machine without power does not say goodbye, as processes that are killed do
        lifecycle.kill(self.lab, NodeName.NAS1)

    def _cut_link(self) -> None:
        lifecycle.cut(self.lab, NodeName.NAS1, NodeName.NAS2)

    def _kill_receiver(self) -> None:
        control.kill_service(self.lab, NodeName.NAS2, "agent")

    def _cut_power(self) -> None:
        pool_fd = os.open(within_node(self.lab, NodeName.NAS2, NODE_ROOT / "pool"), os.O_RDONLY | os.O_DIRECTORY)
        try:
            go_down(pool_fd)
        finally:
            os.close(pool_fd)
        lifecycle.kill(self.lab, NodeName.NAS2)

    # --- where things are ---

    def _served(self, node: NodeName) -> Path:
        return within_node(self.lab, node, NODE_ROOT / "srv" / VOLUME)

    def _client(self) -> workload.SmbClient:
        namespace = NAMESPACES / self.lab.namespace(NodeName.MGMT)
        return workload.SmbClient(ADDRESS.partition("/")[0], VOLUME, ("nsenter", f"--net={namespace}", "--"))


class _Interruption:
    """A replication through a proxy, and a death at a byte of it."""

    def __init__(
        self, drill: Drill, site: operations.Site, die: Callable[[], None], taken: Callable[[], None], advance: Callable[[int, int], None]
    ) -> None:
        self._drill, self._site, self._die, self._taken, self._advance = drill, site, die, taken, advance
        self._reached: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._proxy: Proxy | None = None
        self._expected = 0
        self._failure: BaseException | None = None
        self.transfer = UUID(int=0)
        self.killed_at = 0.0
        self.bytes_sent = 0
        self.died_s = 0.0
        self.died_ns = 0

    def run(self) -> None:
        """Return when it is dead and the replication has failed of it."""
        replication = threading.Thread(target=self._replicate, name="replication")
        with ExitStack() as stack:
            self._stack = stack
            replication.start()
            try:
                event = self._reached.get(timeout=DEATH_LIMIT_S)
            except queue.Empty:
                raise DrillFailed("the byte at which something was to die never came") from None
            if event is None or self._proxy is None:
                raise DrillFailed("the transfer ended before its byte came", cause=str(self._failure))
            self._die()
            self.died_s, self.died_ns = monotonic_s(), wall_ns()
            self.bytes_sent = event.upstream_bytes
            self.killed_at = event.upstream_bytes / self._expected
            if self._drill.options.kill in (Kill.AGENT, Kill.RECEIVER):
                self._proxy.cut()  # a process that dies closes its connections; a node or a link falls silent
            replication.join(DEATH_LIMIT_S)
            if replication.is_alive():
                raise DrillFailed("the management node did not notice that the transfer failed")

    def _replicate(self) -> None:
        try:
            with suppress(LandfallError):
                operations.replicate(
                    self._site,
                    VOLUME,
                    differential=self._drill.options.differential,
                    attempts=1,
                    rate_limit_bytes_s=self._drill.options.rate_bytes_s,
                    route=self._route,
                    on_order=self._on_order,
                    tell=teller(self._advance),
                )
        except BaseException as error:
            self._failure = error
        finally:
            self._reached.put(None)

    def _on_order(self, transfer: UUID, built: m.Built | None) -> None:
        self._taken()
        self.transfer = transfer
        raw = self._site.node(NodeName.NAS1).fetch(m.FetchDmi(transfer))
        with frozen_on(self._drill.lab, NodeName.NAS1) as image_of:
            self._expected = len(raw) + expected_bytes(Dmi.decode(raw), image_of, self._drill.options.differential)

    def _route(self, address: str, port: int) -> tuple[str, int]:
        """Put the proxy on NAS 2's own address, so that cutting the link cuts what leads to it."""
        trigger = Trigger(max(1, int(self._drill.options.at * self._expected)), Action.SIGNAL, Direction.UPSTREAM)
        proxy = Proxy(
            Endpoint(address, 0),
            Endpoint(address, port),
            namespace=self._drill.lab.namespace(NodeName.NAS2),
            on_event=lambda event: self._reached.put(event) if event.action is Action.SIGNAL else None,
            trigger=trigger,
        )
        self._proxy = self._stack.enter_context(proxy)
        return proxy.endpoint.host, proxy.endpoint.port


def _impatient(inventory: Inventory) -> Inventory:
    """Return the lab's inventory with the drill's own limit for a peer that is silent."""
    return replace(inventory, silence_limit_s=SILENCE_LIMIT_S)


@contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """Put this thread, and those it starts, into a network namespace, and back."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(namespace)
        yield
        setns(own)
    finally:
        os.close(own)
