"""The lab and the drill on volume groups: each node sees its own, and nothing of device-mapper's is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.contract.errors import KernelLacks, NotOurs
from mgmt.lab import control, lifecycle
from mgmt.lab.layout import NAS_NODES, Lab, LabSubstrate, NodeName
from tests.drills.test_drill import report
from tests.lab.test_lab_local import NOTHING, footprint, on, pool_identities

needs_device_mapper = pytest.mark.device_mapper
GROUP_BYTES = 640 << 20
ON_GROUPS = [kind for kind in LabSubstrate if kind is not LabSubstrate.REFLINK]


def of_device_mapper(lab: Lab) -> list[str]:
    """What is there of the lab's devices, volume groups and disks."""
    names = (Path(folder, "dm/name").read_text().strip() for folder in Path("/sys/class/block").glob("dm-*"))
    mine = lab.prefix.replace("-", "--")
    nodes = [
        str(path)
        for path in (*Path("/dev/mapper").iterdir(), *Path("/dev").glob("landfall*"))
        if lab.prefix in path.name or mine in path.name
    ]
    backing = subprocess.run(["losetup", "--noheadings", "--output", "BACK-FILE"], capture_output=True, text=True, check=True).stdout
    return (
        [name for name in names if name.startswith((mine, "landfall-"))]
        + nodes
        + [line for line in backing.splitlines() if "disk.img" in line]
    )


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A directory for a lab; whatever a test leaves there is taken away."""
    found = Lab.at(tmp_path / "lab")
    yield found
    lifecycle.down(found)
    assert of_device_mapper(found) == []


@needs_device_mapper
@pytest.mark.parametrize("substrate", ON_GROUPS)
def test_each_node_has_a_marked_group_and_sees_no_other(lab: Lab, substrate: LabSubstrate) -> None:
    lifecycle.up(lab, pool_size_bytes=GROUP_BYTES, substrate=substrate)
    for node in NAS_NODES:
        listed = json.loads(on(lab, node, "vgs", "-o", "vg_name,vg_tags", "--reportformat", "json"))["report"][0]["vg"]
        assert listed == [{"vg_name": lab.volume_group(node), "vg_tags": "landfall-lab"}]
    assert of_device_mapper(lab)
    pools = pool_identities(lab)
    lifecycle.down(lab)
    assert of_device_mapper(lab) == []
    assert footprint(lab, pools) == NOTHING


@needs_device_mapper
def test_a_killed_node_leaves_no_device_and_starts_again_with_its_group(lab: Lab) -> None:
    lifecycle.up(lab, pool_size_bytes=GROUP_BYTES, substrate=LabSubstrate.LVM_THIN)
    nas1 = NodeName.NAS1
    before = on(lab, nas1, "vgs", "--noheadings", "-o", "vg_uuid")
    lifecycle.kill(lab, nas1)
    others = of_device_mapper(lab)
    assert others
    assert not [name for name in others if nas1 in name]
    lifecycle.start_node(lab, nas1)
    assert on(lab, nas1, "vgs", "--noheadings", "-o", "vg_uuid") == before
    assert {service.name: service.pid is not None for service in control.services(lab, nas1)}["agent"]


@needs_device_mapper
def test_down_takes_away_a_lab_whose_maker_was_killed(lab: Lab) -> None:
    words = [
        sys.executable,
        "-m",
        "mgmt.lab",
        "up",
        "--dir",
        str(lab.directory),
        "--substrate",
        "lvm-thin",
        "--pool-size",
        str(GROUP_BYTES),
    ]
    armed = {**os.environ, "LANDFALL_ALLOW_FAILPOINTS": "1", "LANDFALL_FAILPOINTS": "lab.booted=kill"}
    assert subprocess.run(words, env=armed, check=False).returncode == -9
    on(lab, NodeName.NAS2, "dmsetup", "suspend", *_active(lab, NodeName.NAS2))
    assert lifecycle.down(lab) is lifecycle.Outcome.DONE
    assert of_device_mapper(lab) == []


def _active(lab: Lab, node: NodeName) -> list[str]:
    """The pool's device of a node: what a killed lvcreate leaves suspended."""
    return [
        name
        for name in on(lab, node, "dmsetup", "ls", "--target", "thin-pool").split()
        if lab.volume_group(node).replace("-", "--") in name
    ]


@needs_device_mapper
def test_a_group_of_that_name_that_is_somebody_elses_is_not_touched(lab: Lab, tmp_path: Path) -> None:
    disk, name = tmp_path / "strange", lab.volume_group(NodeName.NAS1)
    with open(disk, "wb") as file:
        file.truncate(64 << 20)
    device = _run("losetup", "--find", "--show", str(disk)).strip()
    try:
        _run("vgcreate", name, device)
        with pytest.raises(NotOurs, match=name):
            lifecycle.up(lab, pool_size_bytes=GROUP_BYTES, substrate=LabSubstrate.LVM_THIN)
        assert _run("vgs", "--noheadings", "-o", "lv_count", name).strip() == "0"
        _run("vgremove", "-y", name)
    finally:
        _run("losetup", "--detach", device)


def _run(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_without_device_mapper_one_sentence_says_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgmt.lab.groups._DEVICE_MAPPER", Path("/sys/class/misc/not-there"))
    with pytest.raises(KernelLacks, match="lvm-thin") as refused:
        lifecycle.up(lab, substrate=LabSubstrate.LVM_THIN)
    assert "--substrate reflink" in str(refused.value)
    assert not lab.marker_path.exists()


@needs_device_mapper
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("filesystem", "scenario"), [("ext4", "source-killed"), ("xfs", "source-lost")])
@pytest.mark.parametrize("substrate", ON_GROUPS)
def test_the_drill_on_a_volume_group(tmp_path: Path, substrate: LabSubstrate, filesystem: str, scenario: str) -> None:
    size = {"ext4": "128M", "xfs": "384M"}[filesystem]
    words = (
        "--substrate",
        substrate,
        "--fs",
        filesystem,
        "--scenario",
        scenario,
        "--size",
        size,
        "--files",
        "250",
        "--differential",
        "verify",
    )
    document = report(tmp_path / "out", *words)
    files = document["files"]
    assert document["substrate"] == substrate
    assert 0 < files["recovered"] < files["changed"]
    assert files["damaged"] == 0
    assert of_device_mapper(Lab.at(tmp_path / "out" / "lab")) == []
