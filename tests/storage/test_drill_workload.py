"""The drill's workload on small volumes: it is what its seed says, and has every kind of file and change."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgmt.drill.checker.trees import Tree, read_tree
from mgmt.drill.workload import IMMUTABLE, ODD, change, fill
from tests.storage.checker_scene import make, run, writable

BYTES = 24 << 20


def quiet(_done: int, _total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tree to take files from."""
    root = tmp_path_factory.mktemp("real")
    for number in range(400):
        place = root / "share" / f"part{number % 23}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"file{number}").write_bytes(os.urandom(17 * number))
    return root


@pytest.fixture(params=["ext4", "xfs"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    make(tmp_path / "volume.img", request.param)
    with writable(tmp_path / "volume.img", tmp_path / "volume", request.param) as root:
        yield root
        run("chattr", "-i", root / IMMUTABLE)


def contents(tree: Tree) -> dict[bytes, tuple[int, bytes]]:
    return {path: (node.mode, node.content) for path, node in tree.nodes.items()}


def test_fill_makes_real_and_odd_files_within_its_limit(volume: Path, real: Path) -> None:
    seen: list[tuple[int, int]] = []
    filled = fill(volume, 2000, BYTES, 5, lambda done, total: seen.append((done, total)), sources=[real])
    tree = read_tree(volume, "volume", handles=True)
    assert filled.real_files + filled.odd_files == 2000
    assert seen[-1] == (2000, 2000)
    assert filled.bytes <= BYTES
    kinds = {node.kind for node in tree.nodes.values()}
    assert kinds == {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK}
    names = {name for node in tree.nodes.values() for name, _ in node.xattrs}
    assert {b"user.landfall", b"trusted.landfall", b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"} <= names
    assert any(len(paths) > 2 for paths in tree.links.values())
    assert any(len(os.path.split(path)[1]) == 255 for path in tree.nodes)
    assert {node.flags for node in tree.nodes.values()} >= {0x10, 0x40}
    assert any(path.startswith(b"again1/") for path in tree.nodes)


def test_the_same_seed_does_the_same_and_another_seed_does_not(real: Path, tmp_path: Path) -> None:
    runs = []
    for number, seed in enumerate((5, 5, 6)):
        make(tmp_path / f"{number}.img", "ext4")
        with writable(tmp_path / f"{number}.img", tmp_path / "turn", "ext4") as root:
            fill(root, 1500, BYTES, seed, quiet, sources=[real])
            counts = change(root, 200, seed, quiet)
            runs.append((counts, contents(read_tree(root, "turn", handles=False))))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_change_does_every_kind_of_change(volume: Path, real: Path) -> None:
    fill(volume, 2000, BYTES, 5, quiet, sources=[real])
    before = read_tree(volume, "before", handles=True)
    counts = change(volume, 300, 5, quiet)
    after = read_tree(volume, "after", handles=True)
    assert counts.files >= 300
    assert {kind.kind for kind in counts.kinds} == {
        "append", "chmod", "chown", "create", "database", "delete", "directory_made", "directory_removed", "directory_rename", "link_added",
        "link_removed", "mtime", "punch", "rename", "rename_and_append", "rewrite_in_place", "safe_save", "special", "swap", "symlink_made",
        "symlink_retargeted", "truncate_longer", "truncate_shorter", "xattr",
    }  # fmt: skip
    differing = sum(before.nodes.get(path) != node for path, node in after.nodes.items() if not node.is_directory)
    assert differing + len(before.nodes.keys() - after.nodes.keys()) >= 300
    assert after.nodes[os.fsencode(IMMUTABLE)] == before.nodes[os.fsencode(IMMUTABLE)]
    assert (volume / ODD).is_dir()
