"""What an agent is doing when a failpoint kills it, phase by phase, and what must be true afterwards.

Each phase brings a fresh pair to the point where the step is about to be taken, arms the failpoint, lets the agent run into it, and
then asks the oracle. Phases of a transfer end in ``follow``: salvage on a copy and resume on the original, both checked. The others
end in their own: what was being made is there whole or not at all, the same order given again succeeds, nothing is frozen, left
over or lost.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from agent.contract import messages as m
from agent.contract.arrival import decode as decode_arrival
from agent.contract.columns import identity
from agent.contract.dmi import Dmi
from agent.contract.errors import LandfallError, StaleTerm
from agent.contract.identity import FilesystemKind, GenerationId, GenerationKind
from agent.system.files import TEMPORARY_PREFIX
from mgmt.determination import Policy, determine
from tests.faults.case import SIZES, Case, check_salvaged, follow, images_equal, release, resume, served
from tests.faults.rig import NodeProcess, Pair

SLOWLY = 8 << 20
"""Bytes a second, so that pieces come in several groups."""

Phase = Callable[[Case, str, m.Differential], None]


@contextmanager
def running(pair: Pair, nas1: tuple[str, ...] = (), nas2: tuple[str, ...] = ()) -> Iterator[Pair]:
    """Yield the pair, running with these failpoints armed; both are dead afterwards."""
    try:
        pair.nas1.start_armed(*nas1)
        pair.nas2.start_armed(*nas2)
        yield pair
    finally:
        pair.nas1.kill()
        pair.nas2.kill()


def expect_death(node: NodeProcess, act: Callable[[], object], point: str) -> None:
    """Let ``act`` run into the failpoint that kills ``node``."""
    with suppress(LandfallError, OSError):
        act()
    node.died_by(point)


def await_interruption(case: Case, pair: Pair) -> None:
    """Wait for NAS 2's reception failure notification."""
    outbox: m.Outbox = pair.nas2.ask(m.ReadOutbox(0, 30.0))
    assert [said.kind for said in outbox.notifications] == ["reception-failure"]
    assert outbox.notifications[0].transfer == case.transfer


def state_of(node: NodeProcess, case: Case) -> m.TransferState | None:
    """Return where a node says that the transfer stands, None if it does not know it."""
    transfers: m.Transfers = node.ask(m.ListTransfers())
    return next((facts.state for facts in transfers.transfers if facts.id == case.transfer), None)


def instruction(case: Case, nas2: NodeProcess) -> m.UpdateInstruction:
    """Return the update instruction that the determination makes of what NAS 2 has."""
    raw, arrival = nas2.ask(m.FetchDmi(case.transfer)), nas2.ask(m.FetchArrival(case.transfer))
    dmi, digest = Dmi.decode(raw), identity(memoryview(raw))
    record = decode_arrival(arrival, transfer=case.transfer, dmi_digest=digest, pieces=dmi.piece_total)
    verdicts = determine(dmi, record, Policy())
    return m.UpdateInstruction(case.transfer, digest.hex(), tuple(verdicts.designated.tolist()), verdicts.deletions, verdicts.complete)


# --- a transfer ---


def source_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 1 dies while it sends."""
    pair = case.fresh()
    with running(pair, nas1=(point,)):
        expect_death(pair.nas1, lambda: case.send(pair, differential, silence_limit_s=2.0, rate_limit_bytes_s=SLOWLY), point)
        name = point.partition("=")[0]
        if name in {"src.before_release", "src.after_release", "src.after_commit"}:
            assert state_of(pair.nas2, case) is m.TransferState.COMMITTED
        elif name not in {"src.before_connect", "src.after_finish"}:
            await_interruption(case, pair)
            assert state_of(pair.nas2, case) is m.TransferState.INTERRUPTED
    follow(case, pair, differential)


def target_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 2 dies while it receives."""
    pair = case.fresh()
    with running(pair, nas2=(point,)):
        expect_death(pair.nas2, lambda: case.send(pair, differential, silence_limit_s=2.0, rate_limit_bytes_s=SLOWLY), point)
    follow(case, pair, differential)


def target_dies_telling(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 1 dies, and NAS 2 when it is about to say so: the management node hears of it all the same (once or twice)."""
    pair = case.fresh()
    with running(pair, nas1=("src.after_batch=kill:2",), nas2=(point,)):
        with suppress(LandfallError, OSError):
            case.send(pair, differential, silence_limit_s=2.0)
        pair.nas2.died_by(point)
        pair.nas2.start()
        outbox: m.Outbox = pair.nas2.ask(m.ReadOutbox(0, 10.0))
        assert {said.transfer for said in outbox.notifications} == {case.transfer}, "nobody is told of the reception that failed"
        assert state_of(pair.nas2, case) is m.TransferState.INTERRUPTED
    follow(case, pair, differential)


def target_dies_healing(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 2 dies while a base that rotted is being healed: a resume heals it to the end."""
    pair = case.fresh()
    rot(case, pair.nas2, block=changed_block(case, pair))
    with running(pair, nas2=(point,)):
        expect_death(pair.nas2, lambda: case.send(pair, differential, silence_limit_s=2.0), point)
    resume(case, pair, differential)


def changed_block(case: Case, pair: Pair) -> int:
    """Return a block of the differential that is data of a file and has a pre-image."""
    dmi = Dmi.decode((pair.nas1.folder / "state" / "transfers" / str(case.transfer) / "dmi").read_bytes())
    hole = 2**64 - 1
    rows = [row for row in dmi.need.tolist() if int(dmi.diff_block[row]) != hole and not dmi.target_hole[row]]
    return int(dmi.op_block[rows[0]])


def rot(case: Case, node: NodeProcess, block: int, *, generation: GenerationId | None = None) -> None:
    """Change one byte of a generation's image below everybody's back, as a disk does: no time stamp tells of it."""
    image = node.image(generation or case.base)
    about = image.stat()
    with image.open("r+b") as file:
        file.seek(block * 4096 + 1000)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x40]))
    os.utime(image, ns=(about.st_atime_ns, about.st_mtime_ns))


# --- a salvage ---


def interrupted(case: Case, differential: m.Differential, *, whole: bool = True) -> Pair:
    """Return a pair of which NAS 2 has the transfer with all its pieces (or some), not committed, and NAS 1 is gone; none runs."""
    pair = case.fresh()
    point = "dst.before_verify=kill" if whole else "src.after_batch=kill:3"
    with running(pair, nas1=() if whole else (point,), nas2=(point,) if whole else ()):
        with suppress(LandfallError, OSError):
            case.send(pair, differential, silence_limit_s=2.0, rate_limit_bytes_s=0 if whole else SLOWLY)
        (pair.nas2 if whole else pair.nas1).died_by(point)
        if not whole:
            await_interruption(case, pair)
    return pair


def salvage_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 2 dies in a salvage: there is the base, or the salvage whole; either way it goes on from there."""
    pair = interrupted(case, differential)
    nas2 = pair.nas2
    try:
        nas2.start_armed(point)
        expect_death(nas2, lambda: nas2.ask(instruction(case, nas2)), point)
        after_death_in_salvage(case, pair, differential)
    finally:
        nas2.kill()


def after_death_in_salvage(case: Case, pair: Pair, differential: m.Differential) -> None:
    """Start NAS 2: base or salvage, whole, and the transfer's state says which; then salvage and resume, both checked."""
    nas2 = pair.nas2
    nas2.start()
    assert images_equal(nas2.image(case.base), case.source_image(case.base))
    workspaces = {path.name.split(".")[1] for path in (nas2.folder / "pool/volumes" / str(case.base.volume) / "workspaces").iterdir()}
    assert workspaces == {"landing"}, "a restart leaves nothing of the salvage that died"
    newest = served(nas2, case.base.volume).generations[-1]
    if newest.kind is GenerationKind.SALVAGED:
        assert state_of(nas2, case) is m.TransferState.SALVAGED
        assert newest.salvaged_from == case.target
        check_salvaged(case, nas2, newest.id)
        nas2.ask(m.UndoSalvage(case.base.volume))
    assert served(nas2, case.base.volume).generations[-1].id == case.base
    assert state_of(nas2, case) is m.TransferState.INTERRUPTED
    nas2.kill()
    release(nas2)
    follow(case, pair, differential)


def undo_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 2 dies when a salvage is taken back: it is there whole, or gone."""
    pair = interrupted(case, differential)
    nas2 = pair.nas2
    try:
        nas2.start_armed(point)
        nas2.ask(instruction(case, nas2))
        expect_death(nas2, lambda: nas2.ask(m.UndoSalvage(case.base.volume)), point)
        after_death_in_salvage(case, pair, differential)
    finally:
        nas2.kill()


def discard_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 2 dies when a transfer is discarded: it can be discarded again, or is gone; nothing is left, and it can be sent anew."""
    pair = interrupted(case, differential)
    nas2 = pair.nas2
    try:
        nas2.start_armed(point)
        expect_death(nas2, lambda: nas2.ask(m.DiscardTransfer(case.transfer)), point)
        nas2.start()
        if state_of(nas2, case) is not None:
            nas2.ask(m.DiscardTransfer(case.transfer))
        assert state_of(nas2, case) is None
        assert not list((nas2.folder / "pool/volumes" / str(case.base.volume) / "workspaces").iterdir())
    finally:
        nas2.kill()
    follow(case, pair, differential)


# --- generations and volumes ---


def take_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 1 dies when it takes a generation: it is there whole or not at all, and clients can write again at once."""
    nas1, volume = case.fresh().nas1, case.base.volume
    try:
        nas1.start_armed(point)
        root = Path(nas1.ask(m.ServeVolume(volume, 1)).mount_point)
        before = {facts.id for facts in served(nas1, volume).generations}
        (root / "before").write_bytes(b"x" * 100_000)
        expect_death(nas1, lambda: nas1.ask(m.TakeGeneration(volume)), point)
        write_within(root / "while dead", 20.0)
        nas1.start()
        made = [facts.id for facts in served(nas1, volume).generations if facts.id not in before]
        assert len(made) == (point.partition("=")[0] == "substrate.take.after")
        _nothing_new(nas1)
        taken = nas1.ask(m.TakeGeneration(volume)).generation.id
        assert taken.counter == max(known.counter for known in before) + len(made) + 1
        for generation, names in ((taken, {"before", "while dead"}), *((whole, {"before"}) for whole in made)):
            opened = Path(nas1.ask(m.OpenGeneration(generation)).path)
            assert {name for name in ("before", "while dead") if (opened / name).exists()} == names
            assert (opened / "before").read_bytes() == b"x" * 100_000
            nas1.ask(m.CloseGeneration(generation))
    finally:
        nas1.kill()
        release(nas1)


def write_within(path: Path, limit_s: float) -> None:
    """Write a file; fails when the filesystem stays frozen."""
    writing = threading.Thread(target=path.write_bytes, args=(b"y" * 10_000,), daemon=True)
    writing.start()
    writing.join(limit_s)
    assert not writing.is_alive(), "the filesystem is still frozen"


def build_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 1 dies when it makes a DMI: there is no such transfer afterwards, and made again it is the DMI it would have been."""
    pair = case.fresh()
    nas1, transfer = pair.nas1, uuid4()
    shutil_state(nas1)
    order = m.BuildTransfer(transfer, case.base, case.target)
    try:
        nas1.start_armed(point)
        expect_death(nas1, lambda: nas1.ask(order), point)
        tables = nas1.folder / "state" / "differential" / str(case.base.volume)
        tables.mkdir(parents=True, exist_ok=True)
        (tables / f"{TEMPORARY_PREFIX}tables").write_bytes(b"half")  # what is made beside it may be anywhere when it dies
        nas1.start()
        known = {facts.id: facts.state for facts in nas1.ask(m.ListTransfers()).transfers}
        done = point.partition("=")[0] == "src.after_build"
        assert (transfer in known) is done
        _nothing_new(nas1)
        if not done:
            nas1.ask(order)
        first, again = Dmi.decode(nas1.ask(m.FetchDmi(case.transfer))), Dmi.decode(nas1.ask(m.FetchDmi(transfer)))
        for column in ("op_block", "block_count", "owner", "update_digest", "diff_digest", "inode", "file_digest", "need", "paths"):
            assert getattr(first, column).tobytes() == getattr(again, column).tobytes(), column
    finally:
        nas1.kill()
        release(nas1)


def shutil_state(nas1: NodeProcess) -> None:
    """Let the digest tables and name indexes of a node be made anew: they are a cache."""
    for path in (nas1.folder / "state" / "differential").glob("*/*"):
        path.unlink()


def serve_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 2 dies when it begins to serve: asked again it serves the newest generation, and nothing else of it changed."""
    nas2, volume = case.fresh().nas2, case.base.volume
    try:
        nas2.start_armed(point)
        expect_death(nas2, lambda: promote_and_serve(nas2, volume), point)
        nas2.start()
        facts = promote_and_serve(nas2, volume)
        assert facts.serving
        assert facts.role is m.Role.PRIMARY
        assert facts.epoch == 2, "the epoch rises once for each promotion"
        opened = Path(nas2.ask(m.OpenGeneration(case.base)).path)
        assert sorted(os.listdir(facts.mount_point)) == sorted(os.listdir(opened))
        nas2.ask(m.CloseGeneration(case.base))
        nas2.ask(m.StopServing(volume))
        assert images_equal(nas2.image(case.base), case.source_image(case.base))
        _nothing_new(nas2)
    finally:
        nas2.kill()
        release(nas2)


def promote_and_serve(node: NodeProcess, volume: UUID, epoch: int = 2) -> m.VolumeFacts:
    """Make a node the primary at an epoch, unless it is, and let it serve."""
    node.ask(m.PromoteVolume(volume, epoch))
    facts: m.VolumeFacts = node.ask(m.ServeVolume(volume, epoch))
    return facts


def demote_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 1 dies when it is demoted: asked again it is secondary, and what only it held is kept once."""
    nas1, volume = case.fresh().nas1, case.base.volume
    try:
        nas1.start_armed(point)
        root = Path(nas1.ask(m.ServeVolume(volume, 1)).mount_point)
        (root / "unsent").write_bytes(b"x" * 100_000)
        expect_death(nas1, lambda: nas1.ask(m.DemoteVolume(volume, 2)), point)
        nas1.start()
        kept = nas1.ask(m.DemoteVolume(volume, 2)).kept
        assert nas1.ask(m.DemoteVolume(volume, 2)).kept == kept
        facts = served(nas1, volume)
        assert (facts.role, facts.epoch, facts.serving, facts.confirmed) == (m.Role.SECONDARY, 2, False, False)
        assert [held for held in facts.generations if held.kind is GenerationKind.KEPT] == [kept]
        assert {case.base, case.target} <= {held.id for held in facts.generations}
        assert {found.state for found in nas1.ask(m.ListTransfers()).transfers} <= {m.TransferState.COMMITTED}
        opened = Path(nas1.ask(m.OpenGeneration(kept.id)).path)
        assert (opened / "unsent").read_bytes() == b"x" * 100_000
        nas1.ask(m.CloseGeneration(kept.id))
        _nothing_new(nas1)
    finally:
        nas1.kill()
        release(nas1)


def hearing_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 1 dies when it hears of a higher term: nothing was done in it, and what it heard it knows or hears again."""
    nas1, volume = case.fresh().nas1, case.base.volume
    try:
        nas1.start()
        nas1.ask(m.ServeVolume(volume, 1))
        nas1.kill()
        nas1.start_armed(point)
        nas1.term = 2
        expect_death(nas1, lambda: nas1.ask(m.StopServing(volume)), point)
        nas1.term = 1
        nas1.start()
        assert served(nas1, volume).serving
        if point.partition("=")[0] == "term.after_record":
            with pytest.raises(StaleTerm):
                nas1.ask(m.StopServing(volume))
            nas1.term = 2
        assert not nas1.ask(m.StopServing(volume)).serving
    finally:
        nas1.kill()
        release(nas1)


def create_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 1 dies when it makes a volume: it is there, or it can be made."""
    nas1, volume = case.fresh().nas1, uuid4()
    order = m.CreateVolume(volume, "another", FilesystemKind.EXT4, SIZES[FilesystemKind.EXT4])
    try:
        nas1.start_armed(point)
        expect_death(nas1, lambda: nas1.ask(order), point)
        nas1.start()
        _nothing_new(nas1)
        there = [facts.id for facts in nas1.ask(m.ListVolumes()).volumes]
        assert (volume in there) is (point.partition("=")[0] == "substrate.create.after")
        if volume not in there:
            assert nas1.ask(order).serving
            nas1.ask(m.StopServing(volume))
    finally:
        nas1.kill()
        release(nas1)


def adopt_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 1 dies when it adopts an image: what the image holds is there as it was, and asked again, it is served."""
    nas1, volume = case.fresh().nas1, uuid4()
    image = nas1.folder / "existing.img"
    make_filesystem(image, SIZES[FilesystemKind.EXT4], {"kept": b"x" * 100_000})
    order = m.AdoptVolume(volume, "adopted", FilesystemKind.EXT4, SIZES[FilesystemKind.EXT4], 512, str(image))
    try:
        nas1.start_armed(point)
        expect_death(nas1, lambda: nas1.ask(order), point)
        assert image.exists() is (point.partition("=")[0] != "substrate.adopt.after")
        nas1.start()
        _nothing_new(nas1)
        for _ in range(2):
            facts = nas1.ask(order)
            assert (Path(facts.mount_point) / "kept").read_bytes() == b"x" * 100_000
        assert not image.exists()
        nas1.ask(m.StopServing(volume))
    finally:
        nas1.kill()
        release(nas1)


def make_filesystem(image: Path, size_bytes: int, files: dict[str, bytes]) -> None:
    """Make an image that holds an ext4 with some files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        with image.open("wb") as file:
            file.truncate(size_bytes)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", "-d", folder, str(image)], check=True)


def remove_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 1 dies when it takes a volume away that could not be made; the failure to make it is an option that mkfs refuses."""
    nas1, volume = case.fresh().nas1, uuid4()
    order = m.CreateVolume(volume, "another", FilesystemKind.EXT4, SIZES[FilesystemKind.EXT4], mkfs_options=("-O", "no_such_feature"))
    try:
        nas1.start_armed(point)
        expect_death(nas1, lambda: nas1.ask(order), point)
        nas1.start()
        _nothing_new(nas1)
        there = [facts.id for facts in nas1.ask(m.ListVolumes()).volumes]
        assert (volume in there) is (point.partition("=")[0] == "substrate.remove.before")
    finally:
        nas1.kill()
        release(nas1)


def end_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 2 dies when a volume is removed: asked again, nothing of it is left."""
    pair, volume = case.fresh(), case.base.volume
    nas2 = pair.nas2
    try:
        nas2.start_armed(point)
        expect_death(nas2, lambda: nas2.ask(m.RemoveVolume(volume)), point)
        nas2.start()
        _nothing_new(nas2)
        assert nas2.ask(m.ListVolumes()).volumes == ()
        nas2.ask(m.RemoveVolume(volume))
        assert nas2.ask(m.ListTransfers()).transfers == ()
        assert not list((nas2.folder / "state" / "differential").glob("*"))
        assert not list((nas2.folder / "pool" / "volumes").iterdir())
    finally:
        nas2.kill()
        release(nas2)


def grow_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 2 dies when a volume grows: it has one size afterwards, and asked again, the new one."""
    pair, volume = case.fresh(), case.base.volume
    nas2, size = pair.nas2, SIZES[case.filesystem] + (32 << 20)
    try:
        nas2.start_armed(point)
        expect_death(nas2, lambda: nas2.ask(m.GrowVolume(volume, size)), point)
        nas2.start()
        _nothing_new(nas2)
        images = list((nas2.folder / "pool" / "volumes" / str(volume)).rglob("*.img"))
        (facts,) = nas2.ask(m.ListVolumes()).volumes
        assert {image.stat().st_size for image in images} == {facts.size_bytes}
        assert not nas2.ask(m.ExamineGeneration(case.base)).written
        assert nas2.ask(m.GrowVolume(volume, size)).size_bytes == size
        assert {image.stat().st_size for image in images} == {size}
    finally:
        nas2.kill()
        release(nas2)


def drop_dies(case: Case, point: str, differential: m.Differential) -> None:
    """NAS 1 dies when a generation is let go: it is held whole, or not at all."""
    pair = case.fresh()
    nas1, volume = pair.nas1, case.base.volume
    try:
        nas1.start_armed(point)
        expect_death(nas1, lambda: nas1.ask(m.DiscardTransfer(case.transfer)), point)
        nas1.start()
        _nothing_new(nas1)
        held = [facts.id for facts in served(nas1, volume).generations]
        assert (case.target in held) is (point.partition("=")[0] == "substrate.drop.before")
        assert nas1.image(case.target).exists() is (case.target in held)
        assert case.base in held
        nas1.ask(m.DiscardTransfer(case.transfer))
        assert state_of(nas1, case) is None
        assert case.target not in [facts.id for facts in served(nas1, volume).generations]
    finally:
        nas1.kill()
        release(nas1)


def _nothing_new(node: NodeProcess) -> None:
    """Nothing that was half made is left."""
    left = [path for path in node.folder.rglob(".new-*") if "/srv/" not in str(path)]
    assert not left, f"left over: {left}"


# --- what named cases ask ---


def facts_of(node: NodeProcess, case: Case) -> m.TransferFacts:
    """Return a node's facts of the transfer."""
    transfers: m.Transfers = node.ask(m.ListTransfers())
    return next(facts for facts in transfers.transfers if facts.id == case.transfer)


def workspaces(node: NodeProcess, case: Case) -> list[str]:
    """Return the names of the volume's workspaces."""
    return sorted(path.name for path in (node.folder / "pool/volumes" / str(case.base.volume) / "workspaces").iterdir())


def transfer_files(node: NodeProcess, case: Case) -> dict[str, bytes]:
    """Return what a node remembers of the transfer, byte by byte."""
    folder = node.folder / "state/transfers" / str(case.transfer)
    found: dict[str, bytes] = {}
    for path in folder.iterdir() if folder.exists() else ():
        with suppress(FileNotFoundError):  # it was being replaced
            found[path.name] = path.read_bytes()
    return found


def untouched(case: Case, nas2: NodeProcess) -> None:
    """NAS 2 has the base, byte for byte, as its newest generation."""
    assert served(nas2, case.base.volume).generations[-1].id == case.base
    assert images_equal(nas2.image(case.base), case.source_image(case.base))


def converged(case: Case, nas2: NodeProcess) -> None:
    """NAS 2 has base and target, byte for byte, and nothing besides."""
    assert served(nas2, case.base.volume).generations[-1].id == case.target
    assert images_equal(nas2.image(case.base), case.source_image(case.base))
    assert images_equal(nas2.image(case.target), case.source_image(case.target))
    assert workspaces(nas2, case) == []


@contextmanager
def fresh(case: Case) -> Iterator[Pair]:
    """Yield a pair as it was before the transfer, running; dead afterwards, with nothing left mounted or attached."""
    pair = case.fresh()
    try:
        with running(pair):
            yield pair
    finally:
        release(pair.nas1)
        release(pair.nas2)
