"""A tree with something of everything, and every kind of change to it."""

from __future__ import annotations

import os
import random
import socket
import stat
from pathlib import Path

from tests.storage.frozen_images import command, copied_tree

FILES = (
    "append in-place safe-save delete truncate grow punch unwritten chmod chown touch link-gone link-more xattr xattr-drop acl swap-a "
    "swap-b move shrink-xattr replaced kind-change untouched open-deleted punch-hidden flags"
)


def fill(root: Path, random_bytes: random.Random) -> None:
    """Make the base: something of everything."""
    copied_tree(Path("/usr/share/perl5"), root / "tree", 150)
    for name in FILES.split():
        (root / name).write_bytes(random_bytes.randbytes(random_bytes.randrange(1, 60_000)))
    (root / "punch").write_bytes(random_bytes.randbytes(400_000))
    (root / "punch-hidden").write_bytes(random_bytes.randbytes(400_000))
    (root / "small").write_bytes(b"in the inode" * 4)
    (root / "small-grows").write_bytes(b"in the inode" * 4)
    (root / "sparse").write_bytes(b"head")
    os.truncate(root / "sparse", 50_000_000)
    os.link(root / "link-gone", root / "link-gone-2")
    os.link(root / "link-more", root / "link-more-2")
    (root / "symlink-short").symlink_to("short")
    (root / "symlink-long").symlink_to("long/" * 100)
    os.mkfifo(root / "fifo")
    for folder in ("d1", "d2", "many", "gone", "old-name"):
        (root / folder).mkdir()
    (root / "old-name" / "inside").write_bytes(b"moves with its directory")
    (root / "gone" / "below").write_bytes(random_bytes.randbytes(9000))
    for number in range(3000):
        (root / "many" / f"entry-{number:05d}-{'x' * 40}").touch()
    os.setxattr(root / "xattr-drop", "user.a", b"1")
    os.setxattr(root / "shrink-xattr", "user.big", b"b" * 3000)
    for name in ("shared-1", "shared-2", "shared-3"):
        (root / name).write_bytes(name.encode())
        os.setxattr(root / name, "user.same", b"s" * 2000)
    fragment(root / "deep", 700)
    fragment(root / "filler", 50)


def fragment(path: Path, pieces: int) -> None:
    """Make a file of single blocks with holes between: more extents than fit the inode."""
    with open(path, "wb") as file:
        for number in range(pieces):
            os.pwrite(file.fileno(), number.to_bytes(4, "little") * 1024, number * 8192)
        os.fsync(file.fileno())


def change(root: Path, random_bytes: random.Random, *, allocates: bool = True) -> None:
    """Make the target: every kind of change; ``allocates``: the filesystem has unwritten extents and holes can be punched."""
    with open(root / "append", "ab") as file:
        file.write(random_bytes.randbytes(30_000))
    with open(root / "in-place", "r+b") as file:
        file.write(b"new beginning")
    (root / "safe-save.tmp").write_bytes(random_bytes.randbytes(20_000))
    (root / "safe-save.tmp").rename(root / "safe-save")
    (root / "delete").unlink()
    os.truncate(root / "truncate", 100)
    os.truncate(root / "grow", 300_000)
    for name, times in (("punch", None), ("punch-hidden", (root / "punch-hidden").stat())):
        if allocates:
            command("fallocate", "--punch-hole", "--offset", "8192", "--length", "16384", str(root / name))
        else:
            os.truncate(root / name, 8192)
        if times:
            os.utime(root / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    if allocates:
        command("fallocate", "--offset", "100000", "--length", "500000", str(root / "unwritten"))
        command("fallocate", "--keep-size", "--length", "200000", str(root / "grow"))
    (root / "chmod").chmod(0o4751)
    os.chown(root / "chown", 70_001, 70_002)
    os.utime(root / "touch", ns=(0, -1_500_000_001))
    (root / "link-gone-2").unlink()
    os.link(root / "link-more", root / "d1" / "link-more-3")
    os.setxattr(root / "xattr", "user.small", b"v")
    os.setxattr(root / "xattr", "trusted.big", b"t" * 3500)
    os.setxattr(root / "xattr", "security.odd", b"\0\1")
    os.removexattr(root / "xattr-drop", "user.a")
    os.setxattr(root / "shrink-xattr", "user.big", b"b")
    (root / "shared-1").unlink()
    command("setfacl", "-m", "u:70003:rw,g:70004:r", str(root / "acl"))
    command("setfacl", "-d", "-m", "u:70003:rwx", str(root / "d2"))
    (root / "swap-a").rename(root / "swap-t")
    (root / "swap-b").rename(root / "swap-a")
    (root / "swap-t").rename(root / "swap-b")
    (root / "move").rename(root / "d1" / "moved")
    (root / "old-name").rename(root / "d2" / "new-name")
    (root / "gone" / "below").unlink()
    (root / "gone").rmdir()
    (root / "kind-change").unlink()
    (root / "kind-change").mkdir()
    (root / "small").write_bytes(b"other in the inode")
    with open(root / "small-grows", "ab") as file:
        file.write(b"y" * 10_000)
    with open(root / "sparse", "r+b") as file:
        os.pwrite(file.fileno(), b"far", 40_000_000)
    (root / "all-hole").touch()
    os.truncate(root / "all-hole", 10_000)
    (root / "empty").touch()
    (root / "symlink-short").unlink()
    (root / "symlink-short").symlink_to("other")
    (root / "symlink-59").symlink_to("l" * 59)
    (root / "symlink-60").symlink_to("l" * 60)
    os.mkfifo(root / "fifo-2", 0o640)
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(root / "disk", 0o660 | stat.S_IFBLK, os.makedev(259, 70_000))
    with socket.socket(socket.AF_UNIX) as listener:
        directory = os.open(root, os.O_RDONLY)
        try:
            listener.bind(f"/proc/self/fd/{directory}/socket")
        finally:
            os.close(directory)
    for odd in (b"not-utf8-\xff\xfe", b"new\nline", b" space ", b"-rf", b"x" * 255, "größe".encode()):
        with open(os.path.join(os.fsencode(root), odd), "wb") as file:
            file.write(odd)
    for number in range(3000, 10_000):
        (root / "many" / f"entry-{number:05d}-{'x' * 40}").touch()
    for number in range(0, 3000, 7):
        (root / "many" / f"entry-{number:05d}-{'x' * 40}").unlink()
    with open(root / "deep", "r+b") as file:
        os.pwrite(file.fileno(), b"changed in the middle", 350 * 8192)
        os.pwrite(file.fileno(), b"more" * 2048, 701 * 8192)
    with open(root / "short-lived", "wb") as file:
        file.write(random_bytes.randbytes(3_000_000))
        os.fsync(file.fileno())
    (root / "short-lived").unlink()
    command("chattr", "+d", str(root / "flags"))
    changed = sorted(path for path in (root / "tree").rglob("*") if path.is_file() and not path.is_symlink())
    for path in changed[::10]:
        with open(path, "ab") as file:
            file.write(b"# one line more\n")
