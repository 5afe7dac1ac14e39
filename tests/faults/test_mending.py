"""A mend that dies: the damaged generation is as it was, or mended, and nothing of the mend is left."""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID, uuid4

import pytest

from agent.contract import messages as m
from agent.contract.errors import LandfallError, RequestRefused
from agent.contract.identity import empty_generation
from tests.faults.case import Case, images_equal
from tests.faults.phases import changed_block, fresh, rot, workspaces
from tests.faults.rig import Pair


def mend(case: Case, pair: Pair, block: int) -> UUID:
    """Let NAS 1 bring a block of the base to NAS 2; return the transfer."""
    transfer, empty = uuid4(), empty_generation(case.base.volume)
    pair.nas1.ask(m.BuildMend(transfer, case.base, ((block, 1),)))
    sent = pair.receive_and_send(transfer, empty, case.base, m.Differential.VERIFY, streams=1, silence_limit_s=2.0, mends=True)
    assert sent.pieces_sent == 1
    return transfer


def known(pair: Pair) -> set[bool]:
    """Return whether the transfers that both agents know are mends."""
    return {facts.mends for node in (pair.nas1, pair.nas2) for facts in node.ask(m.ListTransfers()).transfers}


@pytest.mark.parametrize("point", ["dst.before_write", "dst.before_commit", "substrate.replace.before", "substrate.replace.after"])
def test_B6_a_mend_that_dies_leaves_the_damaged_generation_or_the_mended_one(ext4_case: Case, point: str) -> None:
    case = ext4_case
    with fresh(case) as pair:
        block = changed_block(case, pair)
        pair.nas2.kill()
        rot(case, pair.nas2, block)
        pair.nas2.start_armed(f"{point}=kill")
        with suppress(LandfallError, OSError):
            mend(case, pair, block)
        pair.nas2.died_by(point)
        pair.nas2.start()
        assert images_equal(pair.nas2.image(case.base), case.source_image(case.base)) is (point == "substrate.replace.after")
        assert workspaces(pair.nas2, case) == []
        assert known(pair) == {False}, "both forget a mend that broke off"
        mend(case, pair, block)
        assert images_equal(pair.nas2.image(case.base), case.source_image(case.base))
        assert workspaces(pair.nas2, case) == []
        assert not pair.nas2.ask(m.ExamineGeneration(case.base)).written
        case.send(pair, m.Differential.VERIFY)  # the differential goes on from the mended base


def test_a_mend_of_nothing_or_beyond_the_end_is_refused(ext4_case: Case) -> None:
    case = ext4_case
    with fresh(case) as pair:
        for runs in ((), ((1 << 40, 1),), ((5, 2), (6, 1)), ((5, 0),)):
            with pytest.raises(RequestRefused):
                pair.nas1.ask(m.BuildMend(uuid4(), case.base, runs))
        assert known(pair) == {False}
