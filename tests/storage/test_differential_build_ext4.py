"""The DMI of two ext4 generations, after every kind of change, held against mounts, images and debugfs."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from agent.contract.dmi import Change, Dmi, FileKind, Owner, Side
from tests.storage.differential_truth import Tree, check_blocks, check_files, check_owners, tree_of
from tests.storage.every_change import change, fill
from tests.storage.frozen_images import Built, built, freeze_copy, loop, make_ext4, mounted, view

FEATURES = {
    "default": (),
    "rich": ("-I", "256", "-O", "inline_data,ea_inode,metadata_csum_seed,orphan_file,meta_bg,^resize_inode"),
    "plain": ("-O", "^64bit,^flex_bg,^metadata_csum,uninit_bg", "-g", "8192"),
    "maps": ("-O", "^extents,^64bit,^metadata_csum", "-I", "128"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """Both differentials of one scenario: g0 to g1 and g1 to g2."""

    features: str
    first: Built
    second: Built
    g1: Tree
    g2: Tree
    noise: random.Random


@pytest.fixture(scope="module", params=list(FEATURES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("ext4")
    features = str(request.param)
    noise = random.Random(features)
    image = folder / "operational.img"
    make_ext4(image, 160 << 20, *FEATURES[features])
    mount_point = folder / "mount"
    with mounted(image, mount_point):
        fill(mount_point, noise)
        freeze_copy(mount_point, image, folder / "g1.img")
        with open(mount_point / "open-deleted", "r+b") as held, open(mount_point / "born-deleted", "wb") as born:
            (mount_point / "open-deleted").unlink()
            held.write(b"still written")
            (mount_point / "born-deleted").unlink()
            born.write(noise.randbytes(50_000))
            change(mount_point, noise, allocates=features != "maps")
            freeze_copy(mount_point, image, folder / "g2.img")
    first = built(folder, None, folder / "g1.img", counter=1)
    second = built(folder, folder / "g1.img", folder / "g2.img", counter=2)
    trees = []
    for name in ("g1", "g2"):
        with view(folder / f"{name}.img", folder / "look"):
            trees.append(tree_of(folder / "look"))
    yield Case(features, first, second, trees[0], trees[1], noise)
    for path in folder.glob("*.img"):
        path.unlink()


def row_of(dmi: Dmi, path: str | bytes, side: Side = Side.TARGET) -> int:
    wanted = os.fsencode(path)
    rows = [row for row in range(dmi.file_total) if any(name == wanted for _, name in dmi.names(row, side))]
    assert len(rows) == 1, (path, rows)
    return rows[0]


def test_first_differential_has_every_block_file_and_content(case: Case) -> None:
    check_blocks(case.first)
    check_files(case.first, None, case.g1)
    assert {int(change) & Change.NEW for change in case.first.dmi.change} == {Change.NEW}


def test_every_changed_block_is_in_one_piece(case: Case) -> None:
    check_blocks(case.second)


def test_every_changed_file_is_told_as_it_is(case: Case) -> None:
    check_files(case.second, case.g1, case.g2)


def test_owners_are_those_debugfs_tells(case: Case) -> None:
    check_owners(case.first)
    check_owners(case.second)
    assert Owner.FREE in case.second.dmi.owner
    assert Owner.METADATA in case.second.dmi.owner


def test_changes_are_classified(case: Case) -> None:
    dmi = case.second.dmi

    def change_of(path: str, side: Side = Side.TARGET) -> Change:
        return Change(int(dmi.change[row_of(dmi, path, side)]))

    for path in ("append", "in-place", "truncate", "grow", "small", "small-grows", "sparse", "deep", "punch", "punch-hidden"):
        assert change_of(path) & Change.CONTENT, path
        assert not change_of(path) & Change.NAMES, path
    assert change_of("chmod") == Change.ATTRIBUTES
    assert change_of("touch") == Change.ATTRIBUTES
    assert change_of("flags") == Change.ATTRIBUTES
    assert change_of("swap-a") == change_of("swap-b") == change_of("d1/moved") == change_of("d2/new-name") == Change.NAMES
    assert change_of("link-gone") == Change.NAMES
    for path in ("delete", "gone", "gone/below", "open-deleted", "shared-1"):
        assert change_of(path, Side.BASE) == Change.DELETED, path
    assert change_of("safe-save", Side.BASE) == Change.DELETED
    assert change_of("safe-save") & Change.NEW
    nameless = [row for row in range(dmi.file_total) if dmi.change[row] & Change.NAMELESS]
    assert len(nameless) == 1
    assert len(dmi.needs(nameless[0])) > 0
    paths = {path for row in range(dmi.file_total) for side in Side for _, path in dmi.names(row, side)}
    assert not paths & {b"untouched", b"filler", b"fifo", b"d2/new-name/inside", b"lost+found"}


def test_attributes_that_lstat_does_not_show(case: Case) -> None:
    dmi = case.second.dmi
    assert int(dmi.attr_flags[row_of(dmi, "flags")]) & 0x40
    if case.features == "rich":
        assert dmi.payload_of(row_of(dmi, "small")) == b"other in the inode"


def test_H9_a_hole_is_no_content_in_the_inode(case: Case) -> None:
    dmi = case.second.dmi
    row = row_of(dmi, "all-hole")
    assert int(dmi.size[row]) == 10_000
    assert dmi.payload_of(row) == b""
    assert dmi.extents(row) == []


def test_deep_trees_are_walked(case: Case) -> None:
    assert len(case.second.dmi.extents(row_of(case.second.dmi, "deep"))) > 600


def test_generations_can_be_attached_again(case: Case) -> None:
    with loop(case.second.target, read_only=True) as device:
        assert device.exists()


def test_kinds(case: Case) -> None:
    dmi = case.second.dmi
    for path, kind in (
        ("fifo-2", FileKind.FIFO),
        ("null", FileKind.CHARACTER),
        ("disk", FileKind.BLOCK),
        ("socket", FileKind.SOCKET),
        ("symlink-59", FileKind.SYMLINK),
        ("kind-change", FileKind.DIRECTORY),
    ):
        assert int(dmi.kind[row_of(dmi, path)]) == kind
