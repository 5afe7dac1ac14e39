"""The service decides by itself, with real agents: it fails over, renews leases, and is not taken in by half of the truth."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.config import LEAST_MARGIN_S
from agent.contract import messages as m
from agent.contract.errors import LandfallError
from agent.system.clock import boottime_ns, monotonic_s, wait_until
from agent.system.run import run as start_program
from mgmt import run
from mgmt.drill.clients import SmbClient
from mgmt.drill.onlooker import Onlooker
from mgmt.failover.journal import Journal
from mgmt.lab import control, lifecycle, processes
from mgmt.lab.layout import NAMESPACES, NODE_ROOT, Lab, NodeName
from tests.lab.scene import LIMIT_S, MGMT, NAS1, NAS2, Scene, changed, document, landfall, scene_of, watching

HELD_S = 5.0
"""So long before the end of its lease a volume has been given up, by a lab's agents as by any other."""
LEASE_S = 3 * LEAST_MARGIN_S
SILENCE_LIMIT_S = 2.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="landfall-automatic-", dir="/var/tmp") as folder:
        made = Lab.at(Path(folder) / "lab")
        try:
            lifecycle.up(made, pool_size_bytes=2 << 30)
            configuration = made.node(MGMT) / "etc" / "landfall.toml"
            head = f"cycle_s = 0.5\nsilence_limit_s = {SILENCE_LIMIT_S}\nautomatic_failover = true\nlease_s = {LEASE_S}\n"
            head += "probe_limit_s = 1.0\n"
            text = head + configuration.read_text()
            configuration.write_text(text)
            # The same site, with nas1 fenced by its lease.
            (configuration.parent / "leases.toml").write_text(text.replace('fence = "lab"', 'fence = "lease"', 1))
            yield made
        finally:
            lifecycle.down(made)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "watch.log"


def forgotten(scene: Scene) -> None:
    """Let the service have nothing to do with a volume any more."""
    for node in (NAS1, NAS2):
        lifecycle.start_node(scene.lab, node)
    scene.at_site(lambda site: site.catalog.forget_volume(site.catalog.volume(scene.name).id))


def looking_on(scene: Scene, name: str) -> Onlooker:
    seed, size = scene.contents[name]
    client = SmbClient(scene.address, scene.name, ("nsenter", f"--net={NAMESPACES / scene.lab.clients}", "--"))
    return Onlooker(client, name, random.Random(seed).randbytes(size))


def said(log: Path, words: str, since: int = 0) -> bool:
    """Whether the service comes to say something, after what its log held at ``since``."""
    return wait_until(lambda: words in log.read_text()[since:], LIMIT_S, every_s=0.1)


def test_I1_I7_I8_I15_the_service_fences_salvages_and_serves_and_a_node_that_flaps_changes_nothing(lab: Lab, log: Path) -> None:
    scene = scene_of(lab, "automatic", 110)
    before = dict(scene.contents)
    with watching(lab, log), looking_on(scene, "old1") as client:
        scene.break_off(NAS1, changed(1000))
        assert wait_until(lambda: scene.facts(NAS2).serving, LIMIT_S, every_s=0.2), log.read_text()
        assert said(log, "fails over: nas1 answers neither here nor to nas2")
        assert said(log, "waits: nas1 does not answer ("), log.read_text()
        for _ in range(2):  # it comes and goes
            since = len(log.read_text())
            lifecycle.start_node(lab, NAS1)
            assert said(log, "nas1 is back and was overtaken; `landfall failback automatic`", since), log.read_text()
            assert not scene.facts(NAS1).serving
            since = len(log.read_text())
            lifecycle.kill(lab, NAS1)
            assert said(log, "waits: nas1 does not answer (", since), log.read_text()
        seen = client.seen()
    assert (scene.facts(NAS2).role, scene.facts(NAS2).epoch, scene.facts(NAS2).serving) == (m.Role.PRIMARY, 2, True)
    assert [gap.seconds is not None for gap in seen.gaps] == [True], "one gap, and then its files at the same address"
    (entry,) = scene.at_site(lambda site: Journal(site.catalog).entries(site.catalog.volume("automatic").id))
    assert entry.ending == "done"
    statement = scene.at_site(lambda site: site.catalog.newest_salvage(site.catalog.volume("automatic").id).statement)
    verdicts = {account.paths[0]: account.outcome for account in statement.accounts}
    recovered = [name for name in changed(0) if verdicts[name] is m.Outcome.RECOVERED]
    kept = [name for name in changed(0) if verdicts[name] is m.Outcome.KEPT]
    assert recovered
    assert kept
    scene.contents |= {name: before[name] for name in kept}
    scene.assert_served(*recovered, *kept, "old1")
    assert "Traceback" not in log.read_text()
    forgotten(scene)


def test_I2_I6_C11_the_service_that_is_cut_from_nas1_alone_holds_still_and_goes_on_afterwards(lab: Lab, log: Path) -> None:
    scene = scene_of(lab, "alone", 111)
    scene.write(NAS1, changed(2000))
    with watching(lab, log), looking_on(scene, "old1") as client:
        lifecycle.cut(lab, MGMT, NAS1)
        try:
            assert said(log, "does not answer, and is not gone"), log.read_text()
        finally:
            lifecycle.heal(lab, MGMT, NAS1)
        assert said(log, "waits to be told"), log.read_text()
        seen = client.seen()
    assert seen.gaps == (), "who is served by nas1 notices nothing"
    assert (scene.facts(NAS1).serving, scene.facts(NAS2).serving) == (True, False)
    assert "fails over" not in log.read_text()
    scene.replicate()
    newest = [m.newest(scene.facts(node).generations).id for node in (NAS1, NAS2)]
    assert newest[0] == newest[1]
    forgotten(scene)


def test_I3_I4_a_lease_that_the_service_renews_and_one_that_it_does_not(lab: Lab, log: Path) -> None:
    scene = scene_of(lab, "leased", 112)
    leases = ("--config", str(lab.node(MGMT) / "etc" / "leases.toml"))
    with watching(lab, log, *leases), looking_on(scene, "old1") as client:
        assert wait_until(lambda: scene.facts(NAS1).lease_s is not None, LIMIT_S, every_s=0.2), log.read_text()
        _kill_keeper(lab)
        control.kill_service(lab, NAS1, "agent")
        control.start_service(lab, NAS1, "agent")
        until = monotonic_s() + LEASE_S - LEAST_MARGIN_S + 1.0
        assert wait_until(lambda: monotonic_s() > until, 2 * LEASE_S, every_s=0.5)
        assert scene.facts(NAS1).serving, "longer than under one lease: it is renewed, by an agent that was restarted, kept by a new keeper"
        seen = client.seen()
    assert seen.gaps == ()
    # The service is gone.
    assert wait_until(lambda: not _has_address(scene, NAS1), LIMIT_S, every_s=0.1), scene.said_by_keeper(NAS1)
    assert wait_until(lambda: not _is_writable(scene), LIMIT_S, every_s=0.1), scene.said_by_keeper(NAS1)
    given_up_ns = boottime_ns()
    held_s = (scene.lease_until_ns(NAS1) - given_up_ns) / 1e9
    assert held_s >= HELD_S, f"it had given up {held_s:.1f} s before its lease ended"
    assert held_s < LEAST_MARGIN_S, "a lease was cut short"
    assert not scene.facts(NAS1).serving
    forgotten(scene)


def test_A13_I4_I7_an_agent_that_stood_still_wakes_up_after_the_failover_and_is_refused(lab: Lab, log: Path) -> None:
    scene = scene_of(lab, "paused", 113)
    configuration = lab.node(MGMT) / "etc" / "leases.toml"
    leases = ("--config", str(configuration))
    agent = str(next(service.pid for service in control.services(lab, NAS1) if service.name == "agent"))
    with watching(lab, log, *leases):
        assert wait_until(lambda: scene.facts(NAS1).lease_s is not None, LIMIT_S, every_s=0.2), log.read_text()
    scene.pause_agent(NAS1, agent, changed(3000))
    done = document(landfall(lab, "failover", "paused", "--declare-dead", "--yes", "--json", at=leases))
    assert (done["fence"], done["target"], done["epoch"]) == ("lease", "nas2", 2)
    assert 0 < done["files_recovered"] < done["files_changed"]
    served = scene.facts(NAS2)
    start_program(lifecycle.inside(lab, NAS1, ["kill", "-CONT", agent]))
    assert wait_until(lambda: _answers(scene, NAS1), LIMIT_S, every_s=0.2)
    woken = scene.facts(NAS1)
    assert (woken.serving, _has_address(scene, NAS1), _is_writable(scene)) == (False, False, False)
    sent = scene.at_site(lambda site: site.node(NAS1).ask(m.ListTransfers()).transfers)
    assert all(found.state is not m.TransferState.COMMITTED for found in sent if found.volume == woken.id and found.target.counter > 1)
    assert scene.facts(NAS2).generations == served.generations, "what came late changed nothing"
    with pytest.raises(LandfallError):
        scene.at_site(lambda site: run.serve(site, "paused", node="nas1"))
    scene.assert_served("old1")
    forgotten(scene)


def _answers(scene: Scene, node: NodeName) -> bool:
    return scene.at_site(lambda site: site.alive(node))


def _has_address(scene: Scene, node: NodeName) -> bool:
    listed = start_program(lifecycle.inside(scene.lab, node, ["ip", "-brief", "address"]))
    return f"{scene.address}/" in listed.text


def _is_writable(scene: Scene) -> bool:
    """Ask nas1's kernel, not its agent."""
    mount_point = str(NODE_ROOT / "srv" / scene.name)
    mounted = start_program(lifecycle.inside(scene.lab, NAS1, ["mountpoint", "-q", mount_point]), ok=range(256)).status == 0
    words = ["touch", f"{mount_point}/touched"]
    return mounted and start_program(lifecycle.inside(scene.lab, NAS1, words), ok=range(256)).status == 0


def _kill_keeper(lab: Lab) -> None:
    """Kill what gives the volume up in time; the agent is to start another."""
    keepers = [pid for pid in processes.inside(lab, [lab.namespace(NAS1)]) if b"agent.serving.keeper" in processes.command_line(pid)]
    assert keepers, "a lease without a keeper"
    assert not processes.kill(keepers, LIMIT_S)
