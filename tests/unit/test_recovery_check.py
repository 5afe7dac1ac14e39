"""The update instruction against this node's own record."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest

from agent.contract.arrival import COMPLETE, ArrivalRecord, Arrived
from agent.contract.dmi import Change, Dmi
from agent.contract.errors import FileNotWhole, RequestRefused
from agent.contract.messages import Deletions, UpdateInstruction
from agent.recovery.check import check_instruction
from tests.unit.mgmt_dmis import TRANSFER, File, arrived, make


@pytest.fixture
def dmi() -> Dmi:
    files = [
        File((b"whole",), needs=(0, 1)),
        File((b"torn\x1b",), needs=(1, 2)),
        File((b"empty",), Change.NEW),
        File((), Change.DELETED, base_paths=(b"gone",)),
        File((), Change.NAMELESS, base_paths=(b"open",)),
    ]
    return make(files, 3)


def record(dmi: Dmi, last: int = int(Arrived.UPDATE)) -> ArrivalRecord:
    return arrived(dmi, [COMPLETE, COMPLETE, last])


def instruction(*files: int, digest: str = "00" * 16) -> UpdateInstruction:
    return UpdateInstruction(TRANSFER, digest, files, Deletions.HOLD, complete=False)


def test_whole_files_pass_in_order_and_nameless_ones_are_left_out(dmi: Dmi) -> None:
    assert check_instruction(instruction(4, 2, 0), dmi, record(dmi)) == (0, 2)


@pytest.mark.parametrize("last", [0, int(Arrived.UPDATE), int(Arrived.DIFFERENTIAL), COMPLETE | int(Arrived.BASE_DIFFERS)])
def test_a_file_that_is_not_whole_here_is_named(dmi: Dmi, last: int) -> None:
    with pytest.raises(FileNotWhole, match=r"torn\\x1b.* 1 of 2 pieces"):
        check_instruction(instruction(0, 1), dmi, record(dmi, last))


def test_a_healed_piece_counts(dmi: Dmi) -> None:
    assert check_instruction(instruction(1), dmi, record(dmi, COMPLETE | int(Arrived.HEALED))) == (1,)


@pytest.mark.parametrize("files", [(3,), (5,), (-1,), (0, 0), (2**40,)])
def test_what_cannot_be_stored_is_refused(dmi: Dmi, files: tuple[int, ...]) -> None:
    with pytest.raises(RequestRefused):
        check_instruction(instruction(*files), dmi, record(dmi))


def test_an_instruction_that_is_complete_leaves_nothing_out(dmi: Dmi) -> None:
    whole = record(dmi, COMPLETE)
    said = UpdateInstruction(TRANSFER, "00" * 16, (0, 1, 2), Deletions.HOLD, complete=True)
    assert check_instruction(said, dmi, whole) == (0, 1, 2)
    with pytest.raises(RequestRefused, match="leaves files out"):
        check_instruction(replace(said, files=(0, 1)), dmi, whole)


def test_an_instruction_of_another_dmi_is_refused(dmi: Dmi) -> None:
    with pytest.raises(RequestRefused):
        check_instruction(instruction(0, digest="01" * 16), dmi, record(dmi))
    other = UpdateInstruction(uuid4(), "00" * 16, (0,), Deletions.HOLD, complete=False)
    with pytest.raises(RequestRefused):
        check_instruction(other, dmi, record(dmi))
