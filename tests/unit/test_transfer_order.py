"""The send order: every piece once, the most wanted and the smallest files first, each file's pieces together."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract.dmi import Change, Dmi, Owner
from agent.contract.identity import FilesystemKind
from agent.contract.messages import Differential
from agent.transfer.order import METADATA_AT, bytes_to_send, send_order
from tests.transfer_scene import make_differential


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dmi:
    return make_differential(tmp_path_factory.mktemp("order"), blocks=512, pieces=60, files=12).dmi


def by_the_book(dmi: Dmi, priority: dict[int, int], differential: Differential) -> list[int]:
    """The order as its description reads, one piece after another."""
    sizes = bytes_to_send(dmi, differential)
    named = [file for file in range(dmi.file_total) if not dmi.change[file] & Change.NAMELESS]
    named.sort(key=lambda file: (-priority.get(file, 0), int(sizes[dmi.needs(file)].sum()), file))
    needed = {row for file in named for row in dmi.needs(file).tolist()}
    total = sum(int(sizes[row]) for row in needed)
    with_metadata = [Owner.METADATA, Owner.JOURNAL] if dmi.head.filesystem is FilesystemKind.XFS else [Owner.METADATA]
    metadata = [row for row in range(dmi.piece_total) if row not in needed and dmi.owner[row] in with_metadata]
    order: list[int] = []
    for file in named:
        own = sorted(row for row in set(dmi.needs(file).tolist()) if row not in set(order))
        if metadata and sum(int(sizes[row]) for row in {*order, *own}) > METADATA_AT * total:
            order, metadata = order + metadata, []
        order += own
    order += metadata
    for owner in (Owner.FILE, Owner.FREE, Owner.JOURNAL):
        order += [row for row in range(dmi.piece_total) if row not in set(order) and dmi.owner[row] == owner]
    return order


@given(data=st.data())
@settings(max_examples=60)
def test_the_order_is_the_one_described(made: Dmi, data: st.DataObject) -> None:
    files = made.file_total
    nameless = data.draw(st.sets(st.integers(0, files - 1), max_size=5))
    change = made.change.copy()
    change[list(nameless)] |= int(Change.NAMELESS)
    owner = np.array(data.draw(st.lists(st.integers(0, 3), min_size=made.piece_total, max_size=made.piece_total)), dtype=np.uint8)
    head = replace(made.head, filesystem=data.draw(st.sampled_from(FilesystemKind)))
    dmi = replace(made, head=head, change=change, owner=owner)
    folder = data.draw(st.integers(0, 2))
    single = data.draw(st.integers(0, files - 1))
    priorities = ((f"/d{folder}/", 3), (f"d{single % 3}/f{single}", data.draw(st.integers(-4, 4))))
    priority = {file: 3 for file in range(files) if file % 3 == folder} | {single: priorities[1][1]}
    differential = data.draw(st.sampled_from(Differential))
    order = send_order(dmi, priorities, differential)
    assert order.dtype == np.uint32
    assert order.tolist() == by_the_book(dmi, priority, differential)


def test_a_prefix_ends_at_a_component(made: Dmi) -> None:
    first = made.needs(1).tolist()
    order = send_order(made, (("d1/f1", 9),)).tolist()  # not d1/f10
    assert sorted(order[: len(first)]) == sorted(first)
    assert send_order(made, (("d1/f", 9), ("d", 9), ("f1", 9))).tolist() == send_order(made, ()).tolist()


def test_a_prefix_of_everything_changes_nothing(made: Dmi) -> None:
    assert send_order(made, (("/", 5),)).tolist() == send_order(made, ()).tolist()


def test_at_any_moment_the_smallest_files_are_whole(made: Dmi) -> None:
    order = send_order(made, ()).tolist()
    position = {row: at for at, row in enumerate(order)}
    sizes = bytes_to_send(made, Differential.VERIFY)
    needs = [made.needs(file).tolist() for file in range(made.file_total)]
    whole_at = [max((position[row] for row in rows), default=-1) for rows in needs]
    by_size = np.argsort([int(sizes[rows].sum()) for rows in needs], kind="stable")
    assert np.all(np.diff(np.maximum.accumulate(np.array(whole_at)[by_size])) >= 0)
    assert whole_at[by_size[0]] <= len(needs[by_size[0]])


def test_nothing_has_an_order(tmp_path: Path) -> None:
    dmi = make_differential(tmp_path, pieces=0, files=0).dmi
    assert send_order(dmi, (("a", 1),)).tolist() == []
