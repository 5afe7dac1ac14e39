"""Both sides of a transfer over TLS on loopback: everything arrives, once, and what is missing is sent again."""

import os
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from agent.contract.arrival import COMPLETE, Arrived
from agent.contract.errors import BaseMismatch, DeviceFailed, GenerationInvalid, LandfallError, LinkLost, ProtocolViolated, VerifyFailed
from agent.contract.messages import Differential, Sent
from agent.system.clock import monotonic_s
from agent.transfer.landing import Landing
from agent.transfer.receiver import Received
from tests.relay import Relay
from tests.transfer_scene import Scene, make_differential, transfer_threads


@pytest.mark.parametrize("differential", list(Differential))
@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_everything_arrives_and_is_committed_once(tmp_path: Path, differential: Differential, streams: int) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, seed=streams))
    sent, received = scene.transfer(both={"differential": differential, "streams": streams})
    assert isinstance(sent, Sent), sent
    assert isinstance(received, Received), received
    scene.check_landed()
    assert scene.committed == 1
    assert sent.pieces_sent == scene.differential.dmi.piece_total == received.pieces
    assert (sent.pieces_skipped, sent.healed, received.healed) == (0, 0, 0)
    assert received.bytes_received == pytest.approx(sent.bytes_sent, abs=200)
    assert transfer_threads() == []


def test_update_data_travels_once_and_differential_data_only_when_it_is_asked_for(tmp_path: Path) -> None:
    made = make_differential(tmp_path)
    amounts = {}
    for differential in Differential:
        folder = tmp_path / differential
        folder.mkdir()
        sent, _ = Scene(folder, made).transfer(both={"differential": differential})
        assert isinstance(sent, Sent), sent
        amounts[differential] = sent.bytes_sent
    dmi = made.dmi
    update = int(dmi.block_count[dmi.target_hole == 0].sum()) * 4096
    pre_image = int(dmi.block_count[dmi.diff_block != np.uint64(2**64 - 1)].sum()) * 4096
    assert update < amounts[Differential.VERIFY] < update * 1.05
    assert update + pre_image < amounts[Differential.SEND] < (update + pre_image) * 1.05


def test_a_small_link_is_spared_what_compresses(tmp_path: Path) -> None:
    made = make_differential(tmp_path, text=True)
    sent, _ = Scene(tmp_path, made).transfer()
    assert isinstance(sent, Sent), sent
    assert sent.bytes_sent < int(made.dmi.block_count[made.dmi.target_hole == 0].sum()) * 4096 * 0.5


def test_nothing_to_send_is_committed(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, pieces=0))
    sent, _ = scene.transfer()
    assert isinstance(sent, Sent), sent
    assert (sent.pieces_sent, scene.committed) == (0, 1)


def test_A9_a_transfer_that_is_committed_already_says_so_and_sends_nothing(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path))
    sent, received = scene.transfer(receiving={"committed": True})
    assert isinstance(sent, Sent), sent
    assert isinstance(received, Received), received
    assert (sent.pieces_sent, sent.pieces_skipped) == (0, scene.differential.dmi.piece_total)
    assert (scene.committed, received.pieces) == (0, 0)
    assert sent.bytes_sent < 1000


def test_the_rate_limit_holds(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=600, pieces=20))
    begun = monotonic_s()
    sent, _ = scene.transfer(sending={"rate_limit_bytes_s": 1 << 20})
    took = monotonic_s() - begun
    assert isinstance(sent, Sent), sent
    assert took > 0.8 * (sent.bytes_sent / (1 << 20) - 0.25)


@pytest.mark.parametrize(("damaged", "mode"), [(4, "verify"), (4, "send"), (30, "verify")])
def test_E14_a_base_that_differs_is_healed_from_the_source(tmp_path: Path, damaged: int, mode: str) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path))
    dmi = scene.differential.dmi
    damage_base(scene, np.arange(0, dmi.piece_total, dmi.piece_total // damaged)[:damaged])
    sent, received = scene.transfer(both={"differential": Differential(mode)})
    assert isinstance(sent, Sent), sent
    assert isinstance(received, Received), received
    assert received.healed == damaged
    assert sent.healed == (damaged if mode == "verify" else 0)
    assert scene.healed_opened == 1
    assert scene.healed.read_bytes() == scene.differential.base.read_bytes()
    assert int((scene.arrival().bits & int(Arrived.HEALED) != 0).sum()) == damaged
    scene.check_landed()


def test_a_base_that_cannot_be_healed_because_the_source_is_gone_stays_marked(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=512, pieces=20))
    rows = np.array([3, 7])
    damage_base(scene, rows)

    def refuse() -> NoReturn:
        raise LinkLost("the source died when it was asked")

    sent, received = scene.transfer(receiving={"heal": refuse})
    assert isinstance(sent, LandfallError)
    assert isinstance(received, LinkLost), received
    assert scene.arrival().bits[rows].tolist() == [Arrived.UPDATE | Arrived.BASE_DIFFERS] * 2
    assert scene.committed == 0
    sent, _ = scene.transfer()
    assert isinstance(sent, Sent), sent
    assert sent.pieces_sent >= 2
    assert scene.healed.read_bytes() == scene.differential.base.read_bytes()


def damage_base(scene: Scene, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    with open(scene.replica, "r+b") as file:
        for row in rows.tolist():
            file.seek(int(scene.differential.dmi.op_block[row]) * 4096 + 100)
            file.write(b"rot")


def test_D9_data_that_is_not_what_the_dmi_says_is_refused_before_it_is_written(tmp_path: Path) -> None:
    made = make_differential(tmp_path, blocks=512, pieces=20)
    scene = Scene(tmp_path, made)
    row = int(np.flatnonzero(made.dmi.target_hole == 0)[5])
    with open(made.target, "r+b") as file:
        file.seek(int(made.dmi.op_block[row]) * 4096)
        file.write(b"forged")
    sent, received = scene.transfer()
    assert isinstance(received, ProtocolViolated), received
    assert isinstance(sent, ProtocolViolated), sent
    assert b"forged" not in scene.landing.read_bytes()
    assert scene.committed == 0


def test_E11_what_does_not_read_back_is_not_committed_and_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=512, pieces=20))
    dmi = scene.differential.dmi
    row = int(np.flatnonzero(dmi.target_hole == 0)[2])
    verify = Landing.verify

    def lose_a_write(landing: Landing) -> int:
        with open(scene.landing, "r+b") as file:
            file.seek(int(dmi.op_block[row]) * 4096)
            file.write(b"lost")
        return verify(landing)

    with monkeypatch.context() as patch:
        patch.setattr(Landing, "verify", lose_a_write)
        sent, received = scene.transfer()
    assert isinstance(received, VerifyFailed), received
    assert isinstance(sent, VerifyFailed), sent
    assert scene.committed == 0
    sent, _ = scene.transfer()
    assert isinstance(sent, Sent), sent
    assert sent.pieces_sent == 1
    scene.check_landed()


@pytest.mark.parametrize("call", ["fdatasync", "pwrite"])
def test_E2_E3_a_failing_disk_ends_the_transfer_and_records_nothing_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=512, pieces=20))
    real, left = getattr(os, call), [0 if call == "fdatasync" else 3]

    def fail(fd: int, *more: object) -> object:
        if os.readlink(f"/proc/self/fd/{fd}") == str(scene.landing):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(5, "Input/output error")
        return real(fd, *more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        sent, received = scene.transfer()
    assert isinstance(received, DeviceFailed), received
    assert isinstance(sent, DeviceFailed), sent
    scene.check_recorded()
    sent, _ = scene.transfer()
    assert isinstance(sent, Sent), sent
    scene.check_landed()


def test_E1_a_source_that_cannot_read_says_so_and_nothing_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=512, pieces=20))
    row = int(np.flatnonzero(scene.differential.dmi.target_hole == 0)[4])
    bad = int(scene.differential.dmi.op_block[row]) * 4096
    preadv = os.preadv

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        inside = offset <= bad < offset + sum(map(len, buffers))
        if inside and os.readlink(f"/proc/self/fd/{fd}") == str(scene.differential.target):
            raise OSError(5, "Input/output error")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    sent, received = scene.transfer()
    assert isinstance(sent, DeviceFailed), sent
    assert f"byte {bad}" in sent.cause
    assert isinstance(received, LinkLost), received
    assert "device-failed" in received.cause
    assert scene.committed == 0


def test_E9_a_generation_that_is_lost_after_the_last_read_is_not_committed(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=512, pieces=20))
    arrived: list[int] = []

    def lost() -> NoReturn:
        arrived.append(int((scene.arrival().bits == COMPLETE).sum()))
        raise GenerationInvalid("the snapshot ran out of room")

    sent, received = scene.transfer(sending={"still_sound": lost})
    assert isinstance(sent, GenerationInvalid), sent
    assert isinstance(received, LinkLost), received
    assert arrived == [scene.differential.dmi.piece_total]
    assert scene.committed == 0


def test_E20_a_landing_volume_of_another_size_is_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=512, pieces=20))
    scene.landing.write_bytes(bytes(513 * 4096))
    sent, received = scene.transfer()
    assert isinstance(received, DeviceFailed), received
    assert isinstance(sent, DeviceFailed), sent
    assert scene.landing.read_bytes() == bytes(513 * 4096)


def test_F1_a_dmi_of_another_base_is_refused_before_anything_is_stored(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=512, pieces=20))
    other = replace(scene.differential.dmi.head.base, nonce="3" * 32)
    sent, received = scene.transfer(receiving={"base": other})
    assert isinstance(received, BaseMismatch), received
    assert isinstance(sent, BaseMismatch), sent
    assert not scene.store.has_dmi(scene.differential.dmi.head.transfer)
    assert not scene.landing.exists()


def test_another_dmi_for_a_transfer_that_began_is_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=512, pieces=20))
    scene.transfer(through=Relay(cut_at=200_000).before)
    assert scene.store.has_dmi(scene.differential.dmi.head.transfer)
    head = replace(scene.differential.dmi.head, volume_name="other")
    raw = b"".join(map(bytes, replace(scene.differential.dmi, head=head).encode()))
    sent, received = scene.transfer(sending={"dmi_bytes": memoryview(raw)})
    assert isinstance(received, ProtocolViolated), received
    assert isinstance(sent, ProtocolViolated), sent
    assert "another DMI" in sent.message


def test_F10_a_record_that_is_damaged_is_put_aside_and_its_pieces_are_sent_again(tmp_path: Path) -> None:
    scene = Scene(tmp_path, make_differential(tmp_path, blocks=512, pieces=20))
    scene.transfer(through=Relay(cut_at=400_000).before)
    path = scene.store.arrival_path(scene.differential.dmi.head.transfer)
    raw = bytearray(path.read_bytes())
    raw[30] ^= 1
    path.write_bytes(raw)
    sent, _ = scene.transfer()
    assert isinstance(sent, Sent), sent
    assert sent.pieces_skipped == 0
    assert path.with_name("arrival.damaged").exists()
    scene.check_landed()
