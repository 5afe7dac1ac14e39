"""A volume on classic snapshots grows on both nodes while nobody uses it and no transfer is open; else it is refused, as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.contract import messages as m
from agent.contract.errors import DeviceBusy, TransferBusy
from tests.faults.lvm_case import VOLUME_BYTES, LvmCase
from tests.faults.rig import MIB, NodeProcess, Pair

pytestmark = pytest.mark.device_mapper

GROWN_BYTES = VOLUME_BYTES + 32 * MIB


def facts(node: NodeProcess) -> m.VolumeFacts:
    volumes: m.Volumes = node.ask(m.ListVolumes())
    (found,) = volumes.volumes
    return found


def refused(node: NodeProcess, case: LvmCase, error: type[Exception], words: str) -> None:
    """Assert that the node says no, asked whether it would and asked to do it, and that the volume stays as it was."""
    before = facts(node)
    for dry_run in (True, False):
        with pytest.raises(error, match=words):
            node.ask(m.GrowVolume(case.volume, GROWN_BYTES, dry_run=dry_run))
    assert facts(node) == before


def test_E20_a_volume_grows_between_two_transfers_and_not_under_one_or_under_its_clients(
    snapshot_case: LvmCase, snapshot_pair: Pair
) -> None:
    case, pair = snapshot_case, snapshot_pair
    pair.nas1.start()
    pair.nas2.start()
    refused(pair.nas1, case, TransferBusy, "is open")
    case.converge(pair)
    pair.nas1.ask(m.ServeVolume(case.volume, 1))
    refused(pair.nas1, case, DeviceBusy, "unserve")
    opened: m.Opened = pair.nas2.ask(m.OpenGeneration(case.target))
    try:
        assert Path(opened.path).is_dir()
        refused(pair.nas2, case, DeviceBusy, "grows only")
    finally:
        pair.nas2.ask(m.CloseGeneration(case.target))
    pair.nas1.ask(m.StopServing(case.volume))
    for node in (pair.nas2, pair.nas1):
        assert node.ask(m.GrowVolume(case.volume, GROWN_BYTES, dry_run=True)).size_bytes == VOLUME_BYTES
        for _ in ("once", "and asked again"):
            assert node.ask(m.GrowVolume(case.volume, GROWN_BYTES)).size_bytes == GROWN_BYTES
    pair.nas1.ask(m.ServeVolume(case.volume, 1))
    root = Path(facts(pair.nas1).mount_point)
    room = os.statvfs(root)
    assert room.f_blocks * room.f_frsize > VOLUME_BYTES, "the filesystem grew with it"
    (root / "afterwards").write_bytes(os.urandom(6 * MIB))
    after = pair.replicate(case.volume, case.target)
    for generation in (case.base, case.target, after):
        assert case.disks[1].digest(generation) == case.disks[0].digest(generation)
