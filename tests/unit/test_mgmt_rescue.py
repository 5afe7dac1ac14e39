"""What is brought of a node that returned, and where to: the decisions, without a node."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.errors import RequestRefused
from agent.contract.identity import GenerationId, empty_generation
from mgmt.failover.rescue import LONGEST_NAME_BYTES, Destination, place_of
from mgmt.failover.returned import ChangedFile, Comparison, HeldFile, Here, Returned, There

VOLUME = UUID(int=3)
KEPT = GenerationId(VOLUME, 1, 7, "5f3a9c21" + "0" * 24)
LISTS = Returned(
    "nas1",
    "nas2",
    KEPT,
    empty_generation(VOLUME),
    Comparison(
        (HeldFile("a/\udcffb", "regular", 5, -1, "00", There.NEW, Here.UNTOUCHED),),
        (ChangedFile("c", "regular", 1, deleted=True),),
    ),
)
BESIDE = Destination()
names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=80).filter(
    lambda name: name not in {".", ".."} and len(os.fsencode(name)) <= LONGEST_NAME_BYTES
)


@pytest.mark.parametrize(
    ("path", "wanted", "is_folder", "at"),
    [
        ("report.doc", "report.doc", False, "report.nas1-g00000007-5f3a9c21.doc"),
        ("a/x.tar.gz", "a/x.tar.gz", False, "a/x.tar.nas1-g00000007-5f3a9c21.gz"),
        ("a/.profile", "a/.profile", False, "a/.profile.nas1-g00000007-5f3a9c21"),
        ("a/b/c.txt", "a", True, "a.nas1-g00000007-5f3a9c21/b/c.txt"),
        ("x/a.d/b", "x/a.d", True, "x/a.d.nas1-g00000007-5f3a9c21/b"),
        ("x/a.d", "x/a.d", True, "x/a.d.nas1-g00000007-5f3a9c21"),
        ("a/b", "", True, "rescued.nas1-g00000007-5f3a9c21/a/b"),
    ],
)
def test_a_file_comes_beside_its_original_under_a_name_that_says_where_it_is_from(path: str, wanted: str, is_folder: bool, at: str) -> None:
    assert place_of(path, wanted, LISTS, BESIDE, is_folder=is_folder) == at
    assert place_of(path, wanted, LISTS, Destination(in_place=True), is_folder=is_folder) == path
    assert place_of(path, wanted, LISTS, Destination(folder="/to/here/"), is_folder=is_folder) == f"to/here/{path}"


@given(above=st.lists(names, max_size=3), below=st.lists(names, max_size=3), name=names)
def test_every_place_is_one_that_a_filesystem_takes(above: list[str], below: list[str], name: str) -> None:
    wanted = "/".join([*above, name])
    path = "/".join([*above, name, *below])
    at = place_of(path, wanted, LISTS, BESIDE, is_folder=bool(below))
    assert at != path
    assert at.count("/") == path.count("/"), "the directories above are made as the generation has them"
    assert all(0 < len(os.fsencode(part)) <= LONGEST_NAME_BYTES for part in at.split("/"))
    assert KEPT.name in at


def test_the_longest_name_is_cut_between_characters() -> None:
    at = place_of("ü" * 120 + ".doc", "ü" * 120 + ".doc", LISTS, BESIDE, is_folder=False)
    assert at.startswith("üüü")
    assert at.endswith(f"{KEPT.name}.doc")
    at.encode()


def test_the_lists_are_read_as_they_were_stored(tmp_path: Path) -> None:
    path = tmp_path / "lists.json"
    path.write_text(LISTS.to_json())
    assert Returned.from_json(path.read_text()) == LISTS
    for damaged in ("", "[]", LISTS.to_json()[:-1], '{"held": [], "changed": []}'):
        with pytest.raises(RequestRefused):
            Returned.from_json(damaged)
