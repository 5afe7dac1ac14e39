"""The difference of two extent maps against a model that looks at every block."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.dmi import HOLE
from agent.contract.errors import LayoutUnsupported
from agent.contract.identity import BLOCK_BYTES
from agent.system.block import BtrfsChunk, ExtentFlag, ExtentMap
from agent.volume.extents import changed_ranges, changed_runs, on_device
from agent.volume.substrate import ChangedRuns

Extent = tuple[int, int, int, int]  # first block, address, blocks, flags


def extent_map(extents: list[Extent]) -> ExtentMap:
    columns = [np.array([extent[n] for extent in extents], np.uint64) for n in range(3)]
    flags = np.array([extent[3] for extent in extents], np.uint32)
    logical, physical, length = (column * np.uint64(BLOCK_BYTES) for column in columns)
    return ExtentMap(logical, physical, length, flags)


def addresses(extents: list[Extent]) -> dict[int, int]:
    return {first + n: at + n for first, at, blocks, flags in extents if not flags & ExtentFlag.UNWRITTEN for n in range(blocks)}


def rows(runs: ChangedRuns) -> list[tuple[int, int, int, bool]]:
    return list(zip(runs.first.tolist(), runs.blocks.tolist(), runs.diff_block.tolist(), runs.target_hole.tolist(), strict=True))


def model(base: list[Extent], target: list[Extent]) -> list[tuple[int, int, int, bool]]:
    """The runs, found block by block."""
    before, after = addresses(base), addresses(target)
    runs: list[tuple[int, int, int, bool]] = []
    for block in sorted(before.keys() | after.keys()):
        old, new = before.get(block, HOLE), after.get(block, HOLE)
        if old == new:
            continue
        if runs:
            first, blocks, at, hole = runs[-1]
            goes_on = old == HOLE if at == HOLE else old == at + blocks
            if first + blocks == block and goes_on and hole is (new == HOLE):
                runs[-1] = (first, blocks + 1, at, hole)
                continue
        runs.append((block, 1, old, new == HOLE))
    return runs


@st.composite
def maps(draw: st.DrawFn) -> list[Extent]:
    """Extents in logical order, neighbours both merged and unmerged, few addresses so that many are equal."""
    extents: list[Extent] = []
    at = 0
    for gap, blocks, address, flags in draw(
        st.lists(
            st.tuples(
                st.integers(0, 2),
                st.integers(1, 4),
                st.integers(1, 12),
                st.sampled_from([0, ExtentFlag.SHARED, ExtentFlag.UNWRITTEN, ExtentFlag.UNWRITTEN | ExtentFlag.SHARED]),
            ),
            max_size=8,
        )
    ):
        extents.append((at + gap, address, blocks, int(flags)))
        at += gap + blocks
    return extents


@given(maps(), maps())
def test_the_difference_is_exact(base: list[Extent], target: list[Extent]) -> None:
    assert rows(changed_runs(extent_map(base), extent_map(target))) == model(base, target)


@given(maps(), maps())
def test_ranges_cover_the_difference_and_are_joined(base: list[Extent], target: list[Extent]) -> None:
    first, blocks = changed_ranges(extent_map(base), extent_map(target))
    ranges = list(zip(first.tolist(), blocks.tolist(), strict=True))
    assert [at + n for at, count in ranges for n in range(count)] == [
        at + n for at, count, _, _ in model(base, target) for n in range(count)
    ]
    assert all(at + count < following for (at, count), (following, _) in pairwise(ranges))


@given(maps())
def test_nothing_differs_from_itself(extents: list[Extent]) -> None:
    assert rows(changed_runs(extent_map(extents), extent_map(extents))) == []


def test_nothing_at_all() -> None:
    assert rows(changed_runs(extent_map([]), extent_map([]))) == []


def test_a_million_extents_are_no_loop() -> None:
    first = np.arange(1_000_000, dtype=np.uint64) * np.uint64(2)
    base = extent_map([])
    target = ExtentMap(first * np.uint64(4096), first * np.uint64(8192), np.full_like(first, 4096), np.zeros(len(first), np.uint32))
    assert len(changed_runs(base, target).first) == 1_000_000
    assert len(changed_runs(target, target).first) == 0


@pytest.mark.parametrize("flag", [ExtentFlag.ENCODED, ExtentFlag.DATA_INLINE, ExtentFlag.DELALLOC, ExtentFlag.UNKNOWN])
def test_extents_without_a_plain_address_are_refused(flag: ExtentFlag) -> None:
    with pytest.raises(LayoutUnsupported):
        changed_runs(extent_map([(0, 1, 1, int(flag))]), extent_map([]))


def test_extents_that_are_no_whole_blocks_are_refused() -> None:
    logical, physical, length = (np.array([value], np.uint64) for value in (0, 512, 4096))
    odd = ExtentMap(logical, physical, length, np.zeros(1, np.uint32))
    with pytest.raises(LayoutUnsupported):
        changed_runs(odd, extent_map([]))


CHUNKS = (
    BtrfsChunk(4 * BLOCK_BYTES, 4 * BLOCK_BYTES, 1, ((1, 100 * BLOCK_BYTES),)),
    BtrfsChunk(8 * BLOCK_BYTES, 8 * BLOCK_BYTES, 1, ((1, 50 * BLOCK_BYTES),)),
)


def place(block: int) -> int:
    """The device's block of one of btrfs's address space."""
    return block - 4 + 100 if block < 8 else block - 8 + 50


@given(maps(), maps())
def test_addresses_of_btrfs_become_addresses_of_its_device(base: list[Extent], target: list[Extent]) -> None:
    base = [(first, 4 + address % 8, blocks, flags) for first, address, blocks, flags in base]
    runs = changed_runs(extent_map(base), extent_map(target))
    moved = rows(on_device(runs, CHUNKS))
    want = {first + n: (HOLE if at == HOLE else place(at + n), hole) for first, blocks, at, hole in rows(runs) for n in range(blocks)}
    got = {first + n: (HOLE if at == HOLE else at + n, hole) for first, blocks, at, hole in moved for n in range(blocks)}
    assert got == want
    assert sum(blocks for _, blocks, _, _ in moved) == len(got)
    assert [row[0] for row in moved] == sorted(row[0] for row in moved)


def test_addresses_outside_the_chunks_are_refused() -> None:
    for at in (1, 3, 15, 40):
        runs = changed_runs(extent_map([(0, at, 4, 0)]), extent_map([]))
        with pytest.raises(LayoutUnsupported):
            on_device(runs, CHUNKS)


def test_pools_of_several_devices_or_stripes_are_refused() -> None:
    runs = changed_runs(extent_map([]), extent_map([]))
    for chunk in (
        BtrfsChunk(0, 1 << 20, 1 | 0x8, ((1, 0),)),
        BtrfsChunk(0, 1 << 20, 1 | 0x10, ((1, 0), (2, 0))),
        BtrfsChunk(1 << 20, 1 << 20, 1, ((2, 0),)),
    ):
        with pytest.raises(LayoutUnsupported):
            on_device(runs, (*CHUNKS, chunk))
