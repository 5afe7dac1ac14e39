"""A volume changes sides in a lab: lost and recovered at the same address, handed over under load, given back, contested, interrupted."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.contract import messages as m
from agent.contract.errors import (
    LandfallError,
    NodeUnreachable,
    NothingKept,
    NotListed,
    NotPrimary,
    PrimaryAlive,
    RequestRefused,
    SplitBrain,
)
from agent.contract.identity import GenerationKind
from agent.system.clock import wait_until
from agent.system.run import run as start_program
from mgmt import run
from mgmt.failover import driver, failback, rescue
from mgmt.failover.plan import HAND_OVER, TAKE_OVER, FailoverKind, Wish
from mgmt.inventory import FenceOptions
from mgmt.lab import control, lifecycle
from mgmt.lab.layout import Lab, NodeName
from tests.lab.scene import BALLAST_BYTES, LIMIT_S, MGMT, NAS1, NAS2, Scene, changed, document, landfall, scene_of


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="landfall-failover-", dir="/var/tmp") as folder:
        made = Lab.at(Path(folder) / "lab")
        try:
            lifecycle.up(made, pool_size_bytes=2 << 30)
            configuration = made.node(MGMT) / "etc" / "landfall.toml"
            configuration.write_text("silence_limit_s = 2.0\n" + configuration.read_text())
            yield made
        finally:
            lifecycle.down(made)


def dies_at(scene: Scene, point: str) -> bool:
    """Let a process of the management node hand the volume over, killed at a failpoint; whether it was."""
    child = os.fork()
    if child == 0:
        os.environ |= {"LANDFALL_ALLOW_FAILPOINTS": "1", "LANDFALL_FAILPOINTS": f"{point}=kill"}
        try:
            scene.fail_over(Wish(planned=True))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_I1_I11_lost_recovered_at_the_same_address_and_given_back(lab: Lab) -> None:
    scene = scene_of(lab, "lost", 100)
    scene.assert_served("old1")
    before = dict(scene.contents)
    scene.break_off(NAS1, changed(1000))
    sent = dict(scene.contents)

    done = document(landfall(lab, "failover", "lost", "--yes", "--json"))
    assert done["kind"] == "unplanned"
    assert 0 < done["files_recovered"] < done["files_changed"]
    assert done["rto_s"] == pytest.approx(sum(done["seconds"].values()))
    assert done["seconds"]["fence"] > 0
    statement = scene.at_site(lambda site: site.catalog.newest_salvage(site.catalog.volume("lost").id).statement)
    verdicts = {account.paths[0]: account.outcome for account in statement.accounts}
    recovered = [name for name in changed(0) if verdicts[name] is m.Outcome.RECOVERED]
    kept = [name for name in changed(0) if verdicts[name] is m.Outcome.KEPT]
    scene.contents |= {name: before[name] for name in kept}
    scene.assert_served(recovered[0], kept[0], "old1")
    (said,) = json.loads(landfall(lab, "history", "lost", "--kind", "failover", "--json").stdout)
    assert said["facts"]["seconds"]["fence"] > 0

    # It comes back: it serves nothing, and is not served from.
    lifecycle.start_node(lab, NAS1)
    assert not scene.facts(NAS1).serving
    assert landfall(lab, "serve", "lost", "--node", "nas1").returncode == NotPrimary.exit_code
    assert landfall(lab, "failover", "lost", "--planned", "--yes").returncode != 0
    scene.write(NAS2, {"written on nas2": (7, 50_000), kept[0]: (8, 1000)})

    both = document(landfall(lab, "failback", "lost", "--yes", "--json"))
    followed = both["followed"]
    listed = {found["path"]: (found["there"], found["here"]) for found in followed["comparison"]["held"]}
    assert {name: listed.get(name) for name in kept[1:]} == dict.fromkeys(kept[1:], ("changed", "untouched"))
    assert listed[kept[0]] == ("changed", "changed")
    assert not set(recovered) & set(listed), "what was recovered is on both"
    assert "written on nas2" in {found["path"] for found in followed["comparison"]["changed"]}
    assert followed["bytes_sent"] < BALLAST_BYTES / 2, "a differential, not a copy of all"
    assert both["failover"]["lost"]["volume"] == 0
    assert (scene.facts(NAS1).role, scene.facts(NAS1).epoch, scene.facts(NAS1).serving) == (m.Role.PRIMARY, 3, True)
    assert (scene.facts(NAS2).role, scene.facts(NAS2).serving) == (m.Role.SECONDARY, False)
    held = [found for found in scene.facts(NAS1).generations if found.kind is GenerationKind.KEPT]
    assert [found.id.name for found in held] == [followed["kept"]]
    scene.assert_served("written on nas2", kept[0], recovered[0])
    assert kept[1] in sent
    scene.at_site(lambda site: run.replicate(site, "lost"))


def test_I18_handed_over_under_load_nothing_that_was_acknowledged_is_lost(lab: Lab) -> None:
    scene = scene_of(lab, "planned", 101)
    acknowledged: list[int] = []
    ended = threading.Event()

    def write_on() -> None:
        """Put files as a client does, until the server is not there any more."""
        number = 0
        with tempfile.TemporaryDirectory() as folder:
            while not ended.is_set():
                (Path(folder) / "log").write_bytes(b"%d" % number)
                if b"NT_STATUS" in scene.smbclient(f'put "{folder}/log" log{number}'):
                    return
                acknowledged.append(number)
                number += 1

    writing = threading.Thread(target=write_on)
    writing.start()
    try:
        assert wait_until(lambda: len(acknowledged) > 1, LIMIT_S)
        done = scene.fail_over(Wish(planned=True))
    finally:
        ended.set()
        writing.join(LIMIT_S)
    assert (done.kind, done.lost.volume) == (FailoverKind.PLANNED, 0.0)
    for number in (0, acknowledged[-1]):
        assert scene.smb(f"log{number}") == b"%d" % number
    assert (scene.facts(NAS1).role, scene.facts(NAS2).role) == (m.Role.SECONDARY, m.Role.PRIMARY)
    assert scene.replicate().sent.bytes_sent < BALLAST_BYTES / 2


def test_I2_C11_the_management_nodes_own_blindness_is_no_death(lab: Lab) -> None:
    scene = scene_of(lab, "isolated", 102)
    lifecycle.cut(lab, MGMT, NAS1)
    try:
        refused = landfall(lab, "failover", "isolated", "--yes")
        assert refused.returncode == PrimaryAlive.exit_code
        assert b"the node is not gone" in refused.stderr
    finally:
        lifecycle.heal(lab, MGMT, NAS1)
    assert (scene.facts(NAS1).serving, scene.facts(NAS2).serving) == (True, False)
    scene.assert_served("old1")


def test_C5_C6_C7_the_management_process_dies_at_every_step_and_it_is_done_once(lab: Lab) -> None:
    scene = scene_of(lab, "killed", 103)
    for point in [f"failover.{when}_{step}" for step in (*HAND_OVER, *TAKE_OVER) for when in ("before", "after")]:
        assert dies_at(scene, point), point
    done = document(landfall(lab, "failover", "killed", "--planned", "--yes", "--json"))
    assert done["epoch"] == 2
    scene.assert_served("old1")
    assert (scene.facts(NAS1).epoch, scene.facts(NAS2).epoch) == (2, 2)


def test_I10_a_forced_promotion_is_a_split_brain_until_somebody_decides(lab: Lab) -> None:
    scene = scene_of(lab, "forced", 104)
    lifecycle.cut(lab, MGMT, NAS1)
    lifecycle.cut(lab, NAS1, NAS2)
    try:
        entries = tuple(dataclasses.replace(entry, fence="ssh-stop", fence_options=FenceOptions()) for entry in scene.inventory.node)
        unfenced = dataclasses.replace(scene.inventory, node=entries)
        with pytest.raises(LandfallError, match="gave no proof"):
            scene.at_site(lambda site: driver.failover(site, "forced", Wish()), unfenced)
        assert scene.facts(NAS2).role is m.Role.SECONDARY
        done = scene.at_site(lambda site: driver.failover(site, "forced", Wish(force=True)), unfenced)
        assert done
        assert done.split_brain
        scene.write(NAS2, {"here": (1, 1000)})
        scene.write(NAS1, {"there": (2, 1000)})
    finally:
        lifecycle.heal(lab, NAS1, NAS2)
        lifecycle.heal(lab, MGMT, NAS1)
    with pytest.raises(SplitBrain):
        scene.replicate()
    followed = document(landfall(lab, "resync", "forced", "--discard-from", "nas1", "--yes", "--json"))
    assert [found["path"] for found in followed["comparison"]["held"]] == ["there"]
    scene.replicate()
    scene.assert_served("here", "old1")


def test_I9_the_node_that_takes_over_dies_while_it_recovers_and_never_serves_a_half(lab: Lab) -> None:
    scene = scene_of(lab, "halves", 107)
    before = dict(scene.contents)
    scene.break_off(NAS1, changed(4000))
    for point in ("recovery.file", "recovery.after_commit"):
        control.kill_service(lab, NAS2, "agent")
        control.start_service(lab, NAS2, "agent", {"LANDFALL_ALLOW_FAILPOINTS": "1", "LANDFALL_FAILPOINTS": f"{point}=kill"})
        died = landfall(lab, "failover", "halves", "--yes")
        assert died.returncode == NodeUnreachable.exit_code, (point, died.stderr.decode())
        control.start_service(lab, NAS2, "agent")
        assert (scene.facts(NAS2).role, scene.facts(NAS2).serving) == (m.Role.SECONDARY, False), point
    done = document(landfall(lab, "failover", "halves", "--yes", "--json"))
    assert done["epoch"] == 2
    assert 0 < done["files_recovered"] < done["files_changed"]
    statement = scene.at_site(lambda site: site.catalog.newest_salvage(site.catalog.volume("halves").id).statement)
    kept = [account.paths[0] for account in statement.accounts if account.outcome is m.Outcome.KEPT]
    scene.contents |= {name: before[name] for name in kept if name in before}
    scene.assert_served(*changed(0), "old1", "ballast")


def test_I12_I13_the_way_back_is_interrupted_and_recovered_with_the_roles_swapped(lab: Lab) -> None:
    scene = scene_of(lab, "back", 105)
    scene.fail_over(Wish(planned=True))
    scene.break_off(NAS2, changed(3000))
    done = scene.fail_over()
    assert (done.source, done.target, done.epoch) == ("nas2", "nas1", 3)
    assert 0 < done.files_recovered < done.files_changed
    scene.assert_served("old1")
    lifecycle.start_node(lab, NAS2)
    followed = scene.at_site(lambda site: failback.resync(site, "back"))
    assert followed
    assert followed.comparison.held
    assert scene.facts(NAS2).epoch == 3


UNREPLICATED = """
import os, pathlib, random, sys
os.chdir(sys.argv[1])
pathlib.Path("plans/deep").mkdir(parents=True)
for seed, name in enumerate(("plans/a.txt", "plans/deep/b.bin", "report.final.doc", "old0", "old2", "old4")):
    pathlib.Path(name).write_bytes(random.Random(100 + seed).randbytes(300_000))
with open("plans/sparse", "wb") as file:
    file.truncate(8 << 20)
    file.seek(5 << 20)
    file.write(b"data")
os.symlink("/etc/passwd", "plans/link")
os.chown("plans/a.txt", 1234, 2345)
os.chmod("plans/a.txt", 0o2640)
os.setxattr("plans/a.txt", "user.tag", b"kept")
os.utime("plans/a.txt", ns=(1, 1_000_000_007))
os.chmod("plans/deep", 0o2750)
os.unlink("old6")
os.sync()
"""
DIGESTS = """
import os, subprocess, sys
os.chdir(sys.argv[1])
for name in sys.argv[2:]:
    about = os.lstat(name)
    tags = {key: os.getxattr(name, key, follow_symlinks=False).hex() for key in os.listxattr(name, follow_symlinks=False)}
    if os.path.islink(name):
        content = os.readlink(name)
    elif os.path.isdir(name):
        content = ""
    else:
        content = subprocess.run(["sha256sum", name], capture_output=True, check=True, text=True).stdout.split()[0]
    print(oct(about.st_mode), about.st_uid, about.st_gid, about.st_mtime_ns, tags, about.st_blocks < 4000, content, sep="|")
"""


def test_I11_what_a_returned_node_still_holds_is_listed_and_fetched_file_by_file(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_of(lab, "rescued", 106)
    refused = landfall(lab, "rescue", "rescued", "--all")
    assert refused.returncode == NothingKept.exit_code, refused.stderr.decode()

    def on(node: NodeName, script: str, *words: str) -> list[str]:
        argv = [sys.executable, "-c", script, "/run/landfall/node/srv/rescued", *words]
        return start_program(lifecycle.inside(lab, node, argv)).text.splitlines()

    fetched = ("plans/a.txt", "plans/deep/b.bin", "plans/sparse", "plans/link", "plans/deep", "plans")
    on(NAS1, UNREPLICATED)
    truth = dict(
        zip((*fetched, "report.final.doc", "old0", "old2"), on(NAS1, DIGESTS, *fetched, "report.final.doc", "old0", "old2"), strict=True)
    )
    lifecycle.kill(lab, NAS1)
    scene.fail_over()
    lifecycle.start_node(lab, NAS1)
    scene.write(NAS2, {"old2": (77, 1000)})
    document(landfall(lab, "resync", "rescued", "--discard-from", "nas1", "--yes", "--json"))
    scene.write(NAS2, {"old4": (78, 1000)})  # after the list was made

    listed = document(landfall(lab, "rescue", "rescued", "--json"))
    states = {found["path"]: (found["there"], found["here"]) for found in listed["comparison"]["held"]}
    assert states["plans/a.txt"] == ("new", "untouched")
    assert states["old0"] == ("changed", "untouched")
    assert states["old2"] == ("changed", "changed")
    assert states["old6"] == ("deleted", "untouched")
    label = f"nas1-g{listed['kept']['counter']:08d}-{listed['kept']['nonce'][:8]}"

    # To the side: a file, and a folder with what is in it.
    done = document(landfall(lab, "rescue", "rescued", "report.final.doc", "plans", "--json"))
    assert (done["node"], done["server"], done["refused"]) == ("nas1", "nas2", [])
    beside = {path: f"plans.{label}{path.removeprefix('plans')}" for path in fetched} | {"report.final.doc": f"report.final.{label}.doc"}
    for path, at in beside.items():
        assert on(NAS2, DIGESTS, at) == [truth[path]], path
    assert on(
        NAS2, "import os, sys; print(sorted(name for name in os.listdir(sys.argv[1]) if name.startswith(('plans', 'report', '.land'))))"
    ) == [str([f"plans.{label}", f"report.final.{label}.doc"])]
    scene.at_site(lambda site: run.replicate(site, "rescued"))

    # In place: what was changed meanwhile stays, whether the list knows it or not, unless somebody says otherwise.
    assert landfall(lab, "rescue", "rescued", "old0", "--in-place").returncode == 2
    done = scene.at_site(lambda site: rescue.rescue(site, "rescued", ("old0", "old4", "plans"), rescue.Destination(in_place=True)))
    assert done
    assert {found.path for found in done.refused} == {"old4"}
    assert on(NAS2, DIGESTS, "old0", *fetched) == [truth["old0"], *(truth[path] for path in fetched)]
    scene.assert_served("old4", "old2")
    document(landfall(lab, "rescue", "rescued", "old2", "--in-place", "--yes", "--json"))
    assert on(NAS2, DIGESTS, "old2") == [truth["old2"]]
    monkeypatch.setattr(rescue, "BATCH_FILES", 2)
    done = scene.at_site(lambda site: rescue.rescue(site, "rescued", (), rescue.Destination(folder="all")))
    assert done
    assert (done.files, done.refused) == (8, ())
    assert on(NAS2, DIGESTS, "all/old0", "all/plans/deep") == [truth["old0"], truth["plans/deep"]]

    for words, error in ((["old1"], NotListed), (["old6"], NotListed), (["--generation", "g9", "old0"], NothingKept)):
        assert landfall(lab, "rescue", "rescued", *words).returncode == error.exit_code, words
    assert landfall(lab, "rescue", "rescued", "old0", "--to", "../out").returncode == RequestRefused.exit_code
    said = json.loads(landfall(lab, "history", "rescued", "--kind", "rescue", "--json").stdout)
    assert [entry["facts"]["paths"] for entry in said][:2] == [["report.final.doc", "plans"], ["old0", "old4", "plans"]]
    assert all("@" in entry["facts"]["operator"] for entry in said)

    # Given back, the node that serves holds it itself.
    document(landfall(lab, "failback", "rescued", "--yes", "--json"))
    done = document(landfall(lab, "rescue", "rescued", "old0", "--to", "again", "--json"))
    assert (done["server"], done["files"]) == ("nas1", 1)
    assert on(NAS1, DIGESTS, "again/old0") == [truth["old0"]]
    lifecycle.kill(lab, NAS1)
    assert landfall(lab, "rescue", "rescued", "old0").returncode == NodeUnreachable.exit_code
    lifecycle.start_node(lab, NAS1)
