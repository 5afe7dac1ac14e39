"""Fill a volume with real and odd files. Everything follows from the seed and from what the machine has.

Real files are taken from the machine's own trees, with their directories; odd ones are made here. ``landfall-odd`` holds the odd ones and
``landfall-odd/database`` is the file that ``changes`` rewrites in place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.system import attributes

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""

SOURCES = (Path("/usr/share"), Path("/usr/lib"), Path("/usr/include"), Path("/usr/bin"), Path("/etc"))
ODD = "landfall-odd"
DATABASE = f"{ODD}/database"
IMMUTABLE = f"{ODD}/immutable"

_LARGEST_REAL = 4 << 20
_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Filled:
    """What was put on the volume. ``bytes`` are of content, without holes and the filesystem's own."""

    real_files: int
    odd_files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _Source:
    path: Path
    under: Path  # path in the volume
    size: int


def fill(root: Path, files: int, bytes_limit: int, seed: int, on_progress: Progress, *, sources: Sequence[Path] = SOURCES) -> Filled:
    """Put ``files`` files of at most ``bytes_limit`` bytes together below ``root``, as many of them real as there is room for.

    Where the machine's trees have too few files, they are taken again under another top directory.
    """
    generator = random.Random(seed)
    odd_files, odd_bytes = _make_odd(root, bytes_limit // 8, generator)
    wanted, budget = max(0, files - odd_files), bytes_limit - odd_bytes
    found = _real_files(sources)
    generator.shuffle(found)
    copied = used = turn = 0
    made: set[Path] = set()
    while copied < wanted and found:
        for source in found:
            if copied >= wanted:
                break
            left = max(budget - used, 0) // (wanted - copied)
            # A file may take several times its share, so that sizes stay as uneven as real ones are.
            if source.size > max(12 * left, 4096) or used + source.size > budget:
                continue
            destination = root / (f"again{turn}" if turn else ".") / source.under
            if _copy(source, destination, made, generator):
                copied += 1
                used += source.size
                if copied % 100 == 0:
                    on_progress(copied + odd_files, files)
        turn += 1
        if turn > 64 or not used:
            break
    _owners(root, sorted(made), generator)
    on_progress(copied + odd_files, files)
    return Filled(copied, odd_files, used + odd_bytes)


def _real_files(sources: Sequence[Path]) -> list[_Source]:
    found = []
    for source in sources:
        for directory, folders, names in os.walk(source):
            folders.sort()
            for name in sorted(names):
                path = Path(directory) / name
                try:
                    status = path.lstat()
                except OSError:
                    continue
                if stat.S_ISREG(status.st_mode) and status.st_size <= _LARGEST_REAL and len(os.fsencode(name)) < 200:
                    found.append(_Source(path, path.relative_to(source.anchor), status.st_size))
    return found


def _copy(source: _Source, destination: Path, made: set[Path], generator: random.Random) -> bool:
    try:
        content = source.path.read_bytes()
    except OSError:  # gone meanwhile, or not for us
        return False
    if destination.parent not in made:
        destination.parent.mkdir(parents=True, exist_ok=True)
        made.add(destination.parent)
    with destination.open("wb", buffering=0) as file:
        file.write(content)
        os.fchmod(file.fileno(), generator.choice((0o644, 0o644, 0o644, 0o755, 0o600, 0o664)))
        if generator.random() < 0.2:
            os.fchown(file.fileno(), 1000 + generator.randrange(8), 1000 + generator.randrange(4))
        second = generator.randrange(1_000_000_000, 1_760_000_000)
        os.utime(file.fileno(), ns=(second * 10**9, second * 10**9 + generator.randrange(10**9)))
    return True


def _owners(root: Path, directories: Sequence[Path], generator: random.Random) -> None:
    """Give some directories an owner, a set-group-id bit and a default ACL."""
    for path in directories:
        if generator.random() < 0.05:
            os.chown(path, 1000 + generator.randrange(8), 1000)
            path.chmod(0o2775)
    for path in generator.sample(directories, min(5, len(directories))):
        set_acl(path, b"system.posix_acl_default", 1000 + generator.randrange(8))


def set_acl(path: Path, name: bytes, user: int) -> None:
    """Give ``user`` read and execute by an ACL, in the kernel's own encoding (include/uapi/linux/posix_acl_xattr.h)."""
    none = 0xFFFFFFFF
    entries = [(0x01, 7, none), (0x02, 5, user), (0x04, 5, none), (0x10, 5, none), (0x20, 0, none)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, name, value, follow_symlinks=False)


# Odd files.


def _make_odd(root: Path, bytes_limit: int, generator: random.Random) -> tuple[int, int]:
    """Make the odd files; return their number and the bytes of content."""
    odd = root / ODD
    odd.mkdir()
    _database(root / DATABASE, min(bytes_limit // 2, 48 << 20), generator)
    _sparse(odd, generator)
    _linked(odd, generator)
    _attributed(odd, generator)
    _named(odd, generator)
    _special(odd)
    _crowded(odd, generator)
    _flagged(odd, root / IMMUTABLE)
    count = used = 0
    for directory, _, names in os.walk(os.fsencode(odd)):
        for name in names:
            status = os.lstat(os.path.join(directory, name))
            count += 1
            used += status.st_blocks * 512
    return count, used


def _database(path: Path, size: int, generator: random.Random) -> None:
    with path.open("wb") as file:
        for _ in range(max(1, size // _BUFFER)):
            file.write(generator.randbytes(min(size, _BUFFER)))


def _sparse(odd: Path, generator: random.Random) -> None:
    for number in range(8):
        with (odd / f"sparse{number}").open("wb") as file:
            for _ in range(number + 1):
                file.seek(generator.randrange(64 << 20))
                file.write(generator.randbytes(generator.randrange(1, 20_000)))
            file.truncate(64 << 20)
    with (odd / "sparse_all").open("wb") as file:
        file.truncate(1 << 30)
    with (odd / "preallocated").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2 << 20)
        file.seek(300_000)
        file.write(generator.randbytes(100_000))


def _linked(odd: Path, generator: random.Random) -> None:
    for group in range(20):
        first = odd / f"linked{group}"
        first.write_bytes(generator.randbytes(generator.randrange(30_000)))
        for number in range(1, 2 + group % 5):
            place = odd / "links" / f"place{number}"
            place.mkdir(parents=True, exist_ok=True)
            os.link(first, place / f"linked{group}")


def _attributed(odd: Path, generator: random.Random) -> None:
    for number in range(40):
        path = odd / f"attributed{number}"
        path.write_bytes(generator.randbytes(generator.randrange(9000)))
        os.setxattr(path, "user.landfall", generator.randbytes(1 + number * 20))
        if number % 2:
            os.setxattr(path, "trusted.landfall", b"only root reads this")
        if number % 4 == 0:
            os.setxattr(path, "user.empty", b"")
            os.setxattr(path, "user.large", generator.randbytes(3000))
        if number % 5 == 0:
            set_acl(path, b"system.posix_acl_access", 2000 + number)
    capable = odd / "capable"
    capable.write_bytes(b"#!/bin/true\n")
    capable.chmod(0o755)
    os.setxattr(capable, "security.capability", struct.pack("<IIIII", 0x02000001, 0x400, 0, 0, 0))
    for number, mode in enumerate((0o4755, 0o2755, 0o1777, 0o000, 0o444)):
        path = odd / f"mode{number}"
        path.write_bytes(b"mode")
        path.chmod(mode)
    for number, moment in enumerate((0, -1, 2**31 + 5, 10**9 * 2)):
        path = odd / f"moment{number}"
        path.write_bytes(b"moment")
        os.utime(path, ns=(0, moment * 10**9 + 999_999_999))


ODD_NAMES = (
    b"new\nline", b"escape\x1b[31mred", b"not-utf8-\xff\xfe", b" leading and trailing ", b"-rf", b"--help", b"tab\there", b"back\\slash",
    b"quote'\"`$(true)", b"NFC-\xc3\xa9", b"NFD-e\xcc\x81", b"right-to-left-\xe2\x80\xaeexe.txt", b"CASE", b"case", b"Case", b"...",
    b"a" * 255,
    b"\xe6\xb0\xb4" * 85, b"con", b"nul.txt", b"star*?", b"semi;colon", b"percent%41", b"{{ braces }}",
)  # fmt: skip


def _named(odd: Path, generator: random.Random) -> None:
    (odd / "names").mkdir()
    names = os.fsencode(odd / "names")
    for name in ODD_NAMES:
        descriptor = os.open(os.path.join(names, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(descriptor, generator.randbytes(generator.randrange(6000)))
        os.close(descriptor)
    deep = odd
    for level in range(40):
        deep /= f"deep{level:02}-{'x' * 40}"
    deep.mkdir(parents=True)
    (deep / "bottom").write_bytes(generator.randbytes(5000))


def _special(odd: Path) -> None:
    for number in range(20):
        (odd / f"empty{number}").touch()
    (odd / "symlink").symlink_to("database")
    (odd / "symlink_dangling").symlink_to("nowhere/at/all")
    (odd / "symlink_long").symlink_to("/".join(["long"] * 200))
    (odd / "symlink_medium").symlink_to("m" * 61)
    (odd / "symlink_directory").symlink_to("links")
    (odd / "symlink_absolute").symlink_to("/etc/passwd")
    os.mkfifo(odd / "fifo", 0o620)
    os.mknod(odd / "character", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(odd / "block", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    os.mknod(odd / "socket", stat.S_IFSOCK | 0o755)


def _crowded(odd: Path, generator: random.Random) -> None:
    crowded = odd / "crowded"
    crowded.mkdir()
    for number in range(1000):
        (crowded / f"entry-{number:04}-{'y' * (number % 60)}").write_bytes(generator.randbytes(number % 97))


def _flagged(odd: Path, immutable: Path) -> None:
    """Set chattr flags and project ids, as far as the filesystem has them."""
    for path, flags, project in ((odd / "nodump", 0x40, 0), (odd / "project", 0, 4711), (immutable, attributes.IMMUTABLE, 0)):
        path.write_bytes(b"flagged " * 700)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with _where_supported():
                attributes.set_project(descriptor, project)
            with _where_supported():
                attributes.set_flags(descriptor, flags)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _where_supported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS):
            raise
