"""The drill on virtual machines, in the order of events.

The playbook fills, changes, replicates and fails over, as an operator would; the host copies the frozen generations before anything
is sent, lets things happen at shares of the bytes that it counts itself, and has the result checked from copies that it took itself.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from agent.contract.dmi import Dmi
from agent.contract.errors import ConfigInvalid, DrillFailed
from agent.contract.identity import GenerationId
from agent.contract.messages import from_document
from agent.system.clock import monotonic_s, wall_ns
from mgmt.drill import evidence
from mgmt.drill.course import Course
from mgmt.drill.evidence import Evidence
from mgmt.drill.options import MIB, Options
from mgmt.drill.report import keep
from mgmt.drill.scenario import Blow, Failover, Fault, Interrupt, Mend, Notified, Repair, Resume, Scenario, Step, Strike
from mgmt.drill.stage import Advance, Stage
from mgmt.drill.strikes import MANAGEMENT, RECEIVER, SOURCE, deal, repair
from mgmt.drill.vm.counting import await_bytes
from mgmt.drill.vm.images import copy_generation, copy_served
from mgmt.drill.vm.machines import Struck
from mgmt.drill.vm.plays import Hear, Playing, Task
from mgmt.drill.wire import expected_bytes
from mgmt.failover.account import Account
from mgmt.report import LossStatement
from mgmt.run import Prepared
from mgmt.view import from_json

DETECT_LIMIT_S: Final = 300.0
_DARKENED: Final = {
    Fault.SOURCE_POWER_CUT: SOURCE,
    Fault.RECEIVER_POWER_CUT: RECEIVER,
    Fault.MANAGEMENT_POWER_CUT: MANAGEMENT,
}
_STARTED: Final = {Repair.START_SOURCE: SOURCE, Repair.START_RECEIVER: RECEIVER, Repair.START_MANAGEMENT: MANAGEMENT}


@dataclass(frozen=True, slots=True)
class Places:
    """Where nodes keep what the drill looks at, and how it starts programs: as playbooks/provision.yml makes machines."""

    agent_config: str = "/etc/landfall/agent.toml"
    sending: Path = Path("/var/lib/landfall/state/transfers")  # on nas1
    fetched: Path = Path("/var/lib/landfall/mgmt/transfers")  # on the management node
    pool: Path = Path("/var/lib/landfall/pool")  # on a node without a volume group
    service_address: str = "10.78.0.100/24"  # on the Vagrantfile's network, nobody's own
    landfall: tuple[str, ...] = ("/opt/landfall/venv/bin/landfall",)
    python: tuple[str, ...] = ("/opt/landfall/venv/bin/python",)  # on nas1
    client: tuple[str, ...] = ()  # what runs an SMB client on this host


Begin = Callable[[str, Mapping[str, Any], Hear], Playing]
"""Begins the plays of failover_drill.yml that carry a tag."""


class Drill:
    """One drill on machines that are up and provisioned."""

    def __init__(
        self, options: Options, scenario: Scenario, stage: Stage, machines: Struck, begin: Begin, places: Places | None = None
    ) -> None:
        self.options, self.scenario, self.stage, self.course = options, scenario, stage, Course()
        self.folder = options.folder.resolve()
        self.images = self.folder / "images"
        self.volume = f"drill-{wall_ns() // 10**9}"  # machines that held a drill before know that one's
        self._machines, self._begin, self._places = machines, begin, places or Places()
        self._off: set[str] = set()  # nodes without power
        self._lost_s = 0.0  # when the newest fault happened
        self._turn = 0
        self._ready: Prepared | None = None  # what is being replicated

    def run(self) -> Course:
        """Return the course of the drill. What has no power in the end is left so; what the machines keep of the volume stays."""
        self._know_substrate()
        self.images.mkdir(parents=True, exist_ok=True)
        with self.stage.step(f"nas1 fills a volume on {self.options.substrate} and replicates it"):
            self._play("fill")
        for step in self.scenario.steps:
            self._do(step)
        self.course.serves = self._serving()
        for image in self.images.iterdir():  # the machines' disks hold them, too
            image.unlink()
        self.images.rmdir()
        return self.course

    # --- the steps, in order ---

    def _know_substrate(self) -> None:
        """ConfigInvalid unless both NAS have one substrate, the one that was asked for if any was."""
        for node in (SOURCE, RECEIVER):
            found = tomllib.loads(self._machines.run(node, ["cat", self._places.agent_config])).get("substrate", "reflink")
            if self.options.substrate not in {"", found}:
                fix = f"`make vm-drill` provisions; or `playbooks/provision.yml` with landfall_substrate={self.options.substrate}."
                raise ConfigInvalid(f"{node} was provisioned with {found}, not {self.options.substrate}", fix=fix)
            self.options = replace(self.options, substrate=found)

    def _do(self, step: Step) -> None:
        match step:
            case Interrupt(blows):
                self._interrupt(blows)
            case Strike(fault):
                with self.stage.step(f"fault: {fault}"):
                    self._deal(fault)
            case Notified():
                self._be_notified()
            case Mend(wanted):
                with self.stage.step(f"repair: {wanted}"):
                    repair(self._machines, wanted)
                    self._off -= {_STARTED.get(wanted, "")}
            case Resume():
                self._resume()
            case Failover():
                self._fail_over(step)

    def _interrupt(self, blows: Sequence[Blow]) -> None:
        """Change the volume, and replicate it while things happen to that. Evidence is taken before anything is sent."""
        options, machines, turn = self.options, self._machines, self._turn
        self._turn += 1
        with self.stage.step("nas1: files change, and their differential is made ready"):
            self._play("change", drill_turn=turn, drill_change_seed=options.seed + 1000 * turn)
        ready = self._ready = from_document(self._kept("prepared"), Prepared)
        expected = self._copy_evidence(ready)
        before = machines.bytes_sent(SOURCE)
        with self.stage.step(f"nas1 -> nas2: the differential, until {blows[-1].fault}") as advance:
            order: Playing | None
            playing = order = self._begin("transfer", self._variables(), self._hear)
            try:
                for blow in blows:
                    goal = max(1, int(blow.at * expected))
                    sent = await_bytes(machines, SOURCE, goal, before, order, self._said_as_well(advance, blow.fault))
                    self._deal(blow.fault)
                    order = None if MANAGEMENT in self._off else order
                    self.course.killed_at, self.course.bytes_sent = sent / expected, sent
                    self.stage.say(f"  {blow.fault} after {sent / MIB:.1f} of {expected / MIB:.1f} MiB on the wire")
            except BaseException:
                playing.cancel()
                raise
            if order is None:
                playing.cancel()
            else:
                playing.finish()

    def _copy_evidence(self, ready: Prepared) -> int:
        """Return how many bytes the transfer is expected to take, from the generations that are here now, with a digest of every file."""
        options = self.options
        with self.stage.step("evidence: nas1's frozen generations are copied here, with a digest of every file") as advance:
            for done, (name, generation) in enumerate((("base", ready.base), ("target", ready.target))):
                copy_generation(self._machines, SOURCE, self._places.pool, generation, self._image(name))
                evidence.digests(self._image(name), options.filesystem, self.folder / f"{name}.json")
                advance(done + 1, 2)
            self._machines.copy_out(SOURCE, ["cat", str(self._places.sending / str(ready.transfer) / "dmi")], self.images / "sent.dmi")
        raw = (self.images / "sent.dmi").read_bytes()

        def image_of(generation: GenerationId) -> Path:
            return self._image("base" if generation == ready.base else "target")

        return len(raw) + expected_bytes(Dmi.decode(raw), image_of, options.differential)

    def _deal(self, fault: Fault) -> None:
        deal(self._machines, fault)
        if fault in _DARKENED:
            self._off.add(_DARKENED[fault])
        if fault is not Fault.MANAGEMENT_POWER_CUT:
            self._lost_s = monotonic_s()

    def _be_notified(self) -> None:
        transfer = self._prepared.transfer
        with self.stage.step("nas2: notices, and notifies the management node"):
            until = monotonic_s() + DETECT_LIMIT_S
            while not any(told["notification"]["transfer"] == str(transfer) for told in self._standing()["pending"]):
                if monotonic_s() > until:
                    raise DrillFailed(f"the management node has heard nothing of transfer {transfer} in {DETECT_LIMIT_S:g} s")
        self.course.detect_s = monotonic_s() - self._lost_s

    def _resume(self) -> None:
        """Let the transfer resume, and prove that it converges: what nas2 holds is what nas1 had frozen."""
        with self.stage.step("nas1 -> nas2: resumed, only what is missing"):
            self._play("resume")
        sent = self._kept("resumed")["sent"]
        self.course.resumed.append({name: sent[name] for name in ("pieces_sent", "pieces_skipped")})
        self.stage.say(f"  {sent['pieces_skipped']:,} pieces had arrived before, {sent['pieces_sent']:,} were sent")
        with self.stage.step("check: both images, block by block, on this host"):
            copy_generation(self._machines, RECEIVER, self._places.pool, self._prepared.target, self._image("copy"))
            if not evidence.generations_equal(self._image("target"), self._image("copy")):
                raise DrillFailed("after a resume the volume on nas2 is not the one on nas1")
        if not sent["pieces_skipped"]:
            raise DrillFailed("nothing of what had arrived was of use to the resumption")

    def _fail_over(self, step: Failover) -> None:
        """Say `landfall failover` as an operator does, who first switches off what is to be fenced by hand, and says so."""
        words, environment = ["--declare-dead"] if step.declare_dead else [], {}
        what = "landfall failover: fence, determination, recovery, address, exports"
        if step.refused:
            what = f"landfall failover: must be refused ({step.refused})"
        else:
            words.append(f"--confirm-fenced={SOURCE}")
            if SOURCE not in self._off:
                with self.stage.step("the operator switches nas1 off"):
                    self._machines.cut_power(SOURCE)
                    self._off.add(SOURCE)
        if step.dies_after:
            what = f"landfall failover: killed after {step.dies_after}"
            environment = {"LANDFALL_ALLOW_FAILPOINTS": "1", "LANDFALL_FAILPOINTS": f"failover.after_{step.dies_after}=kill"}
        with self.stage.step(what):
            self._play("failover", drill_failover=words, drill_failover_environment=environment)
        away_s, said = monotonic_s() - self._lost_s, self._kept("failover")
        if step.dies_after:
            if said["rc"] not in {-signal.SIGKILL, 128 + signal.SIGKILL}:
                raise DrillFailed(f"the failover was to die after {step.dies_after}, and ended with status {said['rc']}")
            return
        code = json.loads(said["stdout"])["error"]["code"] if said["rc"] else ""
        if code != step.refused:
            raise DrillFailed(f"the failover ended with {code or 'success'}", cause=said["stderr"].strip()[-2000:])
        if step.ends_well:
            self._recovered(json.loads(said["stdout"]), away_s)

    def _recovered(self, told: dict[str, Any], away_s: float) -> None:
        """Note what the failover cost, and have what it served checked. Of the seconds since the loss, all that it did not work in are
        ``waited``."""
        (self.folder / "served.json").write_text(json.dumps(told))
        done = from_document({name: told[name] for name in Account.__dataclass_fields__}, Account)
        seconds = replace(done.seconds, waited=0.0)
        self.course.failover = replace(done, seconds=replace(seconds, waited=max(0.0, away_s - seconds.total)))
        self._play("account")
        statement = from_json((self.folder / "statement.json").read_text())
        self.course.statement, self.course.detect_s = statement, statement.seconds.detect
        keep(self.folder, statement)
        self._check(statement)

    def _check(self, statement: LossStatement) -> None:
        options = self.options
        with self.stage.step("evidence: what nas2 serves, what it was sent and what arrived are copied here"):
            mount_point = self._kept("served")["mount_point"]
            copy_served(self._machines, RECEIVER, mount_point, self._image("result"))
            for name in ("dmi", "arrival"):
                self._machines.copy_out(MANAGEMENT, ["cat", str(self._places.fetched / str(statement.transfer) / name)], self.images / name)
        with self.stage.step("check: every file against nas1's frozen generations, on this host"):
            self.course.findings = evidence.check(
                Evidence(
                    base=self._image("base"),
                    target=self._image("target"),
                    filesystem=options.filesystem,
                    result=self._image("result"),
                    dmi=self.images / "dmi",
                    arrival=self.images / "arrival",
                    smb=f"//{self._places.service_address.partition('/')[0]}/{self.volume}",
                    smb_client=shlex.join([*self._places.client, "smbclient", "-N"]),
                ),
                statement,
                self.folder,
            )

    def _serving(self) -> tuple[str, ...]:
        """Return the nodes that say of themselves that they serve the volume; one without power serves nothing."""
        told = self._standing()
        views = (told["primary"], told["secondary"])
        return tuple(sorted(view["node"] for view in views if view["facts"] is not None and view["facts"]["serving"]))

    def _standing(self) -> dict[str, Any]:
        """Return what `landfall status` says of the volume."""
        found: list[dict[str, Any]] = json.loads(self._machines.run(MANAGEMENT, [*self._places.landfall, "status", self.volume, "--json"]))
        return found[0]

    # --- plays ---

    def _play(self, tag: str, **variables: Any) -> None:
        playing = self._begin(tag, {**self._variables(), **variables}, self._hear)
        try:
            playing.finish()
        except BaseException:
            playing.cancel()
            raise

    def _variables(self) -> dict[str, Any]:
        options = self.options
        return {
            "drill_volume": self.volume,
            "drill_filesystem": str(options.filesystem),
            "drill_size_bytes": options.size_bytes,
            "drill_address": self._places.service_address,
            "drill_content_bytes": options.content_bytes,
            "drill_files": options.files,
            "drill_changes": options.changes,
            "drill_seed": options.seed,
            "drill_differential": str(options.differential),
            "drill_rate_bytes_s": options.rate_bytes_s,
            "drill_folder": str(self.folder),
            "drill_landfall": list(self._places.landfall),
            "drill_python": list(self._places.python),
            "drill_here": [*self._places.client, sys.executable],
        }

    def _hear(self, task: Task) -> None:
        self.stage.say(f"  {task.host} FAILED: {task.name}: {task.failure}" if task.failure else f"  {task.name}")

    def _said_as_well(self, advance: Advance, fault: Fault) -> Advance:
        """Return what shows how far the transfer is, and says each tenth of the way for those who see no bar."""
        said = 0

        def told(done: int, total: int) -> None:
            nonlocal said
            advance(done, total)
            if done * 10 // total > said:
                said = done * 10 // total
                self.stage.say(f"  nas1 has sent {done / MIB:.1f} of the {total / MIB:.1f} MiB before {fault}")

        return told

    @property
    def _prepared(self) -> Prepared:
        if self._ready is None:
            raise DrillFailed("nothing was interrupted yet")
        return self._ready

    def _kept(self, name: str) -> Any:
        """Return what a play kept of what a command said."""
        return json.loads((self.folder / f"{name}.json").read_text())

    def _image(self, name: str) -> Path:
        return self.images / f"{name}.img"
