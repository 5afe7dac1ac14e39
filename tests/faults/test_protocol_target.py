"""Group B: NAS 2 dies and is started again, with all, some or another's durable state."""

from __future__ import annotations

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from agent.contract import messages as m
from agent.contract.columns import identity
from agent.contract.errors import BaseMismatch, LandfallError, LinkLost, PeerRefused, Retry, VersionUnknown
from agent.contract.identity import GenerationId
from agent.system.clock import wait_until
from tests.faults.case import Case, follow, images_equal, release, served
from tests.faults.phases import (
    SLOWLY,
    after_death_in_salvage,
    converged,
    expect_death,
    facts_of,
    fresh,
    instruction,
    interrupted,
    running,
    state_of,
    transfer_files,
    untouched,
    workspaces,
)
from tests.faults.rig import Pair

VERIFY, SEND = m.Differential.VERIFY, m.Differential.SEND


def test_B1_a_target_that_does_not_listen_leaves_the_transfer_to_be_sent_again(ext4_case: Case) -> None:
    pair = ext4_case.fresh()

    def die(address: str, port: int) -> tuple[str, int]:
        pair.nas2.kill()
        return address, port

    with running(pair):
        with pytest.raises(LinkLost) as lost:
            ext4_case.send(pair, VERIFY, route=die)
        assert lost.value.retry is Retry.RECONNECT
        assert state_of(pair.nas1, ext4_case) is m.TransferState.INTERRUPTED
        pair.nas2.start()
        assert workspaces(pair.nas2, ext4_case) == []
        ext4_case.send(pair, VERIFY)
        converged(ext4_case, pair.nas2)


def test_B2_the_management_information_is_not_sent_twice(ext4_case: Case) -> None:
    point = "dst.after_dmi_durable=kill"
    pair = ext4_case.fresh()
    with running(pair, nas2=(point,)):
        expect_death(pair.nas2, lambda: ext4_case.send(pair, VERIFY), point)
        pair.nas2.start()
        facts = facts_of(pair.nas2, ext4_case)
        assert (facts.state, facts.pieces_arrived) == (m.TransferState.INTERRUPTED, 0)
        said: list[str] = []
        sent = ext4_case.send(pair, VERIFY, on_progress=lambda progress: said.append(progress.step))
        assert (sent.pieces_sent, sent.pieces_skipped) == (facts.pieces_total, 0)
        assert "management information" not in said
        converged(ext4_case, pair.nas2)


def test_B3_what_was_written_and_not_recorded_is_asked_for_again(xfs_case: Case) -> None:
    pair = xfs_case.fresh()
    with running(pair, nas2=("dst.after_write=kill",)):
        expect_death(pair.nas2, lambda: xfs_case.send(pair, SEND), "dst.after_write=kill")
    followed = follow(xfs_case, pair, SEND)
    assert followed.arrived_pieces == 0
    assert followed.sent_on_resume is not None
    assert followed.sent_on_resume.pieces_skipped == 0


def test_B4_data_is_made_durable_before_it_is_recorded_every_time(ext4_case: Case) -> None:
    with fresh(ext4_case) as pair:
        ext4_case.send(pair, SEND, rate_limit_bytes_s=SLOWLY)
        durable, groups = False, 0
        for point in pair.nas2.passed():
            if point == "dst.before_datasync":
                durable = False
            elif point == "dst.after_datasync":
                durable = True
            elif point == "dst.before_record":
                assert durable, "a record led its data"
                groups += 1
            elif point == "dst.after_record":
                durable = False
        assert groups > 1


@pytest.mark.parametrize("point", ["dst.after_write:3", "dst.after_datasync", "dst.before_record", "dst.after_record"])
def test_B4_B7_power_lost_around_the_record_leaves_it_at_most_behind(xfs_case: Case, point: str) -> None:
    lose_power_at(xfs_case, point)


@pytest.mark.parametrize(
    "point", ["dst.before_commit", "substrate.commit.before_rename", "substrate.commit.after_rename", "dst.after_commit"]
)
def test_B5_B6_B7_power_lost_around_the_commit_leaves_base_or_target(ext4_case: Case, point: str) -> None:
    committed = lose_power_at(ext4_case, point)
    assert committed is (point in {"substrate.commit.after_rename", "dst.after_commit"})


def test_B8_power_lost_after_the_commit_and_before_the_acknowledgement(xfs_case: Case) -> None:
    assert lose_power_at(xfs_case, "dst.before_ack")


def lose_power_at(case: Case, point: str) -> bool:
    """Let NAS 2 lose power at a failpoint, and ask the oracle; return whether the target was committed."""
    name, _, nth = point.partition(":")
    armed = f"{name}=kill:{nth or 1}"
    pair = case.fresh()
    subprocess.run(["sync", "-f", pair.nas2.folder], check=True)
    with running(pair, nas2=(armed,)):
        expect_death(pair.nas2, lambda: case.send(pair, SEND, rate_limit_bytes_s=SLOWLY), armed)
        case.pool2.lose_power()
    followed = follow(case, pair, SEND)
    if followed.committed:
        assert followed.sent_on_resume is not None
        assert followed.sent_on_resume.pieces_sent == 0
    return followed.committed


@pytest.mark.parametrize("nth", [2, 11, 37])
def test_B9_a_salvage_that_dies_at_a_file_is_done_again(xfs_case: Case, nth: int) -> None:
    point = f"recovery.file=kill:{nth}"
    pair = interrupted(xfs_case, VERIFY, whole=nth != 11)
    try:
        pair.nas2.start_armed(point)
        expect_death(pair.nas2, lambda: pair.nas2.ask(instruction(xfs_case, pair.nas2)), point)
        after_death_in_salvage(xfs_case, pair, VERIFY)
    finally:
        pair.nas2.kill()


def test_B10_a_salvage_dies_and_the_recovery_of_it_dies_and_dies_again(ext4_case: Case) -> None:
    pair = interrupted(ext4_case, SEND)
    nas2 = pair.nas2
    try:
        nas2.start_armed("recovery.after_namespace=kill")
        expect_death(nas2, lambda: nas2.ask(instruction(ext4_case, nas2)), "recovery.after_namespace=kill")
        for point in ("substrate.discard.before=kill", "substrate.discard.after=kill"):
            nas2.die_at_start(point)
        nas2.start_armed("recovery.before_commit=kill")
        expect_death(nas2, lambda: nas2.ask(instruction(ext4_case, nas2)), "recovery.before_commit=kill")
        nas2.die_at_start("substrate.discard.before=kill")
        after_death_in_salvage(ext4_case, pair, SEND)
    finally:
        nas2.kill()


def test_B10_a_reception_dies_and_each_restart_dies_until_one_does_not(xfs_case: Case) -> None:
    pair = xfs_case.fresh()
    try:
        with running(pair, nas2=("dst.after_record=kill",)):
            expect_death(pair.nas2, lambda: xfs_case.send(pair, SEND), "dst.after_record=kill")
        for point in ("dst.before_notification=kill", "files.before_rename=kill", "dst.after_notification=kill", "files.after_rename=kill"):
            pair.nas2.die_at_start(point)
        pair.nas2.start()
        outbox: m.Outbox = pair.nas2.ask(m.ReadOutbox(0, 5.0))
        assert {said.transfer for said in outbox.notifications} == {xfs_case.transfer}
        assert state_of(pair.nas2, xfs_case) is m.TransferState.INTERRUPTED
    finally:
        pair.nas2.kill()
    follow(xfs_case, pair, SEND)


def test_B11_a_restart_makes_the_old_token_worthless_while_the_source_still_streams(ext4_case: Case) -> None:
    pair = ext4_case.fresh()
    with running(pair, nas2=("dst.after_record=stop",)), ThreadPoolExecutor(1) as executor:
        sending = executor.submit(ext4_case.send, pair, SEND, rate_limit_bytes_s=SLOWLY // 4)
        assert wait_until(pair.nas2.stopped, 30.0)
        assert not sending.done()
        pair.nas2.kill()
        pair.nas2.start()
        assert isinstance(sending.exception(timeout=30.0), LinkLost)
        old, new = (pair.authority.passes("nas1", "nas2") for _ in range(2))
        listening = pair.nas2.ask(m.ReceiveTransfer(ext4_case.transfer, ext4_case.base, ext4_case.target, SEND, 1, new.token, new.receiver))

        def send(token: str) -> m.Sent:
            order = m.SendTransfer(ext4_case.transfer, listening.address, listening.port, SEND, 1, token, new.sender)
            sent: m.Sent = pair.nas1.ask(order)
            return sent

        before = transfer_files(pair.nas2, ext4_case)
        with pytest.raises(PeerRefused, match="token"):
            send(old.token)
        assert transfer_files(pair.nas2, ext4_case) == before
        assert send(new.token).pieces_skipped > 0
        converged(ext4_case, pair.nas2)


def newer_transfer(folder: Path) -> Path:
    path = folder / "transfer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2, "what": "only a newer release knows"}))
    return path


def newer_arrival(folder: Path) -> Path:
    path = folder / "arrival"
    raw = bytearray(path.read_bytes())
    raw[8:10] = (2).to_bytes(2, "little")
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("newer", [newer_transfer, newer_arrival])
def test_B12_a_record_of_a_newer_release_is_refused_and_left_untouched(ext4_case: Case, newer: object) -> None:
    assert callable(newer)
    pair = interrupted(ext4_case, SEND, whole=False)
    newer(pair.nas2.folder / "state/transfers" / str(ext4_case.transfer))
    had, landing = transfer_files(pair.nas2, ext4_case), workspaces(pair.nas2, ext4_case)
    records = ("transfer.json",) if newer is newer_transfer else ("arrival", "dmi")
    with running(pair):
        with pytest.raises(LandfallError) as refused:
            ext4_case.send(pair, SEND)
        assert isinstance(refused.value, VersionUnknown)
        if newer is newer_arrival:  # it is told once more that the transfer did not finish
            assert pair.nas2.ask(m.ReadOutbox(1, 10.0)).notifications
        digest = identity(memoryview(pair.nas2.ask(m.FetchDmi(ext4_case.transfer)))).hex()
        with pytest.raises(VersionUnknown):
            pair.nas2.ask(m.UpdateInstruction(ext4_case.transfer, digest, (), m.Deletions.HOLD, complete=False))
        with suppress(VersionUnknown):
            pair.nas2.ask(m.FetchArrival(ext4_case.transfer))
        has = transfer_files(pair.nas2, ext4_case)
        assert {name: has[name] for name in records} == {name: had[name] for name in records}
        assert workspaces(pair.nas2, ext4_case) == landing
        untouched(ext4_case, pair.nas2)
    release(pair.nas2)


def test_B12_a_generation_of_a_newer_release_is_told_and_left_as_it_is(ext4_case: Case) -> None:
    pair = interrupted(ext4_case, SEND, whole=False)
    path = pair.nas2.image(ext4_case.base).with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    volume = path.parents[1]

    def held() -> list[tuple[str, int]]:
        return sorted((str(found.relative_to(volume)), found.stat().st_size) for found in volume.rglob("*"))

    before = held()
    with running(pair):
        (unreadable,) = pair.nas2.ask(m.ListVolumes()).unreadable
        assert (unreadable.volume, "version-unknown" in unreadable.reason) == (ext4_case.base.volume, True)
        with pytest.raises(LandfallError):
            ext4_case.send(pair, SEND)
        digest = identity(memoryview(pair.nas2.ask(m.FetchDmi(ext4_case.transfer)))).hex()
        with pytest.raises(LandfallError):
            pair.nas2.ask(m.UpdateInstruction(ext4_case.transfer, digest, (), m.Deletions.HOLD, complete=False))
        assert held() == before
    release(pair.nas2)


@pytest.mark.parametrize("same_transfer", [True, False], ids=["resumed", "begun anew"])
def test_B13_without_its_state_a_node_takes_everything_again(xfs_case: Case, same_transfer: bool) -> None:
    pair = interrupted(xfs_case, SEND, whole=False)
    shutil.rmtree(pair.nas2.folder / "state")
    landing = pair.nas2.folder / "pool/volumes" / str(xfs_case.base.volume) / "workspaces" / f"{xfs_case.transfer}.landing.img"
    with landing.open("r+b") as file:  # what landed may be anything: nobody vouches for it any more
        file.seek(xfs_case.source_image(xfs_case.base).stat().st_size // 2)
        file.write(b"\xa5" * 65536)
    with running(pair):
        assert pair.nas2.ask(m.ListTransfers()).transfers == ()
        assert served(pair.nas2, xfs_case.base.volume).generations[-1].id == xfs_case.base
        if same_transfer:
            sent = xfs_case.send(pair, SEND)
        else:
            transfer = pair.build(xfs_case.base, xfs_case.target)
            sent = pair.receive_and_send(transfer, xfs_case.base, xfs_case.target, SEND)
        assert sent.pieces_skipped == 0
        converged(xfs_case, pair.nas2)
    release(pair.nas1)
    release(pair.nas2)


def test_B13_a_source_without_its_state_builds_anew(ext4_case: Case) -> None:
    pair = ext4_case.fresh()
    shutil.rmtree(pair.nas1.folder / "state")
    with running(pair):
        transfer = pair.build(ext4_case.base, ext4_case.target)
        pair.receive_and_send(transfer, ext4_case.base, ext4_case.target, VERIFY)
        converged(ext4_case, pair.nas2)
    release(pair.nas1)
    release(pair.nas2)


def restored(pair: Pair, generation: GenerationId, how: str) -> None:
    """Put an older content of the volume where the generation's image is, as a backup program does."""
    image = pair.nas2.image(generation)
    backup = image.with_name("backup")
    subprocess.run(["cp", "--reflink=always", image, backup], check=True)
    with backup.open("r+b") as file:  # a block that the differential does not touch is enough
        file.seek(image.stat().st_size - 8192)
        file.write(b"older")
    match how:
        case "copied over":
            shutil.copyfile(backup, image)
        case "with its own time":
            older = image.stat().st_mtime_ns - 3600 * 10**9
            subprocess.run(["cp", backup, image], check=True)
            subprocess.run(["touch", "-d", f"@{older / 10**9:.9f}", image], check=True)
        case "exchanged":
            backup.replace(image)
    backup.unlink(missing_ok=True)


@pytest.mark.parametrize("how", ["copied over", "with its own time", "exchanged"])
@pytest.mark.parametrize("begun", [False, True], ids=["before", "between two sessions"])
def test_B14_an_older_backup_in_the_place_of_the_base_is_refused(ext4_case: Case, how: str, begun: bool) -> None:
    pair = interrupted(ext4_case, VERIFY, whole=False) if begun else ext4_case.fresh()
    restored(pair, ext4_case.base, how)
    had = transfer_files(pair.nas2, ext4_case)
    with running(pair):
        with pytest.raises(BaseMismatch, match="wrote to generation"):
            ext4_case.send(pair, VERIFY)
        assert served(pair.nas2, ext4_case.base.volume).generations[-1].id == ext4_case.base
        assert transfer_files(pair.nas2, ext4_case) == had, "nothing is written before the base is proved"
        _drop_and_replicate_in_full(ext4_case, pair)
    release(pair.nas1)
    release(pair.nas2)


def test_B14_nothing_is_salvaged_onto_an_older_backup_unless_somebody_vouches_for_it(xfs_case: Case) -> None:
    pair = interrupted(xfs_case, SEND)
    image = pair.nas2.image(xfs_case.base)
    was_ns = image.stat().st_mtime_ns
    image.write_bytes(image.read_bytes())  # the same content, as it happens
    with running(pair):
        ordered = instruction(xfs_case, pair.nas2)
        with pytest.raises(BaseMismatch, match="wrote to generation"):
            pair.nas2.ask(ordered)
        assert state_of(pair.nas2, xfs_case) is m.TransferState.INTERRUPTED
        untouched(xfs_case, pair.nas2)
    subprocess.run(["touch", "-d", f"@{was_ns // 10**9}.{was_ns % 10**9:09d}", image], check=True)
    assert follow(xfs_case, pair, SEND).salvaged


def _drop_and_replicate_in_full(case: Case, pair: Pair) -> None:
    """Do what the refusal advises: the way back is open."""
    if state_of(pair.nas2, case) is not None:
        pair.nas2.ask(m.DiscardTransfer(case.transfer))
    pair.nas2.ask(m.DropGeneration(case.base))
    older = served(pair.nas2, case.base.volume).generations[-1].id
    transfer = pair.build(older, case.target)
    pair.receive_and_send(transfer, older, case.target, VERIFY)
    assert images_equal(pair.nas2.image(case.target), case.source_image(case.target))


def test_I10_nothing_is_written_outside_of_the_nodes_own_folders(ext4_case: Case) -> None:
    def others() -> list[tuple[str, int, int]]:
        mine = {"run1", "run2", "salvage"}
        found = []
        for folder in (ext4_case.folder1, ext4_case.folder2):
            for path in folder.rglob("*"):
                if path.relative_to(folder).parts[0] not in mine and not path.is_socket():
                    found.append((str(path), path.lstat().st_size, path.lstat().st_mtime_ns))
        return sorted(found)

    before = others()
    follow(ext4_case, interrupted(ext4_case, SEND, whole=False), SEND)
    assert others() == before
    allowed = {"state", "pool", "run", "srv", "agent.log", "trace", "dmi", "arrival", "loss.json"}
    for folder in (ext4_case.folder1 / "run1", ext4_case.folder2 / "run2", ext4_case.folder2 / "salvage"):
        assert {path.name for path in folder.iterdir()} <= allowed


def test_a_node_that_was_promoted_meanwhile_takes_nothing_more_of_the_transfer(ext4_case: Case) -> None:
    """I7: what it serves is not the base any more, though no generation says so."""
    pair = interrupted(ext4_case, VERIFY, whole=False)
    with running(pair):
        pair.nas2.ask(m.PromoteVolume(ext4_case.base.volume, 2))
        with pytest.raises(BaseMismatch, match="has taken volume"):
            ext4_case.send(pair, VERIFY)
        pair.nas2.ask(m.StopServing(ext4_case.base.volume))
        with pytest.raises(BaseMismatch, match="has taken volume"):
            ext4_case.send(pair, VERIFY)
        assert served(pair.nas2, ext4_case.base.volume).generations[-1].id == ext4_case.base
    release(pair.nas2)
