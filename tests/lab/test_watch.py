"""The service in the lab: a volume with a schedule, and everything around it dying."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.contract.identity import FilesystemKind
from agent.system.clock import wait_until
from mgmt import run
from mgmt.inventory import read_inventory
from mgmt.lab import lifecycle
from mgmt.lab.layout import Lab, NodeName
from mgmt.lab.namespace import within
from tests.lab.scene import watching

MGMT, NAS1, NAS2 = NodeName
VOLUME_BYTES = 64 << 20
LIMIT_S = 90.0


@pytest.fixture
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="landfall-watch-", dir="/var/tmp") as folder:
        made = Lab.at(Path(folder) / "lab")
        try:
            lifecycle.up(made, pool_size_bytes=1 << 30)
            yield made
        finally:
            lifecycle.down(made)


def landfall(lab: Lab, *words: str) -> Any:
    argv = [sys.executable, "-m", "mgmt.cli", "--lab", str(lab.directory), *words, "--json"]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def committed(lab: Lab) -> int:
    """Return how many generations nas2 holds."""
    output = subprocess.run(
        lifecycle.inside(lab, NAS2, ["find", "/run/landfall/node/pool/volumes", "-name", "g*.img"]), capture_output=True, check=False
    )
    return len(output.stdout.split()) - 1


def test_C3_a_schedule_is_kept_through_the_deaths_of_the_service_and_of_the_primarys_agent(lab: Lab, tmp_path: Path) -> None:
    log = tmp_path / "watch.log"
    configuration = lab.node(MGMT) / "etc" / "landfall.toml"
    configuration.write_text("cycle_s = 0.5\nsilence_limit_s = 2.0\n" + configuration.read_text())

    def add() -> None:
        with run.Site(read_inventory(configuration)) as site:
            run.add_volume(site, "media", filesystem=FilesystemKind.EXT4, size_bytes=VOLUME_BYTES, primary=NAS1, secondary=NAS2)
            run.set_volume(site, "media", schedule="*:*:0/3")

    within(lab.namespace(MGMT), add)
    with watching(lab, log) as service:
        assert wait_until(lambda: committed(lab) >= 2, LIMIT_S), log.read_text()
        service.send_signal(signal.SIGKILL)
        service.wait(60)
    before = committed(lab)
    with watching(lab, log):
        assert wait_until(lambda: committed(lab) >= before + 2, LIMIT_S), log.read_text()
        lifecycle.kill(lab, NAS1)
        assert wait_until(lambda: "an operator's to say" in log.read_text(), LIMIT_S), log.read_text()
        held = committed(lab)
        lifecycle.start_node(lab, NAS1)
        assert wait_until(lambda: committed(lab) > held, LIMIT_S), log.read_text()
        rehearsed = landfall(lab, "failover", "media", "--test")
        assert (rehearsed["sound"], rehearsed["recorded_by"], rehearsed["wrong_blocks"], rehearsed["node"]) == (True, "nas1", 0, "nas2")
        (kept,) = landfall(lab, "drill", "--history")
        assert (kept["scenario"], kept["volume"], kept["passed"]) == ("rehearsal", "media", True)
        assert wait_until(lambda: committed(lab) > held + 1, LIMIT_S), "replication goes on after a rehearsal"
    said = [entry["sentence"] for entry in landfall(lab, "history", "media")]
    assert any("replicated g" in sentence for sentence in said)
    assert any("does not answer" in sentence for sentence in said)
    assert "lets nas1 serve: it came up, and nas2 was not promoted meanwhile." in said
    assert "Traceback" not in log.read_text()
