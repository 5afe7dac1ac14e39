"""Digest tables of plain files as devices."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import xxhash

from agent.contract.digest import ZERO_BLOCK
from agent.differential import digests
from agent.volume.substrate import ChangedRuns


def runs(*pairs: tuple[int, int, bool]) -> ChangedRuns:
    first, blocks = (np.array([pair[at] for pair in pairs], np.uint64) for at in (0, 1))
    return ChangedRuns(first, blocks, first, np.array([pair[2] for pair in pairs], np.bool_))


def expected(content: bytes) -> list[int]:
    padded = content + bytes(-len(content) % 4096)
    return [xxhash.xxh3_64_intdigest(padded[at : at + 4096]) for at in range(0, len(padded), 4096)]


def test_a_derived_table_is_the_one_computed_in_full(tmp_path: Path) -> None:
    noise = random.Random(1)
    before = bytearray(noise.randbytes(100 * 4096 + 512))
    base, target = tmp_path / "base", tmp_path / "target"
    base.write_bytes(before)
    before[5 * 4096 : 9 * 4096] = noise.randbytes(4 * 4096)
    before[100 * 4096 :] = noise.randbytes(512)
    before[20 * 4096 : 22 * 4096] = bytes(2 * 4096)
    target.write_bytes(before)
    size = len(before)
    first = digests.computed(tmp_path / "g1.digests", base, size)
    assert first.tolist() == expected(base.read_bytes())
    second = digests.derived(tmp_path / "g2.digests", first, target, size, runs((5, 4, False), (20, 2, True), (100, 1, False)))
    assert second.tolist() == digests.computed(tmp_path / "again", target, size).tolist() == expected(bytes(before))
    assert second[20] == ZERO_BLOCK
    assert (tmp_path / "g2.digests").stat().st_size == 101 * 8 + 16


def test_without_a_base_what_did_not_change_is_a_hole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(bytes(4096) + b"x" * 4096 + bytes(8 * 4096))
    table = digests.derived(tmp_path / "g1.digests", None, target, 10 * 4096, runs((1, 1, False)))
    assert table.tolist() == expected(target.read_bytes())
    assert digests.table_of_zeros(10).tolist() == [ZERO_BLOCK] * 10


def test_a_damaged_table_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "g1.digests"
    target = tmp_path / "target"
    target.write_bytes(bytes(8 * 4096))
    digests.computed(path, target, 8 * 4096)
    assert digests.load(path, 8) is not None
    assert digests.load(path, 9) is None
    assert digests.load(tmp_path / "absent", 8) is None
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert digests.load(path, 8) is None, at
