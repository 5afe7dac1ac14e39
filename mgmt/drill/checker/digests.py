"""Every file of a mounted tree with its attributes and its content's SHA-256, as one JSON object: path -> what is there.

Needs nothing but Python's own library, so that it can be sent to any machine: ``python3 - ROOT < digests.py``. Names that are not UTF-8
are lone surrogates. lost+found is left out; so are extended attributes that are a filesystem's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys

_BLOCK = 4096
_SPARSE_ABOVE = 16 << 20
_KINDS = {
    stat.S_IFREG: "regular",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character",
    stat.S_IFBLK: "block",
}


def listing(root: str) -> dict[str, dict[str, object]]:
    """Return the tree below ``root``, itself under the name "."."""
    found = {".": _described(root)}
    # Forty directories of long names are longer than a path may be: each is entered, and its names are relative.
    for directory, folders, names, descriptor in os.fwalk(root):
        if directory == root and "lost+found" in folders:
            folders.remove("lost+found")
        for name in sorted(folders + names):
            path = os.path.relpath(os.path.join(directory, name), root)
            found[path] = _described(f"/proc/self/fd/{descriptor}/{name}")
    return found


def _described(path: str) -> dict[str, object]:
    status = os.lstat(path)
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    told: dict[str, object] = {"kind": kind, "mode": stat.S_IMODE(status.st_mode), "uid": status.st_uid, "gid": status.st_gid}
    if kind != "directory":
        told |= {"mtime_ns": status.st_mtime_ns, "links": status.st_nlink, "size": status.st_size}
    if kind == "regular":
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOATIME)) as file:
            if status.st_size > _SPARSE_ABOVE:
                told["sha256_of_blocks"] = _sparse_digest(file.fileno(), status.st_size)
            else:
                told["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    elif kind == "symlink":
        told["target"] = os.readlink(path)
    elif kind in {"character", "block"}:
        told["device"] = status.st_rdev
    names = sorted(os.listxattr(path, follow_symlinks=False))
    told["xattrs"] = {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names}
    return told


def _sparse_digest(descriptor: int, size: int) -> str:
    """Return a digest of the blocks that are not zeros, with their numbers: files of mostly holes are quick, wherever the holes are."""
    digest = hashlib.sha256()
    at = 0
    while at < size:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA) // _BLOCK * _BLOCK
        except OSError:  # ENXIO: nothing but a hole from here on
            break
        end = os.lseek(descriptor, at, os.SEEK_HOLE)
        while at < end:
            block = os.pread(descriptor, _BLOCK, at)
            if block.count(0) != len(block):
                digest.update(at.to_bytes(8, "little") + block)
            at += _BLOCK
    return digest.hexdigest()


if __name__ == "__main__":
    json.dump(listing(sys.argv[1]), sys.stdout)
