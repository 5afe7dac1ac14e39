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
    "words",
    [
        ("--fs", "ext4", "--kill", "agent", "--differential", "send"),
        ("--fs", "xfs", "--kill", "node", "--differential", "verify"),
        ("--fs", "ext4", "--kill", "power", "--differential", "verify", "--at", "0.9"),
    ],
    ids=lambda words: " ".join(words[1::2]),
)
def test_a_death_ends_in_a_salvage_that_the_checker_confirms(tmp_path: Path, words: tuple[str, ...]) -> None:
    document = report(tmp_path / "out", *words)
    files = document["files"]
    outcomes = ("recovered", "kept_at_base", "absent", "damaged", "deleted", "held")
    assert files["changed"] == sum(files[outcome] for outcome in outcomes)
    assert 0 < files["recovered"] < files["changed"]
    assert files["damaged"] == 0
    assert 0 < document["bytes"]["arrived"] < document["bytes"]["changed"]
    assert abs(document["killed_at"] - document["at"]) < 0.05
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page


@pytest.mark.slow
def test_a_receiver_that_dies_resumes(tmp_path: Path) -> None:
    document = report(tmp_path / "out", "--fs", "xfs", "--kill", "receiver", "--at", "0.8")
    assert document["files"]["recovered"] == document["files"]["changed"]
    assert len(document["resumed"]) == 1


@pytest.mark.slow
def test_a_cut_link_is_resumed_once_and_salvaged_once(tmp_path: Path) -> None:
    document = report(tmp_path / "out", "--fs", "ext4", "--kill", "link", "--at", "0.7")
    assert len(document["resumed"]) == 1
    assert document["files"]["recovered"] > 0


@pytest.mark.slow
def test_a_drill_that_the_checker_faults_ends_with_its_own_status(tmp_path: Path) -> None:
    """A file is spoiled on NAS 2 between recovery and check: the drill must say so and fail."""
    spoil = "import mgmt.drill.scenario as s; from pathlib import Path\nheld = s.Drill._check\n"
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
    for words in (("--fs", "zfs"), ("--at", "1.5"), ("--at", "x"), ("--kill", "cat"), ("--size", "huge"), ("--files", "3")):
        done = drill(tmp_path / "out", *words)
        assert done.returncode == 2, words
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
