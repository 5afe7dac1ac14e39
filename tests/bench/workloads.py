"""What the cycle's benchmark puts on a volume and changes there. Everything follows from the seed, so that two volumes get the same."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mgmt.drill import workload

BLOCK: Final = 4096
MIB: Final = 1 << 20
_FILES_A_FOLDER: Final = 250
_PAGE: Final = 8192


@dataclass(frozen=True, slots=True)
class Workload:
    """``fill(root)`` makes the content, ``change(root, seed)`` one cycle's change; ``volume_bytes`` is room enough for both."""

    name: str
    says: str
    volume_bytes: int
    files: int
    fill: Callable[[Path], None]
    change: Callable[[Path, int], None]


def drill_tree(files: int) -> Workload:
    """Return the drill's own: real files of this machine, a tenth of them changed in every way."""
    return Workload(
        "drill tree",
        f"{files:,} real and odd files, 10 % changed in every way in which files change",
        max(512, files // 10) * MIB,
        files,
        lambda root: _ignore(workload.fill(root, files, files * 36_000, 1, lambda done, total: None)),
        lambda root, seed: _ignore(workload.change(root, files // 10, seed, lambda done, total: None)),
    )


def small_files(files: int) -> Workload:
    """Return many files of 1 to 8 KiB, of which 1 % are changed."""

    def fill(root: Path) -> None:
        generator = random.Random(2)
        for number in range(files):
            path = _small(root, number)
            if number % _FILES_A_FOLDER == 0:
                path.parent.mkdir(parents=True)
            path.write_bytes(generator.randbytes(generator.randrange(1024, 8192)))

    def change(root: Path, seed: int) -> None:
        generator = random.Random(seed)
        for number in generator.sample(range(files), max(1, files // 100)):
            with _small(root, number).open("r+b") as file:
                file.write(generator.randbytes(generator.randrange(512, 4096)))

    return Workload("small files", f"{files:,} files of 1 to 8 KiB, 1 % rewritten", max(512, files // 50) * MIB, files, fill, change)


def large_files(mib: int) -> Workload:
    """Return eight large files together ``mib`` MiB, 1 % of whose blocks are rewritten at random."""
    each = mib * MIB // 8

    def change(root: Path, seed: int) -> None:
        for number in range(8):
            _rewrite(root / f"large{number}", each, BLOCK, each // BLOCK // 100, random.Random(seed * 8 + number))

    return Workload(
        "large files", f"8 files of {each / MIB:g} MiB, 1 % of their 4 KiB blocks rewritten at random", max(512 * MIB, 2 * mib * MIB), 8,
        lambda root: _incompressible(root, 8, each), change,
    )  # fmt: skip


def database(mib: int) -> Workload:
    """Return one file of ``mib`` MiB that compresses, with random rewrites of 8 KiB, 2 % of it."""

    def fill(root: Path) -> None:
        generator = random.Random(4)
        with (root / "large0").open("wb") as file:
            for _ in range(mib):
                file.write(_rows(generator, MIB))

    def change(root: Path, seed: int) -> None:
        _rewrite(root / "large0", mib * MIB, _PAGE, mib * MIB // _PAGE // 50, random.Random(seed), _rows)

    return Workload(
        "database",
        f"one file of {mib} MiB of text rows, 2 % of its 8 KiB pages rewritten at random",
        max(512 * MIB, 2 * mib * MIB),
        1,
        fill,
        change,
    )


def _ignore(result: object) -> None:
    """Let a function that returns what it did be one that returns nothing."""


def _small(root: Path, number: int) -> Path:
    folder = number // _FILES_A_FOLDER
    return root / f"d{folder // 100:03}" / f"d{folder % 100:02}" / f"f{number % _FILES_A_FOLDER:03}"


def _incompressible(root: Path, files: int, each: int) -> None:
    for number in range(files):
        generator = random.Random(3 * files + number)
        with (root / f"large{number}").open("wb") as file:
            for _ in range(each // MIB):
                file.write(generator.randbytes(MIB))


def _rewrite(
    path: Path,
    size: int,
    unit: int,
    count: int,
    generator: random.Random,
    data: Callable[[random.Random, int], bytes] = random.Random.randbytes,
) -> None:
    file_fd = os.open(path, os.O_WRONLY)
    try:
        for _ in range(count):
            os.pwrite(file_fd, data(generator, unit), generator.randrange(size // unit) * unit)
    finally:
        os.close(file_fd)


def _rows(generator: random.Random, length: int) -> bytes:
    """Return text that compresses to about a third."""
    row = b"%010d|customer-%06d|open|2026-01-%02d|amount=%08.2f|note=as agreed by telephone, to be confirmed in writing\n"
    rows = -(-length // 100)
    return b"".join(
        row % (generator.getrandbits(33), generator.randrange(10**6), generator.randrange(1, 29), generator.random() * 10**5)
        for _ in range(rows)
    )[:length]
