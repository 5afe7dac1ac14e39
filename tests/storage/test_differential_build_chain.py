"""Several generations after one another under random changes: what is carried from one to the next stays what a fresh look finds."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agent.contract.identity import FilesystemKind
from agent.differential import digests, names
from agent.differential.names import NameIndex
from tests.storage.differential_truth import Tree, check_blocks, check_files, check_owners, tree_of
from tests.storage.frozen_images import built, command, freeze_copy, generation, make_ext4, mounted, view

GENERATIONS = 4
STEPS = 120


def random_changes(root: Path, noise: random.Random, steps: int) -> None:
    """Change the tree in small random steps; each keeps the tree well formed."""
    actions: list[Callable[[Path, random.Random, list[Path], list[Path]], None]] = [
        _create, _create, _append, _overwrite, _truncate, _remove, _rename, _link, _directory, _attribute, _exchange,
    ]  # fmt: skip
    for _ in range(steps):
        files = sorted(path for path in root.rglob("*") if not path.is_dir() and not path.is_symlink())
        directories = [root, *sorted(path for path in root.rglob("*") if path.is_dir() and path.name != "lost+found")]
        noise.choice(actions)(root, noise, files, directories)


def _create(root: Path, noise: random.Random, files: list[Path], directories: list[Path]) -> None:
    path = noise.choice(directories) / f"f{noise.randrange(10**9)}"
    if noise.random() < 0.2:
        path.symlink_to("x" * noise.randrange(1, 200))
    else:
        path.write_bytes(noise.randbytes(noise.choice([0, 30, 5000, 60_000])))


def _append(root: Path, noise: random.Random, files: list[Path], directories: list[Path]) -> None:
    if files:
        with open(noise.choice(files), "ab") as file:
            file.write(noise.randbytes(noise.randrange(1, 20_000)))


def _overwrite(root: Path, noise: random.Random, files: list[Path], directories: list[Path]) -> None:
    if files:
        with open(noise.choice(files), "r+b") as file:
            os.pwrite(file.fileno(), noise.randbytes(100), noise.randrange(0, 200_000))


def _truncate(root: Path, noise: random.Random, files: list[Path], directories: list[Path]) -> None:
    if files:
        os.truncate(noise.choice(files), noise.randrange(0, 100_000))


def _remove(root: Path, noise: random.Random, files: list[Path], directories: list[Path]) -> None:
    if files and noise.random() < 0.8:
        noise.choice(files).unlink()
    elif len(directories) > 5:
        command("rm", "-rf", str(directories[-1]))


def _rename(root: Path, noise: random.Random, files: list[Path], directories: list[Path]) -> None:
    if files and noise.random() < 0.7:
        noise.choice(files).rename(noise.choice(directories) / f"r{noise.randrange(30)}.file")
    elif len(directories) > 2:
        old, new = noise.sample(directories[1:], 2)
        if not new.is_relative_to(old):
            old.rename(new / f"r{noise.randrange(10**9)}")


def _link(root: Path, noise: random.Random, files: list[Path], directories: list[Path]) -> None:
    if files:
        os.link(noise.choice(files), noise.choice(directories) / f"l{noise.randrange(10**9)}")


def _directory(root: Path, noise: random.Random, files: list[Path], directories: list[Path]) -> None:
    (noise.choice(directories) / f"d{noise.randrange(10**9)}").mkdir()


def _attribute(root: Path, noise: random.Random, files: list[Path], directories: list[Path]) -> None:
    path = noise.choice(files + directories)
    match noise.randrange(4):
        case 0:
            path.chmod(noise.randrange(0o1000) | 0o600 | (0o100 if path.is_dir() else 0))
        case 1:
            os.chown(path, noise.randrange(70_000), noise.randrange(70_000))
        case 2:
            os.utime(path, ns=(0, noise.randrange(-(10**18), 10**18)))
        case _:
            os.setxattr(path, "user.word", noise.randbytes(noise.randrange(0, 1500)))


def _exchange(root: Path, noise: random.Random, files: list[Path], directories: list[Path]) -> None:
    if len(files) > 1:
        one, other = noise.sample(files, 2)
        between = root / "between"
        one.rename(between)
        other.rename(one)
        between.rename(other)


def entries(index: NameIndex) -> set[tuple[int, int, bytes]]:
    return {(int(index.child[row]), int(index.parent[row]), index.name(row)) for row in range(len(index))}


@pytest.mark.parametrize("kind", list(FilesystemKind))
@pytest.mark.parametrize("seed", range(3))
def test_what_is_carried_on_is_what_a_fresh_look_finds(tmp_path: Path, kind: FilesystemKind, seed: int) -> None:
    noise = random.Random(seed)
    image, mount_point = tmp_path / "operational.img", tmp_path / "mount"
    read_only, read_write = ("ro", "rw")
    if kind is FilesystemKind.EXT4:
        make_ext4(image, 96 << 20, *((), ("-O", "inline_data"), ("-O", "^metadata_csum", "-I", "128"))[seed])
    else:
        with open(image, "wb") as file:
            file.truncate(320 << 20)
        command("mkfs.xfs", "-q", "-f", "-m", f"rmapbt={seed % 2}", str(image))
        read_only, read_write = "ro,norecovery,nouuid", "rw,nouuid"
    targets = []
    with mounted(image, mount_point, read_write):
        for counter in range(1, GENERATIONS + 1):
            random_changes(mount_point, noise, STEPS)
            targets.append(tmp_path / f"g{counter}.img")
            freeze_copy(mount_point, image, targets[-1])
    image.unlink()
    base, before = None, None
    for counter, target in enumerate(targets, start=1):
        told = built(tmp_path, base, target, counter=counter, kind=kind, options=read_only)
        now = _look(target, tmp_path / "look", read_only, counter)
        check_blocks(told)
        check_files(told, before, now)
        if kind is FilesystemKind.EXT4:
            check_owners(told)
        if base:
            base.unlink()
        base, before = target, now


def _look(target: Path, where: Path, read_only: str, counter: int) -> Tree:
    """Return the tree of a generation, having compared its stored index and digest table with fresh ones."""
    state = where.parent / "state"
    with view(target, where, read_only) as looked:
        index = names.load(state / f"{generation(counter).name}.names")
        assert index is not None
        assert entries(index) == entries(names.walked(looked.mount_fd))
        size = target.stat().st_size
        table = digests.load(state / f"{generation(counter).name}.digests", size // 4096)
        assert table is not None
        assert np.array_equal(table, digests.computed(where.parent / "fresh.digests", looked.device, size))
        return tree_of(where)
