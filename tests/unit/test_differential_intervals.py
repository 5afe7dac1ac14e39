"""Runs of blocks held against sets of blocks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agent.differential.intervals import Runs, cut, expanded, intersected, row_at, runs_of, runs_of_blocks, spans, united

ANY = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12)


def runs(pairs: list[tuple[int, int]]) -> Runs:
    return runs_of(np.array([first for first, _ in pairs], np.uint64), np.array([count for _, count in pairs], np.uint64))


def blocks(of: Runs) -> list[int]:
    return [block for first, end in zip(of.first.tolist(), of.end.tolist(), strict=True) for block in range(first, end)]


@given(ANY, ANY)
def test_union_is_disjoint_ascending_and_joined(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    together = united(runs(one), runs(other))
    assert blocks(together) == sorted({*blocks(runs(one)), *blocks(runs(other))})
    assert bool(np.all(together.first[1:] > together.end[:-1]))
    assert bool(np.all(together.end > together.first))


@given(ANY, ANY)
def test_intersection_is_what_both_have(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    left, right = united(runs(one)), united(runs(other))
    assert blocks(intersected(left, right)) == sorted(set(blocks(left)) & set(blocks(right)))


@given(ANY, st.lists(st.integers(0, 80), max_size=20))
def test_cutting_keeps_the_blocks_and_cuts_everywhere(pairs: list[tuple[int, int]], points: list[int]) -> None:
    whole = united(runs(pairs))
    parts = cut(whole, np.array(points, np.uint64))
    assert blocks(parts) == blocks(whole)
    assert not any(first < point < end for point in points for first, end in zip(parts.first.tolist(), parts.end.tolist(), strict=True))


@given(ANY, st.lists(st.integers(0, 80), max_size=20))
def test_row_at_finds_the_run_or_none(pairs: list[tuple[int, int]], asked: list[int]) -> None:
    whole = united(runs(pairs))
    for block, row in zip(asked, row_at(whole, np.array(asked, np.uint64)).tolist(), strict=True):
        assert (row >= 0) == (block in set(blocks(whole)))
        assert row < 0 or whole.first[row] <= block < whole.end[row]


@given(st.lists(st.integers(0, 50)))
def test_single_blocks_make_runs(singles: list[int]) -> None:
    made = runs_of_blocks(np.array(singles, np.uint64))
    assert expanded(made).tolist() == blocks(made) == sorted(set(singles))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5))))
def test_spans(pairs: list[tuple[int, int]]) -> None:
    starts, counts = np.array([p[0] for p in pairs], np.int64), np.array([p[1] for p in pairs], np.int64)
    assert spans(starts, counts).tolist() == [first + step for first, count in pairs for step in range(count)]
