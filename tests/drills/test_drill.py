"""The drill itself, small: every kind of death, both filesystems, both differential modes; and it must be able to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LANDFALL = Path(sys.executable).parent / "landfall"
SMALL = ("--files", "300", "--changes", "80", "--size", "400M", "--rate", "3M")


def drill(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LANDFALL, "drill", *SMALL, *words, "--out", folder], capture_output=True, text=True, check=False)


def report(folder: Path, *words: str) -> dict[str, Any]:
    """Return the report of a drill that succeeded."""
    done = drill(folder, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    document: dict[str, Any] = json.loads((folder / "report.json").read_text())
    check = document["check"]
    assert (check["false_recovered"], check["missed"], check["untouched_differ"]) == (0, 0, 0)
    return document


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        pytest.param("source-killed", ("--fs", "ext4", "--differential", "send"), id="A6"),
        pytest.param("source-lost", ("--fs", "xfs", "--differential", "verify"), id="A6 I1 silently"),
        pytest.param("source-disk-failed", ("--fs", "ext4"), id="E1"),
        pytest.param("source-paused", ("--fs", "ext4", "--differential", "verify"), id="A13 I3"),
        pytest.param("link-cut", ("--fs", "ext4", "--at", "0.7"), id="D2"),
        pytest.param("receiver-lost", ("--fs", "ext4", "--differential", "verify", "--at", "0.9"), id="B4 I1"),
        pytest.param("management-killed", ("--fs", "xfs"), id="C3 C5"),
    ],
)
def test_I1_I6_a_scenario_ends_in_a_service_that_the_checker_confirms(tmp_path: Path, scenario: str, words: tuple[str, ...]) -> None:
    document = report(tmp_path / "out", "--scenario", scenario, *words)
    files = document["files"]
    outcomes = ("recovered", "kept_at_base", "absent", "damaged", "deleted", "held")
    assert files["changed"] == sum(files[outcome] for outcome in outcomes)
    assert 0 < files["recovered"] < files["changed"]
    assert files["damaged"] == 0
    assert 0 < document["bytes"]["arrived"] < document["bytes"]["changed"]
    assert abs(document["killed_at"] - document["at"]) < 0.05
    assert (document["verdict"], document["serves"], document["shortfalls"]) == ("recovered", ["nas2"], [])
    seconds = document["seconds"]
    assert min(seconds[phase] for phase in ("detect", "fence", "recover", "serve")) > 0
    assert document["rto_s"] == pytest.approx(sum(took for phase, took in seconds.items() if phase != "total"), abs=0.01)
    assert 0 < document["rpo_s"] < 300
    gaps = document["client"]["gaps_s"]
    assert 0 < gaps[-1] < document["rto_s"] + 30, "one gap, about as long as the volume was away; then the file at the same address"
    assert len(document["resumed"]) == (1 if scenario in {"link-cut", "source-paused"} else 0)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "words"),
    [pytest.param("receiver-killed", ("--fs", "xfs", "--at", "0.8"), id="B3"), pytest.param("lost-sight", ("--fs", "ext4"), id="I2 C11")],
)
def test_I6_a_scenario_that_nobody_dies_of_resumes_under_its_clients(tmp_path: Path, scenario: str, words: tuple[str, ...]) -> None:
    document = report(tmp_path / "out", "--scenario", scenario, *words)
    assert document["files"]["recovered"] == document["files"]["changed"]
    assert len(document["resumed"]) == 1
    assert (document["verdict"], document["serves"], document["rto_s"], document["rpo_s"]) == ("resumed", ["nas1"], 0, 0)
    assert document["client"]["gaps_s"] == []


@pytest.mark.slow
def test_a_drill_that_the_checker_faults_ends_with_its_own_status(tmp_path: Path) -> None:
    """A file is spoiled on NAS 2 between recovery and check: the drill must say so and fail."""
    spoil = "import mgmt.drill.local as s; from pathlib import Path\nheld = s.Drill._check\n"
    spoil += "def check(self, site, statement):\n"
    spoil += "    found = next(a for a in statement.accounts if a.outcome == 'recovered' and a.kind == 'regular' and a.size_bytes > 100)\n"
    spoil += "    path = self._served(s.NodeName.NAS2) / found.paths[0]\n"
    spoil += "    raw = bytearray(path.read_bytes()); raw[50] ^= 1; path.write_bytes(raw)\n    return held(self, site, statement)\n"
    spoil += "s.Drill._check = check\nfrom mgmt.cli import main\nmain()\n"
    words = [sys.executable, "-c", spoil, "drill", *SMALL, "--fs", "ext4", "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    assert done.returncode == 51, done.stdout[-1000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["check"]["false_recovered"] >= 1


def test_wrong_arguments_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    for words in (("--fs", "zfs"), ("--at", "1.5"), ("--at", "x"), ("--kill", "flood"), ("--size", "huge"), ("--files", "3")):
        done = drill(tmp_path / "out", *words)
        assert done.returncode == 2, words
        assert "Traceback" not in done.stderr
    done = drill(tmp_path / "out", "--scenario", "flood")
    assert done.returncode == 20
    assert "source-killed" in done.stderr, "it says which there are"
    done = drill(tmp_path / "out", "--lab", "vm", "--scenario", "lost-sight")
    assert done.returncode == 49
    assert "no VM lab is up" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_scenarios_are_listed() -> None:
    done = subprocess.run([LANDFALL, "drill", "--list", "--json"], capture_output=True, text=True, check=True)
    listed = {found["name"]: found["expect"]["serves"] for found in json.loads(done.stdout)}
    assert listed["source-killed"] == "nas2"
    assert listed["lost-sight"] == "nas1"
