"""The drill on virtual machines, in the order of events.

The playbook fills, changes, replicates and fails over, as an operator would; the host copies the frozen generations before anything dies,
cuts nas1's power at a share of the bytes that it counts itself, and has the result checked from copies that it took itself.
"""

from __future__ import annotations

import json
import shlex
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent.contract.dmi import Dmi
from agent.contract.errors import ConfigInvalid
from agent.contract.identity import GenerationId
from agent.contract.messages import from_document
from agent.system.clock import monotonic_s, wall_ns
from mgmt.drill import evidence
from mgmt.drill.course import Course
from mgmt.drill.evidence import Evidence
from mgmt.drill.options import MIB, Options
from mgmt.drill.report import keep
from mgmt.drill.stage import Advance, Stage
from mgmt.drill.vm.death import Death, kill_at
from mgmt.drill.vm.images import copy_generation, copy_served
from mgmt.drill.vm.machines import Machines
from mgmt.drill.vm.plays import Hear, Playing, Task
from mgmt.drill.wire import expected_bytes
from mgmt.failover.account import Account
from mgmt.report import LossStatement
from mgmt.run import Prepared
from mgmt.view import from_json

MANAGEMENT, PRIMARY, SECONDARY = "mgmt", "nas1", "nas2"


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

    def __init__(self, options: Options, stage: Stage, machines: Machines, begin: Begin, places: Places | None = None) -> None:
        self.options, self.stage, self.course = options, stage, Course()
        self.folder = options.folder.resolve()
        self.images = self.folder / "images"
        self.volume = f"drill-{wall_ns() // 10**9}"  # machines that held a drill before know that one's
        self._machines, self._begin, self._places = machines, begin, places or Places()

    def run(self) -> Course:
        """Return the course of the drill. nas1 is left switched off; what the machines keep of the volume stays."""
        self._know_substrate()
        self.images.mkdir(parents=True, exist_ok=True)
        with self.stage.step(f"nas1 fills a volume on {self.options.substrate}, replicates it, changes it"):
            self._play("prepare")
        ready = from_document(json.loads((self.folder / "prepared.json").read_text()), Prepared)
        expected = self._copy_evidence(ready)
        death = self._interrupt(expected)
        self.course.killed_at, self.course.bytes_sent = death.bytes_sent / expected, death.bytes_sent
        self.stage.say(f"  nas1 was switched off after {death.bytes_sent / MIB:.1f} MiB on the wire")
        with self.stage.step("landfall failover: fence, determination, recovery, address, exports"):
            self._play("recover")
        self.course.failover = self._failed_over(monotonic_s() - death.at_s)
        statement = from_json((self.folder / "statement.json").read_text())
        self.course.statement, self.course.detect_s = statement, statement.seconds.detect
        keep(self.folder, statement)
        self._check(statement)
        for image in self.images.iterdir():  # they can be copied from nas2 again; nas1's are in its disk
            image.unlink()
        self.images.rmdir()
        return self.course

    # --- the steps, in order ---

    def _know_substrate(self) -> None:
        """ConfigInvalid unless both NAS have one substrate, the one that was asked for if any was."""
        for node in (PRIMARY, SECONDARY):
            found = tomllib.loads(self._machines.run(node, ["cat", self._places.agent_config])).get("substrate", "reflink")
            if self.options.substrate not in {"", found}:
                fix = f"`make vm-drill` provisions; or `playbooks/provision.yml` with landfall_substrate={self.options.substrate}."
                raise ConfigInvalid(f"{node} was provisioned with {found}, not {self.options.substrate}", fix=fix)
            self.options = replace(self.options, substrate=found)

    def _copy_evidence(self, ready: Prepared) -> int:
        """Return how many bytes the transfer is expected to take, from the generations that are here now, with a digest of every file."""
        options = self.options
        with self.stage.step("evidence: nas1's frozen generations are copied here, with a digest of every file") as advance:
            for done, (name, generation) in enumerate((("base", ready.base), ("target", ready.target))):
                copy_generation(self._machines, PRIMARY, self._places.pool, generation, self._image(name))
                evidence.digests(self._image(name), options.filesystem, self.folder / f"{name}.json")
                advance(done + 1, 2)
            self._machines.copy_out(PRIMARY, ["cat", str(self._places.sending / str(ready.transfer) / "dmi")], self.images / "sent.dmi")
        raw = (self.images / "sent.dmi").read_bytes()

        def image_of(generation: GenerationId) -> Path:
            return self._image("base" if generation == ready.base else "target")

        return len(raw) + expected_bytes(Dmi.decode(raw), image_of, options.differential)

    def _interrupt(self, expected: int) -> Death:
        goal = max(1, int(self.options.at * expected))
        what = f"nas1 -> nas2: the differential, until nas1 is switched off at {goal / MIB:.1f} of {expected / MIB:.1f} MiB"
        before = self._machines.bytes_sent(PRIMARY)
        with self.stage.step(what) as advance:
            transfer = self._begin("transfer", self._variables(), self._hear)
            try:
                death = kill_at(self._machines, PRIMARY, goal, before, transfer, self._said_as_well(advance))
            except BaseException:
                transfer.cancel()
                raise
            transfer.finish()
        return death

    def _failed_over(self, away_s: float) -> Account:
        """Return what the failover cost; of the seconds since the power was cut, all that it did not work in are ``waited``."""
        told = json.loads((self.folder / "served.json").read_text())
        done = from_document({name: told[name] for name in Account.__dataclass_fields__}, Account)
        seconds = replace(done.seconds, waited=0.0)
        return replace(done, seconds=replace(seconds, waited=away_s - seconds.total))

    def _check(self, statement: LossStatement) -> None:
        options = self.options
        with self.stage.step("evidence: what nas2 serves, what it was sent and what arrived are copied here"):
            mount_point = json.loads((self.folder / "served.json").read_text())["mount_point"]
            copy_served(self._machines, SECONDARY, mount_point, self._image("result"))
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

    # --- plays ---

    def _play(self, tag: str) -> None:
        playing = self._begin(tag, self._variables(), self._hear)
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

    def _said_as_well(self, advance: Advance) -> Advance:
        """Return what shows how far the transfer is, and says each tenth of the way for those who see no bar."""
        said = 0

        def told(done: int, total: int) -> None:
            nonlocal said
            advance(done, total)
            if done * 10 // total > said:
                said = done * 10 // total
                self.stage.say(f"  nas1 has sent {done / MIB:.1f} of the {total / MIB:.1f} MiB after which it dies")

        return told

    def _image(self, name: str) -> Path:
        return self.images / f"{name}.img"
