"""Read a mounted tree: every promised attribute and the content of every file, by descriptors that follow no link.

A file's identity is its file handle (inode and generation number), so a reused inode number is another file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import stat
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# include/uapi/linux/fs.h
_GETFLAGS = 0x80086601
_FSGETXATTR = 0x801C581F
# What a filesystem sets by itself: encrypted, index, extents, huge, verity, ea_inode, dax, inline data, casefold.
_INHERENT_FLAGS = 0x800 | 0x1000 | 0x40000 | 0x80000 | 0x100000 | 0x200000 | 0x2000000 | 0x10000000 | 0x40000000
_AT_EMPTY_PATH = 0x1000
_MNT_DETACH = 2
_CHUNK = 1 << 20
_SPARSE_DIGEST_ABOVE = 16 << 20
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Node:
    """One inode as one of its paths shows it. ``content`` is a digest of regular files, the target of symlinks, else empty."""

    inode: int
    identity: bytes  # file handle; empty where none was asked
    kind: int  # S_IFMT
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    device: int
    content: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]
    project: int
    flags: int

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.kind == stat.S_IFDIR


@dataclass(frozen=True, slots=True)
class Tree:
    """All paths of a tree, relative to its root (the root itself is ``b""``), lost+found left out."""

    nodes: dict[bytes, Node]
    links: dict[int, tuple[bytes, ...]]  # inode -> its paths, for what is not a directory
    by_identity: dict[bytes, tuple[bytes, ...]]  # file handle -> its paths
    bytes_read: int

    def children(self) -> dict[bytes, set[bytes]]:
        """Return the names in each directory."""
        names: dict[bytes, set[bytes]] = defaultdict(set)
        for path in self.nodes:
            if path:
                parent, name = os.path.split(path)
                names[parent].add(name)
        return names


EMPTY = Tree({}, {}, {}, 0)
"""The tree of an image that is one hole (a first transfer's base)."""


@contextlib.contextmanager
def mounted(image: Path, filesystem: str) -> Iterator[Path]:
    """Mount a frozen image read-only, without replay of its log, for as long as the context lasts.

    The loop device is given up at once and vanishes with the mount, also when this process is killed: the mount lives in a
    namespace of its own.
    """
    options = "ro,noload" if filesystem == "ext4" else "ro,norecovery,nouuid"
    point = Path(tempfile.mkdtemp(prefix="landfall-check-"))
    try:
        device = command("losetup", "--read-only", "--find", "--show", str(image)).strip()
        try:
            command("mount", "-t", filesystem, "-o", f"{options},nosuid,nodev,noexec", device, str(point))
        finally:
            command("losetup", "--detach", device)
        try:
            yield point
        finally:
            command("umount", str(point))
    finally:
        point.rmdir()


def let_go_of_mounts(*needed: Path | None) -> None:
    """Detach in this namespace, which must be nobody else's, the loop mounts that no ``needed`` path lies on.

    A copy of a mount keeps its device busy after everybody else has unmounted it.
    """
    ours = (Path(__file__), Path(sys.prefix), Path(sys.base_prefix), Path(tempfile.gettempdir()), Path("/usr/bin"))
    kept = [path.resolve() for path in (*needed, *ours) if path]
    for line in reversed(Path("/proc/self/mountinfo").read_bytes().splitlines()):
        left, _, right = line.partition(b" - ")
        point = re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code.group(1), 8)]), left.split(b" ")[4])
        if right.split(b" ")[1].startswith(b"/dev/loop") and not any(path.is_relative_to(os.fsdecode(point)) for path in kept):
            _LIBC.umount2(point, _MNT_DETACH)


def command(*argv: str, stdin: bytes = b"") -> str:
    """Return what a program printed; RuntimeError with its own words if it failed."""
    done = subprocess.run(argv, input=stdin, capture_output=True, check=False, timeout=300, env={**os.environ, "LC_ALL": "C.UTF-8"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: status {done.returncode}: {done.stderr.decode(errors='replace').strip()[-800:]}")
    return done.stdout.decode("utf-8", "surrogateescape")


def read_tree(root: Path, label: str, *, handles: bool) -> Tree:
    """Return everything promised about the tree at ``root``. What cannot be read gets a content that equals nothing."""
    sys.setrecursionlimit(20_000)
    nodes: dict[bytes, Node] = {}
    digests: dict[int, bytes] = {}
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        nodes[b""] = _node(top, b"", label, digests, handles=handles)
        _descend(top, b"", nodes, digests, label, handles=handles)
    finally:
        os.close(top)
    links: dict[int, list[bytes]] = defaultdict(list)
    known: dict[bytes, list[bytes]] = defaultdict(list)
    for path, node in nodes.items():
        if not node.is_directory:
            links[node.inode].append(path)
        if node.identity:
            known[node.identity].append(path)
    total = sum(node.size for node in {n.inode: n for n in nodes.values() if n.kind == stat.S_IFREG}.values())
    return Tree(
        nodes,
        {inode: tuple(sorted(paths)) for inode, paths in links.items()},
        {identity: tuple(sorted(paths)) for identity, paths in known.items()},
        total,
    )


def _descend(directory: int, prefix: bytes, nodes: dict[bytes, Node], digests: dict[int, bytes], label: str, *, handles: bool) -> None:
    device = os.fstat(directory).st_dev
    for name in sorted(os.fsencode(entry) for entry in os.listdir(directory)):
        path = prefix + name
        if path == b"lost+found":
            continue
        entry = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            node = nodes[path] = _node(entry, path, label, digests, handles=handles)
            if node.is_directory and os.fstat(entry).st_dev == device:
                inner = os.open(f"/proc/self/fd/{entry}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    _descend(inner, path + b"/", nodes, digests, label, handles=handles)
                finally:
                    os.close(inner)
        finally:
            os.close(entry)


def _node(fd: int, path: bytes, label: str, digests: dict[int, bytes], *, handles: bool) -> Node:
    status, link = os.fstat(fd), f"/proc/self/fd/{fd}"
    kind, content, project, flags = stat.S_IFMT(status.st_mode), b"", 0, 0
    if kind == stat.S_IFLNK:
        content = os.readlink(b"", dir_fd=fd)
    elif kind in (stat.S_IFREG, stat.S_IFDIR):
        opened = os.open(link, os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC)
        try:
            project, flags = _project_and_flags(opened)
            if kind == stat.S_IFREG:
                if status.st_ino not in digests:
                    digests[status.st_ino] = _digest(opened, status.st_size, label, path)
                content = digests[status.st_ino]
        finally:
            os.close(opened)
    return Node(
        status.st_ino,
        _handle(fd) if handles else b"",
        kind,
        stat.S_IMODE(status.st_mode),
        status.st_uid,
        status.st_gid,
        0 if kind == stat.S_IFDIR else status.st_size,
        status.st_mtime_ns,
        status.st_rdev,
        content,
        tuple(sorted((os.fsencode(name), os.getxattr(link, name)) for name in os.listxattr(link))),
        project,
        flags,
    )


def _digest(fd: int, size: int, label: str, path: bytes) -> bytes:
    try:
        return file_digest(fd, size)
    except OSError as error:
        return b"unreadable in " + label.encode() + b": " + os.fsencode(error.strerror or "") + b" " + path


def file_digest(fd: int, size: int) -> bytes:
    """Return the sha256 of a file. Above 16 MiB it is folded over offset and bytes of the chunks that are not all zeros.

    That keeps a sparse terabyte readable and is the same for a hole and for written zeros.
    """
    fold, at = hashlib.sha256(), 0
    if size <= _SPARSE_DIGEST_ABOVE:
        while chunk := os.pread(fd, _CHUNK, at):
            fold.update(chunk)
            at += len(chunk)
        return fold.digest()
    for start, end in data_ranges(fd, size):
        for at in range(start - start % _CHUNK, end, _CHUNK):
            chunk = os.pread(fd, _CHUNK, at)
            if chunk.strip(b"\0"):
                fold.update(struct.pack("<Q", at) + chunk)
    return fold.digest()


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a file that are not holes, widened to whole chunks of 1 MiB and joined; a block device has no holes."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        yield 0, size
        return
    at, last_end = 0, 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        start, end = max(start - start % _CHUNK, last_end), min(-(-at // _CHUNK) * _CHUNK, size)
        if start < end:
            yield start, end
        last_end = end
        at = max(at, end)


def _project_and_flags(fd: int) -> tuple[int, int]:
    raw, flags = bytearray(28), bytearray(8)
    try:
        fcntl.ioctl(fd, _FSGETXATTR, raw)
        fcntl.ioctl(fd, _GETFLAGS, flags)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
            return 0, 0
        raise
    return struct.unpack_from("<I", raw, 12)[0], struct.unpack_from("<I", flags)[0] & ~_INHERENT_FLAGS


def _handle(fd: int) -> bytes:
    raw = ctypes.create_string_buffer(struct.pack("<Ii", 128, 0) + bytes(128))
    mount_id = ctypes.c_int()
    if _LIBC.name_to_handle_at(fd, b"", raw, ctypes.byref(mount_id), _AT_EMPTY_PATH) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "name_to_handle_at")
    length, kind = struct.unpack_from("<Ii", raw.raw)
    return struct.pack("<i", kind) + raw.raw[8 : 8 + length]
