"""Change a filled volume in every way in which files change. Everything follows from the seed and from what is there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mgmt.drill.fill import DATABASE, IMMUTABLE, ODD, Progress, set_acl

_BLOCK: Final = 4096
_PUNCH_HOLE: Final = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, include/uapi/linux/falloc.h
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class KindCount:
    """How many files one kind of change concerned."""

    kind: str
    files: int


@dataclass(frozen=True, slots=True)
class ChangeCounts:
    """What was changed. ``bytes_written`` is what programs wrote, without the filesystem's own."""

    kinds: tuple[KindCount, ...]
    bytes_written: int

    @property
    def files(self) -> int:
        """Files that were changed, made or deleted; each counts once."""
        return sum(kind.files for kind in self.kinds)


def change(root: Path, at_least: int, seed: int, on_progress: Progress) -> ChangeCounts:
    """Change at least ``at_least`` files below ``root``, or as many as there are; about 20 KiB each, and some large ones."""
    work = _Work(root, random.Random(seed ^ 0x5EED))
    plan = [operation for operation, weight in _OPERATIONS for _ in range(-(-at_least * weight // 100))]
    work.generator.shuffle(plan)
    for number, operation in enumerate(plan):
        operation(work)
        if number % 50 == 0:
            on_progress(number, len(plan))
    _database(work, max(16, at_least // 3))
    _large_files(work, at_least)
    _odd_ones(work)
    _directories(work, max(2, at_least // 200))
    while sum(work.counts.values()) < at_least and work.files:
        _append(work)
    on_progress(len(plan), len(plan))
    return ChangeCounts(tuple(KindCount(*item) for item in sorted(work.counts.items())), work.written)


class _Work:
    """The files that are still as they were, and what was done to the others."""

    def __init__(self, root: Path, generator: random.Random) -> None:
        self.root, self.generator = root, generator
        self.counts: Counter[str] = Counter()
        self.written = 0
        self.made = 0
        self.files: list[Path] = []
        self.directories: list[Path] = []
        held = {root / DATABASE, root / IMMUTABLE}
        for directory, folders, names in os.walk(root):
            folders.sort()
            if Path(directory).name == "lost+found":
                folders.clear()
                continue
            self.directories.append(Path(directory))
            for name in sorted(names):
                path = Path(directory) / name
                if path not in held and stat.S_ISREG(path.lstat().st_mode):
                    self.files.append(path)
        generator.shuffle(self.files)

    def take(self, *, smallest: int = 0, largest: int = 1 << 20) -> Path | None:
        """Return a file that nothing was done to, of a size between the two, and never again."""
        for at in range(len(self.files) - 1, max(-1, len(self.files) - 400), -1):
            if smallest <= self.files[at].lstat().st_size <= largest:
                return self.files.pop(at)
        return None

    def count(self, kind: str, files: int = 1) -> None:
        self.counts[kind] += files

    def data(self, length: int) -> bytes:
        self.written += length
        return self.generator.randbytes(length)

    def length(self) -> int:
        """A length as lengths of files are: half below 10 KiB, few above 100 KiB."""
        return min(int(self.generator.lognormvariate(9.2, 1.4)), 1 << 20)

    def new_name(self, directory: Path | None = None) -> Path:
        """Return a name that is not taken, also not by an earlier round of changes."""
        while True:
            self.made += 1
            path = (directory or self.generator.choice(self.directories)) / f"drill-{self.made:05}"
            if not os.path.lexists(path):
                return path


def _append(work: _Work) -> None:
    if path := work.take():
        with path.open("ab") as file:
            file.write(work.data(work.length()))
        work.count("append")


def _rewrite_in_place(work: _Work) -> None:
    if path := work.take(smallest=1):
        size = path.stat().st_size
        with path.open("r+b") as file:
            for _ in range(work.generator.randrange(1, 5)):
                file.seek(work.generator.randrange(size))
                file.write(work.data(min(work.generator.randrange(1, 2 * _BLOCK), max(1, size - file.tell()))))
        work.count("rewrite_in_place")


def _safe_save(work: _Work) -> None:
    """Write a temporary file, fsync, rename over: how editors save."""
    if path := work.take(largest=128 << 10):
        temporary = path.with_name(f".{work.made}.tmp")
        work.made += 1
        content = path.read_bytes()
        at = work.generator.randrange(len(content) + 1)
        status = path.stat()
        with temporary.open("xb") as file:
            file.write(content[:at] + work.data(work.generator.randrange(1, 2000)) + content[at:])
            os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
            if work.made % 20 == 0:  # an fsync each would make the drill wait for the disk and shows nothing more
                os.fsync(file.fileno())
        work.written += len(content)
        temporary.rename(path)
        work.count("safe_save")


def _create(work: _Work) -> None:
    path = work.new_name()
    path.write_bytes(work.data(work.length()) if work.generator.random() > 0.05 else b"")
    work.count("create")


def _delete(work: _Work) -> None:
    if path := work.take():
        path.unlink()
        work.count("delete")


def _rename(work: _Work) -> None:
    if path := work.take():
        path.rename(work.new_name(path.parent if work.generator.random() < 0.5 else None))
        work.count("rename")


def _rename_and_write(work: _Work) -> None:
    if path := work.take():
        moved = path.rename(work.new_name())
        with moved.open("ab") as file:
            file.write(work.data(work.length()))
        work.count("rename_and_append")


def _swap(work: _Work) -> None:
    if (first := work.take()) and (second := work.take()):
        between = work.new_name(first.parent)
        first.rename(between)
        second.rename(first)
        between.rename(second)
        if work.generator.random() < 0.3:
            with first.open("ab") as file:
                file.write(work.data(100))
        work.count("swap", 2)


def _mode(work: _Work) -> None:
    if path := work.take():
        path.chmod(stat.S_IMODE(path.stat().st_mode) ^ work.generator.choice((0o1, 0o20, 0o44, 0o111, 0o2000)))
        work.count("chmod")


def _owner(work: _Work) -> None:
    if path := work.take():
        os.chown(path, 3000 + work.generator.randrange(9), 3000)
        work.count("chown")


def _xattr(work: _Work) -> None:
    if path := work.take():
        with contextlib.suppress(OSError):  # ext4 has room for one block of attributes, and this file may have filled it
            os.setxattr(path, "user.drill", work.data(work.generator.choice((1, 50, 900))))
        if work.generator.random() < 0.3:
            set_acl(path, b"system.posix_acl_access", 3000)
        work.count("xattr")


def _times(work: _Work) -> None:
    if path := work.take():
        os.utime(path, ns=(0, work.generator.randrange(10**18)))
        work.count("mtime")


def _truncate_shorter(work: _Work) -> None:
    if path := work.take(smallest=2):
        os.truncate(path, work.generator.randrange(path.stat().st_size))
        work.count("truncate_shorter")


def _truncate_longer(work: _Work) -> None:
    if path := work.take():
        os.truncate(path, path.stat().st_size + work.generator.randrange(1, 200_000))
        work.count("truncate_longer")


def _punch(work: _Work) -> None:
    if path := work.take(smallest=3 * _BLOCK):
        blocks = path.stat().st_size // _BLOCK
        with path.open("r+b") as file:
            start = ctypes.c_int64(work.generator.randrange(blocks - 1) * _BLOCK)
            if _LIBC.fallocate(file.fileno(), _PUNCH_HOLE, start, ctypes.c_int64(_BLOCK + 100)):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(path))
        work.count("punch")


def _link_added(work: _Work) -> None:
    if path := work.take():
        os.link(path, work.new_name())
        work.count("link_added")


def _new_symlink(work: _Work) -> None:
    work.new_name().symlink_to("x" * work.generator.choice((5, 59, 60, 61, 400)))
    work.count("symlink_made")


_OPERATIONS: Final[tuple[tuple[Callable[[_Work], None], int], ...]] = (
    (_append, 15), (_rewrite_in_place, 15), (_safe_save, 15), (_create, 14), (_delete, 8), (_rename, 7), (_rename_and_write, 3), (_swap, 2),
    (_mode, 5), (_owner, 3), (_xattr, 4), (_times, 2), (_truncate_shorter, 4), (_truncate_longer, 2), (_punch, 2), (_link_added, 2),
    (_new_symlink, 1),
)  # fmt: skip
"""Kinds of change with their share in per cent; together a little over 100, as some find no file that fits."""


def _database(work: _Work, pages: int) -> None:
    """Rewrite scattered pages of the database, as a database does."""
    path = work.root / DATABASE
    if path.exists():
        blocks = path.stat().st_size // _BLOCK
        with path.open("r+b") as file:
            for _ in range(min(pages, blocks)):
                file.seek(work.generator.randrange(blocks) * _BLOCK)
                file.write(work.data(_BLOCK))
        work.count("database")


def _large_files(work: _Work, at_least: int) -> None:
    """Make three files that are large beside the others: a quarter of the changed bytes of the default drill."""
    for share in (1, 2, 4):
        with work.new_name(work.root).open("xb") as file:
            for _ in range(max(1, at_least * share * 1500 // (1 << 20))):
                file.write(work.data(1 << 20))
        work.count("create")


def _odd_ones(work: _Work) -> None:
    """Change links, symbolic links and special files where the volume was filled with odd ones."""
    odd = work.root / ODD
    if not odd.is_dir():
        return
    for group in (3, 4, 8, 9):
        name = odd / "links" / "place1" / f"linked{group}"
        if name.exists():
            name.unlink()
            work.count("link_removed")
    for link, to in (("symlink", "other"), ("symlink_long", "/".join(["far"] * 250)), ("symlink_medium", "short")):
        if (odd / link).is_symlink():
            (odd / link).unlink()
            (odd / link).symlink_to(to)
            work.count("symlink_retargeted")
    if not (odd / "fifo").exists():
        return  # changed in an earlier round
    (odd / "fifo").unlink()
    os.mkfifo(odd / "fifo_new")
    os.mknod(odd / "character_new", stat.S_IFCHR | 0o640, os.makedev(1, 5))
    os.chown(odd / "symlink_dangling", 1234, 1234, follow_symlinks=False)
    (odd / "block").chmod(0o600)
    (odd / "socket").rename(odd / "socket_moved")
    work.count("special", 6)


def _directories(work: _Work, number: int) -> None:
    """Rename, make, fill, and remove directories; the last, since it moves files that were taken before."""
    kept = {work.root, work.root / ODD}
    leaves = [path for path in work.directories if path not in kept and path.is_dir() and 1 <= len(list(path.iterdir())) <= 40]
    for path in work.generator.sample(leaves, min(number, len(leaves))):
        if path.is_dir():  # not moved with one above
            path.rename(work.new_name(path.parent))
            work.count("directory_rename")
    for _ in range(number):
        fresh = work.new_name(work.root)
        fresh.mkdir()
        (fresh / "inside").write_bytes(work.data(work.length()))
        (fresh / "empty").mkdir()
        work.count("directory_made", 3)
    for path in work.generator.sample(leaves, min(number, len(leaves))):
        if path.is_dir() and all(stat.S_ISREG(entry.lstat().st_mode) for entry in path.iterdir()) and path.name != "links":
            files = list(path.iterdir())
            for entry in files:
                entry.unlink()
            path.rmdir()
            work.count("directory_removed", 1 + len(files))
