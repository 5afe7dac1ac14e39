"""Pieces held against a model that goes block by block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.dmi import HOLE, MAX_PIECE_BLOCKS, Owner
from agent.differential.pieces import needs_of, pieces_of
from agent.differential.reader import Ownership
from agent.volume.substrate import ChangedRuns


@dataclass(frozen=True, slots=True)
class Block:
    """What is known of one changed block."""

    diff: int
    hole: bool
    owner: int
    claims: frozenset[int]


@dataclass(frozen=True, slots=True)
class Case:
    """A differential's runs, and the same block by block."""

    changed: ChangedRuns
    ownership: Ownership
    blocks: dict[int, Block]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    at, changed, owned, blocks = 0, [], [], {}
    for _ in range(draw(st.integers(0, 6))):
        at += draw(st.sampled_from([0, 0, 1, 7]))
        length = draw(st.one_of(st.integers(1, 12), st.integers(250, 600)))
        # Every fourth run goes on where the one before ended, also in the differential volume.
        diff = draw(st.sampled_from([HOLE, at + 1000, at + 1000, 5000 + at * 2]))
        hole = draw(st.booleans())
        changed.append((at, length, diff, hole))
        left = at
        while left < at + length:
            part = min(draw(st.integers(1, 300)), at + length - left)
            owner = draw(st.sampled_from(list(Owner)))
            claims = draw(st.sets(st.integers(11, 14), min_size=1, max_size=3)) if owner is Owner.FILE else set()
            owned.append((left, part, int(owner), sorted(claims)))
            for block in range(left, left + part):
                blocks[block] = Block(diff if diff == HOLE else diff + block - at, hole, int(owner), frozenset(claims))
            left += part
        at += length
    claims_of = [(run, inode) for run, (_, _, _, claims) in enumerate(owned) for inode in claims]
    return Case(
        ChangedRuns(
            np.array([row[0] for row in changed], np.uint64),
            np.array([row[1] for row in changed], np.uint64),
            np.array([row[2] for row in changed], np.uint64),
            np.array([row[3] for row in changed], np.bool_),
        ),
        Ownership(
            np.array([row[0] for row in owned], np.uint64),
            np.array([row[1] for row in owned], np.uint64),
            np.array([row[2] for row in owned], np.uint8),
            np.array([run for run, _ in claims_of], np.uint32),
            np.array([inode for _, inode in claims_of], np.uint64),
        ),
        blocks,
    )


@given(cases())
def test_pieces_cover_exactly_the_changed_blocks_and_are_uniform(case: Case) -> None:
    pieces = pieces_of(case.changed, case.ownership)
    claims: dict[int, set[int]] = {}
    for piece, inode in zip(pieces.claim_piece.tolist(), pieces.claim_inode.tolist(), strict=True):
        claims.setdefault(piece, set()).add(inode)
    covered = []
    for row in range(len(pieces.op_block)):
        count = int(pieces.block_count[row])
        assert 1 <= count <= MAX_PIECE_BLOCKS
        for offset in range(count):
            block = int(pieces.op_block[row]) + offset
            covered.append(block)
            diff = int(pieces.diff_block[row])
            told = Block(
                diff if diff == HOLE else diff + offset,
                bool(pieces.target_hole[row]),
                int(pieces.owner[row]),
                frozenset(claims.get(row, ())),
            )
            assert told == case.blocks[block]
    assert covered == sorted(case.blocks)


@given(cases())
def test_pieces_are_as_few_as_the_rules_allow(case: Case) -> None:
    pieces = pieces_of(case.changed, case.ownership)
    fewest = length = 0
    for block in sorted(case.blocks):
        now, before = case.blocks[block], case.blocks.get(block - 1)
        goes_on = (
            before is not None
            and (before.hole, before.owner, before.claims) == (now.hole, now.owner, now.claims)
            and now.diff == (HOLE if before.diff == HOLE else before.diff + 1)
        )
        length = length + 1 if goes_on and length < MAX_PIECE_BLOCKS else 1
        fewest += length == 1
    assert len(pieces.op_block) == fewest


@given(cases(), st.sets(st.integers(10, 15)))
def test_a_file_needs_the_pieces_with_its_blocks(case: Case, wanted: set[int]) -> None:
    pieces = pieces_of(case.changed, case.ownership)
    inode = np.array([14, 10, 12, 11, 12, 13], np.uint64)  # 12 stands twice: deleted, and new
    present = np.array([int(number) in wanted for number in inode])
    present[2] = False
    start, need = needs_of(pieces, inode, present)
    assert len(start) == len(inode) + 1
    for row, number in enumerate(inode.tolist()):
        told = need[int(start[row]) : int(start[row + 1])].tolist()
        expected = {
            piece for piece in range(len(pieces.op_block)) if present[row] and number in case.blocks[int(pieces.op_block[piece])].claims
        }
        assert told == sorted(expected)


def test_a_claim_told_twice_is_needed_once() -> None:
    one = np.ones(1, np.uint64)
    changed = ChangedRuns(one, one, one, np.zeros(1, np.bool_))
    ownership = Ownership(one, one, np.array([Owner.FILE], np.uint8), np.zeros(2, np.uint32), np.array([12, 12], np.uint64))
    start, need = needs_of(pieces_of(changed, ownership), np.array([12], np.uint64), np.ones(1, np.bool_))
    assert start.tolist() == [0, 1]
    assert need.tolist() == [0]


def test_a_changed_block_without_owner_is_refused() -> None:
    one = np.ones(1, np.uint64)
    none = Ownership(one[:0], one[:0], one[:0].astype(np.uint8), one[:0].astype(np.uint32), one[:0])
    with pytest.raises(ValueError, match="block 1 "):
        pieces_of(ChangedRuns(one, one, one, np.zeros(1, np.bool_)), none)
