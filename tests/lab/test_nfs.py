"""NFS clients of a volume that changes sides: what they hold goes on, waits, or is answered. The kernel's server and client, in a guest."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.contract import messages as m
from agent.system.clock import boottime_ns, monotonic_s, wait_until
from agent.system.run import run as start_program
from mgmt import run
from mgmt.failover.plan import FailoverKind, Wish
from mgmt.lab import control, lifecycle
from mgmt.lab.layout import Lab, NodeName
from mgmt.lab.namespace import within
from tests.lab.scene import Scene
from tests.nfs_client import Held, mounted

pytestmark = pytest.mark.nfs_server

MGMT, NAS1, NAS2 = NodeName
LIMIT_S = 180.0
LEASE_S = 20.0
HELD_S = 5.0
UNTOUCHED = {f"old{index}": (index, 20_000) for index in range(6)}

log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Yield a lab whose nodes export by NFS too."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="landfall-nfs-", dir="/var/tmp") as folder:
        made = Lab.at(Path(folder) / "lab")
        patch.setattr(lifecycle, "START_S", LIMIT_S)  # a guest has half a slow core
        try:
            lifecycle.up(made, pool_size_bytes=1 << 30)
            configuration = made.node(MGMT) / "etc" / "landfall.toml"
            configuration.write_text("silence_limit_s = 2.0\n" + configuration.read_text())
            for node in (NAS1, NAS2):
                with open(made.node(node) / "etc" / "agent.toml", "a", encoding="utf-8") as settings:
                    settings.write('nfs_clients = ["10.77.0.0/24"]\nnfs_squash = "none"\n')
                control.kill_service(made, node, "agent")
                control.start_service(made, node, "agent")
            yield made
        finally:
            lifecycle.down(made)


class Client:
    """A machine with the volume mounted, in the management node's network."""

    def __init__(self, scene: Scene, point: Path) -> None:
        self._scene, self.point = scene, point

    def hold(self, name: str) -> Held:
        return Held(self.point / name)


@contextmanager
def client_of(scene: Scene, folder: Path) -> Iterator[Client]:
    namespace = scene.lab.namespace(MGMT)
    context = mounted(scene.address, Path("/run/landfall/node/srv") / scene.name, folder / "client")
    point = within(namespace, context.__enter__)
    try:
        yield Client(scene, point)
    finally:
        within(namespace, lambda: context.__exit__(None, None, None))


def scene_of(lab: Lab, name: str, number: int) -> Scene:
    for node in (NAS1, NAS2):
        lifecycle.start_node(lab, node)
    made = Scene(lab, name, f"10.77.0.{number}")
    made.add()
    made.write(NAS1, UNTOUCHED)
    return made


def exported(scene: Scene) -> bool:
    """Ask what nas1's kernel and exportfs have."""
    listed = start_program(lifecycle.inside(scene.lab, NAS1, ["cat", "/var/lib/nfs/etab"])).text
    threads = start_program(lifecycle.inside(scene.lab, NAS1, ["cat", "/proc/fs/nfsd/threads"])).text
    return f"/{scene.name}\t" in listed or int(threads) > 0


def test_I4_a_lease_that_ends_takes_the_nfs_export_with_it_whatever_became_of_the_agent(lab: Lab, tmp_path: Path) -> None:
    scene = scene_of(lab, "leased", 121)
    agent = str(next(service.pid for service in control.services(lab, NAS1) if service.name == "agent"))
    with client_of(scene, tmp_path) as client:
        held = client.hold("held")
        try:
            assert held.ask("write 1") == "ok"
            assert exported(scene)
            scene.at_site(lambda site: site.node(NAS1).ask(m.RenewLease(site.catalog.volume("leased").id, 1, LEASE_S)))
            start_program(lifecycle.inside(lab, NAS1, ["kill", "-STOP", agent]))
            assert wait_until(lambda: not exported(scene), LIMIT_S, every_s=0.1)
            given_up_ns = boottime_ns()
            held_s = (scene.lease_until_ns(NAS1) - given_up_ns) / 1e9
            log.info("not exported any more %.1f s before the lease ended", held_s)
            assert held_s >= HELD_S, f"it was exported until {held_s:.1f} s before its lease ended"
            held.tell("append 2")
            assert held.answer(3.0) == "", "who hears nothing waits, and is not told that his file is gone"
            start_program(lifecycle.inside(lab, NAS1, ["kill", "-CONT", agent]))
            assert wait_until(lambda: not scene.facts(NAS1).serving, LIMIT_S, every_s=0.2)
            scene.at_site(lambda site: run.serve(site, "leased"))
            assert held.answer(LIMIT_S) == "ok"
            assert scene.smb("held") == b"12"
        finally:
            start_program(lifecycle.inside(lab, NAS1, ["kill", "-CONT", agent]))
            held.end()


def test_I14_what_clients_hold_goes_on_at_the_other_node(lab: Lab, tmp_path: Path) -> None:
    scene = scene_of(lab, "planned", 120)
    assert scene.facts(NAS1).exports == ("SMB", "NFS")
    with client_of(scene, tmp_path) as client:
        held, locked = client.hold("held"), client.hold("locked")
        try:
            assert [held.ask("write 1"), locked.ask("write 1"), locked.ask("lock")] == ["ok"] * 3
            inode = held.ask("inode")

            begun = monotonic_s()
            done = scene.fail_over(Wish(planned=True))
            assert held.ask("append 2") == "ok"
            gap_s = monotonic_s() - begun
            assert done.kind is FailoverKind.PLANNED
            assert (held.ask("inode"), held.ask("read")) == (inode, "ok 12")
            assert locked.ask("append 2") == "EIO", "whoever held a lock is told that it is lost"
            assert scene.smb("held") == b"12", "the client writes to the new primary"
            assert (client.point / "old1").stat().st_size == 20_000
            (client.point / "new").write_bytes(b"by the mount of old")
            assert scene.smb("new") == b"by the mount of old"
            log.info("planned: the client's write was answered %.1f s after the hand-over began", gap_s)

            # Nobody replicates what follows, and nas2's plug is pulled: back to what nas1 holds.
            assert scene.facts(NAS1).exports == ()
            scene.replicate()
            late = client.hold("late")
            assert [late.ask("write 3"), held.ask("append 3")] == ["ok", "ok"]
            lifecycle.kill(lab, NAS2)
            held.tell("append 4")
            begun = monotonic_s()
            done = scene.fail_over()
            assert done.kind is FailoverKind.UNPLANNED
            assert held.answer(LIMIT_S) == "ok"
            log.info("unplanned: the client's write was answered %.1f s after the failover began", monotonic_s() - begun)
            assert held.ask("inode") == inode
            assert scene.smb("held").startswith(b"12"), "what was replicated is there"
            assert late.ask("append 5") in {"ESTALE", "EIO", "EBADF"}, "what was lost says so"
            assert not (client.point / "late").exists()
            (client.point / "late").write_bytes(b"again")
            assert scene.smb("late") == b"again"
            late.end()
        finally:
            held.end()
            locked.end()
