"""The DMI of two XFS generations, after every kind of change, held against mounts and images."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from agent.contract.dmi import Change, Side
from agent.contract.identity import FilesystemKind
from tests.storage.differential_truth import Tree, check_blocks, check_files, tree_of
from tests.storage.every_change import change, fill
from tests.storage.frozen_images import Built, built, command, freeze_copy, mounted, view

READ_ONLY = "ro,norecovery,nouuid"
FEATURES = {"rmapbt": ("-m", "rmapbt=1,reflink=1"), "no-rmapbt": ("-m", "rmapbt=0,reflink=1")}


@dataclass(frozen=True, slots=True)
class Case:
    """Both differentials of one scenario: g0 to g1 and g1 to g2."""

    first: Built
    second: Built
    g1: Tree
    g2: Tree


@pytest.fixture(scope="module", params=list(FEATURES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("xfs")
    noise = random.Random(str(request.param))
    image = folder / "operational.img"
    with open(image, "wb") as file:
        file.truncate(320 << 20)
    command("mkfs.xfs", "-q", "-f", *FEATURES[request.param], str(image))
    mount_point = folder / "mount"
    with mounted(image, mount_point, "rw,nouuid"):
        fill(mount_point, noise)
        command("cp", "--reflink=always", str(mount_point / "untouched"), str(mount_point / "same-blocks"))
        freeze_copy(mount_point, image, folder / "g1.img")
        with open(mount_point / "open-deleted", "r+b") as held, open(mount_point / "born-deleted", "wb") as born:
            (mount_point / "open-deleted").unlink()
            held.write(b"still written")
            (mount_point / "born-deleted").unlink()
            born.write(noise.randbytes(50_000))
            change(mount_point, noise)
            command("cp", "--reflink=always", str(mount_point / "append"), str(mount_point / "clone"))
            freeze_copy(mount_point, image, folder / "g2.img")
    first = built(folder, None, folder / "g1.img", counter=1, kind=FilesystemKind.XFS, options=READ_ONLY)
    second = built(folder, folder / "g1.img", folder / "g2.img", counter=2, kind=FilesystemKind.XFS, options=READ_ONLY)
    trees = []
    for name in ("g1", "g2"):
        with view(folder / f"{name}.img", folder / "look", READ_ONLY):
            trees.append(tree_of(folder / "look"))
    yield Case(first, second, trees[0], trees[1])
    for path in folder.glob("*.img"):
        path.unlink()


def test_first_differential_has_every_block_file_and_content(case: Case) -> None:
    check_blocks(case.first)
    check_files(case.first, None, case.g1)
    assert {int(change) & Change.NEW for change in case.first.dmi.change} == {Change.NEW}


def test_every_changed_block_is_in_one_piece(case: Case) -> None:
    check_blocks(case.second)


def test_every_changed_file_is_told_as_it_is(case: Case) -> None:
    check_files(case.second, case.g1, case.g2)


def test_shared_pieces_stand_under_every_file_that_has_them(case: Case) -> None:
    dmi = case.second.dmi
    rows = {
        path: row
        for row in range(dmi.file_total)
        for path in (b"append", b"clone")
        if path in {name for _, name in dmi.names(row, Side.TARGET)}
    }
    assert set(dmi.needs(rows[b"append"]).tolist()) & set(dmi.needs(rows[b"clone"]).tolist())
