"""What Prometheus is told, and what the alerts make of it; promtool is the judge."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen
from uuid import UUID

import pytest

from agent.contract import messages as m
from agent.contract.errors import LinkLost
from agent.service import metrics as agent_metrics
from agent.serving.exports import Exports, Share
from agent.serving.nfs import Nfs
from agent.serving.samba import Samba
from agent.system.clock import wait_until
from mgmt import metrics, proofs, run
from mgmt.run import replication
from mgmt.watch.cycle import Watch
from tests.unit.mgmt_pair import Pair, lose

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "packaging" / "monitoring"
PROMTOOL = shutil.which("promtool") or str(ROOT / "build" / "promtool" / "usr" / "bin" / "promtool")


def promtool(*words: str, stdin: str = "") -> str:
    done = subprocess.run([PROMTOOL, *words], cwd=MONITORING, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A volume that was replicated once, and failed once after that."""
    monkeypatch.setattr(replication, "FIRST_PAUSE_S", 0.001)
    pair = Pair(tmp_path)
    watching = Watch(pair.site, lambda job, name: job())
    with pair.site() as site:
        pair.with_volume(site)
        run.set_volume(site, "projects", schedule="*:*:*")
        watching.cycle(site)
        entry = site.catalog.volume("projects")
        last = site.catalog.last_begun_ns(entry.id)
        assert last
        watching.now_ns = lambda: last + 10 * 10**9
        pair.fails = [lose(LinkLost)] * 12
        watching.cycle(site)
        watching.cycle(site)
    return watching


def test_every_metric_is_as_prometheus_wants_it(watch: Watch, tmp_path: Path) -> None:
    for at_s, passed in ((1_800_000_000, True), (1_800_001_000, False)):
        verdict = "sound" if passed else "failed"
        proofs.keep(tmp_path, proofs.Proof(at_s * 10**9, proofs.REHEARSAL, "projects", verdict, passed, 3.0, None, "", ""))
    text = metrics.text(watch, tmp_path)
    promtool("check", "metrics", stdin=text)
    samples = dict(re.findall(r"^(landfall_\S+) (\S+)$", text, re.MULTILINE))
    assert float(samples['landfall_last_success_timestamp_seconds{volume="projects"}']) > 1.7e9
    assert samples['landfall_node_answers{node="nas1",volume="projects"}'] == "1.0"
    assert samples['landfall_failures_total{code="link-lost",volume="projects"}'] == "1.0"
    assert samples['landfall_replications_total{volume="projects"}'] == "1.0"
    assert float(samples['landfall_sent_bytes_total{volume="projects"}']) == 12288
    assert samples['landfall_would_recover_files{volume="projects"}'] == "2.0"
    assert samples['landfall_lag_bytes{volume="projects"}'] == "8192.0"
    assert samples['landfall_act{act="wait",volume="projects"}'] == "1.0"
    assert float(samples['landfall_drill_last_success_timestamp_seconds{scenario="rehearsal",volume="projects"}']) == 1.8e9
    assert samples['landfall_drill_passed{scenario="rehearsal",volume="projects"}'] == "0.0"
    assert next(line for line in text.splitlines() if not line.startswith("#")).startswith("landfall_last_success_timestamp_seconds")


def test_a_volume_that_is_gone_is_forgotten(watch: Watch, tmp_path: Path) -> None:
    with Pair(tmp_path).site() as site:
        site.catalog.forget_volume(site.catalog.volume("projects").id)
        watch.cycle(site)
    assert "landfall_role" in metrics.text(watch, tmp_path)
    assert "landfall_role{" not in metrics.text(watch, tmp_path)


def test_the_metrics_are_served_over_http(watch: Watch, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics.serve(watch, tmp_path, "127.0.0.1", port)
    assert "landfall_epoch" in urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20).read().decode()


def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts_test.yml")


def test_alerts_and_dashboard_speak_of_metrics_that_there_are(watch: Watch, tmp_path: Path) -> None:
    text = metrics.text(watch, tmp_path)
    there = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    wanted = set(re.findall(r"landfall_\w+", (MONITORING / "alerts.yml").read_text()))
    wanted |= {name for panel in dashboard["panels"] for target in panel["targets"] for name in re.findall(r"landfall_\w+", target["expr"])}
    assert len(wanted) > 8
    assert wanted <= there, wanted - there


def test_a_nas_node_writes_a_file_that_prometheus_reads(tmp_path: Path) -> None:
    record = SimpleNamespace(id=UUID(int=1), name="projects", epoch=4)
    node: Any = SimpleNamespace(
        facts=lambda: m.NodeFacts("nas1", "1", 1, True, ("reflink",)),
        substrate=SimpleNamespace(free_bytes=lambda: 1 << 30, volumes=lambda: (record,), generations=lambda volume: (1, 2, 3)),
        serving=lambda known: True,
        share=lambda known: Share(known.name, tmp_path),
        exports=Exports((Samba(tmp_path, "192.0.2.11", 445, guest=False), Nfs(tmp_path / "nfs", ()))),
        store=SimpleNamespace(list=lambda: [1], load=lambda number: SimpleNamespace(state=m.TransferState.RUNNING)),
        outbox=SimpleNamespace(read=lambda after, wait_s: ()),
    )
    written = agent_metrics.TextFile(node, tmp_path / "landfall.prom")
    assert wait_until((tmp_path / "landfall.prom").exists, 20)
    written.close()
    text = (tmp_path / "landfall.prom").read_text()
    promtool("check", "metrics", stdin=text)
    assert "landfall_differential_free_bytes 1.073741824e+09" in text
    assert 'landfall_agent_generations{volume="projects"} 3.0' in text
    assert 'landfall_agent_transfers{state="running"} 1.0' in text
