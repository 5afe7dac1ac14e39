"""The determination, held against a model that goes file by file."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract import closure
from agent.contract.dmi import Change, Dmi, Side
from agent.contract.errors import RecordMalformed
from agent.contract.messages import Deletions, Outcome
from mgmt.determination import NOT_REPORTED, OUTCOMES, AtomicSet, Policy, Reason, determine, gauge, members_of
from tests.unit.mgmt_dmis import File, arrived, make

PIECES = 12
ALL = 3


@pytest.fixture(params=[1, 5, 1 << 22], ids=lambda needs: f"{needs} at once", autouse=True, scope="module")
def needs_at_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """A differential is looked at in parts; where they end must not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closure, "_NEEDS_AT_ONCE", request.param)
        yield


changes = st.sampled_from(
    [
        Change.NEW | Change.CONTENT,
        Change.CONTENT,
        Change.NAMES,
        Change.DELETED,
        Change.CONTENT | Change.NAMELESS,
        Change.NEW | Change.NAMELESS,
    ]
)
paths = st.sampled_from([b"a", b"db/t1", b"db/log/t2", b"dbx", b"mail/in\xff", b"mail/\nout"])
files = st.builds(
    File,
    paths=st.lists(paths, min_size=1, max_size=2, unique=True).map(tuple),
    change=changes,
    needs=st.lists(st.integers(0, PIECES - 1), max_size=4, unique=True).map(tuple),
)
sets = st.lists(
    st.builds(AtomicSet, st.just("s"), st.lists(st.sampled_from(["db", "mail", "a", "dbx", "nothing"]), min_size=1, max_size=2).map(tuple)),
    max_size=3,
).map(tuple)


def model(listed: list[File], bits: list[int], policy: Policy) -> list[Outcome | None]:
    """The same, slowly and in the words of the definition."""
    verdicts: list[Outcome | None] = []
    for file in listed:
        pieces = [bits[piece] for piece in file.needs]
        not_there = Outcome.ABSENT if file.change & Change.NEW else Outcome.KEPT
        if file.change & (Change.NAMELESS | Change.DELETED):
            verdicts.append(None)
        elif any(piece & 4 for piece in pieces):
            verdicts.append(Outcome.DAMAGED)
        elif all(piece & 3 == 3 for piece in pieces):
            verdicts.append(Outcome.RECOVERED)
        else:
            verdicts.append(not_there)
    judged = [not file.change & (Change.NAMELESS | Change.DELETED) for file in listed]
    hold = False
    for _ in range(len(policy.atomic_sets) + 1):
        for atomic in policy.atomic_sets:
            inside = [row for row, file in enumerate(listed) if belongs(file, atomic)]
            if any(judged[row] and verdicts[row] != Outcome.RECOVERED for row in inside):
                hold |= any(listed[row].change & Change.DELETED for row in inside)
                for row in inside:
                    if verdicts[row] == Outcome.RECOVERED:
                        verdicts[row] = Outcome.ABSENT if listed[row].change & Change.NEW else Outcome.KEPT
    complete = all(verdict == Outcome.RECOVERED for row, verdict in enumerate(verdicts) if judged[row])
    for row, file in enumerate(listed):
        if file.change & Change.DELETED:
            applied = complete or (policy.deletions is Deletions.APPLY and not hold)
            verdicts[row] = Outcome.DELETED if applied else Outcome.HELD
    return verdicts


def belongs(file: File, atomic: AtomicSet) -> bool:
    return any(path == wanted.encode() or path.startswith(wanted.encode() + b"/") for path in file.paths for wanted in atomic.patterns)


@given(
    listed=st.lists(files, max_size=12),
    bits=st.lists(st.integers(0, 15), min_size=PIECES, max_size=PIECES),
    deletions=st.sampled_from(Deletions),
    atomic_sets=sets,
)
def test_the_verdicts_are_those_of_the_model(
    listed: list[File], bits: list[int], deletions: Deletions, atomic_sets: tuple[AtomicSet, ...]
) -> None:
    dmi, policy = make(listed, PIECES), Policy(deletions, atomic_sets)
    found = determine(dmi, arrived(dmi, bits), policy)
    expected = model(listed, bits, policy)
    assert [None if code == NOT_REPORTED else OUTCOMES[code] for code in found.outcome.tolist()] == expected
    assert found.designated.tolist() == [row for row, verdict in enumerate(expected) if verdict is Outcome.RECOVERED]
    judged = [verdict for verdict, file in zip(expected, listed, strict=True) if not file.change & (Change.NAMELESS | Change.DELETED)]
    assert found.complete == all(verdict is Outcome.RECOVERED for verdict in judged)
    for row, file in enumerate(listed):
        assert found.needed[row] == len(file.needs)
        assert found.arrived[row] == sum(bits[piece] & 7 == 3 for piece in file.needs)


@given(listed=st.lists(files, max_size=12), bits=st.lists(st.integers(0, 15), min_size=PIECES, max_size=PIECES))
def test_the_gauge_counts_what_a_salvage_without_sets_would_bring(listed: list[File], bits: list[int]) -> None:
    dmi = make(listed, PIECES)
    record = arrived(dmi, bits)
    now, found = gauge(dmi, record), determine(dmi, record, Policy())
    assert now.files_whole == found.count(Outcome.RECOVERED)
    assert now.files_total == sum(not file.change & (Change.NAMELESS | Change.DELETED) for file in listed)
    pieces = {piece for row in found.designated.tolist() for piece in listed[row].needs}
    assert now.bytes_whole == 4096 * len(pieces)
    assert now.bytes_whole <= now.bytes_total


def test_the_dmis_made_here_are_ones_that_the_reader_accepts() -> None:
    listed = [File((b"a", b"b/c"), needs=(0, 1)), File((b"n\xff",), Change.NEW | Change.CONTENT), File((b"gone",), Change.DELETED)]
    made = make(listed, PIECES)
    assert Dmi.decode(b"".join(made.encode())).names(0, Side.TARGET) == [(2, b"a"), (2, b"b/c")]


def test_half_a_piece_is_not_a_piece() -> None:
    dmi = make([File((b"update only",), needs=(0,)), File((b"differential only",), needs=(1,)), File((b"both",), needs=(2,))], 3)
    assert determine(dmi, arrived(dmi, [1, 2, 3]), Policy()).designated.tolist() == [2]


def test_H9_a_file_without_blocks_is_whole_by_its_record() -> None:
    dmi = make([File((b"inline",), Change.NEW), File((b"other",), needs=(0,))], 1)
    found = determine(dmi, arrived(dmi, [0]), Policy())
    assert found.designated.tolist() == [0]
    assert found.reason[0] == Reason.RECORDED


def test_H8_a_shared_piece_that_is_missing_is_missing_for_every_file_that_has_it() -> None:
    dmi = make([File((b"one",), needs=(0, 1)), File((b"copy",), needs=(1,)), File((b"third",), needs=(0,))], 2)
    assert determine(dmi, arrived(dmi, [3, 0]), Policy()).designated.tolist() == [2]


def test_a_base_that_differs_damages_even_where_everything_arrived() -> None:
    dmi = make([File((b"old",), needs=(0,)), File((b"healed",), needs=(1,))], 2)
    found = determine(dmi, arrived(dmi, [3 | 4, 3 | 8]), Policy())
    assert OUTCOMES[found.outcome[0]] is Outcome.DAMAGED
    assert found.designated.tolist() == [1]


@pytest.mark.parametrize(("deletions", "outcome"), [(Deletions.HOLD, Outcome.HELD), (Deletions.APPLY, Outcome.DELETED)])
def test_H12_deletions_follow_the_policy_until_everything_arrived(deletions: Deletions, outcome: Outcome) -> None:
    dmi = make([File((b"gone",), Change.DELETED), File((b"changed",), needs=(0,))], 1)
    assert OUTCOMES[determine(dmi, arrived(dmi, [0]), Policy(deletions)).outcome[0]] is outcome
    everything = determine(dmi, arrived(dmi, [3]), Policy(deletions))
    assert everything.complete
    assert OUTCOMES[everything.outcome[0]] is Outcome.DELETED


def test_an_atomic_set_that_lacks_a_file_gives_back_all_and_holds_its_deletions() -> None:
    listed = [
        File((b"db/table",), needs=(0,)),
        File((b"db/log",), Change.NEW | Change.CONTENT, needs=(1,)),
        File((b"db/old-log",), Change.DELETED),
        File((b"elsewhere",), needs=(0,)),
        File((b"db/short",), needs=(2,)),
    ]
    dmi = make(listed, 3)
    found = determine(dmi, arrived(dmi, [3, 3, 0]), Policy(Deletions.APPLY, (AtomicSet("database", ("db",)),)))
    assert [OUTCOMES[code] for code in found.outcome.tolist()] == [
        Outcome.KEPT, Outcome.ABSENT, Outcome.HELD, Outcome.RECOVERED, Outcome.KEPT,
    ]  # fmt: skip
    assert found.deletions is Deletions.HOLD
    assert [(broken.name, broken.members, broken.not_whole) for broken in found.broken_sets] == [("database", 4, 1)]


def test_breaking_a_set_breaks_the_sets_that_share_a_file_with_it() -> None:
    dmi = make([File((b"a",), needs=(0,)), File((b"b",), needs=(1,)), File((b"c",), needs=(1,))], 2)
    chained = (AtomicSet("second", ("b", "c")), AtomicSet("first", ("a", "b")))
    assert determine(dmi, arrived(dmi, [0, 3]), Policy(atomic_sets=chained)).designated.tolist() == []


@given(name=st.text("ab/.\n", min_size=1, max_size=6), pattern=st.text("ab*?.", min_size=1, max_size=5))
def test_patterns_match_within_a_component_as_fnmatch_does(name: str, pattern: str) -> None:
    if "/" in name or "**" in pattern:
        return
    dmi = make([File((name.encode(),))], 0)
    assert members_of(dmi, AtomicSet("s", (pattern,))).tolist() == [fnmatchcase(name, pattern)]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("db", [b"db", b"db/x", b"db/x/y"]),
        ("/db/", [b"db", b"db/x", b"db/x/y"]),
        ("db/*", [b"db/x"]),
        ("db/**", [b"db/x", b"db/x/y"]),
        ("**/y", [b"db/x/y", b"y"]),
        ("", [b"db", b"db/x", b"db/x/y", b"dbx", b"y"]),
        ("d[b]", []),
    ],
)
def test_what_a_pattern_matches(pattern: str, matched: list[bytes]) -> None:
    names = [b"db", b"db/x", b"db/x/y", b"dbx", b"y"]
    found = members_of(make([File((name,)) for name in names], 0), AtomicSet("s", (pattern,)))
    assert [name for name, inside in zip(names, found.tolist(), strict=True) if inside] == matched


def test_a_record_of_another_dmi_is_refused() -> None:
    dmi = make([File((b"a",), needs=(0,))], 1)
    with pytest.raises(RecordMalformed):
        determine(dmi, arrived(dmi, [3, 3]), Policy())
