"""Single files from what was kept of an overtaken primary, between two agents: brought whole or not at all, and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from agent.contract import messages as m
from agent.contract.errors import DeviceBusy, LandfallError, PeerRefused, ProtocolViolated, RequestRefused
from agent.contract.identity import FilesystemKind, GenerationId, empty_generation
from tests.faults.case import served
from tests.faults.phases import promote_and_serve
from tests.faults.rig import MIB, Pair
from tests.faults.test_review_verbs import SIZE

OLD, NEW = b"as both had it" * 1000, b"what only nas1 has" * 200_000


@dataclass(frozen=True)
class Kept:
    """NAS 1 was overtaken, what it held is kept, NAS 2 serves."""

    pair: Pair
    volume: UUID
    base: GenerationId
    generation: GenerationId
    root: Path  # on NAS 2

    def bring(
        self, *files: m.PlacedFile, since: GenerationId | bool = True, sender: tuple[m.PlacedFile, ...] = (), token: str = ""
    ) -> m.Restored:
        """Have files brought; ``sender`` and ``token``: what the sending node is told instead."""
        number, passes = uuid4(), self.pair.authority.passes("nas1", "nas2")
        base = since if isinstance(since, GenerationId) else self.base if since else None
        listening = self.pair.nas2.ask(m.ReceiveFiles(number, self.volume, files, base, passes.token, passes.receiver, 3.0))
        order = m.SendFiles(
            number, self.generation, sender or files, listening.address, listening.port, token or passes.token, passes.sender, 3.0
        )
        done = self.pair.nas1.ask(order)
        assert isinstance(done, m.Restored)
        return done

    @property
    def odd_ends(self) -> list[str]:
        """What lies about that nobody asked for."""
        return [str(path) for path in self.root.rglob(".landfall-*")]


def kept(pair: Pair, kind: FilesystemKind = FilesystemKind.EXT4) -> Kept:
    volume = pair.create("v", kind, SIZE[kind])
    root = Path(served(pair.nas1, volume).mount_point)
    for name in ("a", "b", "c"):
        (root / name).write_bytes(OLD)
    base = pair.replicate(volume)
    (root / "below").mkdir(mode=0o750)
    for name in ("a", "b", "below/new"):
        (root / name).write_bytes(NEW)
    os.chown(root / "below/new", 1234, 2345)
    os.utime(root / "below", ns=(1, 1_000_000_007))
    other = Path(promote_and_serve(pair.nas2, volume).mount_point)
    held = pair.nas1.ask(m.DemoteVolume(volume, 2)).kept
    return Kept(pair, volume, base, held.id, other)


def placed(path: str, at: str = "", *, replace: bool = False) -> m.PlacedFile:
    return m.PlacedFile(path, at or path, replace)


@pytest.mark.parametrize("kind", list(FilesystemKind))
def test_I11_kept_files_are_brought_and_what_was_changed_meanwhile_stays(pair: Pair, kind: FilesystemKind) -> None:
    found = kept(pair, kind)
    mine = OLD[::-1]
    was = (found.root / "b").stat()
    (found.root / "b").write_bytes(mine)
    os.utime(found.root / "b", ns=(was.st_atime_ns, was.st_mtime_ns))  # a change that hides
    done = found.bring(placed("a"), placed("b"), placed("below/new"), placed("gone"), placed("a", "a.from nas1"))
    assert (done.files, done.bytes) == (3, 3 * len(NEW))
    assert {refused.path for refused in done.refused} == {"b", "gone"}
    assert (found.root / "a").read_bytes() == (found.root / "a.from nas1").read_bytes() == NEW
    assert (found.root / "b").read_bytes() == mine
    below = (found.root / "below").stat()
    assert ((found.root / "below/new").stat().st_uid, below.st_mode & 0o777, below.st_mtime_ns) == (1234, 0o750, 1_000_000_007)
    assert found.bring(placed("b", replace=True)).files == 1
    assert (found.root / "b").read_bytes() == NEW
    for nothing in (False, empty_generation(found.volume)):
        assert found.bring(placed("a", "c"), since=nothing).files == 0, "nothing proves that c is as it was"
    assert (found.root / "c").read_bytes() == OLD
    assert found.bring(placed("a", "c")).files == 1
    assert not found.odd_ends


def test_G_files_go_only_where_they_were_ordered_to_and_only_from_who_shows_the_token(pair: Pair) -> None:
    found = kept(pair)
    before = sorted(path.name for path in found.root.iterdir())
    os.symlink("/tmp", found.root / "leads out")
    refused = found.bring(placed("a", "leads out/a"), placed("below/new", "leads out/new"))
    assert (refused.files, len(refused.refused)) == (0, 2)
    with pytest.raises(ProtocolViolated):
        found.bring(placed("a", "x"), sender=(placed("a", "y"),))
    with pytest.raises(PeerRefused):
        found.bring(placed("a", "x"), token="0" * 32)
    for at in ("../x", "/x", "x/../../y", "", "x//y"):
        with pytest.raises(RequestRefused):
            found.bring(m.PlacedFile("a", at))
    (found.root / "leads out").unlink()
    assert sorted(path.name for path in found.root.iterdir()) == before
    pair.nas2.ask(m.StopServing(found.volume))
    with pytest.raises(DeviceBusy):
        found.bring(placed("a", "x"))


@pytest.mark.parametrize(
    ("node", "point"),
    [
        ("nas1", "rescue.src.before_content=kill:3"),
        ("nas1", "rescue.src.before_finish=kill:1"),
        ("nas2", "restore.before_rename=kill:2"),
        ("nas2", "restore.after_rename=kill:1"),
        ("nas2", "rescue.dst.after_file=kill:2"),
    ],
)
def test_a_node_dies_while_files_are_brought_and_each_is_old_or_new(pair: Pair, node: str, point: str) -> None:
    found = kept(pair)
    victim = pair.nas1 if node == "nas1" else pair.nas2
    victim.kill()
    victim.start_armed(point)
    files = (placed("a"), placed("b"), placed("below/new"))
    with pytest.raises((LandfallError, OSError)):
        found.bring(*files)
    victim.died_by(point)
    assert {(found.root / name).read_bytes() for name in ("a", "b")} <= {OLD, NEW}
    if (found.root / "below/new").exists():
        assert (found.root / "below/new").read_bytes() == NEW
    assert not found.odd_ends
    victim.start()
    assert found.bring(*files).files == 3
    assert {(found.root / name).read_bytes() for name in ("a", "b", "below/new")} == {NEW}
    assert (found.root / "c").read_bytes() == OLD
    assert len(NEW) > 3 * MIB, "more than one part"
