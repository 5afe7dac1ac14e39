"""What drills and rehearsals ended in is kept, whatever dies meanwhile, and shown."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.contract.errors import NodeUnreachable
from mgmt import proofs, run
from mgmt.cli import landfall
from mgmt.cli.failover import _rehearsed
from mgmt.run.site import nobody
from tests.unit.mgmt_pair import Pair

PROOF = proofs.Proof(1_800_000_000_000_000_000, "source-killed", "", "recovered", True, 6.5, 14.2, "build/drill/report.json", "all well")
UNITS = Path(__file__).parents[2] / "packaging" / "systemd"


def test_what_is_kept_is_there_again_in_order(tmp_path: Path) -> None:
    assert proofs.kept(tmp_path / "none") == []
    rehearsed = replace(PROOF, scenario=proofs.REHEARSAL, volume="media", verdict="sound", rto_s=None, report="")
    for proof in (PROOF, rehearsed, replace(PROOF, verdict="failed", passed=False)):
        proofs.keep(tmp_path / "state", proof)
    kept = proofs.kept(tmp_path / "state")
    assert [proof.verdict for proof in kept] == ["recovered", "sound", "failed"]
    assert kept[1] == rehearsed
    assert proofs.newest(kept)["source-killed", ""].passed is False


@pytest.mark.parametrize("torn", [b'{"at_ns": 1', b"\xff\xfe", b"[]\n", b'{"at_ns": "x"}\n', b"[" * 100_000])
def test_a_line_that_was_not_finished_is_no_proof_and_spoils_none(tmp_path: Path, torn: bytes) -> None:
    proofs.keep(tmp_path, PROOF)
    with (tmp_path / proofs.FILE).open("ab") as file:
        file.write(torn)
    proofs.keep(tmp_path, PROOF)
    assert proofs.kept(tmp_path) == [PROOF, PROOF]


def test_the_history_is_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(tmp_path / "none.toml"), "drill", "--history"]
    assert "No drill" in CliRunner().invoke(landfall, words).output
    proofs.keep(tmp_path / "build", PROOF)
    shown = CliRunner().invoke(landfall, words).output
    for part in ("source-killed", "recovered", "6 s", "14 s", "build/drill/report.json"):
        assert part in shown
    (document,) = json.loads(CliRunner().invoke(landfall, [*words, "--json"]).output)
    assert (document["rto_s"], document["passed"]) == (14.2, True)


def test_I9_a_rehearsal_that_cannot_be_held_is_kept_as_one_that_failed(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with pair.site() as site:
        pair.with_volume(site)
        run.replicate(site, "projects")
    pair.nas2.dead = True
    with pair.site() as site:
        with pytest.raises(NodeUnreachable):
            _rehearsed(site, "projects", nobody)
        (proof,) = proofs.kept(site.inventory.state_dir)
    assert (proof.scenario, proof.volume, proof.verdict, proof.passed) == (proofs.REHEARSAL, "projects", "failed", False)
    assert "node-unreachable" in proof.words


def test_the_units_that_rehearse_on_a_schedule_are_ones_that_systemd_takes(tmp_path: Path) -> None:
    for path in UNITS.iterdir():
        text = path.read_text().replace("/opt/landfall/venv/bin/landfall", sys.executable)
        (tmp_path / path.name.replace("@", "@media")).write_text(text)
    units = sorted(str(path) for path in tmp_path.iterdir())
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False, timeout=60)
    said = [line for line in done.stderr.splitlines() if "landfall" in line]
    assert said == []
    (line,) = [line for line in (UNITS / "landfall-rehearsal@.service").read_text().splitlines() if line.startswith("ExecStart=")]
    words = line.partition("landfall.toml ")[2].replace("%i", "media").split()
    landfall.commands[words.pop(0)].make_context("rehearsal", words)
