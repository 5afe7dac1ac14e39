"""The inode-to-name index on real directories, and on paths that no healthy filesystem has."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from agent.differential.names import NameIndex, load, renamed_inodes, save, updated, walked


def index_of(root: Path) -> NameIndex:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return walked(fd)
    finally:
        os.close(fd)


def rows(index: NameIndex) -> set[tuple[int, int, bytes]]:
    return {(int(index.child[row]), int(index.parent[row]), index.name(row)) for row in range(len(index))}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for directory in ("a/b/c", "d", "e"):
        (root / directory).mkdir(parents=True)
    for name in ("a/one", "a/b/two", "a/b/c/three", "d/four"):
        (root / name).write_text(name)
    os.link(root / "a/one", root / "d/also one")
    with open(os.fsencode(root) + b"/e/\xff\n", "wb"):
        pass
    return root


def inode(path: Path) -> int:
    return path.lstat().st_ino


def test_every_name_has_its_path(tree: Path) -> None:
    index, root = index_of(tree), inode(tree)
    assert {path for _, path in index.paths_of(inode(tree / "a/one"), root)} == {b"a/one", b"d/also one"}
    assert index.paths_of(inode(tree / "a/b/c/three"), root) == [(inode(tree / "a/b/c"), b"a/b/c/three")]
    assert index.paths_of(root, root) == [(root, b"")]
    assert index.paths_of(1, root) == []
    odd = next(os.scandir(os.fsencode(tree) + b"/e")).inode()
    assert index.paths_of(odd, root) == [(inode(tree / "e"), b"e/\xff\n")]


def test_an_updated_index_is_the_one_a_walk_makes(tree: Path) -> None:
    before = index_of(tree)
    changed = [tree / "a", tree / "d", tree / "a/b"]
    gone = inode(tree / "a/b/c")
    (tree / "a/one").rename(tree / "d/moved")
    (tree / "a/new").write_text("new")
    (tree / "a/b/c/three").unlink()
    (tree / "a/b/c").rmdir()
    directories = [(inode(path), os.open(path, os.O_RDONLY)) for path in changed]
    try:
        after = updated(before, np.array([gone, *(number for number, _ in directories)], np.uint64), directories)
    finally:
        for _, fd in directories:
            os.close(fd)
    assert rows(after) == rows(index_of(tree))
    assert bool(np.all(after.child[1:] >= after.child[:-1]))
    renamed = renamed_inodes(before, after, np.array([gone, *(number for number, _ in directories)], np.uint64))
    assert set(renamed.tolist()) == {child for child, _, _ in rows(before) ^ rows(after)}


def test_a_stored_index_comes_back_and_a_damaged_one_does_not(tree: Path, tmp_path: Path) -> None:
    index, path = index_of(tree), tmp_path / "g.names"
    assert load(path) is None
    save(index, path)
    found = load(path)
    assert found is not None
    assert rows(found) == rows(index)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert load(path) is None, at
        path.write_bytes(whole[:at])
        assert load(path) is None, at


def test_directories_beneath_themselves_have_no_path() -> None:
    names = np.frombuffer(b"abcd", np.uint8)
    index = NameIndex(
        np.array([10, 11, 12, 13], np.uint64),
        np.array([11, 10, 99, 10], np.uint64),
        np.arange(4, dtype=np.uint64),
        np.ones(4, np.uint32),
        names,
    )
    for number in (10, 11, 12, 13):
        assert index.paths_of(number, 2) == []
