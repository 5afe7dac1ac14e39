"""The drill in the local lab: a volume of real files, and what a scenario says goes wrong with it and is done about it.

In the order of events: the lab; fill, replicate; the scenario's steps, while an SMB client looks on; who serves. An interruption is a
change (by programs on the server and by SMB clients) and a replication through a proxy that counts bytes; at the chosen byte something
happens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from pyroute2.netns import setns

from agent.contract import messages as m
from agent.contract.errors import DrillFailed, LandfallError
from agent.system.clock import monotonic_s, wall_ns
from agent.system.run import run
from mgmt import run as operations
from mgmt.drill import evidence, workload
from mgmt.drill.course import Course
from mgmt.drill.disks import frozen_on, within_node
from mgmt.drill.evidence import Evidence, Findings
from mgmt.drill.interruption import Interruption, Ordered
from mgmt.drill.nodes import LabNodes
from mgmt.drill.onlooker import Onlooker
from mgmt.drill.options import MIB, Options
from mgmt.drill.report import keep
from mgmt.drill.scenario import Failover, Fault, Interrupt, Mend, Notified, Repair, Resume, Scenario, Step, Strike
from mgmt.drill.stage import Stage, teller
from mgmt.drill.strikes import deal, repair
from mgmt.failover.account import account
from mgmt.failover.driver import DONE
from mgmt.failover.journal import Journal
from mgmt.inventory import read_inventory
from mgmt.lab import lifecycle
from mgmt.lab.layout import NAMESPACES, NAS_NODES, NODE_ROOT, Lab, LabSubstrate, NodeName
from mgmt.lab.namespace import enter
from mgmt.report import LossStatement

VOLUME: Final = "drill"
ADDRESS: Final = "10.77.0.100/24"
"""Where clients find the volume, before and after."""
SILENCE_LIMIT_S: Final = 3.0
DETECT_LIMIT_S: Final = 60.0
COMMAND_LIMIT_S: Final = 900.0


class Drill:
    """One drill in one lab."""

    def __init__(self, options: Options, scenario: Scenario, stage: Stage) -> None:
        self.options, self.scenario, self.stage, self.course = options, scenario, stage, Course()
        self.folder = options.folder.resolve()
        self.lab = Lab.at(self.folder / "lab")
        self.nodes = LabNodes(self.lab)
        self._stack = ExitStack()
        self._order: Interruption | None = None  # the newest
        self._lost_ns, self._lost_s = 0, 0.0  # when the newest fault happened, by both clocks
        self._turn = 0

    def run(self) -> Course:
        """Return the course of the drill; the lab is gone afterwards, also after Ctrl-C or an error, unless it is to be kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with self.stage.step("lab: three nodes, their pools and their agents"):
                lifecycle.down(self.lab)
                lifecycle.up(self.lab, substrate=LabSubstrate(self.options.substrate))
                text = self._configuration.read_text()
                self._configuration.write_text(f"silence_limit_s = {SILENCE_LIMIT_S}\n{text}")
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
        with self._site() as site:
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
            with self.stage.step(f"nas1: {options.files:,} files on {options.filesystem}") as advance:
                workload.fill(root, options.files, options.content_bytes, options.seed, advance)
                workload.smb_changes(self._client(), 2 * options.seed)
            with self.stage.step("nas1 -> nas2: first generation, all of it") as advance:
                operations.replicate(site, VOLUME, differential=options.differential, tell=teller(advance))
        steady = workload.IMMUTABLE
        with Onlooker(self._client(), steady, (root / steady).read_bytes()) as onlooker:
            for step in self.scenario.steps:
                self._do(step)
            self.course.client = onlooker.seen()
        self.course.serves = self._serving()

    def _do(self, step: Step) -> None:
        match step:
            case Interrupt():
                self._interrupt(step)
            case Strike(fault):
                with self.stage.step(f"fault: {fault}"):
                    self._deal(fault)
            case Notified():
                self._be_notified()
            case Mend(wanted):
                with self.stage.step(f"repair: {wanted}"):
                    self._repair(wanted)
            case Resume():
                self._resume()
            case Failover():
                self._fail_over(step)

    def _interrupt(self, step: Interrupt) -> None:
        """Change the volume, replicate it, and let things happen to that."""
        options, client, root, turn = self.options, self._client(), self._served(NodeName.NAS1), self._turn
        self._turn += 1
        with self.stage.step(f"nas1: {options.changes:,} files changed, some of them by SMB clients") as advance:
            if not turn:
                workload.smb_changes(client, 2 * options.seed + 1)
            workload.change(root, options.changes, options.seed + 1000 * turn, advance)
        writing = workload.OpenWrite(client, f"open at the freeze {turn}", root / f"open at the freeze {turn}")
        (root / f"deleted while open {turn}").write_bytes(os.urandom(200_000))
        with ExitStack() as held, self.stage.step(f"nas1 -> nas2: the differential, until {step.blows[-1].fault}") as advance:
            held.callback(writing.end, 0.0)
            writing.begin()
            name = f"deleted while open {turn}"
            held.enter_context(workload.deleted_while_open(client, name, root / name))
            # A dead node's programs hold no files; they are needed until the generation is taken, and no longer.
            ordered = Ordered(self.lab, self._configuration, VOLUME, options.differential, options.rate_bytes_s)
            order = self._order = Interruption(ordered, step.blows, self._deal, held.close, advance)
            self._stack.callback(order.close)
            order.run()
        self.course.killed_at, self.course.bytes_sent = order.killed_at, order.bytes_sent
        what = ", ".join(f"{blow.fault} at {100 * blow.at:.0f} %" for blow in step.blows)
        self.stage.say(f"  {what} of {order.expected_bytes / MIB:.1f} MiB on the wire")

    def _deal(self, fault: Fault) -> None:
        deal(self.nodes, fault)
        if fault is not Fault.MANAGEMENT_POWER_CUT:
            self._lost_ns = wall_ns()
            self._lost_s = monotonic_s()

    def _be_notified(self) -> None:
        with self.stage.step("nas2: notices, and notifies the management node"), self._site() as site:
            operations.wait_for_failure(site, NodeName.NAS2, self._interruption.transfer, DETECT_LIMIT_S)
        self.course.detect_s = monotonic_s() - self._lost_s

    def _repair(self, wanted: Repair) -> None:
        repair(self.nodes, wanted)
        if wanted is Repair.WAKE_SOURCE:
            self._interruption.let_go()  # what it had under way now arrives, late

    def _resume(self) -> None:
        """Let the transfer resume, and prove that it converges: the image on NAS 2 is the image on NAS 1."""
        self._interruption.finish()
        with self._site() as site:
            recorded = self._reception(site).pieces_arrived
            with self.stage.step("nas1 -> nas2: resumed, only what is missing") as advance:
                done = operations.replicate(site, VOLUME, differential=self.options.differential, tell=teller(advance))
            self.course.facts = self._reception(site)
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

    def _reception(self, site: operations.Site) -> m.TransferFacts:
        """Return the newest transfer as NAS 2 knows it."""
        return max(site.node(NodeName.NAS2).ask(m.ListTransfers()).transfers, key=lambda facts: facts.target.counter)

    def _fail_over(self, step: Failover) -> None:
        """Say `landfall failover` as an operator does, in a program of its own."""
        words = ["failover", VOLUME, "--yes", "--json", *(["--declare-dead"] if step.declare_dead else [])]
        armed = []
        if step.dies_after:
            armed = ["env", "LANDFALL_ALLOW_FAILPOINTS=1", f"LANDFALL_FAILPOINTS=failover.after_{step.dies_after}=kill"]
        what = "nas2 takes over: fence, determination, recovery, address, exports"
        if step.refused:
            what = f"landfall failover: must be refused ({step.refused})"
        elif step.dies_after:
            what = f"nas2 takes over: killed after {step.dies_after}"
        with self.stage.step(what):
            argv = [*armed, sys.executable, "-m", "mgmt.cli", "--lab", str(self.lab.directory), *words]
            said = run(argv, timeout_s=COMMAND_LIMIT_S, ok=range(-64, 256))
        if step.dies_after:
            if said.status != -signal.SIGKILL:
                raise DrillFailed(f"the failover was to die after {step.dies_after}, and ended with status {said.status}")
            return
        code = json.loads(said.stdout)["error"]["code"] if said.status else ""
        if code != step.refused:
            raise DrillFailed(f"the failover ended with {code or 'success'}", cause=said.stderr.decode("utf-8", "replace").strip()[-2000:])
        if step.ends_well:
            self._recovered()

    def _recovered(self) -> None:
        """Note what the failover cost, and have what it served checked."""
        with self._site() as site:
            volume = site.catalog.volume(VOLUME)
            entry = next(found for found in reversed(Journal(site.catalog).entries(volume.id)) if found.ending == DONE)
            done = self.course.failover = account(entry, self._lost_ns)
            if done.transfer is None:
                raise DrillFailed("nothing was recovered of the transfer")
            statement = self.course.statement = site.catalog.newest_salvage(done.volume).statement
            keep(self.folder, statement)
            with self.stage.step("check: every file against nas1's frozen generations"):
                self.course.findings = self._check(site, statement)

    def _check(self, site: operations.Site, statement: LossStatement) -> Findings:
        files = site.evidence_folder(statement.transfer)
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
                    smb_client=f"nsenter --net={NAMESPACES / self.lab.clients} smbclient -N",
                ),
                statement,
                self.folder,
            )

    def _serving(self) -> tuple[str, ...]:
        """Return the nodes that say of themselves that they serve the volume; one without power serves nothing."""
        found = []
        with self._site() as site:
            for node in NAS_NODES:
                try:
                    volumes = site.node(node).ask(m.ListVolumes()).volumes
                except LandfallError:
                    continue
                if any(volume.name == VOLUME and volume.serving for volume in volumes):
                    found.append(str(node))
        return tuple(found)

    # --- where things are ---

    @property
    def _configuration(self) -> Path:
        return self.lab.node(NodeName.MGMT) / "etc" / "landfall.toml"

    @property
    def _interruption(self) -> Interruption:
        if self._order is None:
            raise DrillFailed("nothing was interrupted yet")
        return self._order

    def _site(self) -> operations.Site:
        """Return the management node at work: anew each time, since it may have been away."""
        return operations.Site(read_inventory(self._configuration))

    def _served(self, node: NodeName) -> Path:
        return within_node(self.lab, node, NODE_ROOT / "srv" / VOLUME)

    def _client(self) -> workload.SmbClient:
        return workload.SmbClient(ADDRESS.partition("/")[0], VOLUME, ("nsenter", f"--net={NAMESPACES / self.lab.clients}", "--"))


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
