"""The drill on virtual machines, held on the local lab's nodes in their place: the same playbook, the same evidence, the same checker."""

from __future__ import annotations

import io
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agent.contract.identity import FilesystemKind
from agent.system.run import run
from mgmt.drill import scenario
from mgmt.drill.judgement import shortfalls
from mgmt.drill.local import ADDRESS
from mgmt.drill.nodes import LabNodes
from mgmt.drill.options import LabKind, Options
from mgmt.drill.report import document
from mgmt.drill.stage import Stage
from mgmt.drill.vm.host import PLAYBOOK
from mgmt.drill.vm.plays import Hear, Playing
from mgmt.drill.vm.scenario import Drill, Places
from mgmt.lab import ansible, lifecycle
from mgmt.lab.layout import NAMESPACES, NODE_ROOT, Lab, NodeName
from mgmt.lab.network import LINK

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]


class LabMachines(LabNodes):
    """The lab's nodes as machines. Its management node's commands are given from here."""

    def run(self, node: str, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 120.0) -> str:
        words = argv if node == NodeName.MGMT else lifecycle.inside(self.lab, NodeName(node), argv)
        return run(words, stdin=stdin, timeout_s=timeout_s).text

    def copy_out(self, node: str, argv: Sequence[str], to: Path) -> None:
        words = f"{shlex.join(lifecycle.inside(self.lab, NodeName(node), argv))} > {shlex.quote(str(to))}"
        run(["bash", "-c", words], timeout_s=120.0)

    def bytes_sent(self, node: str) -> int:
        return int(self.run(node, ["cat", f"/sys/class/net/{LINK}/statistics/tx_bytes"]))


def held(lab: Lab, folder: Path, name: str) -> tuple[Drill, str]:
    """Return a drill that has been held, and what it said."""
    inventory = folder / "inventory.json"
    inventory.write_text(ansible.inventory(lab))
    said = io.StringIO()
    options = Options(
        FilesystemKind.EXT4,
        0.5,
        name,
        files=1300,
        size_bytes=256 << 20,
        changes=120,
        rate_bytes_s=1 << 20,
        folder=folder / "run",
        lab=LabKind.VM,
    )
    client = ("nsenter", f"--net={NAMESPACES / lab.namespace(NodeName.MGMT)}", "--")
    places = Places(
        agent_config=str(NODE_ROOT / "etc" / "agent.toml"),
        sending=NODE_ROOT / "pool" / "state" / "transfers",
        fetched=NODE_ROOT / "state" / "transfers",
        pool=NODE_ROOT / "pool",
        service_address=ADDRESS,
        landfall=(sys.executable, "-m", "mgmt.cli", "--lab", str(lab.directory)),
        python=tuple(lifecycle.inside(lab, NodeName.NAS1, [sys.executable])),
        client=client,
    )

    def begin(tag: str, variables: Mapping[str, Any], hear: Hear) -> Playing:
        return Playing(PLAYBOOK, inventory, folder / "ansible", tags=tag, variables=variables, hear=hear)

    drill = Drill(options, scenario.read(name), Stage(Console(file=said)), LabMachines(lab), begin, places)
    drill.run()
    return drill, said.getvalue()


@contextmanager
def the_drill(folder: Path, name: str) -> Iterator[tuple[Drill, str]]:
    """Yield a drill that has been held in a lab of its own."""
    with tempfile.TemporaryDirectory(prefix="landfall-vmdrill-", dir="/var/tmp") as directory:
        lab = Lab.at(Path(directory) / "lab")
        try:
            lifecycle.up(lab, pool_size_bytes=2 << 30)
            yield held(lab, folder, name)
        finally:
            lifecycle.down(lab)


def test_the_playbook_the_evidence_and_the_report(tmp_path: Path) -> None:
    with the_drill(tmp_path, "source-lost") as (drill, said):
        report = document(drill.options, drill.course)
    assert {name: report["check"][name] for name in ("false_recovered", "missed", "untouched_differ", "unlisted_blocks")} == {
        "false_recovered": 0,
        "missed": 0,
        "untouched_differ": 0,
        "unlisted_blocks": 0,
    }
    assert report["check"]["compared_files"] > 1000
    assert 0 < report["files"]["recovered"] < report["files"]["changed"]
    assert abs(report["killed_at"] - report["at"]) < 0.15
    assert (report["lab"], report["substrate"], report["serves"]) == ("vm", "reflink", ("nas2",))
    assert "Let nas2 recover every whole file and take the volume over" in said
    assert report["rto_s"] > report["seconds"]["recover"] > 0
    assert report["rpo_s"] > 0


@pytest.mark.parametrize("name", ["source-paused", "management-killed", "lost-sight"])
def test_a_scenario_of_several_steps(tmp_path: Path, name: str) -> None:
    """Together they resume, are refused, are killed and taken up again, fence a source that is paused, and start what was switched off."""
    with the_drill(tmp_path, name) as (drill, _):
        assert shortfalls(drill.course, drill.scenario.expect, LabKind.VM.patience) == ()
        assert drill.course.serves == (drill.scenario.expect.serves,)
