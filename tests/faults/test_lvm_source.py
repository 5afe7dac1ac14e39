"""NAS 1 on a volume group dies, reboots, loses the programs that it started, or snapshots: the base stays good, the transfer goes on."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from agent.contract import messages as m
from agent.contract.errors import GenerationInvalid, LandfallError
from agent.contract.identity import GenerationId, empty_generation
from tests.faults.disks import command, create, dmsetup, remove
from tests.faults.lvm_case import SLOWLY, LvmCase, meanwhile, settled
from tests.faults.rig import Pair

pytestmark = pytest.mark.device_mapper

WRAPPER = """#!/bin/sh
[ -e {delay} ] || exec {real} "$@"
{real} "$@" &
child=$!
sleep "$(cat {delay})"
kill -9 $child 2>/dev/null
wait $child
"""


class Clients:
    """Who writes to NAS 1's volume while it is replicated, more than there is room for beside its generations."""

    def __init__(self, case: LvmCase, pair: Pair) -> None:
        self.case, self.pair = case, pair
        facts: m.VolumeFacts = pair.nas1.ask(m.ServeVolume(case.volume, 1))
        self.file = Path(facts.mount_point) / "too much"
        self.content = b""

    def overflow(self) -> None:
        """Fill the filesystem, so that the kernel gives up the snapshots of base and target."""
        room = os.statvfs(self.file.parent)
        self.content = os.urandom(room.f_bavail * room.f_frsize - (1 << 20))
        with open(self.file, "wb") as file:
            file.write(self.content)
            os.fsync(file.fileno())
        status = [line.split() for line in dmsetup("status", "--target", "snapshot").splitlines()]
        ours = self.case.disks[0].group.replace("-", "--")
        lost = [words for words in status if words[0].startswith(f"{ours}-") and words[-1] in {"Invalid", "Overflow"}]
        assert len(lost) == 2, status

    def assert_well_served(self) -> None:
        """Assert that the operational volume has all that was written to it, also after its filesystem was unmounted."""
        self.pair.nas1.ask(m.StopServing(self.case.volume))
        self.pair.nas1.ask(m.ServeVolume(self.case.volume, 1))
        assert self.file.read_bytes() == self.content


def generations(pair: Pair, case: LvmCase) -> list[GenerationId]:
    volumes: m.Volumes = pair.nas1.ask(m.ListVolumes())
    return [facts.id for facts in volumes.volumes[0].generations]


def test_A10_a_source_that_dies_after_the_ack_goes_on_from_the_target_and_lets_go_of_the_base(thin_case: LvmCase, thin_pair: Pair) -> None:
    pair = thin_pair
    pair.nas2.start()
    pair.nas1.start_armed("src.before_release=kill")
    with pytest.raises(OSError, match=r"ended the conversation|reset"):
        thin_case.send(pair)
    pair.nas1.died_by("src.before_release=kill")
    pair.nas1.start()
    assert thin_case.converge(pair).pieces_sent == 0
    after = pair.replicate(thin_case.volume, thin_case.target)
    assert thin_case.disks[1].digest(after) == thin_case.disks[0].digest(after)
    pair.nas1.ask(m.DropGeneration(thin_case.base))
    assert thin_case.base not in generations(pair, thin_case)
    assert thin_case.disks[0].digest(thin_case.target) == thin_case.digests[thin_case.target]


def test_A12_E17_after_a_reboot_under_other_device_names_the_transfer_goes_on(thin_case: LvmCase, thin_pair: Pair, tmp_path: Path) -> None:
    pair, disk = thin_pair, thin_case.disks[0]
    pair.nas2.start()
    pair.nas1.start_armed("src.before_batch=kill:4")
    with pytest.raises((OSError, LandfallError)):
        thin_case.send(pair, rate_limit_bytes_s=SLOWLY)
    pair.nas1.died_by("src.before_batch=kill:4")
    before, old = dmsetup("ls"), disk.loop
    disk.detach()
    (tmp_path / "other").write_bytes(bytes(1 << 20))
    other = command("losetup", "--find", "--show", tmp_path / "other").strip()
    try:
        for name in ("one", "two"):
            create(f"{disk.name}-{name}", f"0 8 linear {other} 0")
        disk.attach()
        for name in ("one", "two"):
            remove(f"{disk.name}-{name}")
        assert disk.loop != old
        assert before
        pair.nas1.start()
        had = thin_case.arrived(pair)
        assert had > 0
        assert thin_case.converge(pair).pieces_skipped == had
    finally:
        command("losetup", "--detach", other)


def test_E8_snapshots_that_overflow_under_a_transfer_end_it_and_the_next_is_in_full(snapshot_case: LvmCase, snapshot_pair: Pair) -> None:
    case, pair = snapshot_case, snapshot_pair
    pair.nas2.start()
    pair.nas1.start_armed("src.before_batch=stop:2")
    clients = Clients(case, pair)
    error = meanwhile(case, pair, pair.nas1, clients.overflow)
    assert isinstance(error, GenerationInvalid), error
    assert "gave up" in str(error)
    settled(case, pair)
    case.untouched(pair)
    clients.assert_well_served()
    pair.nas1.ask(m.DiscardTransfer(case.transfer))
    pair.nas2.ask(m.DiscardTransfer(case.transfer))
    after = pair.take(case.volume)
    with pytest.raises(GenerationInvalid):
        pair.build(case.base, after)
    for node in (pair.nas1, pair.nas2):
        node.ask(m.DropGeneration(case.base))
    nothing = empty_generation(case.volume)
    pair.receive_and_send(pair.build(nothing, after), nothing, after, m.Differential.VERIFY)
    assert case.disks[1].digest(after) == case.disks[0].digest(after)


def test_E9_snapshots_that_overflow_after_the_last_read_keep_the_target_from_being_committed(
    snapshot_case: LvmCase, snapshot_pair: Pair
) -> None:
    case, pair = snapshot_case, snapshot_pair
    pair.nas2.start()
    pair.nas1.start_armed("src.before_commit=stop")
    clients = Clients(case, pair)
    error = meanwhile(case, pair, pair.nas1, clients.overflow)
    assert isinstance(error, GenerationInvalid), error
    settled(case, pair)
    assert case.arrived(pair) > 0, "it was all there but for the word to commit it"
    case.untouched(pair)
    clients.assert_well_served()


@pytest.mark.timeout(600)
def test_K8_A11_a_killed_lvcreate_holds_no_lock_and_leaves_nothing(thin_case: LvmCase, thin_pair: Pair, tmp_path: Path) -> None:
    """Killed at different moments, also while it has the pool suspended: the next generation is taken, and none is half there."""
    pair, disk = thin_pair, thin_case.disks[0]
    delay, wrapper = tmp_path / "delay", tmp_path / "bin" / "lvcreate"
    wrapper.parent.mkdir()
    real = subprocess.run(["which", "lvcreate"], capture_output=True, text=True, check=True).stdout.strip()
    wrapper.write_text(WRAPPER.format(delay=delay, real=real))
    wrapper.chmod(0o755)
    pair.nas1.environment["PATH"] = f"{wrapper.parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    pair.nas1.start()
    known = generations(pair, thin_case)
    for seconds in ("0.02", "0.1", "0.2", "0.3", "0.5"):
        delay.write_text(seconds)
        with suppress(LandfallError):  # or lvcreate was quicker
            known.append(pair.take(thin_case.volume))
        delay.unlink()
        begun = time.monotonic()
        known.append(pair.take(thin_case.volume))
        assert time.monotonic() - begun < 30.0, "somebody held a lock"
        assert generations(pair, thin_case) == known
    pool = next(name for name in dmsetup("ls", "--target", "thin-pool").split() if name.startswith(disk.group.replace("-", "--")))
    dmsetup("suspend", pool)  # what a killed lvcreate may leave
    pair.nas1.kill()
    pair.nas1.start()
    known.append(pair.take(thin_case.volume))
    assert generations(pair, thin_case) == known
    assert disk.workspaces() == []
    assert disk.digest(thin_case.target) == thin_case.digests[thin_case.target]
