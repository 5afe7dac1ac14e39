"""The local lab: three nodes that see nothing of each other but the network, and nothing left of them afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest

from agent.contract.errors import LabMissing, NodeUnreachable, NotOurs
from agent.contract.messages import Hello
from agent.system.run import run
from mgmt.inventory import read_inventory
from mgmt.lab import control, lifecycle, loops, processes
from mgmt.lab.layout import NAMESPACES, NAS_NODES, Lab, NodeName, PoolFilesystem
from mgmt.lab.lifecycle import Outcome
from mgmt.lab.namespace import within
from mgmt.reach import ssh_node

POOL_BYTES = 512 << 20
UNREACHABLE_S = 0.5
HEALED_S = 10.0
"""A lost packet of an attempt to connect is sent again after a second, then after two more."""
LIMIT_S = 60
MGMT, NAS1, NAS2 = NodeName

FREEZE_A_VOLUME = """
set -e
cd /run/landfall/node/pool
truncate -s 64M volume.img
mkfs.ext4 -q volume.img
mkdir ../srv/volume
loop=$(losetup --find --show volume.img)
mount $loop ../srv/volume
losetup --detach $loop
fsfreeze --freeze ../srv/volume
"""


@dataclass(frozen=True)
class Footprint:
    """What of a lab is on the machine, looked for in ways that do not rest on the lab's own records."""

    mounts: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    namespaces: list[str] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


NOTHING = Footprint()


def footprint(lab: Lab, pools: frozenset[tuple[int, int]] = frozenset()) -> Footprint:
    """Return what is there; the identities of the pools' files tell their loop devices when the files have gone."""
    commands = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if f"--directory {lab.directory} " in command:
                    commands.append(command)
    mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    backing_files = run(["losetup", "--list", "--noheadings", "--output", "BACK-FILE"]).text.splitlines()
    by_name = [line for line in backing_files if str(lab.directory) in line]
    by_inode = [loop.path for loop in loops.attached() if (loop.backing_device, loop.backing_inode) in pools]
    return Footprint(
        mounts=[line for line in mounts if str(lab.directory) in line or lab.prefix in line],
        loops=by_name + by_inode,
        namespaces=[name for name in run(["ip", "netns"]).text.splitlines() if name.startswith(lab.prefix)],
        processes=commands,
        files=[str(path) for path in (lab.directory, *NAMESPACES.glob(f"{lab.prefix}-*")) if path.exists()],
    )


def pool_identities(lab: Lab) -> frozenset[tuple[int, int]]:
    images = [lab.pool_image(node) for node in NAS_NODES]
    return frozenset((image.stat().st_dev, image.stat().st_ino) for image in images if image.exists())


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Lab]:
    """A directory for a lab; whatever a test leaves there is taken away."""
    lab = Lab.at(tmp_path / "lab")
    yield lab
    lifecycle.down(lab)


@pytest.fixture
def lab(empty: Lab) -> Lab:
    lifecycle.up(empty, pool_size_bytes=POOL_BYTES, agents=False)
    return empty


def on(lab: Lab, node: NodeName, *argv: str) -> str:
    return run(lifecycle.inside(lab, node, argv), timeout_s=LIMIT_S).text


def reaches(lab: Lab, one: NodeName, other: NodeName, limit_s: float = UNREACHABLE_S, *, ipv6: bool = False) -> bool:
    """Whether ``one`` can open a connection to the other's sshd within the limit."""
    address = other.address6 if ipv6 else other.address

    def connect() -> bool:
        try:
            socket.create_connection((address, 22), limit_s).close()
        except OSError:
            return False
        return True

    return within(lab.namespace(one), connect)


def reach_map(lab: Lab, limit_s: float = UNREACHABLE_S) -> set[tuple[NodeName, NodeName]]:
    return {(one, other) for one, other in permutations(NodeName, 2) if reaches(lab, one, other, limit_s)}


ALL = set(permutations(NodeName, 2))


def command(lab: Lab, *verb: str, failpoint: str = "") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "LANDFALL_ALLOW_FAILPOINTS": "1", "LANDFALL_FAILPOINTS": failpoint}
    return subprocess.Popen(
        [sys.executable, "-m", "mgmt.lab", *verb, "--dir", str(lab.directory)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_every_node_reaches_every_other(lab: Lab) -> None:
    assert reach_map(lab) == ALL
    assert reaches(lab, MGMT, NAS2, ipv6=True)


@pytest.fixture
def elsewhere() -> Iterator[Lab]:
    """A directory for a lab that is not below /tmp, which a node has an empty one of anyway."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        lab = Lab.at(Path(directory) / "lab")
        yield lab
        lifecycle.down(lab)


def test_a_node_sees_its_own_folder_and_nothing_of_the_others(elsewhere: Lab) -> None:
    lifecycle.up(elsewhere, pool_size_bytes=POOL_BYTES, agents=False)
    on(elsewhere, NAS1, "touch", "/run/landfall/node/state/mine", "/run/mine", "/tmp/mine")
    assert (elsewhere.node(NAS1) / "state" / "mine").exists()
    assert on(elsewhere, NAS2, "find", "/run", "/tmp", str(elsewhere.directory), "-name", "mine") == ""
    assert on(elsewhere, NAS2, "ls", str(elsewhere.directory)) == ""
    assert on(elsewhere, NAS1, "hostname") == "nas1\n"
    pids = on(elsewhere, NAS1, "sh", "-c", "ls -d /proc/[0-9]*").split()
    assert "/proc/1" in pids
    assert len(pids) < 10
    assert elsewhere.directory.stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("pool_fs", list(PoolFilesystem))
def test_the_pool_clones_files_and_reads_around_the_page_cache(empty: Lab, pool_fs: PoolFilesystem) -> None:
    lifecycle.up(empty, pool_fs, POOL_BYTES, agents=False)
    pool = "/run/landfall/node/pool"
    on(empty, NAS1, "dd", "if=/dev/urandom", f"of={pool}/one", "bs=1M", "count=4", "oflag=direct", "status=none")
    on(empty, NAS1, "cp", "--reflink=always", f"{pool}/one", f"{pool}/two")
    on(empty, NAS1, "cmp", f"{pool}/one", f"{pool}/two")
    image = empty.pool_image(NAS1)
    assert len(loops.backed_by(image)) == 1
    device = loops.backed_by(image)[0].path
    assert run(["losetup", "--list", "--noheadings", "--output", "DIO,AUTOCLEAR", device]).text.split() == ["1", "1"]


def test_the_management_nodes_key_opens_nothing_but_the_agent(lab: Lab) -> None:
    etc = "/run/landfall/node/etc"
    options = [f"-oUserKnownHostsFile={etc}/known_hosts", "-oBatchMode=yes", "-oStrictHostKeyChecking=yes"]
    login = ["ssh", "-F", "none", "-i", f"{etc}/keys/nas1", *options, "root@10.77.0.11", "touch", "/run/forbidden"]
    done = subprocess.run(lifecycle.inside(lab, MGMT, login), capture_output=True, timeout=LIMIT_S, check=False)
    assert b"Permission denied" not in done.stderr
    assert done.returncode != 255, done.stderr
    assert "forbidden" not in on(lab, NAS1, "ls", "/run")
    wrong = [argument.replace("keys/nas1", "keys/nas2") for argument in login]
    done = subprocess.run(lifecycle.inside(lab, MGMT, wrong), capture_output=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 255
    assert b"Permission denied" in done.stderr


def test_the_agents_answer_the_management_node_over_ssh_and_only_while_they_run(empty: Lab) -> None:
    lifecycle.up(empty, pool_size_bytes=POOL_BYTES)
    inventory = read_inventory(empty.node(MGMT) / "etc" / "landfall.toml")
    assert inventory.network_namespace == empty.namespace(MGMT)

    def greet(node: NodeName) -> str:
        with contextlib.closing(ssh_node(inventory.entry(node))) as agent:
            return agent.ask(Hello()).node

    for node in NAS_NODES:
        assert within(empty.namespace(MGMT), partial(greet, node)) == node
    control.kill_service(empty, NAS1, "agent")
    with pytest.raises(NodeUnreachable):
        within(empty.namespace(MGMT), partial(greet, NAS1))
    control.start_service(empty, NAS1, "agent")
    assert within(empty.namespace(MGMT), partial(greet, NAS1)) == NAS1
    pools = pool_identities(empty)
    lifecycle.down(empty)
    assert footprint(empty, pools) == NOTHING


@pytest.mark.parametrize(
    "cut",
    [
        [(NAS1, NAS2)],
        [(MGMT, NAS1)],
        [(MGMT, NAS1), (NAS2, NAS1)],
        [(MGMT, NAS1), (NAS2, NAS1), (MGMT, NAS2)],
    ],
)
def test_D_a_cut_parts_exactly_two_nodes_and_heals(lab: Lab, cut: list[tuple[NodeName, NodeName]]) -> None:
    for one, other in cut:
        assert lifecycle.cut(lab, one, other) is Outcome.DONE
    apart = {direction for one, other in cut for direction in ((one, other), (other, one))}
    assert reach_map(lab) == ALL - apart
    assert lifecycle.cut(lab, *cut[0]) is Outcome.ALREADY
    for one, other in cut:
        lifecycle.heal(lab, one, other)
    assert reach_map(lab, HEALED_S) == ALL


def test_a_killed_node_is_gone_and_comes_back_with_its_disks(lab: Lab) -> None:
    on(lab, NAS1, "sh", "-c", "echo kept > /run/landfall/node/pool/file; sync; echo gone > /run/file")
    assert lifecycle.kill(lab, NAS1) is Outcome.DONE
    assert not reaches(lab, MGMT, NAS1)
    assert reaches(lab, MGMT, NAS2)
    assert loops.backed_by(lab.pool_image(NAS1)) == []
    assert processes.inside(lab, [lab.namespace(NAS1)]) == []
    with pytest.raises(LabMissing):
        on(lab, NAS1, "true")
    assert lifecycle.kill(lab, NAS1) is Outcome.ALREADY
    assert lifecycle.start_node(lab, NAS1) is Outcome.DONE
    assert on(lab, NAS1, "cat", "/run/landfall/node/pool/file") == "kept\n"
    assert "file" not in on(lab, NAS1, "ls", "/run").split()
    assert reaches(lab, MGMT, NAS1)
    assert lifecycle.start_node(lab, NAS1) is Outcome.ALREADY


def test_killing_a_node_with_a_frozen_volume_and_a_stuck_writer_ends_both(lab: Lab) -> None:
    on(lab, NAS1, "sh", "-c", FREEZE_A_VOLUME)
    writer = subprocess.Popen(lifecycle.inside(lab, NAS1, ["touch", "/run/landfall/node/srv/volume/stuck"]))
    lifecycle.kill(lab, NAS1)
    assert writer.wait(LIMIT_S) != 0
    assert loops.on_pool(lab.pool_image(NAS1)) == []
    lifecycle.start_node(lab, NAS1)
    on(lab, NAS1, "mount", "-o", "loop", "/run/landfall/node/pool/volume.img", "/run/landfall/node/srv/volume")


def test_one_service_can_be_killed_and_started(lab: Lab) -> None:
    control.kill_service(lab, NAS2, "sshd")
    ended = {service.name: service.ended for service in control.services(lab, NAS2)}
    assert ended["sshd"] == -signal.SIGKILL
    control.start_service(lab, NAS2, "sshd")
    assert reaches(lab, MGMT, NAS2)
    control.stop_service(lab, NAS2, "sshd")
    assert {service.name: service.pid for service in control.services(lab, NAS2)}["sshd"] is None
    with pytest.raises(LabMissing, match="no service"):
        control.start_service(lab, NAS2, "cron")


def test_up_twice_is_fine_and_the_second_says_so(lab: Lab) -> None:
    first = [node.pid for node in lifecycle.status(lab).nodes]
    assert lifecycle.up(lab) is Outcome.ALREADY
    lifecycle.kill(lab, NAS2)
    assert not lifecycle.status(lab).up
    assert lifecycle.up(lab) is Outcome.DONE
    second = [node.pid for node in lifecycle.status(lab).nodes]
    assert first[:2] == second[:2]
    assert lifecycle.status(lab).up


def test_down_leaves_nothing_and_twice_is_fine(lab: Lab) -> None:
    pools = pool_identities(lab)
    there = footprint(lab, pools)
    assert min(map(len, (there.mounts, there.loops, there.namespaces, there.processes, there.files))) > 0
    assert lifecycle.down(lab) is Outcome.DONE
    assert footprint(lab, pools) == NOTHING
    assert lifecycle.down(lab) is Outcome.ALREADY


def test_down_after_the_first_processes_were_killed_with_a_volume_frozen(lab: Lab) -> None:
    pools = pool_identities(lab)
    on(lab, NAS1, "sh", "-c", FREEZE_A_VOLUME)
    for node in lifecycle.status(lab).nodes:
        assert node.pid is not None
        os.kill(node.pid, signal.SIGKILL)
    assert lifecycle.down(lab) is Outcome.DONE
    assert footprint(lab, pools) == NOTHING


def test_down_finds_what_is_left_when_the_directory_was_removed(lab: Lab) -> None:
    pools = pool_identities(lab)
    run(["rm", "-rf", str(lab.directory)])
    assert lifecycle.down(lab) is Outcome.DONE
    assert footprint(lab, pools) == NOTHING


STEPS = ["marked", "namespace_named", "namespace_made", "network", "disks", "booted"]


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_up_takes_away_what_it_made(empty: Lab, step: str) -> None:
    making = command(empty, "up", "--bare", "--pool-size", "512M", failpoint=f"lab.{step}=stop")
    _, status = os.waitpid(making.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    pools = pool_identities(empty)
    making.send_signal(signal.SIGINT)
    making.send_signal(signal.SIGCONT)
    _, words = making.communicate(timeout=LIMIT_S)
    assert making.returncode == 130, words
    assert footprint(empty, pools) == NOTHING


def test_K7_a_second_ctrl_c_does_not_break_off_the_cleaning_up(empty: Lab) -> None:
    making = subprocess.Popen(
        [sys.executable, "-m", "mgmt.cli", "lab", "up", "--bare", "--pool-size", "512M", "--dir", str(empty.directory)],
        env={**os.environ, "LANDFALL_ALLOW_FAILPOINTS": "1", "LANDFALL_FAILPOINTS": "lab.booted=stop"},
        stderr=subprocess.PIPE,
    )
    _, status = os.waitpid(making.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    pools = pool_identities(empty)
    making.send_signal(signal.SIGINT)
    making.send_signal(signal.SIGTERM)
    making.send_signal(signal.SIGCONT)
    _, words = making.communicate(timeout=LIMIT_S)
    assert making.returncode == 130, words
    assert b"cleaning up" in words
    assert footprint(empty, pools) == NOTHING


@pytest.mark.parametrize("step", STEPS)
def test_up_takes_down_first_what_a_killed_up_has_left(empty: Lab, step: str) -> None:
    making = command(empty, "up", "--bare", "--pool-size", "512M", failpoint=f"lab.{step}=kill")
    making.communicate(timeout=LIMIT_S)
    assert making.returncode == -signal.SIGKILL
    left = pool_identities(empty)
    assert lifecycle.up(empty, pool_size_bytes=POOL_BYTES, agents=False) is Outcome.DONE
    assert reach_map(empty) == ALL
    pools = left | pool_identities(empty)
    lifecycle.down(empty)
    assert footprint(empty, pools) == NOTHING


def test_what_carries_no_marker_is_refused(empty: Lab) -> None:
    empty.directory.mkdir()
    treasure = empty.directory / "treasure"
    treasure.write_text("mine")
    for act in (lifecycle.up, lifecycle.down):
        with pytest.raises(NotOurs):
            act(empty)
    assert treasure.read_text() == "mine"
    treasure.unlink()


def test_a_namespace_of_somebody_else_is_refused(empty: Lab) -> None:
    name = empty.namespace(NAS1)
    path = NAMESPACES / name
    NAMESPACES.mkdir(exist_ok=True)
    path.touch()
    run(["unshare", f"--net={path}", "ip", "link", "add", "theirs", "type", "bridge"])
    try:
        with pytest.raises(NotOurs):
            lifecycle.down(empty)
        assert "theirs" in run(["ip", "-n", name, "-brief", "link"]).text
    finally:
        run(["umount", str(path)])
        path.unlink()


def test_two_labs_stand_side_by_side(lab: Lab, tmp_path: Path) -> None:
    other = Lab.at(tmp_path / "other")
    try:
        lifecycle.up(other, pool_size_bytes=POOL_BYTES, agents=False)
        lifecycle.down(lab)
        assert reach_map(other) == ALL
    finally:
        lifecycle.down(other)


def test_every_verb_has_json(empty: Lab) -> None:
    verbs = [
        ["up", "--bare", "--pool-size", "512M"],
        ["cut", "nas1", "nas2"],
        ["status"],
        ["heal", "nas1", "nas2"],
        ["kill", "nas1"],
        ["start", "nas1"],
        ["down"],
    ]
    answers = []
    for verb in verbs:
        done = command(empty, *verb, "--json")
        stdout, stderr = done.communicate(timeout=LIMIT_S)
        assert done.returncode == 0, stderr
        answers.append(json.loads(stdout))
    assert [answer.get("outcome") for answer in answers] == ["done", "done", None, "done", "done", "done", "done"]
    assert answers[2]["cut"] == [["nas1", "nas2"]]
    assert [node["name"] for node in answers[2]["nodes"]] == ["mgmt", "nas1", "nas2"]
    assert answers[2]["up"] is True
