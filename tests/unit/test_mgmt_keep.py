"""Which generations are kept, and which are let go."""

from __future__ import annotations

from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.errors import ConfigInvalid
from agent.contract.identity import GenerationId
from mgmt.keep import Keep, let_go

HOUR_NS = 3600 * 10**9
FIRST_NS = 1_790_000_000 * 10**9 // (24 * HOUR_NS) * 24 * HOUR_NS  # a midnight


def taken_hourly(hours: int) -> list[tuple[GenerationId, int]]:
    return [(GenerationId(UUID(int=1), 1, number + 1, f"{number:032x}"), FIRST_NS + number * HOUR_NS) for number in range(hours)]


def counters(generations: list[GenerationId]) -> list[int]:
    return [generation.counter for generation in generations]


def test_the_newest_are_kept_and_the_newest_of_each_day() -> None:
    gone = let_go(taken_hourly(72), Keep(last=3, daily=2), 2)
    assert set(range(1, 73)) - set(counters(gone)) == {48, 70, 71, 72}


def test_nothing_said_keeps_the_least() -> None:
    assert counters(let_go(taken_hourly(5), Keep(), 2)) == [1, 2, 3]


def test_an_empty_span_uses_up_nothing() -> None:
    sparse = [taken_hourly(100)[number] for number in (0, 30, 99)]
    assert let_go(sparse, Keep(daily=3), 1) == []


@given(st.integers(1, 200), st.builds(Keep, *[st.integers(0, 30)] * 5), st.integers(1, 5))
def test_what_is_kept_stays_kept_when_nothing_new_comes(hours: int, keep: Keep, least: int) -> None:
    held = taken_hourly(hours)
    gone = set(let_go(held, keep, least))
    left = [found for found in held if found[0] not in gone]
    assert let_go(left, keep, least) == []
    assert held[-1][0] not in gone
    assert all(one[0].counter < other[0].counter for one, other in pairwise(left))


@pytest.mark.parametrize("text", ["last=3", "last=16,hourly=24,daily=7,weekly=4,monthly=12", ""])
def test_what_is_written_is_read_again(text: str) -> None:
    assert str(Keep.parse(text)) == text


@pytest.mark.parametrize("text", ["last", "last=0", "last=-1", "last=1,last=2", "yearly=1", "last=１", "last=99999"])
def test_what_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigInvalid):
        Keep.parse(text)
