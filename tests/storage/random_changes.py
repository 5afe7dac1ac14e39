"""Random trees, and random changes of every kind to them."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

from agent.contract.identity import FilesystemKind
from agent.system import attributes
from agent.system.blockdev import punch

NAMES = (b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h", b"\xff\xfe", b"line\nfeed", "naïve".encode(), b"n" * 255, b".dot", b"..a")


class Changes:
    """Acts on a mounted tree; what cannot be done (the name is taken, there is nothing to act on) is not done."""

    def __init__(self, root: Path, chance: random.Random, kind: FilesystemKind) -> None:
        self.root, self.chance, self.kind = os.fsencode(root), chance, kind

    def grow(self, steps: int) -> None:
        """Makes a tree."""
        for _ in range(steps):
            self._act(self.chance.choices((self.make_file, self.make_folder, self.make_odd, self.link, self.attribute), (8, 4, 2, 2, 1))[0])

    def change(self, steps: int) -> None:
        """Changes it in every way that trees change."""
        acts = (
            self.make_file, self.make_folder, self.make_odd, self.link, self.rewrite, self.append, self.truncate, self.punch,
            self.attribute, self.delete, self.delete, self.delete_tree, self.rename, self.rename, self.swap, self.safe_save,
            self.replace, self.remake_folder,
        )  # fmt: skip
        for _ in range(steps):
            self._act(self.chance.choice(acts))

    def _act(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (FileExistsError, NotADirectoryError, IsADirectoryError, IndexError):
            return
        except OSError as error:
            if error.errno not in (1, 22, 36, 39, 18, 17):  # locked, into itself, name too long, not empty, across, exists
                raise

    def _all(self, *kinds: int) -> list[bytes]:
        found = []
        for above, folders, files in os.walk(self.root):
            found += [os.path.join(above, name) for name in folders + files if name != b"lost+found"]
        return sorted(path for path in found if not kinds or stat.S_IFMT(os.lstat(path).st_mode) in kinds)

    def _file(self) -> bytes:
        return self.chance.choice(self._all(stat.S_IFREG))

    def _free(self) -> bytes:
        folder = self.chance.choice([self.root, *self._all(stat.S_IFDIR)])
        return os.path.join(folder, self.chance.choice(NAMES))

    def _fill(self, path: bytes) -> None:
        with open(path, "xb") as file:
            match self.chance.randrange(5):
                case 0:
                    pass
                case 1:
                    file.write(self.chance.randbytes(self.chance.randrange(1, 60)))
                case 2:
                    file.seek(self.chance.randrange(1, 20) * 4096)
                    file.write(self.chance.randbytes(self.chance.randrange(1, 9000)))
                    file.truncate(file.tell() + self.chance.randrange(50_000))
                case 3:
                    file.write(self.chance.randbytes(self.chance.randrange(1, 30_000)))
                    os.posix_fallocate(file.fileno(), 0, 65_536)
                case _:
                    file.write(self.chance.randbytes(self.chance.randrange(1, 60_000)))

    def make_file(self) -> None:
        self._fill(self._free())

    def make_folder(self) -> None:
        os.mkdir(self._free(), self.chance.choice((0o755, 0o700, 0o2775, 0o1777)))

    def make_odd(self) -> None:
        path = self._free()
        match self.chance.randrange(4):
            case 0:
                os.symlink(self.chance.choice((b"x", b"/etc/passwd", b"../.." + b"/long" * 40)), path)
            case 1:
                os.mkfifo(path, 0o640)
            case 2:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, self.chance.randrange(1, 300)))
            case _:
                os.mknod(path, stat.S_IFSOCK | 0o755)

    def link(self) -> None:
        source = self.chance.choice(self._all(stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO))
        os.link(source, self._free(), follow_symlinks=False)

    def rewrite(self) -> None:
        with open(self._file(), "r+b") as file:
            file.seek(self.chance.randrange(0, 40_000))
            file.write(self.chance.randbytes(self.chance.randrange(1, 9000)))

    def append(self) -> None:
        with open(self._file(), "ab") as file:
            file.write(self.chance.randbytes(self.chance.randrange(1, 20_000)))

    def truncate(self) -> None:
        os.truncate(self._file(), self.chance.choice((0, 1, 4096, self.chance.randrange(50_000))))

    def punch(self) -> None:
        path = self._file()
        size = os.stat(path).st_size
        with open(path, "r+b") as file:
            punch(file.fileno(), size // 3, max(size // 2, 1))

    def attribute(self) -> None:
        path = self.chance.choice(self._all())
        kind = stat.S_IFMT(os.lstat(path).st_mode)
        match self.chance.randrange(5):
            case 0 if kind != stat.S_IFLNK:
                os.chmod(path, self.chance.choice((0o600, 0o4755, 0o2711, 0o444, 0o777)))
            case 1:
                os.lchown(path, self.chance.randrange(3000), self.chance.randrange(3000))
            case 2 if kind in (stat.S_IFREG, stat.S_IFDIR):
                os.setxattr(path, b"user.%d" % self.chance.randrange(3), self.chance.randbytes(self.chance.randrange(100)))
            case 3:
                at = self.chance.randrange(-(10**17), 2 * 10**18) if self.kind is FilesystemKind.XFS else self.chance.randrange(2 * 10**18)
                os.utime(path, ns=(at, at), follow_symlinks=False)
            case _ if kind in (stat.S_IFREG, stat.S_IFDIR):
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                attributes.set_flags(fd, self.chance.choice((0, 0, 0x40, 0x80, attributes.IMMUTABLE, attributes.APPEND)))
                os.close(fd)
            case _:
                os.setxattr(path, b"trusted.t", b"value", follow_symlinks=False)

    def delete(self) -> None:
        path = self.chance.choice(self._all())
        if stat.S_ISDIR(os.lstat(path).st_mode):
            os.rmdir(path)
        else:
            os.unlink(path)

    def delete_tree(self) -> None:
        self._remove_tree(self.chance.choice(self._all(stat.S_IFDIR)))

    def _remove_tree(self, path: bytes) -> None:
        for above, folders, files in os.walk(path, topdown=False):
            for name in files:
                os.unlink(os.path.join(above, name))
            for name in folders:
                below = os.path.join(above, name)
                (os.unlink if os.path.islink(below) else os.rmdir)(below)
        os.rmdir(path)

    def remake_folder(self) -> None:
        """Replaces a tree by a new one of the same name, as an upgrade does."""
        path = self.chance.choice(self._all(stat.S_IFDIR))
        names = [entry.name for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)]
        self._remove_tree(path)
        os.mkdir(path)
        for name in names[: self.chance.randrange(4)]:
            self._fill(os.path.join(path, name))

    def rename(self) -> None:
        source, aim = self.chance.choice(self._all()), self._free()
        if not os.path.lexists(aim):
            os.rename(source, aim)

    def replace(self) -> None:
        os.rename(self.chance.choice(self._all()), self._free())

    def swap(self) -> None:
        one, other = self.chance.choice(self._all()), self.chance.choice(self._all())
        if one == other or other.startswith(one + b"/") or one.startswith(other + b"/"):
            return
        os.rename(one, self.root + b"/swapping")
        os.rename(other, one)
        os.rename(self.root + b"/swapping", other)

    def safe_save(self) -> None:
        path = self._file()
        new = os.path.join(os.path.dirname(path), b".saving")
        self._fill(new)
        os.rename(new, path)
