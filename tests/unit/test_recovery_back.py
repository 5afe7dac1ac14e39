"""Whether a roll back can be, and which way is taken where both can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agent.contract.arrival import COMPLETE, ArrivalRecord
from agent.contract.dmi import Change, Dmi, Owner
from agent.contract.identity import FilesystemKind
from agent.recovery.back import hindrance, is_cheaper
from tests.transfer_scene import make_differential


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dmi:
    return make_differential(tmp_path_factory.mktemp("back"), blocks=4096, pieces=800, files=800).dmi


def of_owner(made: Dmi, kind: FilesystemKind, owner: Owner, *, arrived: bool) -> tuple[Dmi, ArrivalRecord]:
    """A differential whose first piece has an owner, and did or did not arrive."""
    owners, bits = np.full(made.piece_total, Owner.FILE, np.uint8), np.full(made.piece_total, COMPLETE, np.uint8)
    owners[0], bits[0] = owner, COMPLETE * arrived
    return replace(made, head=replace(made.head, filesystem=kind), owner=owners), ArrivalRecord(made.head.transfer, bytes(16), bits, 0, 1)


@pytest.mark.parametrize("kind", list(FilesystemKind))
@pytest.mark.parametrize("owner", list(Owner))
def test_all_metadata_is_needed_and_xfs_needs_its_log(made: Dmi, kind: FilesystemKind, owner: Owner) -> None:
    needed = owner is Owner.METADATA or (owner is Owner.JOURNAL and kind is FilesystemKind.XFS)
    assert bool(hindrance(*of_owner(made, kind, owner, arrived=False))) is needed
    assert not hindrance(*of_owner(made, kind, owner, arrived=True))


def test_an_empty_base_has_nothing_to_go_back_to(made: Dmi) -> None:
    dmi, arrival = of_owner(made, FilesystemKind.EXT4, Owner.FILE, arrived=True)
    head = replace(dmi.head, base=replace(dmi.head.base, counter=0))
    assert hindrance(replace(dmi, head=head), arrival) == "the base is empty"


def test_little_that_is_missing_is_undone_and_little_that_came_is_stored(made: Dmi) -> None:
    rows = range(made.file_total)
    assert is_cheaper(made, rows, apply_deletions=False)
    assert not is_cheaper(made, rows[: len(rows) // 5], apply_deletions=False)


def test_deleted_files_that_are_held_have_to_come_back(made: Dmi) -> None:
    change = made.change.copy()
    change[:400] = Change.DELETED
    dmi, rows = replace(made, change=change), range(400, made.file_total)
    assert not is_cheaper(dmi, rows, apply_deletions=False)
    assert is_cheaper(dmi, rows, apply_deletions=True)
