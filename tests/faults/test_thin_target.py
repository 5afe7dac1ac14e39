"""NAS 2 on a volume group loses power at any flush: the arrival record never leads the data, and the volume is base or target."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from mgmt.drill.checker.blocks import read_arrival
from tests.faults.disks import Disk, command, dmsetup, generation_tag
from tests.faults.rig import Pair
from tests.faults.thin import ThinCase
from tests.faults.write_log import entries, replay

pytestmark = pytest.mark.device_mapper

BLOCK = 4096
POINTS = 9
VERY_SLOWLY = 128 << 10


def state_after_power_loss(case: ThinCase, disk: Disk) -> tuple[int, bool]:
    """Return how many pieces are recorded as arrived, all of which are proved to stand there, and whether the target is committed."""
    tags = ",".join(disk.tags().values())
    assert disk.digest(case.base) == case.digests[case.base], "the base is not what it was"
    committed = generation_tag(case.target) in tags
    if committed:
        assert disk.digest(case.target) == case.digests[case.target], "what is committed is not the target"
    folder = disk.state / "state" / "transfers" / str(case.transfer)
    if not (folder / "arrival").exists():
        return 0, committed
    arrival = read_arrival(folder / "dmi", folder / "arrival")
    if committed or not arrival.arrived.any():
        return int(arrival.arrived.sum()), committed
    landed = np.frombuffer(disk.content(f"landfall/workspace/1/{case.volume}/{case.transfer}/landing"), np.uint8).reshape(-1, BLOCK)
    wanted = np.frombuffer(case.target_bytes, np.uint8).reshape(-1, BLOCK)
    for first, count in zip(arrival.first[arrival.arrived].tolist(), arrival.count[arrival.arrived].tolist(), strict=True):
        assert np.array_equal(landed[first : first + count], wanted[first : first + count]), f"recorded, but not there: block {first}"
    return int(arrival.arrived.sum()), committed


@pytest.mark.timeout(900)
def test_B4_B6_B7_E12_after_power_loss_at_a_flush_the_record_does_not_lead_the_data(
    thin_case: ThinCase, thin_pair: Pair, tmp_path: Path
) -> None:
    disk, pair, log = thin_case.disks[1], thin_pair, tmp_path / "log"
    origin = disk.image.with_suffix(".origin")
    disk.detach()
    subprocess.run(["cp", "--reflink=always", origin, disk.image], check=True)
    with log.open("wb") as file:
        file.truncate(2 << 30)
    log_device = command("losetup", "--find", "--show", "--direct-io=on", log).strip()
    try:
        disk.attach(mounted=False)
        disk.put(f"0 {disk.sectors} log-writes {disk.loop} {log_device}")
        command("mount", f"/dev/mapper/{disk.name}-state", disk.state)
        pair.nas1.start()
        pair.nas2.start()
        thin_case.send(pair, rate_limit_bytes_s=VERY_SLOWLY)
        pair.nas1.kill()
        pair.nas2.kill()
        dmsetup("message", disk.name, "0", "mark", "end")
        disk.detach()
    finally:
        command("losetup", "--detach", log_device)
    logged = entries(log)
    flushes = [number for number, entry in enumerate(logged) if entry.settles]
    assert len(flushes) > POINTS
    chosen = [flushes[at] for at in np.linspace(len(flushes) // 4, len(flushes) - 1, POINTS, dtype=int).tolist()]
    image, done, seen = tmp_path / "replayed", 0, []
    subprocess.run(["cp", "--reflink=always", origin, image], check=True)
    for number in chosen:
        replay(log, logged[done : number + 1], image)
        done = number + 1
        subprocess.run(["cp", "--reflink=always", image, disk.image], check=True)
        disk.attach()
        seen.append(state_after_power_loss(thin_case, disk))
        disk.detach()
    assert [had for had, committed in seen if not committed] == sorted(had for had, committed in seen if not committed)
    assert any(had and not committed for had, committed in seen), f"no power loss fell into the middle: {seen}"
    assert seen[-1][1], "what was acknowledged is lost"
