"""Block devices as /sys shows them, where no udev runs, and what mountinfo says."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from agent.contract.errors import NotOurs, VersionUnknown
from agent.contract.identity import FilesystemKind
from agent.contract.messages import Role
from agent.volume import mounts
from agent.volume.devices import devices
from agent.volume.records import read_record, write_record
from agent.volume.substrate import VolumeRecord

VOLUME = VolumeRecord(UUID(int=5), "projects", FilesystemKind.XFS, 1 << 30, 4096, Role.PRIMARY, 3)


def device(sys: Path, name: str, **files: str) -> None:
    folder = sys / "class" / "block" / name
    for path, text in {"dev": "259:77", "ro": "0", **files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"{text}\n")


def test_devices_are_told_from_sys_where_no_udev_runs(tmp_path: Path) -> None:
    device(tmp_path, "sdx", size="2048", serial="ABC 123", **{"queue/logical_block_size": "4096"})
    device(tmp_path, "dm-7", size="8", ro="1", **{"dm/uuid": "LVM-xyz", "dm/name": "vg-lv"})
    device(tmp_path, "sdx1", size="16", partition="1", wwid="naa.5000")
    device(tmp_path, "loop55", size="0")
    found = {facts.path: facts for facts in devices(sys=tmp_path, udev_control=tmp_path / "none")}
    assert set(found) == {"/dev/sdx", "/dev/dm-7", "/dev/sdx1"}
    disk, mapped, part = found["/dev/sdx"], found["/dev/dm-7"], found["/dev/sdx1"]
    assert (disk.size_bytes, disk.sector_bytes, disk.kind, disk.identity, disk.read_only) == (
        1 << 20,
        4096,
        "disk",
        "serial:ABC 123",
        False,
    )
    assert (mapped.kind, mapped.identity, mapped.read_only) == ("dm", "uuid:LVM-xyz", True)
    assert (part.kind, part.identity, part.size_bytes) == ("partition", "wwid:naa.5000", 8192)


def test_mount_points_with_odd_names_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    line = rb"44 27 7:3 / /mnt/a\040b\134c rw,nosuid shared:1 master:2 - ext4 /dev/loop3 rw,noload"
    monkeypatch.setattr(Path, "read_bytes", lambda _: line + b"\n")
    (found,) = mounts.mounts()
    assert found.mount_point == Path("/mnt/a b\\c")
    assert (found.kind, found.source, found.device) == ("ext4", "/dev/loop3", (7, 3))
    assert "nosuid" in found.options
    assert "noload" in found.super_options


def test_a_record_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "volume.json"
    write_record(path, VOLUME)
    assert read_record(path, VolumeRecord) == VOLUME
    whole = path.read_bytes()
    for cut in range(len(whole) - 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(NotOurs):
            read_record(path, VolumeRecord)
    path.write_bytes(whole.replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(VersionUnknown):
        read_record(path, VolumeRecord)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        read_record(path, VolumeRecord)
