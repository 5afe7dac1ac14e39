"""A transfer's folder survives deaths at any point, and what is not understood is left as it is."""

import json
import os
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest

from agent.contract import arrival
from agent.contract.errors import DeviceFailed, NoSpace, NoSuchTransfer, RecordMalformed, TransferBusy, VersionUnknown
from agent.contract.identity import GenerationId
from agent.contract.messages import Differential, TransferState
from agent.transfer.store import ArrivalWriter, TransferRecord, TransferStore

VOLUME = UUID(int=5)
DIGEST = bytes(range(16))


def record(**changes: object) -> TransferRecord:
    values = {
        "id": uuid4(),
        "base": GenerationId(VOLUME, 1, 3, "a" * 32),
        "target": GenerationId(VOLUME, 1, 4, "b" * 32),
        "differential": Differential.SEND,
        "sending": True,
        "state": TransferState.WAITING,
        "since_ns": 7,
        "priorities": (("db", 5), ("", -1)),
    }
    return TransferRecord(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> TransferStore:
    return TransferStore(tmp_path / "transfers")


def test_what_is_created_is_loaded_listed_changed_and_discarded(store: TransferStore, tmp_path: Path) -> None:
    one, two = record(), record(sending=False)
    store.create(one)
    store.create(two)
    assert set(store.list()) == {one.id, two.id}
    assert store.load(one.id) == one
    assert store.set_state(one.id, TransferState.RUNNING).state is TransferState.RUNNING
    assert TransferStore(tmp_path / "transfers").load(one.id).state is TransferState.RUNNING
    store.discard(one.id)
    assert store.list() == (two.id,)
    for act in (store.load, store.discard, store.dmi_bytes):
        with pytest.raises(NoSuchTransfer):
            act(one.id)
    with pytest.raises(NoSuchTransfer):
        store.save(one)
    with pytest.raises(TransferBusy):
        store.create(two)


def test_what_a_crash_left_half_made_or_half_removed_is_swept(store: TransferStore, tmp_path: Path) -> None:
    kept = record()
    store.create(kept)
    for name in (f".{uuid4()}", f".{kept.id}"):
        (tmp_path / "transfers" / name).mkdir()
        (tmp_path / "transfers" / name / "dmi").write_bytes(b"x")
    again = TransferStore(tmp_path / "transfers")
    assert again.list() == (kept.id,)
    assert sorted(path.name for path in (tmp_path / "transfers").iterdir()) == [str(kept.id)]


def test_B12_a_record_of_another_version_is_refused_and_left_as_it_is(store: TransferStore) -> None:
    one = record()
    store.create(one)
    path = store.folder(one.id) / "transfer.json"
    text = json.dumps({**json.loads(path.read_text()), "version": 2, "more": True})
    path.write_text(text)
    with pytest.raises(VersionUnknown):
        store.load(one.id)
    assert store.list() == (one.id,)
    assert path.read_text() == text


@pytest.mark.parametrize(
    "change",
    [{"more": 1}, {"state": "asleep"}, {"version": "1"}, {"sending": 1}, {"since_ns": "7"}, {"id": str(UUID(int=1))}, {"base": None}],
    ids=str,
)
def test_a_record_that_says_something_else_is_refused(store: TransferStore, change: dict[str, object]) -> None:
    one = record()
    store.create(one)
    path = store.folder(one.id) / "transfer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RecordMalformed):
        store.load(one.id)


def test_a_record_cut_at_any_byte_is_refused(store: TransferStore) -> None:
    one = record()
    store.create(one)
    path = store.folder(one.id) / "transfer.json"
    raw = path.read_bytes()
    for cut in range(len(raw)):
        path.write_bytes(raw[:cut])
        with pytest.raises(RecordMalformed):
            store.load(one.id)


BATCHES = [([0, 1, 2], [3, 3, 1]), ([2], [3]), ([5, 6], [1, 5])]


def written(path: Path, transfer: UUID) -> list[tuple[int, list[int]]]:
    """Write a small record; return for each batch the file's length after it and the bits by then."""
    states = []
    writer = ArrivalWriter(path, transfer, DIGEST, 8)
    states.append((path.stat().st_size, writer.bits.tolist()))
    for rows, bits in BATCHES:
        writer.append(np.array(rows, dtype=np.uint32), np.array(bits, dtype=np.uint8))
        states.append((path.stat().st_size, writer.bits.tolist()))
    writer.close()
    return states


def test_a_record_is_read_back_and_continued(tmp_path: Path) -> None:
    path, transfer = tmp_path / "arrival", uuid4()
    states = written(path, transfer)
    writer = ArrivalWriter(path, transfer, DIGEST, 8)
    assert writer.bits.tolist() == states[-1][1] == [3, 3, 3, 0, 0, 1, 5, 0]
    writer.append(np.array([7], dtype=np.uint32), np.array([3], dtype=np.uint8))
    writer.close()
    read = arrival.decode(path.read_bytes(), transfer=transfer, dmi_digest=DIGEST, pieces=8)
    assert (read.bits.tolist(), read.batches) == ([3, 3, 3, 0, 0, 1, 5, 3], 4)


def test_F10_a_record_cut_at_any_byte_is_cut_back_to_its_last_whole_batch_and_continued(tmp_path: Path) -> None:
    path, transfer = tmp_path / "arrival", uuid4()
    states = written(path, transfer)
    raw = path.read_bytes()
    for cut in range(arrival.HEAD_BYTES, len(raw)):
        path.write_bytes(raw[:cut])
        length, bits = max(state for state in states if state[0] <= cut)
        writer = ArrivalWriter(path, transfer, DIGEST, 8)
        assert (path.stat().st_size, writer.bits.tolist()) == (length, bits)
        writer.append(np.array([4], dtype=np.uint32), np.array([3], dtype=np.uint8))
        writer.close()
        bits[4] = 3
        assert arrival.decode(path.read_bytes(), transfer=transfer, dmi_digest=DIGEST, pieces=8).bits.tolist() == bits
        bits[4] = 0


def test_F10_a_flipped_byte_never_makes_a_piece_arrive(tmp_path: Path) -> None:
    path, transfer = tmp_path / "arrival", uuid4()
    states = written(path, transfer)
    raw = path.read_bytes()
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 0x81
        path.write_bytes(damaged)
        if at < arrival.HEAD_BYTES:
            with pytest.raises((RecordMalformed, VersionUnknown)):
                ArrivalWriter(path, transfer, DIGEST, 8)
            assert path.read_bytes() == bytes(damaged)
            continue
        writer = ArrivalWriter(path, transfer, DIGEST, 8)
        assert (path.stat().st_size, writer.bits.tolist()) == max(state for state in states if state[0] <= at)
        writer.close()


@pytest.mark.parametrize(("number", "kind"), [(28, NoSpace), (5, DeviceFailed)])
def test_K3_a_record_that_cannot_be_written_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    path, transfer = tmp_path / "arrival", uuid4()
    states = written(path, transfer)
    writer = ArrivalWriter(path, transfer, DIGEST, 8)

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    rows, bits = np.array([7], dtype=np.uint32), np.array([3], dtype=np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(kind):
            writer.append(rows, bits)
    with pytest.raises(DeviceFailed, match="not trusted"):
        writer.append(rows, bits)
    assert writer.bits.tolist() == states[-1][1]
    writer.close()
