"""An existing filesystem becomes a volume in place: what it holds is served and replicated, and what cannot be is refused as it was."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest

from agent.contract import messages as m
from agent.contract.errors import BaseMismatch, DeviceBusy, LandfallError, LayoutUnsupported, NotOurs, VolumeExists
from agent.contract.identity import FilesystemKind
from tests.faults.case import images_equal, served
from tests.faults.rig import MIB, NodeProcess, Pair
from tests.storage.loop_devices import attached

SIZE = {FilesystemKind.EXT4: 64 * MIB, FilesystemKind.XFS: 320 * MIB}
CONTENT = os.urandom(3 * MIB)


def existing(node: NodeProcess, kind: FilesystemKind = FilesystemKind.EXT4, name: str = "old.img", more_bytes: int = 0) -> Path:
    """Make an image with a filesystem and a file, as it was used for years."""
    image, root = node.folder / name, node.folder / "once"
    root.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(SIZE[kind])
    subprocess.run([f"mkfs.{kind}", "-q", "-b", "4096" if kind is FilesystemKind.EXT4 else "size=4096", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(root)], check=True)
    try:
        (root / "kept").write_bytes(CONTENT)
        os.setxattr(root / "kept", "user.tag", b"old")
    finally:
        subprocess.run(["umount", str(root)], check=True)
    with image.open("r+b") as file:  # what lies behind the filesystem is nobody's
        file.seek(SIZE[kind])
        file.write(b"\xa5" * more_bytes)
    return image


def adopt(node: NodeProcess, source: Path, name: str = "adopted") -> m.AdoptVolume:
    found = node.ask(m.AppraiseVolume(str(source)))
    return m.AdoptVolume(uuid4(), name, found.filesystem, found.size_bytes, found.sector_bytes, str(source))


@pytest.mark.parametrize(("kind", "more_bytes"), [(FilesystemKind.EXT4, 0), (FilesystemKind.XFS, 0), (FilesystemKind.EXT4, 5 * MIB)])
def test_what_was_there_is_served_and_replicated_without_a_copy(pair: Pair, kind: FilesystemKind, more_bytes: int) -> None:
    image = existing(pair.nas1, kind, more_bytes=more_bytes)
    inode = image.stat().st_ino
    order = adopt(pair.nas1, image)
    assert image.exists(), "to look changes nothing"
    facts = pair.nas1.ask(order)
    operational = pair.nas1.folder / "pool" / "volumes" / str(order.volume) / "operational.img"
    assert (operational.stat().st_ino, operational.stat().st_mode & 0o777, image.exists()) == (inode, 0o600, False)
    root = Path(facts.mount_point)
    assert (root / "kept").read_bytes() == CONTENT
    assert pair.nas1.ask(order) == facts, "asked again, nothing is done"

    pair.nas2.ask(m.AdmitReplica(order.volume, order.name, kind, order.size_bytes))
    base = pair.replicate(order.volume)
    (root / "new").write_bytes(CONTENT)
    target = pair.replicate(order.volume, base)
    for generation in (base, target):
        assert images_equal(pair.nas1.image(generation), pair.nas2.image(generation))
    opened = Path(pair.nas2.ask(m.OpenGeneration(target)).path)
    assert (opened / "kept").read_bytes() == (opened / "new").read_bytes() == CONTENT
    assert os.getxattr(opened / "kept", "user.tag") == b"old"
    pair.nas2.ask(m.CloseGeneration(target))


def test_what_cannot_become_a_volume_is_refused_and_left_as_it_was(pair: Pair, tmp_path: Path) -> None:
    node, image = pair.nas1, existing(pair.nas1)
    whole = image.read_bytes()

    def refused(error: type[LandfallError], match: str, source: Path = image) -> None:
        with pytest.raises(error, match=match):
            node.ask(m.AppraiseVolume(str(source)))

    with attached(image):
        refused(DeviceBusy, "attached to /dev/loop")
    with image.open("r+b"):
        refused(DeviceBusy, "open by another program")
    (node.folder / "second.img").hardlink_to(image)
    refused(DeviceBusy, "2 names")
    (node.folder / "second.img").unlink()
    (node.folder / "link.img").symlink_to(image)
    refused(NotOurs, "no image file", node.folder / "link.img")
    refused(NotOurs, "there is no file", node.folder / "nothing.img")
    refused(NotOurs, "absolute path", Path("old.img"))
    elsewhere = tmp_path / "old.img"
    elsewhere.write_bytes(whole[: 4 * MIB])
    refused(NotOurs, "filesystem of this node's pool", elsewhere)

    def altered(name: str, *words: str) -> Path:
        made = node.folder / f"{name}.img"
        made.write_bytes(whole)
        if words:
            subprocess.run([*words, str(made)], check=True, capture_output=True)
        return made

    blank = altered("blank")
    blank.write_bytes(bytes(8 * MIB))
    refused(LayoutUnsupported, "no ext4 or XFS", blank)
    refused(LayoutUnsupported, "left in order", altered("short", "truncate", "-s", "32M"))
    refused(LayoutUnsupported, "multiple of 4096", altered("odd", "truncate", "-s", "+512"))
    refused(LayoutUnsupported, "cannot be replicated", altered("small blocks", "mkfs.ext4", "-q", "-F", "-b", "1024"))
    refused(LayoutUnsupported, "left in order", altered("errors", "debugfs", "-w", "-R", "ssv state 2"))
    assert image.read_bytes() == whole

    order = adopt(node, image)
    node.ask(order)
    other = existing(node, name="other.img")
    for wrong in (
        m.AdoptVolume(order.volume, "adopted", order.filesystem, order.size_bytes, 512, str(other)),
        m.AdoptVolume(uuid4(), "adopted", order.filesystem, order.size_bytes, 512, str(other)),
        m.AdoptVolume(order.volume, "adopted", order.filesystem, order.size_bytes, 512, str(node.folder / "never there.img")),
    ):
        with pytest.raises(VolumeExists):
            node.ask(wrong)
    with pytest.raises(BaseMismatch):
        node.ask(m.AdoptVolume(uuid4(), "another", order.filesystem, order.size_bytes + 4096, 512, str(other)))
    refused(NotOurs, "outside of the pool", node.folder / "pool" / "volumes" / str(order.volume) / "operational.img")
    assert other.exists()
    assert [facts.name for facts in node.ask(m.ListVolumes()).volumes] == ["adopted"]


@pytest.mark.parametrize("kind", list(FilesystemKind))
def test_a_journal_that_is_to_be_replayed_is_refused_and_says_how(pair: Pair, kind: FilesystemKind) -> None:
    image, root = existing(pair.nas1, kind), pair.nas1.folder / "once"
    dirty = pair.nas1.folder / "dirty.img"
    subprocess.run(["mount", "-o", "loop", str(image), str(root)], check=True)
    try:
        (root / "more").write_bytes(CONTENT)
        subprocess.run(["sync", "-f", str(root / "more")], check=True)
        subprocess.run(["cp", "--reflink=always", str(image), str(dirty)], check=True)
    finally:
        subprocess.run(["umount", str(root)], check=True)
    with pytest.raises(LayoutUnsupported, match="to be replayed") as refusal:
        pair.nas1.ask(m.AppraiseVolume(str(dirty)))
    assert "Mount it once and unmount it" in refusal.value.fix_now
    subprocess.run(["mount", "-o", "loop", str(dirty), str(root)], check=True)
    subprocess.run(["umount", str(root)], check=True)
    assert pair.nas1.ask(adopt(pair.nas1, dirty)).serving
    assert served(pair.nas1, pair.nas1.ask(m.ListVolumes()).volumes[0].id).filesystem is kind
