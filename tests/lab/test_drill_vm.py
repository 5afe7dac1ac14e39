"""The drill on virtual machines, held on the local lab's nodes in their place: the same playbook, the same evidence, the same checker."""

from __future__ import annotations

import io
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agent.contract.identity import FilesystemKind
from agent.system.run import run
from mgmt.drill.local import ADDRESS
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


class LabMachines:
    """The lab's nodes as machines; their power is cut as a plug is pulled."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def run(self, node: str, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 120.0) -> str:
        return run(lifecycle.inside(self.lab, NodeName(node), argv), stdin=stdin, timeout_s=timeout_s).text

    def copy_out(self, node: str, argv: Sequence[str], to: Path) -> None:
        words = f"{shlex.join(lifecycle.inside(self.lab, NodeName(node), argv))} > {shlex.quote(str(to))}"
        run(["bash", "-c", words], timeout_s=120.0)

    def bytes_sent(self, node: str) -> int:
        return int(self.run(node, ["cat", f"/sys/class/net/{LINK}/statistics/tx_bytes"]))

    def kill(self, node: str) -> None:
        lifecycle.cut(self.lab, NodeName.NAS1, NodeName.NAS2)
        lifecycle.kill(self.lab, NodeName(node))


def held(lab: Lab, folder: Path) -> tuple[Drill, str]:
    """Return a drill that has been held, and what it said."""
    inventory = folder / "inventory.json"
    inventory.write_text(ansible.inventory(lab))
    said = io.StringIO()
    options = Options(
        FilesystemKind.EXT4,
        0.5,
        "source-lost",
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

    drill = Drill(options, Stage(Console(file=said)), LabMachines(lab), begin, places)
    drill.run()
    return drill, said.getvalue()


def test_the_playbook_the_evidence_and_the_report(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="landfall-vmdrill-", dir="/var/tmp") as folder:
        lab = Lab.at(Path(folder) / "lab")
        try:
            lifecycle.up(lab, pool_size_bytes=2 << 30)
            drill, said = held(lab, tmp_path)
        finally:
            lifecycle.down(lab)
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
    assert (report["lab"], report["substrate"]) == ("vm", "reflink")
    assert "Let nas2 recover every whole file and take the volume over" in said
    assert report["rto_s"] > report["seconds"]["recover"] > 0
    assert report["rpo_s"] > 0
